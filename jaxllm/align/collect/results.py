"""What the comparisons say: how many there are, how far annotators agree, and what else than quality may decide.

R resamples of the comparisons, N comparisons.
"""

import collections
import itertools

import numpy as np

from jaxllm.align.collect.items import Items
from jaxllm.align.collect.labels import Labels
from jaxllm.data.review import agreement

CATEGORIES = ("first", "second", "tie", "both bad")  # of two answers, in the order of the output's "answers"


def results(items: Items, labels: Labels, confidence: float, seed: int) -> dict:
    ids = {found.id for i in range(len(items.keys)) if (found := items.known(i))}
    by_item = {item: found for item, found in labels.by_item().items() if item in ids}
    rows = [row for found in by_item.values() for row in found.values()]
    people = {name: collections.Counter(map(kind, (r for r in rows if r["annotator"] == name)))
              for name in sorted({row["annotator"] for row in rows})}
    return {
        "items": len(items.keys), "compared": len(by_item), "comparisons": len(rows), "confidence": confidence,
        "annotators": {name: {k: n[k] for k in ("decided", "tied", "both bad")} for name, n in people.items()},
        "agreement": agreement.summary(pair_labels(by_item), CATEGORIES, confidence, seed, cluster=item_of),
        "shown_first": preferred(rows, lambda row, i, j: row["shown"].index(i) < row["shown"].index(j), confidence, seed),
        "longer": preferred(rows, lambda row, i, j: longer(row["answers"][i], row["answers"][j]), confidence, seed),
        "disagreements": disagreements(by_item),
    }


def kind(row: dict) -> str:
    return "both bad" if row.get("both_bad") else "tied" if len(set(row["rank"])) == 1 else "decided"


def pair_labels(by_item: dict[str, dict[str, dict]]) -> dict[str, dict[str, str]]:
    """Returns {"item/i-j": {annotator: category}} of every pair of answers of every item."""
    out = {}
    for item, found in by_item.items():
        n = len(next(iter(found.values()))["rank"])
        for i, j in itertools.combinations(range(n), 2):
            out[f"{item}/{i}-{j}"] = {name: category(row, i, j) for name, row in found.items()}
    return out


def category(row: dict, i: int, j: int) -> str:
    if row.get("both_bad"):
        return "both bad"
    a, b = row["rank"][i], row["rank"][j]
    return "tie" if a == b else "first" if a < b else "second"


def item_of(pair: str) -> str:
    """Returns the item that a pair belongs to; its pairs are no independent observations."""
    return pair.split("/")[0]


def longer(a: str, b: str) -> bool | None:
    return None if len(a) == len(b) else len(a) > len(b)


def preferred(rows: list[dict], is_first, confidence: float, seed: int) -> agreement.Estimate:
    """Returns in which share of the decided pairs the one was preferred of which `is_first(row, i, j)` is true of (i, j).

    Pairs of which it is None say nothing. The interval is by a bootstrap over items.
    """
    wins_N, pairs_N = np.zeros(len(rows)), np.zeros(len(rows))
    for k, row in enumerate(rows):
        for i, j in itertools.combinations(range(len(row["rank"])), 2):
            first = is_first(row, i, j)
            if first is not None and row["rank"][i] != row["rank"][j]:
                pairs_N[k] += 1
                wins_N[k] += first == (row["rank"][i] < row["rank"][j])
    if not pairs_N.any():
        return agreement.Estimate(None)
    item_N = np.unique([row["id"] for row in rows], return_inverse=True)[1]
    weight_RN = agreement.resamples(len(rows), seed, item_N)
    pairs_R = weight_RN @ pairs_N
    share_R = np.divide(weight_RN @ wins_N, pairs_R, out=np.full_like(pairs_R, np.nan), where=pairs_R > 0)
    return agreement.interval(share_R, confidence)


def disagreements(by_item: dict[str, dict[str, dict]]) -> list[dict]:
    """Returns the items of which not all annotators say the same."""
    out = []
    for item, found in by_item.items():
        said = {name: told_rank(row) for name, row in found.items()}
        if len(set(said.values())) > 1:
            out.append({"id": item, "said": said, "prompt": shortened(next(iter(found.values()))["prompt"])})
    return out


def told_rank(row: dict) -> str:
    """Returns a comparison in words: "2 > 1 = 3"; answers are numbered from 1 as in the output."""
    if row.get("both_bad"):
        return "both bad" if len(row["rank"]) == 2 else "all bad"
    order = sorted(range(len(row["rank"])), key=lambda i: row["rank"][i])
    words = [str(order[0] + 1)]
    for a, b in itertools.pairwise(order):
        words += ["=" if row["rank"][a] == row["rank"][b] else ">", str(b + 1)]
    return " ".join(words)


def shortened(prompt) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return text[:160]


def told(found: dict) -> str:
    """Returns the results as lines for a terminal."""
    people, agreed = found["annotators"], found["agreement"]
    lines = [f"{found['comparisons']} comparisons of {found['compared']} items (of {found['items']}) by "
             f"{len(people)} annotator{'s' * (len(people) != 1)}"]
    lines += [f"  {name}: " + ", ".join(f"{k} {what}" for what, k in said.items()) for name, said in people.items()]
    if "krippendorff" in agreed:
        share = agreed["same"] / agreed["documents"]
        lines.append(f"agreement on {agreed['documents']} pairs of answers: {share:.0%} the same, Krippendorff's alpha "
                     f"{number(agreed['krippendorff'])}, Fleiss' kappa {number(agreed['fleiss'])}")
        lines += [f"  {' and '.join(pair['experts'])}: {pair['documents']} pairs, Cohen's kappa {number(pair['kappa'])}"
                  for pair in agreed["cohen"]]
    elif found["comparisons"]:
        lines.append("agreement: no item has been compared by two annotators yet")
    for key, what in (("shown_first", "the answer shown first"), ("longer", "the longer answer")):
        if found[key].value is not None:
            lines.append(f"{what} was preferred in {number(found[key])} of the decided pairs")
    return "\n".join(lines)


def number(e: agreement.Estimate) -> str:
    return "not defined" if e.value is None else f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]"
