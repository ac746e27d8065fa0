"""Arrays of a small rollout with every shape of response, and finite differences of a reference."""

import numpy as np

ACTION_BR = np.array([
    [1, 1, 1, 1, 1, 1, 1],  # full
    [1, 1, 1, 1, 0, 0, 0],  # padding after the end
    [1, 1, 0, 0, 1, 1, 0],  # an environment's tokens in the middle
    [0, 0, 0, 0, 0, 0, 0],  # empty
    [1, 0, 0, 0, 0, 0, 0],  # one token
    [0, 1, 1, 0, 1, 0, 0],  # an environment's tokens first and in the middle
], np.float32)
B, R = ACTION_BR.shape


def poisoned(x_BR, action_BR=ACTION_BR):
    """Returns x with NaN off actions: what stands there may never be looked at."""
    return np.where(action_BR > 0, x_BR, np.nan).astype(np.float32)


def logps(seed: int, spread: float = 0.3):
    """Returns (log-probabilities, others near them), float32 [B, R], NaN off actions."""
    rng = np.random.default_rng(seed)
    logp_BR = -rng.exponential(1.0, (B, R))
    return poisoned(logp_BR), poisoned(logp_BR + spread * rng.standard_normal((B, R)))


def normal(seed: int, *shape: int):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def actions(action_BR=ACTION_BR):
    """Yields (row, place) of each action, in order."""
    for b in range(len(action_BR)):
        for r in range(len(action_BR[b])):
            if action_BR[b][r]:
                yield b, r


def differences(f, x, step: float = 1e-5):
    """Returns df/dx of a float64 function by central differences; entries that are NaN have 0."""
    x = np.array(x, np.float64)
    slope = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        if not np.isnan(x[i]):
            up, down = x.copy(), x.copy()
            up[i] += step
            down[i] -= step
            slope[i] = (f(up) - f(down)) / (2 * step)
    return slope


def close(ours, reference, tolerance: float = 1e-6):
    """Asserts float32 numbers equal to float64 ones to 1e-6 of the largest, and of each."""
    ours, reference = np.asarray(ours), np.asarray(reference, np.float64)
    assert ours.dtype == np.float32, ours.dtype
    np.testing.assert_allclose(ours, reference, rtol=tolerance, atol=tolerance * max(1.0, np.abs(reference).max(initial=0.0)))
