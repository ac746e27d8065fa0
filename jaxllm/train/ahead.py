"""Groups in processes of their own, which may be ahead of each other: the step of `parallel/local_sgd.py`, driven by the host.

Each group steps by a program over its own devices alone; contributions travel through `parallel/exchange.py`, and a group
waits for the others only where it merges what came of a meeting. The arrays are those of the one program over all devices.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.errors import RunError
from jaxllm.parallel import exchange, local_sgd
from jaxllm.parallel.local_sgd import AXIS, Groups, Own
from jaxllm.parallel.processes import Place
from jaxllm.train.config import TrainConfig
from jaxllm.train.state import Program, TrainState, build, outer_of

ADDRESS = 64  # bytes that a host's address and port may take
HERE = -1  # stands for the fragment where groups only wait for each other


class Alone(NamedTuple):
    """One group's part of a run, on its own devices."""

    done: int  # steps
    state: TrainState  # its own parameters and moments
    shared: list
    velocity: list
    sent: tuple[list, ...]


def processes_of_groups(mesh: Mesh) -> list[list[int]] | None:
    """Returns the processes of each group; None unless each process is in one group, and all groups have as many."""
    found = [list(dict.fromkeys(d.process_index for d in mesh.devices[:, g].flat)) for g in range(mesh.shape[AXIS])]
    flat = [i for group in found for i in group]
    return found if len(set(flat)) == len(flat) and len(set(map(len, found))) == 1 else None


def may_be_ahead(train: TrainConfig, mesh: Mesh) -> bool:
    """Returns whether a group need not wait for the others at a meeting, and can go on alone."""
    late = train.sync != "every_step" and (train.staleness or train.overlap)
    return bool(late) and jax.process_count() > 1 and processes_of_groups(mesh) is not None


def ahead(program: Program, model, train: TrainConfig, optimizer, place: Place, timeout: float) -> Program:
    """Returns the program whose groups, in processes of their own, go ahead as far as the settings let them."""
    runner = Ahead(program, model, train, optimizer, place, timeout)
    return dataclasses.replace(program, train_step=runner, whole=runner.whole, read=jax.device_get, agreed=runner.agreed)


