"""What went wrong when a loss or a gradient is no longer a number."""

import math

import jax

from jaxllm.partition import leaf_name


def leaf_names(params) -> list[str]:
    """Returns the parameters' names, in the order of `finite_leaves`."""
    return [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def not_finite(names: list[str], metrics: dict) -> str | None:
    """Returns which number of a step is NaN or infinite and where it first shows, or None when all are finite.

    A parameter that already is not finite is the cause, so it is named before a gradient is.
    """
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
        return None
    what = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
    for kind, finite in (("parameter", metrics["finite_params"]), ("gradient of", metrics["finite_grads"])):
        bad = [name for name, ok in zip(names, finite, strict=True) if not ok]
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            return f"{what}: not finite: {kind} {bad[0]}{more}"
    return f"{what}: every parameter and gradient is finite, their sum of squares is not"
