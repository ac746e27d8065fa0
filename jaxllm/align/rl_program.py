"""The state of an RLHF run and its compiled functions, all born sharded.

The state is a TrainState, so that checkpoints, `jaxllm inspect` and `jaxllm generate` know it: `step` counts iterations,
`params` is the policy, and `opt_state` holds all else that goes on: {"opt", "updates", "kl_coef", "moments"} and, where they
are used, {"critic", "ema"}.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.align.algorithms import Algorithm, kl_metrics
from jaxllm.align.kl import KL, AdaptiveKL, FixedKL
from jaxllm.align.rlhf_config import RLHFConfig
from jaxllm.align.score_scale import Moments, clipped, normalised
from jaxllm.align.update import Models, Reading, response_logps, response_values, update
from jaxllm.partition import replicated, row_sharding, shardings
from jaxllm.train.optim import Optimizer
from jaxllm.train.state import TrainState, place


class RLProgram(NamedTuple):
    mesh: Any
    init: Any  # () -> TrainState, placed
    abstract: TrainState  # shapes, types and placements
    read: Any  # (state, reference, batch) -> (the batch with all that a minibatch needs, moments of the scores, metrics)
    update: Any  # (state, batch, row_B, text) -> (state, metrics); the state is donated
    finish: Any  # (state, kl) -> state with the KL coefficient moved and the iteration counted


def build(cfg: RLHFConfig, models: Models, start: dict, reading: Reading, algorithm: Algorithm,
          optimizers: dict[str, Optimizer], mesh, *, text_loss=None) -> RLProgram:
    """Returns the program of a run that starts from `start`: {"policy": params, "critic": params}, placed arrays that stay.

    `text_loss(params, batch, key) -> (sum, (count, ...))` is the pretraining loss of ptx, or None.
    """
    def begin(start, seed):
        opt_state = {"opt": optimizers["policy"].tx.init(start["policy"]), "updates": jnp.zeros((), jnp.int32),
                     "kl_coef": jnp.float32(cfg.kl.coef), "moments": Moments.none()}
        copied = jax.tree.map(jnp.copy, start)  # steps take their state's memory
        if "critic" in start:
            opt_state["critic"] = {"params": copied["critic"], "opt": optimizers["critic"].tx.init(start["critic"])}
        if cfg.rollout.stale:
            opt_state["pending"] = _nothing_pending(cfg)
        if cfg.train.ema:
            opt_state["ema"] = jax.tree.map(jnp.copy, start["policy"])
        rng = jax.random.key_data(jax.random.key(seed))
        return TrainState(jnp.zeros((), jnp.int32), copied["policy"], opt_state, rng)

    abstract = jax.eval_shape(begin, start, jnp.uint32(0))
    placed = _placement(abstract, mesh, optimizers)
    everywhere, rows = replicated(mesh), row_sharding(mesh)
    ptx = None if text_loss is None else (cfg.ptx.coef, text_loss)
    step = partial(_update, models, reading, algorithm.losses, optimizers, cfg.train.micro_batches, ptx, cfg.train.ema)
    return RLProgram(
        mesh=mesh, init=lambda: jax.jit(begin, out_shardings=placed)(start, jnp.uint32(cfg.run.seed)),
        abstract=jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, placed),
        read=jax.jit(partial(_read, cfg, models, reading, algorithm), out_shardings=(rows, everywhere, everywhere)),
        update=jax.jit(step, donate_argnums=0, out_shardings=(placed, everywhere)),
        finish=jax.jit(partial(_finish, cfg), donate_argnums=0, out_shardings=placed),
    )


def _nothing_pending(cfg: RLHFConfig) -> dict:
    """Returns arrays of the shapes of the responses that wait while older ones are learned from."""
    B, P, R = cfg.rollout.prompts * cfg.rollout.samples, cfg.prompts.prompt_len, cfg.rollout.response_len
    shapes = {"token_BS": ((B, P + R), jnp.int32), "first_B": ((B,), jnp.int32), "length_B": ((B,), jnp.int32),
              "action_BR": ((B, R), jnp.float32), "logp_BR": ((B, R), jnp.float32), "ended_B": ((B,), jnp.float32),
              "score_B": ((B,), jnp.float32)}
    return {name: jnp.zeros(shape, kind) for name, (shape, kind) in shapes.items()}


def _placement(abstract: TrainState, mesh, optimizers) -> TrainState:
    """Returns where each leaf lives: a moment beside its parameter, whichever model that is of; all else is everywhere."""
    everywhere, own = replicated(mesh), abstract.opt_state

    def of(params, opt, zero1):
        whole = place(TrainState(abstract.step, params, opt, abstract.rng), mesh, zero1=zero1)
        return whole.params, whole.opt_state

    params, opt = of(abstract.params, own["opt"], optimizers["policy"].zero1)
    opt_state = {"opt": opt, "updates": everywhere, "kl_coef": everywhere,
                 "moments": jax.tree.map(lambda _: everywhere, own["moments"])}
    if "critic" in own:
        critic = of(own["critic"]["params"], own["critic"]["opt"], optimizers["critic"].zero1)
        opt_state["critic"] = {"params": critic[0], "opt": critic[1]}
    if "pending" in own:
        opt_state["pending"] = jax.tree.map(lambda _: row_sharding(mesh), own["pending"])
    if "ema" in own:
        opt_state["ema"] = shardings(own["ema"], mesh)
    return TrainState(everywhere, params, opt_state, everywhere)


def _read(cfg: RLHFConfig, models: Models, reading: Reading, algorithm: Algorithm, state: TrainState, reference, batch):
    """Returns (batch, moments of the scores, metrics): what the reference and the critic say of an iteration's responses, and
    what the algorithm makes of it."""
    own, coef = state.opt_state, state.opt_state["kl_coef"]
    batch, moments = dict(batch), own["moments"]
    score_B = batch["score_B"].astype(jnp.float32)
    told = {"score": jnp.mean(score_B), "score_std": jnp.std(score_B)}
    if cfg.rollout.no_end_penalty:
        score_B = score_B - cfg.rollout.no_end_penalty * (1 - batch["ended_B"].astype(jnp.float32))
    if cfg.score.normalise:
        moments = moments.merged(score_B, jnp.ones_like(score_B))
        score_B = normalised(score_B, moments)
    if cfg.score.clip is not None:
        score_B = clipped(score_B, limit=cfg.score.clip)
    batch["score_B"] = score_B
    batch["ref_logp_BR"] = response_logps(models.policy, reading, reference, batch)
    batch["old_logp_BR"] = batch["logp_BR"]
    if cfg.rollout.stale:
        batch["old_logp_BR"] = response_logps(models.policy, reading, state.params, batch)
    if models.critic is not None:
        batch["value_BR"] = response_values(models.critic, reading, own["critic"]["params"], batch)
    in_reward = cfg.algorithm in ("ppo", "reinforce_pp")
    told |= kl_metrics(batch, coef, KL[cfg.kl.estimator or ("k1" if in_reward else "k3")])
    batch, more = algorithm.prepare(batch, coef)
    return batch, moments, told | more | {"kl_coef": coef, "reward": jnp.mean(score_B) + told["non_score_reward"]}


def _update(models, reading, losses, optimizers, micro_batches, ptx, ema, state: TrainState, batch, row_B, text):
    own = dict(state.opt_state)
    parts = {"policy": {"params": state.params, "opt": own["opt"]}, "updates": own["updates"]}
    parts |= {name: own[name] for name in ("critic", "ema") if name in own}
    parts, metrics = update(models, reading, losses, optimizers, micro_batches, ptx, ema, parts, batch, row_B, text)
    own |= {"opt": parts["policy"]["opt"], "updates": parts["updates"]}
    own |= {name: parts[name] for name in ("critic", "ema") if name in parts}  # what waits stays as it is
    return dataclasses.replace(state, params=parts["policy"]["params"], opt_state=own), metrics


def _finish(cfg: RLHFConfig, state: TrainState, kl, moments):
    control = FixedKL() if cfg.kl.controller == "fixed" else AdaptiveKL(cfg.kl.target, cfg.kl.horizon)
    n = cfg.rollout.prompts * cfg.rollout.samples
    coef = control(state.opt_state["kl_coef"], kl, n)
    own = state.opt_state | {"kl_coef": coef, "moments": moments}
    return dataclasses.replace(state, step=state.step + 1, opt_state=own)
