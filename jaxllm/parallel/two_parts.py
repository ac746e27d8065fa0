"""A layer's backward in two parts, neither of which repeats the other's work: the gradient of its input, which the stage
before waits for, and the gradients of its weights, which nobody waits for.

Automatic differentiation gives one list of operations for both. What the input's gradient needs is the first part. What is
left are the matmuls that give the gradients of the weights: their operands, made in the first part, are kept for the second.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

MATMULS = ("dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated")
CALLS = ("pjit", "jit", "closed_call", "core_call", "checkpoint", "remat2")
# Where they keep the size: the same numbers in another shape.
MOVES = ("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "unstack", "slice")


class TwoParts(NamedTuple):
    """`layer(blocks, x, *rest) -> (y, extra, counted)` cut in two; `kept` and `operands` are lists of arrays."""

    forward: Callable  # (blocks, x, *rest) -> (y, extra, counted, kept for the backward)
    by_input: Callable  # (blocks, kept, *rest, d_y) -> (d_x, operands, gradients of those leaves of blocks that come early)
    by_weights: Callable  # (blocks, operands, *rest) -> gradients of the other leaves
    early: list[bool]  # for each leaf of blocks: its gradient comes with the first part
    operands: list[jax.ShapeDtypeStruct]


def two_parts(layer: Callable, blocks: Any, x: Any, *rest: Any) -> TwoParts:
    """Returns the parts of a layer for arguments of these shapes. `extra` is a summed loss: its gradient is 1; of
    `counted` none is taken."""
    box = {}

    def forward(blocks, x, *rest):
        def of_gradients(blocks, x):
            y, extra, counted = layer(blocks, x, *rest)
            return (y, extra), counted

        out, pull, counted = jax.vjp(of_gradients, blocks, x, has_aux=True)
        saved, box["pull"] = jax.tree.flatten(pull)
        counts, box["counted"] = jax.tree.flatten(counted)
        box["out"] = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), out)
        return *out, counts, saved

    first = _flat(jax.make_jaxpr(forward)(blocks, x, *rest))
    n_blocks, n_x = len(jax.tree.leaves(blocks)), len(jax.tree.leaves(x))
    n_counts = box["counted"].num_leaves
    ins, outs = first.jaxpr.invars, first.jaxpr.outvars[2 + n_counts :]
    args = [*ins[:n_blocks], *ins[n_blocks + n_x :]]
    # Weights and the micro-batch's inputs are at hand later, by whatever name differentiation keeps them: not kept again.
    kept, renamed = _rooted(first.jaxpr.eqns, outs, {*args, *first.jaxpr.constvars})

    def backward(args_and_kept, d_y):
        env = dict(zip([*args, *kept, *first.jaxpr.constvars], [*args_and_kept, *first.consts], strict=True))
        pull = jax.tree.unflatten(box["pull"], evaluate(renamed, env, outs))
        d_blocks, d_x = pull((d_y, jnp.ones((), box["out"][1].dtype)))
        return d_x, *jax.tree.leaves(d_blocks)

    flat = _flat(jax.make_jaxpr(backward)([_shape(v) for v in (*args, *kept)], box["out"][0]))
    cut = _cut(flat.jaxpr, len(args))

    def run_forward(blocks, x, *rest):
        y, extra, *found = evaluate(first.jaxpr.eqns, _env(first, jax.tree.leaves((blocks, x, rest))),
                                    [*first.jaxpr.outvars[: 2 + n_counts], *kept])
        return y, extra, jax.tree.unflatten(box["counted"], found[:n_counts]), found[n_counts:]

    def run_input(blocks, kept, *rest_and_d_y):
        *rest, d_y = rest_and_d_y
        env = _env(flat, [*jax.tree.leaves((blocks, tuple(rest))), *kept, d_y])
        wanted = [flat.jaxpr.outvars[0], *cut.operands, *cut.early]
        d_x, *found = evaluate(cut.by_input, env, wanted)
        return d_x, found[: len(cut.operands)], found[len(cut.operands) :]

    def run_weights(blocks, operands, *rest):
        env = dict(zip(flat.jaxpr.constvars, flat.consts, strict=True))
        env |= dict(zip(flat.jaxpr.invars, jax.tree.leaves((blocks, rest)), strict=False))
        env |= dict(zip(cut.operands, operands, strict=True))
        return evaluate(cut.by_weights, env, cut.late)

    return TwoParts(run_forward, run_input, run_weights, cut.is_early, [_shape(v) for v in cut.operands])


class _Cut(NamedTuple):
    by_input: list  # equations
    by_weights: list
    operands: list  # variables that the second list reads and the first makes
    early: list  # variables: gradients that the first list makes
    late: list
    is_early: list[bool]


def _cut(jaxpr, n_args: int) -> _Cut:
    """Cuts the equations of a backward, whose first output is the input's gradient and whose others are the weights'."""
    d_x, *d_blocks = jaxpr.outvars
    first = _needed(jaxpr.eqns, [d_x])
    late = set()  # variables that hang on a matmul which only the weights' gradients need
    for k, eqn in enumerate(jaxpr.eqns):
        if k not in first and (eqn.primitive.name in MATMULS or late.intersection(_reads(eqn))):
            late.update(eqn.outvars)
    is_early = [isinstance(v, Literal) or v not in late for v in d_blocks]
    second = _needed(jaxpr.eqns, [v for v, early in zip(d_blocks, is_early, strict=True) if not early]) - first
    second_eqns = [e for k, e in enumerate(jaxpr.eqns) if k in second and late.intersection(e.outvars)]
    made, given = {v for e in second_eqns for v in e.outvars}, {*jaxpr.constvars, *jaxpr.invars[:n_args]}
    operands, moves = _rooted(jaxpr.eqns, [v for e in second_eqns for v in _reads(e) if v not in made], given)
    early = [v for v, own in zip(d_blocks, is_early, strict=True) if own]
    first = _needed(jaxpr.eqns, [d_x, *operands, *early])
    return _Cut([e for k, e in enumerate(jaxpr.eqns) if k in first], moves + second_eqns, operands, early,
                [v for v, own in zip(d_blocks, is_early, strict=True) if not own], is_early)


def _rooted(eqns: Sequence, wanted: Sequence, given: set) -> tuple[list, list]:
    """Returns (variables, equations): what `wanted` are but other shapes of, unless that is given, and how they follow."""
    maker = {v: k for k, e in enumerate(eqns) for v in e.outvars}
    roots, moves = {}, set()
    for v in (v for v in wanted if not isinstance(v, Literal)):
        while v not in given and v in maker and _is_move(eqns[maker[v]]):
            moves.add(maker[v])
            v = eqns[maker[v]].invars[0]
        if v not in given:
            roots[v] = None
    return list(roots), [eqns[k] for k in sorted(moves)]


def _is_move(eqn) -> bool:
    of = eqn.invars[0] if eqn.invars else None
    return eqn.primitive.name in MOVES and not isinstance(of, Literal) and of.aval.size == eqn.outvars[0].aval.size


def _shape(v):
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)


def _reads(eqn) -> list:
    return [v for v in eqn.invars if not isinstance(v, Literal)]


def _needed(eqns: Sequence, wanted: Sequence) -> set[int]:
    """Returns which equations lead to these variables."""
    wanted, found = {v for v in wanted if not isinstance(v, Literal)}, set()
    for k in reversed(range(len(eqns))):
        if wanted.intersection(eqns[k].outvars):
            found.add(k)
            wanted.update(_reads(eqns[k]))
    return found


def _env(closed, args) -> dict:
    return dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*closed.consts, *args], strict=True))


def _flat(closed):
    """Returns the same program with calls and loops of one round opened, so that what they hold can be told apart."""
    run = lambda *args: evaluate(closed.jaxpr.eqns, _env(closed, args), closed.jaxpr.outvars, inline=True)  # noqa: E731
    return jax.make_jaxpr(run)(*map(_shape, closed.jaxpr.invars))


def evaluate(eqns: Sequence, env: dict, wanted: Sequence, *, inline: bool = False) -> list:
    """Returns variables after these equations; `inline` opens calls and loops of one round."""

    def read(v):
        return v.val if isinstance(v, Literal) else env[v]

    for eqn in eqns:
        values = [read(v) for v in eqn.invars]
        opened = _opened(eqn) if inline else None
        if opened is not None:
            inner, squeezed, stacked = opened
            values = [jax.lax.squeeze(a, [0]) if k >= squeezed else a for k, a in enumerate(values)]
            out = evaluate(inner.jaxpr.eqns, _env(inner, values), inner.jaxpr.outvars, inline=True)
            out = [jax.lax.expand_dims(a, [0]) if k >= stacked else a for k, a in enumerate(out)]
        else:
            bound = eqn.primitive.get_bind_params(eqn.params)
            subfuns, params = bound if isinstance(bound, tuple) else ((), bound)  # jax 0.7 gives a pair
            with eqn.ctx.manager if eqn.ctx is not None else contextlib.nullcontext():
                out = eqn.primitive.bind(*subfuns, *values, **params)
            out = out if eqn.primitive.multiple_results else [out]
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in wanted]


def _opened(eqn):
    """Returns (program, first argument and first result that have an axis of rounds) of what can be opened, else None."""
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        inner = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
        return (inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())), len(eqn.invars), len(eqn.outvars)
    if name == "scan" and params["length"] == 1:  # what has an axis of rounds comes last; jax 0.12 no longer says how many
        inner = params["jaxpr"]
        return inner, _alike(eqn.invars, inner.in_avals), _alike(eqn.outvars, inner.out_avals)
    return None


def _alike(outer, inner) -> int:
    """Returns how many variables, from the first on, have as many axes outside of a loop as in it."""
    return sum(v.aval.ndim == aval.ndim for v, aval in zip(outer, inner, strict=True))
