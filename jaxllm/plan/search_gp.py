"""The default chooser of `jaxllm plan search`: a scrambled Sobol start, then a Gaussian process and expected improvement.

NumPy and SciPy only, and a pure function of the seed, the trial's number and the results it is given. The parts are those of
Snoek et al. 2012 (Matern 5/2 covariance with a length for each feature, expected improvement) with three changes for losses of
trainings: losses above the median are drawn in by a logarithm, as how bad a bad setting is tells little about where the best
one lies; the improvement is weighed with the chance to be feasible (Gardner et al. 2014), so that a cliff to divergence does
not bend the losses; and the process has a quadratic part beside the Matern one, as a loss is a bowl in the logarithm of most
settings.

D settings of the space, F features of a trial, N trials, C candidates.
"""

import inspect

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.stats import norm, qmc

from jaxllm.plan.search_space import Space

WIDE, NEAR = 512, 256  # candidates all over the space, and around the best trials
JITTER = 1e-8
MIDDLE, SPREAD = (-0.35, 0.0, -3.0, -5.0), (0.8, 1.0, 1.5, 2.5)  # of normal priors: log length, variance, quadratic, noise


def start_trials(space: Space) -> int:
    """Returns how many trials are quasi-random before the process chooses."""
    return len(space.dimensions) + 2


def ask(space: Space, known: list[tuple[dict, float | None]], pending: list[dict], number: int, seed: int) -> dict:
    """Returns the next trial's settings.

    `known`: (settings, loss to be minimised; None where infeasible) of finished trials; `pending`: settings of those under way.
    """
    good = [(params, value) for params, value in known if value is not None]
    x_NF = np.array([space.features(params) for params, _ in good])
    y_N = standard(drawn_in(np.array([value for _, value in good])))
    model = Process.fit(x_NF, y_N)
    if pending:  # taken to give what the process expects: the kriging believer of Ginsbourger et al. 2010
        lie_PF = np.array([space.features(params) for params in pending])
        model = Process(model.theta, np.concatenate([x_NF, lie_PF]), np.concatenate([y_N, model.predict(lie_PF)[0]]))
    tried = {repr(sorted(params.items())) for params in [p for p, _ in known] + pending}
    choices = candidates(space, [params for params, _ in good], model, number, seed)
    # of a small space every point may have been tried: then another run of the best-looking one
    choices = [params for params in choices if repr(sorted(params.items())) not in tried] or choices
    x_CF = np.array([space.features(params) for params in choices])
    mean_C, std_C = model.predict(x_CF)
    best = model.predict(x_NF)[0].min()  # of the process, not of the losses, whose lowest owes something to luck
    return choices[int(np.argmax(improvement(best - mean_C, std_C) * feasible(space, known, x_CF)))]


def feasible(space: Space, known, x_CF: np.ndarray) -> np.ndarray:
    """Returns the chance [C] of a candidate to be feasible: of a process of its own, which expects it."""
    y_N = np.array([0.0 if value is not None else -2.0 for _, value in known])
    if not y_N.any():
        return np.ones(len(x_CF))
    mean_C, std_C = Process.fit(np.array([space.features(params) for params, _ in known]), y_N).predict(x_CF)
    return norm.cdf((1 + mean_C) / np.sqrt(0.1 + std_C**2))


def candidates(space: Space, known: list[dict], model: "Process", number: int, seed: int) -> list[dict]:
    """Returns settings all over the space and, closer and closer, around the three trials that the process likes best."""
    rng, d = np.random.default_rng([seed, number]), len(space.dimensions)
    wide_CD = qmc.Sobol(d, scramble=True, **random_state(rng)).random(WIDE)
    mean_N = model.predict(np.array([space.features(params) for params in known]))[0]
    centre_ND = np.array([space.encode(known[i]) for i in np.argsort(mean_N, kind="stable")[:3]])
    centre_CD = centre_ND[rng.integers(len(centre_ND), size=NEAR)]
    step_C = np.geomspace(0.03, 0.3, NEAR)  # nearer ones would tell noise from noise
    moved_CD = rng.random((NEAR, d)) < max(0.5, 1 / d)
    near_CD = np.abs(centre_CD + moved_CD * step_C[:, None] * rng.standard_normal((NEAR, d)))
    near_CD = np.clip(np.where(near_CD > 1, 2 - near_CD, near_CD), 0, 1)  # reflected: clipped ones would crowd at the ends
    return [space.decode(u_D) for u_D in np.concatenate([wide_CD, near_CD])]


def drawn_in(y_N: np.ndarray) -> np.ndarray:
    """Returns the losses with what is above the median drawn in by a logarithm: how bad a bad one is tells little."""
    middle = np.median(y_N)
    scale = np.sqrt(np.mean((y_N[y_N <= middle] - middle) ** 2)) or 1.0
    over_N = np.maximum(y_N - middle, 0) / scale
    return np.where(y_N > middle, middle + scale * np.log1p(over_N), y_N)


def standard(y_N: np.ndarray) -> np.ndarray:
    return (y_N - y_N.mean()) / (y_N.std() or 1.0)


