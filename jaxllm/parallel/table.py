"""A schedule in the form that the program reads: columns of numbers, with a place in memory for whatever must wait."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from jaxllm.parallel.schedule import BACKWARD, FORWARD, INPUT, WEIGHT, Schedule

CODES = {None: 0, FORWARD: 1, BACKWARD: 2, INPUT: 2, WEIGHT: 3}  # a table has whole backwards or split ones, never both


@dataclasses.dataclass(frozen=True)
class Table:
    """int32 columns [tick, stage]; the slot after the last one takes what nobody waits for.

    op, micro, chunk: what is computed; first, last: 1 where it is the model's first or last piece; x, g: slots of the
    piece's input and of the gradient of its output; w: slot of what the input part of a backward leaves for the weight
    part; x_arrives, g_arrives: slots of what the neighbours sent a tick before.
    """

    columns: dict[str, np.ndarray]
    x_slots: int
    g_slots: int
    w_slots: int


def lower(schedule: Schedule) -> Table:
    """Returns the columns of a schedule. The last piece's forward is left out: its backward does it anyway."""
    when, last = schedule.when(), schedule.stages * schedule.virtual_stages - 1
    backward = INPUT if schedule.split_backward else BACKWARD
    x_waits, g_waits, w_waits = [], [], []  # (from the end of tick, to tick, virtual stage, micro-batch)
    for (kind, i, v), t in when.items():
        if kind == FORWARD and v < last:
            x_waits.append((t, when[backward, i, v + 1], v + 1, i))
        if kind == backward and v > 0:
            g_waits.append((t, when[backward, i, v - 1], v - 1, i))
        if kind == INPUT:
            w_waits.append((t - 1, when[WEIGHT, i, v], v, i))  # its slot is written within the tick
    x_slot, x_slots = allocate(x_waits, schedule.stages)
    g_slot, g_slots = allocate(g_waits, schedule.stages)
    w_slot, w_slots = allocate(w_waits, schedule.stages)

    shape = len(schedule.rows), schedule.stages
    columns = {name: np.zeros(shape, np.int32) for name in ("op", "micro", "chunk", "first", "last", "x", "g", "w")}
    columns |= {"x_arrives": np.full(shape, x_slots, np.int32), "g_arrives": np.full(shape, g_slots, np.int32)}
    for t, row in enumerate(schedule.rows):
        for s, op in enumerate(row):
            if op is None:
                continue
            v = schedule.virtual(s, op)
            idle = op.kind == FORWARD and v == last
            cell = {"op": 0 if idle else CODES[op.kind], "micro": op.micro, "chunk": op.chunk, "first": v == 0,
                    "last": v == last, "x": x_slot.get((v, op.micro), 0), "g": g_slot.get((v, op.micro), 0),
                    "w": w_slot.get((v, op.micro), 0)}
            for name, value in cell.items():
                columns[name][t, s] = value
    for name, waits, slots in (("x_arrives", x_waits, x_slot), ("g_arrives", g_waits, g_slot)):
        for t, _, v, i in waits:
            columns[name][t + 1, v % schedule.stages] = slots[v, i]
    return Table(columns, x_slots, g_slots, w_slots)


def allocate(waits: Iterable[tuple[int, int, int, int]], stages: int) -> tuple[dict[tuple[int, int], int], int]:
    """Returns {(virtual stage, micro-batch): slot} and how many slots the fullest stage needs: first come, first free."""
    busy_until: list[list[int]] = [[] for _ in range(stages)]
    slots = {}
    for start, end, v, i in sorted(waits):
        ends = busy_until[v % stages]
        slot = next((k for k, until in enumerate(ends) if until <= start), len(ends))
        ends[slot:slot + 1] = [end]
        slots[v, i] = slot
    return slots, max(map(len, busy_until))
