"""Scores of whole responses, brought to one scale over the run: running mean and variance, and a limit.

Axes: B batch.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Number, mean and summed squared deviation of all scores so far. Float32 scalars, part of a run's state."""

    count: jax.Array
    mean: jax.Array
    deviation: jax.Array  # Σ (score − mean)²

    @classmethod
    def none(cls) -> "Moments":
        """Returns the moments of no scores."""
        return cls(*[jnp.zeros((), jnp.float32)] * 3)

    def merged(self, score_B, real_B) -> "Moments":
        """Returns the moments with a batch's scores added (Chan et al. 1979), of any number; rows not real are left out."""
        real_B, score_B = real_B > 0, score_B.astype(jnp.float32)
        n = jnp.sum(real_B.astype(jnp.float32))
        least = jnp.min(score_B, where=real_B, initial=jnp.inf)  # equal scores have deviation 0 exactly
        above_B = jnp.where(real_B, score_B - least, 0.0)
        above = jnp.sum(above_B) / jnp.maximum(n, 1.0)
        deviation = jnp.sum(jnp.where(real_B, jnp.square(above_B - above), 0.0))
        count = self.count + n
        share = n / jnp.maximum(count, 1.0)
        ahead = jnp.where(n > 0, least + above - self.mean, 0.0)
        return Moments(count, self.mean + ahead * share, self.deviation + deviation + jnp.square(ahead) * self.count * share)

    def std(self):
        """Returns the population's standard deviation, or 1 as long as all scores were equal: nothing is scaled by it then."""
        variance = self.deviation / jnp.maximum(self.count, 1.0)
        return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 1.0)


def normalised(score_B, moments: Moments):
    """Returns (score − running mean) / running standard deviation, float32."""
    return (score_B.astype(jnp.float32) - moments.mean) / moments.std()


def scaled(score_B, moments: Moments):
    """Returns score / running standard deviation, float32: the sign of a score stays."""
    return score_B.astype(jnp.float32) / moments.std()


def clipped(score_B, *, limit: float):
    """Returns scores cut to ±limit, float32."""
    return jnp.clip(score_B.astype(jnp.float32), -limit, limit)
