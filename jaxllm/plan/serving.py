"""Sizes that cost least over training and serving together (Sardana et al. 2023, arXiv 2401.00448).

A served token costs 2 N FLOPs, a training token 6 N. A smaller model trained longer reaches the same loss; the more tokens
will be served, the more that pays.
"""

import dataclasses
import math

import numpy as np

from jaxllm.plan.laws import FLOPS_A_TOKEN, Parametric

FLOPS_A_SERVED_TOKEN = 2  # of a parameter: a multiply-add, forward alone


@dataclasses.dataclass(frozen=True)
class Lifetime:
    """A model and what it costs until it is replaced, in FLOPs."""

    parameters: float
    tokens: float
    served: float
    loss: float

    @property
    def training_flops(self) -> float:
        return FLOPS_A_TOKEN * self.parameters * self.tokens

    @property
    def serving_flops(self) -> float:
        return FLOPS_A_SERVED_TOKEN * self.parameters * self.served

    @property
    def flops(self) -> float:
        return self.training_flops + self.serving_flops


def cheapest(law: Parametric, loss: float, served: float) -> Lifetime:
    """Returns the model of this loss with the fewest FLOPs over training and serving `served` tokens.

    In x = log N the cost has one minimum, where its derivative changes sign: D (1 - alpha P / beta Q) + served / 3 = 0 with
    P = A N^-alpha and Q = loss - E - P. The root is found by halving, to the last digit. Raises ValueError for a loss that
    no model reaches.
    """
    if loss <= law.E:
        raise ValueError(f"a loss of {loss:g} is out of reach: {law.name} ends at E = {law.E:.4g}")

    def slope(x: float) -> float:
        p = law.A * math.exp(-law.alpha * x)
        q = loss - law.E - p
        if q <= 0:
            return -math.inf
        return math.exp(math.log(law.B / q) / law.beta) * (1 - law.alpha * p / (law.beta * q)) + served / 3

    # Below `low` the loss is never reached; at `high`, the law's own optimum, alpha P = beta Q and the slope is served / 3.
    low = math.log(law.A / (loss - law.E)) / law.alpha
    high = math.log(law.A / (loss - law.E) * (1 + law.alpha / law.beta)) / law.alpha
    while served > 0 and low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    parameters = math.exp(high)
    return Lifetime(parameters, float(law.tokens_to_reach(loss, parameters)), served, loss)


def same_quality(law: Parametric, parameters: float, served: float) -> tuple[Lifetime, Lifetime]:
    """Returns (the compute-optimal model of this size, the cheapest one over its life that is as good)."""
    return cheapest_of_quality(law, parameters, law.tokens_for(parameters), served)


def cheapest_of_quality(law: Parametric, parameters: float, tokens: float, served: float) -> tuple[Lifetime, Lifetime]:
    """Returns (this model with what serving it costs, the cheapest one over its life of the same loss)."""
    usual = Lifetime(float(parameters), float(tokens), served, float(law.loss(parameters, tokens)))
    return usual, cheapest(law, usual.loss, served)


def within(law: Parametric, flops: float, served: float) -> Lifetime:
    """Returns the model of the lowest loss whose training and serving cost `flops` together."""
    def tokens(parameters):
        return (flops - FLOPS_A_SERVED_TOKEN * parameters * served) / (FLOPS_A_TOKEN * parameters)

    high = float(law.optimal(flops)[0])
    if served > 0:
        high = min(high, flops / (FLOPS_A_SERVED_TOKEN * served) * (1 - 1e-9))
    low = high * 1e-6
    for _ in range(6):
        size_S = np.exp(np.linspace(math.log(low), math.log(high), 201))
        best = int(np.argmin(law.loss(size_S, tokens(size_S))))
        low, high = size_S[max(best - 1, 0)], size_S[min(best + 1, 200)]
    n = float(size_S[best])
    return Lifetime(n, float(tokens(n)), served, float(law.loss(n, tokens(n))))
