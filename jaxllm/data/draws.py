"""Choices by chance that depend on their key alone: no generator to advance, so nothing to replay. NumPy only.

N item. Hashes, not NumPy's generators, whose streams may change between versions.
"""

import hashlib

import numpy as np


def draw(*key) -> float:
    """Returns a number in [0, 1), the same for the same key."""
    return (_hash(key) >> 11) / 2.0**53  # 53 bits: never rounded up to 1


def pick(items, *key):
    """Returns one of the items, each with the same chance."""
    return items[int(draw(*key) * len(items))]


def permutation(n: int, *key) -> np.ndarray:
    """Returns 0 to n - 1 in an order that the key decides: sorted by the SplitMix64 hash of each (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z_N = (np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) + np.uint64(_hash(key))
        z_N = (z_N ^ (z_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z_N = (z_N ^ (z_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z_N ^ (z_N >> np.uint64(31)), kind="stable")


def _hash(key) -> int:
    raw = "\0".join(map(str, key)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")
