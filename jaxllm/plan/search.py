"""`jaxllm plan search CONFIG`: hyper-parameters, chosen by hand and by rule together (Godbole et al. 2023, tuning playbook).

Trials are ordinary run folders of `jaxllm pretrain`, each trained in a process of its own. Threads here, and the same command
on other machines with the same folder, are workers: each takes what is next (search_next.py), runs it (search_trial.py) and
writes what came of it (search_folder.py). Nothing is kept anywhere else, so that a kill loses nothing.
"""

import collections
import pathlib
import shutil
import sys
import threading
import time

from jaxllm.errors import RunError, Stopped, UserError, stopping_at_once
from jaxllm.plan import search_samplers, search_trial
from jaxllm.plan.search_config import SearchVerb
from jaxllm.plan.search_folder import OURS, Claims, Folder
from jaxllm.plan.search_next import WAIT, Rules, next_job, ranking
from jaxllm.plan.search_setup import Study, read_study, same_study
from jaxllm.report.summary import duration

ENOUGH_ERRORS = 5  # trials that failed in a row from the first one on, for no reason of their settings: the study's own mistake


def main(cfg: SearchVerb) -> dict:
    """Takes a study to its end, or goes on with it; prints, writes and returns what it found."""
    search_samplers.check(cfg.sampler)
    study = read_study(cfg)
    folder = Folder(pathlib.Path(cfg.run.dir).expanduser())
    claims = Claims(folder.path, cfg.heartbeat_s)
    if cfg.run.overwrite:
        start_anew(folder, claims)
    study = same_study(study, folder)
    from jaxllm.plan.search_report import report, write_page

    with stopping_at_once(str(folder.path)):
        try:
            work(study, folder, claims)
        except Stopped:
            write_page(study, folder)  # of what there is
            raise
        return report(study, folder)


def start_anew(folder: Folder, claims: Claims) -> None:
    """Deletes an earlier study, unless a worker is at it."""
    if not (folder.path / "study.yaml").exists() and any((folder.path / name).exists() for name in OURS):
        raise UserError(f"{folder.path}: run.overwrite=true would delete what no study has written; give another run.dir")
    if claims.folder.exists() and claims.any_alive():
        raise UserError(f"{folder.path}: a worker is at this study; stop it, or give another run.dir")
    for name in OURS:
        path = folder.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class Workers:
    """The workers of this process: what they take is decided one at a time, what they run runs at once."""

    def __init__(self, study: Study, folder: Folder, claims: Claims):
        self.study, self.folder, self.claims = study, folder, claims
        self.stopping, self.deciding, self.failed = threading.Event(), threading.Lock(), collections.deque()

    def work(self) -> None:
        """One worker: takes and runs jobs until there are none."""
        try:
            while not self.stopping.is_set():
                with self.deciding:
                    job = self.take()
                if job is None:
                    return
                if job == WAIT:
                    time.sleep(search_trial.POLL_S)
                    continue
                try:
                    self.run(job)
                finally:
                    self.claims.mine.pop(job["job"], None)
        except BaseException as e:  # told by the main thread
            self.failed.append(e)
            self.stopping.set()

    def take(self):
        """Returns a job that is now this worker's: one of a dead worker's, or the next; WAIT, or None when all is done."""
        jobs = self.folder.jobs()
        hopeless(self.study.rules, jobs)
        running = [job for job in jobs if job["state"] == "running"]
        for job in running:
            if job["job"] not in self.claims.mine and self.claims.claim(job["job"]):
                again = self.folder.read(job["job"])  # its worker may have ended it before it died
                if again["state"] == "running":
                    return again
                self.claims.mine.pop(job["job"])
                return WAIT
        job = next_job(self.study.rules, jobs)
        if job is None:
            return WAIT if running else None
        if job == WAIT or not self.claims.claim(len(jobs)):
            return WAIT
        job = {"job": len(jobs), **job, "state": "running", **self.study.steps_of(job)}
        self.folder.write(job)
        return job

    def run(self, job: dict) -> None:
        """Runs a job and writes what came of it, unless it was taken over meanwhile."""
        run = self.folder.run_of(job)
        words = search_trial.command(self.folder.path / "base.yaml", run, job["params"], seed=self.study.seed_of(job),
                                     stop_at=None if job["step"] == job["of"] else job["step"])
        beaten = time.monotonic()

        def going_on() -> bool:
            nonlocal beaten
            if time.monotonic() - beaten > self.claims.heartbeat_s / 6:
                beaten = time.monotonic()
                if not self.claims.beat(job["job"]):
                    return False
            return not self.stopping.is_set()

        try:
            found = search_trial.run(words, run, self.study.metric, job["step"], going_on)
        except Stopped:
            if self.claims.holds(job["job"]):
                raise
            return  # another worker has it
        if self.claims.holds(job["job"]):
            self.folder.write({**job, **found})
            self.told(job | found)

    def told(self, job: dict) -> None:
        """Prints how far the study is."""
        jobs = self.folder.jobs()
        print(progress(self.study, jobs, job), file=sys.stderr, flush=True)


