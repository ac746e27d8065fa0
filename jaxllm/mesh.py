"""The mesh's axes and their degrees. No jax here: settings are checked before anything heavy is imported."""

import math
from dataclasses import dataclass, field

from jaxllm.errors import UserError

AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")  # slowest link first


@dataclass(frozen=True, kw_only=True)
class DcnConfig:
    data: int = 1  # slices that are replicas of each other: the degree between them; mesh.data is the one inside of each
    fsdp: int = 1  # slices that parameters are split over; each step then gathers them over the slow network

    def __post_init__(self):
        for axis in ("data", "fsdp"):
            if getattr(self, axis) < 1:
                raise ValueError(f"mesh.dcn.{axis}={getattr(self, axis)}: should be a positive number of slices")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    stage: int = 1  # pipeline stages, each with its own layers (train.pipeline says in which order they work); -1: what is left
    data: int = -1  # replicas of the model, each with its own rows; -1: the devices that are left
    fsdp: int = 1  # shards of parameters, gradients and optimizer (ZeRO-3), each with its own rows; -1: what is left
    expert: int = 1  # shards of the experts of sparse layers (model.moe), each with its own rows; -1: what is left
    context: int = 1  # parts of each sequence, for long ones; -1: what is left
    tensor: int = 1  # shards of heads, feed-forward and vocabulary, working on the same rows; -1: what is left

    dcn: DcnConfig = field(default_factory=DcnConfig)  # degrees between slices, which a slower network joins

    def __post_init__(self):
        sizes = {a: getattr(self, a) for a in AXES}
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                raise ValueError(f"mesh.{axis}={size}: should be a positive number of devices, or -1 for what is left")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"mesh: only one axis may be -1 (what is left), found {sizes}")


def degrees(cfg: MeshConfig, n_devices: int) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the size of every axis inside a slice, −1 resolved, and between slices; a mesh axis has their product.

    Raises UserError unless they multiply to `n_devices`.
    """
    outer = {axis: getattr(cfg.dcn, axis, 1) for axis in AXES}
    sizes = {axis: getattr(cfg, axis, 1) for axis in AXES}
    slices = math.prod(outer.values())
    known = math.prod(size for size in sizes.values() if size != -1) * slices
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = max(n_devices // known, 1)
    need = math.prod(sizes.values()) * slices
    if need != n_devices:
        shown = {axis: size for axis, size in sizes.items() if size > 1 or axis in ("data", "fsdp", "tensor")}
        between = f" in {slices} slices" if slices > 1 else ""
        raise UserError(f"mesh {shown}{between} needs {need} devices, found {n_devices}")
    return sizes, outer
