"""The sampler of everything: samples while training, rollouts, the `generate` verb and the chat.

Prompts of different length go in, texts come out. The tokens are written on the device (decode.py); the host turns them
into text, finds stop strings and streams.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxllm.errors import UserError
from jaxllm.generate import cache, decode, sample
from jaxllm.generate.config import SampleConfig
from jaxllm.generate.text import Text
from jaxllm.model.config import ModelConfig
from jaxllm.partition import batch_parts, replicated, spec
from jaxllm.train.state import compute_dtype

LEAST_PROMPT, LEAST_SLOTS = 16, 128  # shorter ones are padded: each size is one more program to compile
CHUNK = 32  # tokens between two looks of the host, where it has to look


@dataclasses.dataclass(frozen=True)
class Continuation:
    text: str  # without the stop string or <eos>
    tokens: list[int]  # with the <eos>, or the tokens that complete the stop string
    logprobs: list[float] | None  # of `tokens` under the model itself: temperature 1, unfiltered, as in training
    finish: str  # "eos", "stop" (a stop string), or "length" (max_tokens, or the model's max_seq_len)


class Engine:
    """A model that is ready to write. `tokens` and `seconds` count what it wrote and how long that took, without
    compilation."""

    def __init__(self, graph: nnx.GraphDef, params: nnx.State, cfg: ModelConfig, tokenizer, mesh: Mesh, *,
                 precision: str = "auto", end_id: int | None = None):
        """`end_id`: the token that ends a text; None: <eos>. A chat template has one of its own."""
        self.graph, self.cfg, self.tokenizer, self.mesh = graph, cfg, tokenizer, mesh
        self.tokens, self.seconds = 0, 0.0
        self.end_id = tokenizer.eos_id if end_id is None else end_id
        dtype = compute_dtype(precision, mesh.devices.flat[0].platform)
        with jax.set_mesh(mesh):
            self.weights = cache.prepare(graph, dtype, params)

    def generate(self, prompts: Sequence[str] | Sequence[list[int]], cfg: SampleConfig, seeds: Sequence[int] | None = None, *,
                 logprobs: bool = False, on_text: Callable[[int, str], None] | None = None) -> list[Continuation]:
        """Returns a continuation of each prompt, decoded together; what one row writes does not depend on the others.

        Text is encoded with <bos> in front; lists of ids are taken as they are. A row's seed is its own of `seeds`, or
        cfg.seed. `on_text(row, piece)` gets text as it becomes final. Raises UserError when a prompt leaves no room.
        """
        prompts = [[self.tokenizer.bos_id, *self.tokenizer.encode(p)] if isinstance(p, str) else list(p) for p in prompts]
        seeds = [cfg.seed] * len(prompts) if seeds is None else list(seeds)
        self._check(prompts, seeds)
        if not prompts:
            return []
        limits = [min(cfg.max_tokens, self.cfg.max_seq_len - len(p)) for p in prompts]
        texts = [Text(self.tokenizer, p, limit, cfg.stop, None if on_text is None else partial_row(on_text, i),
                      end_id=self.end_id)
                 for i, (p, limit) in enumerate(zip(prompts, limits, strict=True))]
        with jax.set_mesh(self.mesh):
            logp_BM = self._write(texts, seeds, cfg, logprobs, look=bool(cfg.stop) or on_text is not None)
        self.tokens += sum(len(t.tokens) for t in texts)
        return [Continuation(t.text, t.tokens, logp_BM[i, : len(t.tokens)].tolist() if logprobs else None, t.finish)
                for i, t in enumerate(texts)]

    def _check(self, prompts, seeds) -> None:
        most = self.cfg.max_seq_len - 1
        for i, prompt in enumerate(prompts):
            if len(prompt) > most:
                raise UserError(f"prompt {i + 1} has {len(prompt)} tokens; a model with max_seq_len={self.cfg.max_seq_len} "
                                f"takes at most {most} and writes at least one")
            if not prompt:
                raise UserError(f"prompt {i + 1} has no tokens; an empty text is [bos_id]")
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many seeds, found {len(seeds)}")

    def _write(self, texts: list[Text], seeds, cfg: SampleConfig, logprobs: bool, look: bool) -> np.ndarray:
        """Fills `texts`; returns the log-probabilities, logp_BM."""
        steps, numbers = sample.plan(cfg, logprobs)
        tokenizer = self.tokenizer
        program = decode.Program(self.graph, steps, tokenizer.vocab_size, self.end_id, tokenizer.pad_id)
        inputs, T = self._batch(texts, seeds)
        end = T + max(text.limit for text in texts)  # slots that may be needed
        slots = slots_for(T + 1)
        rows = decode.start(program, slots, self.weights, numbers, *inputs)
        # Writing nothing compiles the program, so that `seconds` is that of writing.
        rows = decode.advance(program, self.weights, numbers, rows, np.int32(0))
        slot, chunk, seen = T, 1, T
        while True:
            until = min(end, slots) - 1
            until = min(until, slot + chunk - 1) if look else until
            began = time.perf_counter()
            rows = decode.advance(program, self.weights, numbers, rows, np.int32(until))
            slot, done_B, token_BS = self._read(rows.slot, rows.done_B, rows.token_BS)
            took = time.perf_counter() - began
            self.seconds += took
            for i, text in enumerate(texts):
                text.add(token_BS[i, seen : slot + 1].tolist())
            seen = int(slot) + 1
            if all(text.finish for text in texts):
                return self._read(rows.logp_BS)[0][:, T:]
            ended_B = np.array([bool(text.finish) for text in texts] + [True] * (len(done_B) - len(texts)))
            if (ended_B != done_B).any():  # a stop string, which the device knows nothing of
                rows = dataclasses.replace(rows, done_B=jax.device_put(ended_B, rows.done_B.sharding))
            if took < 0.1:
                chunk = min(2 * chunk, CHUNK)
            if slot == slots - 1:
                slots = slots_for(slots + 1)
                rows = decode.grow(program, slots, rows)
                rows = decode.advance(program, self.weights, numbers, rows, np.int32(0))

    def _batch(self, texts: list[Text], seeds):
        """Returns ((token_BT, first_B, last_B, seed_B) on the devices, T): a power of two of rows, times the data shards."""
        parts = batch_parts(self.mesh)
        B = -(-power_of_two(len(texts)) // parts) * parts
        T = power_of_two(max(len(t.prompt) for t in texts), LEAST_PROMPT)
        token_BT = np.full((B, T), self.tokenizer.pad_id, np.int32)
        first_B, last_B, seed_B = np.full(B, T - 1, np.int32), np.full(B, -1, np.int32), np.zeros(B, np.uint32)
        for i, (text, seed) in enumerate(zip(texts, seeds, strict=True)):
            first_B[i], last_B[i], seed_B[i] = T - len(text.prompt), T + text.limit - 1, seed % 2**32
            token_BT[i, first_B[i] :] = text.prompt
        by_row = NamedSharding(self.mesh, spec("batch"))
        return jax.device_put((token_BT, first_B, last_B, seed_B), by_row), T

    def _read(self, *arrays) -> list[np.ndarray]:
        """Returns arrays on the host, from wherever in the mesh their parts are."""
        return [np.asarray(x) for x in jax.device_put(arrays, replicated(self.mesh))]


def partial_row(on_text, i: int):
    return lambda piece: on_text(i, piece)


def slots_for(n: int) -> int:
    """Returns the first of 128, 192, 256, 384, 512, 768, … that is at least `n`: each is one more program to compile, and
    attention reads all slots, filled or not."""
    whole = power_of_two(n, LEAST_SLOTS)
    return whole * 3 // 4 if n <= whole * 3 // 4 and whole > LEAST_SLOTS else whole


def power_of_two(n: int, least: int = 1) -> int:
    """Returns the smallest power of two that is at least `n` and `least`."""
    return 1 << (max(n, least) - 1).bit_length()
