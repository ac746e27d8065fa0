"""One job of a search: `jaxllm pretrain` in a process of its own, and what is to be made of how it ended.

A trial that diverges, runs out of memory or is refused tells something about the space: it is infeasible, with the reason. A
full disk or a missing file tells nothing about it, and stops the study.
"""

import fcntl
import json
import math
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from jaxllm.errors import RunError, Stopped
from jaxllm.report.read import last_line, number
from jaxllm.train.run_folder import last_checkpoint

POLL_S = 0.2
MEMORY = re.compile(r"RESOURCE_EXHAUSTED|MemoryError|[Oo]ut of memory|bad_alloc")


def command(base: pathlib.Path, run: pathlib.Path, params: dict, *, stop_at: int | None, seed: int | None) -> list[str]:
    """Returns the command line of a trial, which a reader can type too."""
    words = [sys.executable, "-m", "jaxllm", "pretrain", str(base), f"--run.dir={run}"]
    words += [f"--{key}={written(value)}" for key, value in params.items()]
    words += [f"--train.stop_at={stop_at}"] if stop_at is not None else []
    return words + ([f"--run.seed={seed}"] if seed is not None else [])


def written(value) -> str:
    """Returns a setting's value as it stands after --key=."""
    return value if isinstance(value, str) else json.dumps(value)


def run(words: list[str], folder: pathlib.Path, metric: str, until: int, going_on: Callable[[], bool]) -> dict:
    """Runs a job to its end; returns its state, its metric, or the kind and the words of why it has none.

    `going_on()` is asked several times a second; when it says no, the trial is told to save and stop, and Stopped is raised.
    Raises RunError for what stops a study. A process that was killed is started once more, as a run goes on where it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    began = time.time()
    for attempt in (1, 2):
        wait_until_free(folder, going_on)
        with (folder / "trial.log").open("ab") as log:
            at = log.tell()
            code = ended(subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL), going_on)
        said = (folder / "trial.log").read_bytes()[at:].decode("utf-8", "replace")
        if code >= 0 or attempt == 2:
            break
    return {**outcome(code, said, folder, metric, until), "seconds": round(time.time() - began, 1)}


def ended(process: subprocess.Popen, going_on: Callable[[], bool]) -> int:
    """Returns a process's exit code; stops it and raises Stopped when it is no longer wanted."""
    try:
        while process.poll() is None:
            if not going_on():
                raise Stopped("the trial is stopped")
            time.sleep(POLL_S)
        return process.returncode
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # it saves
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def outcome(code: int, said: str, folder: pathlib.Path, metric: str, until: int) -> dict:
    """Returns what a job's exit code, its last words and its run folder come to."""
    lines = [line.strip() for line in said.replace("\r", "\n").split("\n") if line.strip()]
    told = next((line.removeprefix("jaxllm: ") for line in reversed(lines) if line.startswith("jaxllm: ")), "")
    if code in (0, 75):
        if last_checkpoint(folder) < until:  # stopped on request, before its end
            raise Stopped(f"{folder}: {told}")
        return measured(folder, metric, until)
    if "cannot be written" in told:
        raise RunError(f"{folder}: {told}")
    if code < 0:
        name = signal.Signals(-code).name
        why = f"killed by {name} twice" + (", as the system does when memory is short" if name == "SIGKILL" else "")
        return infeasible("out of memory" if name == "SIGKILL" else "crashed", why)
    if MEMORY.search(said):
        return infeasible("out of memory", next(line for line in lines if MEMORY.search(line))[:300])
    if code == 2:
        return infeasible("refused", told)
    if code == 1 and "not finite" in told:
        return infeasible("diverged", told)
    if code == 130 or (code == 1 and not lines):
        raise Stopped(f"{folder}: interrupted")
    if "this is a bug" in told and len(lines) > 1:
        told = lines[-2]
    return infeasible("crashed", (told or lines[-1] if lines else f"exit code {code}")[:300])


def measured(folder: pathlib.Path, metric: str, until: int) -> dict:
    """Returns the last value of the metric, which must be that of the job's last step where it is a held-out one."""
    line = last_line(folder, metric)
    if not line:
        return infeasible("no metric", f"{folder / 'metrics.jsonl'} has no {metric}")
    if metric.startswith("eval_") and line.get("step") != until:
        return infeasible("no metric", f"the last {metric} is of step {line.get('step')}, not of step {until}")
    value = number(line[metric])
    if not math.isfinite(value):
        return infeasible("diverged", f"{metric} is {line[metric]} at step {line.get('step')}")
    return {"state": "done", "metric": value}


def infeasible(kind: str, why: str) -> dict:
    return {"state": "infeasible", "kind": kind, "why": why}


def wait_until_free(folder: pathlib.Path, going_on: Callable[[], bool]) -> None:
    """Waits until no live process has the run: the trial of a worker that was killed may still be training."""
    while (folder / "run.lock").exists():
        with (folder / "run.lock").open("a", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                pass
        if not going_on():
            raise Stopped(f"{folder}: stopped while another process has it")
        time.sleep(POLL_S)
