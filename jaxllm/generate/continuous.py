"""The sampler of rollouts: n responses to each of many prompts, with continuous batching.

B row, T prompt position, S slot, R rows that take a prompt at once, M most tokens of a response.

A row that has ended takes the next prompt while the others go on (Yu et al. 2022, Orca). The device writes tokens in one
loop (ring.py) until enough rows have ended; the host then reads what they wrote, and fills them again.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxllm.errors import UserError
from jaxllm.generate import cache, ring, sample
from jaxllm.generate.config import SampleConfig
from jaxllm.generate.engine import power_of_two, slots_for
from jaxllm.generate.rollout_arrays import Rollout, Writing
from jaxllm.generate.score import digest, logps
from jaxllm.model.config import ModelConfig
from jaxllm.partition import batch_parts, check_divides, replicated, shardings, spec
from jaxllm.train.state import compute_dtype

LEAST_PROMPT = 8  # shorter prompts are padded: each size is one more program to compile
LEAST_ROWS = 32  # fewer rows take hardly less time


class Sampler:
    """A policy that is ready to write rollouts, on any mesh, whatever mesh it is trained on.

    `tokens` counts what it wrote, `steps` how often all rows wrote a token, and `places` the rows of all these steps:
    tokens / places is the share of the work that was of use.
    """

    def __init__(self, graph: nnx.GraphDef, cfg: ModelConfig, mesh: Mesh, *, eos_id: int, pad_id: int, vocab_size: int,
                 precision: str = "auto"):
        self.graph, self.cfg, self.mesh = graph, cfg, mesh
        self.eos_id, self.pad_id, self.vocab_size = eos_id, pad_id, vocab_size
        self.dtype = compute_dtype(precision, mesh.devices.flat[0].platform)
        self.weights: cache.Weights | None = None
        self.tokens = self.steps = self.places = 0

    def load(self, params: nnx.State) -> None:
        """Takes in the trainer's parameters, without the host, from where they are on whatever mesh. They are copied: the
        trainer may give its arrays away."""
        check_divides(params, self.mesh)
        with jax.set_mesh(self.mesh):
            self.weights = _prepare(self.graph, self.dtype, jax.device_put(params, shardings(params, self.mesh)))

    def digest(self) -> str:
        """Returns a SHA-256 of the weights that are sampled with, that of `digest_of` the trainer's parameters."""
        return digest(cache.whole(self._loaded()), self.dtype)

    def digest_of(self, params: nnx.State) -> str:
        """Returns what `digest` will be after these were loaded: a SHA-256 in the compute type, the same on every mesh."""
        return digest(params, self.dtype)

    def score(self, rollout: Rollout, temperature: float = 1.0) -> np.ndarray:
        """Returns logp_BR of a rollout's responses under the weights, by one pass over each whole sequence."""
        with jax.set_mesh(self.mesh):
            return logps(self.graph, cache.whole(self._loaded()), rollout, temperature, self.vocab_size, self.mesh)

    def sample(self, prompts: list[list[int]], *, n: int, cfg: SampleConfig, seeds, rows: int | None = None,
               prompt_slots: int, response_slots: int, stop_ids: tuple[int, ...] = ()) -> Rollout:
        """Returns n responses to each prompt, in the order of the prompts.

        `seeds` has one uint32 a response, on which and on the prompt alone its tokens depend: not on `rows`, how many are
        written at once (None: all), nor on the mesh. A response ends with `eos_id`, one of `stop_ids`, after
        cfg.max_tokens, or where the model's max_seq_len does. Log-probabilities are those of softmax(logits / temperature)
        over the tokens of the vocabulary before top_k, top_p, min_p and the repetition penalty, which is what training
        computes again; where these are on, the distribution that was drawn from is narrower. Temperature 0 takes the
        likeliest token and gives log-probabilities at temperature 1.
        """
        self._check(prompts, n, cfg, seeds, rows, prompt_slots, response_slots)
        steps, numbers = sample.plan(cfg, True)
        program = ring.Program(self.graph, steps, self.vocab_size, (self.eos_id, *stop_ids), self.pad_id)
        out = Writing(prompts, n, prompt_slots=prompt_slots, response_slots=response_slots, pad_id=self.pad_id)
        T = min(prompt_slots, power_of_two(max(map(len, prompts)), LEAST_PROMPT))
        limits = np.minimum(cfg.max_tokens, self.cfg.max_seq_len - np.array([len(p) for p in prompts]))
        with jax.set_mesh(self.mesh):
            batch = Batch(self, program, numbers, prompts, n, limits, np.asarray(seeds, np.uint32), rows or len(seeds), T, out)
            batch.write()
        return out.rollout()

    def _loaded(self) -> cache.Weights:
        if self.weights is None:
            raise ValueError("the sampler has no weights: call load(params) first")
        return self.weights

    def _check(self, prompts, n, cfg, seeds, rows, prompt_slots, response_slots) -> None:
        self._loaded()
        if cfg.stop:
            raise UserError(f"sample.stop={cfg.stop}: rollouts end at tokens, not at strings; should be empty")
        if cfg.max_tokens > response_slots:
            raise UserError(f"sample.max_tokens={cfg.max_tokens}: should be at most the {response_slots} slots of a response")
        if not prompts or n < 1 or (rows is not None and rows < 1):
            raise ValueError(f"{len(prompts)} prompts, n={n}, rows={rows}: should be at least 1")
        if len(seeds) != len(prompts) * n:
            raise ValueError(f"{len(prompts)} prompts with n={n} need {len(prompts) * n} seeds, found {len(seeds)}")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {i + 1} has no tokens; an empty text is [bos_id]")
            if len(prompt) > prompt_slots:
                raise UserError(f"prompt {i + 1} has {len(prompt)} tokens, more than the {prompt_slots} slots of a prompt")
            if len(prompt) >= self.cfg.max_seq_len:
                raise UserError(f"prompt {i + 1} has {len(prompt)} tokens; a model with max_seq_len={self.cfg.max_seq_len} "
                                f"takes at most {self.cfg.max_seq_len - 1} and writes at least one")


