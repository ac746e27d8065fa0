"""What can only be decided over all documents: names, duplicates, the mixture. Their numbers go unit by unit, in order."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterator

import numpy as np

from jaxllm.data import dedup, homographs, mixture
from jaxllm.data.minhash import DedupConfig, shingles
from jaxllm.data.mixture import MixConfig
from jaxllm.data.passages import cut_passages, revised_texts
from jaxllm.data.signatures import load_earlier, save
from jaxllm.data.unit_files import read_frame, read_index, read_lines, unit_folder
from jaxllm.errors import writing

HELD = 256  # frames of texts in memory


@dataclasses.dataclass
class Catalogue:
    """Every document that the stages before left, as arrays over their numbers."""

    folder: str
    first: np.ndarray  # number of each unit's first document, and after the last one the number of all
    ids: list[str]
    source: np.ndarray  # index into `sources`
    sources: list[str]
    bytes: np.ndarray
    quality: np.ndarray  # NaN: not known
    domain: list[str]
    frames: list[list[list[int]]]  # of each unit: see unit_files.write_lines
    renamed: int  # documents whose id another one had

    def unit_of(self, number: int) -> tuple[int, int]:
        unit = int(np.searchsorted(self.first, number, side="right")) - 1
        return unit, number - int(self.first[unit])


def catalogue(folder: str, n_units: int, sources: list[str]) -> Catalogue:
    first, ids, source, sizes, quality, domain, frames, names = [0], [], [], [], [], [], [], {}
    for unit in range(n_units):
        index = read_index(folder, unit, "documents")
        n = len(index["ids"])
        ids += index["ids"]
        sizes.append(np.array(index["bytes"], np.int64))
        quality.append(np.array(index["quality"], np.float32))
        domain += [names.setdefault(name, name) for name in index["domain"]]  # one string a name
        source.append(np.full(n, sources.index(index["source"]), np.int32))
        frames.append(index["frames"])
        first.append(len(ids))
    renamed = _make_unique(ids)
    return Catalogue(folder, np.array(first), ids, np.concatenate(source), sources, np.concatenate(sizes),
                     np.concatenate(quality), domain, frames, renamed)


def _make_unique(ids: list[str]) -> int:
    """Gives a document whose id was there before another one, in place; returns how many there were."""
    taken, seen, renamed = set(ids), set(), 0
    times: dict[str, int] = {}
    for i, name in enumerate(ids):
        if name not in seen:
            seen.add(name)
            continue
        n = times.get(name, 1) + 1
        while (new := f"{name}#{n}") in taken:
            n += 1
        times[name] = n
        ids[i] = new
        taken.add(new)
        seen.add(new)
        renamed += 1
    return renamed


def signatures(folder: str, n_units: int, first: np.ndarray) -> np.ndarray:
    """Returns all signatures as one memory-mapped array, in the order of the documents' numbers."""
    path = pathlib.Path(folder) / "signatures.npy"
    parts = (np.load(unit_folder(folder, n) / "signatures.npy") for n in range(n_units))
    part = next(parts)
    with writing(path):
        if not first[-1]:
            return part
        out = np.lib.format.open_memmap(path, "w+", part.dtype, (int(first[-1]), *part.shape[1:]))
        for n in range(n_units):
            out[first[n] : first[n + 1]] = part
            part = next(parts, None)
        out.flush()
    return np.load(path, mmap_mode="r")


class Texts:
    """Looks texts up by number, as they came out of the stages before; keeps the frames last used in memory."""

    def __init__(self, found: Catalogue):
        self.found, self.held = found, collections.OrderedDict()
        self.starts = [np.array([row for row, _ in frames]) for frames in found.frames]

    def __call__(self, number: int) -> str:
        unit, row = self.found.unit_of(number)
        frame = int(np.searchsorted(self.starts[unit], row, side="right")) - 1
        first, place = self.found.frames[unit][frame]
        if (unit, frame) in self.held:
            self.held.move_to_end((unit, frame))
        else:
            if len(self.held) >= HELD:
                self.held.popitem(last=False)
            path = unit_folder(self.found.folder, unit) / "kept.jsonl.zst"
            self.held[unit, frame] = read_frame(path, place)
        return json.loads(self.held[unit, frame][row - first])["text"]


