"""Where every array lives: the mesh, the one table from logical to mesh axes, and the placement of a whole tree."""

import math

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxllm.errors import UserError
from jaxllm.mesh import AXES, MeshConfig, degrees

RULES: dict[str, tuple[str, ...] | str | None] = {
    "batch": ("data", "fsdp", "expert"),  # outside of sparse layers, the devices that share out the experts are data parallel
    "seq": "context",
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
    "norm": None,
}


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
    """Returns a mesh with every axis of `AXES`; raises UserError when the degrees do not multiply to the devices."""
    devices = jax.devices() if devices is None else devices
    sizes = degrees(cfg, len(devices))
    # Auto is spelled out: jax.make_mesh's default became Explicit after 0.7.
    return jax.make_mesh(tuple(sizes[a] for a in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


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


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Returns `x` placed by its logical axes, on the mesh that `jax.set_mesh` chose; `x` itself where no axis is split."""
    mesh = jax.sharding.get_abstract_mesh()
    entries = [(e,) if isinstance(e, str) else e or () for e in spec(*logical)]
    kept = [tuple(a for a in e if mesh.shape.get(a, 1) > 1) or None for e in entries]
    if not any(size > 1 for size in mesh.shape.values()):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*kept))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Placement of [B, T] inputs."""
    return NamedSharding(mesh, spec("batch", "seq"))


def batch_parts(mesh: Mesh) -> int:
    """Returns how many parts the rows of a batch are split into."""
    return math.prod(mesh.shape[a] for a in RULES["batch"])


def shardings(params: nnx.State, mesh: Mesh) -> nnx.State:
    """Returns the NamedSharding of every parameter, from the axis names written beside it (leading ones: layers)."""

    def place(var):
        stacked = var.ndim - len(var.axes)
        return var.replace(NamedSharding(mesh, spec(*["layers"] * stacked, *var.axes)))

    return jax.tree.map(place, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def check_divides(params: nnx.State, mesh: Mesh) -> None:
    """Raises UserError that names the parameter, its axis and its size when the mesh does not divide it."""
    for path, var in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        names = ("layers",) * (var.ndim - len(var.axes)) + tuple(var.axes)
        for name, size, entry in zip(names, var.shape, spec(*names), strict=True):
            axes = (entry,) if isinstance(entry, str) else entry or ()
            parts = int(np.prod([mesh.shape[a] for a in axes]))
            if size % parts:
                where = " x ".join(f"mesh.{a}={mesh.shape[a]}" for a in axes if mesh.shape[a] > 1)
                raise UserError(f"{leaf_name(path)}: axis {name!r} has size {size}, which {where} does not divide")


def leaf_name(path) -> str:
    """Returns "trunk.blocks_L.attn.qkv_DKGH" of a tree path."""
    parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    return ".".join(p for p in parts if p not in ("value", "raw_value", "_raw_value"))
