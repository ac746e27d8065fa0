"""The program of a verb that tunes by batches: any loss, over whole weights or adapters beside frozen ones.

`loss(params, frozen, batch, key) -> (summed loss, (count, told))`, with `told` a dict of (sum, count) that are logged as means;
of a model with sparse layers also what `of_routers` returns: it is logged, and moves their biases, as in pretraining.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import optax

from jaxllm.hardware import chip
from jaxllm.partition import replicated
from jaxllm.train.optim import Optimizer, finite_leaves
from jaxllm.train.state import Program, TrainState, begun, check_batch, place
from jaxllm.train.step import in_parts, router_metrics, with_balanced_biases


def program(graph, params, loss, optimizer: Optimizer, mesh, cfg, *, seed: int, frozen=None, keyed: bool = False,
            held_out=None, bias_rate: float = 0.0) -> Program:
    """Returns the program of tuning `params` (placed arrays, which stay as they are) on a mesh; nothing is compiled yet.

    `cfg`: batch_size and micro_batches; `keyed`: the loss takes a key (noise, dropout); `held_out`: the loss of evaluations,
    None: the same; `bias_rate`: model.moe's.
    """
    check_batch(cfg, mesh)
    start = partial(_begun, optimizer)
    abstract = jax.eval_shape(start, params, jnp.uint32(0))
    placed = place(abstract, mesh, zero1=optimizer.zero1)
    everywhere = replicated(mesh)
    known = chip(mesh.devices.flat[0].device_kind)
    step = jax.jit(partial(tuning_step, loss, optimizer, cfg.micro_batches, keyed, bias_rate), donate_argnums=0,
                   out_shardings=(placed, everywhere), compiler_options=known.xla if known else None)
    evaluate = jax.jit(lambda params, frozen, batch: (held_out or loss)(params, frozen, batch, None), out_shardings=everywhere)
    return Program(
        mesh=mesh, graph=graph,
        train_step=lambda state, batch: step(state, frozen, batch),
        eval_step=lambda params, batch: evaluate(params, frozen, batch),
        init=lambda: jax.jit(start, out_shardings=placed)(params, jnp.uint32(seed)),
        abstract=jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, placed),
    )


def of_routers(routed_L) -> dict:
    """Returns what a loss tells of the routers of sparse layers (model/moe.Routed, stacked); {} without any."""
    return {} if routed_L is None else {"routed": routed_L}


def _begun(optimizer, params, seed):
    return begun(jax.tree.map(jnp.copy, params), optimizer, seed)  # copies: steps take their state's memory


def tuning_step(loss, optimizer: Optimizer, micro_batches: int, keyed: bool, bias_rate: float, state: TrainState, frozen,
                batch):
    """Returns the next state and the step's metrics. Sums over micro-batches are divided once, by the whole count."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step) if keyed else None

    def of_batch(params, batch, key):
        return loss(params, frozen, batch, key)

    (total, (n, told)), grads = in_parts(of_batch, micro_batches, state.params, batch, key)
    n = jnp.maximum(n, 1.0)  # a batch without targets moves nothing
    total, grads = jax.tree.map(lambda x: x / n, (total, grads))
    told = dict(told or {})
    routed_L = told.pop("routed", None)
    told = {name: s / jnp.maximum(count, 1.0) for name, (s, count) in told.items()}
    updates, opt_state = optimizer.tx.update(grads, state.opt_state, state.params, value=total)
    metrics = {
        "loss": total, "grad_norm": optax.tree.norm(grads), "lr": optimizer.rate(state.step, opt_state), "targets": n,
        "finite_params": finite_leaves(state.params), "finite_grads": finite_leaves(grads), **told,
    }
    params = optax.apply_updates(state.params, updates)
    if routed_L is not None:
        metrics |= router_metrics(routed_L)
        params = with_balanced_biases(bias_rate, params, state.params, routed_L.chosen_E)  # adapters have none
    return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), metrics
