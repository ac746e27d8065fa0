"""The compiled programs of rollouts: prompts are read, rows take one each, write, and take the next when they have ended.

B row, R rows that take a prompt at once, U prompt, T its position, S slot, D width, V vocabulary.

All rows write into the same slot of a ring, so that a token extends every cache in one place. A prompt is put into the
slots before it, whenever that is, and a row sees no more slots than it has tokens.
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
    end_ids: tuple[int, ...]  # a row has ended after one of these
    pad_id: int


class Prompts(NamedTuple):
    """Prompts that were read, ready for any number of rows."""

    x_UD: jax.Array  # hidden states at the last tokens
    length_U: jax.Array  # int32
    seen_UV: jax.Array  # bool: their tokens; [U, 0] without a penalty
    cache_L: Any  # of T slots


class Taken(NamedTuple):
    """Which rows take which prompts, and how they are to go on."""

    row_R: jax.Array  # int32; from the number of rows on: nothing is taken
    prompt_R: jax.Array  # int32
    limit_R: jax.Array  # int32: tokens it may write
    seed_R: jax.Array  # uint32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows while they are written. Each has a latest token, in `slot`, that is not in the caches yet."""

    slot: jax.Array  # int32
    steps: jax.Array  # int32: tokens that were written after each other, whatever the row
    token_BS: jax.Array  # int32: what was written; a row that has ended keeps it
    logp_BS: jax.Array  # float32: its log-probabilities at the temperature, unfiltered
    seen_BV: jax.Array  # bool: tokens of the prompt and of what was written; [B, 0] without a penalty
    done_B: jax.Array  # bool
    n_B: jax.Array  # int32: tokens written
    pos_B: jax.Array  # int32: position of the latest token
    first_B: jax.Array  # int32: slot of the first token written
    limit_B: jax.Array  # int32: tokens that may be written
    seed_B: jax.Array  # uint32
    cache_L: Any


@partial(jax.jit, static_argnums=0)
def read(program: Program, weights: cache.Weights, token_UT, length_U) -> Prompts:
    """Reads prompts that end flush in `token_UT`."""
    model = nnx.merge(program.graph, weights.params)
    U, T = token_UT.shape
    x_UD, cache_L = cache.read_prompt(model, weights.block_L, token_UT, T - length_U, T)
    seen_UV = jnp.zeros((U, 0), bool)
    if program.steps.penalty:
        real_UT = jnp.arange(T)[None] >= T - length_U[:, None]
        seen_UV = jnp.zeros((U, model.head_DV().shape[1]), bool).at[jnp.arange(U)[:, None], token_UT].max(real_UT)
    return Prompts(x_UD, length_U, seen_UV, cache_L)


@partial(jax.jit, static_argnums=(0, 1))
def start(program: Program, slots: int, weights: cache.Weights, numbers, prompts: Prompts, taken: Taken) -> Rows:
    """Returns rows that have all taken a prompt, row_R being 0, 1, …, and drawn a token. Those that only fill up the batch
    have limit_R = 0."""
    B, T = taken.row_R.shape[0], jax.tree.leaves(prompts.cache_L)[0].shape[-2]
    new, token_B, logp_B = _first(program, weights, numbers, prompts, taken, T)
    new["cache_L"] = cache.grow(cache.take_rows(prompts.cache_L, prompts.length_U.shape[0], taken.prompt_R), slots)
    column = jnp.full((B, slots), program.pad_id, jnp.int32), jnp.zeros((B, slots), jnp.float32)
    return _by_batch(Rows(jnp.int32(T), jnp.int32(0), _put(column[0], token_B, T), _put(column[1], logp_B, T), **new))


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def place(program: Program, weights: cache.Weights, numbers, rows: Rows, prompts: Prompts, taken: Taken) -> Rows:
    """Returns the rows with some that have ended replaced: they have taken a prompt and drawn a token."""
    B, S = rows.token_BS.shape
    T = jax.tree.leaves(prompts.cache_L)[0].shape[-2]
    new, token_R, logp_R = _first(program, weights, numbers, prompts, taken, rows.slot)
    cache_L = cache.grow(cache.take_rows(prompts.cache_L, prompts.length_U.shape[0], taken.prompt_R), S)
    changed = {name: getattr(rows, name).at[taken.row_R].set(value, mode="drop") for name, value in new.items()}
    changed["cache_L"] = cache.put_rows(rows.cache_L, B, taken.row_R, cache.turn(cache_L, rows.slot - T))
    changed["token_BS"] = rows.token_BS.at[taken.row_R, rows.slot].set(token_R, mode="drop")
    changed["logp_BS"] = rows.logp_BS.at[taken.row_R, rows.slot].set(logp_R, mode="drop")
    return _by_batch(dataclasses.replace(rows, **changed))


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def advance(program: Program, weights: cache.Weights, numbers, rows: Rows, leave, until) -> Rows:
    """Writes tokens until `leave` rows or fewer go on, or `until` steps are done."""
    model = nnx.merge(program.graph, weights.params)
    S = rows.token_BS.shape[1]

    def going_on(rows):
        return (rows.steps < until) & (jnp.sum(~rows.done_B) > leave)

    def one_token(rows):
        token_B = _column(rows.token_BS, rows.slot)
        x_BD, cache_L = cache.read_token(model, weights.block_L, token_B, rows.slot, rows.pos_B, rows.cache_L)
        token_B, logp_B = _draw(program, model, numbers, x_BD, rows.seed_B, rows.n_B, rows.seen_BV)
        slot = jnp.where(rows.slot + 1 < S, rows.slot + 1, 0)
        one_B = (~rows.done_B).astype(jnp.int32)
        n_B = rows.n_B + one_B
        changed = {  # a row that has ended keeps what it wrote until the host has read it
            "slot": slot, "steps": rows.steps + 1, "n_B": n_B, "pos_B": rows.pos_B + one_B, "cache_L": cache_L,
            "token_BS": _put(rows.token_BS, jnp.where(rows.done_B, _column(rows.token_BS, slot), token_B), slot),
            "logp_BS": _put(rows.logp_BS, jnp.where(rows.done_B, _column(rows.logp_BS, slot), logp_B), slot),
            "done_B": rows.done_B | _ends(program, token_B) | (n_B >= rows.limit_B),
        }
        if program.steps.penalty:
            changed["seen_BV"] = _with(rows.seen_BV, token_B)
        return dataclasses.replace(rows, **changed)

    return jax.lax.while_loop(going_on, one_token, rows)


