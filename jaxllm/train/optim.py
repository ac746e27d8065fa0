"""The optimizer: clipping, the update rule, decoupled weight decay, the learning rate. All of it from optax."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon, reduce_on_plateau

from jaxllm.model.config import ModelConfig
from jaxllm.train.config import OptimConfig
from jaxllm.train.mup import check_rule, scaled_epsilon, scaled_rates
from jaxllm.train.noise_scale import NoiseState, averaged_noise
from jaxllm.train.schedules import make_schedule


class Optimizer(NamedTuple):
    tx: optax.GradientTransformationExtraArgs
    rate: Callable  # (step, opt_state) -> the learning rate that the update at `step` used
    zero1: bool  # whether its state is split over replicas of the parameters

    def noise(self, opt_state) -> NoiseState | None:
        """Returns the averages that the gradient noise scale comes from; None where it is not measured."""
        return opt_state[0] if isinstance(opt_state[0], NoiseState) else None


def make_optimizer(cfg: OptimConfig, steps: int, model: ModelConfig | None = None, *, noise_steps: int = 0) -> Optimizer:
    """Returns the update rule and the rate of a run of `steps`; the rate is that of weights that muP leaves alone.

    Decay is decoupled (Loshchilov and Hutter 2019), times the learning rate, and leaves norms, biases and embeddings
    alone; `tx.update` takes the step's loss as `value`, which reduce-on-plateau follows. With `noise_steps`, the gradient
    noise is averaged over so many steps, from what `tx.update` takes as `noise` (noise_scale.py). Raises UserError for a rule
    that `model`'s muP has none for.
    """
    schedule = make_schedule(cfg, steps)
    rule = _rule(cfg, schedule)
    if model is not None and model.mup.base_width is not None:
        check_rule(cfg.name, model)
        rule = _mup_rule(cfg, schedule, model)
    # Identities keep the places of what is off, so that the state of a run fits when clipping or decay is turned on or off.
    parts = [averaged_noise(noise_steps)] if noise_steps else []
    parts += [optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity(), rule]
    if cfg.schedule != "plateau":
        return Optimizer(optax.with_extra_args_support(optax.chain(*parts)), lambda step, opt_state: schedule(step), cfg.zero1)
    parts += [reduce_on_plateau(cfg.factor, cfg.patience, rtol=cfg.threshold, min_scale=cfg.final)]
    tx = optax.chain(*parts)
    return Optimizer(tx, lambda step, opt_state: schedule(step) * opt_state[-1].scale, cfg.zero1)


def _rule(cfg: OptimConfig, schedule: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    if cfg.name == "muon":  # matrices inside blocks; everything else by AdamW (Jordan et al. 2024)
        return muon(schedule, beta=cfg.b1, weight_decay=cfg.weight_decay, weight_decay_mask=lambda p: decayed(p, cfg),
                    muon_weight_dimension_numbers=muon_dimensions, adam_b1=cfg.b1, adam_b2=cfg.b2, consistent_rms=0.2)
    direction = {
        "adamw": lambda: optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
        "lion": lambda: optax.scale_by_lion(cfg.b1, cfg.b2),  # Chen et al. 2023
        "sgd": lambda: optax.trace(cfg.b1) if cfg.b1 else optax.identity(),
        "adafactor": lambda: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),  # Shazeer, Stern 2018
    }[cfg.name]()
    decay = optax.identity()
    if cfg.weight_decay:
        decay = optax.add_decayed_weights(cfg.weight_decay, mask=lambda p: decayed(p, cfg))
    return optax.chain(direction, decay, optax.scale_by_learning_rate(schedule))


def _mup_rule(cfg: OptimConfig, schedule: optax.Schedule, model: ModelConfig) -> optax.GradientTransformation:
    """Returns `_rule` with muP's learning rates, decay and epsilon: at the base the same numbers."""
    own = dataclasses.replace(cfg, weight_decay=0.0)
    direction, epsilon = _rule(own, -1.0), scaled_epsilon(model)  # a rate of -1: the direction alone
    decay = optax.identity()
    if cfg.weight_decay:
        decay = optax.add_decayed_weights(cfg.weight_decay, mask=lambda p: decayed(p, cfg))
    return optax.chain(epsilon, direction, scaled_rates(model, muon=cfg.name == "muon"), decay,
                       optax.scale_by_learning_rate(schedule))


def is_variable(x) -> bool:
    return isinstance(x, nnx.Variable)


def decayed(params, cfg: OptimConfig):
    """Returns True for every parameter that weight decay shrinks: matrices, the embedding only if asked, with Muon only what
    Muon trains."""

    def shrinks(var):
        if cfg.name == "muon" and "vocab" in var.axes:
            return var.replace(False)
        embedding = var.axes[0] == "vocab"
        return var.replace(not {"norm", "balance"} & set(var.axes) and (not embedding or cfg.decay_embeddings))

    return jax.tree.map(shrinks, params, is_leaf=is_variable)


def muon_dimensions(params):
    """Returns which axes of each block matrix Muon contracts and produces; None for what AdamW trains.

    Leading axes of layers and experts are matrices of their own.
    """

    def dimensions(var):
        if not jax.tree.leaves(var):  # optax masks what the other of the two optimizers trains
            return var
        axes, stacked = var.axes, var.ndim - len(var.axes)
        if {"vocab", "norm", "balance"} & set(axes):
            return var.replace(None)
        if axes[0] == "experts":
            axes, stacked = axes[1:], stacked + 1
        own = range(stacked, var.ndim)
        reads = own[:1] if axes[0] == "embed" else own[:-1]
        return var.replace(MuonDimensionNumbers(tuple(reads), tuple(i for i in own if i not in reads)))

    return jax.tree.map(dimensions, params, is_leaf=is_variable)


def finite_leaves(tree) -> jax.Array:
    """Returns bool [n_leaves]: which leaves hold only finite numbers."""
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)])