class Batch:
    """One call's rows on their way: which sample each of them writes, and which come next."""

    def __init__(self, sampler: Sampler, program: ring.Program, numbers, prompts, n: int, limits, seeds, rows: int, T: int,
                 out: Writing):
        self.sampler, self.program, self.numbers, self.out = sampler, program, numbers, out
        self.prompts, self.n, self.limits, self.seeds, self.T = prompts, n, limits, seeds, T
        self.next = 0  # samples before this one were taken by a row
        self.read, self.read_from = None, range(0)  # the prompts that were read last
        self.parts = batch_parts(sampler.mesh)
        self.sample_B = np.full(min(rows, len(seeds)), -1)  # what each row writes; -1: nothing
        self.most_slots = rounded(T + int(limits.max()), LEAST_PROMPT)
        # Rows that wait for others stand idle, each stop costs all rows some two tokens: least together at this number, when
        # responses are half as long as they may be.
        self.at_once = math.ceil(len(self.sample_B) * min(1.0, 2 / limits.max() ** 0.5))

    def write(self) -> None:
        """Writes all responses into `out`."""
        rows, before = self._start(), 0
        while True:
            slot, steps, *written = self._arrays(rows)
            self.sampler.places += len(written[0]) * int(steps - before)
            before = steps
            self._harvest(*written)
            free = np.flatnonzero(self.sample_B < 0)
            live, waiting = len(self.sample_B) - len(free), len(self.seeds) - self.next
            wanted = min(self.at_once, waiting)
            half = self._half(len(written[0]))
            slots = rows.token_BS.shape[1]
            full = slot == slots - 1 and slots < self.most_slots
            if waiting and len(free) >= wanted:
                rows = self._refill(rows, free)
            elif not live:
                break
            elif not waiting and live <= half:
                rows = self._shrink(rows, half)
            elif full:
                rows = ring.grow(min(slots_for(slots + 1), self.most_slots), rows)
            else:
                leave = len(self.sample_B) - wanted if waiting else half
                until = steps + (slots - 1 - slot if slots < self.most_slots else 2**30)
                rows = ring.advance(self.program, self.sampler.weights, self.numbers, rows, np.int32(leave), np.int32(until))
        self.sampler.steps += int(steps)

    def _half(self, B: int) -> int:
        """Returns the next smaller batch, 0 where there is none: rows on several devices stay where they are."""
        return B // 2 if self.parts == 1 and B // 2 >= LEAST_ROWS else 0

    def _start(self) -> ring.Rows:
        B = rounded(len(self.sample_B), self.parts)
        self._read_prompts(-(-len(self.sample_B) // self.n))
        taken = self._taken(np.arange(len(self.sample_B)), B)
        slots = min(slots_for(self.T + 1), self.most_slots)
        return ring.start(self.program, slots, self.sampler.weights, self.numbers, self.read, taken)

    def _refill(self, rows: ring.Rows, free) -> ring.Rows:
        """Returns the rows with the next samples in those that are free."""
        size = rounded(self.at_once, self.parts)
        while len(free) and self.next < len(self.seeds):
            if self.next // self.n not in self.read_from:
                self._read_prompts(-(-size // self.n))
            k = min(size, len(free), self.read_from.stop * self.n - self.next)
            taken = self._taken(free[:k], size)
            rows = ring.place(self.program, self.sampler.weights, self.numbers, rows, self.read, taken)
            free = free[k:]
        return rows

    def _shrink(self, rows: ring.Rows, B: int) -> ring.Rows:
        """Returns a batch of B rows, all that go on among them."""
        live = np.flatnonzero(self.sample_B >= 0)
        row_R = np.concatenate([live, np.zeros(B - len(live), np.int64)])
        self.sample_B = np.where(np.arange(B) < len(live), self.sample_B[row_R], -1)
        return ring.keep(rows, row_R.astype(np.int32), self.sample_B < 0)

    def _read_prompts(self, count: int) -> None:
        """Reads the next prompts, `count` of them or as many as are left."""
        first = self.next // self.n
        self.read_from = range(first, min(first + count, len(self.prompts)))
        U = rounded(count, self.parts)
        token_UT, length_U = np.full((U, self.T), self.program.pad_id, np.int32), np.ones(U, np.int32)
        for u, i in enumerate(self.read_from):
            prompt = self.prompts[i]
            token_UT[u, self.T - len(prompt) :], length_U[u] = prompt, len(prompt)
        inputs = jax.device_put((token_UT, length_U), NamedSharding(self.sampler.mesh, spec("batch")))
        self.read = ring.read(self.program, self.sampler.weights, *inputs)

    def _taken(self, row_X, size: int) -> ring.Taken:
        """Gives the next samples to these rows."""
        sample_X = np.arange(self.next, self.next + len(row_X))
        self.next += len(row_X)
        self.sample_B[row_X] = sample_X
        values = (row_X, sample_X // self.n - self.read_from.start, self.limits[sample_X // self.n], self.seeds[sample_X])
        rest = 2**30, 0, 0, 0  # a row that is none, with nothing to write
        arrays = [np.concatenate([x, np.full(size - len(x), fill)]) for x, fill in zip(values, rest, strict=True)]
        taken = ring.Taken(*(x.astype(np.uint32 if i == 3 else np.int32) for i, x in enumerate(arrays)))
        return jax.device_put(taken, replicated(self.sampler.mesh))

    def _arrays(self, rows: ring.Rows) -> list[np.ndarray]:
        """Returns arrays on the host, from wherever in the mesh their parts are."""
        arrays = rows.slot, rows.steps, rows.done_B, rows.n_B, rows.first_B, rows.token_BS, rows.logp_BS
        return [np.asarray(x) for x in jax.device_put(arrays, replicated(self.sampler.mesh))]

    def _harvest(self, done_B, n_B, first_B, token_BS, logp_BS) -> None:
        """Takes what rows that have ended wrote out of the ring, and lets them go."""
        row_X = np.flatnonzero(done_B[: len(self.sample_B)] & (self.sample_B >= 0))
        if not len(row_X):
            return
        slot_XM = (first_B[row_X, None] + np.arange(n_B[row_X].max())[None]) % token_BS.shape[1]
        token_XM, logp_XM = token_BS[row_X[:, None], slot_XM], logp_BS[row_X[:, None], slot_XM]
        last_X = token_XM[np.arange(len(row_X)), n_B[row_X] - 1]
        self.out.add(self.sample_B[row_X], token_XM, logp_XM, n_B[row_X], np.isin(last_X, self.program.end_ids))
        self.sampler.tokens += int(n_B[row_X].sum())
        self.sample_B[row_X] = -1


def rounded(n: int, multiple: int) -> int:
    """Returns a size of at least `n` that is at most an eighth more, or the next multiple: few sizes, few programs."""
    step = math.lcm(max(power_of_two(n) // 16, 1), multiple)
    return -(-n // step) * step


@partial(jax.jit, static_argnums=(0, 1))
def _prepare(graph: nnx.GraphDef, dtype, params: nnx.State) -> cache.Weights:
    # Copied: what jit returns as it came is the trainer's own array, which the next step takes away.
    return cache.prepare(graph, dtype, jax.tree.map(jnp.copy, params))
