"""What a choice among samples is worth equals a count over all choices."""

import itertools
import math

import numpy as np
import pytest

from jaxllm.align.best_of import best_of_n_kl, best_rows, expected_best, majority, pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_choices_with_a_correct_sample(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [1] * correct + [0] * (n - correct)
        choices = [max(choice) for choice in itertools.combinations(samples, k)]
        np.testing.assert_allclose(pass_at_k(n, correct, k), sum(choices) / len(choices), rtol=1e-12)
        np.testing.assert_allclose(expected_best(samples, k), pass_at_k(n, correct, k), rtol=1e-12)


def test_pass_at_k_is_unbiased():
    """The mean over all outcomes of n samples, each correct with chance p, is 1 − (1 − p)^k exactly."""
    n, k, p = 10, 4, 0.17
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    np.testing.assert_allclose(mean, 1 - (1 - p) ** k, rtol=1e-12)


def test_pass_at_k_of_many_samples_is_finite():
    np.testing.assert_allclose(pass_at_k(2000, 1, 1000), 0.5, rtol=1e-12)


def test_the_expected_best_is_the_mean_largest_of_all_choices():
    scores = [0.3, -2.0, 1.5, 1.5, 0.0, 0.7]
    for k in range(1, len(scores) + 1):
        largest = [max(choice) for choice in itertools.combinations(scores, k)]
        np.testing.assert_allclose(expected_best(scores, k), sum(largest) / len(largest), rtol=1e-12)
    assert expected_best(scores, len(scores)) == 1.5


@pytest.mark.parametrize("wrong", [lambda: pass_at_k(4, 5, 1), lambda: pass_at_k(4, 2, 5), lambda: pass_at_k(4, 2, 0),
                                   lambda: expected_best([], 1), lambda: expected_best([1.0], 2), lambda: best_of_n_kl(0)])
def test_numbers_that_cannot_be_are_named(wrong):
    with pytest.raises(ValueError, match=r"(k|n|correct)=\d: should be"):
        wrong()


@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_the_kl_of_best_of_n_is_that_of_its_density(n):
    """A score's place u among all is uniform under the policy; the best of n has density n u^(n−1), so KL = ∫ q log q."""
    u = (np.arange(200_000) + 0.5) / 200_000
    density = n * u ** (n - 1)
    np.testing.assert_allclose(best_of_n_kl(n), np.mean(density * np.log(np.maximum(density, 1e-300))), atol=1e-6)


def test_the_best_row_of_each_group_is_the_first_of_the_largest():
    assert best_rows([1, 3, 3, -1, -2, -5, 0, 0, 0], group_size=3).tolist() == [1, 3, 6]
    assert best_rows(np.array([True, False, False, True]), group_size=2).tolist() == [0, 3]


@pytest.mark.parametrize(("answers", "wanted"), [
    (["18", "20", "18", None], ("18", 0.5)), (["a", "b", "b", "a"], ("a", 0.5)), (["b", "a", "a", "b"], ("b", 0.5)),
    ([None, None, None, "7"], ("7", 0.25)), ([None, None], (None, 0.0)), ([], (None, 0.0)), ([0, 0, None], (0, 2 / 3)), (["", "x", ""], ("", 2 / 3))])
def test_the_majority_is_the_most_frequent_answer_and_then_the_first(answers, wanted):
    assert majority(answers) == wanted
