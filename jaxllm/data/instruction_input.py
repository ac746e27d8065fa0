"""Batches of instruction data. The whole position is one number, the global step.

Row i of the endless list of rows is a function of i and the seed alone: epoch after epoch, each with its own order, draws
and packing. Step s holds rows s*B to s*B + B - 1, and share p of P the p-th stretch of B/P of them. To find the epoch of a
row the epochs before it are packed, from lengths; only tasks that are drawn anew are encoded for that.

N example of an epoch, B row of a batch, T position, V vocabulary.
"""

import functools
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from jaxllm.data.instruction_config import InstructionData
from jaxllm.data.instruction_encoding import Lost, Prepared, encode_all, prepare
from jaxllm.data.instruction_mixture import epoch_order, examples_of_members
from jaxllm.data.instruction_packing import PretrainingRows, Rows, empty_batch
from jaxllm.data.instructions import digest
from jaxllm.errors import UserError

__all__ = ["InstructionInput", "InstructionValidation", "PretrainingRows", "prepare"]


class InstructionInput:
    """The training batches of a mixture, epoch after epoch without end."""

    def __init__(self, prepared: Prepared, cfg: InstructionData, batch_size: int, seed: int, share: int = 0, shares: int = 1, *,
                 pretraining: PretrainingRows | None = None, pretraining_share: float = 0.0):
        if batch_size % shares:
            raise UserError(f"train.batch_size={batch_size} is not divisible by the {shares} processes")
        self.prepared, self.cfg, self.batch_size, self.seed = prepared, cfg, batch_size, seed
        self.n_own, self.begin = batch_size // shares, share * (batch_size // shares)
        self.members, self.lost = prepared.instructions.train, {}
        self.sizes, weights = [len(member.rows) for member in self.members], [member.source.weight for member in self.members]
        self.counts = examples_of_members(self.sizes, weights, mix=cfg.mix, cap=cfg.cap)
        self.pretraining, self.other = pretraining, Fraction(pretraining_share if pretraining else 0).limit_denominator(10_000)
        self.firsts, self.held = [0], {}  # the first row of each epoch; the rows of the last epochs used
        if not self.epoch(0).n_rows:
            raise UserError(f"data.seq_len={cfg.seq_len}: every one of {sum(self.counts):,} examples is longer and was "
                            "dropped; raise it, or set data.too_long=truncate")

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Yields this process's share of the batch of each step from `start_step` (the number of steps done) on."""
        step = start_step
        while True:
            yield self.batch(range(step * self.batch_size + self.begin, step * self.batch_size + self.begin + self.n_own))
            step += 1

    def batch(self, rows) -> dict[str, np.ndarray]:
        """Returns the batch of these rows of the endless list."""
        batch = empty_batch(len(rows), self.cfg.seq_len, self.prepared.pad_id)
        for b, row in enumerate(rows):
            # so that of the first n rows floor(n * share) are of pretraining, evenly spread
            others = math.floor(row * self.other)
            if math.floor((row + 1) * self.other) > others:
                self.pretraining.fill(batch, b, others)
                continue
            row -= others
            epoch = self.epoch_of(row)
            self.epoch(epoch).fill(batch, b, row - self.firsts[epoch])
        return batch

    def epoch_of(self, row: int) -> int:
        while self.firsts[-1] <= row:
            self.epoch(len(self.firsts) - 1)
        return int(np.searchsorted(self.firsts, row, "right")) - 1

    def epoch(self, epoch: int) -> Rows:
        """Returns an epoch's rows."""
        if epoch not in self.held:
            order = epoch_order(epoch, [member.name for member in self.members], self.sizes, self.counts, self.seed)
            lost: dict[str, Lost] = {}
            examples = encode_all(self.prepared.encoder, self.members, order, self.seed, lost)
            self.lost = self.lost or lost
            self.held = {e: rows for e, rows in self.held.items() if e == epoch - 1}
            self.held[epoch] = Rows(examples, self.cfg.seq_len, self.cfg.window if self.cfg.pack else 0, self.prepared.pad_id)
            if epoch == len(self.firsts) - 1:
                self.firsts.append(self.firsts[-1] + self.held[epoch].n_rows)
        return self.held[epoch]

    def n_steps(self, epochs: float) -> int:
        """Returns how many steps read so many epochs to the end."""
        whole = math.floor(epochs)
        while len(self.firsts) <= math.ceil(epochs):
            self.epoch(len(self.firsts) - 1)
        rows = self.firsts[whole]
        if whole < epochs:
            rows += math.ceil((epochs - whole) * (self.firsts[whole + 1] - rows))
        return -(-math.ceil(rows / (1 - self.other)) // self.batch_size)

    @property
    def made_of(self) -> dict[str, list]:
        """Returns, of each member, a hash of its examples and how many an epoch has: with the seed, what row i depends on."""
        cfg, encoder = self.cfg, self.prepared.encoder
        rows = [encoder.tokenizer.hash, cfg.seq_len, cfg.window if cfg.pack else 0, cfg.too_long, str(self.other)]
        return {"rows": rows} | {member.name: [digest(member), encoder.chat(member).hash, count]
                                 for member, count in zip(self.members, self.counts, strict=True)}

    @property
    def tokens_per_epoch(self) -> int:
        return len(self.epoch(0).examples.tokens)

    def describe(self, steps: int = 1000) -> str:
        """Returns what is trained on: a line for all, a line a source, and what was too long."""
        rows, examples = self.epoch(0), self.epoch(0).examples
        learned, full = int(examples.weights.sum()), int(examples.positions_N.sum()) / (rows.n_rows * self.cfg.seq_len)
        lines = [f"data: an epoch: {len(examples.ends):,} examples, {len(examples.tokens):,} tokens, {learned:,} of them "
                 f"learned, in {rows.n_rows:,} rows that are {full:.1%} full; "
                 f"{steps * self.batch_size * float(1 - self.other) / rows.n_rows:.3g} epochs in {steps:,} steps"]
        for name in self.cfg.sources:
            own = [m for m, member in enumerate(self.members) if member.name.partition("/")[0] == name]
            if own:
                tasks = f"{len(own)} tasks, " if len(own) > 1 else ""
                share = sum(self.counts[m] for m in own) / sum(self.counts)
                lines.append(f"data: {name}: {tasks}{sum(self.sizes[m] for m in own):,} examples, "
                             f"{sum(self.counts[m] for m in own):,} an epoch, {share:.1%} of all")
        unseen = self.prepared.instructions.unseen
        if unseen:
            lines.append(f"data: held out: {', '.join(member.name for member in unseen)} ({', '.join(self.cfg.hold_out)})")
        if self.other:
            lines.append(f"data: {float(self.other):.1%} of the rows are of pretraining")
        return "\n".join([*lines, *self.losses()])

    def losses(self) -> list[str]:
        """Returns a line for each member with examples that are longer than a row, as counted in the first epoch."""
        lines = []
        for name, lost in sorted(self.lost.items()):
            told = [f"{n:,} {what}" for n, what in ((lost.dropped, "dropped"), (lost.truncated, "truncated"),
                                                    (lost.shortened, "fitted with fewer exemplars")) if n]
            if told:
                lines.append(f"! data: {name}: longer than data.seq_len={self.cfg.seq_len}: {', '.join(told)}")
        return lines


class InstructionValidation:
    """The held-out examples, the same rows in the same order each time; the last batch is filled up with rows of weight 0.

    Each member gives at most data.cap examples; of all rows `rows` are taken, spread evenly, or all with rows=0.
    """

    def __init__(self, prepared: Prepared, cfg: InstructionData, batch_size: int, rows: int, share: int = 0, shares: int = 1):
        members = prepared.instructions.validation
        sizes = [min(len(member.rows), cfg.cap) for member in members]
        order = [np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.empty(0, int), *map(np.arange, sizes)]),
                 np.zeros(sum(sizes), int)]
        self.prepared, self.lost = prepared, {}
        examples = encode_all(prepared.encoder, members, order, 0, self.lost)
        self.rows = Rows(examples, cfg.seq_len, cfg.window if cfg.pack else 0, prepared.pad_id)
        self.batch_size, self.n_own = batch_size, batch_size // shares
        self.begin = share * self.n_own
        n = min(rows, self.rows.n_rows) if rows else self.rows.n_rows
        self.chosen = np.arange(n) * self.rows.n_rows // max(n, 1)

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields this process's share of each batch."""
        yield from self._batches(slice(self.begin, self.begin + self.n_own))

    @functools.cached_property
    def n_bytes(self) -> int:
        """The UTF-8 bytes of all tokens that are predicted: what nats are divided by for bits per byte."""
        whole = slice(0, self.batch_size)  # of every process, so that they need not ask each other
        return sum(int(self.prepared.token_bytes_V[batch["target_BT"][batch["weight_BT"] > 0]].sum())
                   for batch in self._batches(whole))

    def _batches(self, part: slice) -> Iterator[dict[str, np.ndarray]]:
        for first in range(0, len(self.chosen), self.batch_size):
            batch = empty_batch(self.n_own if part != slice(0, self.batch_size) else self.batch_size, self.rows.seq_len,
                                self.prepared.pad_id)
            for b, row in enumerate(self.chosen[first : first + self.batch_size][part]):
                self.rows.fill(batch, b, row)
            yield batch
