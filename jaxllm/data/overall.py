"""What can only be decided over all documents: names, duplicates, the mixture. Their numbers go unit by unit, in order."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from jaxllm.data.map_unit import read_index, read_lines, unit_folder


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
    parts = [unit_folder(folder, n) / "signatures.npy" for n in range(n_units)]
    parts = [(n, np.load(p, mmap_mode="r")) for n, p in enumerate(parts) if p.exists()]
    if not parts:
        return np.empty((0, 0), np.uint32)
    out = np.lib.format.open_memmap(path, "w+", parts[0][1].dtype, (int(first[-1]), *parts[0][1].shape[1:]))
    for n, part in parts:
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


def decide(cfg, found: Catalogue) -> Fates:
    """Returns every document's fate, by the stages that look at all of them."""
    return Fates(found, np.ones(len(found.ids), np.int64), {}, {})
