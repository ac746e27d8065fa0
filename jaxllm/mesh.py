"""The mesh's axes and their degrees. No jax here: settings are checked before anything heavy is imported."""

import math
from dataclasses import dataclass

from jaxllm.errors import UserError

AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")  # slowest link first


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    data: int = -1  # replicas of the model, each with its own rows; -1: the devices that are left
    fsdp: int = 1  # shards of parameters, gradients and optimizer (ZeRO-3), each with its own rows; -1: what is left
    expert: int = 1  # shards of the experts of sparse layers (model.moe), each with its own rows; -1: what is left
    tensor: int = 1  # shards of heads, feed-forward and vocabulary, working on the same rows; -1: what is left

    def __post_init__(self):
        sizes = {a: getattr(self, a) for a in ("data", "fsdp", "expert", "tensor")}
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                raise ValueError(f"mesh.{axis}={size}: should be a positive number of devices, or -1 for what is left")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"mesh: only one axis may be -1 (what is left), found {sizes}")


def degrees(cfg: MeshConfig, n_devices: int) -> dict[str, int]:
    """Returns the size of every axis, −1 resolved; raises UserError unless they multiply to `n_devices`."""
    sizes = {axis: getattr(cfg, axis, 1) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = max(n_devices // known, 1)
    need = math.prod(sizes.values())
    if need != n_devices:
        shown = {axis: size for axis, size in sizes.items() if size > 1 or axis in ("data", "fsdp", "tensor")}
        raise UserError(f"mesh {shown} needs {need} devices, found {n_devices}")
    return sizes
