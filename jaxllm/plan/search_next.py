"""What a study does next: a pure function of its settings and of what its jobs gave.

A job is one start of a trial: without successive halving its whole training, with it the training up to one rung. Jobs have
numbers, and job n is decided from the results of jobs 0 to n - `parallel` alone, whatever else has come in by then. So every
worker decides alike, and a study that was killed decides as one that was not, whichever trial was slow.
"""

import dataclasses

from jaxllm.plan.search_samplers import ADAPTIVE, ask
from jaxllm.plan.search_space import Space

WAIT = "wait"  # for results that the decision depends on


@dataclasses.dataclass(frozen=True)
class Rules:
    """What decides of a study's next job."""

    space: Space
    sampler: str
    seed: int
    points: tuple[dict, ...]  # trials of the user's own, made first
    trials: int
    parallel: int
    minimise: bool
    shares: tuple[float, ...]  # of the training: what each rung ends at, the last one 1
    factor: int
    seeds: int
    top: int
    known: tuple[tuple[dict, float | None], ...] = ()  # settings and metric of an earlier study's trials

    def loss(self, job: dict) -> float | None:
        """Returns a finished job's metric as a loss, lower being better; None where it was infeasible."""
        metric = job.get("metric")
        return None if metric is None else metric if self.minimise else -metric


def next_job(rules: Rules, jobs: list[dict]):
    """Returns the next job of a study, WAIT when it depends on jobs that are under way, or None when all is done.

    `jobs` are all so far in their order: dicts with trial, rung, params, state (running, done or infeasible) and metric.
    """
    search = [job for job in jobs if "repeat_of" not in job]
    n = len(search)
    for known in range(max(n - rules.parallel + 1, 0), n + 1):
        if needs_results(rules) and any(job["state"] == "running" for job in search[:known]):
            return WAIT
        if job := decide(rules, search[:known], search[known:]):
            return job
    if any(job["state"] == "running" for job in search):
        return WAIT
    return repeat(rules, search, [job for job in jobs if "repeat_of" in job])


def needs_results(rules: Rules) -> bool:
    return rules.sampler in ADAPTIVE or len(rules.shares) > 1


def decide(rules: Rules, known: list[dict], pending: list[dict]) -> dict | None:
    """Returns a promotion, or else a new trial; None when neither is to be had from these results."""
    begun = {(job["trial"], job["rung"]) for job in known + pending}
    for rung in reversed(range(len(rules.shares) - 1)):
        at = [job for job in known if job["rung"] == rung]
        ranked = sorted((job for job in at if rules.loss(job) is not None), key=lambda job: (rules.loss(job), job["trial"]))
        for job in ranked[: len(at) // rules.factor]:
            if (job["trial"], rung + 1) not in begun:
                return {"trial": job["trial"], "rung": rung + 1, "params": job["params"], "by": job["by"]}
    trial = len({number for number, _ in begun})
    if trial >= rules.trials:
        return None
    if trial < len(rules.points):
        return {"trial": trial, "rung": 0, "params": rules.points[trial], "by": "you"}
    seen = [*rules.known, *((job["params"], rules.loss(job)) for job in known if job["rung"] == 0)]
    seen = [(params, loss) for params, loss in seen if rules.space.holds(params)]  # a point of the user's may lie outside
    waiting = [job["params"] for job in pending if job["rung"] == 0 and rules.space.holds(job["params"])]
    params = ask(rules.sampler, rules.space, seen, waiting, trial - len(rules.points), rules.seed)
    return {"trial": trial, "rung": 0, "params": params, "by": rules.sampler}


def ranking(rules: Rules, jobs: list[dict]) -> list[dict]:
    """Returns the last job of every feasible trial, the best first: those that trained farther before those that did less."""
    last: dict[int, dict] = {}
    for job in jobs:
        if "repeat_of" not in job and rules.loss(job) is not None and job["rung"] >= last.get(job["trial"], job)["rung"]:
            last[job["trial"]] = job
    failed = {job["trial"] for job in jobs if job["state"] == "infeasible" and "repeat_of" not in job}
    return sorted((job for job in last.values() if job["trial"] not in failed),
                  key=lambda job: (-job["rung"], rules.loss(job), job["trial"]))


def repeat(rules: Rules, search: list[dict], repeats: list[dict]) -> dict | None:
    """Returns a run of one of the best trials with another seed; None when there are as many as were asked for."""
    made = {(job["repeat_of"], job["seed_offset"]) for job in repeats}
    for job in ranking(rules, search)[: rules.top]:
        for offset in range(1, rules.seeds + 1):
            if (job["trial"], offset) not in made:
                return {"trial": job["trial"], "rung": len(rules.shares) - 1, "params": job["params"], "by": "repeat",
                        "repeat_of": job["trial"], "seed_offset": offset}
    return None
