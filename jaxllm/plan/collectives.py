"""Every collective of a compiled step: by which mesh axis, how often, how many bytes, how long on its link."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from jaxllm.plan.cycles import of_instruction
from jaxllm.plan.hlo import Instruction, Module, array_bytes, runs

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")

MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    axis: str  # "fsdp", "data x fsdp", or "none" for a group of one
    group: tuple[int, ...]  # one of its groups: places in the mesh, flattened
    payload: float  # bytes of the whole array: gathered, reduced, or sent
    times: int  # a step
    source: str  # op_name: where in the traced program it comes from

    @property
    def sent(self) -> float:
        """Returns the bytes that each device sends in one run, by the ring algorithms."""
        n = max(len(self.group), 1)
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1, "collective-broadcast": 1}
        return self.payload * share.get(self.kind, (n - 1) / n)


def read(module: Module, sizes: dict[str, int], dcn: dict[str, int] | None = None) -> list[Collective]:
    """Returns the collectives of one step on a mesh of these axes, slowest first.

    A collective that the compiler spread over several fusions, to run it beside other work, appears in each of them under
    one channel: it is counted once. A reduce-scatter may be a fusion that holds an all-reduce and a cut. What goes to other
    slices is sent through the host and named beside the sending; `dcn`: how many slices each axis goes over.
    """
    found, seen, scattered = [], set(), set()
    for i, times in runs(module, of_instruction):
        if i.opcode == "send" and (over := re.search(r'_xla_megascale_transfer_type="(\w+)"', i.rest)):
            group = across(sizes, dcn or {})
            named = over[1].lower().replace("_", "-")
            found.append(Collective(named, axis_of(group, sizes), group, array_bytes(i.shape)[0], times, i.op_name))
        kind = i.opcode.removesuffix("-start")
        if i.opcode == "fusion" and i.called.get("calls", "").startswith("all-reduce-scatter"):
            scattered |= set(module.computations[i.called["calls"]])
        if kind not in KINDS:
            continue
        kind = "reduce-scatter" if i in scattered else kind
        channel = re.search(r"channel_id=(\d+)", i.rest)
        if "chain_id=" in i.rest and channel:
            if (channel[1], times) in seen:
                continue
            seen.add((channel[1], times))
        found.append(_collective(kind, i, times, sizes))
    return [c for c in found if len(c.group) > 1]


def across(sizes: dict[str, int], dcn: dict[str, int]) -> tuple[int, ...]:
    """Returns the first device of each slice: an axis that goes over several has an equal part in each of them."""
    first = np.ix_(*[[k * n // dcn.get(axis, 1) for k in range(dcn.get(axis, 1))] for axis, n in sizes.items()])
    return tuple(int(d) for d in np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))[first].ravel())


def _collective(kind: str, i: Instruction, times: int, sizes: dict[str, int]) -> Collective:
    if kind == "collective-permute":
        first = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", i.rest)
        group = (int(first[1]), int(first[2])) if first else ()
    else:
        group = groups(i.rest, math.prod(sizes.values()))
    arrays = array_bytes(i.shape)
    if i.opcode.endswith("-start"):  # (what goes in, what comes out, contexts); an all-reduce's is what comes out
        arrays = arrays if kind == "all-reduce" else [max(arrays)]
    payload = sum(arrays) * (len(group) if i.opcode == "reduce-scatter" else 1)  # a part comes out
    return Collective(kind, axis_of(group, sizes), group, payload, times, i.op_name)


def groups(text: str, n_devices: int) -> tuple[int, ...]:
    """Returns the first of an instruction's replica groups, written in any of XLA's three ways; raises on a fourth."""
    if found := MESH_GROUPS.search(text):
        dims = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
        ids = transposed(found[2] or str(math.prod(dims.values())), found[3])
        shape, names, used = [], [], []
        for name, n in dims.items():
            part = re.search(rf"'{re.escape(name)}'(?::\((\d+)\)(\d+))?", found[4])
            if part and part[1]:  # a part of the axis: (what is left of it)its size
                pre, size = int(part[1]), int(part[2])
                shape += [pre, size, n // pre // size]
                names += [f"{name}<", name, f"{name}>"]
            else:
                shape.append(n)
                names.append(name)
            used += [name] if part else []
        grid = ids.reshape(shape)
        return tuple(int(d) for d in grid[tuple(slice(None) if n in used else 0 for n in names)].ravel())
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return tuple(int(d) for d in transposed(found[3], found[4]).reshape(int(found[1]), int(found[2]))[0])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(int(d) for d in found[1].split(","))
    if "replica_groups=" in text and "replica_groups={}" not in text:
        raise ValueError(f"replica groups that cannot be read: {text[text.index('replica_groups='):][:200]}")
    return tuple(range(n_devices))  # none given: all of them


def transposed(dims: str, axes: str | None) -> np.ndarray:
    """Returns 0, 1, 2, … in an array of these dimensions, its axes in another order: "2,4", "1,0"."""
    shape = [int(d) for d in dims.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(a) for a in axes.split(",")]) if axes else ids


def axis_of(group: Sequence[int], sizes: dict[str, int]) -> str:
    """Returns the mesh axes along which a group's members differ, outermost first."""
    if len(group) < 2:
        return "none"
    places = np.array(np.unravel_index(np.array(group), tuple(sizes.values())))
    axes = [axis for axis, row in zip(sizes, places, strict=True) if len(set(row.tolist())) > 1]
    return " x ".join(axes)


def table(found: Sequence[Collective], seconds: Callable[[Collective], float]) -> list[dict]:
    """Returns one row for each axis and kind, dearest first: runs a step, megabytes a device sends, seconds on the link."""
    rows: dict[tuple[str, str], dict] = {}
    for c in found:
        row = rows.setdefault((c.axis, c.kind), {"axis": c.axis, "kind": c.kind, "in_program": 0, "times": 0, "sent_gb": 0.0,
                                                 "seconds": 0.0})
        row["in_program"] += 1
        row["times"] += c.times
        row["sent_gb"] += c.sent * c.times / 1e9
        row["seconds"] += seconds(c) * c.times
    return sorted(rows.values(), key=lambda row: -row["seconds"])


def per_layer(found: Sequence[Collective], n_layers: int) -> dict[str, int]:
    """Returns how many collectives of each axis and kind one layer takes, forward, recomputed and backward together.

    The loops inside of a `shard_map` are the loss's chunks, not layers.
    """
    out: dict[str, int] = {}
    for c in found:
        if c.times % n_layers == 0 and c.times > 1 and not re.search(r"shard_map/(.*/)?while", c.source):
            out[f"{c.axis} {c.kind}"] = out.get(f"{c.axis} {c.kind}", 0) + c.times // n_layers
    return out
