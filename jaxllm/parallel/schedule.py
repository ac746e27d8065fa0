"""Pipeline schedules as tables: who computes what at which tick. Pure Python; pipeline.py runs any of them.

A model's layers are cut into p·v pieces, the virtual stages; piece c·p + s is chunk c of stage s. A table has a row for
each tick and in it a cell for each stage: None, or one operation of one micro-batch and chunk. An operation may start a
tick after those it needs have ended. m micro-batches, p stages, v chunks a stage.
"""

import dataclasses
import difflib
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from jaxllm.errors import UserError

FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"  # a backward is whole, or in two: by the input, by the weights


class Op(NamedTuple):
    kind: str
    micro: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    name: str
    stages: int
    micro_batches: int
    virtual_stages: int  # chunks of each stage
    rows: tuple[tuple[Op | None, ...], ...]  # [tick][stage]

    def virtual(self, stage: int, op: Op) -> int:
        """Returns which of the p·v pieces an operation belongs to, in the model's order."""
        return op.chunk * self.stages + stage

    @property
    def split_backward(self) -> bool:
        return any(op and op.kind == WEIGHT for row in self.rows for op in row)

    def when(self) -> dict[tuple[str, int, int], int]:
        """Returns {(kind, micro-batch, virtual stage): tick}."""
        cells = ((t, s, op) for t, row in enumerate(self.rows) for s, op in enumerate(row) if op)
        return {(op.kind, op.micro, self.virtual(s, op)): t for t, s, op in cells}

    def idle(self) -> Fraction:
        """Returns the share of cells without work: the bubble."""
        cells = [op for row in self.rows for op in row]
        return Fraction(cells.count(None), len(cells))

    def live(self) -> list[int]:
        """Returns for each stage the most (micro-batch, chunk) pairs that it holds at once, from forward to last backward."""
        last = WEIGHT if self.split_backward else BACKWARD
        most = []
        for s in range(self.stages):
            held, peak = 0, 0
            for op in (row[s] for row in self.rows):
                held += op is not None and op.kind == FORWARD
                peak = max(peak, held)
                held -= op is not None and op.kind == last
            most.append(peak)
        return most


# ---------------------------------------------------------------- the schedules: an order of operations for each stage


def gpipe(p: int, m: int, v: int = 1) -> list[list[Op]]:
    """All forwards, then all backwards (Huang et al. 2019)."""
    return [[Op(kind, i, 0) for kind in (FORWARD, BACKWARD) for i in range(m)]] * p


def one_f_one_b(p: int, m: int, v: int = 1) -> list[list[Op]]:
    """A backward as soon as there is one, so that p micro-batches are live and not m (Narayanan et al. 2019)."""
    return interleaved(p, m, 1)


