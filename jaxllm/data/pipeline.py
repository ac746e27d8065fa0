"""`jaxllm data CONFIG`: raw pages to training text. Four steps, each of which goes on where a kill left it:

1. map: every unit of input through the stages that look at one document (map_unit.py), in worker processes
2. decide: names, duplicates and copies over all documents (overall.py, dedup.py, mixture.py)
3. write: every unit's documents and removals (outputs.py), in worker processes
4. account and publish: counts, hashes, report; the manifest last
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import pathlib
import shutil
import sys
import time

from jaxllm import config
from jaxllm.data import account, homographs, mixture, outputs, overall, stages
from jaxllm.data.classifier import ready
from jaxllm.data.map_unit import Worker
from jaxllm.data.pipeline_config import DataVerb
from jaxllm.data.processes import in_order, n_cores
from jaxllm.data.progress import Progress
from jaxllm.data.raw import find_files, status_of, units
from jaxllm.data.signatures import load_earlier
from jaxllm.data.unit_files import read_index, read_lines, unit_folder, write_whole
from jaxllm.errors import RunError, UserError, stopping_at_once, writing

VERSION = 1  # of what units hold; another one starts anew
OLD = "work.old"  # what run.overwrite is deleting
EARLY = 2000  # documents after which a chain that has kept none is stopped


def main(cfg: DataVerb) -> dict:
    """Cleans the sources into run.dir; returns the manifest's totals."""
    if not cfg.sources:
        raise UserError("sources is empty; should hold a name and a path, e.g. --sources.web.path=pages/")
    files = {name: find_files(s.path, f"sources.{name}.path") for name, s in cfg.sources.items()}
    folder, plan = pathlib.Path(cfg.run.dir).expanduser(), plan_of(cfg, files)
    _check_apart(cfg, files, folder)
    cfg = seeded(cfg)
    if finished := finished_before(folder, cfg, plan):
        _remove_rest(folder)
        say(f"{folder} is finished: {finished['documents']:,} documents; nothing to do (run.overwrite=true starts anew)")
        return finished
    index = checked(cfg, files, folder, plan)
    with claimed(folder), stopping_at_once(str(folder)):
        work, tables = start(folder, plan, index)
        n_units = map_all(cfg, files, work)
        _check_something_left(work, n_units, cfg)
        found = overall.catalogue(str(work), n_units, list(cfg.sources))
        fates = overall.decide(cfg, found, cfg.workers or n_cores(), say)
        fates.report |= tables
        _check_something_decided(fates)
        parts = write_all(cfg, work, found, fates)
        manifest = account.finish(cfg, work, n_units, found, fates, parts)
        outputs.publish(work, folder)
    account.show(manifest, folder, say)
    return manifest["totals"] | {"folder": str(folder)}


def checked(cfg: DataVerb, files: dict, folder: pathlib.Path, plan: dict):
    """Raises UserError for every mistake that can be known before the work; returns the index of evaluation items, if any.

    Nothing of the folder is written or deleted yet.
    """
    _check_apart(cfg, files, folder)
    for name, (_, paths) in files.items():
        if not any(status_of(path).st_size for path in paths):
            raise UserError(f"sources.{name}.path={cfg.sources[name].path}: its files are empty; take the source out")
    if cfg.dedup.use:
        load_earlier(cfg.dedup)
    if cfg.mix.by == "source":
        mixture.check_names("mix.weights", cfg.mix.weights, list(cfg.sources))
    if cfg.homographs.terms:
        mixture.check_names("homographs.terms: source", homographs.read_terms(cfg.homographs.terms), list(cfg.sources))
    for name, group in (("filter", cfg.filter.classifier), ("harm", cfg.harm.classifier)):
        ready(group, f"{name}.classifier")
    work = folder / "work"
    return stages.checked(cfg, str(work) if _begun(work, plan) else "")


def _remove_rest(folder: pathlib.Path) -> None:
    """Removes what a kill in the last moment, after the manifest was in place, has left of the work."""
    if (folder / "work").is_dir():
        with claimed(folder):
            shutil.rmtree(folder / "work", ignore_errors=True)


def _check_apart(cfg: DataVerb, files: dict, folder: pathlib.Path) -> None:
    """Raises UserError where the run would read what it writes, or delete what it reads."""
    out = folder.resolve()
    read = [(f"sources.{name}.path", s.path, files[name][1]) for name, s in cfg.sources.items()]
    read += [(key, path, [path]) for key, path in named_files(config.to_dict(cfg)) if not key.endswith("classifier.path")]
    for key, path, inner in read:
        given = pathlib.Path(path).expanduser().resolve()
        if given.is_dir() and out.is_relative_to(given):
            raise UserError(f"run.dir={cfg.run.dir}: lies in {key}={path}, so its files would be read; give a folder outside")
        if any(pathlib.Path(p).expanduser().resolve().is_relative_to(out) for p in inner):
            raise UserError(f"run.dir={cfg.run.dir}: holds {key}={path}, which it would overwrite; give another folder")


