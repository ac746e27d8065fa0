"""Failures of a long run: how often it restarts, how often to save, and the share of the time that is work.

A run stops when any of its chips fails, so the time between failures is a chip's divided by their number. With
exponential times between failures of mean M, a save that costs s and a restart that costs r, a run that saves every t of
work takes M exp(r/M) (exp((t + s)/M) - 1) for each t (Daly 2006, "A higher order estimate of the optimum checkpoint
interval for restart dumps", equation 20).
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Failures:
    """What to expect of a run; times in seconds."""

    between: float  # mean time between failures of the whole run
    restarts: float
    young: float  # work between two saves, by Young
    daly: float  # the same, by Daly
    goodput: float  # share of the time that is work which was not lost, at Daly's interval
    wall: float  # what the work takes with saves, losses and restarts


def young(save: float, between: float) -> float:
    """Returns the best work between two saves to first order: sqrt(2 s M) (Young 1974)."""
    return math.sqrt(2 * save * between)


def daly(save: float, between: float) -> float:
    """Returns the best work between two saves to higher order (Daly 2006, equation 37)."""
    if save >= 2 * between:
        return between
    x = math.sqrt(save / (2 * between))
    return math.sqrt(2 * save * between) * (1 + x / 3 + x * x / 9) - save


def goodput(work: float, save: float, restart: float, between: float) -> float:
    """Returns work done over time taken, where each `work` is followed by a save (Daly 2006, equation 20)."""
    if (work + save + restart) / between > 700:  # nothing of this length ever gets done
        return 0.0
    return work / (between * math.exp(restart / between) * math.expm1((work + save) / between))


def expect(work: float, chips: int, chip_hours: float, save: float, restart: float) -> Failures:
    """Returns what a run of `work` seconds on `chips` has to expect, a chip failing once in `chip_hours`."""
    between = chip_hours * 3600 / chips
    every = daly(save, between)
    share = goodput(every, save, restart, between)
    wall = work / share if share else math.inf
    return Failures(between, wall / between, young(save, between), every, share, wall)
