"""Data parallelism that synchronises rarely: groups train alone for some steps, then an outer step brings them together.

A group is one place of the mesh's `data` axis, with parameters and moments of its own; arrays of all groups are stacked in
front, G. Every `inner_steps` steps the outer optimizer moves the shared parameters against the mean of what the groups
contribute, shared - own: plain averaging is local SGD (Stich 2019), Nesterov momentum is DiLoCo (Douillard et al. 2023).
What comes of a meeting may be merged later (meetings.py). The group has then gone on alone. Its contributions under way
are kept, so that each step's progress is contributed once, and a resumed run is the same to the bit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.parallel.meetings import Fragments, Meetings

AXIS = "data"


class Groups(NamedTuple):
    """What a run keeps besides the shared parameters."""

    params_G: Any
    opt_state_G: Any
    velocity: Any  # of the outer step's momentum; (): averaging has none
    sent_G: tuple  # contributions, oldest first, as trees of parameters: zero where nothing is under way


class Outer(NamedTuple):
    """How groups meet: when, over what, and the step that comes of it."""

    meetings: Meetings
    fragments: Fragments
    lr: float
    momentum: float | None  # None: averaging
    mixing: float | None  # share of its own parameters that a group keeps in a late merge; None: all progress since it sent


def begin(params, opt_state, outer: Outer, n_groups: int) -> Groups:
    """Returns n equal groups."""
    def stack(x):
        return jnp.broadcast_to(x[None], (n_groups, *x.shape))

    params_G, zeros = jax.tree.map(stack, params), jax.tree.map(jnp.zeros_like, params)
    return Groups(params_G, jax.tree.map(stack, opt_state), () if outer.momentum is None else zeros,
                  tuple(jax.tree.map(stack, zeros) for _ in range(outer.meetings.slots)))


def place(params, opt_state, outer: Outer, n_groups: int, mesh: Mesh) -> Groups:
    """Returns the placement of groups, from that of one: each lives on its own place of the axis."""
    axis = AXIS if n_groups % mesh.shape[AXIS] == 0 else None  # looked at on another mesh, all are everywhere

    def stacked(sharding):
        return NamedSharding(mesh, PartitionSpec(axis, *sharding.spec))

    params_G = jax.tree.map(stacked, params)
    return Groups(params_G, jax.tree.map(stacked, opt_state), () if outer.momentum is None else params,
                  (params_G,) * outer.meetings.slots)


# ---------------------------------------------------------------- one group


class Own(NamedTuple):
    """What meetings change, as one group holds it: leaves of the parameters' tree, sent: such leaves for each slot."""

    shared: list
    params: list
    velocity: list
    sent: tuple[list, ...]


def inner_step(inner: Callable, g, kind, step, rng, params, opt_state, batch):
    """Returns (parameters, optimizer state, metrics) after group g's own training step."""
    own_rng = jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(rng), g))
    after, metrics = inner(kind(step, params, opt_state, own_rng), batch)
    return after.params, after.opt_state, metrics


def contribution(outer: Outer, p: int, own: Own) -> list:
    """Returns a group's progress in fragment p that it has not contributed yet, as a gradient: shared - own."""
    shared, params, *sent = (outer.fragments.take(p, x) for x in (own.shared, own.params, *own.sent))
    return [s - x - sum(d) for s, x, *d in zip(shared, params, *sent, strict=True)]


def send(outer: Outer, p: int, own: Own) -> Own:
    """Returns the group with its contribution of fragment p noted as the newest one under way."""
    news = contribution(outer, p, own)
    parts = [outer.fragments.take(p, x) for x in own.sent[1:]] + [news]
    return own._replace(sent=tuple(outer.fragments.put(p, x, part) for x, part in zip(own.sent, parts, strict=True)))


def merge(outer: Outer, p: int, mean: list, own: Own, slot: int | None = 0) -> Own:
    """Returns the group after the outer step that the groups' mean contribution to fragment p calls for.

    The contribution was that in `slot`; None: it is made just now, and the group has no progress since.
    """
    fragments, was = outer.fragments, [outer.fragments.take(p, x) for x in (own.shared, own.params)]
    if outer.momentum is None:
        velocity, shared = own.velocity, [s - g for s, g in zip(was[0], mean, strict=True)]
    else:  # Nesterov's, as optax.sgd has it
        news = [outer.momentum * v + g for v, g in zip(fragments.take(p, own.velocity), mean, strict=True)]
        shared = [s - outer.lr * (g + outer.momentum * v) for s, g, v in zip(was[0], mean, news, strict=True)]
        velocity = fragments.put(p, own.velocity, news)
    sent = own.sent
    if slot is None:
        params = shared
    else:
        mine = fragments.take(p, sent[slot])
        if outer.mixing is None:  # own = shared + progress since, in the old shared's terms and in the new one's
            params = [x + (s - old) + d for x, s, old, d in zip(was[1], shared, was[0], mine, strict=True)]
        else:
            params = [outer.mixing * x + (1 - outer.mixing) * s for x, s in zip(was[1], shared, strict=True)]
        done = fragments.put(p, sent[slot], [jnp.zeros_like(d) for d in mine])
        sent = (*sent[:slot], done, *sent[slot + 1 :])
    return Own(fragments.put(p, own.shared, shared), fragments.put(p, own.params, params), velocity, sent)