def start(folder: pathlib.Path, plan: dict, index) -> tuple[pathlib.Path, dict]:
    """Makes the work folder, and in it what is made once for all workers; returns it, and tables for the report."""
    begin(folder / "work", plan)
    return folder / "work", stages.prepared(str(folder / "work"), index)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def plan_of(cfg: DataVerb, files: dict) -> dict:
    """Returns what the work depends on: settings and input files. Another plan is other work."""
    settings = json.loads(json.dumps(config.to_dict(cfg)))  # tuples as the lists that a file gives back
    del settings["workers"], settings["run"]["dir"], settings["run"]["overwrite"]
    seen = {name: [[p.relative_to(root).as_posix(), (s := status_of(p)).st_size, s.st_mtime_ns] for p in paths]
            for name, (root, paths) in files.items()}
    hashes = {name: hashlib.sha256(json.dumps(rows).encode("utf-8", "surrogateescape")).hexdigest()
              for name, rows in seen.items()}
    hashes |= {key: stamp for key, path in named_files(settings) if (stamp := stamp_of(path))}
    return {"version": VERSION, "settings": settings, "files": hashes}


# settings that name files beside the sources
NAMED = ("decontaminate.folder", "filter.lists.hosts", "filter.lists.url_words", "filter.lists.words", "harm.words",
         "harm.identity", "harm.pairs", "homographs.terms", "dedup.earlier", "filter.classifier.path", "harm.classifier.path")


def named_files(settings: dict) -> list[tuple[str, str]]:
    out = []
    for key in NAMED:
        value = functools.reduce(dict.get, key.split("."), settings)
        if key.endswith("classifier.path") and any(functools.reduce(dict.get, [*key.split(".")[:-1], "train"], settings)[k]
                                                   for k in ("good", "labelled")):
            continue  # made by this run
        out += [(key, path) for path in ([value] if isinstance(value, str) else value or ()) if path]
    return out


def stamp_of(path: str) -> str:
    """Returns a hash of the sizes and times of a file, or of all files of a folder; "" where there is none."""
    given = pathlib.Path(path).expanduser()
    paths = sorted(p for p in given.rglob("*") if p.is_file()) if given.is_dir() else [given] if given.is_file() else []
    stats = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest() if stats else ""


def seeded(cfg: DataVerb) -> DataVerb:
    """Returns the settings with run.seed added to the seeds of what is chosen by chance."""
    return dataclasses.replace(cfg, **{name: dataclasses.replace(group, seed=group.seed + cfg.run.seed)
                                       for name, group in (("mix", cfg.mix), ("augment", cfg.augment))})


def finished_before(folder: pathlib.Path, cfg: DataVerb, plan: dict) -> dict | None:
    """Returns the totals of a finished run of the same plan; raises UserError where the folder holds something else."""
    manifest, begun = folder / "manifest.json", folder / "work" / "plan.json"
    if not (manifest.is_file() or begun.is_file()):
        if folder.is_dir() and any(p.name not in _names_of_start(folder) for p in folder.iterdir()):
            raise UserError(f"{folder}: is not empty, and not of jaxllm data; give another run.dir")
        return None
    if cfg.run.overwrite:
        return None
    held = [_json_of(path) for path in (manifest, begun) if path.is_file()]
    if "totals" in held[0] and held[0]["plan"] == plan:
        return held[0]["totals"]
    held = held[-1]  # begun later than the manifest was made, which is then one that is being overwritten
    before = held.get("plan", held)
    if before != plan:
        old, new = (config.flatten(p) for p in (before, plan))
        differ = [f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        differ = ["the files of " + d.split(":")[0].removeprefix("files.") if d.startswith("files.") else
                  d.removeprefix("settings.") for d in differ]
        raise UserError(f"{folder} holds work with other settings or files ({'; '.join(differ[:5])}): set them back, give "
                        "another run.dir, or --run.overwrite=true to delete it")
    return None


def _json_of(path: pathlib.Path) -> dict:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}; give another run.dir, or "
                        "--run.overwrite=true to delete it") from None
    if not isinstance(held, dict):
        raise UserError(f"{path}: holds no JSON object; give another run.dir, or --run.overwrite=true to delete it")
    return held


def _names_of_start(folder: pathlib.Path) -> set[str]:
    """Returns what a folder may hold of a run that ended before its plan was written."""
    work = folder / "work"
    just_begun = work.is_dir() and {p.name for p in work.iterdir()} <= {"plan.json.part"}
    return {"run.lock", OLD, *(["work"] if just_begun else [])}


