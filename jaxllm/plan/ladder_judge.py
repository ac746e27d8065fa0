"""What a ladder tells: the laws of all its runs but the largest, what they say of the largest, and what that one reached.

The largest run never takes part in a fit. A second prediction is made from the runs that are smaller in both size and tokens,
as if the ladder had ended one step lower: that is as far ahead as one would look with it.
"""

import dataclasses
import pathlib

from jaxllm.errors import UserError
from jaxllm.plan import fit
from jaxllm.plan.fit_config import FitVerb, TargetConfig
from jaxllm.plan.ladder_config import LadderVerb
from jaxllm.plan.ladder_runs import Rung
from jaxllm.plan.points import Points, of_runs, unusable
from jaxllm.plan.usual import usual
from jaxllm.report.law import read_law, replayed
from jaxllm.report.read import Run, read_run, read_runs


def judge(cfg: LadderVerb, rungs: list[Rung]) -> tuple[dict, dict]:
    """Returns (what `plan fit` finds of all runs but the last, the largest; what its plots need)."""
    *others, largest = rungs
    found, drawn = fitted(cfg, of_runs(read_runs([rung.folder for rung in others]), "eval"), largest)
    found["watch"] = usual(drawn["points"], drawn["law"])
    return found, drawn


def fitted(cfg: LadderVerb, points: Points, largest: Rung) -> tuple[dict, dict]:
    # Approach 1 would take a training curve for a size with few runs: held-out ends of all sizes compare better.
    ends = dataclasses.replace(points, runs=[dataclasses.replace(run, curve=None) for run in points.runs])
    verb = FitVerb(bootstraps=cfg.bootstraps, level=cfg.level, seed=cfg.seed,
                   target=TargetConfig(parameters=float(largest.parameters), tokens=float(largest.tokens)))
    found, drawn = fit.fit(verb, ends)
    kept = {run.name for run in drawn["points"].runs}
    return found, drawn | {"points": dataclasses.replace(points, runs=[run for run in points.runs if run.name in kept])}


def from_farther(cfg: LadderVerb, rungs: list[Rung], points: Points) -> dict | str:
    """Returns the prediction of the runs that are smaller than the largest in both ways, or why there is none."""
    largest = rungs[-1]
    smaller = {r.name for r in rungs if r.parameters < largest.parameters and r.tokens < largest.tokens}
    try:
        found, _ = fitted(cfg, Points([p for p in points.runs if p.name in smaller], [], points.loss), largest)
    except UserError as e:
        return str(e).partition(";")[0]
    return {"runs": found["runs"]} | {key: found["prediction"][key] for key in ("loss", "law_interval", "run_interval",
                                                                                "times_the_most_compute")}


def compared(cfg: LadderVerb, found: dict, largest: Rung) -> dict | None:
    """Returns the largest run's loss beside what was told of it; None while it is not finished, or diverged."""
    run = read_run(largest.folder)
    if unusable(run) is not None or not len(run.series("eval_loss").value):
        return None
    loss, told = float(run.series("eval_loss").value[-1]), found["prediction"]
    low, high = told["run_interval"]
    out = {"run": largest.name, "loss": loss, "predicted": told["loss"], "off": told["loss"] / loss - 1,
           "within": abs(told["loss"] / loss - 1) <= cfg.within, "in_interval": low <= loss <= high}
    if isinstance(farther := found.get("farther"), dict):
        out |= {"farther_off": farther["loss"] / loss - 1, "farther_within": abs(farther["loss"] / loss - 1) <= cfg.within}
    return out


def alarms(rungs: list[Rung], law_file: pathlib.Path) -> dict[str, int]:
    """Returns the runs that did not diverge and of which watching by this law would have said that they fall behind, with the
    step."""
    from jaxllm.train.pretrain import watch_of

    found, law = {}, read_law(law_file)
    for rung in rungs:
        run = read_run(rung.folder)
        if unusable(run) is None:
            watch = watch_of(rung.cfg, law, rung.cfg.train.steps)
            said = [step for step, kind in replayed(watch, run.lines) if kind == "falls_behind"]
            found |= {rung.name: said[0]} if said else {}
    return found


def why_not(largest: Rung) -> str | None:
    return unusable(read_run(largest.folder))


def losses(rungs: list[Rung]) -> dict[str, float]:
    """Returns the last held-out loss of each run that has one."""
    read: dict[str, Run] = {rung.name: read_run(rung.folder) for rung in rungs if (rung.folder / "metrics.jsonl").exists()}
    return {name: float(run.series("eval_loss").value[-1]) for name, run in read.items() if len(run.series("eval_loss").value)}
