"""Which documents are duplicates of which: exact ones, then near ones by MinHash LSH (Indyk and Motwani 1998).

1. Documents with one exact hash are one document from here on.
2. Band by band: documents that agree in all values of the band lie side by side after a sort; each is compared with its
   `window` next neighbours. One band's keys are in memory at a time.
3. A pair that is not yet connected, and whose signatures do not rule it out, is verified: the shingles of both documents are
   loaded, and their true Jaccard similarity is at least `threshold`.
4. Connected documents are a cluster. Of each, the document of the highest quality is kept, of equal ones the earliest; or
   that of an earlier run, where there is one.

All of it goes in the order of content hashes, so that clusters do not depend on the order of documents.

N documents, M with those of earlier runs, K values of a signature, U different documents
"""

import collections
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxllm.data import units
from jaxllm.data.minhash import EMPTY, EXACT, DedupConfig, jaccard, width
from jaxllm.data.signatures import Earlier

ROWS = 1 << 14  # rows of signatures in memory at once
DOUBT = 4  # standard deviations that a signature's estimate may be off
PATIENCE = 64  # comparisons in vain after which two documents are compared only where the estimate itself reaches the threshold
REJECTED = 1 << 20  # pairs remembered as different


class Decision(NamedTuple):
    duplicate_of_N: np.ndarray  # int64: -1 kept; below N the kept document; N + i document i of the earlier runs
    exact_N: np.ndarray  # bool: removed as equal to the kept one but for white space; else as similar
    cluster_sizes: dict[int, int]  # size: how many clusters have it; of this run's documents and the earlier ones they match
    compared: int  # pairs whose shingles were loaded
    estimated: int  # pairs with an earlier document whose text is not at hand: decided by their signatures
    similarity_N: np.ndarray  # to the kept document, by the signatures; 1 where exact_N; NaN where there is none


def decide(signature_NK: np.ndarray, load_shingles: Callable[[int], np.ndarray], cfg: DedupConfig, *,
           quality_N: np.ndarray | None = None, order_N: np.ndarray | None = None, earlier: Earlier | None = None,
           load_earlier: Callable[[int], np.ndarray] | None = None) -> Decision:
    """Returns which documents go. `signature_NK` may be a memory map; it is read from front to back, once a band.

    order_N: place of each document among the others, where it is not the place in `signature_NK`.
    load_earlier: shingles of earlier documents; without it, pairs with those are judged by their signatures.
    """
    n = len(signature_NK)
    if signature_NK.ndim != 2 or signature_NK.shape[1] != width(cfg):
        raise ValueError(f"signatures of shape {signature_NK.shape}: should have {width(cfg)} columns")
    tables = [signature_NK, *(earlier.tables if earlier else ())]
    m = sum(len(table) for table in tables)
    quality_M, order_M = np.full(m, np.inf), np.full(m, -1, np.int64)  # the earlier come first
    quality_M[:n] = 0 if quality_N is None else quality_N
    order_M[:n] = np.arange(n) if order_N is None else order_N
    if np.isnan(quality_M).any():
        raise ValueError(f"quality of document {int(np.flatnonzero(np.isnan(quality_M))[0])} is not a number")
    hash_M2 = _exact_hashes(tables, m)
    first_M = _best(_numbered(hash_M2), quality_M, order_M)  # stands for all that are equal to it
    parent_M, compared, estimated = first_M.copy(), 0, 0
    if cfg.near:
        unique_U = np.flatnonzero(first_M == np.arange(m))
        unique_U = unique_U[np.lexsort((hash_M2[unique_U, 1], hash_M2[unique_U, 0]))]
        pairs = _Pairs(tables, unique_U, n, load_shingles, load_earlier, cfg)
        parent_U = pairs.connect()
        parent_M[unique_U] = unique_U[parent_U]
        parent_M = parent_M[first_M]
        compared, estimated = pairs.compared, pairs.estimated
    kept_M = _best(parent_M, quality_M, order_M)
    duplicate_of_N = np.where(kept_M[:n] == np.arange(n), -1, kept_M[:n])
    exact_N = (duplicate_of_N >= 0) & (hash_M2[:n] == hash_M2[kept_M[:n]]).all(axis=1)
    similarity_N = np.where(exact_N, 1, np.full(n, np.nan, np.float32))
    near = np.flatnonzero((duplicate_of_N >= 0) & ~exact_N)
    similarity_N[near] = _Values(tables, cfg).agreement(near, duplicate_of_N[near])
    return Decision(duplicate_of_N, exact_N, _sizes(kept_M, n), compared, estimated, similarity_N)


