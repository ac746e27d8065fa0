"""MinHash signatures (Broder 1997): of two texts' signatures, as large a share agrees as of their shingles, on average.

A shingle is a hash of n neighbouring words or characters (see units.py); a text of fewer is one shingle. Value k of a
signature is the least of a_k x + b_k mod 2^32 over the shingles x, with a_k odd: one pass of two vector operations and a
minimum for each k. (One pass for all k, with bins, would save half of the time; but of a short text's bins most are
empty, and copies in them make the share of a short text vary more than independent values do.)

A row of signatures is uint32: EXACT words that hold a 128-bit hash of the text without its white space, then the values.

N documents, X shingles, K values of a signature
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxllm.data import units

EXACT = 4  # uint32 words of the exact hash
EMPTY = np.uint32(0xFFFFFFFF)  # every value of a text without a word
BLOCK = 4096  # shingles handled at once: values by shingles stay in the processor's cache
TOGETHER = 1 << 16  # characters of short documents that are hashed at once


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    use: bool = True  # remove documents that others repeat
    # what is counted: words (a character of Chinese, Japanese, Thai, Lao, Tibetan, Burmese or Khmer is one), or characters
    unit: Literal["word", "character"] = "word"
    n: int = 5  # words, or characters, of a shingle; 5 words or about 20 characters
    threshold: float = 0.8  # share of common shingles (Jaccard) from which two documents are duplicates
    bands: int = 20  # groups of values; documents that agree in all values of any group are compared
    rows: int = 5  # values of a group; a pair of Jaccard s is compared with probability 1 - (1 - s^rows)^bands
    seed: int = 0  # of the hash functions
    near: bool = True  # false: only documents that are equal but for white space
    window: int = 32  # of documents that agree in a group, each is compared with this many neighbours
    cache_mb: int = 256  # memory for shingles of documents that are compared
    earlier: tuple[str, ...] = ()  # folders of earlier runs, whose documents count as kept

    def __post_init__(self):
        for name, ok, should in (
            ("n", 1 <= self.n <= 64, "1 to 64"), ("threshold", 0 < self.threshold <= 1, "in (0, 1]"),
            ("bands", 1 <= self.bands <= 1000, "1 to 1000"), ("rows", 1 <= self.rows <= 64, "1 to 64"),
            ("window", self.window >= 1, "at least 1"), ("cache_mb", self.cache_mb >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 1 << 63, "0 or more"),
        ):
            if not ok:
                raise ValueError(f"dedup.{name}={getattr(self, name)}: should be {should}")
        if self.near and self.found(self.threshold) < 0.5:
            raise ValueError(f"dedup.bands={self.bands}, dedup.rows={self.rows}: would find {self.found(self.threshold):.0%} "
                             f"of the pairs at dedup.threshold={self.threshold}; should be more bands or fewer rows")

    def found(self, jaccard: float) -> float:
        """Returns the probability that a pair of this Jaccard similarity is compared."""
        return 1 - (1 - jaccard**self.rows) ** self.bands


def width(cfg: DedupConfig) -> int:
    """Returns how many uint32 a row of signatures holds."""
    return EXACT + (cfg.bands * cfg.rows if cfg.near else 0)


def signature(text: str, cfg: DedupConfig) -> np.ndarray:
    """Returns a document's row: its exact hash and its values."""
    return signatures([text], cfg)[0]


def signatures(texts: Sequence[str], cfg: DedupConfig) -> np.ndarray:
    """Returns a row a document; faster than one by one where documents are short."""
    out_NK = np.full((len(texts), width(cfg)), EMPTY, np.uint32)
    for row, text in zip(out_NK, texts, strict=True):
        row[:EXACT] = np.frombuffer(exact_hash(text), np.uint32)
    if cfg.near:
        for first, last in _groups(texts):
            _minima(*_shingles(texts[first:last], cfg), cfg, out_NK[first:last, EXACT:])
    return out_NK


