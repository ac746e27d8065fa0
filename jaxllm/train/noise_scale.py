"""The gradient noise scale: how many tokens a batch may have before more of them bring little (McCandlish et al. 2018).

With G the true gradient and Σ the covariance of one example's, a mean over B examples has E|g|² = |G|² + tr(Σ) / B. Two
batch sizes give two such equations, and both unknowns without bias (appendix A.1); their ratio tr(Σ) / |G|² is the noise
scale. The small batches are the step's micro-batches, the large one is the step's whole batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class NoiseState(NamedTuple):
    """Exponential averages; each begins at 0, so that their ratio needs no correction."""

    trace: jax.Array  # tr(Σ), float32
    square: jax.Array  # |G|², float32


def squared_norm(tree) -> jax.Array:
    """Returns the sum of all squares, float32."""
    return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree))


def estimates(small, large, parts: int, tokens: int):
    """Returns unbiased (tr(Σ), |G|²) of |g|² of a batch of so many tokens, `large`, and its mean over `parts` of it, `small`.

    With B tokens and b = B / parts: |G|² = (B large − b small) / (B − b), tr(Σ) = (small − large) / (1/b − 1/B). Σ is a
    token's share of a sequence's: a noise scale of S tokens is one of S / T sequences of T tokens.
    """
    return (small - large) * tokens / (parts - 1), (parts * large - small) / (parts - 1)


def averaged_noise(steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns the part of an optimizer that averages `noise=(tr(Σ), |G|²)` over about so many steps; gradients pass.

    Numerator and denominator are averaged apart: the ratio of two noisy numbers has a bias, that of their means has not.
    """
    keep = 1 - 1 / steps

    def init(params):
        del params
        return NoiseState(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

    def update(updates, state, params=None, *, noise, **others):
        del params, others
        return updates, NoiseState(*(keep * old + (1 - keep) * new for old, new in zip(state, noise, strict=True)))

    return optax.GradientTransformationExtraArgs(init, update)


def scale_of(state: NoiseState) -> jax.Array:
    """Returns the noise scale in tokens; NaN while |G|² comes out at 0 or less."""
    known = state.square > 0
    return jnp.where(known, state.trace / jnp.where(known, state.square, 1.0), jnp.nan)