def interleaved(p: int, m: int, v: int) -> list[list[Op]]:
    """1F1B over v chunks a stage, p micro-batches at a time through each: a bubble v times smaller (Narayanan et al. 2021)."""

    def nth(kind, k):  # the k-th forward or backward of any stage
        if v == 1:
            return Op(kind, k, 0)
        chunk = k % (p * v) // p
        return Op(kind, k // (p * v) * p + k % p, chunk if kind == FORWARD else v - 1 - chunk)

    orders = []
    for s in range(p):
        ahead = p - 1 - s if v == 1 else 2 * (p - 1 - s) + (v - 1) * p
        ahead = min(ahead, m * v)  # forwards before the first backward
        order = [nth(FORWARD, k) for k in range(ahead)]
        for k in range(m * v - ahead):
            order += [nth(FORWARD, ahead + k), nth(BACKWARD, k)]
        orders.append(order + [nth(BACKWARD, k) for k in range(m * v - ahead, m * v)])
    return orders


def zero_bubble(p: int, m: int, v: int = 1) -> list[list[Op]]:
    """ZB-H1 (Qi et al. 2023): 1F1B whose weight parts wait, on stage s for s more micro-batches, and fill what was idle."""
    orders = []
    for s in range(p):
        order = [Op(FORWARD, i, 0) for i in range(min(p - s, m))]
        for i in range(m):
            order.append(Op(INPUT, i, 0))
            if i >= s:
                order.append(Op(WEIGHT, i - s, 0))
            if i + p - s < m:
                order.append(Op(FORWARD, i + p - s, 0))
        orders.append(order + [Op(WEIGHT, i, 0) for i in range(max(m - s, 0), m)])
    return orders


@dataclasses.dataclass(frozen=True)
class Kind:
    """A schedule's table maker, and what is known of its tables (ticks of one length)."""

    orders: Callable[[int, int, int], list[list[Op]]]
    idle: Callable[[int, int, int], Fraction]  # share of cells without work
    formula: str
    live: Callable[[int, int, int], list[int]]  # most (micro-batch, chunk) pairs held, by stage


def _plain_idle(p, m, v):
    return Fraction(p - 1, m + p - 1)


KINDS = {
    "gpipe": Kind(gpipe, _plain_idle, "(p-1)/(m+p-1)", lambda p, m, v: [m] * p),
    "1f1b": Kind(one_f_one_b, _plain_idle, "(p-1)/(m+p-1)", lambda p, m, v: [min(p - s, m) for s in range(p)]),
    "interleaved": Kind(interleaved, lambda p, m, v: Fraction(p - 1, v * m + p - 1), "(p-1)/(v*m+p-1)",
                        lambda p, m, v: [min(2 * (p - 1 - s) + (v - 1) * p + 1, m * v) for s in range(p)]),
    # With forward, input and weight parts of equal length the paper's bubble (p-1)(F + I - W) is p-1 ticks
    "zero_bubble": Kind(zero_bubble, lambda p, m, v: Fraction(p - 1 + max(p - m, 0), 3 * m + p - 1 + max(p - m, 0)),
                        "b/(3*m+b), b = p-1+max(p-m, 0),", lambda p, m, v: [min(p, m)] * p),
}


def make(name: str, stages: int, micro_batches: int, virtual_stages: int = 1) -> Schedule:
    """Returns a schedule's table; raises UserError for what there is no table of."""
    check(name, stages, micro_batches, virtual_stages)
    orders = KINDS[name].orders(stages, micro_batches, virtual_stages)
    return Schedule(name, stages, micro_batches, virtual_stages, earliest(orders, virtual_stages))


def check(name: str, stages: int, micro_batches: int, virtual_stages: int) -> None:
    """Raises UserError, in one line, when no such table exists."""
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"schedule {name!r}: should be one of {', '.join(KINDS)}{hint}")
    if stages < 2:
        raise UserError(f"schedule {name!r}: a pipeline needs at least 2 stages, found {stages}")
    if name == "interleaved" and virtual_stages < 2:
        raise UserError(f"schedule 'interleaved' needs virtual_stages of 2 or more, found {virtual_stages}; 1 is '1f1b'")
    if name != "interleaved" and virtual_stages != 1:
        raise UserError(f"virtual_stages={virtual_stages}: schedule {name!r} has 1 a stage; 'interleaved' takes more")
    if name == "interleaved" and micro_batches % stages:
        raise UserError(f"micro_batches={micro_batches} is not a multiple of the {stages} stages, which schedule 'interleaved' "
                        f"needs; nearest: {max(round(micro_batches / stages), 1) * stages}")


def too_few(schedule: Schedule) -> str | None:
    """Returns a warning when there are fewer micro-batches than stages, else None."""
    p, m = schedule.stages, schedule.micro_batches
    if m >= p:
        return None
    better = KINDS[schedule.name].idle(p, 4 * p, schedule.virtual_stages)
    return (f"{m} micro-batches are few for {p} stages: {float(schedule.idle()):.0%} of the ticks are idle; "
            f"{4 * p} would leave {float(better):.0%}")


def earliest(orders: list[list[Op]], virtual_stages: int) -> tuple[tuple[Op | None, ...], ...]:
    """Returns the table in which each stage goes through its order, every operation as early as what it needs allows."""
    p, last = len(orders), len(orders) * virtual_stages - 1
    ended: dict[tuple[str, int, int], int] = {}
    rows, at = [], [0] * p

    def needs(op, v):
        if op.kind == FORWARD:
            return [(FORWARD, op.micro, v - 1)] if v else []
        if op.kind == WEIGHT:
            return [(INPUT, op.micro, v)]
        return [(FORWARD, op.micro, v)] + ([(op.kind, op.micro, v + 1)] if v < last else [])

    while any(i < len(order) for i, order in zip(at, orders, strict=True)):
        row: list[Op | None] = []
        for s, (i, order) in enumerate(zip(at, orders, strict=True)):
            op = order[i] if i < len(order) else None
            ready = op and all(ended.get(n, len(rows)) < len(rows) for n in needs(op, op.chunk * p + s))
            row.append(op if ready else None)
        assert any(row), f"deadlock at tick {len(rows)}: {[o[i:i + 1] for i, o in zip(at, orders, strict=True)]}"
        for s, op in enumerate(row):
            if op:
                ended[op.kind, op.micro, op.chunk * p + s] = len(rows)
                at[s] += 1
        rows.append(tuple(row))
    return tuple(rows)
