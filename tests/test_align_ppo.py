"""The formulas of PPO equal loops over tokens written from the papers, look at actions only, and split exactly."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from align_arrays import ACTION_BR, B, R, actions, close, differences, logps, normal, poisoned
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxllm.align import grpo, kl, ppo, ppo_metrics, score_scale

ESTIMATES = {
    "k1": lambda p, q: math.log(p / q),
    "k2": lambda p, q: math.log(p / q) ** 2 / 2,
    "k3": lambda p, q: q / p - 1 - math.log(q / p),
}
NONE_BR = np.zeros_like(ACTION_BR)


# The KL's estimates and its coefficient


@pytest.mark.parametrize("name", ESTIMATES)
def test_an_estimate_of_the_kl_is_its_formula(name):
    logp_BR, ref_BR = logps(0)
    ours_BR, wanted_BR = kl.on_actions(kl.KL[name], logp_BR, ref_BR, ACTION_BR), np.zeros((B, R))
    for b, r in actions():
        wanted_BR[b, r] = ESTIMATES[name](math.exp(logp_BR[b, r]), math.exp(ref_BR[b, r]))
    close(ours_BR, wanted_BR)


@pytest.mark.parametrize("name", ESTIMATES)
def test_an_estimates_mean_and_gradient_over_the_policy_are_as_its_docstring_says(name):
    """Exactly, over a vocabulary of five: k1 and k3 average to KL(π‖ref); in a loss, their gradients are of different things."""
    logit_V, ref_V = normal(1, 5), jax.nn.log_softmax(normal(2, 5))

    def divergence(p_V, q_V):
        return jnp.sum(jnp.exp(p_V) * (p_V - q_V))

    def of_samples(logit_V):
        p_V = jax.nn.log_softmax(logit_V)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(p_V)) * kl.KL[name](p_V[None], ref_V[None])[0])

    mean, slope_V = jax.value_and_grad(of_samples)(logit_V)
    forward = jax.value_and_grad(lambda x: divergence(jax.nn.log_softmax(x), ref_V))(logit_V)
    backward_V = jax.grad(lambda x: divergence(ref_V, jax.nn.log_softmax(x)))(logit_V)
    if name != "k2":
        np.testing.assert_allclose(mean, forward[0], rtol=1e-5)
    np.testing.assert_allclose(slope_V, {"k1": jnp.zeros(5), "k2": forward[1], "k3": backward_V}[name], atol=1e-6)


@pytest.mark.parametrize("name", ESTIMATES)
def test_what_stands_off_actions_gives_an_estimate_no_gradient(name):
    logp_BR, ref_BR = (np.where(ACTION_BR > 0, x, filler).astype(np.float32) for x, filler in zip(logps(0), (-500, 500), strict=True))
    slope_BR = jax.grad(lambda x: jnp.sum(kl.on_actions(kl.KL[name], x, ref_BR, ACTION_BR)))(logp_BR)
    assert np.isfinite(slope_BR).all() and not slope_BR[ACTION_BR == 0].any() and slope_BR[ACTION_BR > 0].any()


@pytest.mark.parametrize(("measured", "factor"), [(6.0, 1.0), (6.6, 1 + 0.1 * 256 / 1e4), (30.0, 1 + 0.2 * 256 / 1e4), (0.0, 1 - 0.2 * 256 / 1e4)])
def test_the_adaptive_coefficient_follows_the_clipped_error(measured, factor):
    np.testing.assert_allclose(kl.AdaptiveKL(target=6.0, horizon=10_000)(0.2, measured, 256), 0.2 * factor, rtol=1e-6)
    assert kl.FixedKL()(0.2, measured, 256) == 0.2


@pytest.mark.parametrize("wrong", [dict(target=0.0, horizon=1), dict(target=6.0, horizon=0)])
def test_an_adaptive_coefficient_needs_a_target_and_a_horizon(wrong):
    with pytest.raises(ValueError, match="should be above 0"):
        kl.AdaptiveKL(**wrong)


# Rewards and advantages


def rewards(score_B, logp_BR, ref_BR, beta, name):
    reward_BR, last = np.zeros((B, R)), {}
    for b, r in actions():
        reward_BR[b, r] = -beta * ESTIMATES[name](math.exp(logp_BR[b, r]), math.exp(ref_BR[b, r]))
        last[b] = r
    for b, r in last.items():
        reward_BR[b, r] += score_B[b]
    return reward_BR


@pytest.mark.parametrize("name", ESTIMATES)
def test_token_rewards_are_the_kl_penalty_and_the_score_on_the_last_action(name):
    (logp_BR, ref_BR), score_B = logps(3), normal(4, B)
    ours_BR = ppo.token_rewards(score_B, logp_BR, ref_BR, ACTION_BR, beta=0.05, estimator=kl.KL[name])
    close(ours_BR, rewards(score_B, logp_BR, ref_BR, 0.05, name))


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.float32])
def test_rewards_are_float32_whatever_the_score_is(dtype):
    (logp_BR, ref_BR), score_B = logps(3), np.array([1, 0, 1, 1, 0, 1], dtype)
    close(ppo.token_rewards(score_B, logp_BR, ref_BR, ACTION_BR, beta=0.05), rewards(score_B.astype(float), logp_BR, ref_BR, 0.05, "k1"))


def advantages(reward_BR, value_BR, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_(t+l) over the actions of a row, those of an environment left out (equation 16)."""
    advantage_BR, return_BR = np.zeros((B, R)), np.zeros((B, R))
    for b in range(B):
        places = [r for row, r in actions() if row == b]
        value = [float(value_BR[b, r]) for r in places] + [0.0]
        delta = [float(reward_BR[b, r]) + gamma * value[i + 1] - value[i] for i, r in enumerate(places)]
        for i, r in enumerate(places):
            advantage_BR[b, r] = sum((gamma * lam) ** k * d for k, d in enumerate(delta[i:]))
            return_BR[b, r] = advantage_BR[b, r] + value[i]
    return advantage_BR, return_BR


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.9, 0.7), (0.9, 0.0)])
def test_gae_is_the_sum_of_discounted_errors_over_actions(gamma, lam):
    reward_BR, value_BR = poisoned(normal(5, B, R)), poisoned(normal(6, B, R))
    for ours_BR, wanted_BR in zip(ppo.gae(reward_BR, value_BR, ACTION_BR, gamma=gamma, lam=lam), advantages(reward_BR, value_BR, gamma, lam), strict=True):
        close(ours_BR, wanted_BR)


