"""Approaches 1 and 2 of Hoffmann et al. 2022: the best size for each compute, and the power law through these.

Approach 1 takes the envelope of the sizes' curves of loss over compute. Approach 2 fits a parabola in log N to the runs of
each budget and takes its lowest point. Both give N = k C^a; intervals come from resampled residuals.
"""

# R runs, B budgets, S bootstrap samples, C values of compute.
import dataclasses

import numpy as np

from jaxllm.plan.laws import FLOPS_A_TOKEN, Frontier

GRID = 200  # values of compute over which the envelope is taken
SAME = 0.05  # budgets whose FLOPs differ by less than this share are one
LEAST_BUDGETS, LEAST_SIZES, LEAST_POINTS = 3, 4, 4


class TooFew(Exception):
    """There are too few runs for an approach: says how many of what it needs."""


@dataclasses.dataclass(frozen=True)
class Best:
    """The best sizes found, the law through them, and the exponents and factors of the bootstrap samples."""

    law: Frontier
    flops_B: np.ndarray
    parameters_B: np.ndarray
    exponent_S: np.ndarray
    log_k_S: np.ndarray
    curves: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]  # what is drawn: x, y of points, x, y of the fit

    def optimal(self, flops: float) -> np.ndarray:
        """Returns the best size for `flops` by each sample."""
        return np.exp(self.log_k_S + self.exponent_S * np.log(flops))


def envelope(curves: list[tuple[float, np.ndarray, np.ndarray]], *, samples: int = 1000, seed: int = 0) -> Best:
    """Returns approach 1 of sizes' curves, each (parameters, tokens, losses); raises TooFew.

    All curves are smoothed together, by a polynomial of log N and log D; then of each compute the size with the lowest loss
    is taken, to between its neighbours. Where the smallest or the largest size that reaches a compute is the best, the
    true best may lie outside, and that compute is left out.
    """
    whole = [c for c in sorted(curves, key=lambda c: c[0]) if len(c[1]) >= LEAST_POINTS]
    if len(whole) < LEAST_SIZES:
        raise TooFew(f"needs {LEAST_SIZES} sizes with losses at {LEAST_POINTS} or more amounts of tokens; "
                     f"{len(whole)} of {len(curves)} have")
    u_Z = np.log([n for n, _, _ in whole])
    u_R, v_R, y_R = (np.concatenate(x) for x in zip(*((np.full(len(d), np.log(n)), np.log(d), np.log(y)) for n, d, y in whole),
                                                    strict=True))
    reach_Z2 = np.array([(u + np.log(FLOPS_A_TOKEN * d.min()), u + np.log(FLOPS_A_TOKEN * d.max()))
                         for u, (_, d, _) in zip(u_Z, whole, strict=True)])
    x_C = np.linspace(reach_Z2.min(), reach_Z2.max(), GRID)
    known_ZC = (x_C[None] >= reach_Z2[:, :1]) & (x_C[None] <= reach_Z2[:, 1:])
    v_ZC = x_C[None] - u_Z[:, None] - np.log(FLOPS_A_TOKEN)
    at, own = _surface(u_R, v_R, y_R, np.broadcast_to(u_Z[:, None], v_ZC.shape).ravel(), v_ZC.ravel())
    fitted_R = own @ y_R
    spare = np.sqrt(len(y_R) / max(len(y_R) - own.trace(), 1))
    resampled_SR = fitted_R + spare * np.random.default_rng(seed).choice(y_R - fitted_R, (samples, len(y_R)))
    value_SZC = (np.concatenate([y_R[None], resampled_SR]) @ at.T).reshape(-1, *v_ZC.shape)
    drawn = [(FLOPS_A_TOKEN * n * d, y, np.exp(x_C[k]), np.exp(value[k])) for (n, d, y), k, value
             in zip(whole, known_ZC, value_SZC[0], strict=True)]
    value_SZC[:, ~known_ZC] = np.inf
    best_SC = np.argmin(value_SZC, 1)
    middle_SC = np.clip(best_SC, 1, len(whole) - 2)
    left, here, right = (np.take_along_axis(value_SZC, (middle_SC + k)[:, None], 1)[:, 0] for k in (-1, 0, 1))
    inside_SC = (best_SC == middle_SC) & np.isfinite(left) & np.isfinite(right)
    vertex_SC = _vertex(u_Z[middle_SC - 1], u_Z[middle_SC], u_Z[middle_SC + 1], left, here, right)
    if (found := len(np.unique(best_SC[0][inside_SC[0]]))) < LEAST_BUDGETS:
        raise TooFew(f"needs {LEAST_BUDGETS} sizes that are the best at some compute, with smaller and larger ones beside "
                     f"them; {found} are")
    lines = [_line(x_C[m], row[m]) if m.sum() >= 8 else (np.nan, np.nan) for row, m in zip(vertex_SC, inside_SC, strict=True)]
    slope_S, factor_S = np.array(lines).T
    shown = inside_SC[0]
    return Best(Frontier("approach 1", "your runs: envelope of curves", float(np.exp(factor_S[0])), float(slope_S[0])),
                np.exp(x_C[shown]), np.exp(vertex_SC[0][shown]), *_finite(slope_S[1:], factor_S[1:]), drawn)


