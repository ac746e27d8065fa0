"""What a run folder says: its curves, samples, incidents and settings. Files only: no jax, nothing of the trainer.

A run may be live, or its writer may have been killed in the middle of a line: what cannot be read is counted, not fatal.
"""

import dataclasses
import difflib
import json
import math
import pathlib
from typing import NamedTuple

import numpy as np
import yaml

from jaxllm.errors import UserError

FILES = ("metrics.jsonl", "config.yaml", "samples.jsonl", "incidents.jsonl")


class Series(NamedTuple):
    """One curve: the lines of a run's metrics that have its key. Values may be NaN or infinite."""

    step: np.ndarray
    tokens: np.ndarray
    value: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
    """One run folder, read."""

    folder: pathlib.Path
    name: str
    lines: list[dict]  # of metrics.jsonl, by step
    samples: list[dict]
    incidents: list[dict]
    config: dict
    unread: int  # lines and files that could not be read
    kept: dict[str, Series] = dataclasses.field(default_factory=dict, repr=False)  # series made so far

    def series(self, key: str) -> Series:
        if key not in self.kept:
            found = [(x["step"], number(x.get("tokens")), number(x[key])) for x in self.lines if key in x]
            self.kept[key] = Series(*np.array(found, float).reshape(-1, 3).T)
        return self.kept[key]

    def setting(self, dotted: str):
        """Returns a setting such as "train.steps"; None when the config does not have it."""
        value = self.config
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def read_runs(folders) -> list[Run]:
    """Returns the runs, named so that no two are alike; raises UserError for a folder that is no run."""
    folders = [pathlib.Path(f) for f in folders]
    return [read_run(f, name) for f, name in zip(folders, names(folders), strict=True)]


def read_run(folder, name: str | None = None) -> Run:
    """Returns what the folder holds; raises UserError when it is missing or no run."""
    folder = pathlib.Path(folder)
    check(folder)
    lines, bad = read_lines(folder / "metrics.jsonl")
    samples, bad_samples = read_lines(folder / "samples.jsonl")
    incidents, bad_incidents = read_lines(folder / "incidents.jsonl")
    config, bad_config = read_config(folder)
    return Run(
        folder=folder, name=name or folder.resolve().name, lines=by_step(lines),
        samples=[s for s in samples if isinstance(s.get("text"), str)], incidents=incidents, config=config,
        unread=bad + bad_samples + bad_incidents + bad_config,
    )


def last_line(folder, key: str) -> dict:
    """Returns the last line of a run's metrics that has `key`; {} when there is none."""
    lines, _ = read_lines(pathlib.Path(folder) / "metrics.jsonl")
    return next((line for line in reversed(lines) if key in line), {})


def check(folder: pathlib.Path) -> None:
    """Raises UserError unless the folder holds a run; names the run folder that may have been meant."""
    if not folder.exists():
        beside = [p for p in folder.parent.glob("*") if is_run(p)] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, [p.name for p in beside], 1, cutoff=0.4)
        hint = f"; did you mean {folder.parent / near[0]}?" if near else shown("; runs there: ", beside)
        raise UserError(f"{folder}: no such folder{hint}")
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; give the run's folder{f': {folder.parent}' if is_run(folder.parent) else ''}")
    if not is_run(folder):
        inside = [p for p in folder.glob("*") if is_run(p)]
        raise UserError(f"{folder}: not a run folder (neither metrics.jsonl nor config.yaml){shown('; runs in it: ', inside)}")


def is_run(folder: pathlib.Path) -> bool:
    return folder.is_dir() and any((folder / name).is_file() for name in FILES[:2])


def shown(before: str, folders: list[pathlib.Path]) -> str:
    names = [str(p) for p in sorted(folders)]
    return before + ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else ""


def names(folders: list[pathlib.Path]) -> list[str]:
    """Returns the shortest ends of the paths that tell them apart; raises UserError when two are one folder."""
    parts = [f.resolve().parts for f in folders]
    for folder, p in zip(folders, parts, strict=True):
        if parts.count(p) > 1:
            raise UserError(f"{folder}: given more than once")
    n = 1
    while len({p[-n:] for p in parts}) < len(parts):
        n += 1
    return ["/".join(p[-n:]) for p in parts]


def read_lines(path: pathlib.Path) -> tuple[list[dict], int]:
    """Returns (the objects of a JSON-lines file, the number of lines that are none); ([], 0) without the file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return [], 0
    except OSError:
        return [], 1
    found, bad = [], 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            bad += 1
    return found, bad


def read_config(folder: pathlib.Path) -> tuple[dict, int]:
    try:
        read = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, 0
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}, 1
    return (read, 0) if isinstance(read, dict) else ({}, 1)


def by_step(lines: list[dict]) -> list[dict]:
    """Returns the lines in the order of their steps; of two of one step and kind the later counts."""
    latest = {(x["step"], any(k.startswith("eval_") for k in x)): x for x in lines if isinstance(x.get("step"), int)}
    return [latest[key] for key in sorted(latest)]


def number(value) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
