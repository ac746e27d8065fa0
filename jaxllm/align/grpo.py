"""Policy gradients without a value network: each response is compared with others of its prompt, or of the batch.

The responses of a prompt are `group_size` consecutive rows. An advantage is [B] (`on_tokens` puts it on each token) and a
loss takes [B, R]; only actions count, as in ppo.py. Each loss is a sum and a count. Rows without actions are counted
nowhere: they are filler, as a policy that writes nothing still writes the end token. A loss's `penalty_BR`, for example
beta · k3 against the reference, is added at each action and averaged as the loss itself is.

Axes: B batch, R response token, P prompts, G responses of a prompt.
"""

import jax
import jax.numpy as jnp

from jaxllm.align.ppo import clipped, gae, log_ratios, summed, token_losses, whiten

# Advantages


def group_centred(score_B, *, group_size: int):
    """Returns score − mean of its group (Dr. GRPO, Liu et al. 2025)."""
    return _centred(score_B, group_size).reshape(-1)


def group_normalised(score_B, *, group_size: int, eps=1e-6):
    """Returns (score − mean of its group) / (population's standard deviation + eps) (GRPO, Shao et al. 2024).

    The paper has no eps. Groups of equal scores get 0.
    """
    centred_PG = _centred(score_B, group_size)
    std_P1 = jnp.sqrt(jnp.mean(jnp.square(centred_PG), axis=1, keepdims=True))
    return (centred_PG / (std_P1 + eps)).reshape(-1)


def leave_one_out(score_B, *, group_size: int):
    """Returns score − mean of the others in its group (RLOO, Kool et al. 2019, Ahmadian et al. 2024).

    RLOO's score has the KL penalty in it: `token_rewards` of ppo.py, summed over the row. Raises ValueError for groups
    of one.
    """
    if group_size < 2:
        raise ValueError(f"group_size={group_size}: should be at least 2, as each response is compared with the others")
    return group_centred(score_B, group_size=group_size) * (group_size / (group_size - 1))


def batch_normalised(reward_BR, action_BR, *, gamma=1.0):
    """Returns advantage_BR: rewards from each token to the end, then whitened over the batch (REINFORCE++, Hu et al. 2025)."""
    _, return_BR = gae(reward_BR, jnp.zeros_like(reward_BR), action_BR, gamma=gamma, lam=1.0)
    return whiten(return_BR, action_BR, keep_mean=False)


def batch_normalised_groups(score_B, action_BR, *, group_size: int):
    """Returns advantage_BR: scores centred in their group, then whitened over the batch's actions (REINFORCE++-baseline)."""
    return whiten(on_tokens(group_centred(score_B, group_size=group_size), action_BR), action_BR, keep_mean=False)


def on_tokens(advantage_B, action_BR):
    """Returns advantage_BR: the response's advantage on each of its actions, 0 elsewhere."""
    return jnp.where(action_BR > 0, advantage_B[:, None], 0.0)


def keep_informative(score_B, *, group_size: int):
    """Returns keep_B, bool: rows of groups whose scores are not all equal (DAPO's dynamic sampling).

    A group of equal scores has advantages of 0 and teaches nothing.
    """
    score_PG = score_B.reshape(-1, group_size)
    keep_P = jnp.max(score_PG, axis=1) > jnp.min(score_PG, axis=1)
    return jnp.repeat(keep_P, group_size)


def overlong_punishment(length_B, *, max_length: int, cache: int):
    """Returns what is added to the score of a long response (DAPO, Yu et al. 2025), float32.

    0 up to max_length − cache tokens, from there evenly down to −1 at max_length, and −1 beyond. Raises ValueError for a
    cache that is not within max_length.
    """
    if not 0 < cache <= max_length:
        raise ValueError(f"cache={cache}: should be above 0 and at most max_length={max_length}")
    return jnp.clip((max_length - cache - length_B.astype(jnp.float32)) / cache, -1.0, 0.0)


def truncated_weights(old_logp_BR, sampler_logp_BR, action_BR, *, cap=2.0):
    """Returns min(π_old / π_sampler, cap) of actions, 0 elsewhere, without gradient (Espeholt et al. 2018; Yao et al. 2025).

    For rollouts of other weights or another engine than π_old. Multiply advantages by it, after whitening: that is the
    same as multiplying the clipped loss, as the weight is not below 0.
    """
    weight_BR = jnp.minimum(jnp.exp(log_ratios(old_logp_BR, sampler_logp_BR, action_BR)), cap)
    return jax.lax.stop_gradient(jnp.where(action_BR > 0, weight_BR, 0.0))


# Losses


def by_sequence(x_BR, action_BR):
    """Returns (Σ over rows of the row's mean over its actions, number of rows that have any)."""
    acts_BR = action_BR > 0
    length_B = _lengths(action_BR)
    mean_B = jnp.sum(jnp.where(acts_BR, x_BR, 0.0), axis=1) / jnp.maximum(length_B, 1.0)
    return jnp.sum(mean_B), _sequences(length_B)


