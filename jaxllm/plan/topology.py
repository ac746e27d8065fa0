"""TPU slices by the names they are rented under: chips, shape, links. No jax here."""

import dataclasses
import functools
import math
import pathlib
import re

import yaml

from jaxllm.errors import UserError
from jaxllm.hardware import Chip, chips


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a generation of TPUs adds to a chip's figures for planning; numbers and sources in tpu.yaml."""

    chip: str  # its name in chips.yaml
    accelerator: str  # what TPU_ACCELERATOR_TYPE begins with
    cores: int  # cores a chip is counted as in a slice's name
    clock_ghz: float
    wraps: int  # a side of this many chips or a multiple of it is a ring, a shorter one a line
    host_gb_per_s: float  # a host's way out to other slices
    host_chips: int
    pcie_gb_per_s: float  # a chip's way to its host's memory, one way
    shapes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Topology:
    name: str  # v5e-256
    generation: Generation
    sides: tuple[int, ...]  # chips along each direction
    slices: int

    @property
    def devices(self) -> int:
        return math.prod(self.sides) * self.slices

    @property
    def jax_name(self) -> str:
        return f"{self.name.partition('-')[0]}:{'x'.join(map(str, self.sides))}"

    @property
    def accelerator_type(self) -> str:
        return f"{self.generation.accelerator}-{math.prod(self.sides) * self.generation.cores}"

    @property
    def chip(self) -> Chip:
        return chips()[self.generation.chip]

    @property
    def clock_hz(self) -> float:
        return self.generation.clock_ghz * 1e9


@functools.cache
def generations() -> dict[str, Generation]:
    read = yaml.safe_load(pathlib.Path(__file__).with_name("tpu.yaml").read_text(encoding="utf-8"))
    return {name: Generation(**entry | {"shapes": tuple(entry["shapes"])}) for name, entry in read["generations"].items()}


def known() -> dict[str, tuple[int, ...]]:
    """Returns the sides of every slice, by name."""
    out = {}
    for name, g in generations().items():
        for shape in g.shapes:
            sides = tuple(int(n) for n in shape.split("x"))
            out.setdefault(f"{name}-{math.prod(sides) * g.cores}", sides)
    return out


def find(name: str, slices: int = 1) -> Topology:
    """Returns the slice of this name; raises UserError with the known ones."""
    names = known()
    if name.lower() in names:
        generation = name.lower().partition("-")[0]
        return Topology(name.lower(), generations()[generation], names[name.lower()], slices)
    by_generation = [f"{g}-{{{','.join(n.partition('-')[2] for n in names if n.startswith(g + '-'))}}}" for g in generations()]
    was = f"topology={name!r}: is not known" if name else "topology is missing, e.g. --topology=v5e-16"
    other = re.sub(r"^v5litepod-", "v5e-", name.lower())
    hint = f"; did you mean {other!r}?" if other in names else ""
    raise UserError(f"{was}{hint}; known: {', '.join(by_generation)}")


def link_seconds(topology: Topology, kind: str, sent: float, members: list[tuple[tuple[int, ...], int]]) -> tuple[float, str]:
    """Returns (seconds, link) for a device to send `sent` bytes in a collective among `members`: (chip's place, its slice).

    The chips of a group fill a box; along each side longer than 1 a chip sends both ways on a ring, one way on a line
    (there, the ends wait for each other), on all sides at once. A group over several slices goes out through the hosts.
    A single permutation uses one link one way. No latency, no waiting, no other traffic: a lower bound.
    """
    if len({part for _, part in members}) > 1:
        g = topology.generation
        return sent / (g.host_gb_per_s * 1e9 / g.host_chips), "network between slices"
    one_way = topology.chip.link_bytes_per_s
    extent = [len({place[d] for place, _ in members}) for d in range(len(topology.sides))]
    if kind == "collective-permute":
        return sent / one_way, "1 link"
    ways = sum(2 if n == topology.sides[d] and n % topology.generation.wraps == 0 else 1 for d, n in enumerate(extent) if n > 1)
    return sent / (one_way * max(ways, 1)), f"{max(ways, 1)} link{'s' * (ways > 1)}"
