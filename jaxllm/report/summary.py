"""The few numbers that stand for a run, out of its logs and settings."""

import datetime
import itertools
import math
import re

import numpy as np

from jaxllm.report.read import Run


def summary(run: Run) -> dict:
    """Returns a run's summary; a key whose value is not known is left out."""
    loss, held_out, bits = run.series("loss"), run.series("eval_loss"), run.series("eval_bits_per_byte")
    out = {"run": str(run.folder), "step": int(max((x["step"] for x in run.lines), default=0)), "steps": planned_steps(run)}
    out["tokens"] = last(run.series("tokens").value)
    out["loss"] = mean_of_last(loss.value)
    for name, series in (("eval_loss", held_out), ("eval_bits_per_byte", bits)):
        out[name] = last(series.value)
        if (best := at_least(series.value)) is not None:
            out[f"best_{name}"], out[f"best_{name}_step"] = float(series.value[best]), int(series.step[best])
    out["eval_perplexity"] = last(run.series("eval_perplexity").value)
    for name, take in (("tokens_per_s", np.median), ("mfu", np.median), ("model_tflops_per_s", np.median),
                       ("host_gb", np.max), ("device_gb", np.max)):
        values = run.series(name).value
        values = values[np.isfinite(values)]
        out[name] = float(take(values)) if len(values) else None
    out["wall_s"] = wall_seconds(run)
    out["parameters"] = run.config.get("parameters")
    out["not_finite"] = int(np.sum(~np.isfinite(loss.value))) or None
    return {k: v for k, v in out.items() if v is not None}


def before_after(lines: list[dict]) -> dict[str, tuple[float, float]]:
    """Returns each evaluated number before the first step and at the last evaluation; {} where the first one is missing."""
    lines = [line for line in lines if any(k.startswith("eval_") for k in line)]
    if len(lines) < 2 or lines[0]["step"] != 0:
        return {}
    return {k: (lines[0][k], lines[-1][k]) for k in lines[-1] if k.startswith("eval_") and k in lines[0]}


def costs(name: str) -> bool:
    """Tells whether an evaluated number is of what pretraining taught: the held-out text's loss, or a few-shot task."""
    return name == "eval_text_loss" or task_of(name) is not None


def task_of(name: str) -> tuple[str, int] | None:
    """Returns (task, exemplars) of the name of a few-shot score, eval_TASK_Kshot; None for another number's."""
    found = re.fullmatch(r"eval_(.+)_(\d+)shot", name)
    return found and (found[1], int(found[2]))


def shown_change(name: str, before: float, after: float) -> tuple[str, str, str]:
    """Returns both numbers and their difference as text, "worse" beside a change for the worse of what pretraining taught."""
    change = after - before
    worse = costs(name) and (change > 0 if name == "eval_text_loss" else change < 0)
    return f"{before:.4f}", f"{after:.4f}", f"{change:+.4f}{', worse' if worse else ''}"


def planned_steps(run: Run) -> int | None:
    """Returns how many steps the settings ask for."""
    for key in ("train.steps", "train.iterations"):
        if isinstance(steps := run.setting(key), int):
            return steps
    parts = [run.setting(key) for key in ("train.tokens", "train.batch_size", "data.seq_len")]
    return math.ceil(parts[0] / (parts[1] * parts[2])) if all(isinstance(p, int) and p > 0 for p in parts) else None


def wall_seconds(run: Run) -> float | None:
    """Returns the time from the first step to the last line, without the pauses between a stop and going on."""
    train = run.series("loss").step
    times, first = run.series("time").value, run.series("step_s").value
    if not len(times) or not np.isfinite(times).all():
        return None
    starts = sorted(x["time"] for x in run.incidents if x.get("kind") == "resumed" and isinstance(x.get("time"), (int, float)))
    total = float(first[0] * train[0]) if len(first) and len(train) and np.isfinite(first[0]) else 0.0
    for before, after in itertools.pairwise(times):
        began = next((s for s in starts if before < s <= after), before)
        total += max(after - began, 0.0)
    return total


def last(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None


def mean_of_last(values: np.ndarray) -> float | None:
    """Returns the mean over the last fortieth of a curve, which one noisy step does not move."""
    finite = values[np.isfinite(values)]
    return float(np.mean(finite[-max(len(finite) // 40, 1):])) if len(finite) else None


def at_least(values: np.ndarray) -> int | None:
    return int(np.nanargmin(values)) if np.isfinite(values).any() else None


def duration(seconds: float) -> str:
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 86400:
        return f"{s // 3600} h {s // 60 % 60:02d} min"
    return f"{s // 86400} d {s // 3600 % 24} h"


def moment(seconds: float) -> str:
    """Returns a time stamp in UTC, to the second."""
    try:
        return datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, OSError, ValueError):
        return str(seconds)
