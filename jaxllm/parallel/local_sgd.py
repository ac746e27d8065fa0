"""Data parallelism that synchronises rarely: groups train alone for some steps, then an outer step brings them together.

A group is one place of the mesh's `data` axis, with parameters and moments of its own; arrays of all groups are stacked in
front, G. Every `inner_steps` steps the outer optimizer moves the shared parameters against (shared - mean over groups):
plain averaging is local SGD (Stich 2019), Nesterov momentum is DiLoCo (Douillard et al. 2023).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"


class Groups(NamedTuple):
    """What a run keeps besides the shared parameters."""

    params_G: Any
    opt_state_G: Any
    outer: optax.OptState


def outer_optimizer(sync: str, lr: float, momentum: float) -> optax.GradientTransformation:
    """Returns what moves the shared parameters: to the groups' mean, or with Nesterov momentum beyond it."""
    return optax.sgd(1.0) if sync == "local_sgd" else optax.sgd(lr, momentum, nesterov=True)


def begin(params, opt_state, outer: optax.GradientTransformation, n_groups: int) -> Groups:
    """Returns n equal groups."""
    def stack(x):
        return jnp.broadcast_to(x[None], (n_groups, *x.shape))

    return Groups(jax.tree.map(stack, params), jax.tree.map(stack, opt_state), outer.init(params))


def place(params, opt_state, outer, n_groups: int, mesh: Mesh) -> Groups:
    """Returns the placement of groups, from that of one: each lives on its own place of the axis."""
    axis = AXIS if n_groups % mesh.shape[AXIS] == 0 else None  # looked at on another mesh, all are everywhere

    def stacked(sharding):
        return NamedSharding(mesh, PartitionSpec(axis, *sharding.spec))

    return Groups(jax.tree.map(stacked, params), jax.tree.map(stacked, opt_state), outer)


def group_step(inner: Callable, outer: optax.GradientTransformation, inner_steps: int, mesh: Mesh, state, batch):
    """Returns the next state and metrics: every group's own step, and the outer step where it is due.

    `inner(state, batch) -> (state, metrics)` is a training step; loss and targets are those of all groups together.
    """
    groups, kind = state.opt_state, type(state)

    def of_group(step, rng, params_1, opt_state_1, batch):
        own_rng = jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(rng), jax.lax.axis_index(AXIS)))
        params, opt_state = jax.tree.map(lambda x: x[0], (params_1, opt_state_1))
        after, metrics = inner(kind(step, params, opt_state, own_rng), batch)
        return *jax.tree.map(lambda x: x[None], (after.params, after.opt_state)), _of_all(metrics)

    alone, everywhere = PartitionSpec(AXIS), PartitionSpec()
    params_G, opt_state_G, metrics = jax.shard_map(
        of_group, mesh=mesh, axis_names={AXIS}, in_specs=(everywhere, everywhere, alone, alone, alone),
        out_specs=(alone, alone, everywhere), check_vma=False,
    )(state.step, state.rng, groups.params_G, groups.opt_state_G, batch)

    def together(params, params_G, outer_state):
        towards = jax.tree.map(lambda shared, x_G: shared - jnp.mean(x_G, axis=0), params, params_G)
        updates, outer_state = outer.update(towards, outer_state, params)
        params = optax.apply_updates(params, updates)
        return params, jax.tree.map(lambda x, x_G: jnp.broadcast_to(x[None], x_G.shape), params, params_G), outer_state

    due = (state.step + 1) % inner_steps == 0
    params, params_G, outer_state = jax.lax.cond(due, together, lambda *same: same, state.params, params_G, groups.outer)
    return kind(state.step + 1, params, Groups(params_G, opt_state_G, outer_state), state.rng), metrics


def _of_all(metrics: dict) -> dict:
    """Returns one group's metrics as those of all: losses by their targets, norms as means, flags where all agree."""
    n = metrics["targets"]
    total = jax.lax.psum(n, AXIS)
    return metrics | {
        "loss": jax.lax.psum(metrics["loss"] * n, AXIS) / total, "targets": total,
        "grad_norm": jax.lax.pmean(metrics["grad_norm"], AXIS),
        **{name: jax.lax.pmin(metrics[name].astype(jnp.int32), AXIS) > 0 for name in ("finite_params", "finite_grads")},
    }


def bytes_per_token(n_params: int, n_groups: int, tokens: int, inner_steps: int) -> float:
    """Returns the bytes that each group sends for a token of the whole batch, in float32.

    A ring all-reduce sends 2 (G - 1) / G of an array (Patarasu and Yuan 2009), once every `inner_steps` steps.
    """
    return 4 * n_params * 2 * (n_groups - 1) / n_groups / (tokens * inner_steps)
