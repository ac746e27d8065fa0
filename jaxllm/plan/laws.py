"""Scaling laws: the loss of N parameters after D tokens, and the N and D that spend a budget of C = 6 N D FLOPs best.

N counts all parameters, embeddings included, D the training tokens, C the FLOPs of training. Every function takes numbers
or NumPy arrays. Losses are nats a token of the paper's own text and tokenizer: differences between two losses of one law
carry over to other text far better than the losses do.

Where the published figures disagree, and what is done about it here:
- Equation 10 of Hoffmann et al. rounds its exponents to two digits. At 5.76e23 FLOPs that moves the best size from 40 B
  (theirs) to 32 B. HOFFMANN holds the digits that the paper's TeX source gives.
- Neither set gives table A3's column of approach 3, which is a power law of its own (exponent 0.459, where the digits
  give 0.457): they ask for 2 to 18 % (unrounded) and 57 to 122 % (rounded) more FLOPs than it. TABLE_A3 is that column.
- That column prints 1.26e24 FLOPs for 175 B; 6 x 175e9 x 12.0e12 and the rows around it say 1.26e25.
- The tables' row "67 B" is one of some 68 to 70 B by the other rows. The power laws leave it out.
"""

import dataclasses
import math

import numpy as np

FLOPS_A_TOKEN = 6  # of a parameter: a multiply-add forward and two backward


@dataclasses.dataclass(frozen=True)
class Parametric:
    """L(N, D) = E + A / N^alpha + B / D^beta (approach 3 of Hoffmann et al. 2022, arXiv 2203.15556, equations 2 and 4)."""

    name: str
    source: str
    E: float  # what no model and no amount of data gets below
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters, tokens):
        return self.E + self.A * np.power(parameters, -self.alpha) + self.B * np.power(tokens, -self.beta)

    @property
    def exponent(self) -> float:
        """a of N = G (C/6)^a; tokens grow with 1 - a."""
        return self.beta / (self.alpha + self.beta)

    @property
    def scale(self) -> float:
        """G of N = G (C/6)^a."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def optimal(self, flops):
        """Returns (N, D) of the lowest loss among those with 6 N D = `flops`."""
        parameters = self.scale * np.power(flops / FLOPS_A_TOKEN, self.exponent)
        return parameters, flops / FLOPS_A_TOKEN / parameters

    def tokens_for(self, parameters):
        """Returns the D for which `parameters` is the best size."""
        return np.power(parameters / self.scale, 1 / self.exponent) / parameters

    def parameters_for(self, tokens):
        """Returns the N for which `tokens` is the best amount of data."""
        a = self.exponent
        return self.scale ** (1 / (1 - a)) * np.power(tokens, a / (1 - a))

    def tokens_to_reach(self, loss, parameters):
        """Returns the D after which N parameters have this loss; inf where they never do."""
        left = np.asarray(loss - self.E - self.A * np.power(parameters, -self.alpha))
        return np.where(left > 1e-9, np.power(self.B / np.maximum(left, 1e-9), 1 / self.beta), math.inf)[()]


@dataclasses.dataclass(frozen=True)
class Frontier:
    """N = k C^a and D = C / 6N: a law that says what is best, but no loss."""

    name: str
    source: str
    k: float
    exponent: float

    def optimal(self, flops):
        parameters = self.k * np.power(flops, self.exponent)
        return parameters, flops / FLOPS_A_TOKEN / parameters

    def tokens_for(self, parameters):
        return np.power(parameters / self.k, 1 / self.exponent) / FLOPS_A_TOKEN / parameters

    def parameters_for(self, tokens):
        """Returns the N for which `tokens` is the best amount: D = C^(1-a) / 6k, turned round."""
        return self.k * np.power(tokens * FLOPS_A_TOKEN * self.k, self.exponent / (1 - self.exponent))


Law = Parametric | Frontier

HOFFMANN = Parametric(
    "approach 3", "Hoffmann et al. 2022 (arXiv 2203.15556), approach 3, digits of its TeX source as Besiroglu et al. 2024 "
    "(arXiv 2404.10102) quote them", E=math.exp(0.5267228), A=math.exp(6.0073404), B=math.exp(6.0179186),
    alpha=0.33917084, beta=0.2849083)
HOFFMANN_ROUNDED = Parametric(
    "approach 3, rounded", "Hoffmann et al. 2022, equation 10 as printed", E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
EPOCH = Parametric(
    "Epoch's re-fit", "Besiroglu et al. 2024 (arXiv 2404.10102): approach 3 fitted again to the points of the paper's figure",
    E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
MUENNIGHOFF = Parametric(
    "data-constrained", "Muennighoff et al. 2023 (arXiv 2305.16264), appendix A, on C4; equal exponents by construction",
    E=math.exp(0.6254804), A=math.exp(6.255414), B=math.exp(7.3049974), alpha=0.3526596, beta=0.3526596)

# Power laws through the rows of tables 3 and A3 of Hoffmann et al. 2022 without the row of 67 B: within 0.4 % of every
# printed FLOP count. The paper prints their exponents as 0.50, 0.49 and 0.46.
APPROACH_1 = Frontier("approach 1", "Hoffmann et al. 2022, table 3 (envelope of training curves)", 0.09934853, 0.49809164)
APPROACH_2 = Frontier("approach 2", "Hoffmann et al. 2022, table A3 (IsoFLOP profiles)", 0.14557403, 0.48992737)
TABLE_A3 = Frontier("approach 3, table", "Hoffmann et al. 2022, table A3 (parametric)", 0.53762091, 0.45864290)
TWENTY = Frontier("20 tokens a parameter", "the rule of thumb drawn from Hoffmann et al. 2022", 120**-0.5, 0.5)

DEFAULT = EPOCH
# What the spread is told over. Kaplan et al. (kaplan.py) stand apart: their sizes leave out embeddings and their runs were
# too short for their schedules, which is why the laws after them disagree with them.
LAWS: dict[str, Law] = {
    "epoch": EPOCH, "approach_1": APPROACH_1, "approach_2": APPROACH_2, "approach_3": HOFFMANN,
    "approach_3_rounded": HOFFMANN_ROUNDED, "table_a3": TABLE_A3, "data_constrained": MUENNIGHOFF, "twenty": TWENTY,
}
# The rows of table 3 and table A3: sizes for which the paper prints FLOPs and tokens.
TABLE_SIZES = (400e6, 1e9, 10e9, 67e9, 175e9, 280e9, 520e9, 1e12, 10e12)


def parametric(law: Law) -> Parametric:
    """Returns the law that tells losses: `law` itself, or the default where `law` only tells sizes."""
    return law if isinstance(law, Parametric) else DEFAULT


def table(law: Law, sizes=TABLE_SIZES) -> list[dict]:
    """Returns, for each size, the FLOPs and tokens at which it is the best one."""
    return [{"parameters": n, "tokens": float(d := law.tokens_for(n)), "flops": float(FLOPS_A_TOKEN * n * d)} for n in sizes]


def spread(flops: float, laws: dict[str, Law] = LAWS) -> list[dict]:
    """Returns what each law makes of a budget, smallest model first."""
    rows = []
    for key, law in laws.items():
        n, d = law.optimal(flops)
        loss = float(law.loss(n, d)) if isinstance(law, Parametric) else None
        rows.append({"law": key, "name": law.name, "parameters": float(n), "tokens": float(d),
                     "tokens_a_parameter": float(d / n), "loss": loss, "source": law.source})
    return sorted(rows, key=lambda r: r["parameters"])
