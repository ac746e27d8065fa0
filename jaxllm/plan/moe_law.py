"""A scaling law of mixture-of-experts models, for fitting to one's own runs: no constants are built in.

L(N, D, X) = E + A X^delta N^-(alpha + gamma ln X) + B X^omega D^-(beta + zeta ln X), the joint law of Ludziejewski et al. 2025
(arXiv 2502.05172, equation 6), with N the parameters that a token meets, D the tokens and X the number of experts; X = 1 is
a dense model and the law of Hoffmann et al. Theirs puts a saturating function of the number of experts in X's place, whose
two constants come from the range tried; here X is the number itself, so do not read it beyond the runs.
"""

import dataclasses
import math

import numpy as np

from jaxllm.plan.laws import Parametric

NAMES = ("E", "A", "B", "alpha", "beta", "delta", "omega", "gamma", "zeta")


@dataclasses.dataclass(frozen=True)
class MoELaw:
    """The constants of the law above."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    delta: float
    omega: float
    gamma: float
    zeta: float

    def at(self, experts) -> Parametric:
        """Returns the law of models with so many experts."""
        x = np.log(experts)
        return Parametric(f"{experts:g} experts", "your runs", E=self.E, A=self.A * np.exp(self.delta * x),
                          B=self.B * np.exp(self.omega * x), alpha=self.alpha + self.gamma * x, beta=self.beta + self.zeta * x)

    def loss(self, active_parameters, tokens, experts):
        x = np.log(experts)
        return (self.E + self.A * np.exp(self.delta * x - (self.alpha + self.gamma * x) * np.log(active_parameters))
                + self.B * np.exp(self.omega * x - (self.beta + self.zeta * x) * np.log(tokens)))

    def dense_equal(self, active_parameters: float, tokens: float, experts: float) -> float:
        """Returns the size of the dense model that has the same loss after the same tokens; inf where none has."""
        left = float(self.loss(active_parameters, tokens, experts)) - self.E - self.B * tokens**-self.beta
        return (self.A / left) ** (1 / self.alpha) if left > 0 else math.inf
