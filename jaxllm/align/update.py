"""The compiled parts of RLHF: what each model says of a batch of responses, and one optimizer step on a minibatch.

Axes: B response, P prompt slot, R response token, S = P + R slot, O objective. A batch is a dict of arrays [B, ...]: those of a
rollout (generate/continuous.py) and what the algorithm adds to them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxllm.align.supervised import of_routers
from jaxllm.model.config import MoEConfig
from jaxllm.model.heads import cast
from jaxllm.partition import constrain
from jaxllm.train.loss import token_logps, token_logps_and_entropies
from jaxllm.train.optim import Optimizer, finite_leaves
from jaxllm.train.step import in_parts, router_metrics, routers_loss, summed_parts, with_balanced_biases


class Reading(NamedTuple):
    """How responses are read: everything that is compared with the sampler's log-probabilities has to match it."""

    dtype: Any  # compute type
    prompt_slots: int
    n_tokens: int  # ids from here on are never drawn
    temperature: float
    chunk: int  # positions whose logits are held at once
    moe: MoEConfig | None = None  # of sparse layers: their routers' losses are trained with and their biases moved


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
    return response_logps_and_routed(graph, reading, params, batch, entropies=entropies)[0]


def response_logps_and_routed(graph, reading: Reading, params, batch, *, entropies: bool):
    """Returns (what `response_logps` does, what the routers of sparse layers did, or None)."""
    P, token_BS = reading.prompt_slots, batch["token_BS"]
    model = nnx.merge(graph, cast(params, reading.dtype))
    pos_BS, doc_BS = places(batch, token_BS.shape[1] - 1, P)
    x_BSD, routed_L = model.hidden_and_routed(token_BS[:, :-1], pos_BS, doc_BS)
    of_tokens = token_logps_and_entropies if entropies else token_logps
    return of_tokens(x_BSD[:, P - 1 :], model.head_DV(), token_BS[:, P:], chunk=reading.chunk, temperature=reading.temperature,
                     n_tokens=reading.n_tokens), routed_L


def response_values(graph, reading: Reading, params, batch):
    """Returns value_BR, float32: the critic's value of the state before each response token."""
    return response_values_and_routed(graph, reading, params, batch)[0]


def response_values_and_routed(graph, reading: Reading, params, batch):
    """Returns (what `response_values` does, what the routers of sparse layers did, or None)."""
    P, token_BS = reading.prompt_slots, batch["token_BS"]
    critic = nnx.merge(graph, cast(params, reading.dtype))
    pos_BS, doc_BS = places(batch, token_BS.shape[1] - 1, P)
    score_BSO, routed_L = critic.scores_and_routed(token_BS[:, :-1], pos_BS, doc_BS)
    return score_BSO[:, P - 1 :, 0], routed_L


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
    state = dict(state)

    def of_policy(params, part, key):
        (logp_BR, entropy_BR), routed_L = response_logps_and_routed(models.policy, reading, params, part, entropies=True)
        (total, count), told = losses.policy(logp_BR, entropy_BR, part)
        return total + count * routers_loss(reading.moe, routed_L), (count, told | of_routers(routed_L))

    def of_critic(params, part, key):
        value_BR, routed_L = response_values_and_routed(models.critic, reading, params, part)
        (total, count), told = losses.value(value_BR, part)
        return total + count * routers_loss(reading.moe, routed_L), (count, told | of_routers(routed_L))

    mean = _divided(in_parts(of_policy, micro_batches, state["policy"]["params"], minibatch, None, added))
    metrics = {"policy_loss": mean.loss, **mean.told}
    if ptx is not None:
        coefficient, of_text = ptx
        of_texts = _divided(in_parts(of_text, micro_batches, state["policy"]["params"], text, None))
        mean = mean._replace(grads=jax.tree.map(lambda a, b: a + coefficient * b, mean.grads, of_texts.grads))
        metrics["ptx_loss"] = of_texts.loss
    state["policy"], told = _stepped(optimizers["policy"], state["policy"], mean, state["updates"], reading.moe)
    metrics |= told
    if losses.value is not None:
        mean = _divided(in_parts(of_critic, micro_batches, state["critic"]["params"], minibatch, None, added))
        state["critic"], told = _stepped(optimizers["critic"], state["critic"], mean, state["updates"], reading.moe)
        metrics |= {"value_loss": mean.loss, **mean.told, **{f"critic_{k}": v for k, v in told.items()}}
    if "ema" in state:
        state["ema"] = jax.tree.map(lambda mean, now: ema * mean + (1 - ema) * now, state["ema"], state["policy"]["params"])
    state["updates"] = state["updates"] + 1
    return state, metrics


class _Mean(NamedTuple):
    """What a minibatch says of one model."""

    loss: jax.Array
    grads: Any
    told: dict
    routed_L: Any  # what routers of sparse layers did; None without any


def _divided(found) -> _Mean:
    """Returns means, of sums and counts; a batch without actions moves nothing."""
    (total, (count, told)), grads = found
    count, told = jnp.maximum(count, 1.0), told or {}
    means = {name: s / jnp.maximum(n, 1.0) for name, (s, n) in told.get("sums", {}).items()}
    means |= told["stats"].metrics() if "stats" in told else {}
    return _Mean(total / count, jax.tree.map(lambda g: g / count, grads), means, told.get("routed"))


def added(told_M):
    """Returns what all micro-batches tell, from each one's, stacked: {"sums": {name: (sum, count)}, "stats": PolicyStats,
    "routed": what routers did}."""
    total = summed_parts({name: x for name, x in told_M.items() if name != "stats"})
    return total | ({"stats": told_M["stats"].over_parts()} if "stats" in told_M else {})


def _stepped(optimizer: Optimizer, part, mean: _Mean, n_updates, moe: MoEConfig | None):
    """Returns (parameters and optimizer state after a step, its metrics); biases of routers move as in pretraining."""
    updates, opt = optimizer.tx.update(mean.grads, part["opt"], part["params"], value=mean.loss)
    metrics = {"grad_norm": optax.tree.norm(mean.grads), "lr": optimizer.rate(n_updates, opt),
               "finite": jnp.all(finite_leaves(mean.grads)) & jnp.all(finite_leaves(part["params"]))}
    params = optax.apply_updates(part["params"], updates)
    if moe is not None and mean.routed_L is not None:
        metrics |= router_metrics(mean.routed_L)
        params = with_balanced_biases(moe.bias_rate, params, part["params"], mean.routed_L.chosen_E)
    return {"params": params, "opt": opt}, metrics
