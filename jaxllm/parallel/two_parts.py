"""A layer's backward in two parts, neither of which repeats the other's work: the gradient of its input, which the stage
before waits for, and the gradients of its weights, which nobody waits for.

Automatic differentiation gives one list of operations for both. What the input's gradient needs is the first part. What is
left are the matmuls that give the gradients of the weights: their operands, made in the first part, are kept for the second.

Where a mesh splits the weights, a matmul is a `shard_map` with its collectives (`jaxllm/model/split.py`), and its derivative
one that gives both gradients. Such a one is cut by the same rule into two: what both need, as the sum over `tensor` of a
gradient, is computed in the first alone and handed on; a weight's gradient is summed over the devices in the second.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal
from jax.sharding import PartitionSpec

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
    places: list[PartitionSpec | None]  # of operands: how the second part takes them, where that is written out


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
    flat = _parted(flat)
    given, (d_x, *d_blocks) = {*flat.jaxpr.constvars, *flat.jaxpr.invars[: len(args)]}, flat.jaxpr.outvars
    cut = _cut(flat.jaxpr.eqns, given, [d_x], d_blocks)

    def run_forward(blocks, x, *rest):
        y, extra, *found = evaluate(first.jaxpr.eqns, _env(first, jax.tree.leaves((blocks, x, rest))),
                                    [*first.jaxpr.outvars[: 2 + n_counts], *kept])
        return y, extra, jax.tree.unflatten(box["counted"], found[:n_counts]), found[n_counts:]

    def run_input(blocks, kept, *rest_and_d_y):
        *rest, d_y = rest_and_d_y
        env = _env(flat, [*jax.tree.leaves((blocks, tuple(rest))), *kept, d_y])
        wanted = [d_x, *cut.operands, *cut.early]
        dx, *found = evaluate(cut.by_input, env, wanted)
        return dx, found[: len(cut.operands)], found[len(cut.operands) :]

    def run_weights(blocks, operands, *rest):
        env = dict(zip(flat.jaxpr.constvars, flat.consts, strict=True))
        env |= dict(zip(flat.jaxpr.invars, jax.tree.leaves((blocks, rest)), strict=False))
        env |= dict(zip(cut.operands, operands, strict=True))
        return evaluate(cut.by_weights, env, cut.late)

    return TwoParts(run_forward, run_input, run_weights, cut.is_early, [_shape(v) for v in cut.operands],
                    [_placed(v, cut.by_weights) for v in cut.operands])


class _Cut(NamedTuple):
    by_input: list  # equations
    by_weights: list
    operands: list  # variables that the second list reads and the first makes
    early: list  # variables: gradients that the first list makes
    late: list
    is_early: list[bool]


def _cut(eqns: Sequence, given: set, by_input: Sequence, by_weights: Sequence) -> _Cut:
    """Cuts the equations of a backward, by the variables that hold the input's gradient and those that hold the weights'."""
    first = _needed(eqns, by_input)
    late = set()  # variables that hang on a matmul which only the weights' gradients need
    for k, eqn in enumerate(eqns):
        if k not in first and (_multiplies(eqn) or late.intersection(_reads(eqn))):
            late.update(eqn.outvars)
    is_early = [isinstance(v, Literal) or v not in late for v in by_weights]
    early = [v for v, own in zip(by_weights, is_early, strict=True) if own]
    out = [v for v, own in zip(by_weights, is_early, strict=True) if not own]
    second = _needed(eqns, out) - first
    second_eqns = [e for k, e in enumerate(eqns) if k in second and late.intersection(e.outvars)]
    made = {v for e in second_eqns for v in e.outvars}
    operands, moves = _rooted(eqns, [v for e in second_eqns for v in _reads(e) if v not in made], given)
    first = _needed(eqns, [*by_input, *operands, *early])
    return _Cut([e for k, e in enumerate(eqns) if k in first], moves + second_eqns, operands, early, out, is_early)


def _multiplies(eqn) -> bool:
    if eqn.primitive.name == "shard_map":
        return any(map(_multiplies, eqn.params["jaxpr"].eqns))
    return eqn.primitive.name in MATMULS


def _parted(closed):
    """Returns the same program with two shard_maps for each one that has outputs which the first output, the gradient of the
    input, does not need."""
    wanted, halves = {closed.jaxpr.outvars[0]}, {}
    for k, eqn in reversed(list(enumerate(closed.jaxpr.eqns))):
        needed = [v in wanted for v in eqn.outvars]
        reads = _reads(eqn) if any(needed) else []
        if eqn.primitive.name == "shard_map" and any(needed) and not all(needed):
            inner = eqn.params["jaxpr"]
            outs = [[v for v, own in zip(inner.outvars, needed, strict=True) if own is kind] for kind in (True, False)]
            cut = _cut(inner.eqns, {*inner.invars, *inner.constvars}, *outs)
            if cut.late:
                is_early = iter(cut.is_early)
                halves[k] = _Halves(cut, [own or next(is_early) for own in needed])
                taken = _taken(cut.by_input, outs[0] + cut.early)
                reads = [v for v, inside in zip(eqn.invars, inner.invars, strict=True) if inside in taken and v in reads]
        wanted.update(reads)

    def run(*args):
        return evaluate(closed.jaxpr.eqns, _env(closed, args), closed.jaxpr.outvars, halves=halves)

    return jax.make_jaxpr(run)(*map(_shape, closed.jaxpr.invars))


class _Halves(NamedTuple):
    cut: _Cut  # of what a shard_map holds
    in_first: list[bool]  # for each of its outputs

    def outputs(self, eqn, values: Sequence) -> list:
        """Returns what the equation returns, from two shard_maps: the first hands the second what is no argument."""
        inner, params, handed = eqn.params["jaxpr"], eqn.params, self.cut.operands
        # Each device's own, side by side along the first axis.
        own = PartitionSpec(tuple(a for a in params["mesh"].axis_names if a in _axes(params)))
        specs = dict(zip(inner.invars, params["in_specs"], strict=True)) | dict.fromkeys(handed, own)
        env, found = dict(zip(inner.invars, values, strict=True)), {}
        for eqns, is_first in ((self.cut.by_input, True), (self.cut.by_weights, False)):
            places = [k for k, first in enumerate(self.in_first) if first is is_first]
            outs = [inner.outvars[k] for k in places] + handed * is_first
            ins = _taken(eqns, outs)

            def local(*args, eqns=eqns, outs=outs, ins=ins):
                args = [a[0] if a.ndim > v.aval.ndim else a for a, v in zip(args, ins, strict=True)]
                return [a if k < len(places) or a.ndim else a[None]  # noqa: B023 (called at once)
                        for k, a in enumerate(evaluate(eqns, dict(zip(ins, args, strict=True)), outs))]

            out_specs = [params["out_specs"][k] for k in places] + [own] * (len(outs) - len(places))
            both = jax.shard_map(local, in_specs=tuple(specs[v] for v in ins), out_specs=out_specs, axis_names=_axes(params),
                                 check_vma=params["check_vma"])(*(env[v] for v in ins))
            found |= dict(zip(places, both, strict=False))
            env |= dict(zip(outs[len(places):], both[len(places):], strict=True))
        return [found[k] for k in range(len(inner.outvars))]


def _axes(params: dict) -> frozenset:
    """Returns the mesh axes that a shard_map runs over."""
    return params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]  # jax 0.7


def _taken(eqns: Sequence, outs: Sequence) -> list:
    """Returns the variables that these equations, with these outputs, need from elsewhere."""
    made = {v for e in eqns for v in e.outvars}
    reads = [v for e in eqns for v in _reads(e)] + [v for v in outs if not isinstance(v, Literal)]
    return list(dict.fromkeys(v for v in reads if v not in made))


def _placed(v, eqns: Sequence) -> PartitionSpec | None:
    """Returns how a shard_map takes this variable, None where none does."""
    for eqn in eqns:
        if eqn.primitive.name == "shard_map" and v in _reads(eqn):
            return eqn.params["in_specs"][list(eqn.invars).index(v)]
    return None


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


def evaluate(eqns: Sequence, env: dict, wanted: Sequence, *, inline: bool = False, halves: dict | None = None) -> list:
    """Returns variables after these equations; `inline` opens calls and loops of one round, `halves` has, by their places,
    those that become two."""

    def read(v):
        return v.val if isinstance(v, Literal) else env[v]

    for place, eqn in enumerate(eqns):
        values = [read(v) for v in eqn.invars]
        opened = _opened(eqn) if inline else None
        if opened is not None:
            inner, squeezed, stacked = opened
            values = [jax.lax.squeeze(a, [0]) if k >= squeezed else a for k, a in enumerate(values)]
            out = evaluate(inner.jaxpr.eqns, _env(inner, values), inner.jaxpr.outvars, inline=True)
            out = [jax.lax.expand_dims(a, [0]) if k >= stacked else a for k, a in enumerate(out)]
        elif halves and place in halves:
            out = halves[place].outputs(eqn, values)
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
