"""How the same mathematics is spelled for one kind of processor: the one place where a platform chooses.

The model's results do not depend on this (the tests hold every body to the same reference); its speed does.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np

from jaxllm.model.attention import dense_at, dense_masked, splash, splash_at
from jaxllm.model.attention_cpu import causal_chunked
from jaxllm.model.dispatch import by_ragged_dot
from jaxllm.model.moe_cpu import by_blocks


@dataclasses.dataclass(frozen=True)
class Formulation:
    attention: Callable  # (q_BTNH, k_BTKH, v_BTKH, doc_BT, *, window) -> o_BTNH
    attention_at: Callable  # (q_BTNH, k_BSKH, v_BSKH, doc_BT, doc_BS, *, window): the queries are the last T of S positions
    unroll: bool  # layers one after the other in the program, instead of one scanned body
    flatten: bool  # [B, T] merged into one axis before each matmul
    grouped: Callable  # (x_MD, w_EDF, size_E) -> y_MF: rows sorted by expert times their expert's weights
    context: int = 1  # parts of a sequence that are on different devices
    order: Callable = np.arange  # T -> the position at each place of a row, whose parts are on different devices
    split_attention: Callable | None = None  # as `attention`, of a sequence in parts (parallel/context.py)
    phases: tuple = ()  # of sums over a mesh axis: partition.phases
    remat: str = "none"  # what the backward pass computes again: "none", or as model/remat.py reads it
    offload: bool = False  # whether what it keeps goes to the host's memory


PLATFORMS = {
    # XLA's CPU matmuls are 25-32 % faster on 2-d operands, and unrolled layers save 12-20 % (docs/LOG.md)
    "cpu": Formulation(attention=causal_chunked, attention_at=dense_at, unroll=True, flatten=True, grouped=by_blocks),
    # scan: compile time does not grow with depth
    "tpu": Formulation(attention=splash, attention_at=splash_at, unroll=False, flatten=False, grouped=by_ragged_dot),
    "gpu": Formulation(attention=dense_masked, attention_at=dense_at, unroll=False, flatten=False, grouped=by_ragged_dot),
}


def for_platform(platform: str, *, remat: str = "none", offload: bool = False, phases: tuple = ()) -> Formulation:
    """Returns the formulation of a mesh's platform."""
    return dataclasses.replace(PLATFORMS.get(platform, PLATFORMS["gpu"]), remat=remat, offload=offload, phases=phases)


REFERENCE = Formulation(attention=partial(dense_masked, implementation="xla"), attention_at=dense_at, unroll=False,
                        flatten=False, grouped=by_ragged_dot)
