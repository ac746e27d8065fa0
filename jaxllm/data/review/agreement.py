"""How far experts agree beyond chance, each figure with a bootstrap interval over the documents.

U documents, K categories, R resamples of the documents (row 0: each once, which gives the figure itself). Every coefficient is
a function of sums over documents, so all resamples are one matrix product.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000


class Estimate(NamedTuple):
    value: float | None  # None: not defined, e.g. where all labels are the same
    low: float | None = None
    high: float | None = None


def cohen(a_U: np.ndarray, b_U: np.ndarray, n_categories: int, weight_RU: np.ndarray) -> np.ndarray:
    """Returns kappa_R of two experts (Cohen 1960)."""
    joint_UK = np.eye(n_categories**2)[a_U * n_categories + b_U]
    joint_RKK = (weight_RU @ joint_UK).reshape(-1, n_categories, n_categories)
    joint_RKK /= joint_RKK.sum((1, 2), keepdims=True)
    observed_R = np.trace(joint_RKK, axis1=1, axis2=2)
    expected_R = (joint_RKK.sum(1) * joint_RKK.sum(2)).sum(1)
    return _beyond_chance(1 - observed_R, 1 - expected_R)


def fleiss(count_UK: np.ndarray, weight_RU: np.ndarray) -> np.ndarray:
    """Returns kappa_R of documents that all have the same number of labels (Fleiss 1971)."""
    m = count_UK[0].sum()
    agree_U = (count_UK * (count_UK - 1)).sum(1) / (m * (m - 1))
    n_R = weight_RU.sum(1)
    category_RK = weight_RU @ count_UK / (m * n_R)[:, None]
    return _beyond_chance(1 - weight_RU @ agree_U / n_R, 1 - (category_RK**2).sum(1))


def krippendorff(count_UK: np.ndarray, weight_RU: np.ndarray) -> np.ndarray:
    """Returns nominal alpha_R; documents may have any number of labels, those with one say nothing (Krippendorff 2011)."""
    m_U = count_UK.sum(1)
    pairable_U = m_U >= 2
    differ_U = np.where(pairable_U, (m_U**2 - (count_UK**2).sum(1)) / np.maximum(m_U - 1, 1), 0.0)
    n_RK = weight_RU @ (count_UK * pairable_U[:, None])
    n_R = n_RK.sum(1)
    expected_R = (n_R**2 - (n_RK**2).sum(1)) / np.maximum(n_R - 1, 1)
    return _beyond_chance(weight_RU @ differ_U, expected_R)


def _beyond_chance(disagree_R, expected_R):
    return 1 - np.divide(disagree_R, expected_R, out=np.full_like(expected_R, np.nan), where=expected_R > 1e-12)


def resamples(n: int, seed: int, cluster_U: np.ndarray | None = None) -> np.ndarray:
    """Returns weight_RU: how often each document is in each resample; in the first, once.

    Documents of one cluster (numbered from 0) are drawn together, as what is said of one tells something of the others.
    """
    cluster_U = np.arange(n) if cluster_U is None else cluster_U
    n_clusters = int(cluster_U.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), RESAMPLES)
    return np.concatenate([np.ones((1, n)), drawn[:, cluster_U]])


def interval(value_R: np.ndarray, confidence: float) -> Estimate:
    """Returns the first value and the percentile interval of the rest, those that are not defined left out."""
    if np.isnan(value_R[0]):
        return Estimate(None)
    drawn = value_R[1:][~np.isnan(value_R[1:])]
    tail = 50 * (1 - confidence)
    low, high = np.percentile(drawn, [tail, 100 - tail]) if len(drawn) else (value_R[0], value_R[0])
    return Estimate(float(value_R[0]), float(low), float(high))


def summary(labels: dict[str, dict[str, str]], categories: tuple[str, ...], confidence: float, seed: int,
            cluster: Callable[[str], str] = str) -> dict:
    """Returns every coefficient of {document: {expert: label}}; a document with one label counts for none.

    Documents with the same `cluster(document)` are drawn together for the intervals.
    """
    shared = {doc: found for doc, found in labels.items() if len(found) > 1}
    out = {"documents": len(shared), "same": sum(len(set(found.values())) == 1 for found in shared.values())}
    if not shared:
        return out
    place = {category: k for k, category in enumerate(categories)}
    cluster_U = np.unique([cluster(doc) for doc in shared], return_inverse=True)[1]

    def weights(chosen_U):
        return resamples(int(chosen_U.sum()), seed, np.unique(cluster_U[chosen_U], return_inverse=True)[1])

    count_UK = np.zeros((len(shared), len(categories)))
    for u, found in enumerate(shared.values()):
        for label in found.values():
            count_UK[u, place[label]] += 1
    out["krippendorff"] = interval(krippendorff(count_UK, weights(np.ones(len(shared), bool))), confidence)
    numbers, times = np.unique(count_UK.sum(1), return_counts=True)
    usual_U = count_UK.sum(1) == numbers[times.argmax()]
    out["fleiss"] = interval(fleiss(count_UK[usual_U], weights(usual_U)), confidence)
    out["fleiss_documents"], out["fleiss_experts"] = int(usual_U.sum()), int(numbers[times.argmax()])
    experts = sorted({expert for found in shared.values() for expert in found})
    out["cohen"] = []
    for a, b in itertools.combinations(experts, 2):
        both_U = np.array([a in found and b in found for found in shared.values()])
        if both_U.any():
            by_both = [found for found in shared.values() if a in found and b in found]
            a_U, b_U = np.array([(place[found[a]], place[found[b]]) for found in by_both]).T
            kappa = interval(cohen(a_U, b_U, len(categories), weights(both_U)), confidence)
            out["cohen"].append({"experts": [a, b], "documents": len(a_U), "same": int((a_U == b_U).sum()), "kappa": kappa})
    return out
