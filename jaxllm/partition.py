"""Where every array lives: the mesh, the one table from logical to mesh axes, and the placement of a whole tree."""

import math

import jax
import numpy as np
from flax import nnx
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxllm.errors import UserError
from jaxllm.mesh import AXES, MeshConfig, degrees

RULES: dict[str, tuple[str, ...] | str | None] = {
    "batch": ("data", "fsdp", "expert"),  # outside of sparse layers, the devices that share out the experts are data parallel
    "seq": "context",
    "residual_seq": ("context", "tensor"),  # where norms and residuals are (Korthikanti et al. 2022)
    "act": None,  # width of the residual stream
    "layers": "stage",
    "embed": "fsdp",  # width, in weights
    "kv_heads": "tensor",
    "heads": "tensor",
    "qkv": None,  # a kv head's query heads, its key and its value, kept together
    "head_dim": None,
    "mlp": "tensor",
    "experts": "expert",
    "router": None,  # experts, as a router's outputs: every device chooses for its own tokens
    "balance": None,  # experts, as the biases that even out their load
    "vocab": "tensor",
    "vocab_over_stages": ("stage", "tensor"),  # between the steps of a pipeline, with train.split_embedding
    "norm": None,
    "rank": None,  # of a low-rank adapter
    "scores": None,  # what a reward model's or critic's head gives
}


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
    """Returns a mesh with every axis of `AXES`; raises UserError when the degrees do not multiply to the devices."""
    devices = jax.devices() if devices is None else devices
    inner, outer = (tuple(sizes[a] for a in AXES) for sizes in degrees(cfg, len(devices)))
    slices = [create_device_mesh(inner, part, allow_split_physical_axes=True) for part in _slices(devices, int(np.prod(outer)))]
    # [outer axes, inner axes] -> each axis with its outer part in front
    n = len(AXES)
    placed = np.array(slices).reshape(outer + inner).transpose([i for a in range(n) for i in (a, n + a)])
    # Auto is spelled out: the default became Explicit after jax 0.7.
    return Mesh(placed.reshape([o * i for o, i in zip(outer, inner, strict=True)]), AXES, axis_types=(AxisType.Auto,) * n)


def _slices(devices, n: int) -> list[list]:
    """Returns the devices of each of n slices; raises UserError when the hardware has another number of them."""
    on_tpu = devices[0].platform == "tpu"
    found = {getattr(d, "slice_index", 0) for d in devices} if on_tpu else {0}
    if len(found) > 1 and len(found) != n:
        raise UserError(f"mesh.dcn: its degrees are for {n} slices, found {len(found)}")
    if len(found) == 1:  # devices in a row stand for slices: a CPU's or GPU's hosts
        return [list(part) for part in np.array(devices).reshape(n, -1)]
    return [[d for d in devices if d.slice_index == i] for i in sorted(found)]


def spec(*logical: str | None) -> PartitionSpec:
    """Returns the mesh axes of an array with these logical axes; raises on an unknown name or a mesh axis used twice."""
    entries, used = [], []
    for name in logical:
        if name is not None and name not in RULES:
            raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(RULES)}")
        entry = RULES[name] if name is not None else None
        used += [entry] if isinstance(entry, str) else entry or ()
        entries.append(entry)
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {logical} use a mesh axis twice: {used}")
    return PartitionSpec(*entries)


def free_axes() -> dict[str, int]:
    """Returns the axes that split something on the mesh that `jax.set_mesh` chose, with their sizes, but for those that a
    caller's `shard_map` has taken already."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: size for axis, size in mesh.shape.items() if size > 1 and axis not in mesh.manual_axes}


def kept(shape: tuple[int, ...], *logical: str | None) -> list[tuple[str, ...]]:
    """Returns the free mesh axes that split each dimension of an array: of those of its logical axis, from the outermost on
    as many as divide it."""
    free, out = free_axes(), []
    for size, entry in zip(shape, spec(*logical), strict=True):
        axes = tuple(a for a in ((entry,) if isinstance(entry, str) else entry or ()) if a in free)
        while size % math.prod(free[a] for a in axes):  # as the one position of a decoded token
            axes = axes[:-1]
        out.append(axes)
    return out


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Returns `x` placed by its logical axes, on the mesh that `jax.set_mesh` chose; `x` itself where no axis is split."""
    return place(x, PartitionSpec(*(axes or None for axes in kept(x.shape, *logical)))) if free_axes() else x


def place(x: jax.Array, by: PartitionSpec) -> jax.Array:
    """Returns `x` placed by mesh axes, on the mesh that `jax.set_mesh` chose."""
    try:
        return jax.lax.with_sharding_constraint(x, by)
    except NotImplementedError:  # jax 0.7 has no constraints where shard_map is manual over some axes: the compiler places
        if not jax.sharding.get_abstract_mesh().manual_axes:
            raise
        return x


