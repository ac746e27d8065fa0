"""Learning from compared answers without sampling: DPO and its kin, on log-probabilities summed over an answer.

Each loss returns the loss of every pair and the rewards that the policy implies, without gradient, of both answers.
`over_pairs` makes a sum and a count of it. References are those of the reference model, cached.

Axes: B pairs (KTO: answers), R answer token.
"""

import jax
import jax.numpy as jnp

from jaxllm.align.kl import k1


def answer_logps(logp_BR, answer_BR):
    """Returns (log-probability of each answer, its number of tokens), float32; `answer_BR` is 1 on its tokens."""
    inside_BR = answer_BR > 0
    logp_B = jnp.sum(jnp.where(inside_BR, logp_BR, 0.0), axis=1)
    return logp_B, jnp.sum(inside_BR.astype(jnp.float32), axis=1)


def over_pairs(x_B, real_B):
    """Returns (Σ x, number of pairs) over rows that are real, not filler."""
    return jnp.sum(jnp.where(real_B > 0, x_B, 0.0)), jnp.sum((real_B > 0).astype(jnp.float32))


def preference_metrics(chosen_reward_B, rejected_reward_B, real_B) -> dict[str, tuple]:
    """Returns (sum, count) by name: both rewards, their margin, and how often the chosen one is larger (a tie: half)."""
    margin_B = chosen_reward_B - rejected_reward_B
    right_B = (margin_B > 0) + 0.5 * (margin_B == 0)
    named = {"chosen_reward": chosen_reward_B, "rejected_reward": rejected_reward_B, "margin": margin_B, "accuracy": right_B}
    return {name: over_pairs(x_B, real_B) for name, x_B in named.items()}


def dpo(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, *, beta, label_smoothing=0.0, margin_B=None):
    """Returns losses and rewards of direct preference optimization (Rafailov et al. 2023).

    loss = −log σ(m), m = beta · (log π/ref of the chosen − log π/ref of the rejected). With `label_smoothing` = ε, the
    chance that a label is wrong, it is −(1 − ε) log σ(m) − ε log σ(−m) (Mitchell 2023, cDPO). `margin_B`, by how much the
    reward of the chosen should be larger, is taken from m (Amini et al. 2024, DPO with an offset).
    """
    by_B = beta * (k1(chosen_B, ref_chosen_B) - k1(rejected_B, ref_rejected_B))
    by_B = by_B if margin_B is None else by_B - margin_B
    loss_B = -(1 - label_smoothing) * jax.nn.log_sigmoid(by_B) - label_smoothing * jax.nn.log_sigmoid(-by_B)
    return loss_B, *_rewards(beta * k1(chosen_B, ref_chosen_B), beta * k1(rejected_B, ref_rejected_B))


def ipo(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, *, tau):
    """Returns losses and rewards of identity preference optimization (Azar et al. 2023).

    loss = (h − 1 / (2 tau))², h = log π/ref of the chosen − log π/ref of the rejected: of sums over tokens, as in the
    paper; means in their place make the target independent of length.
    """
    difference_B = k1(chosen_B, ref_chosen_B) - k1(rejected_B, ref_rejected_B)
    loss_B = jnp.square(difference_B - 1 / (2 * tau))
    return loss_B, *_rewards(tau * k1(chosen_B, ref_chosen_B), tau * k1(rejected_B, ref_rejected_B))


def kto_baseline(other_logp_B, ref_other_logp_B, real_B):
    """Returns KTO's reference point: max(0, mean of log π/ref) in nats, without gradient.

    Of answers beside prompts that they do not belong to (the batch's, shifted by one), which estimate KL(π‖ref). One
    number for the whole batch, made before it is split into micro-batches.
    """
    total, count = over_pairs(k1(other_logp_B, ref_other_logp_B), real_B)
    return jax.lax.stop_gradient(jnp.maximum(total / jnp.maximum(count, 1.0), 0.0))


def kto(logp_B, ref_logp_B, desirable_B, baseline, *, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """Returns (loss_B, reward_B) of Kahneman-Tversky optimization (Ethayarajh et al. 2024): each answer is good or bad.

    loss = w · (1 − σ(±beta · (log π/ref − baseline))), + and w = desirable_weight where desirable, else − and
    undesirable_weight.
    """
    good_B = desirable_B > 0
    above_B = beta * (k1(logp_B, ref_logp_B) - baseline)
    loss_B = jnp.where(good_B, desirable_weight, undesirable_weight) * jax.nn.sigmoid(jnp.where(good_B, -above_B, above_B))
    return loss_B, jax.lax.stop_gradient(beta * k1(logp_B, ref_logp_B))


def orpo(chosen_B, rejected_B, chosen_length_B, rejected_length_B, *, weight):
    """Returns losses and rewards of odds ratio preference optimization (Hong et al. 2024), without a reference.

    loss = −log p̄ chosen − weight · log σ(log odds chosen − log odds rejected), odds = p̄ / (1 − p̄), p̄ = the mean token's
    probability (geometric). Rewards are log p̄. A pair with an empty answer has no odds and loss 0.
    """
    chosen_B, rejected_B, both_B = _means(chosen_B, rejected_B, chosen_length_B, rejected_length_B)
    odds_B = _log_odds(chosen_B, both_B) - _log_odds(rejected_B, both_B)
    loss_B = -chosen_B - weight * jax.nn.log_sigmoid(odds_B)
    return jnp.where(both_B, loss_B, 0.0), *_rewards(chosen_B, rejected_B)


def simpo(chosen_B, rejected_B, chosen_length_B, rejected_length_B, *, beta, gamma, margin_B=None):
    """Returns losses and rewards of simple preference optimization (Meng et al. 2024), without a reference.

    The reward is beta · mean log-probability of a token; loss = −log σ(reward chosen − reward rejected − gamma). A
    pair with an empty answer has no mean and loss 0. `margin_B` is added to gamma: the pair's own.
    """
    chosen_B, rejected_B, both_B = _means(chosen_B, rejected_B, chosen_length_B, rejected_length_B)
    gamma = gamma if margin_B is None else gamma + margin_B
    loss_B = -jax.nn.log_sigmoid(beta * (chosen_B - rejected_B) - gamma)
    return jnp.where(both_B, loss_B, 0.0), *_rewards(beta * chosen_B, beta * rejected_B)


def _means(chosen_B, rejected_B, chosen_length_B, rejected_length_B):
    both_B = (chosen_length_B > 0) & (rejected_length_B > 0)
    mean_B = [jnp.where(both_B, logp_B, 0.0) / jnp.maximum(length_B, 1).astype(jnp.float32)
              for logp_B, length_B in ((chosen_B, chosen_length_B), (rejected_B, rejected_length_B))]
    return *mean_B, both_B


def _log_odds(logp_B, real_B):
    # At most −1e-6: float32 has no odds of a certainty. Elsewhere filler, as log(1 − e⁰) has no gradient.
    logp_B = jnp.minimum(jnp.where(real_B, logp_B, -1.0), -1e-6)
    return logp_B - jnp.log(-jnp.expm1(logp_B))


def _rewards(chosen_B, rejected_B):
    return jax.lax.stop_gradient((chosen_B, rejected_B))
