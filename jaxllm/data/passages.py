"""Passages that occur in many documents, or occurred before, are cut out of those that deduplication left.

    units/00012/repeats.jsonl.zst       {row, text} of each document whose text changed: lines that repeat (repeats.py)
    units/00012/substrings.jsonl.zst    the same, for long passages (substrings.py)
    units/00012/repeats.json, …         which documents are removed, new sizes, counts; written last
"""

import collections
import json
import pathlib

import numpy as np

from jaxllm.data.document import Document
from jaxllm.data.processes import in_order
from jaxllm.data.repeats import LineCounts, Repeats, RepeatsConfig, line_hashes
from jaxllm.data.substrings import SubstringsConfig, repeated, without
from jaxllm.data.unit_files import read_lines, unit_folder, write_lines, write_whole
from jaxllm.errors import writing

STAGES = ("repeats", "substrings")
Change = tuple[dict[int, str], dict[int, tuple], dict]  # texts by row, (rule, value) of removed rows, counts


def cut_passages(cfg, fates, n_workers: int, say) -> None:
    """Runs both stages where they are on; enters what they do into `fates`."""
    for name, group, run in (("repeats", cfg.repeats, cut_repeats), ("substrings", cfg.substrings, cut_substrings)):
        if not group.use:
            continue
        n_units, before = len(fates.found.first) - 1, int(fates.found.bytes[fates.alive].sum())
        run(group, fates, n_workers)
        for unit in range(n_units):
            enter(fates, unit, name)
        fates.done(name)
        say(f"{name}: {(before - int(fates.found.bytes[fates.alive].sum())) / 1e6:,.1f} MB of text cut out")


def enter(fates, unit: int, stage: str) -> None:
    told = json.loads((unit_folder(fates.found.folder, unit) / f"{stage}.json").read_text(encoding="utf-8"))
    first = int(fates.found.first[unit])
    for row, size in told["bytes"]:
        fates.found.bytes[first + row] = size
    for row, rule, value in told["removed"]:
        fates.remove(first + row, stage, rule, value)
    fates.counts.update(told["counts"])


def write_change(folder: str, unit: int, stage: str, change: Change) -> None:
    texts, removed, counts = change
    place = unit_folder(folder, unit)
    write_lines(place / f"{stage}.jsonl.zst", ({"row": row, "text": text} for row, text in texts.items()))
    told = {"removed": [[row, *why] for row, why in removed.items()], "counts": counts,
            "bytes": [[row, len(text.encode())] for row, text in texts.items()]}
    write_whole(place / f"{stage}.json", json.dumps(told))


def is_done(folder: str, unit: int, stage: str) -> bool:
    return (unit_folder(folder, unit) / f"{stage}.json").is_file()


def revised_texts(folder: str | pathlib.Path, unit: int, stages: tuple[str, ...] = STAGES) -> dict[int, str]:
    """Returns the texts of a unit that were changed, by row."""
    out: dict[int, str] = {}
    for stage in stages:
        if is_done(str(folder), unit, stage):
            out |= {one["row"]: one["text"] for one in read_lines(unit_folder(folder, unit) / f"{stage}.jsonl.zst")}
    return out


def alive_rows(fates):
    """Yields (unit, the rows of it that are left)."""
    first = fates.found.first
    for unit in range(len(first) - 1):
        yield unit, np.flatnonzero(fates.alive[first[unit] : first[unit + 1]]).tolist()


# ---------------------------------------------------------------- lines


class LinesOf:
    """Returns the hashes of a unit's lines, of each document the different ones."""

    def __init__(self, folder: str, cfg: RepeatsConfig):
        self.folder, self.cfg = folder, cfg

    def __call__(self, task: tuple[int, list[int]]) -> np.ndarray:
        unit, rows = task
        left = set(rows)
        found = [line_hashes(row["text"], self.cfg)
                 for i, row in enumerate(read_lines(unit_folder(self.folder, unit) / "kept.jsonl.zst")) if i in left]
        return np.concatenate([np.zeros(0, np.uint64), *found])


class CutLines:
    """Takes repeated lines out of a unit's documents, by the counts of all documents."""

    def __init__(self, folder: str, cfg: RepeatsConfig, table: pathlib.Path | None):
        self.folder, self.cfg, self.table = folder, cfg, table

    def __call__(self, task: tuple[int, list[int]]) -> None:
        unit, rows = task
        if is_done(self.folder, unit, "repeats"):
            return
        counts = LineCounts(self.cfg, np.load(self.table, mmap_mode="r")) if self.table else None
        stage, left = Repeats(self.cfg, counts), set(rows)
        texts, removed, total = {}, {}, collections.Counter()
        for i, row in enumerate(read_lines(unit_folder(self.folder, unit) / "kept.jsonl.zst")):
            if i not in left:
                continue
            doc = Document(row["id"], row["source"], row["text"])
            why = stage(doc)
            total.update(doc.counts)
            if why is not None:
                removed[i] = (why.rule.removeprefix("repeats."), why.value)
            elif doc.text != row["text"]:
                texts[i] = doc.text
        write_change(self.folder, unit, "repeats", (texts, removed, total))


def cut_repeats(cfg: RepeatsConfig, fates, n_workers: int) -> None:
    folder, table = fates.found.folder, None
    if cfg.max_documents is not None:
        table = pathlib.Path(folder) / "lines.npy"
        if not table.is_file():
            counts = LineCounts(cfg)
            for hash_L in in_order(LinesOf(folder, cfg), alive_rows(fates), n_workers, "workers"):
                counts.add(hash_L)
            with writing(table):
                part = pathlib.Path(folder) / "lines.part.npy"
                np.save(part, counts.table_2C)
                part.replace(table)
    for _ in in_order(CutLines(folder, cfg, table), alive_rows(fates), n_workers, "workers"):
        pass


# ---------------------------------------------------------------- long passages


def cut_substrings(cfg: SubstringsConfig, fates, n_workers: int) -> None:
    """Cuts passages that occurred before out of shards of neighbouring units, one shard at a time, in this process."""
    folder, shard, size = fates.found.folder, [], 0
    first = fates.found.first
    for unit, rows in alive_rows(fates):
        own = int(fates.found.bytes[first[unit] : first[unit + 1]][rows].sum())
        if shard and size + own > cfg.max_shard_mb * 1_000_000:
            _cut_shard(cfg, folder, shard)
            shard, size = [], 0
        shard.append((unit, rows))
        size += own
    if shard:
        _cut_shard(cfg, folder, shard)


def _cut_shard(cfg: SubstringsConfig, folder: str, shard: list[tuple[int, list[int]]]) -> None:
    if all(is_done(folder, unit, "substrings") for unit, _ in shard):
        return
    texts, places = [], []
    for unit, rows in shard:
        left, changed = set(rows), revised_texts(folder, unit, ("repeats",))
        for i, row in enumerate(read_lines(unit_folder(folder, unit) / "kept.jsonl.zst")):
            if i in left:
                texts.append(changed.get(i, row["text"]))
                places.append((unit, i))
    changes: dict[int, Change] = {unit: ({}, {}, collections.Counter()) for unit, _ in shard}
    for (unit, i), text, found in zip(places, texts, repeated(texts, cfg), strict=True):
        if not found:
            continue
        rest = without(text, found)
        changes[unit][2].update({"substrings.passages": len(found), "substrings.characters": len(text) - len(rest)})
        if rest.strip():
            changes[unit][0][i] = rest
        else:
            changes[unit][1][i] = ("nothing_left", len(text))
    for unit, change in changes.items():
        write_change(folder, unit, "substrings", change)
