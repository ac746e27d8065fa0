"""How the same mathematics is spelled for one kind of processor: the one place where a platform chooses.

The model's results do not depend on this (the tests hold every body to the same reference); its speed does.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

from jaxllm.model.attention import dense_masked, splash
from jaxllm.model.attention_cpu import causal_chunked
from jaxllm.model.dispatch import by_ragged_dot
from jaxllm.model.moe_cpu import by_blocks


@dataclasses.dataclass(frozen=True)
class Formulation:
    attention: Callable  # (q_BTNH, k_BTKH, v_BTKH, doc_BT, *, window) -> o_BTNH
    unroll: bool  # layers one after the other in the program, instead of one scanned body
    flatten: bool  # [B, T] merged into one axis before each matmul
    grouped: Callable  # (x_MD, w_EDF, size_E) -> y_MF: rows sorted by expert times their expert's weights
    remat: str = "none"  # what the backward pass computes again: none, dots (all but matmul results), full


PLATFORMS = {
    # XLA's CPU matmuls are 25-32 % faster on 2-d operands, and unrolled layers save 12-20 % (docs/LOG.md)
    "cpu": Formulation(attention=causal_chunked, unroll=True, flatten=True, grouped=by_blocks),
    # scan: compile time does not grow with depth
    "tpu": Formulation(attention=splash, unroll=False, flatten=False, grouped=by_ragged_dot),
    "gpu": Formulation(attention=dense_masked, unroll=False, flatten=False, grouped=by_ragged_dot),
}


def for_platform(platform: str, *, remat: str = "none", context: int = 1) -> Formulation:
    """Returns the formulation of a mesh's platform; flattening is off when the sequence axis is split."""
    chosen = PLATFORMS.get(platform, PLATFORMS["gpu"])
    return dataclasses.replace(chosen, remat=remat, flatten=chosen.flatten and context == 1)


REFERENCE = Formulation(attention=partial(dense_masked, implementation="xla"), unroll=False, flatten=False,
                        grouped=by_ragged_dot)
