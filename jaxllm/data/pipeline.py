"""`jaxllm data CONFIG`: raw pages to training text. Four steps, each of which goes on where a kill left it:

1. map: every unit of input through the stages that look at one document (map_unit.py), in worker processes
2. decide: names, duplicates and copies over all documents (overall.py, dedup.py, mixture.py)
3. write: every unit's documents and removals (outputs.py), in worker processes
4. account and publish: counts, hashes, report; the manifest last
"""

import collections
import contextlib
import fcntl
import hashlib
import json
import pathlib
import shutil
import sys
import time

from jaxllm import config
from jaxllm.data import account, outputs, overall
from jaxllm.data.classifier import ready
from jaxllm.data.map_unit import Worker, read_index
from jaxllm.data.pipeline_config import DataVerb
from jaxllm.data.processes import in_order, n_cores
from jaxllm.data.progress import Progress
from jaxllm.data.raw import find_files, units
from jaxllm.errors import RunError, UserError, writing

VERSION = 1  # of what units hold; another one starts anew
EARLY = 2000  # documents after which a chain that has kept none is stopped


def main(cfg: DataVerb) -> dict:
    """Cleans the sources into run.dir; returns the manifest's totals."""
    if not cfg.sources:
        raise UserError("sources is empty; should hold a name and a path, e.g. --sources.web.path=pages/")
    files = {name: find_files(s.path, f"sources.{name}.path") for name, s in cfg.sources.items()}
    folder, plan = pathlib.Path(cfg.run.dir), plan_of(cfg, files)
    if finished := _check_folder(folder, cfg, plan):
        say(f"{folder} is finished: {finished['documents']:,} documents; nothing to do (run.overwrite=true starts anew)")
        return finished
    with claimed(folder):
        work = folder / "work"
        begin(work, plan)
        for name, group in (("filter", cfg.filter.classifier), ("harm", cfg.harm.classifier)):
            ready(group, f"{name}.classifier")
        n_units = map_all(cfg, files, work)
        found = overall.catalogue(str(work), n_units, list(cfg.sources))
        _check_something_left(work, n_units, cfg, found)
        fates = overall.decide(cfg, found, say)
        parts = write_all(cfg, work, found, fates)
        manifest = account.finish(cfg, work, n_units, found, fates, parts)
        outputs.publish(work, folder)
    account.show(manifest, folder, say)
    return manifest["totals"] | {"folder": str(folder)}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def plan_of(cfg: DataVerb, files: dict) -> dict:
    """Returns what the work depends on: settings and input files. Another plan is other work."""
    settings = config.to_dict(cfg)
    del settings["workers"], settings["run"]["dir"], settings["run"]["overwrite"]
    seen = {name: [[p.relative_to(root).as_posix(), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
            for name, (root, paths) in files.items()}
    hashes = {name: hashlib.sha256(json.dumps(rows).encode("utf-8", "surrogateescape")).hexdigest()
              for name, rows in seen.items()}
    return {"version": VERSION, "settings": settings, "files": hashes}


def _check_folder(folder: pathlib.Path, cfg: DataVerb, plan: dict) -> dict | None:
    """Returns the totals of a finished run of the same plan; raises UserError where the folder holds something else."""
    manifest, begun = folder / "manifest.json", folder / "work" / "plan.json"
    if cfg.run.overwrite:
        if folder.is_dir() and any(folder.iterdir()) and not (manifest.is_file() or begun.is_file()):
            raise UserError(f"{folder}: run.overwrite=true would delete what no run of jaxllm data has written; "
                            "give another run.dir")
        return None
    held = next((json.loads(p.read_text(encoding="utf-8")) for p in (begun, manifest) if p.is_file()), None)
    if held is None:
        if folder.is_dir() and any(p.name != "run.lock" for p in folder.iterdir()):
            raise UserError(f"{folder}: is not empty, and not of jaxllm data; give another run.dir")
        return None
    before = held.get("plan", held)
    if before != plan:
        old, new = (config.flatten(p) for p in (before, plan))
        differ = [f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        differ = ["the files of source " + d.split(":")[0].removeprefix("files.") if d.startswith("files.") else
                  d.removeprefix("settings.") for d in differ]
        raise UserError(f"{folder} holds work with other settings or files ({'; '.join(differ[:5])}): set them back, give "
                        "another run.dir, or --run.overwrite=true to delete it")
    return held.get("totals")


@contextlib.contextmanager
def claimed(folder: pathlib.Path):
    """Holds the folder for this process; raises UserError when a live process has it. A kill frees it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "run.lock").open("a+", encoding="utf-8")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: in use by a live run; wait for it, or give another run.dir") from None
        yield


def begin(work: pathlib.Path, plan: dict) -> None:
    """Makes the work folder, or keeps what an earlier start of the same plan has done."""
    note, folder = work / "plan.json", work.parent
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == plan:
        return
    with writing(folder):
        for name in (*outputs.PUBLISHED, "work"):  # overwritten
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (work / "units").mkdir(parents=True)
        part = note.with_suffix(".part")
        part.write_text(json.dumps(plan), encoding="utf-8")
        part.replace(note)


def map_all(cfg: DataVerb, files: dict, work: pathlib.Path) -> int:
    """Does every unit that is not done; returns how many there are."""
    sizes = {name: sum(p.stat().st_size for p in paths) for name, (_, paths) in files.items()}
    progress, documents, kept, began = Progress("cleaning", sum(sizes.values()), say), 0, 0, time.perf_counter()
    place = _Places(files)
    n = -1
    todo = (place.note(unit) for unit in units(cfg.sources, files, cfg.read.max_bytes))
    for number, count in in_order(Worker(cfg, str(work)), todo, cfg.workers or n_cores()):
        n, documents = number, documents + count
        progress.show(place.position(number), f"{documents:,} documents")
        index = read_index(work, number) if not kept or cfg.read.on_error == "stop" else None
        if cfg.read.on_error == "stop":
            _stop_at_unreadable(index)
        if not kept:
            kept += len(index["ids"])
            if not kept and documents >= EARLY:
                _stop_empty([index], cfg)
    if n < 0:
        raise UserError("no source holds a document")
    took = time.perf_counter() - began
    say(f"cleaned {documents:,} documents, {sum(sizes.values()) / 1e6:,.1f} MB of files, in {took:.1f} s")
    return n + 1


def _stop_at_unreadable(index: dict) -> None:
    for rule, found in index["samples"].items():
        if rule.startswith("read\t") and rule != "read\tempty":
            raise UserError(f"{found[0]['id']}: {found[0]['value']} (read.on_error=count removes it and goes on)")


class _Places:
    """How far in the input files each unit reaches, for the progress line."""

    def __init__(self, files: dict):
        self.starts, self.ends, total = {}, {}, 0
        for name, (root, paths) in files.items():
            for p in paths:
                total += p.stat().st_size
                self.starts[name, p.relative_to(root).as_posix()] = total

    def note(self, unit):
        self.ends[unit.number] = self.starts[unit.source, unit.items[-1].path]
        return unit

    def position(self, number: int) -> int:
        return self.ends.pop(number, 0)


def _check_something_left(work: pathlib.Path, n_units: int, cfg: DataVerb, found) -> None:
    for i, name in enumerate(cfg.sources):
        if not (found.source == i).any():
            indexes = [index for n in range(n_units) if (index := read_index(work, n))["source"] == name]
            _stop_empty(indexes, cfg, name)


def _stop_empty(indexes: list[dict], cfg: DataVerb, source: str | None = None) -> None:
    rules = collections.Counter()
    for index in indexes:
        rules.update(index["rules"])
    total = sum(rules.values())
    worst = ", ".join(f"{rule.replace(chr(9), '.')} {n / total:.0%}" for rule, n in rules.most_common(3))
    what = f"every document of source {source}" if source else f"all of the first {total:,} documents"
    raise RunError(f"{what} was removed ({worst}); change that rule's setting, or take the source out"
                   if total else f"source {source} holds no document")


def write_all(cfg: DataVerb, work: pathlib.Path, found, fates) -> list[dict]:
    """Writes every unit's output; returns the units' counts."""
    outputs.prepare(work)
    progress = Progress("writing", int(found.bytes.sum()), say)
    parts, position = [], 0
    todo = fates.tasks()
    for part in in_order(outputs.UnitWriter(str(work), cfg.output.format), todo, cfg.workers or n_cores()):
        parts.append(part)
        position += part["bytes"]
        progress.show(position)
    outputs.gather_removed(work, len(parts))
    return parts