def _exact_hashes(tables: list[np.ndarray], m: int) -> np.ndarray:
    out_M2, at = np.empty((m, 2), np.uint64), 0
    for table in tables:
        for first in range(0, len(table), ROWS):
            part = np.ascontiguousarray(table[first : first + ROWS, :EXACT]).view(np.uint64)
            out_M2[at : at + len(part)] = part
            at += len(part)
    return out_M2


def _numbered(hash_M2: np.ndarray) -> np.ndarray:
    """Returns a number for each row, the same for equal ones."""
    order = np.lexsort((hash_M2[:, 1], hash_M2[:, 0]))
    out_M = np.zeros(len(order), np.int64)
    if len(order):
        out_M[order[1:]] = np.cumsum((hash_M2[order[1:]] != hash_M2[order[:-1]]).any(axis=1))
    return out_M


def _best(group_M: np.ndarray, quality_M: np.ndarray, order_M: np.ndarray) -> np.ndarray:
    """Returns, for each document, the one of its group with the highest quality, of equal ones the earliest."""
    order = np.lexsort((np.arange(len(group_M)), order_M, -quality_M, group_M))
    new = np.ones(len(order), bool)
    new[1:] = group_M[order[1:]] != group_M[order[:-1]]
    out_M = np.empty(len(order), np.int64)
    out_M[order] = order[np.flatnonzero(new)[np.cumsum(new) - 1]] if len(order) else order
    return out_M


def _sizes(kept_M: np.ndarray, n: int) -> dict[int, int]:
    """Returns how many clusters there are of each size, of those that hold a document of this run."""
    size_M = np.bincount(kept_M[:n], minlength=len(kept_M))
    size_M[n:] += size_M[n:] > 0  # the earlier document itself
    sizes, counts = np.unique(size_M[size_M > 0], return_counts=True)
    return dict(zip(sizes.tolist(), counts.tolist(), strict=True))


class _Values:
    """The MinHash values of documents by their number, in whichever table they lie."""

    def __init__(self, tables: list[np.ndarray], cfg: DedupConfig):
        self.tables, self.k = tables, cfg.bands * cfg.rows
        self.starts = np.cumsum([0, *(len(table) for table in tables)])

    def agreement(self, a_P: np.ndarray, b_P: np.ndarray) -> np.ndarray:
        """Returns the share of equal values of each pair: its Jaccard similarity, estimated."""
        parts = [(self._rows(a_P[i : i + 1024]) == self._rows(b_P[i : i + 1024])).mean(axis=1)
                 for i in range(0, len(a_P), 1024)]
        return np.concatenate([np.empty(0), *parts])

    def _rows(self, number_P: np.ndarray) -> np.ndarray:
        table_P = np.searchsorted(self.starts, number_P, "right") - 1
        out = np.empty((len(number_P), self.k), np.uint32)
        for i in np.unique(table_P):
            out[table_P == i] = self.tables[i][number_P[table_P == i] - self.starts[i], EXACT:]
        return out


