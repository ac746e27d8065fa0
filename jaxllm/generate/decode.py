"""The two compiled programs of decoding: `start` reads the prompts, `advance` writes tokens until told to stop.

B row, S slot, D width, V vocabulary. Neither returns to the host between tokens. Slots come in few sizes, so few
programs are compiled, and grow as they are filled, as attention reads all of them.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.generate import cache, sample
from jaxllm.partition import constrain


class Program(NamedTuple):
    """What the compiled programs depend on besides shapes."""

    graph: nnx.GraphDef
    steps: sample.Steps
    n_tokens: int  # ids from here on are rows that pad the embedding and are never drawn
    eos_id: int
    pad_id: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch while it is written. The token in `slot` is known in every row, and not yet in the caches."""

    slot: jax.Array  # int32
    token_BS: jax.Array  # int32: padding, prompt, what was written
    logp_BS: jax.Array  # float32: log-probabilities of what was written; [B, 0] unless asked for
    seen_BV: jax.Array  # bool: tokens of the prompt and of what was written; [B, 0] without a penalty
    done_B: jax.Array  # bool
    first_B: jax.Array  # int32: the prompt's first slot
    last_B: jax.Array  # int32: the last slot that may be written
    seed_B: jax.Array  # uint32
    n: jax.Array  # int32: tokens written
    cache_L: Any


@partial(jax.jit, static_argnums=(0, 1))
def start(program: Program, slots: int, weights: cache.Weights, numbers, token_BT, first_B, last_B, seed_B) -> Rows:
    """Reads prompts that end flush in `token_BT` and draws each row's first token. Rows without a prompt, which only
    fill up a batch, have `last_B` = -1."""
    model = nnx.merge(program.graph, weights.params)
    B, T = token_BT.shape
    x_BD, cache_L = cache.read_prompt(model, weights.block_L, token_BT, first_B, slots)
    seen_BV = jnp.zeros((B, 0), bool)
    if program.steps.penalty:
        real_BT = jnp.arange(T)[None] >= first_B[:, None]
        row_B1 = jnp.arange(B)[:, None]
        seen_BV = jnp.zeros((B, model.head_DV().shape[1]), bool).at[row_B1, token_BT].max(real_BT)
    rows = Rows(
        slot=jnp.int32(T - 1), token_BS=jnp.pad(token_BT, ((0, 0), (0, slots - T)), constant_values=program.pad_id),
        logp_BS=jnp.zeros((B, slots if program.steps.logprobs else 0), jnp.float32), seen_BV=seen_BV,
        done_B=last_B < T, first_B=first_B, last_B=last_B, seed_B=seed_B, n=jnp.int32(0), cache_L=cache_L,
    )
    return _write(program, model, numbers, rows, x_BD)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def advance(program: Program, weights: cache.Weights, numbers, rows: Rows, until) -> Rows:
    """Writes tokens until slot `until` is written or every row has ended."""
    model = nnx.merge(program.graph, weights.params)

    def going_on(rows):
        return (rows.slot < until) & ~jnp.all(rows.done_B)

    def one_token(rows):
        token_B = jax.lax.dynamic_index_in_dim(rows.token_BS, rows.slot, axis=1, keepdims=False)
        x_BD, cache_L = cache.read_token(model, weights.block_L, token_B, rows.slot, rows.slot - rows.first_B, rows.cache_L)
        return _write(program, model, numbers, dataclasses.replace(rows, cache_L=cache_L), x_BD)

    return jax.lax.while_loop(going_on, one_token, rows)


@partial(jax.jit, static_argnums=(0, 1))
def grow(program: Program, slots: int, rows: Rows) -> Rows:
    """Returns the rows with room for `slots` slots."""
    more = ((0, 0), (0, slots - rows.token_BS.shape[1]))
    logp_BS = jnp.pad(rows.logp_BS, more) if program.steps.logprobs else rows.logp_BS
    return dataclasses.replace(rows, token_BS=jnp.pad(rows.token_BS, more, constant_values=program.pad_id), logp_BS=logp_BS,
                               cache_L=cache.grow(rows.cache_L, slots))


def _write(program: Program, model, numbers, rows: Rows, x_BD) -> Rows:
    """Draws the token after `slot` from the hidden states and writes it; rows that have ended get padding."""
    # float32 out of the matmul: a bfloat16 logit of 20 is off by 0.06
    logit_BV = jnp.einsum("BD,DV->BV", x_BD, model.head_DV(), preferred_element_type=jnp.float32)
    logit_BV = constrain(logit_BV, "batch", "vocab")
    drawn_BV = logit_BV
    if program.n_tokens < logit_BV.shape[1]:
        drawn_BV = jnp.where(jnp.arange(logit_BV.shape[1])[None] < program.n_tokens, logit_BV, sample.OUT)
    keys_B = None if program.steps.greedy else sample.row_keys(rows.seed_B, rows.n)
    token_B = sample.next_token(program.steps, numbers, drawn_BV, keys_B, rows.seen_BV)
    token_B = jnp.where(rows.done_B, program.pad_id, token_B)
    slot = rows.slot + 1
    changed = {"slot": slot, "n": rows.n + 1, "token_BS": _put(rows.token_BS, token_B, slot),
               "done_B": rows.done_B | (token_B == program.eos_id) | (slot >= rows.last_B)}
    if program.steps.logprobs:
        changed["logp_BS"] = _put(rows.logp_BS, sample.logprob(logit_BV, token_B), slot)
    if program.steps.penalty:
        # a comparison, not a scatter, which XLA's CPU back end does on a copy
        changed["seen_BV"] = rows.seen_BV | (jnp.arange(logit_BV.shape[1])[None] == token_B[:, None])
    return dataclasses.replace(rows, **changed)


def _put(x_BS, x_B, slot):
    return jax.lax.dynamic_update_slice_in_dim(x_BS, x_B[:, None], slot, axis=1)
