"""The algorithms of RLHF as the loop uses them: what a batch of scored responses becomes, and what a minibatch minimises.

`prepare(batch, coef)` adds the arrays that the loss reads and returns metrics besides; the batch has score_B, action_BR,
logp_BR (of the sampler), ref_logp_BR and, with a critic, value_BR. Axes: B response, R response token.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jaxllm.align import grpo, ppo
from jaxllm.align.kl import KL, on_actions
from jaxllm.align.ppo_metrics import explained_variance, policy_stats, value_clipped
from jaxllm.align.rlhf_config import RLHFConfig
from jaxllm.align.update import Losses

CLIPS = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}  # of the papers; the others: 0.2 on both sides


class Algorithm(NamedTuple):
    prepare: Callable  # (batch, coef) -> (batch, metrics)
    losses: Losses


def algorithm(cfg: RLHFConfig) -> Algorithm:
    """Returns the algorithm that the settings name."""
    return ppo_of(cfg) if cfg.algorithm == "ppo" else without_critic(cfg)


def ppo_of(cfg: RLHFConfig) -> Algorithm:
    """Proximal policy optimization as InstructGPT used it (Ouyang et al. 2022): the KL penalty in the reward of each token."""
    c, estimator = cfg.ppo, KL[cfg.kl.estimator or "k1"]

    def prepare(batch, coef):
        action_BR = batch["action_BR"]
        reward_BR = ppo.token_rewards(batch["score_B"], batch["logp_BR"], batch["ref_logp_BR"], action_BR, beta=coef,
                                      estimator=estimator)
        if c.whiten_rewards:
            reward_BR = ppo.whiten(reward_BR, action_BR, keep_mean=True)
        advantage_BR, return_BR = ppo.gae(reward_BR, batch["value_BR"], action_BR, gamma=c.gamma, lam=c.lam)
        told = {"explained_variance": explained_variance(batch["value_BR"], return_BR, action_BR),
                "value_mean": _mean(batch["value_BR"], action_BR), "return_mean": _mean(return_BR, action_BR),
                "advantage_mean": _mean(advantage_BR, action_BR)}
        if c.whiten_advantages:
            advantage_BR = ppo.whiten(advantage_BR, action_BR, keep_mean=False)
        return batch | {"advantage_BR": _corrected(cfg, batch, advantage_BR), "return_BR": return_BR}, told

    def policy(logp_BR, entropy_BR, part):
        found = ppo.policy_loss(logp_BR, part["old_logp_BR"], part["advantage_BR"], part["action_BR"], clip_low=c.clip_low,
                                clip_high=c.clip_high, dual_clip=c.dual_clip)
        total, count = found
        if c.entropy_coef:
            total = total + c.entropy_coef * ppo.entropy_bonus(entropy_BR, part["action_BR"])[0]
        return (total, count), _told(logp_BR, entropy_BR, part, c.clip_low, c.clip_high)

    def value(value_BR, part):
        arrays = value_BR, part["value_BR"], part["return_BR"], part["action_BR"]
        total, count = ppo.value_loss(*arrays, clip=c.value_clip)
        told = {} if c.value_clip is None else {"value_clip_fraction": value_clipped(*arrays, clip=c.value_clip)}
        return (c.value_coef * total, count), {"sums": told}

    return Algorithm(prepare, Losses(policy, value))


def without_critic(cfg: RLHFConfig) -> Algorithm:
    """Algorithms that compare responses with each other (grpo.py), the KL penalty in the loss; reinforce_pp: in the reward."""
    name, size, estimator = cfg.algorithm, cfg.rollout.samples, cfg.kl.estimator
    clip_low, clip_high = (given or paper for given, paper in
                           zip((cfg.group.clip_low, cfg.group.clip_high), CLIPS.get(name, (0.2, 0.2)), strict=True))
    clips = dict(clip_low=clip_low, clip_high=clip_high)

    def prepare(batch, coef):
        action_BR, score_B = batch["action_BR"], batch["score_B"]
        if name == "reinforce_pp":
            reward_BR = ppo.token_rewards(score_B, batch["logp_BR"], batch["ref_logp_BR"], action_BR, beta=coef,
                                          estimator=KL[estimator or "k1"])
            advantage_BR = grpo.batch_normalised(reward_BR, action_BR)
        else:
            if name == "dapo" and cfg.group.overlong:
                score_B = score_B + grpo.overlong_punishment(batch["length_B"], max_length=cfg.rollout.response_len,
                                                             cache=cfg.group.overlong)
            compared = {"grpo": grpo.group_normalised, "dapo": grpo.group_normalised, "gspo": grpo.group_normalised,
                        "dr_grpo": grpo.group_centred, "rloo": grpo.leave_one_out, "expert_iteration": best_rows_alone}[name]
            advantage_BR = grpo.on_tokens(compared(score_B, group_size=size), action_BR)
        told = {}
        if size > 1:
            told["informative"] = jnp.mean(grpo.keep_informative(score_B, group_size=size).astype(jnp.float32))
        in_loss = jnp.asarray(0.0 if name == "reinforce_pp" else coef, jnp.float32)
        coef_B = jnp.full(score_B.shape, 1.0, jnp.float32) * in_loss
        return batch | {"advantage_BR": _corrected(cfg, batch, advantage_BR), "coef_B": coef_B}, told

    def policy(logp_BR, entropy_BR, part):
        action_BR, advantage_BR, old_BR = part["action_BR"], part["advantage_BR"], part["old_logp_BR"]
        penalty_BR = part["coef_B"][:, None] * on_actions(KL[estimator or "k3"], logp_BR, part["ref_logp_BR"], action_BR)
        common = logp_BR, old_BR, advantage_BR, action_BR
        found = {
            "grpo": lambda: grpo.grpo_loss(*common, **clips, penalty_BR=penalty_BR),
            "dr_grpo": lambda: grpo.dr_grpo_loss(*common, **clips, length=cfg.rollout.response_len, penalty_BR=penalty_BR),
            "dapo": lambda: grpo.dapo_loss(*common, **clips, penalty_BR=penalty_BR),
            "gspo": lambda: grpo.gspo_token_loss(*common, **clips, penalty_BR=penalty_BR),
            "rloo": lambda: grpo.reinforce_loss(logp_BR, advantage_BR, action_BR, penalty_BR=penalty_BR),
            "reinforce_pp": lambda: ppo.policy_loss(*common, **clips),
            "expert_iteration": lambda: imitation_loss(logp_BR, advantage_BR, action_BR, penalty_BR),
        }[name]()
        return found, _told(logp_BR, entropy_BR, part, clip_low, clip_high)

    return Algorithm(prepare, Losses(policy, None))


def best_rows_alone(score_B, *, group_size: int):
    """Returns 1 for each prompt's best response, the first of equals, and 0 for all others, and where none is better than
    another: rejection sampling (Dong et al. 2023, RAFT)."""
    score_PG = score_B.reshape(-1, group_size)
    best_PG = jnp.arange(group_size)[None] == jnp.argmax(score_PG, axis=1)[:, None]
    informative_PG = grpo.keep_informative(score_B, group_size=group_size).reshape(-1, group_size)
    return (best_PG & informative_PG).astype(jnp.float32).reshape(-1)


def imitation_loss(logp_BR, chosen_BR, action_BR, penalty_BR):
    """Returns (-Σ log-probability of the chosen responses' tokens, their number), the penalty added at each."""
    total, _ = ppo.summed(chosen_BR * (penalty_BR - logp_BR), action_BR)
    return total, ppo.summed(chosen_BR, action_BR)[0]


def _corrected(cfg: RLHFConfig, batch, advantage_BR):
    """Returns advantages times the truncated importance weights of responses that older weights sampled."""
    if not cfg.rollout.stale:
        return advantage_BR
    weight_BR = grpo.truncated_weights(batch["old_logp_BR"], batch["logp_BR"], batch["action_BR"], cap=cfg.rollout.stale_cap)
    return advantage_BR * weight_BR


def _mean(x_BR, action_BR):
    total, count = ppo.summed(x_BR, action_BR)
    return total / jnp.maximum(count, 1.0)


def _told(logp_BR, entropy_BR, part, clip_low, clip_high):
    stats = policy_stats(logp_BR, part["old_logp_BR"], part["advantage_BR"], part["action_BR"], clip_low=clip_low,
                         clip_high=clip_high)
    return {"stats": stats, "sums": {"entropy": ppo.summed(entropy_BR, part["action_BR"])}}


def kl_metrics(batch, coef, estimator) -> dict:
    """Returns, of a batch: the mean KL of a response to the reference (Σ log π/ref over its tokens), the reward that its
    penalty is, and lengths."""
    kl_BR = on_actions(KL["k1"], batch["logp_BR"], batch["ref_logp_BR"], batch["action_BR"])
    penalty_BR = on_actions(estimator, batch["logp_BR"], batch["ref_logp_BR"], batch["action_BR"])
    return {"kl": jnp.mean(jnp.sum(kl_BR, axis=1)), "kl_token": _mean(kl_BR, batch["action_BR"]),
            "non_score_reward": -coef * jnp.mean(jnp.sum(penalty_BR, axis=1)),
            "ended": jnp.mean(batch["ended_B"].astype(jnp.float32)),
            "response_tokens": jnp.mean(batch["length_B"].astype(jnp.float32))}


