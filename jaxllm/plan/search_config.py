"""Settings of `jaxllm plan search`: what is trained, what is varied, how often, and by whom it is chosen. No jax here."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    dir: str = "runs/search"  # everything the study writes, the runs of its trials too
    seed: int = 0  # of what is chosen; the trials have that of their base
    overwrite: bool = False  # delete the study in `dir` and start anew

    def __post_init__(self):
        if self.seed < 0 or not self.dir:
            raise ValueError(f"run.seed={self.seed}, run.dir={self.dir!r}: should be 0 or more, and a folder")


@dataclass(frozen=True, kw_only=True)
class HalvingConfig:
    """Asynchronous successive halving (Li et al. 2020, ASHA): the best of those that came so far train on."""

    min_steps: int | None = None  # steps that every trial trains; null: all trials train to their end
    factor: int = 3  # one of so many trials goes on, for so many times the steps

    def __post_init__(self):
        if self.min_steps is not None and self.min_steps < 1:
            raise ValueError(f"asha.min_steps={self.min_steps}: should be at least 1, or null")
        if self.factor < 2:
            raise ValueError(f"asha.factor={self.factor}: should be at least 2")


@dataclass(frozen=True, kw_only=True)
class SearchVerb:
    run: StudyConfig = field(default_factory=StudyConfig)
    base: Any = None  # the config of `jaxllm pretrain` that trials begin from: a file, or its groups themselves
    fixed: dict[str, Any] = field(default_factory=dict)  # settings of every trial over those of `base`, e.g. {train.steps: 200}
    # setting -> where it may lie: {log: [1e-4, 1e-1]}, {uniform: [0, 0.3]}, {one_minus_log: [0.9, 0.999]} (log in 1 - value),
    # {int: [1, 8]}, {log_int: [8, 512]} or {choice: [a, b]}; with `when: {setting: value}` it counts only where that holds
    space: dict[str, Any] = field(default_factory=dict)
    points: list[Any] = field(default_factory=list)  # trials of your own, made first: {setting: value}; {} is `base` itself
    # who chooses: own (quasi-random, then a Gaussian process), quasi_random (Sobol), halton, random; tpe and gp are Optuna's
    sampler: Literal["own", "quasi_random", "halton", "random", "tpe", "gp"] = "own"
    trials: int = 16  # in all, your own points included
    workers: int = 1  # trials that run at once on this machine; the same command on another machine adds as many
    # results that a choice does without, as so many trials are under way: give what all machines have together. null: workers
    parallel: int | None = None
    metric: str = "eval_loss"  # of metrics.jsonl; the last one counts
    goal: Literal["min", "max"] = "min"  # whether a lower or a higher metric is better
    asha: HalvingConfig = field(default_factory=HalvingConfig)
    seeds: int = 0  # runs of each of the best trials with another run.seed, to tell noise from gain
    top: int = 1  # how many of the best trials are run with other seeds
    follows: str | None = None  # folder of an earlier study: its trials that lie in this space are known from the start
    heartbeat_s: float = 60.0  # a worker on another machine that has given no sign for so long is taken for dead

    def __post_init__(self):
        for name in ("trials", "workers", "parallel", "top"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: should be at least 1")
        if self.seeds < 0:
            raise ValueError(f"seeds={self.seeds}: should be 0 or more")
        if not self.heartbeat_s >= 5:
            raise ValueError(f"heartbeat_s={self.heartbeat_s:g}: should be 5 or more")
        if len(self.points) > self.trials:
            raise ValueError(f"points: {len(self.points)} given, trials={self.trials}: should be no more than trials")
