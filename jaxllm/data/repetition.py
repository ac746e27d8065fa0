"""How much of a text is said again: lines, paragraphs and n-grams of words (Gopher, appendix A.1.1)."""

import numpy as np

from jaxllm.data.words import n_grams

_LENGTH = np.uint64(0xFFFFF)  # low bits of a sort key that hold an n-gram's characters


def repeated_lines(parts: list[str]) -> tuple[float, float]:
    """Returns (share of parts that occurred before, share of their characters)."""
    if len(parts) < 2:
        return 0.0, 0.0
    distinct = set(parts)
    total = sum(map(len, parts))
    return (len(parts) - len(distinct)) / len(parts), (total - sum(map(len, distinct))) / max(total, 1)


def top_share(hash_W: np.ndarray, length_W: np.ndarray, n: int, total: int) -> float:
    """Returns the share of characters in the most frequent n-gram, 0 where none occurs twice; of several the longest."""
    if len(hash_W) <= n:
        return 0.0
    hash_G, sum_W = n_grams(hash_W, n), length_W.cumsum()
    length_G = sum_W[n - 1:].copy()
    length_G[1:] -= sum_W[:-n]
    key_G = (hash_G & ~_LENGTH) | length_G.view(np.uint64)  # equal n-grams have equal lengths
    key_G.sort()
    last_G = (key_G[1:] != key_G[:-1]).nonzero()[0]  # of equal ones
    if len(last_G) == len(key_G) - 1:
        return 0.0
    last_G = np.append(last_G, len(key_G) - 1)
    count_G = last_G.copy()
    count_G[0] += 1
    count_G[1:] -= last_G[:-1]
    top = int(count_G.max())
    longest = int((key_G[last_G[count_G == top]] & _LENGTH).max())
    return top * longest / total


def duplicated_share(hash_W: np.ndarray, length_W: np.ndarray, n: int, total: int,
                     candidate_G: np.ndarray | None = None) -> tuple[float, np.ndarray]:
    """Returns (share of characters in n-grams that occurred before, each once, and the places of n-grams that occur twice).

    `candidate_G`: the places that a smaller n returned; a longer n-gram occurs twice only where a shorter one does.
    """
    n_grams_ = len(hash_W) - n + 1
    at_G = np.arange(max(n_grams_, 0)) if candidate_G is None else candidate_G[candidate_G < n_grams_]
    if len(at_G) < 2:
        return 0.0, at_G[:0]
    hash_G = n_grams(hash_W, n)[at_G]
    order_G = np.argsort(hash_G, kind="stable")
    sorted_G = hash_G[order_G]
    again_G = np.concatenate(([False], sorted_G[1:] == sorted_G[:-1]))
    twice_G = again_G.copy()
    twice_G[:-1] |= again_G[1:]
    repeat_G = at_G[order_G[again_G]]
    if not len(repeat_G):
        return 0.0, at_G[:0]
    edge_W = np.zeros(len(hash_W) + 1, np.int32)  # +1 where a repeated n-gram starts, -1 where it ends
    edge_W[repeat_G] += 1
    edge_W[repeat_G + n] -= 1
    covered_W = edge_W[:-1].cumsum() > 0
    return int(length_W[covered_W].sum()) / total, np.sort(at_G[order_G[twice_G]])
