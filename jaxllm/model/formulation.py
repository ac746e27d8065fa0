"""How the same mathematics is spelled for one kind of processor: the one place where a platform chooses.

The model's results do not depend on this (the tests hold every body to the same reference); its speed does.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

from jaxllm.model.attention import dense_masked, splash
from jaxllm.model.attention_cpu import causal_chunked


@dataclasses.dataclass(frozen=True)
class Formulation:
    attention: Callable  # (q_BTNH, k_BTKH, v_BTKH, doc_BT, *, window) -> o_BTNH
    unroll: bool  # layers one after the other in the program, instead of one scanned body
    flatten: bool  # [B, T] merged into one axis before each matmul
    remat: str = "none"  # what the backward pass computes again: a name of transformer.REMAT, or none


PLATFORMS = {
    # XLA's CPU matmuls are 25-32 % faster on 2-d operands, and unrolled layers save 12-20 % (docs/LOG.md)
    "cpu": Formulation(attention=causal_chunked, unroll=True, flatten=True),
    # scan: compile time does not grow with depth
    "tpu": Formulation(attention=splash, unroll=False, flatten=False),
    "gpu": Formulation(attention=dense_masked, unroll=False, flatten=False),
}


def for_platform(platform: str, *, remat: str = "none", context: int = 1) -> Formulation:
    """Returns the formulation of a mesh's platform; flattening is off when the sequence axis is split."""
    chosen = PLATFORMS.get(platform, PLATFORMS["gpu"])
    return dataclasses.replace(chosen, remat=remat, flatten=chosen.flatten and context == 1)


REFERENCE = Formulation(attention=partial(dense_masked, implementation="xla"), unroll=False, flatten=False)
