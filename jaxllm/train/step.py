"""One step, as a pure function: it reads no settings, logs nothing and knows nothing of files."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxllm.parallel.context import balance
from jaxllm.train.loss import next_token_loss
from jaxllm.train.optim import Optimizer, finite_leaves


class Objective(NamedTuple):
    """What is minimised: the model's structure and the loss's settings."""

    graph: nnx.GraphDef
    dtype: Any  # compute type
    chunk: int  # positions whose logits are held at once
    z_loss: float
    label_smoothing: float
    dropout: float


def loss_sum(objective: Objective, params, batch, key=None):
    """Returns the summed loss of a batch and the number of its targets, both float32; `key` turns dropout on."""
    # The only cast: compute runs in `dtype`, gradients come back in float32.
    params = jax.tree.map(lambda p: p.astype(objective.dtype), params)
    model = nnx.merge(objective.graph, params)
    batch = balance(batch, model.trunk.form.context)
    x_BTD = model.hidden(batch["token_BT"], batch["pos_BT"], batch["doc_BT"], key)
    return next_token_loss(x_BTD, model.head_DV(), batch["target_BT"], batch["weight_BT"], chunk=objective.chunk,
                           z_loss=objective.z_loss, label_smoothing=objective.label_smoothing, phases=model.trunk.form.phases)


def accumulated(objective: Objective, micro_batches: int, params, batch, key):
    """Returns ((summed loss, number of targets), gradients) of a batch, computed in parts one after the other."""
    loss_and_grad = jax.value_and_grad(partial(loss_sum, objective), has_aux=True)

    def accumulate(total, xs):
        i, micro_batch = xs
        (loss, n), grads = loss_and_grad(params, micro_batch, micro_key(key, i, micro_batches))
        return jax.tree.map(jnp.add, total, (loss, n, grads)), None

    if micro_batches == 1:
        return loss_and_grad(params, batch, key)
    zeros = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    xs = jnp.arange(micro_batches), jax.tree.map(partial(split, micro_batches), batch)
    (loss, n, grads), _ = jax.lax.scan(accumulate, zeros, xs)
    return (loss, n), grads


def micro_key(key, i, micro_batches: int):
    """Returns the key of the i-th part of a batch; None, which keeps dropout off, stays None."""
    return key if key is None or micro_batches == 1 else jax.random.fold_in(key, i)


def train_step(objective: Objective, optimizer: Optimizer, loss_and_grads, state, batch):
    """Returns the next state and the step's metrics. Sums over micro-batches are divided once, by all targets.

    `loss_and_grads(params, batch, key)` is `accumulated`'s, or a pipeline's.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step) if objective.dropout else None
    (loss, n), grads = loss_and_grads(state.params, batch, key)
    n = jnp.maximum(n, 1.0)  # a batch without targets moves nothing
    loss, grads = jax.tree.map(lambda x: x / n, (loss, grads))
    updates, opt_state = optimizer.tx.update(grads, state.opt_state, state.params, value=loss)
    metrics = {
        "loss": loss, "grad_norm": optax.tree.norm(grads), "lr": optimizer.rate(state.step, opt_state), "targets": n,
        "finite_params": finite_leaves(state.params), "finite_grads": finite_leaves(grads),
    }
    params = optax.apply_updates(state.params, updates)
    return type(state)(state.step + 1, params, opt_state, state.rng), metrics


def split(micro_batches: int, x_BT):
    """Returns [micro_batches, B / micro_batches, T]; strided, so that each part keeps rows of every data shard."""
    return x_BT.reshape(-1, micro_batches, *x_BT.shape[1:]).swapaxes(0, 1)


def eval_step(objective: Objective, params, batch):
    """Returns the summed cross-entropy of a batch in nats, without z-loss or smoothing, and its number of targets."""
    plain = objective._replace(z_loss=0.0, label_smoothing=0.0, dropout=0.0)
    return loss_sum(plain, params, batch)
