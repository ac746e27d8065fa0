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
from jaxllm.parallel.two_parts import TwoParts, two_parts
from jaxllm.partition import constrain, free_axes, place


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
    branches, waiting = _branches(parts, shared, blank_BTD), []
    if schedule.split_backward:
        first, n = partial(jax.tree.map, lambda a: a[0, :1]), jax.tree.leaves(blocks)[0].shape[1]
        layer = two_parts(parts.body, first(blocks), blank_BTD, jax.tree.map(lambda a: a[0], inputs),
                          jax.tree.map(lambda a: a[0, 0, :1], layered))
        places = [by and _spread(by, a.shape) for a, by in zip(layer.operands, layer.places, strict=True)]
        branches[2:] = _split_branches(parts, layer, places, shared, blank_BTD)
        waiting = [jnp.zeros((table.w_slots, n, *a.shape), a.dtype) for a in layer.operands]
        waiting = [_placed(a, by and PartitionSpec(None, None, *by)) for a, by in zip(waiting, places, strict=True)]

    def tick(carry, row):
        x_arrived, g_arrived, xs, gs, waiting, sums = carry
        row = jax.tree.map(lambda column: column[0], row)
        xs, gs = xs.at[row["x_arrives"]].set(x_arrived), gs.at[row["g_arrives"]].set(g_arrived)
        i, c = row["micro"], row["chunk"]
        own = (row, jax.tree.map(lambda a: a[c], blocks), jax.tree.map(lambda a: a[i], inputs),
               jax.tree.map(lambda a: a[i, c], layered), xs[row["x"]], gs[row["g"]], [a[row["w"]] for a in waiting])
        y_BTD, dx_BTD, operands, sums = jax.lax.switch(row["op"], branches, own, sums)
        # Not in a branch: of what a conditional changes in part, XLA for TPU copies the whole.
        waiting = [a.at[row["w"]].set(b) for a, b in zip(waiting, operands, strict=True)]
        x_arrived, g_arrived = jax.lax.ppermute(y_BTD, "stage", downstream), jax.lax.ppermute(dx_BTD, "stage", upstream)
        return (x_arrived, g_arrived, xs, gs, waiting, sums), None

    def slots(n):
        return constrain(jnp.zeros((n + 1, *blank_BTD.shape), blank_BTD.dtype), None, "batch", "seq", "act")

    one = jax.tree.map(lambda a: a[0], (blocks, inputs, layered))
    counted = jax.eval_shape(parts.body, one[0], blank_BTD, one[1], jax.tree.map(lambda a: a[0], one[2]))[2]
    counted = jax.tree.map(lambda a: jnp.zeros((schedule.virtual_stages, *a.shape), jnp.float32), counted)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (shared, blocks))
    start = (blank_BTD, blank_BTD, slots(table.x_slots), slots(table.g_slots), waiting,
             (jnp.zeros((), jnp.float32), *zeros, counted))
    (*_, (loss, d_shared, *by_layer)), _ = jax.lax.scan(tick, start, columns)
    loss, d_shared = jax.lax.psum((loss, d_shared), "stage")
    return loss, d_shared, *jax.tree.map(lambda a: a[:, None], by_layer)


def _branches(parts, shared, blank_BTD):
    """Returns what a table's codes mean, each (own, sums) -> (x_BTD for the next stage, its gradient for the one before, what
    its weight part waits for, sums).

    `sums` are the loss, the gradients of `shared` and of this stage's chunks and what its layers counted, so far.
    """

    def idle(own, sums):
        return blank_BTD, blank_BTD, own[-1], sums

    def forward(own, sums):
        row, blocks, inputs, layered, x_BTD, _, operands = own
        y_BTD, *_ = parts.body(blocks, _enter(parts, shared, row, inputs, x_BTD), inputs, layered)
        return _place(y_BTD), blank_BTD, operands, sums

    def backward(own, sums):
        row, blocks, inputs, layered, x_BTD, g_BTD, operands = own
        loss, d_shared, d_blocks, counted = sums
        x_BTD = _enter(parts, shared, row, inputs, x_BTD)

        def body(blocks, x_BTD):
            y_BTD, extra, counted = parts.body(blocks, x_BTD, inputs, layered)
            return (y_BTD, extra), counted

        (y_BTD, extra), pull, own_counts = jax.vjp(body, blocks, x_BTD, has_aux=True)
        g_BTD, loss, d_shared = _output_gradient(parts, shared, row, inputs, y_BTD, g_BTD, loss + extra, d_shared)
        d_own, dx_BTD = pull((g_BTD, jnp.ones_like(extra)))
        d_shared = _embed_gradient(parts, shared, row, inputs, dx_BTD, d_shared)
        d_blocks, counted = _add_at(row["chunk"], d_blocks, d_own), _add_at(row["chunk"], counted, own_counts)
        return blank_BTD, _place(dx_BTD), operands, (loss, d_shared, d_blocks, counted)

    return [idle, forward, backward]


