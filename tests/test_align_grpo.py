"""The GRPO family equals loops over groups and tokens written from the papers, looks at actions only, and splits exactly."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from align_arrays import ACTION_BR, B, R, actions, close, differences, logps, normal, poisoned

from jaxllm.align import grpo, kl

G = 3
NONE_BR = np.zeros_like(ACTION_BR)
LENGTHS = [sum(1 for b, _ in actions() if b == row) for row in range(B)]


# Advantages


def groups(score_B):
    for first in range(0, len(score_B), G):
        yield [float(x) for x in score_B[first : first + G]]


def centred(group):
    return [x - sum(group) / G for x in group]


def normalised(group):
    std = math.sqrt(sum(x * x for x in centred(group)) / G)
    return [x / (std + 1e-6) for x in centred(group)]


def against_others(group):
    return [x - sum(group[:i] + group[i + 1 :]) / (G - 1) for i, x in enumerate(group)]


ADVANTAGES = {grpo.group_centred: centred, grpo.group_normalised: normalised, grpo.leave_one_out: against_others}


@pytest.mark.parametrize("ours", ADVANTAGES, ids=lambda f: f.__name__)
def test_an_advantage_compares_a_response_with_its_group(ours):
    score_B = 2 + normal(0, 4 * G)
    close(ours(score_B, group_size=G), [x for group in groups(score_B) for x in ADVANTAGES[ours](group)])


@pytest.mark.parametrize("ours", ADVANTAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [np.int32, np.bool_])
def test_scores_that_are_integers_or_bools_give_float32_advantages(ours, dtype):
    score_B = np.array([1, 0, 0, 1, 1, 0], dtype)
    close(ours(score_B, group_size=G), [x for group in groups(score_B) for x in ADVANTAGES[ours](group)])


@pytest.mark.parametrize("ours", ADVANTAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("tied", [0.1, -7.3, 1e6])
def test_tied_groups_have_advantage_zero_exactly(ours, tied):
    score_B = np.array([tied] * G + [0.0, 1.0, 2.0], np.float32)
    advantage_B = np.asarray(ours(score_B, group_size=G))
    assert not advantage_B[:G].any() and advantage_B[G:].any()
    assert np.array_equal(grpo.keep_informative(score_B, group_size=G), [False] * G + [True] * G)


def test_leave_one_out_needs_others():
    with pytest.raises(ValueError, match="group_size=1: should be at least 2"):
        grpo.leave_one_out(normal(0, 3), group_size=1)


def whitened(x_BR):
    x = [x_BR[b, r] for b, r in actions()]
    mean = sum(x) / len(x)
    std = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-8)
    return np.array([[(x_BR[b, r] - mean) / std if ACTION_BR[b, r] else 0.0 for r in range(R)] for b in range(B)])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus_whitens_the_rewards_to_come(gamma):
    reward_BR, to_come_BR = poisoned(normal(1, B, R)), np.zeros((B, R))
    for b, r in actions():
        later = [s for row, s in actions() if row == b and s >= r]
        to_come_BR[b, r] = sum(gamma**k * float(reward_BR[b, s]) for k, s in enumerate(later))
    close(grpo.batch_normalised(reward_BR, ACTION_BR, gamma=gamma), whitened(to_come_BR))


def test_reinforce_plus_plus_baseline_whitens_what_is_centred_in_its_group():
    score_B = normal(2, B)
    centred_B = [x for group in groups(score_B) for x in centred(group)]
    close(grpo.batch_normalised_groups(score_B, ACTION_BR, group_size=G), whitened(np.repeat(centred_B, R).reshape(B, R)))


def test_tied_batches_have_advantage_zero_exactly():
    tied_B = np.full(B, 0.1, np.float32)
    assert not grpo.batch_normalised_groups(tied_B, ACTION_BR, group_size=G).any()
    assert not grpo.batch_normalised(poisoned(np.zeros((B, R))), ACTION_BR).any()


@pytest.mark.parametrize(("length", "wanted"), [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (101, -1), (500, -1)])
def test_overlong_punishment_falls_evenly_over_the_cache(length, wanted):
    close(grpo.overlong_punishment(np.array([length]), max_length=100, cache=20), [wanted])


@pytest.mark.parametrize("cache", [0, -1, 101])
def test_overlong_punishment_needs_a_cache_within_the_length(cache):
    with pytest.raises(ValueError, match=f"cache={cache}: should be above 0"):
        grpo.overlong_punishment(np.array([1]), max_length=100, cache=cache)


def test_truncated_weights_are_ratios_up_to_the_cap_without_gradient():
    logp_BR, sampler_BR = logps(3, spread=1.0)
    wanted_BR = np.zeros((B, R))
    for b, r in actions():
        wanted_BR[b, r] = min(math.exp(float(logp_BR[b, r]) - float(sampler_BR[b, r])), 1.5)
    assert (wanted_BR == 1.5).any()
    close(grpo.truncated_weights(logp_BR, sampler_BR, ACTION_BR, cap=1.5), wanted_BR)
    assert not jax.grad(lambda x: jnp.sum(grpo.truncated_weights(x, sampler_BR, ACTION_BR)))(logp_BR).any()


def test_a_weight_on_the_advantage_is_a_weight_on_the_loss():
    (logp_BR, old_BR), advantage_BR = logps(4, spread=0.8), poisoned(normal(5, B, R))
    weight_BR = grpo.truncated_weights(old_BR, logps(6)[1], ACTION_BR)
    weighted = sum(float(weight_BR[b, r]) * token_reference(logp_BR, old_BR, advantage_BR, b, r, 0.2, 0.28) for b, r in actions())
    close(grpo.dapo_loss(logp_BR, old_BR, advantage_BR * weight_BR, ACTION_BR)[0], weighted)


# Losses


def objective(ratio, advantage, low, high):
    return min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def token_reference(logp_BR, old_BR, advantage_BR, b, r, low, high):
    return -objective(math.exp(float(logp_BR[b, r]) - float(old_BR[b, r])), float(advantage_BR[b, r]), low, high)


def k3(logp_BR, ref_BR, b, r):
    ratio = math.exp(float(ref_BR[b, r]) - float(logp_BR[b, r]))
    return ratio - 1 - math.log(ratio)


def grpo_reference(logp_BR, old_BR, ref_BR, advantage_BR):
    """Equation 3 of Shao et al. 2024, as a sum over responses."""
    total = 0.0
    for row in range(B):
        if LENGTHS[row]:
            tokens = [token_reference(logp_BR, old_BR, advantage_BR, b, r, 0.2, 0.2) + 0.04 * k3(logp_BR, ref_BR, b, r) for b, r in actions() if b == row]
            total += sum(tokens) / LENGTHS[row]
    return total


def dr_grpo_reference(logp_BR, old_BR, ref_BR, advantage_BR):
    return sum(token_reference(logp_BR, old_BR, advantage_BR, b, r, 0.2, 0.2) for b, r in actions())


def dapo_reference(logp_BR, old_BR, ref_BR, advantage_BR):
    return sum(token_reference(logp_BR, old_BR, advantage_BR, b, r, 0.2, 0.28) for b, r in actions())


def reinforce_reference(logp_BR, old_BR, ref_BR, advantage_BR):
    return -sum(float(advantage_BR[b, r]) * float(logp_BR[b, r]) for b, r in actions())


def sequence_ratio(logp_BR, old_BR, row):
    return math.exp(sum(float(logp_BR[b, r]) - float(old_BR[b, r]) for b, r in actions() if b == row) / LENGTHS[row])


def gspo_reference(logp_BR, old_BR, ref_BR, advantage_BR):
    """Equations 5 to 7 of Zheng et al. 2025; the response's advantage is that of its first action."""
    total = 0.0
    for row in range(B):
        if LENGTHS[row]:
            advantage = next(float(advantage_BR[b, r]) for b, r in actions() if b == row)
            total -= objective(sequence_ratio(logp_BR, old_BR, row), advantage, 0.1, 0.2)
    return total


