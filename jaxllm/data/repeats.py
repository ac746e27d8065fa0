"""Lines and paragraphs that repeat, within a document and across documents.

Across documents, they are counted in a table of fixed size: two rows of 2^table_bits counters, a line counts in one of each
row, and its count is the lesser of the two (Cormode and Muthukrishnan 2005, count-min). A count is never too low, and too
high by k only where lines of k other documents meet it in both rows. Sums of tables are the table of the whole, so workers
count on their own, in whatever order.

A line (or paragraph, as configured) is known by its words (see units.py); one of fewer than `min_words` is never looked at.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxllm.data import units
from jaxllm.data.document import Document, Removal

MOST = np.iinfo(np.uint16).max


@dataclass(frozen=True, kw_only=True)
class RepeatsConfig:
    use: bool = False  # remove repeated lines
    unit: Literal["line", "paragraph"] = "line"  # what repeats; paragraphs end at a blank line
    min_words: int = 4  # shorter ones stay
    within: bool = True  # of equal lines of one document, the first stays
    # a line in more documents than this goes from all of them: menus, notices; null: lines are not counted across documents
    max_documents: int | None = 10
    table_bits: int = 26  # 2 rows of 2^table_bits counters of 2 bytes; for up to about as many different lines
    max_removed: float = 0.7  # a document that loses a larger share of its characters is dropped as a whole

    def __post_init__(self):
        for name, ok, should in (
            ("min_words", self.min_words >= 1, "at least 1"), ("table_bits", 10 <= self.table_bits <= 34, "10 to 34"),
            ("max_documents", self.max_documents is None or 1 <= self.max_documents < MOST, f"1 to {MOST - 1}, or null"),
            ("max_removed", 0 < self.max_removed <= 1, "in (0, 1]"),
        ):
            if not ok:
                raise ValueError(f"repeats.{name}={getattr(self, name)}: should be {should}")


def lines(text: str, cfg: RepeatsConfig) -> Iterator[tuple[str, int | None]]:
    """Yields each line or paragraph with its end, and the hash of its words; None for a short one."""
    each = text.splitlines(keepends=True) if cfg.unit == "line" else re.findall(r"(?s).+?(?:\n[^\S\n]*\n+|\Z)", text)
    words = units.units(text)
    cut_L = np.searchsorted(words.start_W, np.cumsum([0, *map(len, each)]))
    first_L, last_L = cut_L[:-1], cut_L[1:]
    known_L = (last_L - first_L >= cfg.min_words) & (last_L - first_L < units.PIECE)
    hashes = iter(units.of_ranges(words.hash_W, first_L[known_L], last_L[known_L]).tolist())
    for line, known in zip(each, known_L.tolist(), strict=True):
        yield line, next(hashes) if known else None


def line_hashes(text: str, cfg: RepeatsConfig) -> np.ndarray:
    """Returns the different hashes of a document's lines: what `LineCounts.add` takes."""
    return np.array(sorted({h for _, h in lines(text, cfg) if h is not None}), np.uint64)


class LineCounts:
    """How many documents have a line."""

    def __init__(self, cfg: RepeatsConfig, table_2C: np.ndarray | None = None):
        self.bits = np.uint64(cfg.table_bits)
        self.table_2C = np.zeros((2, 1 << cfg.table_bits), np.uint16) if table_2C is None else table_2C
        if self.table_2C.shape != (2, 1 << cfg.table_bits):
            raise ValueError(f"a table of shape {self.table_2C.shape}: should be (2, {1 << cfg.table_bits})")

    def add(self, hash_L: np.ndarray) -> None:
        """Counts lines: of one document, or of many one after the other."""
        for row, at_L in zip(self.table_2C, self._places(hash_L), strict=True):
            place, count = np.unique(at_L, return_counts=True)
            row[place] = np.minimum(row[place] + count.astype(np.uint64), MOST)

    def merge(self, other: "LineCounts") -> None:
        for row, more in zip(self.table_2C, other.table_2C, strict=True):
            for at in range(0, len(row), 1 << 20):
                part = row[at : at + (1 << 20)]
                part += np.minimum(more[at : at + (1 << 20)], MOST - part)

    def count(self, hash_L: np.ndarray) -> np.ndarray:
        """Returns in how many documents each line is, at least."""
        return np.minimum(*(row[at_L] for row, at_L in zip(self.table_2C, self._places(hash_L), strict=True)))

    def _places(self, hash_L: np.ndarray) -> Iterable[np.ndarray]:
        return hash_L >> (np.uint64(64) - self.bits), units.mix(hash_L + np.uint64(1)) >> (np.uint64(64) - self.bits)


class Repeats:
    """Takes repeated lines out of documents; `counts` holds those of all documents, where these are counted."""

    name = "repeats"

    def __init__(self, cfg: RepeatsConfig, counts: LineCounts | None = None):
        if cfg.max_documents is not None and counts is None:
            raise ValueError("repeats.max_documents is set: should be given the counts of all documents")
        self.cfg, self.counts = cfg, counts

    def __call__(self, doc: Document) -> Removal | None:
        each, seen = list(lines(doc.text, self.cfg)), set()
        common: dict[int, int] = {}
        if self.cfg.max_documents is not None:
            known = np.array([h for _, h in each if h is not None], np.uint64)
            common = dict(zip(known.tolist(), self.counts.count(known).tolist(), strict=True))
        kept, dropped = [], {"within": 0, "across": 0}
        for line, h in each:
            if h is not None and common.get(h, 0) > (self.cfg.max_documents or 0):
                dropped["across"] += 1
            elif h is not None and self.cfg.within and h in seen:
                dropped["within"] += 1
            else:
                kept.append(line)
            seen.add(h)
        if not any(dropped.values()):
            return None
        text = "".join(kept)
        for how, n in dropped.items():
            if n:
                doc.counts[f"repeats.lines_{how}"] = doc.counts.get(f"repeats.lines_{how}", 0) + n
        share = 1 - len(text) / len(doc.text)
        if share > self.cfg.max_removed or not text.strip():
            return Removal("repeats.removed_share", round(share, 3))
        doc.text = text
        return None
