"""Proximal policy optimization (Schulman et al. 2017) on the tokens of responses: arrays and formulas only.

Index t of [B, R] is response token t. action is 1 where the policy wrote the token, 0 for tokens of an environment and
beyond the end; only actions count, and what stands in any other array elsewhere is never looked at. A loss is a sum
and a count, so that any split into micro-batches gives the same step.

Axes: B batch, R response token, V vocabulary.
"""

import jax
import jax.numpy as jnp

from jaxllm.align.kl import k1, on_actions

FURTHEST = 20.0  # nats: e^20 is 5e8. From e^89 on a ratio is infinite in float32, and where it is clipped the gradient is 0 · ∞


def summed(x_BR, action_BR):
    """Returns (Σ x over actions, number of actions), float32: the token mean as a sum and a count."""
    return jnp.sum(jnp.where(action_BR > 0, x_BR, 0.0)), _count(action_BR)


def last_action(action_BR):
    """Returns 1 at the last action of each row and 0 elsewhere, float32; a row without actions is all 0."""
    acts_BR = (action_BR > 0).astype(jnp.int32)
    left_BR = jnp.flip(jnp.cumsum(jnp.flip(acts_BR, axis=1), axis=1), axis=1)  # actions from here on
    return (acts_BR * (left_BR == 1)).astype(jnp.float32)


def token_rewards(score_B, logp_BR, ref_logp_BR, action_BR, *, beta, estimator=k1):
    """Returns reward_BR, float32: −beta · KL estimate on every action, and the score on the last one (Ouyang et al. 2022).

    The score may be integers or bools. That of a response without actions is on no token.
    """
    kl_BR = on_actions(estimator, logp_BR, ref_logp_BR, action_BR)
    return score_B.astype(jnp.float32)[:, None] * last_action(action_BR) - beta * kl_BR


def gae(reward_BR, value_BR, action_BR, *, gamma=1.0, lam=0.95):
    """Returns (advantage_BR, return_BR): generalised advantage estimates and their sum with the values, 0 off actions.

    δ = r + γ · next value − value, advantage = δ + γλ · next advantage (Schulman et al. 2015). "Next" is the next action:
    tokens of an environment are stepped over and cost no discount. Beyond the last action both are 0.
    """

    def step(later, now):
        next_advantage_B, next_value_B = later
        reward_B, value_B, acts_B = now
        advantage_B = reward_B + gamma * next_value_B - value_B + gamma * lam * next_advantage_B
        return (jnp.where(acts_B, advantage_B, next_advantage_B), jnp.where(acts_B, value_B, next_value_B)), advantage_B

    acts_BR, zero_B = action_BR > 0, jnp.zeros(action_BR.shape[0], jnp.float32)
    by_token = [x_BR.T for x_BR in (reward_BR.astype(jnp.float32), value_BR.astype(jnp.float32), acts_BR)]
    advantage_BR = jnp.where(acts_BR, jax.lax.scan(step, (zero_B, zero_B), by_token, reverse=True)[1].T, 0.0)
    return advantage_BR, jnp.where(acts_BR, advantage_BR + value_BR, 0.0)


def whiten(x_BR, action_BR, *, keep_mean: bool, eps=1e-8):
    """Returns x with variance 1 over all actions of the batch, 0 off actions.

    Its mean stays with `keep_mean` (rewards: their sign means something) and becomes 0 without (advantages). Mean and
    variance are the population's, sums over actions divided by their number, and eps is added to the variance
    (Ziegler et al. 2019). Equal numbers become 0, plus their mean if that stays.
    """
    acts_BR = action_BR > 0
    # Counted from the least, so that equal numbers differ by 0 exactly: rounding over √eps would be noise of 1e-4.
    least = jnp.min(x_BR, where=acts_BR, initial=jnp.inf)
    above_BR = jnp.where(acts_BR, x_BR - least, 0.0)
    count = jnp.maximum(_count(action_BR), 1.0)
    mean = jnp.sum(above_BR) / count
    centred_BR = jnp.where(acts_BR, above_BR - mean, 0.0)
    white_BR = centred_BR * jax.lax.rsqrt(jnp.sum(jnp.square(centred_BR)) / count + eps)
    return jnp.where(acts_BR, white_BR + mean + least, 0.0) if keep_mean else white_BR


