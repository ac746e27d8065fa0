"""Approach 3 of Hoffmann et al. 2022: L(N, D) = E + A/N^alpha + B/D^beta fitted to losses of runs, from every start at once.

Minimised is sum over runs of Huber(LSE(a - alpha log N, b - beta log D, e) - log L), delta 1e-3 (their equation 3; A = exp a,
B = exp b, E = exp e), the sum and not the mean (Besiroglu et al. 2024 show where the mean makes the search end early). Here
log N and log D are centred first, which changes a and b only: the search is then well scaled and every one of the paper's
4,500 starts reaches the same minimum.

Each start takes damped Gauss-Newton steps on the Huber-weighted squares. Damping that is the same for every parameter
(Levenberg's) and a limit on each step keep a term that weighs nothing where the search begins from being sent to where it
never weighs anything again. Starts and bootstrap samples are rows of one compiled program, in float64.
"""

# S starts or samples, N runs, P the parameters a, b, e, alpha, beta (of centred logarithms), F features of a run.
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.plan.laws import Parametric

DELTA = 1e-3  # Huber's: beyond it a residual counts by its size, not its square
STEPS = 400
BATCH = 125  # rows that one loop carries: their residuals stay in the core's cache


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law, how well every start did, and the laws of the bootstrap samples."""

    law: Parametric
    objective: float
    objective_S: np.ndarray  # where each start ended
    residual_N: np.ndarray  # log of the loss over what the law says
    sample_SP: np.ndarray  # E, A, B, alpha, beta of each bootstrap sample

    def samples(self) -> Parametric:
        """Returns the samples' laws as one whose constants are arrays."""
        return dataclasses.replace(self.law, **dict(zip(("E", "A", "B", "alpha", "beta"), self.sample_SP.T, strict=True)))


def grid() -> np.ndarray:
    """Returns the paper's starts (its appendix D.3): 4,500 rows of a, b, e, alpha, beta."""
    five, six = np.arange(0, 2.1, 0.5), np.arange(0, 25.1, 5)
    return np.array(list(itertools.product(six, six, np.arange(-1, 1.1, 0.5), five, five)))


def fit(parameters, tokens, losses, *, bootstraps: int = 4000, seed: int = 0, starts: np.ndarray | None = None) -> Fit:
    """Returns the law of these runs; `bootstraps` samples of as many, drawn with repetition, each start at the best fit."""
    u_N, v_N, y_N = np.log(parameters), np.log(tokens), np.log(losses)
    u0, v0 = u_N.mean(), v_N.mean()
    start_SP = grid() if starts is None else np.asarray(starts, float)
    with float64():
        run = functools.partial(_minimise, u_N=u_N - u0, v_N=v_N - v0, y_N=y_N)
        end_SP, objective_S = run(start_SP, np.ones((1, len(y_N))))
        best_P = end_SP[int(np.argmin(objective_S))]
        rng = np.random.default_rng(seed)
        weight_SN = rng.multinomial(len(y_N), np.full(len(y_N), 1 / len(y_N)), bootstraps).astype(float)
        sample_SP = run(np.tile(best_P, (bootstraps, 1)), weight_SN)[0] if bootstraps else np.zeros((0, 5))
    law = Parametric("your fit", "fitted to your own runs", *map(float, _constants(best_P[None], u0, v0)[0]))
    return Fit(law, float(objective_S.min()), objective_S, y_N - np.log(law.loss(np.asarray(parameters), np.asarray(tokens))),
               _constants(sample_SP, u0, v0))


def _constants(fitted_SP: np.ndarray, u0: float, v0: float) -> np.ndarray:
    """Returns E, A, B, alpha, beta of a, b, e, alpha, beta in centred logarithms."""
    a, b, e, alpha, beta = fitted_SP.T
    return np.stack([np.exp(e), np.exp(a + alpha * u0), np.exp(b + beta * v0), alpha, beta], 1)


