"""What a step keeps in the host's memory, and the way there and back.

Moments live on the host between steps: the step brings them to the device for the update and takes them back. What remat
keeps of each layer goes there in the forward pass and comes back in the backward (model/transformer.py names it).
"""

import dataclasses

import jax
from jax.sharding import Mesh

from jaxllm.errors import UserError
from jaxllm.model.remat import SETS, TENSORS, named
from jaxllm.train.config import TrainConfig

HOST = "pinned_host"
PLATFORMS = ("tpu", "gpu")  # whose memory is not the host's


def looked_at(train: TrainConfig) -> TrainConfig:
    """Returns the settings under which a run is read, not trained: on any machine, all of it beside the device."""
    return dataclasses.replace(train, offload="none")


def of_activations(train: TrainConfig) -> bool:
    return train.offload in ("activations", "both")


def of_optimizer(train: TrainConfig) -> bool:
    return train.offload in ("optimizer", "both")


def check_offload(train: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError where nothing could go to the host's memory, or where it is not known to work."""
    if train.offload == "none":
        return
    device, told = mesh.devices.flat[0], f"train.offload={train.offload}"
    if device.platform not in PLATFORMS:
        raise UserError(f"{told}: a {device.platform} has no memory of its own beside the host's; leave it out")
    if HOST not in (kinds := [m.kind for m in device.addressable_memories()]):
        raise UserError(f"{told}: {device.device_kind} cannot reach the host's memory, only {', '.join(kinds)}; leave it out")
    if of_activations(train) and named(train.remat) is None:
        raise UserError(f"{told} with train.remat={train.remat}: should be a remat that names what it keeps: "
                        f"{', '.join(['full', *SETS, *TENSORS])}")
    if of_activations(train) and mesh.shape["stage"] > 1:
        raise UserError(f"{told} cannot be combined with mesh.stage={mesh.shape['stage']}; train.offload=optimizer can")
    if train.sync != "every_step":
        raise UserError(f"{told} cannot be combined with train.sync={train.sync}")


def on_host(placed_opt_state, abstract_opt_state):
    """Returns the placement with every array of one or more dimensions in the host's memory; counters stay on the device."""
    return jax.tree.map(lambda s, a: s.with_memory_kind(HOST) if a.ndim else s, placed_opt_state, abstract_opt_state)


def through_device(step, on_device):
    """Returns a step whose optimizer state comes from the host's memory; `on_device` is its placement there."""

    def stepped(state, batch):
        return step(dataclasses.replace(state, opt_state=jax.device_put(state.opt_state, on_device)), batch)

    return stepped


def beside_host(x: jax.Array) -> jax.Array:
    """Returns an array in the device's own memory, where it can be computed with."""
    return jax.device_put(x, x.sharding.with_memory_kind("device")) if x.sharding.memory_kind == HOST else x
