"""Training on the same tokens several times: what a repetition is worth (Muennighoff et al. 2023, arXiv 2305.16264).

L = E + A / N'^alpha + B / D'^beta, where repeated tokens and parameters beyond what the unique tokens ask for count less
and less (their equations 5 and 6; constants of appendix A).
"""

import numpy as np

from jaxllm.plan.laws import FLOPS_A_TOKEN, MUENNIGHOFF, Parametric

R_D = 15.387756  # repetitions after which 1 - 1/e of all that repeating can bring is had
R_N = 5.309743  # the same of excess parameters, in multiples of those that the unique tokens ask for


def effective_tokens(tokens, unique):
    """D': the fresh tokens that training on `tokens`, of which at most `unique` differ, is worth."""
    used = np.minimum(tokens, unique)
    return used * (1 + R_D * (1 - np.exp(-(tokens / used - 1) / R_D)))


def effective_parameters(parameters, tokens, unique, law: Parametric = MUENNIGHOFF):
    """N': the parameters that a model is worth on so little data."""
    base = np.minimum(parameters, law.parameters_for(np.minimum(tokens, unique)))
    return base * (1 + R_N * (1 - np.exp(-(parameters / base - 1) / R_N)))


def loss(parameters, tokens, unique, law: Parametric = MUENNIGHOFF):
    """Returns the loss of N parameters after `tokens` tokens, of which `unique` differ."""
    return law.loss(effective_parameters(parameters, tokens, unique, law), effective_tokens(tokens, unique))


def loss_of(law: Parametric, parameters, tokens, unique: float | None):
    """Returns the loss by `loss` where it is known how many tokens differ, by the plain law where it is not.

    The two agree up to the size that the tokens ask for. Beyond it Muennighoff et al. let parameters count less already in
    the first epoch, so only one of the two is used in one comparison.
    """
    return law.loss(parameters, tokens) if unique is None else loss(parameters, tokens, unique, law)


def optimal(flops: float, unique: float, law: Parametric = MUENNIGHOFF) -> tuple[float, float]:
    """Returns the (N, D) of the lowest loss with 6 N D = `flops` where only `unique` tokens differ.

    Where the law's own D is no more than there is, that is the answer. Else the loss is searched over sizes, to 1e-4 of one.
    """
    n, d = law.optimal(flops)
    if d <= unique:
        return float(n), float(d)
    low, high = np.log(n) - 3, np.log(flops / FLOPS_A_TOKEN / unique)  # the largest repeats nothing
    for _ in range(4):
        size_S = np.exp(np.linspace(low, high, 201))
        best = int(np.argmin(loss(size_S, flops / FLOPS_A_TOKEN / size_S, unique, law)))
        low, high = np.log(size_S[max(best - 1, 0)]), np.log(size_S[min(best + 1, 200)])
    n = float(size_S[best])
    return n, flops / FLOPS_A_TOKEN / n
