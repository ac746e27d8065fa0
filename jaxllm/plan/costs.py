"""FLOPs of training and the roofline of serving, as coarse as a decision between kinds of model needs them. No jax here.

Attention scores, activations' memory and communication are left out: at the share of the peak that is assumed they stand for
themselves.
"""

import dataclasses
import functools
import math

from jaxllm.hardware import Chip
from jaxllm.hardware import chips as known_chips
from jaxllm.plan.prices import OpenModel
from jaxllm.plan.roofline import memory_rate, peak

HOURS = 730.0  # of a month
SECONDS = HOURS * 3600
MEMORY = 0.9  # of a chip's memory, for weights and cache
CHIPS = (1, 2, 4, 8, 16)  # of one replica
BATCH = 1024  # requests that a replica answers at a time, at most
CACHE_BYTES = 2  # of a cached key or value: bfloat16


@dataclasses.dataclass(frozen=True)
class Size:
    """What serving and training ask of a model."""

    parameters: float
    active: float  # parameters that one token meets
    cache_bytes: float  # of one token, keys and values of all layers

    @classmethod
    def of(cls, model: OpenModel) -> "Size":
        cache = 2 * model.layers.value * model.kv_heads.value * model.head_width.value * CACHE_BYTES
        return cls(model.parameters.value, (model.active or model.parameters).value, cache)

    @classmethod
    def dense(cls, parameters: float) -> "Size":
        """A dense model as they are built: width 128 a layer, N = 12 L D^2 parameters, 8 heads of 128 for keys and values."""
        layers = max(1, round((parameters / (12 * 128**2)) ** (1 / 3)))
        return cls(parameters, parameters, 2 * layers * 8 * 128 * CACHE_BYTES)


@dataclasses.dataclass(frozen=True)
class Serving:
    """One replica at its best batch."""

    chips: int
    batch: int
    step_s: float  # of one token for every request of the batch
    first_token_s: float
    request_s: float  # of the replica, for one request

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second that one reader gets."""
        return 1 / self.step_s


def memory_bytes(chip: Chip) -> float:
    return chip.memory_bytes * chip.devices


def training_flops(active: float, tokens: float, *, frozen: bool = False) -> float:
    """Returns 6 N D (Kaplan et al. 2020); with frozen weights 4 N D, as their own gradients are not computed."""
    return (4 if frozen else 6) * active * tokens


def compute_optimal(flops: float, tokens_per_parameter: float) -> tuple[float, float]:
    """Returns (parameters, tokens) that use `flops` at this ratio: C = 6 N D with D = r N (Hoffmann et al. 2022)."""
    parameters = math.sqrt(flops / (6 * tokens_per_parameter))
    return parameters, tokens_per_parameter * parameters


def chips_to_train(size: Size, bytes_each: float, chip: Chip) -> int:
    """Returns how many chips hold weights, gradients and moments."""
    return math.ceil(size.parameters * bytes_each / (MEMORY * memory_bytes(chip)))


def step_seconds(size: Size, chip: Chip, chips: int, batch: int, context: float, weight_bytes: float, share: float) -> float:
    """Returns the time of one decoding step: bytes against bandwidth or FLOPs against the peak, whichever is longer.

    Of a sparse model, `batch` tokens together meet 1 - (1 - active / all)^batch of the weights.
    """
    met = size.parameters * (1 - (1 - size.active / size.parameters) ** batch)
    moved = met * weight_bytes + batch * context * size.cache_bytes
    return max(moved / memory_rate(chip), 2 * size.active * batch / peak(chip)) / (chips * share)


@functools.lru_cache(maxsize=4096)
def serve(size: Size, chip_name: str, chips: int, read: float, written: float, cached: float, weight_bytes: float, share: float,
          tokens_per_s: float) -> Serving | None:
    """Returns a replica of `chips` chips at the largest batch that fits and gives a reader `tokens_per_s`.

    `read` and `written` are a request's tokens; of those read the share `cached` need not be computed again. None: the weights
    do not fit. Where even one request at a time is too slow, the batch is 1 and the caller sees it by `Serving.tokens_per_s`.
    """
    chip = known_chips()[chip_name]
    room = MEMORY * chips * memory_bytes(chip) - size.parameters * weight_bytes
    fits = int(room / ((read + written) * size.cache_bytes)) if room > 0 else 0
    if fits < 1:
        return None
    step = functools.partial(step_seconds, size, chip, chips, context=read + written / 2, weight_bytes=weight_bytes,
                             share=share)
    low, high = 1, min(fits, BATCH)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if step(middle) * tokens_per_s <= 1 else (low, middle - 1)
    first = 2 * size.active * read * (1 - cached) / (chips * peak(chip) * share)
    return Serving(chips, low, step(low), first, first + written * step(low) / low)
