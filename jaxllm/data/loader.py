"""Batches out of tokenised text. The whole position is one number, the global step.

Row i of the endless list of rows is a function of i and the seed alone; step s holds rows s*B to s*B + B - 1, and share
p of P, which one or more processes hold, the p-th stretch of B/P of them. So the order is the same for any number of
processes, devices and threads, and going on from a step is starting there.
"""

import functools
import hashlib
from collections.abc import Iterator

import grain
import numpy as np

from jaxllm.data.config import DataConfig
from jaxllm.data.packing import gather_rows, n_rows
from jaxllm.data.tokenize import Store, Stores, prepare
from jaxllm.errors import UserError

__all__ = ["TrainingInput", "ValidationInput", "prepare"]


class TrainingInput:
    """The training batches of a mixture: each source's rows shuffled anew every epoch, mixed by weight, without end."""

    def __init__(self, stores: Stores, cfg: DataConfig, batch_size: int, seed: int,
                 share: int = 0, shares: int = 1):
        if batch_size % shares:
            raise UserError(f"train.batch_size={batch_size} is not divisible by the {shares} processes")
        self.stores, self.seq_len, self.batch_size = stores, cfg.seq_len, batch_size
        rows = Rows([one.train for one in stores.sources], cfg.seq_len, stores.pad_id)
        of_sources = [
            grain.MapDataset.range(int(first), int(last)).shuffle(seed=_seed_of(one.name, seed)).repeat()
            for one, first, last in zip(stores.sources, rows.first, rows.last, strict=True)
        ]
        # grain rounds weights down to hundredths of the least one; given in those, they are rounded to nearest.
        least = min(one.weight for one in stores.sources)
        self.weights = [round(one.weight / least * 100) for one in stores.sources]
        mixed = grain.MapDataset.mix(of_sources, weights=self.weights)
        # Without drop_remainder grain rounds the endless length up as a float, beyond the largest integer.
        of_shares = mixed.batch(batch_size // shares, drop_remainder=True, batch_fn=np.array)
        self.dataset = of_shares[share::shares].map(rows.gather)

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Yields this process's share of the batch of each step from `start_step` (the number of steps done) on."""
        # Two threads and four batches ahead: a batch takes microseconds a row, and memory is better used elsewhere.
        read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        iterator = iter(self.dataset[start_step:].to_iter_dataset(read))
        try:
            yield from iterator
        finally:
            iterator.close()

    @property
    def made_of(self) -> dict[str, list]:
        """Returns, of each source, the key of its tokenised text and its weight: with the seed, what row i depends on."""
        return {one.name: [one.key, weight] for one, weight in zip(self.stores.sources, self.weights, strict=True)}

    @property
    def tokens_per_epoch(self) -> int:
        return sum(len(one.train.tokens) for one in self.stores.sources)

    def describe(self, steps: int = 1000) -> str:
        """Returns a line a source: documents, tokens, share of rows, and how often it is read in so many steps."""
        lines = []
        for one, weight in zip(self.stores.sources, self.weights, strict=True):
            share = weight / sum(self.weights)
            epochs = steps * self.batch_size * share / n_rows(len(one.train.tokens), self.seq_len)
            lines.append(f"data: {one.name}: {len(one.train.ends):,} documents, {len(one.train.tokens):,} tokens, "
                         f"{share:.1%} of rows, {epochs:.3g} epochs in {steps:,} steps; "
                         f"{len(one.validation.ends):,} documents, {len(one.validation.tokens):,} tokens held out")
        return "\n".join(lines)


class ValidationInput:
    """The held-out rows, the same ones in the same order each time; the last batch is filled up with rows of weight 0.

    Of `rows` rows each source has its weight's share, spread evenly over it, or all it has; rows=0 takes every row.
    """

    def __init__(self, stores: Stores, cfg: DataConfig, batch_size: int, rows: int,
                 share: int = 0, shares: int = 1):
        self.stores, self.rows = stores, Rows([one.validation for one in stores.sources], cfg.seq_len, stores.pad_id)
        self.batch_size, self.n_own = batch_size, batch_size // shares
        self.begin = share * self.n_own
        held_out = [(one.weight, int(first), int(last))
                    for one, first, last in zip(stores.sources, self.rows.first, self.rows.last, strict=True) if last > first]
        total = sum(weight for weight, *_ in held_out)
        chosen = [np.empty(0, np.int64)]
        for weight, first, last in held_out:
            n = min(last - first, max(1, round(rows * weight / total))) if rows else last - first
            chosen.append(first + np.arange(n) * (last - first) // n)
        self.chosen = np.concatenate(chosen)

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields this process's share of each batch."""
        yield from self._batches(slice(self.begin, self.begin + self.n_own))

    @functools.cached_property
    def n_bytes(self) -> int:
        """The UTF-8 bytes of all tokens that are predicted: what nats are divided by for bits per byte."""
        whole = slice(0, self.batch_size)  # of every process, so that they need not ask each other
        return sum(int(self.stores.token_bytes_V[batch["target_BT"][batch["weight_BT"] > 0]].sum())
                   for batch in self._batches(whole))

    def _batches(self, part: slice) -> Iterator[dict[str, np.ndarray]]:
        whole = np.full(-(-len(self.chosen) // self.batch_size) * self.batch_size, -1)
        whole[: len(self.chosen)] = self.chosen
        for row_B in whole.reshape(-1, self.batch_size):
            yield self.rows.gather(row_B[part])


class Rows:
    """The rows of several stores, numbered through; -1 is a row of padding."""

    def __init__(self, stores: list[Store], seq_len: int, pad_id: int):
        self.streams, self.seq_len, self.pad_id = [(store.tokens, store.ends) for store in stores], seq_len, pad_id
        self.last = np.cumsum([n_rows(len(store.tokens), seq_len) for store in stores])
        self.first = np.concatenate([[0], self.last[:-1]])

    def gather(self, row_B: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the batch of these rows."""
        stream_B = np.where(row_B < 0, -1, np.searchsorted(self.last, row_B, "right"))
        return gather_rows(self.streams, stream_B, row_B - self.first[stream_B], self.seq_len, self.pad_id)


def _seed_of(name: str, seed: int) -> int:
    """Returns a seed of 32 bits for one source. grain adds the epoch to it, so sources must not have neighbouring ones."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "big")
