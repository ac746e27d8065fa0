"""DPO and its kin equal loops over pairs written from the papers, with their gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from align_arrays import ACTION_BR, B, actions, close, differences, logps, normal

from jaxllm.align import dpo

CHOSEN_B, REJECTED_B, REF_CHOSEN_B, REF_REJECTED_B = (-12 + 3 * normal(seed, B) for seed in range(4))
LENGTHS = np.array([3, 9, 4, 1, 12, 7]), np.array([5, 2, 4, 8, 1, 30])


def sigma(x):
    return 1 / (1 + math.exp(-x))


def dpo_reference(chosen, rejected, ref_chosen, ref_rejected, smoothing=0.0):
    margin = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -(1 - smoothing) * math.log(sigma(margin)) - smoothing * math.log(sigma(-margin))


def ipo_reference(chosen, rejected, ref_chosen, ref_rejected):
    return ((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 * 0.1)) ** 2


def odds(mean):
    return math.exp(mean) / (1 - math.exp(mean))


def orpo_reference(chosen, rejected, chosen_length, rejected_length):
    chosen, rejected = chosen / chosen_length, rejected / rejected_length
    return -chosen - 0.2 * math.log(sigma(math.log(odds(chosen) / odds(rejected))))


def simpo_reference(chosen, rejected, chosen_length, rejected_length):
    return -math.log(sigma(2.0 / chosen_length * chosen - 2.0 / rejected_length * rejected - 0.5))


REFERENCES, MEANS = (REF_CHOSEN_B, REF_REJECTED_B), [x / n for x, n in zip((CHOSEN_B, REJECTED_B), LENGTHS, strict=True)]
RATIOS = CHOSEN_B - REF_CHOSEN_B, REJECTED_B - REF_REJECTED_B
LOSSES = {  # name: ours, the reference of one pair, what both take besides both answers, rewards
    "dpo": (lambda *x: dpo.dpo(*x, beta=0.3), dpo_reference, REFERENCES, [0.3 * x for x in RATIOS]),
    "cdpo": (lambda *x: dpo.dpo(*x, beta=0.3, label_smoothing=0.1), lambda *x: dpo_reference(*x, 0.1), REFERENCES, [0.3 * x for x in RATIOS]),
    "ipo": (lambda *x: dpo.ipo(*x, tau=0.1), ipo_reference, REFERENCES, [0.1 * x for x in RATIOS]),
    "orpo": (lambda *x: dpo.orpo(*x, weight=0.2), orpo_reference, LENGTHS, MEANS),
    "simpo": (lambda *x: dpo.simpo(*x, beta=2.0, gamma=0.5), simpo_reference, LENGTHS, [2 * x for x in MEANS]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_papers_and_so_is_its_gradient(name):
    ours, reference, beside, rewards = LOSSES[name]
    loss_B, *reward_B = ours(CHOSEN_B, REJECTED_B, *beside)
    close(loss_B, [reference(*map(float, pair)) for pair in zip(CHOSEN_B, REJECTED_B, *beside, strict=True)])
    for a, b in zip(reward_B, rewards, strict=True):
        close(a, b)
    slopes = jax.jit(jax.grad(lambda a, b: jnp.sum(ours(a, b, *beside)[0]), argnums=(0, 1)))(CHOSEN_B, REJECTED_B)
    wanted = (differences(lambda x: sum(map(reference, x, REJECTED_B.astype(float), *beside)), CHOSEN_B),
              differences(lambda x: sum(map(reference, CHOSEN_B.astype(float), x, *beside)), REJECTED_B))
    for a, b in zip(slopes, wanted, strict=True):
        close(a, b, 2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_passes_through_the_rewards(name):
    ours, _, beside, _ = LOSSES[name]
    assert not jax.grad(lambda x: jnp.sum(ours(x, REJECTED_B, *beside)[1]))(CHOSEN_B).any()


@pytest.mark.parametrize("name", ["dpo", "cdpo", "orpo", "simpo"])
def test_a_pair_far_apart_has_a_finite_loss_and_gradient(name):
    ours, _, beside, _ = LOSSES[name]
    loss = jax.jit(jax.value_and_grad(lambda a, b: jnp.sum(ours(a, b, *beside)[0]), argnums=(0, 1)))
    for chosen, rejected in ((-1e4, -1e-3), (-1e-3, -1e4), (0.0, 0.0)):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(loss(np.full(B, chosen, np.float32), np.full(B, rejected, np.float32))))


@pytest.mark.parametrize("name", ["orpo", "simpo"])
@pytest.mark.parametrize("empty", [0, 1, None])
def test_a_pair_with_an_empty_answer_teaches_nothing(name, empty):
    lengths = [np.where((i == empty) | (empty is None) & (np.arange(B) == 2), 0, n) if i == empty or empty is None else n for i, n in enumerate(LENGTHS)]
    ours = LOSSES[name][0]
    loss_B, *_ = ours(CHOSEN_B, REJECTED_B, *lengths)
    slopes = jax.grad(lambda a, b: jnp.sum(ours(a, b, *lengths)[0]), argnums=(0, 1))(CHOSEN_B, REJECTED_B)
    nothing_B = (lengths[0] == 0) | (lengths[1] == 0)
    for x_B in (loss_B, *slopes):
        assert not x_B[nothing_B].any() and np.isfinite(x_B).all() and x_B[~nothing_B].all()


def test_label_smoothing_of_one_half_wants_a_margin_of_zero():
    slope_B = jax.grad(lambda x: jnp.sum(dpo.dpo(x, REJECTED_B, x - 1, REJECTED_B - 1, beta=0.3, label_smoothing=0.5)[0]))(CHOSEN_B)
    np.testing.assert_allclose(slope_B, 0, atol=1e-7)


def test_ipo_stops_at_its_target():
    zero_B = np.zeros(1, np.float32)
    loss_B, *_ = dpo.ipo(zero_B + 5, zero_B, zero_B, zero_B, tau=0.1)
    assert loss_B == 0


# KTO


GOOD_B, REAL_B = np.array([True, False, True, False, False, True]), np.array([1, 1, 1, 0, 1, 1])


def kto_reference(logp, ref, good, baseline):
    """λ_y − v(x, y), equation 8."""
    above = 0.3 * (logp - ref - baseline)
    return 1.5 - 1.5 * sigma(above) if good else 0.8 - 0.8 * sigma(-above)


def test_kto_is_its_papers_and_so_is_its_gradient():
    def ours(x):
        return dpo.kto(x, REF_CHOSEN_B, GOOD_B, 0.7, beta=0.3, desirable_weight=1.5, undesirable_weight=0.8)

    loss_B, reward_B = ours(CHOSEN_B)
    close(loss_B, [kto_reference(float(x), float(y), good, 0.7) for x, y, good in zip(CHOSEN_B, REF_CHOSEN_B, GOOD_B, strict=True)])
    close(reward_B, 0.3 * (CHOSEN_B - REF_CHOSEN_B))
    slope_B = jax.grad(lambda x: jnp.sum(ours(x)[0]))(CHOSEN_B)
    close(slope_B, differences(lambda x: sum(kto_reference(a, float(b), good, 0.7) for a, b, good in zip(x, REF_CHOSEN_B, GOOD_B, strict=True)), CHOSEN_B), 2e-6)


def test_ktos_baseline_is_the_mean_log_ratio_of_real_rows_never_below_zero_and_without_gradient():
    ahead_B = np.array([1.0, 2, 0.5, np.nan, -1, 0.25], np.float32)
    close(dpo.kto_baseline(ahead_B, np.zeros(B, np.float32), REAL_B), 2.75 / 5)
    assert dpo.kto_baseline(-np.abs(ahead_B), np.zeros(B, np.float32), REAL_B) == 0
    assert dpo.kto_baseline(ahead_B, np.zeros(B, np.float32), np.zeros(B)) == 0
    assert not jax.grad(lambda x: dpo.kto_baseline(x, jnp.zeros(B), REAL_B))(ahead_B).any()


# Sums


def test_an_answers_log_probability_is_the_sum_over_its_tokens():
    logp_BR, _ = logps(5)
    logp_B, length_B = dpo.answer_logps(logp_BR, ACTION_BR)
    close(logp_B, [sum(float(logp_BR[b, r]) for b, r in actions() if b == row) for row in range(B)])
    close(length_B, ACTION_BR.sum(axis=1))
    slope_BR = jax.grad(lambda x: jnp.sum(dpo.answer_logps(x, ACTION_BR)[0]))(logp_BR)
    assert np.array_equal(slope_BR, ACTION_BR)


def test_metrics_are_sums_over_real_pairs_with_half_for_a_tie():
    chosen_B, rejected_B = np.array([1, 2, 3, np.nan, 4, 5], np.float32), np.array([0, 2, 4, np.nan, 1, 1], np.float32)
    metrics = dpo.preference_metrics(chosen_B, rejected_B, REAL_B)
    assert metrics == {"chosen_reward": (15, 5), "rejected_reward": (8, 5), "margin": (7, 5), "accuracy": (3.5, 5)}
    assert all(pair == (0, 0) for pair in dpo.preference_metrics(chosen_B, rejected_B, np.zeros(B)).values())


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up_to_the_batch(name):
    ours, _, beside, _ = LOSSES[name]

    summed = jax.jit(lambda real_B, *pair: dpo.over_pairs(ours(*pair)[0], real_B))

    def sums(rows):
        return summed(REAL_B[rows], *(x[rows] for x in (CHOSEN_B, REJECTED_B, *beside)))

    parts = [sums(rows) for rows in (slice(0, 2), slice(2, 4), slice(4, 6))]
    close(jnp.array(sums(slice(None))), np.sum(np.asarray(parts, np.float64), axis=0))
