"""Checkpoints: Orbax, written in the background, complete or absent, checked against damage.

`checkpoints/STEP/` holds two trees, `params` and `train` (optimizer, step, RNG), so that a sampler reads only the first,
and `meta`: the data position, and of every array its shape, type and a checksum that does not depend on the mesh.
"""

import contextlib
import errno
import logging
import pathlib
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp

from jaxllm.errors import DISK_FULL, RunError, UserError
from jaxllm.mesh import MeshConfig
from jaxllm.model.heads import LanguageModel
from jaxllm.model.lora import adapters, merged
from jaxllm.parallel.processes import is_first, together
from jaxllm.partition import leaf_name, make_mesh
from jaxllm.train.config import CheckpointConfig
from jaxllm.train.offload import beside_host
from jaxllm.train.run_folder import read_model
from jaxllm.train.state import TrainState, placed_shapes, structure


class Checkpoints:
    """The checkpoints of one run. `with Checkpoints(...)` waits for the last write on leaving."""

    def __init__(self, folder: pathlib.Path, cfg: CheckpointConfig | None = None):
        import orbax.checkpoint as ocp  # a second to import; a finished run needs none of it

        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns of every reader that it only reads
        self.ocp, self.folder = ocp, pathlib.Path(folder).resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
        if cfg is not None:
            options = ocp.CheckpointManagerOptions(max_to_keep=cfg.keep, keep_period=cfg.keep_every, create=True)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        try:
            self.wait()
        finally:
            self.manager.close()

    def steps(self) -> list[int]:
        return sorted(self.manager.all_steps())

    def save(self, step: int, state: TrainState, position: dict) -> None:
        """Starts to write a checkpoint; returns when the arrays may be reused. Raises RunError when the disk is full."""
        args = self.ocp.args
        meta = {"position": position, "arrays": describe(state)}
        with self._disk_errors():
            self.manager.save(step, force=True, args=args.Composite(
                params=args.StandardSave(state.params), train=args.StandardSave(_rest(state)), meta=args.JsonSave(meta)))

    def wait(self) -> None:
        """Returns when the last checkpoint is complete on disk."""
        with self._disk_errors():
            self.manager.wait_until_finished()

    def restore(self, abstract: TrainState, step: int | None = None, *, damaged=lambda step, why: None):
        """Returns (state, position) of the newest good checkpoint, or of `step`; None when there is none.

        A checkpoint that cannot be read, or whose arrays do not match their checksums, is told to `damaged(step, why)`
        and the one before it is tried. Raises UserError when the arrays have other shapes than `abstract`.
        """
        args = self.ocp.args
        for candidate in self._candidates(step):
            meta = self._meta(candidate, damaged)
            if meta is None:
                continue
            check_shapes(abstract, meta["arrays"], f"{self.folder / str(candidate)}")
            try:
                read = self.manager.restore(candidate, args=args.Composite(
                    params=args.StandardRestore(abstract.params), train=args.StandardRestore(_rest(abstract))))
                state = TrainState(params=read.params, **read.train)
                wrong = check_sums(state, meta["arrays"])
            except Exception as e:  # whatever a damaged file makes the readers raise
                damaged(candidate, _damage(e))
                continue
            if not wrong:
                return state, meta["position"]
            damaged(candidate, f"{wrong[0]} does not match its checksum")
        return None

    def restore_params(self, abstract_params, step: int | None = None, *, damaged=lambda step, why: None):
        """Returns (parameters, step) of the newest good checkpoint, or of `step`; None when there is none."""
        args = self.ocp.args
        for candidate in self._candidates(step):
            meta = self._meta(candidate, damaged)
            if meta is None:
                continue
            check_shapes({"params": abstract_params}, meta["arrays"], f"{self.folder / str(candidate)}")
            try:
                read = self.manager.restore(candidate, args=args.Composite(params=args.StandardRestore(abstract_params)))
                params = read.params
                wrong = check_sums({"params": params}, meta["arrays"])
            except Exception as e:
                damaged(candidate, _damage(e))
                continue
            if not wrong:
                return params, candidate
            damaged(candidate, f"{wrong[0]} does not match its checksum")
        return None

    def position(self, step: int) -> dict:
        """Returns the data position that a checkpoint was saved with."""
        return self.manager.restore(step, args=self.ocp.args.Composite(meta=self.ocp.args.JsonRestore())).meta["position"]

    def arrays(self, step: int) -> dict:
        """Returns {leaf: [shape, type, checksum]} of a checkpoint, without reading its arrays."""
        meta = self._meta(*self._candidates(step), tell_damaged)
        if meta is None:
            raise UserError(f"{self.folder / str(step)}: cannot be read; give another step")
        return meta["arrays"]

    def read_raw(self, step: int):
        """Returns (a checkpoint's arrays as they lie on disk, its position), for a look without the model's settings."""
        self._candidates(step)
        args = self.ocp.args
        read = self.manager.restore(step, args=args.Composite(
            params=args.StandardRestore(), train=args.StandardRestore(), meta=args.JsonRestore()))
        return {"params": read.params, "train": read.train}, read.meta["position"]

    def set_aside(self, after: int) -> None:
        """Moves checkpoints later than `after`, which could not be read, out of the way of new ones; none is deleted."""
        for step in [s for s in self.steps() if s > after and is_first()]:
            target = self.folder.with_name("damaged-checkpoints") / f"{step}-{time.time_ns()}"
            target.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(target)
        together("damaged checkpoints are set aside")
        self.manager.reload()

    def _candidates(self, step: int | None) -> list[int]:
        steps = self.steps()
        if step is None:
            return steps[::-1]
        if step not in steps:
            raise UserError(f"{self.folder}: no checkpoint of step {step}; there are: {', '.join(map(str, steps)) or 'none'}")
        return [step]

    def _meta(self, step: int, damaged) -> dict | None:
        try:
            meta = self.manager.restore(step, args=self.ocp.args.Composite(meta=self.ocp.args.JsonRestore())).meta
            return meta if meta["arrays"] else None
        except Exception as e:  # as above
            damaged(step, _damage(e))
            return None

    @contextlib.contextmanager
    def _disk_errors(self):
        try:
            yield
        except (OSError, ValueError, RuntimeError) as e:  # tensorstore tells of a full disk through ValueError
            text = f"{e} {e.__cause__ or ''}"
            full = getattr(e, "errno", None) in DISK_FULL or any(
                sign in text for sign in ("No space left", "Disk quota exceeded", "File too large"))
            if not full and not isinstance(e, OSError) and not _transient(e):
                raise
            good = ", ".join(map(str, self.steps())) or "none"
            reason = "the disk is full" if full else _first_line(e)
            mend = "Free some space and run" if full else "Run"
            raise RunError(f"{self.folder}: checkpoint not written: {reason}; complete checkpoints: {good}. {mend} the same "
                           "command again") from e


