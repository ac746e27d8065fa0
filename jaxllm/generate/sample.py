"""From logits to the next token: greedy, or drawn from what the filters leave. B row, V vocabulary."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.generate.config import SampleConfig

OUT = -jnp.inf  # logit of a token that may not be drawn


class Steps(NamedTuple):
    """Which steps a program has; their numbers are in `Numbers`, so that other numbers need no new program."""

    greedy: bool
    top_k: bool
    top_p: bool
    min_p: bool
    penalty: bool
    logprobs: bool


class Numbers(NamedTuple):
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    penalty: jax.Array


def plan(cfg: SampleConfig, logprobs: bool) -> tuple[Steps, Numbers]:
    """Returns what a program that samples so consists of, and the numbers it is run with."""
    greedy = cfg.temperature == 0
    steps = Steps(greedy, not greedy and cfg.top_k > 0, not greedy and cfg.top_p < 1, not greedy and cfg.min_p > 0,
                  cfg.repetition_penalty != 1, logprobs)
    floats = [jnp.float32(x) for x in (cfg.temperature, cfg.top_p, cfg.min_p, cfg.repetition_penalty)]
    return steps, Numbers(floats[0], jnp.int32(cfg.top_k), *floats[1:])


def next_token(steps: Steps, numbers: Numbers, logit_BV, key_B, seen_BV=None):
    """Returns token_B, int32: penalty, temperature, top-k, top-p, min-p in this order, then one draw with the row's key."""
    if steps.penalty:
        logit_BV = penalise(logit_BV, seen_BV, numbers.penalty)
    if steps.greedy:
        return likeliest(logit_BV)
    logit_BV = logit_BV / numbers.temperature
    if steps.top_k:
        logit_BV = keep_likeliest(logit_BV, jnp.ones_like(logit_BV), numbers.top_k.astype(jnp.float32))
    if steps.top_p:  # the nucleus (Holtzman et al. 2020)
        logit_BV = keep_likeliest(logit_BV, jax.nn.softmax(logit_BV, axis=-1), numbers.top_p)
    if steps.min_p:
        logit_BV = keep_above(logit_BV, numbers.min_p)
    # The likeliest after Gumbel noise is a draw from the softmax (Gumbel 1954); each row's noise is its own key's.
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logit_BV.shape[1:], jnp.float32))(key_B)
    return likeliest(logit_BV + noise_BV)


def likeliest(logit_BV):
    """Returns the first index of each row's maximum: two plain reductions, which XLA vectorises on a CPU, unlike argmax."""
    V = logit_BV.shape[1]
    top_BV = logit_BV == jnp.max(logit_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(top_BV, jnp.arange(V, dtype=jnp.int32)[None], V - 1), axis=-1)


def penalise(logit_BV, seen_BV, penalty):
    """Divides the positive logits of tokens seen before and multiplies negative ones (Keskar et al. 2019, CTRL)."""
    return jnp.where(seen_BV, jnp.where(logit_BV > 0, logit_BV / penalty, logit_BV * penalty), logit_BV)


def keep_likeliest(logit_BV, weight_BV, need):
    """Keeps the likeliest tokens whose weights first sum to `need`, and those as likely as the last one of these.

    The least logit kept is found by halving the range of floats 32 times, exactly: XLA's sort is up to 50 times slower on
    a CPU.
    """
    bits_BV = jax.lax.bitcast_convert_type(logit_BV, jnp.int32)
    rank_BV = jnp.where(bits_BV < 0, bits_BV ^ 0x7FFFFFFF, bits_BV)  # in the order of the floats

    def halve(_, bounds):
        enough_B1, short_B1 = bounds
        middle_B1 = (enough_B1 & short_B1) + ((enough_B1 ^ short_B1) >> 1)  # the mean, without overflow
        sum_B1 = jnp.sum(jnp.where(rank_BV >= middle_B1, weight_BV, 0.0), axis=-1, keepdims=True)
        ok_B1 = sum_B1 >= need
        return jnp.where(ok_B1, middle_B1, enough_B1), jnp.where(ok_B1, short_B1, middle_B1)

    limits = jnp.iinfo(jnp.int32)
    bounds = (jnp.full((logit_BV.shape[0], 1), limits.min), jnp.full((logit_BV.shape[0], 1), limits.max))
    least_B1, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    return jnp.where(rank_BV >= least_B1, logit_BV, OUT)


def keep_above(logit_BV, share):
    """Keeps tokens at least `share` as likely as the likeliest (Nguyen et al. 2024, min-p)."""
    least_B1 = jnp.max(logit_BV, axis=-1, keepdims=True) + jnp.log(share)
    return jnp.where(logit_BV >= least_B1, logit_BV, OUT)


def logprob(logit_BV, token_B):
    """Returns log p[token] under the model itself: temperature 1, nothing filtered or penalised, as in training."""
    # A masked sum, not a gather: each device sums its own part of a split vocabulary.
    at_BV = jnp.arange(logit_BV.shape[1])[None] == token_B[:, None]
    return jnp.sum(jnp.where(at_BV, logit_BV, 0.0), axis=-1) - jax.nn.logsumexp(logit_BV, axis=-1)


def row_keys(seed_B, n):
    """Returns each row's key for its n-th new token; it depends on the row's seed and on n, or its own n_B, alone."""
    return jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(seed_B, jnp.broadcast_to(n, seed_B.shape))