@partial(jax.jit, static_argnums=0)
def grow(slots: int, rows: Rows) -> Rows:
    """Returns the rows with room for `slots` slots, while the last slot of the ring is that of the latest tokens."""
    more = ((0, 0), (0, slots - rows.token_BS.shape[1]))
    return dataclasses.replace(rows, token_BS=jnp.pad(rows.token_BS, more), logp_BS=jnp.pad(rows.logp_BS, more),
                               cache_L=cache.grow(rows.cache_L, slots))


@jax.jit
def keep(rows: Rows, row_R, done_R) -> Rows:
    """Returns a smaller batch of these rows; `done_R` are there only to fill it up."""
    kept = {name: getattr(rows, name)[row_R] for name in BY_ROW}
    kept["done_B"] |= done_R
    return dataclasses.replace(rows, cache_L=cache.take_rows(rows.cache_L, rows.done_B.shape[0], row_R), **kept)


BY_ROW = ("token_BS", "logp_BS", "seen_BV", "done_B", "n_B", "pos_B", "first_B", "limit_B", "seed_B")


def _first(program: Program, weights, numbers, prompts: Prompts, taken: Taken, slot):
    """Returns (what is new about rows that take a prompt, their first tokens, their log-probabilities)."""
    model = nnx.merge(program.graph, weights.params)
    seen_RV, n_R = prompts.seen_UV[taken.prompt_R], jnp.zeros_like(taken.limit_R)
    x_RD = prompts.x_UD[taken.prompt_R]
    token_R, logp_R = _draw(program, model, numbers, x_RD, taken.seed_R, n_R, seen_RV)
    new = {
        "seen_BV": _with(seen_RV, token_R) if program.steps.penalty else seen_RV,
        "done_B": _ends(program, token_R) | (taken.limit_R <= 1), "n_B": n_R + 1, "pos_B": prompts.length_U[taken.prompt_R],
        "first_B": jnp.full_like(n_R, slot), "limit_B": taken.limit_R, "seed_B": taken.seed_R,
    }
    return new, token_R, logp_R


def _draw(program: Program, model, numbers, x_BD, seed_B, n_B, seen_BV):
    """Returns each row's next token, and log softmax(logits / temperature) of it before anything is filtered."""
    # float32 out of the matmul: a bfloat16 logit of 20 is off by 0.06
    logit_BV = jnp.einsum("BD,DV->BV", x_BD, model.head_DV(), preferred_element_type=jnp.float32)
    logit_BV = constrain(logit_BV, "batch", "vocab")
    if program.n_tokens < logit_BV.shape[1]:
        logit_BV = jnp.where(jnp.arange(logit_BV.shape[1])[None] < program.n_tokens, logit_BV, sample.OUT)
    key_B = None if program.steps.greedy else sample.row_keys(seed_B, n_B)
    token_B = sample.next_token(program.steps, numbers, logit_BV, key_B, seen_BV)
    scaled_BV = logit_BV if program.steps.greedy else logit_BV / numbers.temperature
    return token_B, sample.logprob(scaled_BV, token_B)


def _ends(program: Program, token_B):
    return jnp.any(token_B[:, None] == jnp.array(program.end_ids, jnp.int32)[None], axis=1)


def _with(seen_BV, token_B):
    # a comparison, not a scatter, which XLA's CPU back end does on a copy
    return seen_BV | (jnp.arange(seen_BV.shape[1])[None] == token_B[:, None])


def _by_batch(rows: Rows) -> Rows:
    """Places the rows, the same after every program, so that the next one is compiled once."""
    return dataclasses.replace(rows, **{name: constrain(x, "batch", *(None,) * (x.ndim - 1))
                                        for name, x in ((name, getattr(rows, name)) for name in BY_ROW)})


def _column(x_BS, slot):
    return jax.lax.dynamic_index_in_dim(x_BS, slot, axis=1, keepdims=False)


def _put(x_BS, x_B, slot):
    return jax.lax.dynamic_update_slice_in_dim(x_BS, x_B[:, None], slot, axis=1)