class _Pairs:
    """Connects the pairs of different documents that are similar. Documents are numbered by their content's hash."""

    def __init__(self, tables, unique_U, n, load_shingles, load_earlier, cfg: DedupConfig):
        self.tables, self.unique_U, self.n, self.cfg = tables, unique_U, n, cfg
        self.load_shingles, self.load_earlier = load_shingles, load_earlier
        self.values = _Values(tables, cfg)
        self.rank_M = np.full(self.values.starts[-1], -1, np.int64)
        self.rank_M[unique_U] = np.arange(len(unique_U))
        self.parent_U = np.arange(len(unique_U))
        self.earlier_U = unique_U >= n
        self.cache, self.cached = collections.OrderedDict(), 0
        self.in_vain_U = np.zeros(len(unique_U), np.int32)
        self.rejected: set[tuple[int, int]] = set()
        self.compared = self.estimated = 0

    def connect(self) -> np.ndarray:
        """Returns the root of each document's cluster."""
        for band in range(self.cfg.bands):
            key_U, some_U = self._keys(band)
            turn = units.mix(np.arange(len(key_U), dtype=np.uint64) ^ units.mix(np.array([band + 1], np.uint64)))
            order = np.lexsort((turn, key_U))  # neighbours in a large group differ from band to band
            order = order[some_U[order]]
            sorted_U = key_U[order]
            new = np.ones(len(order), bool)
            new[1:] = sorted_U[1:] != sorted_U[:-1]
            same = np.cumsum(new)  # a number for each group
            del key_U, sorted_U, turn, new
            for apart in range(1, self.cfg.window + 1):
                at = np.flatnonzero(same[apart:] == same[:-apart])
                if not len(at):
                    break
                for first in range(0, len(at), ROWS):
                    part = at[first : first + ROWS]
                    self._judge(order[part], order[part + apart])
        return self._roots()

    def _keys(self, band: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns each document's key in a band, and whether it has one: a text without a word has none."""
        key_U, some_U = np.empty(len(self.unique_U), np.uint64), np.empty(len(self.unique_U), bool)
        first = EXACT + band * self.cfg.rows
        at = 0
        for table in self.tables:
            for begin in range(0, len(table), ROWS):
                rows = table[begin : begin + ROWS, first : first + self.cfg.rows]
                rank = self.rank_M[at : at + len(rows)]
                at += len(rows)
                key = np.full(len(rows), band, np.uint64)
                for column in rows.T:
                    key = units.mix(key ^ column)
                key_U[rank[rank >= 0]] = key[rank >= 0]
                some_U[rank[rank >= 0]] = (rows != EMPTY).any(axis=1)[rank >= 0]
        return key_U, some_U

    def _judge(self, a_P: np.ndarray, b_P: np.ndarray) -> None:
        """Connects those of the pairs that are similar."""
        self._roots()
        open_P = (self.parent_U[a_P] != self.parent_U[b_P]) & ~(self.earlier_U[a_P] & self.earlier_U[b_P])
        a_P, b_P = a_P[open_P], b_P[open_P]
        if not len(a_P):
            return
        k, t = self.cfg.bands * self.cfg.rows, self.cfg.threshold
        share_P = self.values.agreement(self.unique_U[a_P], self.unique_U[b_P])
        doubt_P = (DOUBT * (t * (1 - t) / k) ** 0.5 + 1 / k) * (self.in_vain_U[a_P] + self.in_vain_U[b_P] < PATIENCE)
        likely_P = share_P >= t - doubt_P
        for a, b, share in zip(a_P[likely_P].tolist(), b_P[likely_P].tolist(), share_P[likely_P].tolist(), strict=True):
            pair = (min(a, b), max(a, b))
            if pair in self.rejected or self._find(a) == self._find(b):
                continue
            if self._similar(a, b, share):
                a, b = sorted((self._find(a), self._find(b)))
                self.parent_U[b] = a
            else:
                if len(self.rejected) >= REJECTED:
                    self.rejected.clear()
                self.rejected.add(pair)
                self.in_vain_U[[a, b]] += 1

    def _similar(self, a: int, b: int, share: float) -> bool:
        if (self.earlier_U[a] or self.earlier_U[b]) and self.load_earlier is None:
            self.estimated += 1
            return share >= self.cfg.threshold
        self.compared += 1
        return jaccard(self._shingles(a), self._shingles(b)) >= self.cfg.threshold

    def _shingles(self, u: int) -> np.ndarray:
        """Returns a document's shingles, the latest of them kept in memory."""
        if u in self.cache:
            self.cache.move_to_end(u)
            return self.cache[u]
        index = int(self.unique_U[u])
        found = self.load_shingles(index) if index < self.n else self.load_earlier(index - self.n)
        self.cache[u] = found
        self.cached += found.nbytes
        while self.cached > self.cfg.cache_mb << 20 and len(self.cache) > 1:
            self.cached -= self.cache.popitem(last=False)[1].nbytes
        return found

    def _find(self, u: int) -> int:
        while (up := self.parent_U[u]) != u:
            self.parent_U[u] = u = int(self.parent_U[up])
        return u

    def _roots(self) -> np.ndarray:
        """Points every document at its root and returns these."""
        while True:
            up = self.parent_U[self.parent_U]
            if np.array_equal(up, self.parent_U):
                return self.parent_U
            self.parent_U = up