def finish(outer: Outer, own: Own, mean_of: Callable) -> Own:
    """Returns the group when everything under way, and then what it has not contributed yet, is merged at once."""
    meetings = outer.meetings
    for p in range(meetings.fragments):
        n = len(meetings.under_way(p, meetings.end - 1))
        for slot in range(len(own.sent) - n, len(own.sent)):
            own = merge(outer, p, mean_of(outer.fragments.take(p, own.sent[slot])), own, slot)
        own = merge(outer, p, mean_of(contribution(outer, p, own)), own, None)
    return own


# ---------------------------------------------------------------- all groups, one program


def group_step(inner: Callable, outer: Outer, mesh: Mesh, state, batch):
    """Returns the next state and metrics: every group's own step, and what is due of meetings.

    `inner(state, batch) -> (state, metrics)` is a training step. Metrics are stacked, [G, …]: no group waits for another's.
    """
    groups, kind, tree = state.opt_state, type(state), jax.tree.structure(state.params)

    def of_group(step, rng, shared, velocity, params_1, opt_state_1, sent_1, batch):
        params, opt_state, sent = jax.tree.map(lambda x: x[0], (params_1, opt_state_1, sent_1))
        params, opt_state, metrics = inner_step(inner, jax.lax.axis_index(AXIS), kind, step, rng, params, opt_state, batch)
        own = meet(outer, step + 1, Own(*map(jax.tree.leaves, (shared, params, velocity)), tuple(map(jax.tree.leaves, sent))))
        shared, params = (jax.tree.unflatten(tree, x) for x in (own.shared, own.params))
        velocity = jax.tree.unflatten(tree, own.velocity) if own.velocity else ()
        mine = (params, opt_state, tuple(jax.tree.unflatten(tree, x) for x in own.sent), metrics)
        return shared, velocity, *jax.tree.map(lambda x: x[None], mine)

    alone, everywhere = PartitionSpec(AXIS), PartitionSpec()
    shared, velocity, params_G, opt_state_G, sent_G, metrics_G = jax.shard_map(
        of_group, mesh=mesh, axis_names={AXIS}, in_specs=(everywhere,) * 4 + (alone,) * 4,
        out_specs=(everywhere,) * 2 + (alone,) * 4, check_vma=False,
    )(state.step, state.rng, state.params, groups.velocity, groups.params_G, groups.opt_state_G, groups.sent_G, batch)
    return kind(state.step + 1, shared, Groups(params_G, opt_state_G, velocity, sent_G), state.rng), metrics_G


def meet(outer: Outer, step, own: Own) -> Own:
    """Returns the group after what is due when `step` steps are done: first a merge, then a contribution."""
    meetings = outer.meetings

    def mean_of(part: list) -> list:
        return [jax.lax.pmean(x, AXIS) for x in part]

    def merging(p: int):
        slot = 0 if meetings.delay else None
        return lambda own: merge(outer, p, mean_of(contribution(outer, p, own) if slot is None else
                                                   outer.fragments.take(p, own.sent[slot])), own, slot)

    parts, table = range(meetings.fragments), jnp.asarray(np.array(meetings.by_remainder(), np.int32))
    ways = [lambda own: own, *map(merging, parts)]
    when = step - meetings.delay
    due = jnp.where(when > 0, table[when % meetings.inner_steps], 0)
    if not meetings.ends_in_time():
        ways.append(lambda own: finish(outer, own, mean_of))
        due = jnp.where(step == meetings.end, len(ways) - 1, due)
    own = jax.lax.switch(due, ways, own)
    if not meetings.delay:
        return own
    due = jnp.where(step == (meetings.end or 0), 0, table[step % meetings.inner_steps])
    return jax.lax.switch(due, [lambda own: own, *(lambda own, p=p: send(outer, p, own) for p in parts)], own)


# ---------------------------------------------------------------- what is logged


def read(metrics_G: dict) -> dict[str, np.ndarray]:
    """Returns the groups' metrics as one: losses by their targets, sums of targets, flags where all agree, else means.

    Of several processes each reads those of its own groups.
    """
    G = {name: _own_rows(x) for name, x in metrics_G.items()}
    n_G = G["targets"]
    one = {name: x.all(0) if x.dtype == bool else x.mean(0) for name, x in G.items()}
    return one | {"loss": (G["loss"] * n_G).sum() / n_G.sum(), "targets": n_G.sum()}


def _own_rows(x) -> np.ndarray:
    rows = {s.index[0].start or 0: s.data for s in x.addressable_shards}
    return np.concatenate([np.asarray(rows[i]) for i in sorted(rows)])
