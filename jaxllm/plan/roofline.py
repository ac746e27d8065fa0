"""Decoding by the roofline: a step reads the weights and the cache once and multiplies; the slower of the two takes the time.

Nothing is counted for links between chips, for kernels that fall short of the peak or for sampling: a lower bound on the
time of a token and an upper bound on throughput.
"""

import dataclasses
import math

from jaxllm.hardware import Chip
from jaxllm.model.config import ModelConfig
from jaxllm.train.flops import forward_flops_per_token, parameter_count


@dataclasses.dataclass(frozen=True)
class Decoding:
    """One step of decoding for a batch, on all chips together."""

    weight_bytes: float  # read in a step
    cache_bytes: float
    flops: float
    memory_s: float
    compute_s: float
    held_bytes: float  # all weights and the cache
    memory_bytes: float  # what the chips have

    @property
    def seconds(self) -> float:
        return max(self.memory_s, self.compute_s)

    @property
    def bound(self) -> str:
        return "memory" if self.memory_s >= self.compute_s else "compute"

    @property
    def fits(self) -> bool:
        return self.held_bytes <= self.memory_bytes


def cache_bytes_per_token(cfg: ModelConfig, bytes_a_value: float) -> float:
    """Returns the bytes that a position's keys and values take over all layers."""
    return 2 * cfg.n_layers * cfg.kv_heads * cfg.head_dim * bytes_a_value


def decode(cfg: ModelConfig, chip: Chip, chips: int, *, batch: int, context: int, weight_bytes: float = 2,
           cache_bytes: float = 2) -> Decoding:
    """Returns a step that adds one token to each of `batch` rows of `context` positions.

    The embedding is looked up, not read. Of a sparse layer those experts are read that any row goes to: with even routing
    E (1 - (1 - k/E)^batch) of E.
    """
    parts = parameter_count(cfg)
    read = sum(parts.values()) - parts["embedding"] + (parts["embedding"] if cfg.tied else 0)
    if cfg.sparse_layers:
        moe = cfg.moe
        touched = moe.experts * (1 - (1 - moe.top_k / moe.experts) ** batch)
        read -= parts["experts"] * (moe.experts - touched) / (moe.experts + moe.shared)
    seen = min(context, cfg.window or context)
    cache = batch * cache_bytes_per_token(cfg, cache_bytes) * seen
    part = forward_flops_per_token(cfg, 1)  # a row of one sees one position: the scores of `seen` are as many times more
    flops = batch * (sum(part.values()) + part["scores"] * (seen - 1))
    return Decoding(read * weight_bytes, cache, flops, (read * weight_bytes + cache) / (chips * memory_rate(chip)),
                    flops / (chips * peak(chip)), sum(parts.values()) * weight_bytes + cache,
                    chips * chip.devices * chip.memory_bytes)


def memory_rate(chip: Chip) -> float:
    """Returns the bytes a second that a whole chip reads."""
    return chip.devices * chip.memory_bytes_per_s


def peak(chip: Chip) -> float:
    """Returns the FLOP/s of a whole chip in the 16 bits that it knows: bfloat16, else float16, else in float32."""
    return chip.devices * next(p for p in map(chip.peak_flops, ("bfloat16", "float16", "float32")) if p)


def largest(latency_s: float, architecture, smallest: float, chip: Chip, chips: int, **settings) -> float:
    """Returns the largest number of parameters whose step takes at most `latency_s` and fits; 0 when none does.

    `architecture` makes a ModelConfig of a number of parameters; none below `smallest` is tried.
    """
    def meets(n: float) -> bool:
        step = decode(architecture(n), chip, chips, **settings)
        return step.seconds <= latency_s and step.fits

    low, high = smallest, smallest
    if not meets(low):
        return 0.0
    while meets(high * 2) and high < 1e15:
        low = high = high * 2
    high *= 2
    for _ in range(12):  # to 1 part in 4,000; a shape is within 2 % of what is asked for anyway
        middle = math.sqrt(low * high)
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low