@contextlib.contextmanager
def claimed(folder: pathlib.Path, *, shared: bool = False):
    """Holds the folder for this process, or for all that share it; raises UserError when others have it. A kill frees it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "run.lock").open("a+", encoding="utf-8")
    with lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: in use by a live run; wait for it, or give another run.dir") from None
        yield


def _begun(work: pathlib.Path, plan: dict) -> bool:
    try:
        return json.loads((work / "plan.json").read_text(encoding="utf-8")) == plan
    except (OSError, ValueError):
        return False


def begin(work: pathlib.Path, plan: dict) -> None:
    """Makes the work folder, or keeps what an earlier start of the same plan has done."""
    folder = work.parent
    if not _begun(work, plan):
        with writing(folder):
            _remove(folder / OLD)
            if work.is_dir():
                work.replace(folder / OLD)
        write_whole(work / "plan.json", json.dumps(plan))
    with writing(folder):
        for name in ("manifest.json", *outputs.PUBLISHED, OLD):  # overwritten; after a kill while publishing, made again
            _remove(folder / name)


def _remove(path: pathlib.Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def map_all(cfg: DataVerb, files: dict, work: pathlib.Path) -> int:
    """Does every unit that is not done; returns how many there are."""
    sizes = {name: sum(status_of(p).st_size for p in paths) for name, (_, paths) in files.items()}
    progress, documents, kept, began = Progress("cleaning", sum(sizes.values()), say), 0, 0, time.perf_counter()
    n, positions = -1, {}

    def todo():
        for unit in units(cfg.sources, files, cfg.read.max_bytes):
            positions[unit.number] = unit.position
            yield unit

    for number, count in in_order(Worker(cfg, str(work)), todo(), cfg.workers or n_cores(), "workers"):
        n, documents = number, documents + count
        progress.show(positions.pop(number), f"{documents:,} documents")
        if cfg.read.on_error == "stop":
            _stop_at_unreadable(work, number)
        if not kept:
            kept += read_index(work, number)["left"]
            if not kept and documents >= EARLY:
                _stop_empty([read_index(work, i) for i in range(number + 1)])
    if n < 0:
        raise UserError("no source holds a document")
    took = time.perf_counter() - began
    say(f"cleaned {documents:,} documents, {sum(sizes.values()) / 1e6:,.1f} MB of files, in {took:.1f} s")
    return n + 1


def _stop_at_unreadable(work: pathlib.Path, number: int) -> None:
    if any(rule.startswith("read\t") and rule != "read\tempty" for rule in read_index(work, number)["rules"]):
        found = next(row for row in read_lines(unit_folder(work, number) / "removed.jsonl.zst")
                     if row["stage"] == "read" and row["rule"] != "empty")
        raise UserError(f"{found['path']}: {found['value']} (read.on_error=count removes it and goes on)")


def _check_something_left(work: pathlib.Path, n_units: int, cfg: DataVerb) -> None:
    indexes = [read_index(work, n) for n in range(n_units)]
    for name in cfg.sources:
        own = [index for index in indexes if index["source"] == name]
        if not any(index["left"] for index in own):
            _stop_empty(own, name)


def _stop_empty(indexes: list[dict], source: str | None = None) -> None:
    rules = collections.Counter()
    for index in indexes:
        rules.update(index["rules"])
    what = f"every document of source {source}" if source else f"each of the first {sum(rules.values()):,} documents"
    raise RunError(f"{what} was removed ({_worst(rules)}); change that rule's setting, or take the source out"
                   if rules else f"source {source} holds no document")


def _worst(rules: collections.Counter) -> str:
    return ", ".join(f"{rule.replace(chr(9), '.')} {n / rules.total():.0%}" for rule, n in rules.most_common(3))


def _check_something_decided(fates) -> None:
    if not fates.copies.any():
        rules = collections.Counter(f"{stage}.{rule}" for stage, rule, *_ in fates.removals.values())
        raise RunError(f"every document that the stages before had left was removed ({_worst(rules)}); change that rule's "
                       "setting")


def write_all(cfg: DataVerb, work: pathlib.Path, found, fates) -> list[dict]:
    """Writes every unit's output; returns the units' counts."""
    outputs.prepare(work)
    progress = Progress("writing", int(found.bytes.sum()), say)
    parts, position = [], 0
    todo = fates.tasks()
    writer = outputs.UnitWriter(str(work), cfg.output.format, cfg.augment)
    for part in in_order(writer, todo, cfg.workers or n_cores(), "workers"):
        parts.append(part)
        position += part["bytes"]
        progress.show(position)
    outputs.gather_removed(work, len(parts))
    return parts
