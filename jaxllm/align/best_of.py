"""Choosing among n samples of one prompt: what the choice is worth, how far it goes from the policy, and votes. No jax here.

Axes: B batch; the n samples of a prompt are consecutive rows.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np


def best_rows(score_B, *, group_size: int) -> np.ndarray:
    """Returns the row of the largest score of each group, int; of equal scores, the first."""
    score_PG = np.asarray(score_B).reshape(-1, group_size)
    return np.arange(len(score_PG)) * group_size + np.argmax(score_PG, axis=1)


def best_of_n_kl(n: int) -> float:
    """Returns log n − (n − 1) / n: nats that the best of n samples is from the policy at most (Stiennon et al. 2020).

    An equality where no two samples score the same, else a bound (Beirami et al. 2024).
    """
    if n < 1:
        raise ValueError(f"n={n}: should be at least 1")
    return math.log(n) - (n - 1) / n


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Returns 1 − C(n − correct, k) / C(n, k): the chance that of k samples one is correct (Chen et al. 2021).

    Unbiased from n samples of which `correct` were; 1 − (1 − correct/n)^k is not. Raises ValueError unless
    0 ≤ correct ≤ n and 1 ≤ k ≤ n.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"correct={correct}: should be from 0 to n={n}")
    _check(n, k)
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def expected_best(scores: Sequence[float], k: int) -> float:
    """Returns the mean, over all choices of k of the scores, of the largest: what best-of-k reaches, without bias.

    The i-th smallest is the largest of C(i − 1, k − 1) choices. Of scores that are 0 or 1 this is pass@k.
    """
    n = len(scores)
    _check(n, k)
    return sum(float(score) * (math.comb(i, k - 1) / math.comb(n, k)) for i, score in enumerate(sorted(scores)))


def majority(answers: Sequence[Hashable | None]) -> tuple[Hashable | None, float]:
    """Returns (the most frequent answer, its share of all samples): self-consistency (Wang et al. 2022).

    None is a sample in which no answer was found: it has no vote, but lowers the share. Of answers as frequent, the
    one that came first; (None, 0.0) without any.
    """
    votes: dict[Hashable, int] = {}
    for answer in answers:
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + 1
    if not votes:
        return None, 0.0
    first = max(votes, key=votes.__getitem__)  # dicts keep the order of first votes, max takes the first of equals
    return first, votes[first] / len(answers)


def _check(n: int, k: int):
    if not 1 <= k <= n:
        raise ValueError(f"k={k}: should be from 1 to n={n}, the number of samples")
