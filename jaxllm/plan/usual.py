"""How far above their law healthy runs are on their way, by the share of it: what a later run is watched by."""

# R runs, X shares of a run's tokens.
import numpy as np

from jaxllm.plan.laws import Parametric
from jaxllm.plan.points import Points
from jaxllm.report.law import BEGIN, SCHEDULE
from jaxllm.report.read import Run

SHARES = np.linspace(BEGIN, 1.0, 19)
HIGH = 0.9  # quantile of the runs that counts as the most a healthy one has


def usual(points: Points, law: Parametric, runs: list[Run]) -> dict | None:
    """Returns what the law file holds of the runs' curves; None where runs differ in schedule or have no curves."""
    kept = {run.name: run for run in runs}
    schedules = [schedule_of(kept[p.name]) for p in points.runs if p.name in kept and p.curve is not None]
    if len(schedules) < len(points.runs) or not schedules or any(one != schedules[0] for one in schedules):
        return None
    middle = float(np.median([p.tokens for p in points.runs]))
    excess_RX = np.stack([_excess(p, law) for p in points.runs if p.tokens >= middle])  # most like the longer runs to come
    return {"share": [round(float(x), 4) for x in SHARES], "schedule": schedules[0],
            "usual": [round(float(x), 5) for x in np.quantile(excess_RX, HIGH, axis=0)]}


def schedule_of(run: Run) -> dict:
    return {key: run.setting(f"optim.{key}") for key in SCHEDULE}


def _excess(point, law: Parametric) -> np.ndarray:
    """Returns the excess of a run's averaged curve over the law, at SHARES."""
    tokens, losses = point.curve
    return np.interp(SHARES, tokens / tokens[-1], losses / law.loss(point.parameters, tokens) - 1)
