"""What the labels say: agreement, disagreements, each filter's precision and recall, and weights for the sources."""

import collections

from jaxllm.data.review import agreement, estimate
from jaxllm.data.review.config import ReviewVerb
from jaxllm.data.review.estimate import KEPT
from jaxllm.data.review.labels import LABELS, Labels
from jaxllm.data.review.sample import Sample


def verdicts(labels: dict[str, dict[str, str]], adjudicator: str) -> dict[str, bool]:
    """Returns {document: whether it should be dropped}: the adjudicator's word, else the majority's of keep and drop.

    A document without a majority is left out.
    """
    out = {}
    for doc, found in labels.items():
        votes = [found[adjudicator]] if adjudicator in found else list(found.values())
        n_drop, n_keep = votes.count("drop"), votes.count("keep")
        if n_drop != n_keep:
            out[doc] = n_drop > n_keep
    return out


def results(sample: Sample, labels: Labels, cfg: ReviewVerb) -> dict:
    by_document = labels.by_document()
    bad = verdicts(by_document, cfg.adjudicator)
    voices = {doc: {e: label for e, label in found.items() if e != cfg.adjudicator} for doc, found in by_document.items()}
    counts = {e: collections.Counter(found[e] for found in by_document.values() if e in found) for e in labels.experts()}
    return {
        "documents": len(sample.items), "labelled": len(by_document), "decided": len(bad), "confidence": cfg.confidence,
        "experts": {e: {label: n[label] for label in LABELS} for e, n in counts.items()},
        "agreement": agreement.summary(voices, LABELS, cfg.confidence, cfg.seed),
        "disagreements": disagreements(sample, by_document, bad),
        "filters": filters(sample, bad, cfg),
        "sources": estimate.source_weights(sample.strata(bad), sample.kept_bytes, cfg.confidence),
        "reasons": reasons(sample, labels),
    }


def disagreements(sample: Sample, by_document: dict, bad: dict) -> list[dict]:
    """Returns the documents that were labelled in more than one way, those still open first."""
    out = [{"id": item.id, "source": item.source, "decision": item.decision, "labels": by_document[item.id],
            "settled": {True: "drop", False: "keep", None: None}[bad.get(item.id)], "text": item.text[:160]}
           for item in sample.items if len(set(by_document.get(item.id, {}).values())) > 1]
    return sorted(out, key=lambda row: row["settled"] is not None)


def filters(sample: Sample, bad: dict[str, bool], cfg: ReviewVerb) -> list[dict]:
    """Returns a row for all removals, for each rule, and for what was kept.

    Precision is the share of a rule's removals that are rightly dropped. Recall is the share of all documents to be dropped
    that the rule caught; rules that call a document a copy of another say nothing of it alone, and are not part of that.
    """
    strata = sample.strata(bad)
    copies = {item.decision for item in sample.items if item.duplicate_of}
    decisions = sorted({s.decision for s in strata} - {KEPT})
    alone = estimate.amounts([s for s in strata if s.decision not in copies], cfg.seed)

    def row(name, caught, has_recall):
        mine = [s for s in strata if s.decision in caught]
        n_judged, population = sum(s.judged for s in mine), sum(s.population for s in mine)
        found = {"decision": name, "removed": population, "judged": n_judged, "bad": sum(s.bad for s in mine),
                 "strata_unjudged": sum(not s.judged for s in mine), "precision": estimate.share_bad(mine, cfg.confidence)}
        if has_recall:
            found["recall"] = estimate.recall(alone, caught, cfg.confidence)
        return found

    rows = [row(d, {d}, d not in copies) for d in decisions]
    if decisions:
        lost = estimate.recall(alone, set(decisions), cfg.confidence, bad=False)
        rows.insert(0, row("all removals", set(decisions), True) | {"good_lost": lost})
    kept = [s for s in strata if s.decision == KEPT]
    if kept:
        rows.append({"decision": KEPT, "kept": sum(s.population for s in kept), "judged": sum(s.judged for s in kept),
                     "bad": sum(s.bad for s in kept), "strata_unjudged": sum(not s.judged for s in kept),
                     "share_bad": estimate.share_bad(kept, cfg.confidence)})
    return rows


def reasons(sample: Sample, labels: Labels) -> dict[str, dict[str, int]]:
    """Returns how often each reason was ticked for documents that were kept, and that were removed."""
    kept = {item.id for item in sample.items if item.decision == KEPT}
    out: dict[str, collections.Counter] = {"kept": collections.Counter(), "removed": collections.Counter()}
    for (doc, _), label in labels.by.items():
        out["kept" if doc in kept else "removed"].update(label.reasons)
    return {where: dict(count.most_common()) for where, count in out.items()}


# ---------------------------------------------------------------- as text


def told(found: dict) -> str:
    """Returns the results as lines for a terminal."""
    lines = [f"{found['labelled']} of {found['documents']} documents labelled, {found['decided']} decided, by "
             f"{len(found['experts'])} expert{'s' if len(found['experts']) != 1 else ''}"]
    agreed = found["agreement"]
    if "krippendorff" in agreed:
        lines.append(f"agreement on {agreed['documents']} documents: {agreed['same'] / agreed['documents']:.0%} the same, "
                     f"Krippendorff's alpha {number(agreed['krippendorff'])}, Fleiss' kappa {number(agreed['fleiss'])}")
        lines += [f"  {' and '.join(pair['experts'])}: {pair['documents']} documents, Cohen's kappa {number(pair['kappa'])}"
                  for pair in agreed["cohen"]]
    if found["disagreements"]:
        n_open = sum(row["settled"] is None for row in found["disagreements"])
        lines.append(f"{len(found['disagreements'])} disagreements, {n_open} of them open")
    wide = max([30, *(len(row["decision"]) for row in found["filters"])])
    lines += ["", f"{'decision':<{wide}}{'documents':>12}{'judged':>8}  {'precision':<22}recall"]
    for row in found["filters"]:
        share = row.get("precision", row.get("share_bad"))
        n = row.get("removed", row.get("kept"))
        tail = percent(row["recall"]) if "recall" in row else ""
        lines.append(f"{row['decision']:<{wide}}{n:>12,}{row['judged']:>8}  {percent(share):<22}{tail}"
                     + ("  (share that should be dropped)" if "share_bad" in row else ""))
        if "good_lost" in row:
            lines.append(f"{'  good documents lost by them':<{wide}}{'':>20}  {percent(row['good_lost'])}")
    if found["sources"]:
        lines += ["", "weights that the labels propose:", "mix:", "  method: weights", "  weights:"]
        lines += [f"    {row['source']}: {row['weight']:.3f}  # {row['share']:.1%} of the text, {percent(row['good'])} good"
                  + ("" if row["differs"] else "; not told apart from the rest") for row in found["sources"]]
    return "\n".join(lines)


def number(e: agreement.Estimate) -> str:
    return "not defined" if e.value is None else f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]"


def percent(e: agreement.Estimate) -> str:
    return "-" if e.value is None else f"{e.value:.1%} [{e.low:.1%}, {e.high:.1%}]"