def test_a_return_at_lambda_one_is_the_rewards_still_to_come():
    reward_BR = np.array([[0.0, 0.0, 5.0, 2.0]], np.float32)
    advantage_BR, return_BR = ppo.gae(reward_BR, np.array([[1.0, 2.0, 9.0, 4.0]], np.float32), np.array([[1.0, 1.0, 0.0, 1.0]]), gamma=1.0, lam=1.0)
    close(return_BR, [[2, 2, 0, 2]])
    close(advantage_BR, [[1, 0, 0, -2]])


def whitened(x_BR, keep_mean):
    x = [float(x_BR[b, r]) for b, r in actions()]
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    white_BR = np.zeros((B, R))
    for b, r in actions():
        white_BR[b, r] = (float(x_BR[b, r]) - mean) / math.sqrt(variance + 1e-8) + (mean if keep_mean else 0.0)
    return white_BR


@pytest.mark.parametrize("keep_mean", [True, False])
def test_whitening_keeps_the_mean_of_rewards_and_takes_that_of_advantages(keep_mean):
    x_BR = poisoned(2.5 + 3 * normal(7, B, R))
    white_BR = ppo.whiten(x_BR, ACTION_BR, keep_mean=keep_mean)
    close(white_BR, whitened(x_BR, keep_mean))
    of_actions = np.asarray(white_BR)[ACTION_BR > 0]
    np.testing.assert_allclose(of_actions.std(), 1, rtol=1e-6)
    np.testing.assert_allclose(of_actions.mean(), x_BR[ACTION_BR > 0].mean() if keep_mean else 0, atol=1e-6)


@pytest.mark.parametrize(("keep_mean", "left"), [(True, 0.1), (False, 0.0)])
def test_equal_numbers_are_whitened_to_their_mean_exactly(keep_mean, left):
    white_BR = np.asarray(ppo.whiten(poisoned(np.full((B, R), 0.1)), ACTION_BR, keep_mean=keep_mean))
    assert (white_BR[ACTION_BR > 0] == np.float32(left)).all() and not white_BR[ACTION_BR == 0].any()


# Losses


CLIPS = [dict(clip_low=0.2, clip_high=0.2), dict(clip_low=0.2, clip_high=0.28), dict(clip_low=0.1, clip_high=0.3, dual_clip=1.5)]


def clipped_objective(ratio, advantage, clip_low, clip_high, dual_clip=None):
    kept = min(ratio * advantage, min(max(ratio, 1 - clip_low), 1 + clip_high) * advantage)
    return max(kept, dual_clip * advantage) if dual_clip is not None and advantage < 0 else kept


