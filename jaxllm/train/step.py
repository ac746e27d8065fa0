"""One step, as a pure function: it reads no settings, logs nothing and knows nothing of files."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxllm.model.config import MoEConfig
from jaxllm.model.heads import cast
from jaxllm.model.moe import Routed, losses
from jaxllm.parallel.context import balance
from jaxllm.train.loss import next_token_loss
from jaxllm.train.noise_scale import estimates, scale_of, squared_norm
from jaxllm.train.optim import Optimizer, finite_leaves


class Objective(NamedTuple):
    """What is minimised: the model's structure and the loss's settings."""

    graph: nnx.GraphDef
    dtype: Any  # compute type
    chunk: int  # positions whose logits are held at once
    z_loss: float
    label_smoothing: float
    dropout: float
    moe: MoEConfig | None = None  # of a model with sparse layers

    @property
    def capacity(self) -> float | None:
        return self.moe and self.moe.capacity


def loss_sum(objective: Objective, params, batch, key=None):
    """Returns the summed loss of a batch and the number of its targets, both float32; `key` turns dropout on."""
    loss, (n, _) = loss_and_routed(objective, params, batch, key)
    return loss, n


def loss_and_routed(objective: Objective, params, batch, key=None):
    """Returns the summed loss of a batch, the number of its targets, and what the routers did (None without sparse layers)."""
    # The only cast: compute runs in `dtype`, gradients come back in float32.
    model = nnx.merge(objective.graph, cast(params, objective.dtype))
    batch = balance(batch, model.trunk.form.context)
    x_BTD, routed_L = model.hidden_and_routed(batch["token_BT"], batch["pos_BT"], batch["doc_BT"], key, objective.capacity)
    loss, n = next_token_loss(x_BTD, model.head_DV(), batch["target_BT"], batch["weight_BT"], chunk=objective.chunk,
                              z_loss=objective.z_loss, label_smoothing=objective.label_smoothing,
                              phases=model.trunk.form.phases)
    return loss + n * routers_loss(objective.moe, routed_L), (n, routed_L)


def accumulated(objective: Objective, micro_batches: int, params, batch, key):
    """Returns ((summed loss, (number of targets, what the routers did)), gradients) of a batch, computed in parts one after
    the other."""
    return in_parts(partial(loss_and_routed, objective), micro_batches, params, batch, key)


def summed_parts(told_M):
    return jax.tree.map(lambda x_M: jnp.sum(x_M, axis=0), told_M)


def accumulated_with_noise(objective: Objective, micro_batches: int, params, batch, key):
    """Returns what `accumulated` does, and what the parts' gradients tell of their noise (noise_scale.estimates):
    ((summed loss, (number of targets, what the routers did, that)), gradients)."""

    def of_part(n, grads):
        return squared_norm(grads) / jnp.square(jnp.maximum(n, 1.0))

    (loss, (n, (routed_L, squares))), grads = in_parts(partial(loss_and_routed, objective), micro_batches, params, batch, key,
                                                       of_part=of_part)
    noise = estimates(squares / micro_batches, of_part(n, grads), micro_batches, batch["token_BT"].size)
    return (loss, (n, routed_L, noise)), grads


def in_parts(loss, micro_batches: int, params, batch, key, merge=summed_parts, of_part=None):
    """Returns ((summed loss, (count, told)), gradients) of a batch, computed in parts one after the other.

    `loss(params, batch, key) -> (summed loss, (count, told))`; `told`, a tree or None, is merged over the parts: summed.
    With `of_part(count, gradients)` it is (told, what that returns of each part), merged too.
    """
    loss_and_grad = jax.value_and_grad(loss, has_aux=True)
    if of_part is not None:
        loss_and_grad = partial(_also, loss_and_grad, of_part)

    def accumulate(total, xs):
        i, micro_batch = xs
        (loss, (n, told)), grads = loss_and_grad(params, micro_batch, micro_key(key, i, micro_batches))
        return jax.tree.map(jnp.add, total, (loss, n, grads)), told

    if micro_batches == 1:
        return loss_and_grad(params, batch, key)
    zeros = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    xs = jnp.arange(micro_batches), jax.tree.map(partial(split, micro_batches), batch)
    (loss, n, grads), told = jax.lax.scan(accumulate, zeros, xs)
    return (loss, (n, merge(told))), grads


def _also(loss_and_grad, of_part, *inputs):
    (loss, (n, told)), grads = loss_and_grad(*inputs)
    return (loss, (n, (told, of_part(n, grads)))), grads


def micro_key(key, i, micro_batches: int):
    """Returns the key of the i-th part of a batch; None, which keeps dropout off, stays None."""
    return key if key is None or micro_batches == 1 else jax.random.fold_in(key, i)


def routers_loss(moe: MoEConfig | None, routed_L: Routed | None):
    """Returns the balance and z losses of sparse layers, weighted and summed over layers; 0 without any.

    They are means over the tokens routed together, a micro-batch, so they count once a target: the sum and the number that
    it is divided by still fit.
    """
    if routed_L is None or not (moe and (moe.balance_loss or moe.z_loss)):
        return jnp.zeros((), jnp.float32)
    balance_L, z_L = losses(routed_L)
    return jnp.sum(moe.balance_loss * balance_L + moe.z_loss * z_L)


def train_step(objective: Objective, optimizer: Optimizer, loss_and_grads, state, batch):
    """Returns the next state and the step's metrics. Sums over micro-batches are divided once, by all targets.

    `loss_and_grads(params, batch, key)` is `accumulated`'s, `accumulated_with_noise`'s, or a pipeline's.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step) if objective.dropout else None
    (loss, (n, routed_L, *noise)), grads = loss_and_grads(state.params, batch, key)
    n = jnp.maximum(n, 1.0)  # a batch without targets moves nothing
    loss, grads = jax.tree.map(lambda x: x / n, (loss, grads))
    given = {"noise": noise[0]} if noise else {}
    updates, opt_state = optimizer.tx.update(grads, state.opt_state, state.params, value=loss, **given)
    metrics = {
        "loss": loss, "grad_norm": optax.tree.norm(grads), "lr": optimizer.rate(state.step, opt_state), "targets": n,
        "finite_params": finite_leaves(state.params), "finite_grads": finite_leaves(grads),
    }
    if noise:
        metrics["noise_scale"] = scale_of(optimizer.noise(opt_state))
    params = optax.apply_updates(state.params, updates)
    if routed_L is not None:
        metrics |= router_metrics(routed_L)
        params = with_balanced_biases(objective.moe.bias_rate, params, state.params, routed_L.chosen_E)
    return type(state)(state.step + 1, params, opt_state, state.rng), metrics


