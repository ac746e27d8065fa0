"""The sample that experts label: of every source and decision, near its threshold and away from it.

Documents are drawn by a hash of their ids: the same folder and settings give the same sample, and the order of the files does
not matter. It is drawn once, and kept: labels belong to it.
"""

import collections
import dataclasses
import hashlib
import heapq
import json
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from jaxllm.data.review.config import ReviewVerb
from jaxllm.data.review.estimate import KEPT, Stratum
from jaxllm.data.streams import Stream
from jaxllm.errors import UserError, nearest, writing

# what the sample depends on
SETTINGS = ("per_rule", "per_kept", "documents", "near", "thresholds", "score", "only", "skip", "max_chars", "seed")


@dataclasses.dataclass
class Item:
    """One document to be labelled."""

    id: str
    source: str
    decision: str  # "kept", or the stage and rule that removed it
    near: bool  # its value is close to where the decision turns
    value: float | int | str | None = None
    text: str = ""
    duplicate_of: str | None = None
    other: str | None = None  # the text of the document that it is said to be a copy of

    @property
    def stratum(self) -> str:
        return f"{self.source} | {self.decision}" + (" | near" if self.near else "")


@dataclasses.dataclass
class Sample:
    items: list[Item]  # in the order in which they are shown
    population: dict[str, int]  # documents of each stratum
    kept_bytes: dict[str, int]  # of each source

    def strata(self, bad: dict[str, bool]) -> list[Stratum]:
        """Returns what {document: whether it is bad} says of every stratum."""
        found = collections.defaultdict(list)
        for item in self.items:
            found[item.stratum].append(item)
        out = []
        for name, population in self.population.items():
            judged = [bad[item.id] for item in found[name] if item.id in bad]
            source, decision = name.split(" | ")[:2]
            out.append(Stratum(source, decision, population, len(judged), sum(judged)))
        return out


