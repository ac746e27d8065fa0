"""What can only be decided over all documents: names, duplicates, the mixture. Their numbers go unit by unit, in order."""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np

from jaxllm.data import dedup, homographs, mixture
from jaxllm.data.map_unit import read_index, read_lines, unit_folder
from jaxllm.data.minhash import DedupConfig, shingles
from jaxllm.data.mixture import MixConfig
from jaxllm.data.signatures import load_earlier, save
from jaxllm.errors import writing


@dataclasses.dataclass
class Catalogue:
    """Every document that the stages before left, as arrays over their numbers."""

    folder: str
    first: np.ndarray  # number of each unit's first document, and after the last one the number of all
    ids: list[str]
    source: np.ndarray  # index into `sources`
    sources: list[str]
    bytes: np.ndarray
    quality: np.ndarray
    domain: list[str]
    renamed: int  # documents whose id another one had

    def unit_of(self, number: int) -> tuple[int, int]:
        unit = int(np.searchsorted(self.first, number, side="right")) - 1
        return unit, number - int(self.first[unit])


def catalogue(folder: str, n_units: int, sources: list[str]) -> Catalogue:
    first, ids, source, sizes, quality, domain = [0], [], [], [], [], []
    for unit in range(n_units):
        index = read_index(folder, unit)
        ids += index["ids"]
        sizes += index["bytes"]
        quality += index["quality"]
        domain += index["domain"]
        source += [sources.index(index["source"])] * len(index["ids"])
        first.append(len(ids))
    renamed = _make_unique(ids)
    return Catalogue(folder, np.array(first), ids, np.array(source, np.int32), sources, np.array(sizes, np.int64),
                     np.array(quality, np.float32), domain, renamed)


def _make_unique(ids: list[str]) -> int:
    """Gives a document whose id was there before another one, in place; returns how many there were."""
    seen: dict[str, int] = {}
    taken, renamed = set(ids), 0
    for i, name in enumerate(ids):
        n = seen.get(name, 0)
        seen[name] = n + 1
        if n:
            new = f"{name}#{n + 1}"
            while new in taken:
                n += 1
                new = f"{name}#{n + 1}"
            ids[i] = new
            taken.add(new)
            renamed += 1
    return renamed


def signatures(folder: str, n_units: int, first: np.ndarray) -> np.ndarray:
    """Returns all signatures as one memory-mapped array, in the order of the documents' numbers."""
    path = unit_folder(folder, 0).parents[1] / "signatures.npy"
    parts = [np.load(unit_folder(folder, n) / "signatures.npy", mmap_mode="r") for n in range(n_units)]
    with writing(path):
        out = np.lib.format.open_memmap(path, "w+", parts[0].dtype, (int(first[-1]), *parts[0].shape[1:]))
        for n, part in enumerate(parts):
            out[first[n] : first[n + 1]] = part
        out.flush()
    return np.load(path, mmap_mode="r")


class Texts:
    """Looks texts up by number; keeps the units last used in memory."""

    def __init__(self, found: Catalogue, most_units: int = 8):
        self.found, self.most, self.held = found, most_units, {}

    def __call__(self, number: int) -> str:
        unit, place = self.found.unit_of(number)
        if unit not in self.held:
            if len(self.held) >= self.most:
                del self.held[next(iter(self.held))]
            self.held[unit] = [row["text"] for row in read_lines(unit_folder(self.found.folder, unit) / "kept.jsonl.zst")]
        else:
            self.held[unit] = self.held.pop(unit)  # used last
        return self.held[unit][place]


def all_texts(found: Catalogue) -> Iterator[tuple[int, str, str]]:
    """Yields (number, source, text) of every document, in order."""
    number = 0
    for unit in range(len(found.first) - 1):
        for row in read_lines(unit_folder(found.folder, unit) / "kept.jsonl.zst"):
            yield number, row["source"], row["text"]
            number += 1




@dataclasses.dataclass
class Fates:
    """What becomes of every document that came this far."""

    found: Catalogue
    copies: np.ndarray  # how often each is written; 0 for those in `removals`
    removals: dict[int, dict]  # number -> stage, rule, value (and duplicate_of, an id)
    report: dict  # what the decisions tell, for the report: cluster sizes, the mixture's audit, …

    def tasks(self) -> Iterator[tuple[int, list[str], list[int], dict[int, dict]]]:
        """Yields what outputs.UnitWriter takes, unit by unit."""
        first = self.found.first
        for unit in range(len(first) - 1):
            low, high = int(first[unit]), int(first[unit + 1])
            removals = {n - low: self.removals[n] for n in range(low, high) if n in self.removals}
            yield unit, self.found.ids[low:high], self.copies[low:high].tolist(), removals


def decide(cfg, found: Catalogue, say) -> Fates:
    """Returns every document's fate, by the stages that look at all of them."""
    fates = Fates(found, np.ones(len(found.ids), np.int64), {}, {})
    drop_duplicates(cfg.dedup, fates, say)
    mix(cfg.mix, fates, say)
    if cfg.homographs.use:
        def texts():
            return ((source, text) for n, source, text in all_texts(found) if fates.copies[n])

        fates.report["words that sources use differently"] = [row._asdict() for row in homographs.report(texts, cfg.homographs)]
    return fates


def drop_duplicates(cfg: DedupConfig, fates: Fates, say) -> None:
    found, texts = fates.found, Texts(fates.found)
    table, earlier = signatures(found.folder, len(found.first) - 1, found.first), load_earlier(cfg)
    decision = dedup.decide(table, lambda n: shingles(texts(n), cfg), cfg, quality_N=found.quality, earlier=earlier)
    n = len(found.ids)
    for i in np.flatnonzero(decision.duplicate_of_N >= 0).tolist():
        kept = int(decision.duplicate_of_N[i])
        fates.copies[i] = 0
        fates.removals[i] = {"stage": "dedup", "rule": "exact" if decision.exact_N[i] else "near", "value": None,
                             "duplicate_of": found.ids[kept] if kept < n else earlier.ids[kept - n]}
    rows = np.flatnonzero(decision.duplicate_of_N < 0)
    save(pathlib.Path(found.folder) / "out" / "dedup", table[rows], (found.ids[i] for i in rows), cfg)
    fates.report["sizes of groups of duplicates"] = [
        {"documents": size, "groups": groups} for size, groups in sorted(decision.cluster_sizes.items()) if size > 1]
    say(f"deduplicated: {len(fates.removals):,} of {n:,} documents go, {decision.compared:,} pairs compared")


def mix(cfg: MixConfig, fates: Fates, say) -> None:
    found = fates.found
    left = [i for i in range(len(found.ids)) if i not in fates.removals]
    given = [[of[i] for i in left] for of in (found.ids, [found.sources[s] for s in found.source], found.bytes, found.quality,
                                              found.domain)]
    copies = mixture.decide(*given, cfg)
    fates.copies[left] = copies
    for i in np.array(left)[np.asarray(copies) == 0].tolist():
        fates.removals[i] = {"stage": "mix", "rule": "share", "value": None}
    rows = mixture.audit(*given[1:], copies, cfg)
    fates.report["mixture"] = rows
    for warning in (row["warning"] for row in rows if row.get("warning")):
        say(f"! mix: {warning}")