def isoflop(parameters, flops, losses, *, samples: int = 1000, seed: int = 0) -> Best:
    """Returns approach 2 of runs with these sizes and budgets; raises TooFew.

    A budget counts whose parabola has its lowest point no farther outside its sizes than they are wide.
    """
    rng, x_B, vertex_SB, drawn, passed = np.random.default_rng(seed), [], [], [], 0
    parameters, losses = np.asarray(parameters, float), np.asarray(losses, float)
    budgets = group(np.asarray(flops, float))
    usable = [r for r in budgets if len(np.unique(parameters[r])) >= LEAST_SIZES]
    for runs in usable:
        u, y = np.log(parameters[runs]), np.log(losses[runs])
        at = np.linspace(u.min(), u.max(), 40)
        smooth, basis = _polynomial(u, at, degree=2)
        fitted = basis @ y
        spare = np.sqrt(len(u) / max(len(u) - 3, 1))
        all_SR = np.concatenate([y[None], fitted + spare * rng.choice(y - fitted, (samples, len(u)))])
        c2, c1, _ = np.polyfit(u - u.mean(), all_SR.T, 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            vertex_S = np.where(c2 > 0, u.mean() - c1 / (2 * c2), np.nan)
        width = u.max() - u.min()
        vertex_S[(vertex_S < u.min() - width) | (vertex_S > u.max() + width)] = np.nan
        drawn.append((np.exp(u), losses[runs], np.exp(at), np.exp(smooth @ y)))
        if np.isnan(vertex_S[0]):
            passed += 1
            continue
        x_B.append(np.mean(np.log(np.asarray(flops)[runs])))
        vertex_SB.append(vertex_S)
    if len(x_B) < LEAST_BUDGETS:
        without = f"; {passed} more have no lowest point near their sizes" if passed else ""
        raise TooFew(f"needs {LEAST_BUDGETS} budgets (6 N D within {SAME:.0%}) with {LEAST_SIZES} sizes or more each; "
                     f"{len(x_B)} of {len(budgets)} have{without}")
    x_B, vertex_SB = np.array(x_B), np.stack(vertex_SB, 1)
    slope_S, factor_S = np.array([_line(x_B[g], row[g]) if (g := np.isfinite(row)).sum() >= 2 else (np.nan, np.nan)
                                  for row in vertex_SB]).T
    return Best(Frontier("approach 2", "your runs: IsoFLOP parabolas", float(np.exp(factor_S[0])), float(slope_S[0])),
                np.exp(x_B), np.exp(vertex_SB[0]), *_finite(slope_S[1:], factor_S[1:]), drawn)


def group(values: np.ndarray) -> list[np.ndarray]:
    """Returns the runs of each budget, or size: those that are less than SAME above the least of their own."""
    groups: list[list[int]] = []
    for i in np.argsort(values):
        if groups and values[i] < values[groups[-1][0]] * (1 + SAME):
            groups[-1].append(int(i))
        else:
            groups.append([int(i)])
    return [np.array(g) for g in groups]


def _polynomial(x: np.ndarray, at: np.ndarray, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns two matrices that make of values at `x` the least-squares polynomial's values at `at`, and at `x`."""
    middle, width = x.mean(), max(x.max() - x.min(), 1e-9) / 2
    solve = np.linalg.pinv(np.vander((x - middle) / width, degree + 1))
    return np.vander((at - middle) / width, degree + 1) @ solve, np.vander((x - middle) / width, degree + 1) @ solve


def _surface(u: np.ndarray, v: np.ndarray, y: np.ndarray, at_u: np.ndarray,
             at_v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns two matrices that make of values at (u, v) a least-squares polynomial's at (at_u, at_v), and at (u, v).

    Its total degree, 2 to 4, is the one with the least generalised cross-validation error on `y` (Craven and Wahba 1979).
    """
    def features(a, b, degree):
        a, b = ((w - own.mean()) / max(np.ptp(own), 1e-9) * 2 for w, own in ((a, u), (b, v)))
        return np.stack([a**i * b**j for i in range(degree + 1) for j in range(degree + 1 - i)], 1)

    tried = []
    for degree in (2, 3, 4):
        own = features(u, v, degree)
        if own.shape[1] < len(u):
            solve = np.linalg.pinv(own)
            tried.append((np.sum((y - own @ (solve @ y)) ** 2) / (len(u) - own.shape[1]) ** 2, degree, solve, own))
    _, degree, solve, own = min(tried, key=lambda one: one[:2])
    return features(at_u, at_v, degree) @ solve, own @ solve


def _vertex(x0, x1, x2, y0, y1, y2):
    """Returns where the parabolas through three points each are lowest, `y1` being the least."""
    with np.errstate(invalid="ignore", divide="ignore"):
        rise, fall = (y2 - y1) / (x2 - x1), (y1 - y0) / (x1 - x0)
        curve = (rise - fall) / (x2 - x0)
        found = (x0 + x1) / 2 - fall / (2 * curve)
    return np.where(np.isfinite(found), np.clip(found, x0, x2), x1)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    slope, factor = np.polyfit(x - x.mean(), y, 1)
    return slope, factor - slope * x.mean()


def _finite(*values: np.ndarray) -> tuple[np.ndarray, ...]:
    good = np.all([np.isfinite(v) for v in values], 0)
    return tuple(v[good] for v in values)
