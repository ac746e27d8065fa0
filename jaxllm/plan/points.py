"""The runs that a law is fitted to: sizes, tokens and losses of run folders or a CSV; what is left out is named, with why."""

import csv
import dataclasses
import math
import pathlib

import numpy as np

from jaxllm import config
from jaxllm.errors import UserError
from jaxllm.model.config import ModelConfig
from jaxllm.report.law import SCHEDULE
from jaxllm.report.read import Run, is_run, read_runs
from jaxllm.report.summary import at_least, mean_of_last, planned_steps
from jaxllm.train.flops import active_parameter_count, parameter_count

COLUMNS = {  # what a CSV may call them, compared without case, spaces and underscores
    "parameters": ("n", "params", "parameters", "modelsize", "nparams", "numparams", "activeparameters",
                   "activeparams"),
    "tokens": ("d", "tokens", "trainingtokens", "ntokens", "datasetsize"),
    "flops": ("c", "flops", "trainingflop", "trainingflops", "compute"),
    "loss": ("l", "loss", "finalloss", "evalloss", "valloss"),
    "experts": ("experts", "nexperts", "numexperts"),
    "name": ("name", "run", "id", "label"),
}
BINS = 40  # a training curve is averaged over so many spans of tokens, even in their logarithm
WARM = 0.1  # of a run's tokens that its curve leaves out: warm-up
ROSE = 1.05  # a run diverged whose loss ended so many times above its own lowest,
NOISES = 4.0  # and by so many standard errors: the lowest of many noisy spans is lower than it should be


@dataclasses.dataclass(frozen=True)
class Point:
    """One finished run."""

    name: str
    parameters: float  # those that a token meets
    tokens: float
    loss: float
    experts: float = 1.0  # of a sparse layer; 1: dense
    curve: tuple[np.ndarray, np.ndarray] | None = None  # tokens and losses on the way there
    schedule: dict | None = None  # the settings that decide the curve's shape