def policy_reference(logp_BR, old_BR, advantage_BR, how):
    return sum(-clipped_objective(math.exp(float(logp_BR[b, r]) - float(old_BR[b, r])), float(advantage_BR[b, r]), **how) for b, r in actions())


@pytest.mark.parametrize("how", CLIPS, ids=str)
def test_the_policy_loss_is_the_clipped_objective_and_its_gradient(how):
    (logp_BR, old_BR), advantage_BR = logps(8, spread=0.8), poisoned(normal(9, B, R))
    ours = jax.jit(jax.value_and_grad(lambda x: ppo.policy_loss(x, old_BR, advantage_BR, ACTION_BR, **how), has_aux=True))
    (total, count), slope_BR = ours(logp_BR)
    close(total, policy_reference(logp_BR, old_BR, advantage_BR, how))
    close(count, sum(1 for _ in actions()))
    close(slope_BR, differences(lambda x: policy_reference(x, old_BR, advantage_BR, how), logp_BR), 2e-6)


@pytest.mark.parametrize(("log_ratio", "advantage", "gradient"), [
    (0.3, 1, 0), (0.3, -1, math.exp(0.3)), (-0.3, -1, 0), (-0.3, 1, -math.exp(-0.3)), (0.1, 1, -math.exp(0.1)), (3.0, -1, math.exp(3.0))])
def test_each_side_is_clipped_where_the_advantage_pushes_to_it(log_ratio, advantage, gradient):
    old_BR, at = np.zeros((1, 1), np.float32), [np.full((1, 1), x, np.float32) for x in (log_ratio, advantage, 1)]
    slope_BR = jax.grad(lambda x: ppo.policy_loss(x, old_BR, *at[1:])[0])(at[0])
    close(slope_BR, [[gradient]])


@pytest.mark.parametrize(("log_ratio", "advantage", "loss"), [(100, 1, -1.2), (100, 0, 0), (-200, -1, 0.8), (-200, 1, -math.exp(-20))])
def test_a_ratio_beyond_float32_has_a_finite_loss_and_no_gradient(log_ratio, advantage, loss):
    old_BR, at = np.zeros((1, 1), np.float32), [np.full((1, 1), x, np.float32) for x in (log_ratio, advantage, 1)]
    (total, _), slope_BR = jax.value_and_grad(lambda x: ppo.policy_loss(x, old_BR, *at[1:]), has_aux=True)(at[0])
    close(total, loss)
    assert not slope_BR.any()


def test_the_dual_clip_bounds_the_loss_of_a_bad_action_that_became_likely():
    at = [np.full((1, 1), x, np.float32) for x in (20.0, 0.0, -2.0, 1.0)]
    (loss, _), slope_BR = jax.value_and_grad(lambda x: ppo.policy_loss(x, *at[1:], dual_clip=3.0), has_aux=True)(at[0])
    assert loss == 6 and slope_BR == 0


def value_reference(value_BR, old_BR, return_BR, clip):
    total = 0.0
    for b, r in actions():
        v, old, wanted = float(value_BR[b, r]), float(old_BR[b, r]), float(return_BR[b, r])
        errors = [(v - wanted) ** 2]
        if clip is not None:
            errors.append((min(max(v, old - clip), old + clip) - wanted) ** 2)
        total += 0.5 * max(errors)
    return total


@pytest.mark.parametrize("clip", [0.2, 0.5, None])
def test_the_value_loss_is_the_larger_of_clipped_and_unclipped_and_its_gradient(clip):
    value_BR, old_BR, return_BR = (poisoned(normal(seed, B, R)) for seed in (10, 11, 12))
    ours = jax.jit(jax.value_and_grad(lambda x: ppo.value_loss(x, old_BR, return_BR, ACTION_BR, clip=clip), has_aux=True))
    (total, count), slope_BR = ours(value_BR)
    close(total, value_reference(value_BR, old_BR, return_BR, clip))
    assert count == ACTION_BR.sum()
    close(slope_BR, differences(lambda x: value_reference(x, old_BR, return_BR, clip), value_BR), 2e-6)


def entropy_reference(logit_BRV):
    entropy_BR = np.zeros((B, R))
    for b, r in actions():
        weight = [math.exp(x - float(np.max(logit_BRV[b, r]))) for x in logit_BRV[b, r].astype(np.float64)]
        entropy_BR[b, r] = -sum(w / sum(weight) * math.log(w / sum(weight)) for w in weight if w)
    return entropy_BR


