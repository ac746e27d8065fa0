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
    if steps.top_k or steps.top_p:
        logit_BV = keep_likeliest(logit_BV, numbers.top_k if steps.top_k else None, numbers.top_p if steps.top_p else None)
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


def keep_likeliest(logit_BV, k=None, p=None):
    """Keeps the `k` likeliest tokens, and of these the likeliest whose probabilities first sum to `p` (Holtzman et al.
    2020). Tokens as likely as the last one kept are kept too, so the order of the vocabulary does not matter."""
    sorted_BV = -jnp.sort(-logit_BV, axis=-1)
    if k is not None:
        rank_V = jnp.arange(logit_BV.shape[-1])
        sorted_BV = jnp.where(rank_V[None] < k, sorted_BV, OUT)
    if p is not None:
        share_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
        sorted_BV = jnp.where(before_BV < p, sorted_BV, OUT)
    least_B1 = jnp.min(jnp.where(sorted_BV > OUT, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logit_BV >= least_B1, logit_BV, OUT)


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
    """Returns each row's key for its n-th new token; it depends on the row's seed and on n alone."""
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), n))(seed_B)