def grpo_loss(logp_BR, old_logp_BR, advantage_BR, action_BR, *, clip_low=0.2, clip_high=0.2, penalty_BR=None):
    """Returns (Σ of responses' mean token loss, number of responses): GRPO (Shao et al. 2024), penalty beta · k3."""
    loss_BR = token_losses(logp_BR, old_logp_BR, advantage_BR, action_BR, clip_low=clip_low, clip_high=clip_high)
    return by_sequence(_with(penalty_BR, loss_BR), action_BR)


def dr_grpo_loss(logp_BR, old_logp_BR, advantage_BR, action_BR, *, length: int, clip_low=0.2, clip_high=0.2, penalty_BR=None):
    """Returns (Σ token loss, length · number of responses): Dr. GRPO (Liu et al. 2025).

    `length` is one constant for the run, the longest response allowed: dividing by a response's own length favours
    long wrong answers.
    """
    loss_BR = token_losses(logp_BR, old_logp_BR, advantage_BR, action_BR, clip_low=clip_low, clip_high=clip_high)
    return summed(_with(penalty_BR, loss_BR), action_BR)[0], length * _sequences(_lengths(action_BR))


def dapo_loss(logp_BR, old_logp_BR, advantage_BR, action_BR, *, clip_low=0.2, clip_high=0.28, penalty_BR=None):
    """Returns (Σ token loss, number of actions of the whole batch), clipped higher above (DAPO, Yu et al. 2025)."""
    loss_BR = token_losses(logp_BR, old_logp_BR, advantage_BR, action_BR, clip_low=clip_low, clip_high=clip_high)
    return summed(_with(penalty_BR, loss_BR), action_BR)


def reinforce_loss(logp_BR, advantage_BR, action_BR, *, penalty_BR=None):
    """Returns (−Σ advantage · log π, number of responses): a response as one action (RLOO), for one step from each rollout."""
    acts_BR = action_BR > 0
    loss_BR = -jnp.where(acts_BR, advantage_BR, 0.0) * jnp.where(acts_BR, logp_BR, 0.0)
    return summed(_with(penalty_BR, loss_BR), action_BR)[0], _sequences(_lengths(action_BR))


def gspo_loss(logp_BR, old_logp_BR, advantage_B, action_BR, *, clip_low=3e-4, clip_high=4e-4):
    """Returns (Σ of responses' losses, number of responses): one ratio a response (GSPO, Zheng et al. 2025).

    ratio = (π/π_old of the response)^(1 / its length), clipped as PPO's. The default clips are the paper's: ratios
    of means stay near 1.
    """
    length_B = _lengths(action_BR)
    ratio_B = _sequence_ratios(logp_BR, old_logp_BR, action_BR)
    loss_B = clipped(ratio_B, advantage_B, clip_low=clip_low, clip_high=clip_high)
    return jnp.sum(jnp.where(length_B > 0, loss_B, 0.0)), _sequences(length_B)


def gspo_token_loss(logp_BR, old_logp_BR, advantage_BR, action_BR, *, clip_low=3e-4, clip_high=4e-4, penalty_BR=None):
    """Returns (Σ of responses' mean token loss, number of responses): GSPO-token, for advantages that differ within a response.

    Each token has its response's ratio, but its own gradient: stop(ratio) · π / stop(π). With one advantage a response,
    value and gradient are those of `gspo_loss`.
    """
    logp_BR = jnp.where(action_BR > 0, logp_BR, 0.0)
    ratio_B = jax.lax.stop_gradient(_sequence_ratios(logp_BR, old_logp_BR, action_BR))
    ratio_BR = ratio_B[:, None] * jnp.exp(logp_BR - jax.lax.stop_gradient(logp_BR))
    advantage_BR = jnp.where(action_BR > 0, advantage_BR, 0.0)
    loss_BR = clipped(ratio_BR, advantage_BR, clip_low=clip_low, clip_high=clip_high)
    return by_sequence(_with(penalty_BR, loss_BR), action_BR)


def _centred(score_B, group_size):
    score_PG = score_B.astype(jnp.float32).reshape(-1, group_size)
    # Counted from the least, so that equal scores differ by 0 exactly: a mean's rounding over eps would be an advantage.
    above_PG = score_PG - jnp.min(score_PG, axis=1, keepdims=True)
    return above_PG - jnp.mean(above_PG, axis=1, keepdims=True)


def _sequence_ratios(logp_BR, old_logp_BR, action_BR):
    log_ratio_B = jnp.sum(log_ratios(logp_BR, old_logp_BR, action_BR), axis=1)
    return jnp.exp(log_ratio_B / jnp.maximum(_lengths(action_BR), 1.0))


def _lengths(action_BR):
    return jnp.sum((action_BR > 0).astype(jnp.float32), axis=1)


def _sequences(length_B):
    return jnp.sum((length_B > 0).astype(jnp.float32))


def _with(penalty_BR, loss_BR):
    return loss_BR if penalty_BR is None else loss_BR + penalty_BR