def shingles(text: str, cfg: DedupConfig) -> np.ndarray:
    """Returns the sorted, different shingles of a document, of which signatures are made."""
    sorted_X = np.sort(_shingles([text], cfg)[0])  # np.unique would take ten times as long
    return sorted_X[np.concatenate([[True], sorted_X[1:] != sorted_X[:-1]])] if len(sorted_X) else sorted_X


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the share that two sets of shingles have in common; 0 where both are empty."""
    if not len(a) or not len(b):
        return 0.0
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def exact_hash(text: str) -> bytes:
    """Returns 128 bits of the text without white space (of ASCII)."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass").translate(None, b" \t\n\r\v\f"), digest_size=16).digest()


def _groups(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yields ranges of neighbouring documents of TOGETHER characters, or of one that is longer."""
    first, size = 0, 0
    for i, text in enumerate(texts):
        if size and size + len(text) > TOGETHER:
            yield first, i
            first, size = i, 0
        size += len(text)
    if first < len(texts):
        yield first, len(texts)


def _shingles(texts: Sequence[str], cfg: DedupConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns the shingles of documents one after the other, and where each document's end."""
    if cfg.unit == "character":
        each = [units.characters(text) for text in texts]
        hash_W, end_N = np.concatenate(each), np.cumsum([len(one) for one in each])
    elif len(texts) == 1:
        hash_W = units.units(texts[0]).hash_W
        end_N = np.array([len(hash_W)])
    else:
        found = units.units("\n".join(texts))
        hash_W, ends_of_text = found.hash_W, np.cumsum([len(text) + 1 for text in texts])
        end_N = np.searchsorted(found.start_W, ends_of_text)
    begin_N = np.concatenate([[0], end_N[:-1]])
    count_N = np.maximum(end_N - begin_N - cfg.n + 1, 0)
    window = units.windows(hash_W, cfg.n)
    short_N = (count_N == 0) & (end_N > begin_N)
    if len(texts) == 1 and not short_N[0]:
        return window, count_N
    parts = []
    for begin, end, count, short in zip(begin_N, end_N, count_N, short_N, strict=True):
        parts.append(units.windows(hash_W[begin:end], int(end - begin)) if short else window[begin : begin + count])
    return np.concatenate(parts), np.cumsum(count_N + short_N)


@functools.cache
def _functions(k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a_K1 (odd) and b_K1, which depend on the seed alone."""
    start = units.mix(np.array([seed], np.uint64) + np.uint64(units.ROOT))
    drawn = units.mix(start + np.arange(1, k + 1, dtype=np.uint64) * np.uint64(units.ROOT))
    return (drawn >> np.uint64(32)).astype(np.uint32)[:, None] | np.uint32(1), drawn.astype(np.uint32)[:, None]


def _minima(shingle_X: np.ndarray, end_N: np.ndarray, cfg: DedupConfig, out_NK: np.ndarray) -> None:
    """Writes each document's least values into `out_NK`, which holds EMPTY."""
    a_K1, b_K1 = _functions(out_NK.shape[1], cfg.seed)
    x_X = (shingle_X >> np.uint64(32)).astype(np.uint32)
    begin_N = np.concatenate([[0], end_N[:-1]])
    some = np.flatnonzero(end_N > begin_N)
    begin_N, end_N = begin_N[some], end_N[some]
    buffer = np.empty((len(a_K1), min(BLOCK, len(x_X))), np.uint32)
    for at in range(0, len(x_X), BLOCK):
        x = x_X[at : at + BLOCK]
        value_KX = buffer[:, : len(x)]
        np.multiply(x[None], a_K1, out=value_KX)
        np.add(value_KX, b_K1, out=value_KX)
        first, last = np.searchsorted(end_N, at, "right"), np.searchsorted(begin_N, at + len(x))
        least_KN = np.minimum.reduceat(value_KX, np.maximum(begin_N[first:last] - at, 0), axis=1)
        rows = some[first:last]
        out_NK[rows] = np.minimum(out_NK[rows], least_KN.T)
