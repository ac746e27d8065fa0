"""What scores a response: rules, Python functions and reward models, behind one interface, named, weighted and summed.

    with Rewards(cfg.rewards, models={"helpful": score_tokens}, output=run / "rewards") as rewards:
        scored = rewards(samples)  # score_B, the part of each reward, and incidents for the log

Axes: B sample.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxllm.align.guarded import Failure, Guarded
from jaxllm.align.guarded_child import checked
from jaxllm.align.rewards_config import RewardRule, check_rewards, has_pattern
from jaxllm.align.rules import RULES, Failed, Sample
from jaxllm.errors import RunError, UserError

Reward = Callable[[list[Sample]], list[float]]
Scorer = Callable[[list[list[int]]], Sequence[float]]  # a reward model: the token ids of prompt and response -> scores
PROMPT_SHOWN = 60  # characters


@dataclasses.dataclass(frozen=True)
class Incident:
    """A sample that could not be scored, or an episode in which something failed."""

    source: str  # "rewards.NAME" or "environment"
    index: int  # in the batch
    prompt: str  # its beginning
    reason: str
    score: float | None  # what it got instead; None: the episode goes on

    def __str__(self):
        then = "the episode goes on" if self.score is None else f"scored {self.score:g}"
        return f"{self.source}: sample {self.index} ({self.prompt!r}): {self.reason}; {then}"


class Scored(NamedTuple):
    score_B: np.ndarray  # float32: the weighted sum
    part_B: dict[str, np.ndarray]  # float32, of each reward, before its weight
    incidents: list[Incident]


class Rewards:
    """Scores batches by all rewards of a run. User code runs in processes of its own, which end with `close`.

    `models` holds a function for each reward of kind "model", by its name. What a user's function prints goes to NAME.txt in
    `output`. `errors` counts by name the samples that could not be scored; a run that is resumed sets it to what it was.
    Raises UserError where a user's function cannot be loaded.
    """

    def __init__(self, rules: dict[str, RewardRule], *, models: dict[str, Scorer] | None = None,
                 output: pathlib.Path | None = None):
        try:
            check_rewards(rules)
        except ValueError as e:
            raise UserError(str(e)) from None
        models = models or {}
        if models.keys() != (wanted := {name for name, rule in rules.items() if rule.kind == "model"}):
            raise ValueError(f"functions for reward models {sorted(wanted)} are needed, found {sorted(models)}")
        self.rules, self.errors = rules, dict.fromkeys(rules, 0)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
        self._by_name = {name: _reward(name, rule, models.get(name), output) for name, rule in rules.items()}
        try:
            for reward in self._by_name.values():
                if isinstance(reward, UserReward):
                    reward.start()
        except BaseException:
            self.close()
            raise

    def __call__(self, samples: list[Sample]) -> Scored:
        """Returns the scores of a batch.

        Raises RunError where a reward failed on more samples than `max_errors` in the run; its `result` then holds the
        incidents of this batch.
        """
        parts, incidents = {}, []
        for name, reward in self._by_name.items():
            rule, found = self.rules[name], []
            for i, score in enumerate(reward(samples, rule.max_errors - self.errors[name])):
                if isinstance(score, Failed):
                    prompt = samples[i].prompt[:PROMPT_SHOWN]
                    incidents.append(Incident(f"rewards.{name}", i, prompt, str(score), rule.on_error))
                    self.errors[name] += 1
                    score = rule.on_error
                found.append(score)
            parts[name] = found
            if self.errors[name] > rule.max_errors:
                raise RunError(f"reward {name!r} could not score {self.errors[name]} samples, more than "
                               f"rewards.{name}.max_errors={rule.max_errors}; the last: {incidents[-1]}",
                               {"incidents": [dataclasses.asdict(one) for one in incidents]})
        return Scored(*combine(parts, {name: rule.weight for name, rule in self.rules.items()}, len(samples)), incidents)

    def close(self) -> None:
        for reward in self._by_name.values():
            if isinstance(reward, UserReward):
                reward.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def combine(parts: dict[str, Sequence[float]], weights: dict[str, float], n: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns (Σ weight · score of each of `n` samples, the scores by name), float32."""
    part_B = {name: np.asarray(scores, np.float32) for name, scores in parts.items()}
    for name, score_B in part_B.items():
        if score_B.shape != (n,):
            raise ValueError(f"reward {name!r} has scores of shape {score_B.shape}, should be ({n},)")
    total_B = np.zeros(n, np.float64)  # rounded once
    for name, score_B in part_B.items():
        total_B += weights[name] * score_B.astype(np.float64)
    return total_B.astype(np.float32), part_B


def _reward(name: str, rule: RewardRule, model: Scorer | None, output: pathlib.Path | None):
    """Returns what scores samples: (samples, how many may fail) -> a number or a reason for each."""
    if rule.kind == "model":
        return lambda samples, left: checked(model([s.prompt_tokens + s.tokens for s in samples]), len(samples))
    if rule.kind == "python" or has_pattern(rule):
        return UserReward(name, rule, output)
    return lambda samples, left: [RULES[rule.kind](rule, s) for s in samples]


class UserReward:
    """A reward that is the user's code, or runs the user's pattern, in another process.

    A batch that fails as a whole (an exception, too long, a wrong number of scores) is scored again sample by sample, so that
    only those samples fail that make it so; all of that within the time of one more batch.
    """

    def __init__(self, name: str, rule: RewardRule, output: pathlib.Path | None):
        self.rule = rule
        self._code = Guarded({"call": "scores", "rule": dataclasses.asdict(rule)}, f"rewards.{name}",
                             output and output / f"{name}.txt")

    def __call__(self, samples: list[Sample], left: int) -> list[float | Failed]:
        if not samples:
            return []
        sent = [vars(s) for s in samples]  # asdict would copy every token list, item by item
        try:
            return self._scores(sent, self.rule.timeout)
        except Failure as e:
            if not self.rule.retry:
                return [Failed(f"{e} (the batch of {len(sent)})")] * len(sent)
            if len(sent) == 1:
                return [Failed(str(e))]
        found, spent = [], 0.0
        for sample in sent:
            if sum(isinstance(one, Failed) for one in found) > left:
                found.append(Failed("not tried: more than max_errors failed before"))
                continue
            seconds = min(self.rule.sample_timeout, self.rule.timeout - spent)
            if seconds <= 0:
                found.append(Failed(f"not tried: those before it took longer than timeout={self.rule.timeout:g} s"))
                continue
            self._code.start()  # not on the time of the samples: a file may import much
            began = time.monotonic()
            try:
                found += self._scores([sample], seconds)
            except Failure as e:
                found.append(Failed(str(e)))
            spent += time.monotonic() - began
        return found

    def _scores(self, sent: list[dict], seconds: float) -> list[float | Failed]:
        answer = self._code.call(sent, seconds)
        return [Failed(one) if isinstance(one, str) else one for one in answer]

    def start(self) -> None:
        self._code.start()

    def close(self) -> None:
        self._code.close()