def improvement(gain_C: np.ndarray, std_C: np.ndarray) -> np.ndarray:
    """Returns the expected improvement E max(gain + std z, 0), z being standard normal."""
    z_C = gain_C / std_C
    return gain_C * norm.cdf(z_C) + std_C * norm.pdf(z_C)


def random_state(rng) -> dict:
    """Returns the argument that SciPy's quasi-random engines take a generator by: `rng` since 1.15, `seed` before."""
    return {"rng" if "rng" in inspect.signature(qmc.Sobol).parameters else "seed": rng}


class Process:
    """A Gaussian process with zero mean: its covariance's numbers and what it was shown."""

    def __init__(self, theta: np.ndarray, x_NF: np.ndarray, y_N: np.ndarray):
        self.theta, self.x_NF = theta, x_NF
        k_NN = covariance(theta, x_NF, x_NF) + (np.exp(theta[-1]) + JITTER) * np.eye(len(x_NF))
        self.factor = cho_factor(k_NN, lower=True)
        self.weight_N = cho_solve(self.factor, y_N)

    @classmethod
    def fit(cls, x_NF: np.ndarray, y_N: np.ndarray) -> "Process":
        """Finds the covariance's numbers: the most probable ones, from long and from short lengths."""
        f = x_NF.shape[1]
        found = [minimize(cls.cost, np.array([*[start] * f, *MIDDLE[1:]]), (x_NF, y_N), "L-BFGS-B", jac=True,
                          bounds=[(-3, 3)] * f + [(-5, 3), (-6, 3), (-9, 1)], options={"maxiter": 50})
                 for start in (MIDDLE[0], -1.4)]
        return cls(min(found, key=lambda one: one.fun).x, x_NF, y_N)

    @classmethod
    def cost(cls, theta: np.ndarray, x_NF: np.ndarray, y_N: np.ndarray) -> tuple[float, np.ndarray]:
        """Returns minus the log posterior (of the losses, and of normal priors on the logarithms) and its gradient."""
        own, f = cls(theta, x_NF, y_N), x_NF.shape[1]
        off = (theta - np.array([*[MIDDLE[0]] * f, *MIDDLE[1:]])) / np.array([*[SPREAD[0]] * f, *SPREAD[1:]])
        p_NN = cho_solve(own.factor, np.eye(len(y_N))) - np.outer(own.weight_N, own.weight_N)
        slopes = [0.5 * np.sum(p_NN * d_NN) for d_NN in slopes_of(theta, x_NF)]
        value = 0.5 * y_N @ own.weight_N + np.log(np.diag(own.factor[0])).sum() + 0.5 * np.sum(off**2)
        return float(value), np.array(slopes) + off / np.array([*[SPREAD[0]] * f, *SPREAD[1:]])

    def predict(self, x_CF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns mean and standard deviation of the loss without its noise, each [C]."""
        k_CN = covariance(self.theta, x_CF, self.x_NF)
        v_NC = solve_triangular(self.factor[0], k_CN.T, lower=True)
        own_C = np.exp(self.theta[-3]) + quadratic(self.theta, np.sum(((x_CF - 0.5) * np.exp(-self.theta[:-3])) ** 2, axis=1))
        return k_CN @ self.weight_N, np.sqrt(np.maximum(own_C - np.sum(v_NC**2, axis=0), 1e-12))


def covariance(theta: np.ndarray, a_NF: np.ndarray, b_CF: np.ndarray) -> np.ndarray:
    """Returns Matern 5/2 plus a quadratic in the features; theta: log lengths [F], log variances of both, log noise."""
    scaled = np.exp(-theta[:-3])
    r_NC = np.sqrt(5 * np.sum(((a_NF[:, None] - b_CF[None]) * scaled) ** 2, axis=2))
    return (np.exp(theta[-3]) * (1 + r_NC + r_NC**2 / 3) * np.exp(-r_NC)
            + quadratic(theta, ((a_NF - 0.5) * scaled) @ ((b_CF - 0.5) * scaled).T))


def quadratic(theta: np.ndarray, product) -> np.ndarray:
    return np.exp(theta[-2]) * (1 + product) ** 2


def slopes_of(theta: np.ndarray, x_NF: np.ndarray):
    """Yields the derivative [N, N] of the covariance by each number of theta."""
    scaled_NF = x_NF * np.exp(-theta[:-3])
    d2_NNF, middle_NF = (scaled_NF[:, None] - scaled_NF[None]) ** 2, (x_NF - 0.5) * np.exp(-theta[:-3])
    r_NN, product_NN = np.sqrt(5 * d2_NNF.sum(2)), middle_NF @ middle_NF.T
    steep_NN, flat_NN = np.exp(theta[-3]) * 5 / 3 * (1 + r_NN) * np.exp(-r_NN), -4 * np.exp(theta[-2]) * (1 + product_NN)
    for f in range(x_NF.shape[1]):
        yield steep_NN * d2_NNF[:, :, f] + flat_NN * np.outer(middle_NF[:, f], middle_NF[:, f])
    yield np.exp(theta[-3]) * (1 + r_NN + r_NN**2 / 3) * np.exp(-r_NN)
    yield quadratic(theta, product_NN)
    yield np.exp(theta[-1]) * np.eye(len(x_NF))