class Ahead:
    """Called as a training step; what it returns as state is this group's, `whole` makes it the run's."""

    def __init__(self, program: Program, model, train: TrainConfig, optimizer, place: Place, timeout: float):
        self.mesh, self.abstract = program.mesh, program.abstract
        self.outer = outer_of(train, program.abstract.params)
        groups = processes_of_groups(self.mesh)
        self.group = next(g for g, members in enumerate(groups) if jax.process_index() in members)
        self.members = len(groups[0])
        devices = self.mesh.devices[:, self.group : self.group + 1]
        self.own_mesh = Mesh(devices, self.mesh.axis_names, axis_types=self.mesh.axis_types)
        alone = dataclasses.replace(train, sync="every_step", groups=1, staleness=0, fragments=1, overlap=0, mixing=None,
                                    batch_size=train.batch_size // train.groups)
        self.one = build(model, alone, optimizer, self.own_mesh)
        seat = groups[self.group].index(jax.process_index())
        self.exchange = _meet([members[seat] for members in groups], place, timeout)
        self.tree = jax.tree.structure(self.abstract.params)
        self.note, self.heard = 0, 0
        self._compile(train.fragments)

    def _compile(self, n_fragments: int) -> None:
        """Makes the programs beside the step's, on this group's devices."""
        outer, one = self.outer, self.one.abstract
        placed = jax.tree.map(lambda x: x.sharding, (one.params, one.opt_state, (one.params,) * outer.meetings.slots))
        leaves = jax.tree.leaves(placed[0])
        own = Own(leaves, leaves, [] if outer.momentum is None else leaves, (leaves,) * outer.meetings.slots)
        stacked = jax.tree.map(lambda s: NamedSharding(self.own_mesh, PartitionSpec(AXIS, *s.spec)), placed)
        self._stack = jax.jit(partial(jax.tree.map, lambda x: x[None]), out_shardings=stacked)
        self._unstack = jax.jit(partial(jax.tree.map, lambda x: x[0]), out_shardings=placed)
        parts = range(n_fragments)
        self._send = [jax.jit(partial(local_sgd.send, outer, p), out_shardings=own) for p in parts]
        self._contribution = [jax.jit(partial(local_sgd.contribution, outer, p)) for p in parts]
        self._merge = [jax.jit(partial(local_sgd.merge, outer, p), static_argnums=2, out_shardings=own) for p in parts]

    def __call__(self, state, batch):
        if isinstance(state, TrainState):
            state = self._begin(state)
        with jax.set_mesh(self.own_mesh):
            after, metrics = self.one.train_step(state.state, jax.tree.map(self._on_own_mesh, batch))
            own = self._meet(state.done + 1, self._own(state._replace(state=after)))
        params = jax.tree.unflatten(self.tree, own.params)
        return Alone(state.done + 1, dataclasses.replace(after, params=params), own.shared, own.velocity, own.sent), metrics

    def agreed(self, number: int) -> int:
        """Takes this process's wish to stop; returns that of any process, to all at the same step: with a meeting's outcome."""
        self.note, heard = number, self.heard
        return heard

    def _own(self, state: Alone) -> Own:
        return Own(state.shared, jax.tree.leaves(state.state.params), state.velocity, state.sent)

    # ---------------------------------------------------------------- meetings

    def _meet(self, done: int, own: Own) -> Own:
        """Returns the group after what is due when `done` steps are done: what `local_sgd.meet` computes."""
        meetings, self.heard = self.outer.meetings, 0
        if done == meetings.end:
            return self._finish(own)
        if (p := meetings.merged(done)) is not None:
            own = self._merged(own, p, done - meetings.delay, 0)
        if (p := meetings.contributed(done)) is not None:
            own = self._send[p](own)
            self._submit((done, p), self.outer.fragments.take(p, own.sent[-1]))
        return own

    def _finish(self, own: Own) -> Own:
        meetings = self.outer.meetings
        for p in range(meetings.fragments):
            steps = meetings.under_way(p, meetings.end - 1)
            for slot, step in enumerate(steps, len(own.sent) - len(steps)):
                own = self._merged(own, p, step, slot)
            self._submit((meetings.end, p), self._contribution[p](own))
            own = self._merged(own, p, meetings.end, None)
        return own

    def _submit(self, key: exchange.Key, leaves: list) -> None:
        self.exchange.submit(key, _vector(leaves), self._highest_of_group(self.note))

    def _merged(self, own: Own, p: int, step: int, slot: int | None) -> Own:
        vector, note = self.exchange.result((step, p))
        self.heard = max(self.heard, note)
        like = self.outer.fragments.take(p, own.shared)
        return self._merge[p](_cut(vector, like), own, slot)

    def _highest_of_group(self, number: int) -> int:
        if self.members == 1:
            return number
        rows = NamedSharding(self.own_mesh, PartitionSpec(self.own_mesh.axis_names))
        given = jax.make_array_from_callback((self.own_mesh.size,), rows, lambda _: np.array([number], np.int32))
        return int(jax.jit(jnp.max, out_shardings=NamedSharding(self.own_mesh, PartitionSpec()))(given))

    # ---------------------------------------------------------------- this group's arrays and the run's

    def _begin(self, state: TrainState) -> Alone:
        """Returns this group's part of a run's state, and gives the others again what was under way."""
        groups, meetings = state.opt_state, self.outer.meetings
        done, self.rng = int(state.step), state.rng
        mine = jax.tree.map(self._on_own_mesh, (groups.params_G, groups.opt_state_G, groups.sent_G))
        with jax.set_mesh(self.own_mesh):
            params, opt_state, sent = self._unstack(mine)
            rng = jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(np.asarray(state.rng)), self.group))
        step, rng = (jax.device_put(np.asarray(x), a.sharding) for x, a in
                     ((state.step, self.one.abstract.step), (rng, self.one.abstract.rng)))
        shared, velocity = ([self._on_own_mesh(x) for x in jax.tree.leaves(tree)] for tree in (state.params, groups.velocity))
        alone = Alone(done, TrainState(step, params, opt_state, rng), shared, velocity, tuple(map(jax.tree.leaves, sent)))
        for p in range(meetings.fragments):
            steps = meetings.under_way(p, done)
            for slot, step in enumerate(steps, len(sent) - len(steps)):
                with jax.set_mesh(self.own_mesh):
                    self._submit((step, p), self.outer.fragments.take(p, alone.sent[slot]))
        return alone

    def whole(self, state) -> TrainState:
        """Returns the run's state on all devices, of this and the other groups' parts; all must ask at the same step.

        Here the groups wait for each other: what is then done together over jax would give up after half a minute.
        """
        if isinstance(state, TrainState):
            return state
        self.exchange.submit((state.done, HERE), np.zeros(0, np.float32))
        self.exchange.result((state.done, HERE))
        one, (shared, velocity, *sent) = state.state, map(self._tree, (state.shared, state.velocity, *state.sent))
        with jax.set_mesh(self.own_mesh):
            params_G, opt_state_G, sent_G = self._stack((one.params, one.opt_state, tuple(sent)))
        found = TrainState(one.step, shared, Groups(params_G, opt_state_G, velocity, sent_G), self.rng)
        return jax.tree.map(_on_all, self.abstract, found)

    def _tree(self, leaves: list):
        return jax.tree.unflatten(self.tree, leaves) if leaves else ()

    def _on_own_mesh(self, x):
        """Returns an array's part on this group's devices, as an array of their mesh."""
        spec = x.sharding.spec
        over_groups = bool(spec) and AXIS in (spec[0] if isinstance(spec[0], tuple) else (spec[0],))
        shape = (x.shape[0] // self.mesh.shape[AXIS], *x.shape[1:]) if over_groups else x.shape
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(self.own_mesh, spec), _data(x))


