"""The reward model's loss: of two answers to a prompt, the better one should score higher (Bradley & Terry 1952).

The K ranked answers of a prompt stay together, so that each is read once and a prompt weighs one (Ouyang et al. 2022).
A smaller rank is better; pairs of equal rank are ties and teach nothing. Places without an answer are not present.

Axes: B prompts, K answers, J the same answers as the worse of a pair, O objectives (helpful, harmless, …).
"""

import jax
import jax.numpy as jnp


def pairs(rank_BK, present_BK):
    """Returns (better_BKJ, weight_B): where answer k was ranked better than j, and 1 / C(k, 2) of the k answers present.

    Tied pairs count in C(k, 2): a prompt with ties weighs less. A prompt with fewer than two answers weighs 0.
    """
    here_BK = present_BK > 0
    better_BKJ = (rank_BK[:, :, None] < rank_BK[:, None, :]) & here_BK[:, :, None] & here_BK[:, None, :]
    n_B = jnp.sum(here_BK.astype(jnp.float32), axis=1)
    pairs_B = n_B * (n_B - 1) / 2
    return better_BKJ, jnp.where(pairs_B > 0, 1 / jnp.maximum(pairs_B, 1.0), 0.0)


def preference_loss(score_BKO, rank_BK, present_BK, objective_B, *, margin_B=None):
    """Returns (Σ loss, number of prompts) of each objective, float32 [O].

    loss of a prompt = −1 / C(K, 2) · Σ log σ(score of the better − score of the worse − margin) over its pairs; the
    margin is Llama 2's (Touvron et al. 2023). A prompt's scores are those of its own objective. Prompts whose answers
    all tie are not counted.
    """
    better_BKJ, weight_B = pairs(rank_BK, present_BK)
    difference_BKJ = _differences(score_BKO, better_BKJ, objective_B)
    if margin_B is not None:
        difference_BKJ = difference_BKJ - margin_B[:, None, None]
    loss_BKJ = jnp.where(better_BKJ, -jax.nn.log_sigmoid(difference_BKJ), 0.0)
    loss_B = jnp.sum(loss_BKJ, axis=(1, 2)) * weight_B
    taught_B = jnp.any(better_BKJ, axis=(1, 2))
    return _by_objective(loss_B, taught_B, objective_B, score_BKO.shape[2])


def pair_accuracy(score_BKO, rank_BK, present_BK, objective_B):
    """Returns (pairs that the scores order as the ranks do, pairs) of each objective [O]; equal scores are half right."""
    better_BKJ, _ = pairs(rank_BK, present_BK)
    difference_BKJ = _differences(score_BKO, better_BKJ, objective_B)
    right_BKJ = jnp.where(better_BKJ, (difference_BKJ > 0) + 0.5 * (difference_BKJ == 0), 0.0)
    O = score_BKO.shape[2]
    right_O, _ = _by_objective(jnp.sum(right_BKJ, axis=(1, 2)), objective_B >= 0, objective_B, O)
    pairs_O, _ = _by_objective(jnp.sum(better_BKJ.astype(jnp.float32), axis=(1, 2)), objective_B >= 0, objective_B, O)
    return right_O, pairs_O


def _differences(score_BKO, better_BKJ, objective_B):
    """Returns score k − score j under the prompt's objective where k is better, 0 elsewhere."""
    own_BO = _one_hot(objective_B, score_BKO.shape[2])
    score_BK = jnp.sum(jnp.where(own_BO[:, None, :], score_BKO.astype(jnp.float32), 0.0), axis=2)
    return jnp.where(better_BKJ, score_BK[:, :, None] - score_BK[:, None, :], 0.0)


def _by_objective(x_B, counted_B, objective_B, O):
    own_BO = _one_hot(objective_B, O) & counted_B[:, None]
    return jnp.sum(jnp.where(own_BO, x_B[:, None], 0.0), axis=0), jnp.sum(own_BO.astype(jnp.float32), axis=0)


def _one_hot(objective_B, O):
    return objective_B[:, None] == jnp.arange(O)[None]
