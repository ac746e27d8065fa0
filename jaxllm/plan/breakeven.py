"""Where two cost lines cross: the volume at which one way becomes cheaper than the other."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

POINTS = 400  # of the first look, evenly in log volume
TOLERANCE = 1e-9  # relative, of the volume


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Below `at` the first of the two is cheaper or dearer than above it."""

    at: float
    first_below: bool  # the first is the cheaper one below
    jump: bool  # the lines do not meet: one jumps over the other, as whole servers do


def crossings(first: Callable[[float], float], second: Callable[[float], float], low: float, high: float) -> list[Crossing]:
    """Returns every crossing of two cost lines over `low` .. `high` that is wider than a step of the first look.

    A change of sign between two volumes is halved until it is known to 1e-9 of itself. Lines that are the same over a stretch
    do not cross there.
    """
    def gap(v: float) -> float:
        return first(v) - second(v)

    found, before = [], None  # before: the last volume at which they differ
    for v in np.geomspace(low, high, POINTS):
        g = gap(v)
        if g == 0:
            continue
        if before is not None and (g > 0) != (before[1] > 0):
            found.append(_between(gap, before[0], float(v), before[1]))
        before = float(v), g
    return [Crossing(at, below < 0, jump) for at, below, jump in found]


def _between(gap: Callable[[float], float], low: float, high: float, at_low: float) -> tuple[float, float, bool]:
    below, first = at_low, at_low
    while high - low > TOLERANCE * high:
        middle = math.sqrt(low * high)
        if not low < middle < high:
            break
        g = gap(middle)
        if g == 0:
            return middle, first, False
        if (g > 0) == (first > 0):
            low, below = middle, g
        else:
            high = middle
    above = gap(high)
    # where lines meet, the gap over so short a stretch is as good as nothing against what it was outside
    jump = abs(above - below) > 1e-4 * max(abs(first), abs(gap(high * 1.1)), 1e-12)
    at = high if jump else low + (high - low) * abs(below) / max(abs(below) + abs(above), 1e-300)
    return at, first, jump


def months_to_cross(first_k: np.ndarray, second_k: np.ndarray) -> list[Crossing]:
    """Returns the months at which two cumulated costs meet, given at the end of month 0, 1, ...; a month's cost is even."""
    gap_k, found, before = first_k - second_k, [], None
    for k, gap in enumerate(gap_k):
        if gap == 0:
            continue
        if before is not None and (gap > 0) != (gap_k[before] > 0):
            at = k - 1 if gap_k[k - 1] == 0 else k - 1 + gap_k[k - 1] / (gap_k[k - 1] - gap)
            found.append(Crossing(float(at), bool(gap_k[before] < 0), jump=False))
        before = k
    return found