def _split_branches(parts: Parts, layer: TwoParts, places: list, shared, blank_BTD):
    """Returns the two parts of a backward, layer by layer: the first gives in `operands` [layer, …], placed by `places`, what
    the second multiplies."""

    def add(where, d_blocks, ones, early):  # to those gradients that come in this part
        leaves, structure = jax.tree.flatten(d_blocks)
        ones = iter(ones)
        leaves = [a.at[where].add(next(ones)[0].astype(a.dtype)) if own is early else a
                  for a, own in zip(leaves, layer.early, strict=True)]
        return jax.tree.unflatten(structure, leaves)

    def one(tree):  # a layer's slice as layers in a row
        return jax.tree.map(lambda a: a[None], tree)

    def by_input(own, sums):
        row, blocks, inputs, layered, x_BTD, g_BTD, _ = own
        loss, d_shared, d_blocks, counted = sums

        def up(carry, xs):
            x_BTD, loss = carry
            x_BTD, extra, own_counts, kept = layer.forward(one(xs[0]), x_BTD, inputs, one(xs[1]))
            return (_place(x_BTD), loss + extra), (jax.tree.map(lambda a: a[0], own_counts), kept)

        def down(carry, xs):
            g_BTD, d_blocks = carry
            i, blocks, layered, kept = xs
            g_BTD, operands, d_early = layer.by_input(one(blocks), kept, inputs, one(layered), g_BTD)
            operands = list(map(_placed, operands, places))
            return (_place(g_BTD), add((row["chunk"], i), d_blocks, d_early, True)), operands

        start = _enter(parts, shared, row, inputs, x_BTD), loss
        (y_BTD, loss), (own_counts, kept) = jax.lax.scan(up, start, (blocks, layered))
        counted = _add_at(row["chunk"], counted, own_counts)
        g_BTD, loss, d_shared = _output_gradient(parts, shared, row, inputs, y_BTD, g_BTD, loss, d_shared)
        n = jnp.arange(jax.tree.leaves(blocks)[0].shape[0])
        (dx_BTD, d_blocks), operands = jax.lax.scan(down, (g_BTD, d_blocks), (n, blocks, layered, kept), reverse=True)
        d_shared = _embed_gradient(parts, shared, row, inputs, dx_BTD, d_shared)
        return blank_BTD, dx_BTD, operands, (loss, d_shared, d_blocks, counted)

    def by_weights(own, sums):
        row, blocks, inputs, layered, _, _, operands = own
        loss, d_shared, d_blocks, counted = sums

        def each(d_blocks, xs):
            i, blocks, layered, now = xs
            d_late = layer.by_weights(one(blocks), now, inputs, one(layered))
            return add((row["chunk"], i), d_blocks, d_late, False), None

        n = jnp.arange(jax.tree.leaves(blocks)[0].shape[0])
        d_blocks, _ = jax.lax.scan(each, d_blocks, (n, blocks, layered, operands))
        return blank_BTD, blank_BTD, operands, (loss, d_shared, d_blocks, counted)

    return [by_input, by_weights]


def _spread(by: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
    """Returns the placement of what waits: as a layer hands it on, and what all devices of an axis hold alike split over it,
    by the first dimension of which it can be."""
    entries = [*by] + [None] * (len(shape) - len(by))
    used = {a for e in entries if e is not None for a in ((e,) if isinstance(e, str) else e)}
    for axis, size in free_axes().items():
        whole = [k for k, e in enumerate(entries) if e is None and shape[k] % size == 0]
        if axis not in used and whole:
            entries[whole[0]] = axis
    return PartitionSpec(*entries)


def _placed(a, by: PartitionSpec | None):
    return a if by is None else place(a, by)


def _enter(parts, shared, row, inputs, x_BTD):
    """Returns a piece's input: the model's first starts from tokens."""
    return jax.lax.cond(row["first"], lambda: _place(parts.embed(shared, inputs)), lambda: x_BTD)


def _output_gradient(parts, shared, row, inputs, y_BTD, g_BTD, loss, d_shared):
    """Returns the gradient that a piece's backward starts from, what the next one sent or the head's, and the sums."""

    def of_loss():
        one, (d_own, g_BTD) = jax.value_and_grad(parts.loss, argnums=(0, 1))(shared, y_BTD, inputs)
        return _place(g_BTD), loss + one, _add(d_shared, d_own)

    return jax.lax.cond(row["last"], of_loss, lambda: (g_BTD, loss, d_shared))


def _embed_gradient(parts, shared, row, inputs, dx_BTD, d_shared):
    def of_embed():
        return _add(d_shared, jax.vjp(lambda shared: parts.embed(shared, inputs), shared)[1](dx_BTD)[0])

    return jax.lax.cond(row["first"], of_embed, lambda: d_shared)


def _place(x_BTD):
    return constrain(x_BTD, "batch", "seq", "act")


def _add(total, one):
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, one)


def _add_at(chunk, total, one):
    return jax.tree.map(lambda a, b: a.at[chunk].add(b.astype(a.dtype)), total, one)