def test_the_entropy_bonus_is_minus_the_entropy_and_its_gradient():
    logit_BRV = 2 * normal(13, B, R, 5)
    ours = jax.jit(jax.value_and_grad(lambda x: ppo.entropy_bonus(ppo.entropy(x), ACTION_BR), has_aux=True))
    (total, count), slope_BRV = ours(logit_BRV)
    close(total, -entropy_reference(logit_BRV).sum())
    assert count == ACTION_BR.sum()
    close(slope_BRV, differences(lambda x: -entropy_reference(x).sum(), logit_BRV), 2e-6)


def test_tokens_that_cannot_be_drawn_have_no_part_in_the_entropy():
    logit_BRV = np.array([[[1.0, 2.0, -np.inf]]], np.float32)
    close(ppo.entropy(logit_BRV), ppo.entropy(logit_BRV[..., :2]))
    assert np.isfinite(jax.grad(lambda x: jnp.sum(ppo.entropy(x)))(logit_BRV)).all()


LOSSES = {
    "policy": lambda x_BR, y_BR, z_BR, action_BR: ppo.policy_loss(x_BR, y_BR, z_BR, action_BR),
    "value": lambda x_BR, y_BR, z_BR, action_BR: ppo.value_loss(x_BR, y_BR, z_BR, action_BR),
    "entropy": lambda x_BR, y_BR, z_BR, action_BR: ppo.entropy_bonus(x_BR, action_BR),
}


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up_to_the_batch(name):
    arrays = *(poisoned(normal(seed, B, R)) for seed in (14, 15, 16)), ACTION_BR
    ours = jax.jit(LOSSES[name])
    whole = ours(*arrays)
    parts = [ours(*(x[rows] for x in arrays)) for rows in (slice(0, 2), slice(2, 4), slice(4, 6))]
    close(jnp.array(whole), np.sum(np.asarray(parts, np.float64), axis=0))


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_actions_has_loss_and_gradient_zero(name):
    arrays = [poisoned(normal(seed, B, R), NONE_BR) for seed in (14, 15, 16)]
    (total, count), slope_BR = jax.value_and_grad(lambda x: LOSSES[name](x, *arrays[1:], NONE_BR), has_aux=True)(arrays[0])
    assert total == count == 0 and not slope_BR.any()
    nothing = [ppo.whiten(arrays[0], NONE_BR, keep_mean=True), *ppo.gae(*arrays[:2], NONE_BR),
               ppo.token_rewards(normal(0, B), *arrays[:2], NONE_BR, beta=0.1)]
    assert not np.any(nothing)


# Metrics


def test_metrics_are_those_of_a_loop_over_actions_in_one_batch_or_several():
    (logp_BR, old_BR), advantage_BR = logps(17, spread=0.3), poisoned(normal(18, B, R))
    arrays = logp_BR, old_BR, advantage_BR, ACTION_BR
    ratios = [math.exp(float(logp_BR[b, r]) - float(old_BR[b, r])) for b, r in actions()]
    good = [float(advantage_BR[b, r]) > 0 for b, r in actions()]
    n, mean = len(ratios), sum(ratios) / len(ratios)
    high, low = sum(x > 1.3 and up for x, up in zip(ratios, good, strict=True)), sum(x < 0.8 and not up for x, up in zip(ratios, good, strict=True))
    assert high and low
    wanted = {
        "clip_fraction": (high + low) / n, "clip_fraction_low": low / n, "clip_fraction_high": high / n,
        "approx_kl": sum(x - 1 - math.log(x) for x in ratios) / n, "approx_kl_k1": -sum(math.log(x) for x in ratios) / n,
        "ratio_mean": mean, "ratio_std": math.sqrt(sum((x - mean) ** 2 for x in ratios) / n), "ratio_min": min(ratios), "ratio_max": max(ratios),
    }
    stats = jax.jit(lambda *x: ppo_metrics.policy_stats(*x, clip_low=0.2, clip_high=0.3))
    whole, merged = stats(*arrays), ppo_metrics.PolicyStats.none()
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        merged = merged.merged(stats(*(x[rows] for x in arrays)))
    for found in (whole, merged):
        metrics = found.metrics()
        assert metrics.keys() == wanted.keys()
        for name, x in metrics.items():
            close(x, wanted[name])


def test_metrics_of_no_actions_are_finite():
    nothing = [poisoned(normal(seed, B, R), NONE_BR) for seed in (14, 15, 16)]
    metrics = ppo_metrics.policy_stats(*nothing, NONE_BR).metrics()
    assert metrics.pop("ratio_mean") == metrics.pop("ratio_min") == metrics.pop("ratio_max") == 1
    assert not any(metrics.values()) and ppo_metrics.explained_variance(*nothing[:2], NONE_BR) == 0