def _rest(state: TrainState) -> dict:
    return {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}


def _named(tree) -> dict:
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def describe(state: TrainState) -> dict:
    """Returns {leaf: [shape, type, checksum]} of a state, as JSON."""
    named = _named(state)
    sums = jax.device_get(checksums([beside_host(x) for x in named.values()]))
    return {name: [list(x.shape), str(x.dtype), int(total)] for (name, x), total in zip(named.items(), sums, strict=True)}


@jax.jit
def checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    """Weighted sums of the arrays' bits, modulo 2^32: the same on every mesh, other when any one bit is."""

    def total(x):
        bits = jax.lax.bitcast_convert_type(x, {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[x.dtype.itemsize])
        flat = [jax.lax.broadcasted_iota(jnp.uint32, x.shape, i) for i in range(x.ndim)]
        weight = sum((i * jnp.uint32(2654435761 + 2 * n) for n, i in enumerate(flat)), jnp.zeros(x.shape, jnp.uint32))
        return jnp.sum(bits.astype(jnp.uint32) * (2 * weight + 1), dtype=jnp.uint32)

    return [total(x) for x in leaves]


def check_sums(tree, arrays: dict) -> list[str]:
    """Returns the names of the arrays that differ from their checksums."""
    named = _named(tree)
    sums = jax.device_get(checksums([beside_host(x) for x in named.values()]))
    return [name for name, total in zip(named, sums, strict=True) if int(total) != arrays[name][2]]


def check_shapes(abstract, arrays: dict, where: str) -> None:
    """Raises UserError that names the first array whose shape or type is not the model's."""
    expected = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in _named(abstract).items()}
    for name, shape_and_type in expected.items():
        found = arrays.get(name, ["absent", ""])[:2]
        if found != shape_and_type:
            raise UserError(f"{where}: {name} is {found[0]} {found[1]}, the model of these settings has "
                            f"{shape_and_type[0]} {shape_and_type[1]}")
    if extra := [n for n in arrays if n not in expected and n.split(".")[0] in {e.split(".")[0] for e in expected}]:
        raise UserError(f"{where}: holds {extra[0]}, which the model of these settings does not have")


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:200]}"