def router_metrics(routed_L: Routed) -> dict:
    """Returns the fullest expert's load as a multiple of the mean, of the layer where it is largest, the share of choices
    that were dropped, and the load-balancing loss (1: perfectly even), the mean of the layers."""
    load_L = jnp.max(routed_L.chosen_E, axis=-1) / jnp.maximum(jnp.mean(routed_L.chosen_E, axis=-1), 1e-20)
    return {"expert_load": jnp.max(load_L), "balance_loss": jnp.mean(losses(routed_L)[0]),
            "dropped_share": jnp.sum(routed_L.dropped) / jnp.maximum(jnp.sum(routed_L.chosen_E), 1.0)}


def with_balanced_biases(rate: float, params, before, chosen_LE):
    """Returns the parameters with each selection bias moved by `rate` towards an even load (Wang et al. 2024), from where
    it was `before` the optimizer: biases have no gradient, and are not the optimizer's."""

    def one(var, old):
        if "balance" not in var.axes:
            return var
        return var.replace(old[...] + rate * jnp.sign(jnp.mean(chosen_LE, axis=1, keepdims=True) - chosen_LE))

    return jax.tree.map(one, params, before, is_leaf=lambda x: isinstance(x, nnx.Variable))


def split(micro_batches: int, x_BT):
    """Returns [micro_batches, B / micro_batches, T]; strided, so that each part keeps rows of every data shard."""
    return x_BT.reshape(-1, micro_batches, *x_BT.shape[1:]).swapaxes(0, 1)


def eval_step(objective: Objective, params, batch):
    """Returns the summed cross-entropy of a batch in nats, without z-loss, smoothing, the routers' losses and
    dropped tokens, and its number of targets."""
    plain = objective._replace(z_loss=0.0, label_smoothing=0.0, dropout=0.0, moe=None)
    return loss_sum(plain, params, batch)
