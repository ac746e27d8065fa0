"""Keys and values of the past: their layout, how a prompt fills them, and how one new token reads and extends them.

B row, T position of a prompt, S slot, D width, N query heads, K kv heads, G heads of a kv head, H head width, V vocabulary.

All rows of a batch stand flush at one slot: shorter prompts have padding in front, up to slot `first_B`. A token's
position is its slot less `first_B`, so padding changes neither positions nor distances, and no slot before `first_B` is seen.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.model.heads import LanguageModel, cast
from jaxllm.model.transformer import unstack
from jaxllm.partition import constrain, leaf_name

MASKED = -1e30  # not -inf, which would turn a row of masked scores into NaN


class Weights(NamedTuple):
    """A model's parameters as decoding wants them."""

    params: nnx.State  # all but the layers' where `block_L` holds those
    block_L: list[nnx.State] | None  # each layer's own arrays; None: they are scanned, as in training


@partial(jax.jit, static_argnums=(0, 1))
def prepare(graph: nnx.GraphDef, dtype, params: nnx.State) -> Weights:
    """Returns the weights in the compute type; where layers are unrolled, cut apart once instead of at every token."""
    params = cast(params, dtype)
    model = nnx.merge(graph, params)
    if not model.trunk.form.unroll:
        return Weights(params, None)
    block_L = unstack(nnx.state(model.trunk.blocks_L, nnx.Param), model.trunk.n_units)
    return Weights(_without_blocks(params), [_placed(block) for block in block_L])


def _without_blocks(params: nnx.State) -> nnx.State:
    def keep(path, leaf):
        return jnp.zeros((), leaf.dtype) if "blocks_L" in leaf_name(path).split(".") else leaf

    return jax.tree_util.tree_map_with_path(keep, params)


def _placed(block: nnx.State) -> nnx.State:
    return jax.tree.map(lambda var: var.replace(constrain(var[...], *var.axes)), block,
                        is_leaf=lambda x: isinstance(x, nnx.Variable))


def read_prompt(model: LanguageModel, block_L, token_BT, first_B, slots: int):
    """Returns (the hidden states x_BD at the prompts' last tokens, the caches of `slots` slots that hold the prompts)."""
    slot_T = jnp.arange(token_BT.shape[1], dtype=jnp.int32)
    pos_BT = jnp.maximum(slot_T[None] - first_B[:, None], 0)
    doc_BT = (slot_T[None] >= first_B[:, None]).astype(jnp.int32)  # padding is document 0

    def attend(q_BTNH, k_BTKH, v_BTKH, cache):
        o_BTNH = model.trunk.form.attention(q_BTNH, k_BTKH, v_BTKH, doc_BT, window=model.window)
        return o_BTNH, (_slots(k_BTKH, slots), _slots(v_BTKH, slots))

    x_BTD, cache_L = _layers(model, block_L, model.trunk.embed(token_BT), pos_BT, attend, None, doc_BT > 0)
    return model.trunk.norm(x_BTD[:, -1:])[:, 0], cache_L


def read_token(model: LanguageModel, block_L, token_B, slot, first_B, cache_L):
    """Returns (the hidden states x_BD of one more token of each row, the caches with it in `slot`)."""
    pos_B1 = jnp.maximum(slot - first_B, 0)[:, None]

    def attend(q_B1NH, k_B1KH, v_B1KH, cache):
        k_BKSH, v_BKSH = (
            jax.lax.dynamic_update_slice_in_dim(old_BKSH, _rows_and_heads(new_B1KH), slot, axis=old_BKSH.ndim - 2)
            for old_BKSH, new_B1KH in zip(cache, (k_B1KH, v_B1KH), strict=True)
        )
        return attend_to_cache(q_B1NH, k_BKSH, v_BKSH, slot, first_B, model.window), (k_BKSH, v_BKSH)

    x_B1D, cache_L = _layers(model, block_L, model.trunk.embed(token_B[:, None]), pos_B1, attend, cache_L)
    return model.trunk.norm(x_B1D)[:, 0], cache_L


def attend_to_cache(q_B1NH, k_BKSH, v_BKSH, slot, first_B, window: int | None):
    """Attends from the token in `slot` to the slots of its row, up to its own and at most `window` of them."""
    B, _, N, H = q_B1NH.shape
    *BK, S, _ = k_BKSH.shape  # [B, K], or [B * K]
    G = B * N // math.prod(BK)
    slot_S = jnp.arange(S, dtype=jnp.int32)
    seen_BS = (slot_S[None] <= slot) & (slot_S[None] >= first_B[:, None])
    if window is not None:
        seen_BS &= slot_S[None] > slot - window
    seen_BKGS = jnp.broadcast_to(seen_BS[:, None], (B, N // G, S)).reshape(*BK, 1, S)
    q_BKGH = q_B1NH.reshape(*BK, G, H) * H**-0.5
    score_BKGS = jnp.einsum("...GH,...SH->...GS", q_BKGH, k_BKSH, preferred_element_type=jnp.float32)
    share_BKGS = jax.nn.softmax(jnp.where(seen_BKGS, score_BKGS, MASKED), axis=-1).astype(v_BKSH.dtype)
    return jnp.einsum("...GS,...SH->...GH", share_BKGS, v_BKSH).reshape(B, 1, N, H)


def grow(cache_L, slots: int):
    """Returns the caches with room for `slots` slots."""

    def one(x):  # [..., S, H]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, slots - x.shape[-2]), (0, 0)])

    return jax.tree.map(one, cache_L)


def _layers(model, block_L, x_BTD, pos_BT, attend, cache_L, real_BT=None):
    if block_L is None:
        return model.trunk.blocks(x_BTD, pos_BT, attend, cache_L, real_BT=real_BT)[:2]
    graph, angles, caches = nnx.graphdef(model.trunk.blocks_L), model.trunk.angles(pos_BT), []
    for params, cache in zip(block_L, cache_L or [None] * len(block_L), strict=True):
        x_BTD, cache, _ = nnx.merge(graph, params)(x_BTD, angles, attend, cache, real_BT=real_BT)
        caches.append(cache)
    return x_BTD, caches


def _slots(x_BTKH, slots: int):
    """Returns a prompt's keys or values with room for `slots` of them, placed by row and head."""
    x_BKTH = _rows_and_heads(x_BTKH)
    x_BKSH = jnp.pad(x_BKTH, [(0, 0)] * (x_BKTH.ndim - 2) + [(0, slots - x_BTKH.shape[1]), (0, 0)])
    return constrain(x_BKSH, "batch", "kv_heads", None, None) if x_BKSH.ndim == 4 else x_BKSH


def _rows_and_heads(x_BTKH):
    """Returns x_BKTH, so that attention is a plain batch of matmuls.

    On one device rows and heads are one axis: XLA's CPU back end copies the caches at every token where they have an axis
    of size 1, as they would for one row. On a mesh they stay apart, since each may be split.
    """
    x_BKTH = x_BTKH.swapaxes(1, 2)
    if any(size > 1 for size in jax.sharding.get_abstract_mesh().shape.values()):
        return x_BKTH
    return x_BKTH.reshape(-1, *x_BKTH.shape[2:])