def open_sample(folder: pathlib.Path, output: pathlib.Path, cfg: ReviewVerb) -> Sample:
    """Returns the sample in `output`, or draws and writes it; raises UserError where it is another folder's or draw's."""
    made_of = {"manifest": hashlib.sha256(manifest_bytes(folder)).hexdigest(),
               **{name: getattr(cfg, name) for name in SETTINGS}}
    made_of = json.loads(json.dumps(made_of))
    head = output / "sample.json"
    if not head.exists():
        sample = draw(folder, cfg)
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
            write_whole(output / "sample.jsonl", "".join(json.dumps(dataclasses.asdict(item)) + "\n" for item in sample.items))
            write_whole(head, json.dumps({"made_of": made_of, "population": sample.population, "kept_bytes": sample.kept_bytes},
                                         indent=1))
        return sample
    try:
        told = json.loads(head.read_text(encoding="utf-8"))
        items = [Item(**json.loads(line)) for line in (output / "sample.jsonl").read_text(encoding="utf-8").splitlines()]
        if differ := [name for name in made_of if told["made_of"].get(name) != made_of[name]]:
            what = "the data was made anew since" if differ[0] == "manifest" else \
                f"{differ[0]} was {told['made_of'].get(differ[0])}, is {made_of[differ[0]]}"
            raise UserError(f"{output}: its sample was drawn otherwise: {what}; --output=FOLDER draws another beside it")
        return Sample(items, told["population"], told["kept_bytes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{output}: the sample there cannot be read ({e}); remove sample.json to draw it again") from None


def manifest_bytes(folder: pathlib.Path) -> bytes:
    try:
        return (folder / "manifest.json").read_bytes()
    except OSError:
        raise UserError(f"{folder}: no manifest.json there; should be the output folder of `jaxllm data`") from None


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file under another name and renames it, so that it is never there in part."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(text.encode("utf-8", "surrogatepass"))
    part.replace(path)


# ---------------------------------------------------------------- drawing


def draw(folder: pathlib.Path, cfg: ReviewVerb) -> Sample:
    items, population = removed_items(folder, cfg)
    wanted = {item.duplicate_of for item in items if item.duplicate_of}
    kept, kept_population, others, kept_bytes = kept_items(folder, cfg, wanted)
    for item in items:
        item.other = others.get(item.duplicate_of)
    items = sorted(thinned(items + kept, cfg), key=lambda item: chance(item.id, cfg.seed + 1))
    if not items:
        raise UserError(f"{folder}: no document to review: removed-text/ and documents/ are empty")
    return Sample(items, {**population, **kept_population}, kept_bytes)


def thinned(items: list[Item], cfg: ReviewVerb) -> list[Item]:
    """Returns the first ones of each stratum, as many as cfg.documents allows in proportion, and one at least."""
    by_stratum = collections.defaultdict(list)
    for item in items:
        by_stratum[item.stratum].append(item)
    part = 1.0
    while True:
        most = {KEPT: max(1, int(part * cfg.per_kept))}
        chosen = [found[:most.get(found[0].decision, max(1, int(part * cfg.per_rule)))] for found in by_stratum.values()]
        n = sum(map(len, chosen))
        if n <= cfg.documents or n == len(chosen):
            return [item for found in chosen for item in found]
        part *= 0.95


def removed_items(folder: pathlib.Path, cfg: ReviewVerb) -> tuple[list[Item], dict[str, int]]:
    """Returns documents drawn of each source and rule, and how many there are of each stratum.

    The texts are the samples of removed text that the data run kept, of each rule those whose ids hash lowest. A rule without
    any, or whose documents were empty, cannot be reviewed, and is left out.
    """
    text = {line["id"]: cut(line["text"], cfg.max_chars) for line in rows(folder / "removed-text") if line["text"].strip()}
    values, candidates = collections.defaultdict(list), collections.defaultdict(list)
    seen: dict[str, str] = {}
    for line in lines(folder / "removed.jsonl"):
        decision = f"{line['stage']}/{line['rule']}"
        seen[decision] = line["stage"]
        if line["stage"] in cfg.skip or (cfg.only and not {line["stage"], decision} & set(cfg.only)):
            continue
        value, key = line.get("value"), (line["source"], decision)
        values[key].append(float(value) if isinstance(value, (int, float)) else np.nan)
        if line["id"] in text:
            candidates[key].append((chance(line["id"], cfg.seed), line["id"], value, line.get("duplicate_of")))
    check_names("only", cfg.only, {*seen, *seen.values()})
    check_names("thresholds", cfg.thresholds, {last_part(decision) for decision in seen})
    items, population = [], {}
    for (source, decision), value_N in values.items():
        if not candidates[source, decision]:
            continue
        rule = last_part(decision)
        is_near = nearness(np.array(value_N), cfg.near, cfg.thresholds.get(rule, limit(rule, value_N)))
        if len({is_near(value) for _, _, value, _ in candidates[source, decision]}) == 1:  # there is text of one side only:
            is_near = nearness(np.array(value_N), 0, None)  # not split, as the other side would stand for nothing
        drawn = collections.Counter()
        for _, doc, value, duplicate_of in sorted(candidates[source, decision], key=lambda c: c[:2]):
            near = is_near(value)
            if drawn[near] < cfg.per_rule:
                drawn[near] += 1
                items.append(Item(doc, source, decision, near, value, text[doc], duplicate_of))
        n_near = sum(map(is_near, value_N))
        for near, n in ((True, n_near), (False, len(value_N) - n_near)):
            if n:
                population[Item("", source, decision, near).stratum] = n
    return items, population


def last_part(decision: str) -> str:
    return re.split(r"[./]", decision)[-1]


def check_names(key: str, named, known: set[str]) -> None:
    for name in named:
        if name not in known:
            raise UserError(f"{key}={name}: nothing was removed by it; {nearest(name, known)}")


def limit(rule: str, value_N: list[float]) -> float | None:
    """Returns where a rule's limit lies by its name: at the largest of the values that were too small, or the reverse.

    Of near copies it is at the least similar ones.
    """
    known = [v for v in value_N if not np.isnan(v)]
    end = {"min_": max, "max_": min, "near": min}.get(rule[:4])
    return end(known) if end and known else None


def nearness(value_N: np.ndarray, part: float, threshold: float | None):
    """Returns a function that tells whether a value is among the `part` nearest to the threshold.

    Without a threshold it is taken to be the end of the values at which they crowd, as a rule's limit cuts off a tail.
    Values that are no numbers, or mostly the same, have no near ones.
    """
    known = value_N[~np.isnan(value_N)]
    if not part or len(known) < 5 or known.min() == known.max():
        return lambda value: False
    if threshold is None:
        low, middle, high = known.min(), np.median(known), known.max()
        threshold = low if middle - low <= high - middle else high
    reach = np.quantile(abs(known - threshold), part)
    if (abs(known - threshold) <= reach).mean() > 0.5:
        return lambda value: False
    return lambda value: isinstance(value, (int, float)) and bool(abs(value - threshold) <= reach)


def kept_items(folder: pathlib.Path, cfg: ReviewVerb, wanted: set[str]):
    """Returns documents drawn of each source, the strata's sizes, the texts of the wanted ids, and each source's bytes.

    One pass: of each source so many are held that the lowest scores among them are enough. Further copies of a document
    and versions made of it count for the bytes alone.
    """
    hold = int(cfg.per_kept * max(2, 1.5 / cfg.near if cfg.near else 0)) + 1
    held, scores, others, n_bytes = collections.defaultdict(list), collections.defaultdict(list), {}, collections.Counter()
    for line in rows(folder / "documents"):
        source, text = line["source"], line["text"]
        n_bytes[source] += len(text.encode("utf-8", "surrogatepass"))
        if re.search(r"#(?:copy|augmented)\d+$", line["id"]):
            continue
        score = (line.get("meta") or {}).get(cfg.score)
        score = float(score) if isinstance(score, (int, float)) else np.nan
        scores[source].append(score)
        if line["id"] in wanted:
            others[line["id"]] = cut(text, cfg.max_chars)
        entry = (-chance(line["id"], cfg.seed), line["id"], score, cut(text, cfg.max_chars))
        if len(held[source]) < hold:
            heapq.heappush(held[source], entry)
        elif entry > held[source][0]:
            heapq.heapreplace(held[source], entry)
    items, population = [], {}
    for source, entries in held.items():
        value_N = np.array(scores[source])
        is_near = nearness(value_N, cfg.near, np.nanmin(value_N) if not np.isnan(value_N).all() else None)
        drawn = collections.Counter()
        for _, doc, score, text in sorted(entries, reverse=True):
            near = is_near(score)
            if drawn[near] < cfg.per_kept:
                drawn[near] += 1
                items.append(Item(doc, source, KEPT, near, None if np.isnan(score) else score, text))
        n_near = sum(map(is_near, value_N.tolist()))
        for near, n in ((True, n_near), (False, len(value_N) - n_near)):
            if n:
                population[Item("", source, KEPT, near).stratum] = n
    return items, population, others, dict(n_bytes)


def chance(doc: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}\n{doc}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def cut(text: str, most: int) -> str:
    return text if len(text) < most else f"{text[:most]}\n[…]"


def rows(folder: pathlib.Path) -> Iterator[dict]:
    """Yields the documents of a folder of .jsonl.zst or .parquet files; none where there is no such folder."""
    for file in sorted(p for p in folder.glob("*") if p.name.endswith((".jsonl", ".jsonl.zst", ".parquet"))):
        yield from (_parquet(file) if file.suffix == ".parquet" else lines(file))


def _parquet(file: pathlib.Path) -> Iterator[dict]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise UserError(f"{file}: reading Parquet needs pyarrow: pip install 'jaxllm[parquet]'") from None
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield row | {"meta": json.loads(row["meta"]) if row.get("meta") else {}}
    except (ArrowException, OSError, ValueError) as e:
        raise UserError(f"{file}: cannot be read as Parquet: {str(e).splitlines()[0]}") from None


def lines(file: pathlib.Path) -> Iterator[dict]:
    """Yields the objects of a .jsonl or .jsonl.zst file; none where there is no such file."""
    if not file.exists():
        return
    with Stream(file) as stream:
        held, number = [], 0
        while chunk := stream.read(1 << 20):
            first, *whole = chunk.split(b"\n")
            held.append(first)
            for line in whole:  # a long line is put together once, when it ends
                number += 1
                yield _object(b"".join(held), f"{file}:{number}")
                held = [line]
        if any(held):
            yield _object(b"".join(held), f"{file}:{number + 1}")


def _object(line: bytes, where: str) -> dict:
    try:
        found = json.loads(line)
        found["id"]
        return found
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where}: should be a JSON object with an `id`, as `jaxllm data` writes it") from None