@dataclasses.dataclass
class Fates:
    """What becomes of every document that came this far."""

    found: Catalogue
    copies: np.ndarray  # how often each is written; 0 for those in `removals`
    removals: dict[int, tuple]  # number -> stage, rule, value, number of the document it repeats or an earlier run's id
    report: dict  # what the decisions tell, for the report: cluster sizes, the mixture's audit, …
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    steps: list[tuple[str, np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)  # stage, alive, bytes after it

    def __post_init__(self):
        self.alive = np.ones(len(self.found.ids), bool)

    def remove(self, number: int, stage: str, rule: str, value=None, duplicate_of: int | str | None = None) -> None:
        self.removals[number] = (stage, rule, value, duplicate_of)
        self.alive[number], self.copies[number] = False, 0

    def line(self, number: int) -> dict:
        """Returns what removed.jsonl says of a document."""
        stage, rule, value, duplicate_of = self.removals[number]
        told = {"id": self.found.ids[number], "source": self.found.sources[self.found.source[number]], "stage": stage,
                "rule": rule, "value": value}
        if duplicate_of is None:
            return told
        return told | {"duplicate_of": duplicate_of if isinstance(duplicate_of, str) else self.found.ids[duplicate_of]}

    def done(self, stage: str) -> None:
        self.steps.append((stage, self.alive.copy(), self.found.bytes.copy()))

    def tasks(self) -> Iterator[tuple[int, list[str], list[int], dict[int, dict]]]:
        """Yields what outputs.UnitWriter takes, unit by unit."""
        first = self.found.first
        for unit in range(len(first) - 1):
            low, high = int(first[unit]), int(first[unit + 1])
            removals = {n - low: self.line(n) for n in range(low, high) if n in self.removals}
            yield unit, self.found.ids[low:high], self.copies[low:high].tolist(), removals


def decide(cfg, found: Catalogue, n_workers: int, say) -> Fates:
    """Returns every document's fate, by the stages that look at all of them."""
    fates = Fates(found, np.ones(len(found.ids), np.int64), {}, {})
    if cfg.dedup.use:
        drop_duplicates(cfg.dedup, fates, say)
        fates.done("dedup")
    cut_passages(cfg, fates, n_workers, say)
    mix(cfg.mix, fates, say)
    fates.done("mix")
    if cfg.homographs.use:
        def texts():
            return ((source, text) for n, source, text in all_texts(found) if fates.copies[n])

        fates.report["words that sources use differently"] = [row._asdict() for row in homographs.report(texts, cfg.homographs)]
    return fates


def all_texts(found: Catalogue) -> Iterator[tuple[int, str, str]]:
    """Yields (number, source, text) of every document, in order."""
    number = 0
    for unit in range(len(found.first) - 1):
        changed = revised_texts(found.folder, unit)
        for i, row in enumerate(read_lines(unit_folder(found.folder, unit) / "kept.jsonl.zst")):
            yield number, row["source"], changed.get(i, row["text"])
            number += 1


def drop_duplicates(cfg: DedupConfig, fates: Fates, say) -> None:
    found, texts = fates.found, Texts(fates.found)
    table, earlier = signatures(found.folder, len(found.first) - 1, found.first), load_earlier(cfg)
    quality_N = np.nan_to_num(found.quality, nan=0.5)  # of a document without one: neither good nor bad
    decision = dedup.decide(table, lambda n: shingles(texts(n), cfg), cfg, quality_N=quality_N, earlier=earlier)
    n = len(found.ids)
    for i in np.flatnonzero(decision.duplicate_of_N >= 0).tolist():
        kept = int(decision.duplicate_of_N[i])
        fates.remove(i, "dedup", "exact" if decision.exact_N[i] else "near", round(float(decision.similarity_N[i]), 2),
                     duplicate_of=kept if kept < n else earlier.ids[kept - n])
    rows = np.flatnonzero(decision.duplicate_of_N < 0)
    save(pathlib.Path(found.folder) / "out" / "dedup", table, (found.ids[i] for i in rows), cfg, rows)
    fates.report["sizes of groups of duplicates"] = [
        {"documents": size, "groups": groups} for size, groups in sorted(decision.cluster_sizes.items()) if size > 1]
    fates.report["comparisons"] = {"pairs whose texts were compared": decision.compared,
                                   "pairs with an earlier run's document, judged by signatures": decision.estimated}
    say(f"deduplicated: {len(fates.removals):,} of {n:,} documents go, {decision.compared:,} pairs compared")


def mix(cfg: MixConfig, fates: Fates, say) -> None:
    found, left = fates.found, np.flatnonzero(fates.alive)
    if not len(left):
        return
    source = [found.sources[s] for s in found.source[left]]
    given = [source, found.bytes[left], found.quality[left], [found.domain[i] for i in left]]
    copies = mixture.decide([found.ids[i] for i in left], *given, cfg)
    fates.copies[left] = copies
    for i in left[copies == 0].tolist():
        fates.remove(i, "mix", "share")
    rows = mixture.audit(*given, copies, cfg)
    fates.report["mixture"] = rows
    for warning in (row["warning"] for row in rows if row.get("warning")):
        say(f"! mix: {warning}")