def _damage(e: Exception) -> str:
    """Returns why a checkpoint could not be read; raises RunError when that is no fault of the checkpoint's."""
    if _transient(e):
        raise RunError(f"a checkpoint cannot be read now, though it may be whole: {_first_line(e)}") from e
    return _first_line(e)


def _transient(e: Exception) -> bool:
    """Returns whether this machine ran out of memory or open files, or may not read: nothing that a file could cause."""
    if isinstance(e, MemoryError) or getattr(e, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES):
        return True
    return any(sign in str(e) for sign in ("Too many open files", "Out of memory", "out of memory", "Permission denied"))


def load_model(folder, step: int | None = None, mesh=None):
    """Returns (ModelOfRun, graph, parameters, step) of a run's newest good checkpoint, or of `step`; adapters are added to
    their base's weights.

    `mesh` None: the run's own mesh where this machine has its devices, else one device. Raises UserError when the folder
    is no run of a language model or holds no readable checkpoint.
    """
    folder = pathlib.Path(folder)
    cfg = read_model(folder)
    if cfg.verb == "reward":
        raise UserError(f"{folder}: holds a reward model, which writes no text; give the run of a language model")
    mesh = mesh or run_mesh(cfg)
    graph, abstract = structure(LanguageModel, cfg.model, mesh)
    if not cfg.lora.rank:
        return cfg, graph, *read_params(folder, abstract, step)
    _, _, base, _ = load_model(_base_of(folder, cfg), cfg.base_step, mesh)
    with jax.set_mesh(mesh):
        lora, step = read_params(folder, placed_shapes(lambda: adapters(base, cfg.lora, jax.random.key(0)), mesh), step)
        return cfg, graph, jax.jit(partial(merged, cfg=cfg.lora))(base, lora), step


def _base_of(folder: pathlib.Path, cfg) -> str:
    if not pathlib.Path(cfg.base).is_dir():
        raise UserError(f"{folder}: its adapter is added to the weights of {cfg.base}, which is gone; put that run back")
    return cfg.base


def read_params(folder: pathlib.Path, abstract, step: int | None = None):
    """Returns (parameters, step) of a run's newest good checkpoint, or of `step`, as `abstract` places them."""
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore_params(abstract, step, damaged=tell_damaged)
    if found is None:
        raise UserError(f"{folder}: no checkpoint that can be read")
    return found


def tell_damaged(step: int, why: str) -> None:
    print(f"! checkpoint {step} is damaged and passed over: {why}", file=sys.stderr)


def run_mesh(cfg):
    """Returns the mesh of a run's settings where this machine has the devices for it, else one of one device."""
    try:
        return make_mesh(cfg.mesh)
    except UserError:
        return make_mesh(MeshConfig(data=1), jax.devices()[:1])
