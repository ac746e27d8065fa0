"""How far the policy has gone from the reference: estimates from sampled tokens, and what steers the penalty's coefficient.

Axes: B batch, R response token.
"""

from dataclasses import dataclass

import jax.numpy as jnp


def k1(logp_BR, ref_logp_BR):
    """Returns log π/ref of each token, in nats: unbiased for KL(π‖ref) over tokens sampled from π, below 0 at times.

    For the reward. In a loss it teaches nothing: over samples its gradient averages to 0.
    """
    return logp_BR - ref_logp_BR


def k2(logp_BR, ref_logp_BR):
    """Returns ½ (log π/ref)² of each token: biased, of small variance, never below 0.

    In a loss its gradient is, over samples from π, that of KL(π‖ref).
    """
    return 0.5 * jnp.square(logp_BR - ref_logp_BR)


def k3(logp_BR, ref_logp_BR):
    """Returns ref/π − 1 − log ref/π of each token: unbiased, of small variance, never below 0.

    In a loss (GRPO) its gradient is, over samples from π, that of KL(ref‖π).
    """
    log_ratio_BR = ref_logp_BR - logp_BR
    return jnp.expm1(log_ratio_BR) - log_ratio_BR  # expm1: near 0, e^x − 1 would lose the digits that remain


KL = {"k1": k1, "k2": k2, "k3": k3}  # the names of Schulman 2020, "Approximating KL Divergence"


def on_actions(estimator, logp_BR, ref_logp_BR, action_BR):
    """Returns an estimate at the tokens that the policy wrote and 0 elsewhere, whatever the log-probabilities are there."""
    # Masked before the estimate: after it, an overflow in e^x would still turn the gradient into NaN.
    acts_BR = action_BR > 0
    return estimator(jnp.where(acts_BR, logp_BR, 0.0), jnp.where(acts_BR, ref_logp_BR, 0.0))


@dataclass(frozen=True)
class FixedKL:
    """A coefficient that stays."""

    def __call__(self, coef, kl, n):
        return coef


@dataclass(frozen=True)
class AdaptiveKL:
    """A coefficient that goes up while the KL is above its target and down while it is below (Ziegler et al. 2019).

    Called with the coefficient, the mean KL of a response in nats (summed over its tokens) and the number n of
    responses that it was measured on; the error is cut to ±0.2, and `horizon` responses at that error change the
    coefficient by about a fifth.
    """

    target: float
    horizon: float

    def __post_init__(self):
        for name in ("target", "horizon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: should be above 0")

    def __call__(self, coef, kl, n):
        error = jnp.clip(jnp.asarray(kl, jnp.float32) / self.target - 1, -0.2, 0.2)
        return coef * (1 + error * n / self.horizon)