def _data(x) -> list:
    return [shard.data for shard in x.addressable_shards]


def _on_all(abstract, x):
    """Returns the array of all devices that this process's shards are part of."""
    return jax.make_array_from_single_device_arrays(abstract.shape, abstract.sharding, _data(x))


def _vector(leaves: list) -> np.ndarray:
    """Returns what this process holds of arrays, each element once."""
    return np.concatenate([part.ravel() for leaf in leaves for part in _parts(leaf).values()])


def _parts(x) -> dict:
    """Returns {place: values} of the parts of an array that this process holds, in the order of places."""
    found = {_place(shard.index): shard.data for shard in x.addressable_shards}
    return {place: np.asarray(found[place]) for place in sorted(found)}


def _place(index) -> tuple:
    return tuple((s.start or 0) for s in index)


def _cut(vector: np.ndarray, like: list) -> list:
    """Returns arrays such as `like` of the values of `_vector`."""
    made, start = [], 0
    for x in like:
        values = {}
        for place, part in _parts(x).items():
            values[place] = vector[start : start + part.size].reshape(part.shape)
            start += part.size
        made.append(jax.make_array_from_callback(x.shape, x.sharding, lambda index, values=values: values[_place(index)]))
    return made


def _meet(members: list[int], place: Place, timeout: float) -> exchange.Exchange:
    """Returns the exchange between one process of each group."""
    server = exchange.listen()
    own = f"{exchange.own_address(place.coordinator)}:{server.getsockname()[1]}".encode()
    told = process_allgather(np.frombuffer(own.ljust(ADDRESS), np.uint8))
    where = [bytes(told[i]).decode().strip().rpartition(":") for i in members]
    me = members.index(jax.process_index())
    try:
        peers = exchange.connect(server, me, [(host, int(port)) for host, _, port in where], timeout)
    except OSError as e:
        raise RunError(f"process {jax.process_index()}: no connection to the other groups' processes, {members}: "
                       f"{e}") from None
    return exchange.Exchange(peers, [f"process {i} ({host})" for i, (host, *_) in zip(members, where, strict=True)])
