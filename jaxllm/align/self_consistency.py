"""Self-consistency (Wang et al. 2022): of n sampled responses to a question, the answer that most of them come to.

Beside it, what it is measured against: one sample, the best of n by reward, and whether any of n is right.

B response; the n samples of a question are consecutive.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxllm.align.best_of import best_rows, majority
from jaxllm.align.rewards_config import RewardRule
from jaxllm.align.rules import Sample, exact, vote


def shares_right(rule: RewardRule, samples: Sequence[Sample], n: int, score_B=None) -> dict[str, float]:
    """Returns shares of questions: `right` (of one sample, on average), `majority_right`, `any_right`, and with scores
    `best_right`, of the sample with the largest score. With n = 1 `right` alone.

    `rule` says where a response's answer stands and when two are the same. A sample without an answer has no vote; of
    answers with as many votes the one that was sampled first counts.
    """
    right_B = np.array([is_right(rule, sample) for sample in samples])
    if n == 1:
        return {"right": float(np.mean(right_B))}
    votes = [vote(rule, sample) for sample in samples]
    chosen = []
    for first in range(0, len(samples), n):
        winner, _ = majority(votes[first : first + n])
        chosen.append(winner is not None and right_B[first + votes[first : first + n].index(winner)])
    found = {"right": right_B, "majority_right": chosen, "any_right": right_B.reshape(-1, n).any(axis=1)}
    if score_B is not None:
        found["best_right"] = right_B[best_rows(score_B, group_size=n)]
    return {name: float(np.mean(x)) for name, x in found.items()}


def is_right(rule: RewardRule, sample: Sample) -> bool:
    """Tells whether a response's answer is its row's; a row without one makes none right."""
    return exact(dataclasses.replace(rule, score=1.0, otherwise=0.0), sample) == 1.0


def answer_rule(rewards: dict[str, RewardRule], of_environment: RewardRule | None = None) -> RewardRule | None:
    """Returns the rule by which votes are counted: the first reward of kind `exact`, or the environment's; None without one.

    Rules with a pattern of the user's do not count: they are run in a process of their own, with a time limit.
    """
    rules = [*rewards.values(), *([of_environment] if of_environment else [])]
    return next((rule for rule in rules if rule.kind == "exact" and rule.extract != "regex"), None)
