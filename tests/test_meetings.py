"""When groups meet and what a late merge does: against a plain loop over groups that keeps every round's progress apart."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.mesh import MeshConfig
from jaxllm.parallel import local_sgd
from jaxllm.parallel.meetings import Meetings, bytes_of_meeting, cut
from jaxllm.partition import make_mesh
from jaxllm.train.state import TrainState

G, LR, MOMENTUM = 4, 0.7, 0.5
SHAPES = {"layers": ((3, 4), True), "other": ((6,), False)}
WAYS = [Meetings(4, 2, 2, 15), Meetings(4, 1, 4, 14), Meetings(4, 1, 0, 14), Meetings(3, 1, 9, 20), Meetings(4, 2, 0, 14),
        Meetings(4, 3, 3, None), Meetings(3, 2, 6, 17)]


@pytest.mark.parametrize("meetings", [*WAYS, Meetings(7, 7, 5, None), Meetings(5, 1, 15, None)])
def test_each_fragment_meets_once_a_round_and_is_merged_so_much_later(meetings):
    H = meetings.inner_steps
    sent = {s: meetings.contributed(s) for s in range(1, 20 * H)}
    for p in range(meetings.fragments):
        own = [s for s, q in sent.items() if q == p]
        assert {b - a for a, b in itertools.pairwise(own)} == {H}
        for s in own[:-5]:
            assert meetings.merged(s + meetings.delay) == p
            # it waits from when it was made until the step that merges it
            assert [t for t in range(1, 20 * H) if s in meetings.under_way(p, t)] == list(range(s, s + meetings.delay))
        assert max(len(meetings.under_way(p, t)) for t in range(1, 15 * H)) == meetings.slots
    assert all(meetings.merged(s) is None for s in range(meetings.delay + 1))


def test_fragments_hold_every_parameter_once():
    fragments, sizes = cut(3, [((7, 2), True), ((10,), False), ((7, 5), True), ((3, 3), False)])
    leaves = [np.arange(14).reshape(7, 2), np.arange(10), np.arange(35).reshape(7, 5), np.arange(9).reshape(3, 3)]
    parts = [fragments.take(p, leaves) for p in range(3)]
    assert [sum(x.size for x in part) for part in parts] == sizes and sum(sizes) == 68
    layers = [part[0][:, 0] // 2 for part in parts if part[0].shape[1:] == (2,)]
    assert [list(x) for x in layers] == [[0, 3, 6], [1, 4], [2, 5]]  # strided
    again = [jnp.zeros_like(x) for x in leaves]
    for p, part in enumerate(parts):
        again = fragments.put(p, again, part)
    assert all((np.asarray(a) == b).all() for a, b in zip(again, leaves, strict=True))
    assert bytes_of_meeting(max(sizes), 4) == 4 * max(sizes) * 1.5


# ---------------------------------------------------------------- the program against a plain loop


def inner(state, batch):
    """A step of gradient descent towards the batch, with a momentum of its own."""
    m = jax.tree.map(lambda m, x, b: 0.5 * m + (x - b[0]), state.opt_state, state.params, batch)
    params = jax.tree.map(lambda x, m: x - 0.1 * m, state.params, m)
    return TrainState(state.step + 1, params, m, state.rng), {"loss": jnp.float32(1), "targets": jnp.float32(2)}


def batches(n: int) -> list[dict]:
    rng = np.random.default_rng(0)
    return [{name: rng.normal(size=(G, *shape)).astype(np.float32) for name, (shape, _) in SHAPES.items()} for _ in range(n)]


def ran(meetings: Meetings, momentum, mixing, steps: int):
    """Returns (shared, [G] own parameters) of `local_sgd.group_step`."""
    outer = local_sgd.Outer(meetings, cut(meetings.fragments, list(SHAPES.values()))[0], LR if momentum else 1.0, momentum, mixing)
    mesh = make_mesh(MeshConfig(data=G), jax.devices()[:G])
    params = {name: jnp.zeros(shape) for name, (shape, _) in SHAPES.items()}
    state = TrainState(jnp.int32(0), params, params, jax.random.key_data(jax.random.key(0)))
    state = TrainState(state.step, params, local_sgd.begin(params, params, outer, G), state.rng)
    step = jax.jit(lambda state, batch: local_sgd.group_step(inner, outer, mesh, state, batch))
    with jax.set_mesh(mesh):
        for batch in batches(steps):
            state, metrics_G = step(state, batch)
    assert local_sgd.read(metrics_G) == {"loss": 1, "targets": 2 * G}
    return state.params, state.opt_state.params_G


class Fragment:
    """One fragment as the papers tell it: `x[g]` are its parameters in group g, `rounds` each group's progress in every round."""

    def __init__(self, x):
        self.shared, self.velocity = x.copy(), np.zeros_like(x)
        self.x, self.rounds, self.since = np.stack([x] * G), [], np.zeros((G, *x.shape))

    def merge(self, gradient, momentum, mixing, kept):
        """Moves shared against `gradient`; each group is there with what it did since, or between there and where it was."""
        self.velocity = (momentum or 0) * self.velocity + gradient
        self.shared = self.shared - (LR * (gradient + momentum * self.velocity) if momentum else gradient)
        self.x = self.shared + kept if mixing is None else mixing * self.x + (1 - mixing) * self.shared


