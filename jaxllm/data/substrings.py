"""Long passages that occur word for word before, in the same document or another one (Lee et al. 2022).

A suffix array of all texts would give every repeated passage; we want those of at least `min_bytes` only, and a sort of the
hashes of all windows of that many bytes gives the same ones: a byte is part of a repeat where a window over it equals an
earlier one. The hashes are sorted in parts, so that memory is that of the texts, twice, and two bytes a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxllm.data import units
from jaxllm.errors import UserError

PART = 1 << 24  # bytes whose windows are sorted at once, about


@dataclass(frozen=True, kw_only=True)
class SubstringsConfig:
    use: bool = False  # cut passages that occurred before
    min_bytes: int = 200  # of a passage; about 50 tokens, as in Lee et al. 2022
    max_shard_mb: int = 2000  # text that is looked at together; what repeats across shards stays. Memory: 4 times of it

    def __post_init__(self):
        for name, ok, should in (("min_bytes", 16 <= self.min_bytes <= units.PIECE // 2, f"16 to {units.PIECE // 2}"),
                                 ("max_shard_mb", self.max_shard_mb >= 1, "at least 1")):
            if not ok:
                raise ValueError(f"substrings.{name}={getattr(self, name)}: should be {should}")


def repeated(texts: Sequence[str], cfg: SubstringsConfig) -> list[list[tuple[int, int]]]:
    """Returns, for each document, the ranges of its characters that occurred before, in order of documents and places."""
    raw = [text.encode("utf-8", "surrogatepass") for text in texts]
    end_N = np.cumsum([len(one) for one in raw], dtype=np.int64)
    if len(end_N) and end_N[-1] > cfg.max_shard_mb * 1_000_000:
        raise UserError(f"substrings.max_shard_mb={cfg.max_shard_mb}: the shard has {end_N[-1] / 1e6:.0f} MB; should be more")
    byte_B = np.frombuffer(b"".join(raw), np.uint8)
    del raw
    at_R, n, out = _again(byte_B, end_N, cfg.min_bytes), cfg.min_bytes, []
    for begin, end in zip(np.concatenate([[0], end_N[:-1]]) if len(end_N) else end_N, end_N, strict=True):
        first, last = np.searchsorted(at_R, (begin, end))
        edge_B = np.zeros(end - begin + 1, np.int64)
        edge_B[at_R[first:last] - begin] = 1
        edge_B[at_R[first:last] - begin + n] -= 1  # may be where another begins
        out.append(_characters(byte_B[begin:end], np.cumsum(edge_B[:-1]) > 0) if last > first else [])
    return out


def without(text: str, ranges: list[tuple[int, int]]) -> str:
    """Returns a text without ranges of its characters."""
    bounds = [0, *(at for pair in ranges for at in pair), len(text)]
    return "".join(text[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True))


def _again(byte_B: np.ndarray, end_N: np.ndarray, n: int) -> np.ndarray:
    """Returns where the windows of n bytes begin, each of one document, that equal an earlier window."""
    count = max(len(byte_B) - n + 1, 0)
    whole_W = np.ones(count, bool)  # of one document
    for end in end_N[:-1]:
        whole_W[max(int(end) - n + 1, 0) : int(end)] = False
    again_W = np.zeros(count, bool)
    passes = max(-(-count // PART), 1)
    for part in range(passes):
        hashes, places = [], []
        for at in range(0, count, PART):
            hash_W = units.windows(byte_B[at : at + PART + n - 1].astype(np.uint64) + np.uint64(1), n)
            mine = np.flatnonzero(whole_W[at : at + PART] & (hash_W % np.uint64(passes) == part))
            hashes.append(hash_W[mine])
            places.append(mine + at)
        hash_W, place_W = np.concatenate([np.zeros(0, np.uint64), *hashes]), np.concatenate([np.zeros(0, np.int64), *places])
        order = np.argsort(hash_W, kind="stable")  # equal ones stay in order: the first is the original
        again_W[place_W[order[1:]][hash_W[order[1:]] == hash_W[order[:-1]]]] = True
    return np.flatnonzero(again_W)


def _characters(byte_B: np.ndarray, repeat_B: np.ndarray) -> list[tuple[int, int]]:
    """Returns ranges of characters out of marked bytes; a character goes only as a whole."""
    starts = np.flatnonzero(byte_B & 0xC0 != 0x80)
    whole_C = np.logical_and.reduceat(repeat_B, starts)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], whole_C, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
