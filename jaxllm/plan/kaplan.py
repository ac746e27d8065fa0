"""The scaling laws of Kaplan et al. 2020 ("Scaling Laws for Neural Language Models", arXiv 2001.08361), all their forms.

N counts parameters without embeddings, D and batches tokens, C PF-days (8.64e19 FLOPs), L nats a token of WebText2 in a
vocabulary of 50,257. The equations' numbers are the paper's.
"""

import numpy as np

from jaxllm.plan.laws import Frontier

PF_DAY = 8.64e19  # FLOPs: 1e15 a second for a day


def loss_of_parameters(parameters):
    """L(N) of models trained until they converge on enough data (1.1)."""
    return np.power(8.8e13 / parameters, 0.076)


def loss_of_tokens(tokens):
    """L(D) of large models stopped early on D tokens (1.2)."""
    return np.power(5.4e13 / tokens, 0.095)


def loss_of_least_compute(pf_days):
    """L(C_min) of the best size, trained well below the critical batch (1.3)."""
    return np.power(3.1e8 / pf_days, 0.050)


def loss_of_compute(pf_days):
    """L(C) of the best size at the fixed batch of 5e5 tokens (3.3, table 5)."""
    return np.power(1.6e7 / pf_days, 0.057)


def loss(parameters, tokens):
    """L(N, D) of N parameters on D tokens, trained until the held-out loss rises (1.5; constants of table 2)."""
    return np.power(np.power(6.4e13 / parameters, 0.076 / 0.103) + 1.8e13 / tokens, 0.103)


def loss_after_steps(parameters, least_steps):
    """L(N, S_min) after steps that are counted at a batch far above the critical one (1.6; constants of table 3)."""
    return np.power(6.5e13 / parameters, 0.077) + np.power(2.1e3 / least_steps, 0.76)


def critical_batch(loss):
    """Returns the batch, in tokens, that spends twice the least steps and twice the least tokens (1.4)."""
    return 2e8 / np.power(loss, 1 / 0.21)


def least_steps(steps, batch, loss):
    """S_min: the steps that a far larger batch would have taken (5.4)."""
    return steps / (1 + critical_batch(loss) / batch)


def least_compute(pf_days, batch, loss):
    """C_min: the compute that a far smaller batch would have taken (5.5)."""
    return pf_days / (1 + batch / critical_batch(loss))


def tokens_without_overfitting(parameters):
    """Returns the D above which overfitting costs less than the noise between seeds (4.4)."""
    return 5e3 * np.power(parameters, 0.74)


def allocation(pf_days) -> dict:
    """Returns what the best use of C_min grows as (6.1, table 6): parameters, batch in tokens, steps and tokens."""
    return {"parameters": 1.3e9 * np.power(pf_days, 0.73), "batch": 2.0e6 * np.power(pf_days, 0.24),
            "steps": 5.4e3 * np.power(pf_days, 0.03), "tokens": 2e10 * np.power(pf_days, 0.27)}


# N_opt of table 6 as FLOPs see it; D = C / 6N.
KAPLAN = Frontier("Kaplan", "Kaplan et al. 2020 (arXiv 2001.08361), table 6; parameters without embeddings",
                  k=1.3e9 / PF_DAY**0.73, exponent=0.73)