def test_the_value_clip_fraction_counts_where_the_clipped_error_is_the_larger():
    value_BR, old_BR, return_BR = (poisoned(normal(seed, B, R)) for seed in (10, 11, 12))
    wanted = sum((min(max(float(value_BR[b, r]), float(old_BR[b, r]) - 0.2), float(old_BR[b, r]) + 0.2) - return_BR[b, r]) ** 2
                 > (float(value_BR[b, r]) - return_BR[b, r]) ** 2 for b, r in actions())
    assert 0 < wanted < ACTION_BR.sum()
    assert ppo_metrics.value_clipped(value_BR, old_BR, return_BR, ACTION_BR) == (wanted, ACTION_BR.sum())


def test_explained_variance_is_one_minus_what_is_left():
    value_BR, return_BR = poisoned(normal(19, B, R)), poisoned(normal(20, B, R))
    of_return, left = [float(return_BR[i]) for i in actions()], [float(return_BR[i]) - float(value_BR[i]) for i in actions()]
    variance = [sum((x - sum(xs) / len(xs)) ** 2 for x in xs) / len(xs) for xs in (of_return, left)]
    close(ppo_metrics.explained_variance(value_BR, return_BR, ACTION_BR), 1 - variance[1] / variance[0])
    assert ppo_metrics.explained_variance(return_BR, return_BR, ACTION_BR) == 1
    assert ppo_metrics.explained_variance(value_BR, poisoned(np.full((B, R), 0.1)), ACTION_BR) == 0


# The scale of scores


def test_running_moments_are_those_of_all_scores_at_once():
    scores, moments = [3 + 2 * normal(seed, n) for seed, n in ((21, 5), (22, 1), (23, 17), (24, 4))], score_scale.Moments.none()
    for score_B in scores:
        moments = jax.jit(score_scale.Moments.merged)(moments, np.append(score_B, [np.nan, 99.0]).astype(np.float32), np.append(np.ones(len(score_B)), [0, 0]))
    everything = [float(x) for score_B in scores for x in score_B]
    mean = sum(everything) / len(everything)
    std = math.sqrt(sum((x - mean) ** 2 for x in everything) / len(everything))
    close(moments.mean, mean)
    close(moments.std(), std)
    score_B = np.array([-1, 0, 4])
    close(score_scale.normalised(score_B, moments), (score_B - mean) / std)
    close(score_scale.scaled(score_B, moments), score_B / std)
    close(score_scale.clipped(score_B, limit=2.5), [-1, 0, 2.5])


def test_equal_scores_and_empty_batches_leave_the_scale_alone():
    moments, tied_B = score_scale.Moments.none(), np.full(3, 0.1, np.float32)
    for real in (0, 1, 1, 0, 1):
        moments = moments.merged(tied_B, np.full(3, real))
    assert moments.std() == 1 and moments.mean == np.float32(0.1) and moments.count == 9
    assert (score_scale.scaled(tied_B, moments) == tied_B).all() and not score_scale.normalised(tied_B, moments).any()


# On a mesh


def test_split_over_devices_equals_one_device():
    """The batch's mean and variance are over all devices' rows, a group's over both of those that hold it."""
    action_BR = np.concatenate([ACTION_BR, ACTION_BR, ACTION_BR[:4]])
    (old_BR, ref_BR), score_B = (normal(seed, 16, R) for seed in (30, 31)), normal(32, 16)

    def step(logp_BR, score_B, action_BR):
        reward_BR = ppo.whiten(ppo.token_rewards(score_B, old_BR, ref_BR, action_BR, beta=0.1), action_BR, keep_mean=True)
        advantage_BR = ppo.whiten(ppo.gae(reward_BR, ref_BR, action_BR)[0], action_BR, keep_mean=False)
        by_group_BR = grpo.on_tokens(grpo.group_normalised(score_B, group_size=4), action_BR)
        losses = (ppo.policy_loss, advantage_BR), (grpo.grpo_loss, by_group_BR)

        def loss(logp_BR):
            (by_token, tokens), (by_row, rows) = (f(logp_BR, old_BR, advantage_BR, action_BR) for f, advantage_BR in losses)
            return by_token / tokens + by_row / rows

        return jax.value_and_grad(loss)(logp_BR)

    arrays = old_BR + 0.3 * normal(33, 16, R), score_B, action_BR
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in arrays]
    for ours, wanted in zip(jax.jit(step)(*split), jax.jit(step)(*arrays), strict=True):
        close(ours, wanted)