def work(study: Study, folder: Folder, claims: Claims) -> None:
    """Runs the workers to the end of the study; raises what stopped them."""
    jobs = folder.jobs()
    if jobs:
        trials = len({job["trial"] for job in jobs})
        print(f"{folder.path}: goes on after {trials} of {study.rules.trials} trials", file=sys.stderr, flush=True)
    workers = Workers(study, folder, claims)
    threads = [threading.Thread(target=workers.work) for _ in range(study.workers)]
    for thread in threads:
        thread.start()
    try:
        wait_for(threads)
    except BaseException:
        workers.stopping.set()
        wait_for(threads)
        raise
    for error in sorted(workers.failed, key=lambda e: isinstance(e, Stopped)):
        raise error
    hopeless(study.rules, folder.jobs(), whole=True)


def wait_for(threads: list[threading.Thread]) -> None:
    """Returns when all have ended. Not by join: Python 3.11 takes a thread for ended when a signal interrupts its join."""
    while any(thread.is_alive() for thread in threads):
        time.sleep(search_trial.POLL_S)


def hopeless(rules: Rules, jobs: list[dict], whole: bool = False) -> None:
    """Raises the first trial's message when all trials, or the first few for no reason of their settings, have failed."""
    first = [job for job in jobs if job["rung"] == 0 and "repeat_of" not in job]
    enough = len(first) if whole else min(ENOUGH_ERRORS, rules.trials)
    judged = first[:enough]
    if len(judged) < enough or not judged or any(job["state"] != "infeasible" for job in judged):
        return
    if whole or all(job["kind"] not in ("diverged", "out of memory") for job in judged):
        said = f"all of the first {len(judged)} trials failed; trial 0 ({judged[0]['kind']}): {judged[0]['why']}"
        raise (UserError if judged[0]["kind"] == "refused" else RunError)(said)


def progress(study: Study, jobs: list[dict], job: dict) -> str:
    """Returns the line of a job that has just ended: what it gave, the best so far, and the time left."""
    rules = study.rules
    got = f"{study.metric} {job['metric']:.4f}" if job["state"] == "done" else f"infeasible ({job['kind']}): {job['why'][:120]}"
    rung = f" to step {job['step']} of {job['of']}" if job["step"] != job["of"] else ""
    seed = f" with seed + {job['seed_offset']}" if "seed_offset" in job else ""
    best = ranking(rules, jobs)
    told = f"; best {best[0]['metric']:.4f} (trial {best[0]['trial']})" if best else ""
    ended = [j for j in jobs if j["state"] != "running"]
    trials = len({j["trial"] for j in ended})
    left, each = rules.trials - trials, sum(j["seconds"] for j in ended) / max(trials, 1)
    seeds = rules.seeds * min(rules.top, len(best)) - sum("repeat_of" in j for j in ended)
    # each repeat is a whole training, as long as the longest so far
    time_left = (left * each + max(seeds, 0) * max((j["seconds"] for j in ended), default=0)) / study.workers
    return (f"trial {job['trial']} of {rules.trials}{rung}{seed}: {got}  ({shown(job['params'])}){told}; "
            f"{'about ' + duration(time_left) + ' left' if time_left > 0 else 'nearly done'}")


def shown(params: dict) -> str:
    told = (f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items())
    return ", ".join(told) or "base"
