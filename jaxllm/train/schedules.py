"""Learning rates by step: functions from a step (0 for the first) to a rate, each equal to its closed form.

With `warmup` steps of warm-up, step s < warmup has peak * (s + 1) / warmup, or from a share f of the peak on
peak * (f + (1 - f) * s / warmup); the decay starts after it.
"""

import jax.numpy as jnp
import optax

from jaxllm.train.config import OptimConfig


def with_warmup(peak: float, warmup: int, after: optax.Schedule, start: float = 0.0) -> optax.Schedule:
    """Rises in a line to `peak` over `warmup` steps, then goes on with `after`, which counts from 0; `start`: where it begins,
    as a share of the peak. From 0 the first step already has a step's rise, as it would else do nothing."""

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        share = start + (1 - start) * (step if start else step + 1) / max(warmup, 1)
        return jnp.where(step < warmup, peak * share, after(jnp.maximum(step - warmup, 0)))

    return rate


def constant(peak: float) -> optax.Schedule:
    return lambda step: jnp.full_like(step, peak)


def linear(peak: float, steps: int, final: float) -> optax.Schedule:
    """Falls in a line from `peak` to `peak * final` over `steps`."""
    return lambda step: peak * (1 - (1 - final) * _progress(step, steps))


def cosine(peak: float, steps: int, final: float) -> optax.Schedule:
    """Falls along half a cosine from `peak` to `peak * final` over `steps` (Loshchilov and Hutter 2017)."""
    return lambda step: peak * (final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * _progress(step, steps))))


def wsd(peak: float, steps: int, final: float, decay_share: float, warmup: int) -> optax.Schedule:
    """Stays at `peak`, then falls in a line over the last `decay_share` of all steps (Hu et al. 2024, MiniCPM).

    `steps` counts from the end of the warm-up; the decay takes `decay_share * (steps + warmup)` steps.
    """
    decay = max(round(decay_share * (steps + warmup)), 1)
    return lambda step: peak * (1 - (1 - final) * _progress(step - (steps - decay), decay))


def inverse_sqrt(peak: float, warmup: int) -> optax.Schedule:
    """Falls as 1 / sqrt(step), continuous with the warm-up (Vaswani et al. 2017)."""
    start = max(warmup, 1)
    return lambda step: peak * jnp.sqrt(start / (start + step))


def step_decay(peak: float, every: int, factor: float) -> optax.Schedule:
    """Is multiplied by `factor` every so many steps."""
    return lambda step: peak * factor ** jnp.floor(step / every)


def exponential(peak: float, every: int, factor: float) -> optax.Schedule:
    """Falls smoothly by `factor` over `every` steps."""
    return lambda step: peak * factor ** (step / every)


def _progress(step, steps: int):
    return jnp.clip(step / max(steps, 1), 0, 1)


def make_schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Returns the rate of every step of a run of `steps`; `plateau` is constant here, its factor follows the loss."""
    after = max(steps - cfg.warmup, 1)
    shapes = {
        "constant": lambda: constant(cfg.lr),
        "plateau": lambda: constant(cfg.lr),
        "linear": lambda: linear(cfg.lr, after, cfg.final),
        "cosine": lambda: cosine(cfg.lr, after, cfg.final),
        "wsd": lambda: wsd(cfg.lr, after, cfg.final, cfg.decay_share, cfg.warmup),
        "inverse_sqrt": lambda: inverse_sqrt(cfg.lr, cfg.warmup),
        "step": lambda: step_decay(cfg.lr, cfg.step_every, cfg.factor),
        "exponential": lambda: exponential(cfg.lr, cfg.step_every, cfg.factor),
    }
    return with_warmup(cfg.lr, cfg.warmup, shapes[cfg.schedule](), cfg.warmup_from)
