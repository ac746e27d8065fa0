"""The compiled parts of RLHF: what each model says of a batch of responses, and one optimizer step on a minibatch.

Axes: B response, P prompt slot, R response token, S = P + R slot, O objective. A batch is a dict of arrays [B, ...]: those of a
rollout (generate/continuous.py) and what the algorithm adds to them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxllm.model.heads import cast
from jaxllm.partition import constrain
from jaxllm.train.loss import token_logps, token_logps_and_entropies
from jaxllm.train.optim import Optimizer, finite_leaves
from jaxllm.train.step import in_parts


class Reading(NamedTuple):
    """How responses are read: everything that is compared with the sampler's log-probabilities has to match it."""

    dtype: Any  # compute type
    prompt_slots: int
    n_tokens: int  # ids from here on are never drawn
    temperature: float
    chunk: int  # positions whose logits are held at once


def places(batch, n_slots: int, prompt_slots: int):
    """Returns (pos_BS, doc_BS) of the first `n_slots` slots: positions count from the prompt's first token, padding is
    document 0."""
    slot_S = jnp.arange(n_slots, dtype=jnp.int32)[None]
    first_B1, end_B1 = batch["first_B"][:, None], prompt_slots + batch["length_B"][:, None]
    real_BS = (slot_S >= first_B1) & (slot_S < end_B1)
    return jnp.where(real_BS, slot_S - first_B1, 0), real_BS.astype(jnp.int32)


def response_logps(graph, reading: Reading, params, batch, *, entropies: bool = False):
    """Returns logp_BR of the response's tokens under a language model, float32; with `entropies` also those of each token's
    distribution. The state before response token t is the hidden state one slot earlier."""
    P, token_BS = reading.prompt_slots, batch["token_BS"]
    model = nnx.merge(graph, cast(params, reading.dtype))
    pos_BS, doc_BS = places(batch, token_BS.shape[1] - 1, P)
    x_BSD = model.hidden(token_BS[:, :-1], pos_BS, doc_BS)
    of_tokens = token_logps_and_entropies if entropies else token_logps
    return of_tokens(x_BSD[:, P - 1 :], model.head_DV(), token_BS[:, P:], chunk=reading.chunk, temperature=reading.temperature,
                     n_tokens=reading.n_tokens)


def response_values(graph, reading: Reading, params, batch):
    """Returns value_BR, float32: the critic's value of the state before each response token."""
    P, token_BS = reading.prompt_slots, batch["token_BS"]
    critic = nnx.merge(graph, cast(params, reading.dtype))
    pos_BS, doc_BS = places(batch, token_BS.shape[1] - 1, P)
    return critic.scores(token_BS[:, :-1], pos_BS, doc_BS)[:, P - 1 :, 0]


class Losses(NamedTuple):
    """What one optimizer step minimises. Each is (..., minibatch) -> ((sum, count), told), told a dict of (sum, count)."""

    policy: Any  # (logp_BR, entropy_BR, minibatch)
    value: Any | None  # (value_BR, minibatch); None: no critic


class Models(NamedTuple):
    policy: nnx.GraphDef
    critic: nnx.GraphDef | None


def update(models: Models, reading: Reading, losses: Losses, optimizers, micro_batches: int, ptx, ema: float, state, batch,
           row_B, text):
    """Returns (the next state, metrics) of one optimizer step on the rows `row_B` of a batch.

    `state`: {"policy": {"params", "opt"}, "critic": the same, "ema": params}, of which the last two may be absent. `ptx`:
    (coefficient, loss of a batch of pretraining text -> (sum, (count, None))), with `text` that batch; None: no such
    gradients. Each loss's sum is divided once, by its count over all micro-batches.
    """
    minibatch = jax.tree.map(lambda x: constrain(x[row_B], "batch", *[None] * (x.ndim - 1)), batch)
    state, metrics = dict(state), {}

    def of_policy(params, part, key):
        logp_BR, entropy_BR = response_logps(models.policy, reading, params, part, entropies=True)
        (total, count), told = losses.policy(logp_BR, entropy_BR, part)
        return total, (count, told)

    def of_critic(params, part, key):
        (total, count), told = losses.value(response_values(models.critic, reading, params, part), part)
        return total, (count, told)

    loss, grads, told = _divided(in_parts(of_policy, micro_batches, state["policy"]["params"], minibatch, None, added))
    metrics |= {"policy_loss": loss, **told}
    if ptx is not None:
        coefficient, of_text = ptx
        text_loss, text_grads, _ = _divided(in_parts(of_text, micro_batches, state["policy"]["params"], text, None))
        grads = jax.tree.map(lambda a, b: a + coefficient * b, grads, text_grads)
        metrics["ptx_loss"] = text_loss
    state["policy"], tuned = _stepped(optimizers["policy"], state["policy"], grads, loss, state["updates"])
    metrics |= tuned
    if losses.value is not None:
        loss, grads, told = _divided(in_parts(of_critic, micro_batches, state["critic"]["params"], minibatch, None, added))
        state["critic"], tuned = _stepped(optimizers["critic"], state["critic"], grads, loss, state["updates"])
        metrics |= {"value_loss": loss, **told, **{f"critic_{k}": v for k, v in tuned.items()}}
    if "ema" in state:
        state["ema"] = jax.tree.map(lambda mean, now: ema * mean + (1 - ema) * now, state["ema"], state["policy"]["params"])
    state["updates"] = state["updates"] + 1
    return state, metrics


def _divided(found):
    """Returns (mean loss, mean gradients, metrics) of sums and counts; a batch without actions moves nothing."""
    (total, (count, told)), grads = found
    count, told = jnp.maximum(count, 1.0), told or {}
    means = {name: s / jnp.maximum(n, 1.0) for name, (s, n) in told.get("sums", {}).items()}
    means |= told["stats"].metrics() if "stats" in told else {}
    return total / count, jax.tree.map(lambda g: g / count, grads), means


def added(told_M):
    """Returns what all micro-batches tell, from each one's: {"sums": {name: (sum, count)}, "stats": PolicyStats}, stacked."""
    total = {"sums": jax.tree.map(lambda x_M: jnp.sum(x_M, axis=0), told_M["sums"])}
    return total | ({"stats": told_M["stats"].over_parts()} if "stats" in told_M else {})


def _stepped(optimizer: Optimizer, part, grads, loss, n_updates):
    """Returns (parameters and optimizer state after a step, its metrics)."""
    updates, opt = optimizer.tx.update(grads, part["opt"], part["params"], value=loss)
    metrics = {"grad_norm": optax.tree.norm(grads), "lr": optimizer.rate(n_updates, opt),
               "finite": jnp.all(finite_leaves(grads)) & jnp.all(finite_leaves(part["params"]))}
    return {"params": optax.apply_updates(part["params"], updates), "opt": opt}, metrics