def wanted(meetings: Meetings, momentum, mixing, steps: int):
    whole = {name: np.zeros(shape) for name, (shape, _) in SHAPES.items()}
    fragments, _ = cut(meetings.fragments, list(SHAPES.values()))
    parts = [{(p, i): Fragment(x) for i, x in enumerate(fragments.take(p, list(whole.values())))} for p in range(meetings.fragments)]
    m = [[np.zeros((G, *f.shared.shape)) for f in part.values()] for part in parts]
    for t, batch in enumerate(batches(steps), 1):
        for p, part in enumerate(parts):
            per_group = [fragments.take(p, [x[g] for x in batch.values()]) for g in range(G)]
            for i, f in enumerate(part.values()):
                m[p][i] = 0.5 * m[p][i] + f.x - np.stack([group[i] for group in per_group])
                f.x, f.since = f.x - 0.1 * m[p][i], f.since - 0.1 * m[p][i]
                due(meetings, f, p, t, momentum, mixing)
    return fragments, parts


def due(meetings, f, p, t, momentum, mixing):
    """Merges and notes what the meeting times say."""
    if t == meetings.end:
        while f.rounds:
            f.merge(-f.rounds.pop(0).mean(0), momentum, mixing, sum(f.rounds) + f.since)
        f.merge(f.shared - f.x.mean(0) if mixing is not None else -f.since.mean(0), momentum, None, 0 * f.x)
        return
    if meetings.delay and meetings.merged(t) == p and f.rounds:
        done = f.rounds.pop(0)
        f.merge(-done.mean(0), momentum, mixing, sum(f.rounds) + f.since)
    if meetings.contributed(t) == p:
        progress = f.x - f.shared if mixing is not None else f.since
        f.rounds.append(progress.copy())
        f.since = np.zeros_like(f.since)
        if not meetings.delay:
            f.merge(-f.rounds.pop(0).mean(0), momentum, None, 0 * f.x)


@pytest.mark.parametrize(("meetings", "momentum", "mixing"), [
    *((meetings, momentum, None) for meetings in WAYS for momentum in (None, MOMENTUM)),
    *((meetings, MOMENTUM, 0.5) for meetings in WAYS if 0 < meetings.delay < meetings.inner_steps),
], ids=str)
def test_the_program_is_the_plain_loop(meetings, momentum, mixing):
    steps = meetings.end or 15
    shared, own_G = ran(meetings, momentum, mixing, steps)
    fragments, parts = wanted(meetings, momentum, mixing, steps)
    for p, part in enumerate(parts):
        for x, f in zip(fragments.take(p, list(shared.values())), part.values(), strict=True):
            np.testing.assert_allclose(x, f.shared, rtol=1e-4, atol=1e-5)
        for g in range(G):
            for x, f in zip(fragments.take(p, [np.asarray(x)[g] for x in own_G.values()]), part.values(), strict=True):
                np.testing.assert_allclose(x, f.x[g], rtol=1e-4, atol=1e-5)
