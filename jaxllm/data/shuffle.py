"""The endless shuffled order of a few sources, a function of the seed and the position alone. NumPy only.

An epoch is a shuffle of every source's rows, each as often as the source's weight says: a weight of 1.5 takes every row
once and half of them, drawn anew each epoch, twice. Row numbers run through the sources.
"""

from collections.abc import Sequence

import numpy as np


class EndlessOrder:
    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        self.seed, self.parts, first = seed % 2**63, [], 0
        for size, weight in zip(sizes, weights, strict=True):
            self.parts.append((first, size, int(weight), round(size * (weight % 1))))
            first += size
        self.epoch_size = sum(size * whole + rest for _, size, whole, rest in self.parts)  # rows of an epoch
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def rows(self, first: int, n: int) -> np.ndarray:
        """Returns the rows at positions first to first + n - 1 of the order."""
        if not self.epoch_size:
            raise ValueError("no source has a row")
        found = []
        while n:
            epoch, at = divmod(first, self.epoch_size)
            took = self._of_epoch(epoch)[at : at + n]
            found.append(took)
            first, n = first + len(took), n - len(took)
        return np.concatenate([np.empty(0, np.int64), *found])

    def _of_epoch(self, epoch: int) -> np.ndarray:
        if epoch != self.epoch:
            # raw bits of a bit generator, as NumPy promises that these, and no others, stay the same in all its versions
            bits = np.random.Philox(np.random.SeedSequence([self.seed, epoch]))
            rows = []
            for first, size, whole, rest in self.parts:
                rows.append(np.tile(np.arange(first, first + size), whole))
                rows.append(first + np.argsort(bits.random_raw(size), kind="stable")[:rest])
            rows = np.concatenate(rows)
            self.epoch, self.order = epoch, rows[np.argsort(bits.random_raw(len(rows)), kind="stable")]
        return self.order
