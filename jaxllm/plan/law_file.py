"""A law of one's own runs as a JSON file: `jaxllm plan fit` and `plan ladder` write it, whoever compares with it reads it.

No jax here.
"""

from jaxllm.plan.laws import Parametric
from jaxllm.report.law import read_constants


def contents(found: dict) -> dict:
    """Returns what a law file holds: the constants first, then where they are from, and the curves that runs are watched by."""
    keys = ("intervals", "level", "runs", "range", "loss", "residual_rms", "excluded")
    return found["law"] | {key: found[key] for key in keys} | ({"watch": found["watch"]} if found.get("watch") else {})


def read_law(path) -> Parametric:
    """Returns the law of a law file, for those who compare a run with it; raises UserError for a file that holds none."""
    constants, _ = read_constants(path, "law_file")
    return Parametric("your fit", f"fitted to your own runs ({path})", **constants)