def on_each_device(local, in_axes, out_axes):
    """Returns `local` run by every device on its own part of arrays with these logical axes, over the mesh axes that no
    caller has taken already (a pipeline takes `stage`)."""
    mesh = jax.sharding.get_abstract_mesh()
    free = {axis for axis in mesh.axis_names if axis not in mesh.manual_axes}
    if not free:
        return local

    def part(axes):
        entries = [(e,) if isinstance(e, str) else e or () for e in spec(*axes)]
        return PartitionSpec(*(tuple(a for a in e if a in free) or None for e in entries))

    return jax.shard_map(local, in_specs=tuple(map(part, in_axes)), out_specs=part(out_axes), axis_names=free, check_vma=False)


def phases(mesh: Mesh) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Returns, for each mesh axis that lies over several directions of a TPU slice's network, how many chips it has in each.

    (("fsdp", (4, 4)),): the outermost direction first. Axes whose devices stand in another order are left out.
    """
    found = []
    for i, axis in enumerate(mesh.axis_names):
        line = np.moveaxis(mesh.devices, i, 0).reshape(mesh.devices.shape[i], -1)[:, 0]
        if not hasattr(line[0], "coords") or len({getattr(d, "slice_index", 0) for d in line}) > 1:
            continue
        steps = np.array([d.coords for d in line]).T  # [direction, place]
        moving = sorted((row for row in steps if len(set(row)) > 1), key=lambda row: -int(np.argmax(row != row[0])))
        sizes = tuple(len(set(row)) for row in moving)
        inner = [np.unique(row, return_inverse=True)[1].ravel() for row in moving]
        if len(sizes) > 1 and np.array_equal(inner, np.unravel_index(np.arange(len(line)), sizes)):
            found.append((axis, sizes))
    return tuple(found)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Placement of [B, T] inputs."""
    return NamedSharding(mesh, spec("batch", "seq"))


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Placement of [B, …] inputs whose positions are not split."""
    return NamedSharding(mesh, spec("batch"))


def row_share(mesh: Mesh) -> tuple[int, int]:
    """Returns (i, n): this process's devices hold the i-th of n equal stretches of a batch's rows.

    Raises UserError when they hold rows from here and there, as no process then has a stretch of its own.
    """
    rows = {d: s[0] for d, s in batch_sharding(mesh).devices_indices_map((mesh.size, mesh.size)).items()}
    mine = {range(mesh.size)[rows[d]] for d in mesh.local_devices}
    first, last = min(r.start for r in mine), max(r.stop for r in mine)
    if sum(map(len, mine)) != last - first or mesh.size % (last - first) or first % (last - first):
        raise UserError(f"mesh {dict(mesh.shape)}: the devices of process {jax.process_index()} hold rows from several places "
                        "of a batch; let the degrees of tensor and of the other inner axes divide a host's devices")
    return first // (last - first), mesh.size // (last - first)


def batch_parts(mesh: Mesh) -> int:
    """Returns how many parts the rows of a batch are split into."""
    return math.prod(mesh.shape[a] for a in RULES["batch"])


def shardings(params: nnx.State, mesh: Mesh, *, split_embedding: bool = False) -> nnx.State:
    """Returns the NamedSharding of every parameter, from the axis names written beside it."""

    def place(var):
        return var.replace(NamedSharding(mesh, spec(*_names(var, split_embedding))))

    return jax.tree.map(place, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _names(var, split_embedding: bool) -> tuple[str, ...]:
    """Returns the logical axes of a whole parameter: leading ones that it does not name are layers."""
    own = tuple("vocab_over_stages" if name == "vocab" and split_embedding else name for name in var.axes)
    return ("layers",) * (var.ndim - len(own)) + own


def check_divides(params: nnx.State, mesh: Mesh, *, split_embedding: bool = False) -> None:
    """Raises UserError that names the parameter, its axis and its size when the mesh does not divide it."""
    for path, var in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        names = _names(var, split_embedding)
        for name, size, entry in zip(names, var.shape, spec(*names), strict=True):
            axes = (entry,) if isinstance(entry, str) else entry or ()
            parts = int(np.prod([mesh.shape[a] for a in axes]))
            if size % parts:
                where = " x ".join(f"mesh.{a}={mesh.shape[a]}" for a in axes if mesh.shape[a] > 1)
                dividing = ", ".join(str(n) for n in range(1, mesh.size + 1) if size % n == 0)
                raise UserError(f"{leaf_name(path)}: axis {name!r} has size {size}, which {where} does not divide; what does, "
                                f"up to {mesh.size}: {dividing}")


def leaf_name(path) -> str:
    """Returns "trunk.blocks_L.attn.qkv_DKGH" of a tree path."""
    parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    return ".".join(p for p in parts if p not in ("value", "raw_value", "_raw_value"))