RESPONSES, TOKENS = sum(n > 0 for n in LENGTHS), sum(LENGTHS)
LOSSES = {  # name: ours, the reference, the count
    "grpo": (lambda p, old, ref, a, acts: grpo.grpo_loss(p, old, a, acts, penalty_BR=0.04 * kl.on_actions(kl.k3, p, ref, acts)), grpo_reference, RESPONSES),
    "dr_grpo": (lambda p, old, ref, a, acts: grpo.dr_grpo_loss(p, old, a, acts, length=11), dr_grpo_reference, 11 * RESPONSES),
    "dapo": (lambda p, old, ref, a, acts: grpo.dapo_loss(p, old, a, acts), dapo_reference, TOKENS),
    "reinforce": (lambda p, old, ref, a, acts: grpo.reinforce_loss(p, a, acts), reinforce_reference, RESPONSES),
    "gspo": (lambda p, old, ref, a, acts: grpo.gspo_loss(p, old, a[:, 0], acts, clip_low=0.1, clip_high=0.2), gspo_reference, RESPONSES),
}


def inputs(by_response: bool):
    (logp_BR, old_BR), (_, ref_BR) = logps(7, spread=0.5), logps(7, spread=0.4)
    advantage_BR = np.tile(normal(9, B, 1), R) if by_response else poisoned(normal(8, B, R))
    return logp_BR, old_BR, ref_BR, advantage_BR


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_papers_and_so_is_its_gradient(name):
    ours, reference, wanted = LOSSES[name]
    arrays = inputs(by_response=name == "gspo")
    (total, count), slope_BR = jax.jit(jax.value_and_grad(lambda x: ours(x, *arrays[1:], ACTION_BR), has_aux=True))(arrays[0])
    close(total, reference(*arrays))
    close(count, wanted)
    close(slope_BR, differences(lambda x: reference(x, *arrays[1:]), arrays[0]), 2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up_to_the_batch(name):
    arrays = *inputs(by_response=name == "gspo"), ACTION_BR
    ours = jax.jit(LOSSES[name][0])
    parts = [ours(*(x[rows] for x in arrays)) for rows in (slice(0, 2), slice(2, 4), slice(4, 6))]
    close(jnp.array(ours(*arrays)), np.sum(np.asarray(parts, np.float64), axis=0))


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_actions_has_loss_and_gradient_zero(name):
    arrays = [np.full_like(x, np.nan) for x in inputs(by_response=False)]
    (total, count), slope_BR = jax.jit(jax.value_and_grad(lambda x: LOSSES[name][0](x, *arrays[1:], NONE_BR), has_aux=True))(arrays[0])
    assert total == count == 0 and not slope_BR.any()


@pytest.mark.parametrize("name", LOSSES)
def test_tied_groups_teach_nothing(name):
    logp_BR, old_BR, _, _ = inputs(by_response=False)
    advantage_BR = np.tile(np.asarray(grpo.group_normalised(np.full(B, 0.1, np.float32), group_size=G))[:, None], R)

    def loss(x):
        return LOSSES[name][0](x, old_BR, jax.lax.stop_gradient(x), advantage_BR, ACTION_BR)

    (total, _), slope_BR = jax.jit(jax.value_and_grad(loss, has_aux=True))(logp_BR)
    assert total == 0 and not slope_BR.any()


def test_gspo_token_is_gspo_where_the_advantage_is_one_for_the_response():
    logp_BR, old_BR, _, advantage_BR = inputs(by_response=True)
    how = dict(clip_low=0.1, clip_high=0.2)
    by_response = jax.value_and_grad(lambda x: grpo.gspo_loss(x, old_BR, advantage_BR[:, 0], ACTION_BR, **how), has_aux=True)(logp_BR)
    by_token = jax.value_and_grad(lambda x: grpo.gspo_token_loss(x, old_BR, advantage_BR, ACTION_BR, **how), has_aux=True)(logp_BR)
    for ours, wanted in zip(jax.tree.leaves(by_token), jax.tree.leaves(by_response), strict=True):
        close(ours, wanted)


def gspo_token_reference(logp_BR, frozen_BR, old_BR, advantage_BR, how):
    """Equations 13 and 14, the stopped parts taken from `frozen_BR`."""
    total = 0.0
    for b, r in actions():
        ratio = sequence_ratio(frozen_BR, old_BR, b) * math.exp(float(logp_BR[b, r]) - float(frozen_BR[b, r]))
        total -= objective(ratio, float(advantage_BR[b, r]), how["clip_low"], how["clip_high"]) / LENGTHS[b]
    return total


def test_gspo_token_gives_each_token_the_gradient_of_its_own_advantage():
    (logp_BR, old_BR, _, advantage_BR), how = inputs(by_response=False), dict(clip_low=0.1, clip_high=0.2)
    ours = jax.value_and_grad(lambda x: grpo.gspo_token_loss(x, old_BR, advantage_BR, ACTION_BR, **how), has_aux=True)
    (total, count), slope_BR = ours(logp_BR)
    close(total, gspo_token_reference(logp_BR, logp_BR, old_BR, advantage_BR, how))
    assert count == RESPONSES
    close(slope_BR, differences(lambda x: gspo_token_reference(x, logp_BR, old_BR, advantage_BR, how), logp_BR), 2e-6)


@pytest.mark.parametrize("name", ["dr_grpo", "dapo", "reinforce", "gspo_token"])
def test_a_penalty_is_averaged_as_the_loss_is(name):
    logp_BR, old_BR, ref_BR, advantage_BR = inputs(by_response=False)
    loss = {
        "dr_grpo": lambda **how: grpo.dr_grpo_loss(logp_BR, old_BR, advantage_BR, ACTION_BR, length=11, **how),
        "dapo": lambda **how: grpo.dapo_loss(logp_BR, old_BR, advantage_BR, ACTION_BR, **how),
        "reinforce": lambda **how: grpo.reinforce_loss(logp_BR, advantage_BR, ACTION_BR, **how),
        "gspo_token": lambda **how: grpo.gspo_token_loss(logp_BR, old_BR, advantage_BR, ACTION_BR, **how),
    }[name]
    share = {"gspo_token": lambda b: 1 / LENGTHS[b]}.get(name, lambda b: 1)
    added = sum(0.04 * k3(logp_BR, ref_BR, b, r) * share(b) for b, r in actions())
    (plain, n), (total, count) = loss(), loss(penalty_BR=0.04 * kl.on_actions(kl.k3, logp_BR, ref_BR, ACTION_BR))
    close(total, float(plain) + added)
    assert n == count