@dataclasses.dataclass(frozen=True)
class Points:
    """All runs that count, and those that do not with the reason."""

    runs: list[Point]
    excluded: list[tuple[str, str]]
    loss: str  # what loss it is

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the sizes, tokens and losses."""
        return tuple(np.array([getattr(r, name) for r in self.runs]) for name in ("parameters", "tokens", "loss"))

    def without(self, names: dict[str, str]) -> "Points":
        """Returns the runs but these; `names` says why."""
        return Points([r for r in self.runs if r.name not in names], self.excluded + list(names.items()), self.loss)


def read(paths: tuple[str, ...], loss: str = "auto") -> Points:
    """Returns the runs of folders (also a folder of run folders) or of one CSV; raises UserError for what is neither."""
    found = [pathlib.Path(p) for p in paths]
    tables = [p for p in found if p.suffix.lower() in (".csv", ".tsv")]
    if tables and len(found) > 1:
        raise UserError(f"{tables[0]}: give one CSV alone, or run folders; found {len(found)} paths")
    if tables:
        return read_csv(tables[0])
    folders = [f for p in found for f in (sorted(x for x in p.glob("*") if is_run(x)) if p.is_dir() and not is_run(p) else [p])]
    if not folders:
        raise UserError(f"{found[0]}: holds no run folder (one with metrics.jsonl and config.yaml)")
    return of_runs(read_runs(list(dict.fromkeys(folders))), loss)


# ---------------------------------------------------------------- run folders


def of_runs(runs: list[Run], loss: str = "auto") -> Points:
    """Returns the finished runs. Held-out losses where every run that finished has one, else training losses."""
    why = {run.name: reason for run in runs if (reason := unusable(run)) is not None}
    good = [run for run in runs if run.name not in why]
    lacking = [run.name for run in good if not len(run.series("eval_loss").value)]
    if loss == "eval" and lacking:
        raise UserError(f"{lacking[0]}: has no held-out loss (train.eval_every); use --loss=train")
    held_out = loss == "eval" or (loss == "auto" and not lacking)
    points = []
    for run in good:
        end = run.series("eval_loss").value[-1] if held_out else mean_of_last(run.series("loss").value)
        experts, idle = sparse(run)
        points.append(Point(run.name, float(run.config["parameters"] - idle), float(run.series("loss").tokens[-1]), float(end),
                            experts, curve(run), {key: run.setting(f"optim.{key}") for key in SCHEDULE}))
    return Points(points, list(why.items()), "held-out loss" if held_out else "training loss, the mean of its end")


def sparse(run: Run) -> tuple[float, int]:
    """Returns (the number of experts, the parameters of those that a token does not go to): 1 and 0 of a dense model."""
    if not (experts := run.setting("model.moe.experts")):
        return 1.0, 0
    cfg = config.of_tree(ModelConfig, run.config["model"] | {"vocab_size": 1}, str(run.folder / "config.yaml"))
    return float(experts), sum(parameter_count(cfg).values()) - active_parameter_count(cfg)


def unusable(run: Run) -> str | None:
    """Returns why a run cannot count: it diverged, was not finished, or does not say its size; None where it can."""
    series = run.series("loss")
    if not len(series.value):
        stopped = any(x.get("kind") == "not_finite" for x in run.incidents)
        return "diverged: stopped before a loss was logged, where it was not finite" if stopped else "no loss was logged"
    if not np.isfinite(series.value[-1]):
        return f"diverged: the loss is {series.value[-1]} at step {int(series.step[-1])}"
    if any(x.get("kind") == "not_finite" and x.get("step", 0) >= series.step[-1] for x in run.incidents):
        return f"diverged: stopped after step {int(series.step[-1])}, where the loss was not finite"
    at, smooth = averaged(series.tokens, series.value)
    low = at_least(smooth)
    if low is not None and smooth[-1] > ROSE * smooth[low] + NOISES * error_of_rise(series.tokens, series.value, at, low):
        return f"diverged: the loss ended at {smooth[-1]:.3g}, {smooth[-1] / smooth[low] - 1:.0%} above its lowest"
    if (planned := planned_steps(run)) and series.step[-1] < planned:
        return f"not finished: step {int(series.step[-1]):,} of {planned:,}, so its learning rate was still high"
    if not isinstance(run.config.get("parameters"), (int, float)):
        return "config.yaml does not say its parameters"
    if not np.isfinite(series.tokens[-1]):
        return "metrics.jsonl does not say its tokens"
    return None


def error_of_rise(tokens: np.ndarray, losses: np.ndarray, spans: np.ndarray, low: int) -> float:
    """Returns the standard error of the last span's mean less that of span `low`, by how lines differ from the next."""
    late = losses[len(losses) // 2:]
    late = late[np.isfinite(late)]
    if len(late) < 3 or len(spans) < 2:
        return 0.0
    edges = np.sqrt(spans[1:] * spans[:-1])
    lines = np.bincount(np.searchsorted(edges, tokens[np.isfinite(tokens)]), minlength=len(spans))
    # of differences of normal numbers the median size is 0.954 standard deviations
    line = float(np.median(np.abs(np.diff(late)))) / 0.954
    return line * math.sqrt(1 / max(lines[-1], 1) + 1 / max(lines[low], 1))


def curve(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Returns a run's training curve after warm-up, averaged over spans of tokens."""
    tokens, losses = averaged(run.series("loss").tokens, run.series("loss").value)
    late = tokens >= WARM * tokens[-1]
    return tokens[late], losses[late]


def averaged(tokens: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the means over spans that are even in the logarithm of tokens; values that are not finite are left out."""
    good = np.isfinite(tokens) & np.isfinite(losses) & (tokens > 0)
    t, y = tokens[good], losses[good]
    if len(t) < 2:
        return t, y
    edges = np.geomspace(t[0], t[-1] * (1 + 1e-9), BINS + 1)
    span = np.clip(np.searchsorted(edges, t, side="right") - 1, 0, BINS - 1)
    count = np.bincount(span, minlength=BINS)
    used = count > 0
    return (np.bincount(span, t, BINS)[used] / count[used], np.bincount(span, y, BINS)[used] / count[used])


# ---------------------------------------------------------------- a table


def read_csv(path: pathlib.Path) -> Points:
    """Returns the rows of a CSV with parameters, loss, and tokens or flops (6 N D); rows whose loss is no number are named."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            rows = list(csv.DictReader(f, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if not rows:
        raise UserError(f"{path}: holds no row; should begin with a line of names: parameters,tokens,loss")
    column = named(path, [name for name in rows[0] if name is not None])
    points, excluded, used = [], [], set()
    for i, row in enumerate(rows, 2):
        if None in row:  # a loss of 3,05 would be taken for 3
            raise UserError(f"{path}: line {i}: has {len(row[None])} cells more than the line of names; a decimal comma?")
        name = row.get(column.get("name", ""), "") or f"line {i}"
        name = f"{name} (line {i})" if name in used else name
        used.add(name)
        n = number(path, i, column["parameters"], row)
        d = number(path, i, column["tokens"], row) if "tokens" in column else number(path, i, column["flops"], row) / (6 * n)
        x = number(path, i, column["experts"], row) if "experts" in column else 1.0
        y = number(path, i, column["loss"], row, lenient=True)
        if math.isfinite(y) and y > 0:
            points.append(Point(name, n, d, y, x))
        else:
            told = (row[column["loss"]] or "").strip()
            excluded.append((name, f"diverged: the loss is {told}" if told else "no loss is given"))
    return Points(points, excluded, f"{column['loss']} of {path.name}")


def named(path: pathlib.Path, header: list[str]) -> dict[str, str]:
    """Returns {what: the column's name}; raises UserError that says which is missing."""
    plain = {"".join(c for c in name.lower() if c.isalnum()): name for name in header}
    found = {what: plain[alias] for what, aliases in COLUMNS.items() for alias in reversed(aliases) if alias in plain}
    for what, hint in (("parameters", "N"), ("loss", "loss")):
        if what not in found:
            raise UserError(f"{path}: has no column {what!r} (or {hint!r}); found: {', '.join(header)}")
    if "tokens" not in found and "flops" not in found:
        raise UserError(f"{path}: has no column 'tokens' (or 'D'), nor 'flops' to make it of; found: {', '.join(header)}")
    return found


def number(path: pathlib.Path, line: int, column: str, row: dict, *, lenient: bool = False) -> float:
    text = (row.get(column) or "").strip()
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        if lenient and text.lower() in ("", "-", "na", "none", "null", "diverged"):
            return math.nan
        raise UserError(f"{path}: line {line}: {column}={text!r}: should be a number") from None
    if not lenient and not (math.isfinite(value) and value > 0):
        raise UserError(f"{path}: line {line}: {column}={text}: should be above 0")
    return value