def clipped(ratio_, advantage_, *, clip_low, clip_high, dual_clip=None):
    """Returns PPO's loss of each ratio π/π_old: −min(ratio · A, clip(ratio, 1 − clip_low, 1 + clip_high) · A).

    With `dual_clip` = c > 1 the loss is at most −c · A where A < 0: a ratio far above 1 cannot make the step explode
    (Ye et al. 2020). Any shape; the underscore stands for its axes.
    """
    kept_ = jnp.minimum(ratio_ * advantage_, jnp.clip(ratio_, 1 - clip_low, 1 + clip_high) * advantage_)
    if dual_clip is not None:
        kept_ = jnp.where(advantage_ < 0, jnp.maximum(kept_, dual_clip * advantage_), kept_)
    return -kept_


def log_ratios(logp_BR, old_logp_BR, action_BR):
    """Returns log π/π_old of actions, cut to ±FURTHEST; 0 elsewhere."""
    return jnp.clip(jnp.where(action_BR > 0, logp_BR - old_logp_BR, 0.0), -FURTHEST, FURTHEST)


def token_losses(logp_BR, old_logp_BR, advantage_BR, action_BR, *, clip_low, clip_high, dual_clip=None):
    """Returns the clipped loss of each action, 0 elsewhere."""
    ratio_BR = jnp.exp(log_ratios(logp_BR, old_logp_BR, action_BR))
    advantage_BR = jnp.where(action_BR > 0, advantage_BR, 0.0)
    return clipped(ratio_BR, advantage_BR, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def policy_loss(logp_BR, old_logp_BR, advantage_BR, action_BR, *, clip_low=0.2, clip_high=0.2, dual_clip=None):
    """Returns (Σ clipped loss, number of actions); clip_high above clip_low is DAPO's "clip-higher" (Yu et al. 2025)."""
    how = dict(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    return summed(token_losses(logp_BR, old_logp_BR, advantage_BR, action_BR, **how), action_BR)


def value_loss(value_BR, old_value_BR, return_BR, action_BR, *, clip=0.2):
    """Returns (Σ ½ max((v − R)², (v_clipped − R)²), number of actions), v_clipped within `clip` of the value at sampling.

    None: not clipped. ½ and the maximum are those of Ziegler et al. 2019 and InstructGPT.
    """
    # Masked before the square: after it, what is not finite off actions would still turn the gradient into NaN.
    value_BR, old_value_BR, return_BR = (jnp.where(action_BR > 0, x_BR, 0.0) for x_BR in (value_BR, old_value_BR, return_BR))
    error_BR = jnp.square(value_BR - return_BR)
    if clip is not None:
        near_BR = jnp.clip(value_BR, old_value_BR - clip, old_value_BR + clip)
        error_BR = jnp.maximum(error_BR, jnp.square(near_BR - return_BR))
    return summed(0.5 * error_BR, action_BR)


def entropy(logit_BRV):
    """Returns the entropy of each token's distribution in nats, float32; a logit of −inf is a token that cannot be drawn."""
    logp_BRV = jax.nn.log_softmax(logit_BRV.astype(jnp.float32), axis=-1)
    finite_BRV = jnp.where(jnp.isneginf(logp_BRV), 0.0, logp_BRV)
    return -jnp.sum(jnp.where(jnp.isneginf(logp_BRV), 0.0, jnp.exp(finite_BRV) * finite_BRV), axis=-1)


def entropy_bonus(entropy_BR, action_BR):
    """Returns (−Σ entropy, number of actions): times a coefficient above 0, a loss that rewards entropy."""
    total, count = summed(entropy_BR, action_BR)
    return -total, count


def _count(action_BR):
    return jnp.sum((action_BR > 0).astype(jnp.float32))