def float64():
    """Returns a context in which jax computes in float64, by the name that this version has for it."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # jax 0.7

    return enable_x64()


def _minimise(start_SP, weight_SN, *, u_N, v_N, y_N) -> tuple[np.ndarray, np.ndarray]:
    """Returns (where each start ends, its objective); one row of weights serves all starts."""
    S = len(start_SP)
    fill = -S % BATCH  # the last batch is made whole with copies
    start_SP = np.concatenate([start_SP, np.repeat(start_SP[-1:], fill, 0)])
    if len(weight_SN) > 1:
        weight_SN = np.concatenate([weight_SN, np.repeat(weight_SN[-1:], fill, 0)])
    end_SP, objective_S = _search(start_SP, weight_SN, u_N, v_N, y_N)
    return np.asarray(end_SP)[:S], np.asarray(objective_S)[:S]


@jax.jit
def _search(start_SP, weight_SN, u_N, v_N, y_N):
    one = functools.partial(_descend, u_N=u_N, v_N=v_N, y_N=y_N)
    batches = start_SP.reshape(-1, BATCH, 5)
    if weight_SN.shape[0] == 1:
        ends = jax.lax.map(jax.vmap(lambda t_P: one(t_P, weight_SN[0])), batches)
    else:
        ends = jax.lax.map(lambda x: jax.vmap(one)(*x), (batches, weight_SN.reshape(-1, BATCH, u_N.shape[0])))
    return jax.tree.map(lambda x: x.reshape(start_SP.shape[0], *x.shape[2:]), ends)


def _descend(start_P, weight_N, *, u_N, v_N, y_N):
    """Returns (the parameters, the objective) where steps no longer help."""
    feature_NF = jnp.stack([jnp.ones_like(u_N), u_N, u_N**2, v_N, v_N**2, u_N * v_N], 1)

    def step(carry):
        t_P, damping, _, steps, idle = carry
        objective, slope_P, curve_PP = _normal_equations(t_P, weight_N, u_N, v_N, y_N, feature_NF)
        move_P = -_solve(curve_PP + damping * jnp.trace(curve_PP) * jnp.eye(5), slope_P)
        moved_P = t_P + move_P * jnp.minimum(1.0, 1 / jnp.max(jnp.abs(move_P)))  # no parameter moves by more than 1
        after = jnp.sum(weight_N * huber(jnp.log(sum(_terms(moved_P, u_N, v_N))) - y_N))
        better = after < objective
        done = jnp.where(better, objective - after < 1e-9 * objective, damping > 1e6)
        return (jnp.where(better, moved_P, t_P), jnp.clip(jnp.where(better, damping / 5, damping * 5), 1e-12, 1e8),
                jnp.where(better, after, objective), steps + 1, jnp.where(done, idle + 1, 0))

    begin = (start_P, jnp.asarray(1e-2, start_P.dtype), jnp.asarray(jnp.inf, start_P.dtype), 0, 0)
    t_P, _, objective, _, _ = jax.lax.while_loop(lambda c: (c[3] < STEPS) & (c[4] < 3), step, begin)
    return t_P, objective


def _terms(t_P, u_N, v_N):
    """Returns A/N^alpha, B/D^beta and E; their sum's log is the LSE, which centring keeps far from overflow."""
    return jnp.exp(t_P[0] - t_P[3] * u_N), jnp.exp(t_P[1] - t_P[4] * v_N), jnp.exp(t_P[2])


def huber(r_N):
    size_N = jnp.abs(r_N)
    return jnp.where(size_N < DELTA, 0.5 * r_N**2, DELTA * (size_N - 0.5 * DELTA))


def _normal_equations(t_P, weight_N, u_N, v_N, y_N, feature_NF):
    """Returns (objective, gradient, Gauss-Newton matrix) of the Huber-weighted squares.

    A term's share of the sum is the derivative by its logarithm; by an exponent it is that times -u or -v. So every entry is a
    product of two shares summed with one of the features 1, u, u^2, v, v^2, uv.
    """
    a_N, b_N, e = _terms(t_P, u_N, v_N)
    total_N = a_N + b_N + e
    r_N = jnp.log(total_N) - y_N
    p_N, q_N, k_N = a_N / total_N, b_N / total_N, e / total_N
    w_N = weight_N * jnp.minimum(1.0, DELTA / jnp.maximum(jnp.abs(r_N), 1e-12))
    pp, pq, pk, qq, qk, kk = ((w_N * x_N) @ feature_NF for x_N in (p_N**2, p_N * q_N, p_N * k_N, q_N**2, q_N * k_N, k_N**2))
    curve_PP = jnp.array([[pp[0], pq[0], pk[0], -pp[1], -pq[3]],
                          [pq[0], qq[0], qk[0], -pq[1], -qq[3]],
                          [pk[0], qk[0], kk[0], -pk[1], -qk[3]],
                          [-pp[1], -pq[1], -pk[1], pp[2], pq[5]],
                          [-pq[3], -qq[3], -qk[3], pq[5], qq[4]]])
    p, q, k = ((w_N * x_N * r_N) @ feature_NF for x_N in (p_N, q_N, k_N))
    return jnp.sum(weight_N * huber(r_N)), jnp.array([p[0], q[0], k[0], -p[1], -q[3]]), curve_PP


def _solve(a_PP, b_P):
    """Returns the solution of five equations by elimination: written out, it runs over all rows of a batch at once."""
    n = 5
    rows = [[a_PP[i, j] for j in range(n)] + [b_P[i]] for i in range(n)]
    for k, i in itertools.combinations(range(n), 2):
        share = rows[i][k] / rows[k][k]
        rows[i] = [x - share * y for x, y in zip(rows[i], rows[k], strict=True)]
    x = [None] * n
    for i in reversed(range(n)):
        x[i] = (rows[i][n] - sum(rows[i][j] * x[j] for j in range(i + 1, n))) / rows[i][i]
    return jnp.stack(x)
