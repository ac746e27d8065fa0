"""The reward model's loss equals a loop over the pairs of each prompt, for any number of answers, ties and objectives."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from align_arrays import close, differences, normal

from jaxllm.align import bradley_terry

preference_loss, pair_accuracy = jax.jit(bradley_terry.preference_loss), jax.jit(bradley_terry.pair_accuracy)

B, K, O = 6, 4, 2
RANK_BK = np.array([[1, 2, 3, 4], [2, 1, 2, 3], [1, 1, 1, 1], [3, 1, 2, 0], [1, 2, 1, 2], [5, 1, 9, 9]])
PRESENT_BK = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
OBJECTIVE_B = np.array([0, 1, 0, 1, 0, 1])
SCORE_BKO = np.where(PRESENT_BK[:, :, None], normal(0, B, K, O), np.nan).astype(np.float32)
MARGIN_B = np.array([0.0, 0.5, 1.0, 0.25, 2.0, 3.0], np.float32)


def pairs(b):
    """Yields (better, worse) of a prompt's answers, ties left out."""
    here = [k for k in range(K) if PRESENT_BK[b, k]]
    yield from ((k, j) for k, j in itertools.permutations(here, 2) if RANK_BK[b, k] < RANK_BK[b, j])


def reference(score_BKO, margin_B=None):
    """Equation 1 of Ouyang et al. 2022, as a sum over the prompts of each objective and their number."""
    total, count = np.zeros(O), np.zeros(O)
    for b, o in enumerate(OBJECTIVE_B):
        margin = 0.0 if margin_B is None else float(margin_B[b])
        losses = [-math.log(1 / (1 + math.exp(-(float(score_BKO[b, k, o]) - float(score_BKO[b, j, o]) - margin)))) for k, j in pairs(b)]
        if losses:
            total[o] += sum(losses) / math.comb(int(PRESENT_BK[b].sum()), 2)
            count[o] += 1
    return total, count


@pytest.mark.parametrize("margin_B", [None, MARGIN_B], ids=["plain", "margin"])
def test_the_loss_is_the_papers_and_so_is_its_gradient(margin_B):
    def ours(x):
        return preference_loss(x, RANK_BK, PRESENT_BK, OBJECTIVE_B, margin_B=margin_B)

    total_O, count_O = ours(SCORE_BKO)
    close(total_O, reference(SCORE_BKO, margin_B)[0])
    assert np.array_equal(count_O, [2, 2]), "all-tied and single answers are not counted"
    weight_O = np.array([1.0, -0.7])
    slope_BKO = jax.jit(jax.grad(lambda x: jnp.sum(ours(x)[0] * weight_O)))(SCORE_BKO)
    close(slope_BKO, differences(lambda x: (reference(x, margin_B)[0] * weight_O).sum(), SCORE_BKO), 2e-6)


def test_two_answers_are_the_logistic_loss():
    score_BKO = np.array([[[0.3], [1.5]]], np.float32)
    total_O, count_O = preference_loss(score_BKO, np.array([[2, 1]]), np.ones((1, 2)), np.array([0]))
    close(total_O, [math.log(1 + math.exp(-1.2))])
    assert count_O == 1


def test_the_order_of_answers_and_the_numbers_of_ranks_do_not_matter():
    order, args = [2, 0, 3, 1], (RANK_BK, PRESENT_BK)
    ours = preference_loss(SCORE_BKO[:, order], *(10 * x[:, order] for x in args), OBJECTIVE_B)
    for a, b in zip(ours, preference_loss(SCORE_BKO, *args, OBJECTIVE_B), strict=True):
        close(a, b)


def test_a_prompt_weighs_one_however_many_answers_it_has():
    """Equal scores cost log 2 a pair, so that a prompt without ties costs log 2."""
    for k in (2, 3, 9):
        total_O, count_O = preference_loss(np.zeros((1, k, 1), np.float32), np.arange(k)[None], np.ones((1, k)), np.array([0]))
        close(total_O, [math.log(2)])
        assert count_O == 1


@pytest.mark.parametrize(("rank_BK", "present_BK"), [
    (np.zeros((B, K)), np.ones((B, K))), (RANK_BK, np.zeros((B, K))), (RANK_BK, np.eye(B, K))], ids=["all tied", "none present", "at most one"])
def test_a_batch_without_pairs_has_loss_and_gradient_zero(rank_BK, present_BK):
    score_BKO = np.where(present_BK[:, :, None] > 0, normal(1, B, K, O), np.nan).astype(np.float32)
    slope_BKO = jax.grad(lambda x: jnp.sum(preference_loss(x, rank_BK, present_BK, OBJECTIVE_B)[0]))(score_BKO)
    nothing = *preference_loss(score_BKO, rank_BK, present_BK, OBJECTIVE_B), *pair_accuracy(score_BKO, rank_BK, present_BK, OBJECTIVE_B)
    assert not slope_BKO.any() and not np.any(nothing)


def test_far_apart_scores_have_a_finite_loss_and_gradient():
    score_BKO = np.array([[[-1e4], [1e4]]], np.float32)
    loss = jax.value_and_grad(lambda x: jnp.sum(preference_loss(x, np.array([[1, 2]]), np.ones((1, 2)), np.array([0]))[0]))
    total, slope_BKO = loss(score_BKO)
    assert total == 2e4 and np.array_equal(slope_BKO, [[[-1], [1]]])


def test_scores_of_other_objectives_get_no_gradient():
    slope_BKO = jax.grad(lambda x: jnp.sum(preference_loss(x, RANK_BK, PRESENT_BK, OBJECTIVE_B)[0]))(SCORE_BKO)
    assert not slope_BKO[np.arange(B), :, 1 - OBJECTIVE_B].any() and slope_BKO[np.arange(B), :, OBJECTIVE_B].any()


def test_micro_batches_add_up_to_the_batch():
    arrays = SCORE_BKO, RANK_BK, PRESENT_BK, OBJECTIVE_B
    parts = [preference_loss(*(x[rows] for x in arrays)) for rows in (slice(0, 2), slice(2, 4), slice(4, 6))]
    close(jnp.array(preference_loss(*arrays)), np.sum(np.asarray(parts, np.float64), axis=0))


def test_accuracy_is_the_share_of_pairs_in_order_with_half_for_equal_scores():
    score_BKO = SCORE_BKO.copy()
    score_BKO[4, 0] = score_BKO[4, 1]
    right, count = np.zeros(O), np.zeros(O)
    for b, o in enumerate(OBJECTIVE_B):
        for k, j in pairs(b):
            better, worse = score_BKO[b, k, o], score_BKO[b, j, o]
            right[o] += 1 if better > worse else 0.5 if better == worse else 0
            count[o] += 1
    ours_O, pairs_O = pair_accuracy(score_BKO, RANK_BK, PRESENT_BK, OBJECTIVE_B)
    close(ours_O, right)
    close(pairs_O, count)
    assert 0 < right[0] < count[0] and right[0] % 1
