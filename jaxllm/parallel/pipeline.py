"""Runs any pipeline table: one program for all stages, which reads off the table what to do at each tick.

`jax.shard_map` is manual over the mesh's `stage` axis alone; the other axes stay automatic inside. m micro-batches,
p stages, v chunks a stage, L layers, B batch, T position, D width.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxllm.parallel.schedule import Schedule
from jaxllm.parallel.table import lower
from jaxllm.partition import constrain


class Parts(NamedTuple):
    """A model in three parts. `shared` holds the parameters outside of layers, `blocks` those of some layers in a row,
    `inputs` what a micro-batch holds, `layered` what it holds for each of those layers."""

    embed: Callable  # (shared, inputs) -> x_BTD
    body: Callable  # (blocks, x_BTD, inputs, layered) -> (x_BTD, addition to the loss: float32, what each layer counts: [L, …])
    loss: Callable  # (shared, x_BTD, inputs) -> summed loss, float32


def pipeline_value_and_grad(parts: Parts, schedule: Schedule, mesh: Mesh) -> Callable:
    """Returns f(shared, blocks, inputs, layered) -> (summed loss, gradient of shared, of blocks, sums of counts), all float32.

    Leaves of `blocks` are [L, …] in the model's order, of `inputs` [m, B, T], of `layered` [m, L, …].
    """
    table, v, p = lower(schedule), schedule.virtual_stages, schedule.stages
    by_stage = PartitionSpec(None, "stage")
    run = jax.shard_map(
        partial(_run_table, parts, schedule), mesh=mesh, axis_names={"stage"}, check_vma=False,
        in_specs=(by_stage, PartitionSpec(), by_stage, PartitionSpec(), PartitionSpec(None, None, "stage")),
        out_specs=(PartitionSpec(), PartitionSpec(), by_stage, by_stage))

    def cut(a, axis=0):  # [L] -> [chunk, stage, layer of the piece]
        return a.reshape(*a.shape[:axis], v, p, a.shape[axis] // (v * p), *a.shape[axis + 1 :])

    def value_and_grad(shared, blocks, inputs, layered):
        columns = jax.tree.map(jnp.asarray, table.columns)
        loss, d_shared, *by_layer = run(columns, shared, jax.tree.map(cut, blocks), inputs,
                                        jax.tree.map(partial(cut, axis=1), layered))
        return loss, d_shared, *jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), by_layer)

    return value_and_grad


def _run_table(parts, schedule, columns, shared, blocks, inputs, layered):
    """What one stage does: a scan over ticks; arrays that cross between stages move by one at the end of each."""
    blocks = jax.tree.map(lambda a: a[:, 0], blocks)  # [chunk, layer of the piece, …]
    layered = jax.tree.map(lambda a: a[:, :, 0], layered)  # [m, chunk, layer of the piece, …]
    table, p = lower(schedule), schedule.stages
    downstream, upstream = [(i, (i + 1) % p) for i in range(p)], [(i, (i - 1) % p) for i in range(p)]
    x_shape = jax.eval_shape(parts.embed, shared, jax.tree.map(lambda a: a[0], inputs))
    blank_BTD = _place(jnp.zeros(x_shape.shape, x_shape.dtype))
    branches = _branches(parts, schedule.split_backward, shared, blank_BTD)

    def tick(carry, row):
        x_arrived, g_arrived, xs, gs, sums = carry
        row = jax.tree.map(lambda column: column[0], row)
        xs, gs = xs.at[row["x_arrives"]].set(x_arrived), gs.at[row["g_arrives"]].set(g_arrived)
        i, c = row["micro"], row["chunk"]
        own = (row, jax.tree.map(lambda a: a[c], blocks), jax.tree.map(lambda a: a[i], inputs),
               jax.tree.map(lambda a: a[i, c], layered), xs[row["x"]], gs[row["g"]])
        y_BTD, dx_BTD, sums = jax.lax.switch(row["op"], branches, own, sums)
        if schedule.split_backward:
            gs = gs.at[row["g_stays"]].set(y_BTD)
        x_arrived, g_arrived = jax.lax.ppermute(y_BTD, "stage", downstream), jax.lax.ppermute(dx_BTD, "stage", upstream)
        return (x_arrived, g_arrived, xs, gs, sums), None

    def slots(n):
        return constrain(jnp.zeros((n + 1, *blank_BTD.shape), blank_BTD.dtype), None, "batch", "seq", "act")

    one = jax.tree.map(lambda a: a[0], (blocks, inputs, layered))
    counted = jax.eval_shape(parts.body, one[0], blank_BTD, one[1], jax.tree.map(lambda a: a[0], one[2]))[2]
    counted = jax.tree.map(lambda a: jnp.zeros((schedule.virtual_stages, *a.shape), jnp.float32), counted)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (shared, blocks))
    start = (blank_BTD, blank_BTD, slots(table.x_slots), slots(table.g_slots), (jnp.zeros((), jnp.float32), *zeros, counted))
    (*_, (loss, d_shared, *by_layer)), _ = jax.lax.scan(tick, start, columns)
    loss, d_shared = jax.lax.psum((loss, d_shared), "stage")
    return loss, d_shared, *jax.tree.map(lambda a: a[:, None], by_layer)


def _branches(parts, split_backward, shared, blank_BTD):
    """Returns what a table's codes mean, each (own, sums) -> (x_BTD for the next stage, its gradient for the one before, sums).

    `sums` are the loss, the gradients of `shared` and of this stage's chunks, and what its layers counted, so far.
    """

    def enter(row, inputs, x_BTD):  # the model's first piece starts from tokens
        return jax.lax.cond(row["first"], lambda: _place(parts.embed(shared, inputs)), lambda: x_BTD)

    def body(*own):
        y_BTD, extra, counted = parts.body(*own)
        return (y_BTD, extra), counted

    def idle(own, sums):
        return blank_BTD, blank_BTD, sums

    def forward(own, sums):
        row, blocks, inputs, layered, x_BTD, _ = own
        y_BTD, *_ = parts.body(blocks, enter(row, inputs, x_BTD), inputs, layered)
        return _place(y_BTD), blank_BTD, sums

    def output_gradient(row, inputs, y_BTD, extra, g_BTD, loss, d_shared):
        """Returns the gradient that a piece starts from: what the next one sent, or the head's; and the sums."""

        def of_loss():
            one, (d_own, g_BTD) = jax.value_and_grad(parts.loss, argnums=(0, 1))(shared, y_BTD, inputs)
            return _place(g_BTD), loss + one, _add(d_shared, d_own)

        g_BTD, loss, d_shared = jax.lax.cond(row["last"], of_loss, lambda: (g_BTD, loss, d_shared))
        return g_BTD, loss + extra, d_shared

    def embed_gradient(row, inputs, dx_BTD, d_shared):
        def of_embed():
            return _add(d_shared, jax.vjp(lambda shared: parts.embed(shared, inputs), shared)[1](dx_BTD)[0])

        return jax.lax.cond(row["first"], of_embed, lambda: d_shared)

    def backward(own, sums):
        row, blocks, inputs, layered, x_BTD, g_BTD = own
        loss, d_shared, d_blocks, counted = sums
        x_BTD = enter(row, inputs, x_BTD)
        if split_backward:
            (y_BTD, extra), pull, own_counts = jax.vjp(lambda x: body(blocks, x, inputs, layered), x_BTD, has_aux=True)
        else:
            (y_BTD, extra), pull, own_counts = jax.vjp(lambda b, x: body(b, x, inputs, layered), blocks, x_BTD, has_aux=True)
        g_BTD, loss, d_shared = output_gradient(row, inputs, y_BTD, extra, g_BTD, loss, d_shared)
        *d_own, dx_BTD = pull((g_BTD, jnp.ones_like(extra)))
        d_shared = embed_gradient(row, inputs, dx_BTD, d_shared)
        if d_own:
            d_blocks = _add_at(row["chunk"], d_blocks, d_own[0])
        counted = _add_at(row["chunk"], counted, own_counts)
        return g_BTD if split_backward else blank_BTD, _place(dx_BTD), (loss, d_shared, d_blocks, counted)

    def weight(own, sums):
        row, blocks, inputs, layered, x_BTD, g_BTD = own
        loss, d_shared, d_blocks, counted = sums
        x_BTD = enter(row, inputs, x_BTD)
        (_, extra), pull, _ = jax.vjp(lambda b: body(b, x_BTD, inputs, layered), blocks, has_aux=True)
        d_own = pull((g_BTD, jnp.ones_like(extra)))[0]
        return blank_BTD, blank_BTD, (loss, d_shared, _add_at(row["chunk"], d_blocks, d_own), counted)

    return [idle, forward, backward, weight] if split_backward else [idle, forward, backward]


def _place(x_BTD):
    return constrain(x_BTD, "batch", "seq", "act")


def _add(total, one):
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, one)


def _add_at(chunk, total, one):
    return jax.tree.map(lambda a, b: a.at[chunk].add(b.astype(a.dtype)), total, one)
