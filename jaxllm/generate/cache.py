"""Keys and values of the past: their layout, how a prompt fills them, and how one new token reads and extends them.

B row, T position of a prompt, S slot, D width, N query heads, K kv heads, G heads of a kv head, H head width, V vocabulary.

All rows of a batch stand flush at one slot: shorter prompts have padding in front, up to slot `first_B`. A token's
position is its slot less `first_B`, so padding changes neither positions nor distances, and no slot before `first_B` is seen.
The slots are a ring: the last one is followed by the first, and a row at position p sees the latest p + 1 slots.
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
        return jnp.zeros((), leaf.dtype) if _is_of_block(path) else leaf

    return jax.tree_util.tree_map_with_path(keep, params)


def _is_of_block(path) -> bool:
    return "blocks_L" in leaf_name(path).split(".")


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


def read_token(model: LanguageModel, block_L, token_B, slot, pos_B, cache_L):
    """Returns (the hidden states x_BD of one more token of each row, at its position, the caches with it in `slot`)."""

    def attend(q_B1NH, k_B1KH, v_B1KH, cache):
        k_BKSH, v_BKSH = (
            jax.lax.dynamic_update_slice_in_dim(old_BKSH, _rows_and_heads(new_B1KH), slot, axis=old_BKSH.ndim - 2)
            for old_BKSH, new_B1KH in zip(cache, (k_B1KH, v_B1KH), strict=True)
        )
        return attend_to_cache(q_B1NH, k_BKSH, v_BKSH, slot, pos_B, model.window), (k_BKSH, v_BKSH)

    x_B1D, cache_L = _layers(model, block_L, model.trunk.embed(token_B[:, None]), pos_B[:, None], attend, cache_L)
    return model.trunk.norm(x_B1D)[:, 0], cache_L


def attend_to_cache(q_B1NH, k_BKSH, v_BKSH, slot, pos_B, window: int | None):
    """Attends from the token in `slot` to the tokens of its row, its own among them, and at most the latest `window`."""
    B, _, N, H = q_B1NH.shape
    *BK, S, _ = k_BKSH.shape  # [B, K], or [B * K]
    G = B * N // math.prod(BK)
    slot_S = jnp.arange(S, dtype=jnp.int32)
    age_S = jnp.where(slot_S <= slot, slot - slot_S, slot - slot_S + S)  # tokens written since
    seen_BS = age_S[None] <= pos_B[:, None]
    if window is not None:
        seen_BS &= age_S[None] < window
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


def take_rows(cache_L, rows: int, row_R):
    """Returns the caches of some of the `rows` rows."""
    return _by_row(lambda x: jnp.take(x, row_R, axis=-4), rows, cache_L)


def put_rows(cache_L, rows: int, row_R, new_L):
    """Returns the caches with those of `row_R` replaced; numbers from `rows` on are left out."""
    return _by_row(lambda old, new: old.at[..., row_R, :, :, :].set(new, mode="drop"), (rows, row_R.size), cache_L, new_L)


def turn(cache_L, slots: int):
    """Returns the caches with what is in slot s moved to slot s + `slots` of the ring."""
    return jax.tree.map(lambda x: jnp.roll(x, slots, axis=-2), cache_L)


def whole(weights: Weights) -> nnx.State:
    """Returns the parameters in the compute type as `prepare` was given them, layers stacked."""
    if weights.block_L is None:
        return weights.params
    stacked = iter([jnp.stack(xs) for xs in zip(*map(jax.tree.leaves, weights.block_L), strict=True)])
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: next(stacked) if _is_of_block(path) else leaf, weights.params)


def _by_row(f, rows, *caches):
    """Returns the caches of `f` of the arrays as [..., B, K, S, H], whose `rows` are those of each cache, or of all."""

    def one(*xs):
        B_X = (rows,) * len(xs) if isinstance(rows, int) else rows
        if _apart():
            return _placed_rows(f(*xs))
        y = f(*(x.reshape(*x.shape[:-3], B, x.shape[-3] // B, *x.shape[-2:]) for x, B in zip(xs, B_X, strict=True)))
        return y.reshape(*y.shape[:-4], -1, *y.shape[-2:])

    return jax.tree.map(one, *caches)


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
    return _placed_rows(x_BKSH) if _apart() else x_BKSH


def _placed_rows(x_BKSH):
    return constrain(x_BKSH, *(None,) * (x_BKSH.ndim - 4), "batch", "kv_heads", None, None)


def _rows_and_heads(x_BTKH):
    """Returns x_BKTH, so that attention is a plain batch of matmuls.

    On one device rows and heads are one axis: XLA's CPU back end copies the caches at every token where they have an axis
    of size 1, as they would for one row. On a mesh they stay apart, since each may be split.
    """
    x_BKTH = x_BTKH.swapaxes(1, 2)
    return x_BKTH if _apart() else x_BKTH.reshape(-1, *x_BKTH.shape[2:])


def _apart() -> bool:
    return any(size > 1 for size in jax.sharding.get_abstract_mesh().shape.values())
