"""Fits the law of mixture-of-experts models (moe_law.py) to runs, as parametric.py fits the dense one."""

# S starts or samples, N runs, P parameters.
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.plan.moe_law import NAMES, MoELaw
from jaxllm.plan.parametric import DELTA, float64, grid, huber

STEPS = 600
LEAST_RUNS, LEAST_COUNTS = 14, 3  # nine constants; numbers of experts, dense included


@dataclasses.dataclass(frozen=True)
class MoEFit:
    """A fitted law, the residuals of its runs, and the constants of the bootstrap samples."""

    law: MoELaw
    objective: float
    objective_S: np.ndarray
    residual_N: np.ndarray
    sample_SP: np.ndarray

    def losses(self, active_parameters: float, tokens: float, experts: float) -> np.ndarray:
        """Returns what each sample says of one run."""
        return MoELaw(*self.sample_SP.T).loss(active_parameters, tokens, experts)


def fit(active_parameters, tokens, experts, losses, *, bootstraps: int = 1000, seed: int = 0) -> MoEFit:
    """Returns the law of these runs: from 50 of the paper's starts with no effect of experts, and samples from the best fit."""
    u_N, v_N, x_N, y_N = (np.log(np.asarray(a, float)) for a in (active_parameters, tokens, experts, losses))
    u0, v0 = u_N.mean(), v_N.mean()
    few_SP = grid()[::90]
    start_SP = np.concatenate([few_SP, np.zeros((len(few_SP), 4))], 1)
    with float64():
        run = functools.partial(_search, u_N=u_N - u0, v_N=v_N - v0, x_N=x_N, y_N=y_N)
        end_SP, objective_S = map(np.asarray, run(start_SP, np.ones((len(start_SP), len(y_N)))))
        best_P = end_SP[int(np.argmin(objective_S))]
        weight_SN = np.random.default_rng(seed).multinomial(len(y_N), np.full(len(y_N), 1 / len(y_N)), bootstraps).astype(float)
        sample_SP = np.asarray(run(np.tile(best_P, (bootstraps, 1)), weight_SN)[0])
    law = MoELaw(*map(float, _constants(best_P[None], u0, v0)[0]))
    residual_N = y_N - np.log(law.loss(*(np.asarray(a, float) for a in (active_parameters, tokens, experts))))
    return MoEFit(law, float(objective_S.min()), objective_S, residual_N, _constants(sample_SP, u0, v0))


def _constants(fitted_SP: np.ndarray, u0: float, v0: float) -> np.ndarray:
    """Returns the law's constants of those in centred logarithms: moving the centre moves A and B, delta and omega."""
    a, b, e, alpha, beta, delta, omega, gamma, zeta = fitted_SP.T
    out = {"E": np.exp(e), "A": np.exp(a + alpha * u0), "B": np.exp(b + beta * v0), "alpha": alpha, "beta": beta,
           "delta": delta + gamma * u0, "omega": omega + zeta * v0, "gamma": gamma, "zeta": zeta}
    return np.stack([out[name] for name in NAMES], 1)


def _residual(t_P, u_N, v_N, x_N, y_N):
    a, b, e, alpha, beta, delta, omega, gamma, zeta = t_P
    first_N = jnp.exp(a + delta * x_N - (alpha + gamma * x_N) * u_N)
    second_N = jnp.exp(b + omega * x_N - (beta + zeta * x_N) * v_N)
    return jnp.log(first_N + second_N + jnp.exp(e)) - y_N


@jax.jit
def _search(start_SP, weight_SN, u_N, v_N, x_N, y_N):
    residual = functools.partial(_residual, u_N=u_N, v_N=v_N, x_N=x_N, y_N=y_N)

    def descend(start_P, weight_N):
        def objective(t_P):
            return jnp.sum(weight_N * huber(residual(t_P)))

        def step(carry):
            t_P, damping, now, steps, idle = carry
            r_N, slope_NP = residual(t_P), jax.jacfwd(residual)(t_P)
            w_N = weight_N * jnp.minimum(1.0, DELTA / jnp.maximum(jnp.abs(r_N), 1e-12))
            curve_PP = slope_NP.T @ (w_N[:, None] * slope_NP)
            # The least damping keeps what the runs do not tell, such as the effect of a single number of experts, where it is.
            damped_PP = curve_PP + (damping + 1e-12) * jnp.trace(curve_PP) * jnp.eye(9)
            move_P = -jnp.linalg.solve(damped_PP, slope_NP.T @ (w_N * r_N))
            moved_P = t_P + move_P * jnp.minimum(1.0, 1 / jnp.max(jnp.abs(move_P)))
            after = objective(moved_P)
            better = after < now
            done = jnp.where(better, now - after < 1e-9 * now, damping > 1e6)
            return (jnp.where(better, moved_P, t_P), jnp.clip(jnp.where(better, damping / 5, damping * 5), 1e-12, 1e8),
                    jnp.where(better, after, now), steps + 1, jnp.where(done, idle + 1, 0))

        begin = (start_P, jnp.asarray(1e-2, start_P.dtype), objective(start_P), 0, 0)
        t_P, _, now, _, _ = jax.lax.while_loop(lambda c: (c[3] < STEPS) & (c[4] < 3), step, begin)
        return t_P, now

    return jax.vmap(descend)(start_SP, weight_SN)
