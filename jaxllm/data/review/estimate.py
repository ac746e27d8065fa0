"""What labels of a stratified sample say of all documents: precision and recall of filters, with intervals.

A stratum is a source's documents with one decision, near a threshold or away from it. It has N documents, of which n were
judged and k found bad (to be dropped). A share over several strata weighs each by N, not by n.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxllm.data.review.agreement import Estimate

DRAWS = 20_000
KEPT = "kept"  # the decision of documents that no rule removed


class Stratum(NamedTuple):
    source: str
    decision: str  # KEPT, or the stage and rule that removed it
    population: int
    judged: int
    bad: int


def share_bad(strata: Iterable[Stratum], confidence: float) -> Estimate:
    """Returns the share of bad documents: the stratified estimator, with Wilson's interval at the effective sample size."""
    share, size = pooled(strata)
    return Estimate(None) if share is None else Estimate(share, *wilson(share, size, confidence))


def pooled(strata: Iterable[Stratum]) -> tuple[float | None, float]:
    """Returns (the share of bad documents, its effective sample size); (None, 0) where nothing was judged.

    The size is what a plain random sample would need for the same variance, if all strata had the same share (Kish 1965):
    it stays finite where every label is the same, and is infinite where every document was judged. Strata of which nothing
    was judged count as more documents of the others, in proportion: they leave the share as it is, and take certainty away.
    """
    strata = list(strata)
    judged = [s for s in strata if s.judged]
    total = sum(s.population for s in judged)
    if not total:
        return None, 0.0
    stand_for = sum(s.population for s in strata) / total
    share = sum(s.population / total * s.bad / s.judged for s in judged)
    variance = sum((s.population / total) ** 2 * (1 - s.judged / (s.population * stand_for)) / s.judged for s in judged)
    return min(max(share, 0.0), 1.0), 1 / variance if variance > 1e-15 else math.inf


def wilson(share: float, n: float, confidence: float) -> tuple[float, float]:
    """Returns the score interval of a share (Wilson 1927)."""
    z2 = statistics.NormalDist().inv_cdf(0.5 + confidence / 2) ** 2 / n
    middle, half = share + z2 / 2, math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


class Amount(NamedTuple):
    """How many documents of one decision are bad."""

    population: int
    bad: float
    drawn: np.ndarray  # of `bad`, under what is known


def amounts(strata: Sequence[Stratum], seed: int) -> dict[str, Amount]:
    """Returns the amount of every decision of which something was judged.

    Draws are of the Beta posterior under Jeffreys' prior, at the effective sample size (Brown, Cai and DasGupta 2001): a
    decision without a single bad document in the sample may still hold some.
    """
    rng, found = np.random.default_rng(seed), {}
    for decision in sorted({s.decision for s in strata}):
        mine = [s for s in strata if s.decision == decision]
        (p, n), population = pooled(mine), sum(s.population for s in mine)
        if p is not None:
            drawn = np.full(DRAWS, p) if math.isinf(n) else rng.beta(p * n + 0.5, (1 - p) * n + 0.5, DRAWS)
            found[decision] = Amount(population, population * p, population * drawn)
    return found


def recall(found: dict[str, Amount], caught: set[str], confidence: float, bad: bool = True) -> Estimate:
    """Returns which share of all bad documents has a decision in `caught` (with bad=False: of all good ones).

    Rules of which nothing was judged are left out on both sides; without judged documents that were kept there is none.
    """
    if KEPT not in found or not caught & found.keys():
        return Estimate(None)
    inside = np.array([decision in caught for decision in found])
    value_D = np.array([a.bad if bad else a.population - a.bad for a in found.values()])
    drawn_DR = np.array([a.drawn if bad else a.population - a.drawn for a in found.values()])
    if not value_D.sum():
        return Estimate(None)
    value = value_D[inside].sum() / value_D.sum()
    ratio_R = drawn_DR[inside].sum(0) / np.maximum(drawn_DR.sum(0), 1e-300)
    low, high = np.percentile(ratio_R, [50 * (1 - confidence), 50 * (1 + confidence)])
    return Estimate(float(value), float(min(low, value)), float(max(high, value)))


def source_weights(strata: Sequence[Stratum], kept_bytes: dict[str, int], confidence: float) -> list[dict]:
    """Returns a row a source: its share of the kept text, the share of it that is good, and the weight these propose.

    The weight is the source's share of good text. A source whose interval holds the share of all of them cannot be told
    from the rest, and counts as them: labels that are few change nothing.
    """
    kept = [s for s in strata if s.decision == KEPT]
    overall, _ = pooled(kept)
    if overall is None:
        return []
    rows, total = [], sum(kept_bytes.values())
    for source in sorted(kept_bytes):
        bad = share_bad([s for s in kept if s.source == source], confidence)
        differs = bad.value is not None and not bad.low <= overall <= bad.high
        good = Estimate(None) if bad.value is None else Estimate(1 - bad.value, 1 - bad.high, 1 - bad.low)
        part = kept_bytes[source] / total if total else 0.0
        rows.append({"source": source, "share": part, "good": good, "differs": differs,
                     "weight": part * (good.value if differs else 1 - overall)})
    weights = sum(row["weight"] for row in rows)
    return [row | {"weight": row["weight"] / weights if weights else row["share"]} for row in rows]
