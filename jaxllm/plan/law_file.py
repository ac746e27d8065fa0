"""A law of one's own runs as a JSON file: `jaxllm plan fit` writes it, whoever compares with it reads it. No jax here."""

import json
import pathlib

from jaxllm.errors import UserError
from jaxllm.plan.laws import Parametric


def contents(found: dict) -> dict:
    """Returns what a law file holds: the constants first, then where they are from."""
    keys = ("intervals", "level", "runs", "range", "loss", "residual_rms", "excluded")
    return found["law"] | {key: found[key] for key in keys}


def read_law(path) -> Parametric:
    """Returns the law of a law file, for those who compare a run with it; raises UserError for a file that holds none."""
    try:
        held = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        own = Parametric("your fit", f"fitted to your own runs ({path})",
                         **{key: float(held[key]) for key in ("E", "A", "B", "alpha", "beta")})
    except OSError as e:
        raise UserError(f"law_file={path}: cannot be read: {e.strerror}") from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"law_file={path}: should be what `jaxllm plan fit --law_file=FILE` writes: {e!r}") from None
    if min(own.A, own.B, own.alpha, own.beta) <= 0 or own.E < 0:
        raise UserError(f"law_file={path}: A, B, alpha and beta should be above 0 and E at least 0")
    return own
