"""What is shown of a step of PPO, over actions only; as sums, so that micro-batches and epochs add up.

Axes: B batch, R response token.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.align.kl import k3
from jaxllm.align.ppo import log_ratios, summed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyStats:
    """Sums over actions, and the extremes of the ratio π/π_old. Float32 scalars."""

    count: jax.Array
    clipped_low: jax.Array  # actions without gradient: ratio below its clip and A < 0
    clipped_high: jax.Array  # ratio above its clip and A > 0
    log_ratio: jax.Array
    kl: jax.Array  # Σ k3
    off_one: jax.Array  # Σ (ratio − 1): from 1, as that is where digits are needed
    off_one_square: jax.Array
    ratio_min: jax.Array
    ratio_max: jax.Array

    @classmethod
    def none(cls) -> "PolicyStats":
        """Returns what to start from: no actions."""
        zero = jnp.zeros((), jnp.float32)
        return cls(*[zero] * 7, ratio_min=zero + jnp.inf, ratio_max=zero - jnp.inf)

    def merged(self, other: "PolicyStats") -> "PolicyStats":
        """Returns the stats of both sets of actions."""
        total = jax.tree.map(jnp.add, self, other)
        return dataclasses.replace(total, ratio_min=jnp.minimum(self.ratio_min, other.ratio_min),
                                   ratio_max=jnp.maximum(self.ratio_max, other.ratio_max))

    def over_parts(self) -> "PolicyStats":
        """Returns the stats of all parts, of stats whose leaves are stacked by part."""
        total = jax.tree.map(lambda x_M: jnp.sum(x_M, axis=0), self)
        return dataclasses.replace(total, ratio_min=jnp.min(self.ratio_min), ratio_max=jnp.max(self.ratio_max))

    def metrics(self) -> dict[str, jax.Array]:
        """Returns means over actions by name; of no actions, a ratio of 1 and zeros."""
        n = jnp.maximum(self.count, 1.0)
        off, any_ = self.off_one / n, self.count > 0
        return {
            "clip_fraction": (self.clipped_low + self.clipped_high) / n,
            "clip_fraction_low": self.clipped_low / n,
            "clip_fraction_high": self.clipped_high / n,
            "approx_kl": self.kl / n,  # KL(π_old‖π) by k3, in nats a token: actions were drawn from π_old
            "approx_kl_k1": -self.log_ratio / n,
            "ratio_mean": 1 + off,
            "ratio_std": jnp.sqrt(jnp.maximum(self.off_one_square / n - jnp.square(off), 0.0)),  # of the population
            "ratio_min": jnp.where(any_, self.ratio_min, 1.0),
            "ratio_max": jnp.where(any_, self.ratio_max, 1.0),
        }


def policy_stats(logp_BR, old_logp_BR, advantage_BR, action_BR, *, clip_low=0.2, clip_high=0.2) -> PolicyStats:
    """Returns the stats of one micro-batch; nothing is differentiated through them."""
    log_ratio_BR = jax.lax.stop_gradient(log_ratios(logp_BR, old_logp_BR, action_BR))
    off_one_BR, acts_BR = jnp.expm1(log_ratio_BR), action_BR > 0
    ratio_BR = jnp.exp(log_ratio_BR)

    def total(x_BR):
        return summed(x_BR.astype(jnp.float32), action_BR)[0]

    return PolicyStats(
        count=total(jnp.ones_like(ratio_BR)),
        clipped_low=total((ratio_BR < 1 - clip_low) & (advantage_BR < 0)),
        clipped_high=total((ratio_BR > 1 + clip_high) & (advantage_BR > 0)),
        log_ratio=total(log_ratio_BR),
        kl=total(k3(jnp.zeros_like(log_ratio_BR), log_ratio_BR)),
        off_one=total(off_one_BR),
        off_one_square=total(jnp.square(off_one_BR)),
        ratio_min=jnp.min(ratio_BR, where=acts_BR, initial=jnp.inf),
        ratio_max=jnp.max(ratio_BR, where=acts_BR, initial=-jnp.inf),
    )


def value_clipped(value_BR, old_value_BR, return_BR, action_BR, *, clip=0.2):
    """Returns (number of actions whose clipped value has the larger error, number of actions)."""
    near_BR = jnp.clip(value_BR, old_value_BR - clip, old_value_BR + clip)
    larger_BR = jnp.square(near_BR - return_BR) > jnp.square(value_BR - return_BR)
    return summed(larger_BR.astype(jnp.float32), action_BR)


def explained_variance(value_BR, return_BR, action_BR):
    """Returns 1 − Var(R − v) / Var(R) over all actions: 1 is perfect, 0 no better than a constant. Equal returns give 0."""

    def variance(x_BR):
        count = jnp.maximum(summed(x_BR, action_BR)[1], 1.0)
        least = jnp.min(x_BR, where=action_BR > 0, initial=jnp.inf)  # equal returns have variance 0 exactly
        above_BR = x_BR - least
        mean = summed(above_BR, action_BR)[0] / count
        return summed(jnp.square(above_BR - mean), action_BR)[0] / count

    of_returns = variance(return_BR)
    left = variance(return_BR - value_BR) / jnp.where(of_returns > 0, of_returns, 1.0)
    return jnp.where(of_returns > 0, 1 - left, 0.0)
