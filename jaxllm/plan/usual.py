"""How far above their law healthy runs are on their way, by the share of it: what a later run is watched by."""

# R runs, X shares of a run's tokens.
import numpy as np

from jaxllm.plan.laws import Parametric
from jaxllm.plan.points import Point, Points
from jaxllm.report.law import BEGIN

SHARES = np.linspace(BEGIN, 1.0, 19)
HIGH = 0.9  # quantile of the runs that counts as the most a healthy one has


def usual(points: Points, law: Parametric) -> dict | None:
    """Returns what a law file holds of the runs' curves; None where runs differ in schedule or have no curves."""
    runs = points.runs
    if any(run.curve is None or run.schedule != runs[0].schedule for run in runs):
        return None
    middle = float(np.median([run.tokens for run in runs]))
    excess_RX = np.stack([_excess(run, law) for run in runs if run.tokens >= middle])  # most like the longer runs to come
    return {"share": [round(float(x), 4) for x in SHARES], "schedule": runs[0].schedule,
            "usual": [round(float(x), 5) for x in np.quantile(excess_RX, HIGH, axis=0)]}


def _excess(run: Point, law: Parametric) -> np.ndarray:
    """Returns the excess of a run's averaged curve over the law, at SHARES."""
    tokens, losses = run.curve
    return np.interp(SHARES, tokens / tokens[-1], losses / law.loss(run.parameters, tokens) - 1)
