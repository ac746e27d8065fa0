"""The comparisons: lines of the preference file itself, so that what was said and what is learned from are one thing."""

import json
import pathlib
import threading

from jaxllm.align.collect.appended import Appended
from jaxllm.align.collect.items import Item, digest
from jaxllm.data.review.labels import MAX_NOTE, check_name, now
from jaxllm.errors import UserError


class Labels:
    """{(item's id, annotator): the line}, in the order in which they were given; every change is on disk before it counts.

    `of` holds, of each item's id, who compared it.
    """

    def __init__(self, path: pathlib.Path):
        self.lock, self.by, self.of = threading.Lock(), {}, {}
        self.file = Appended(path)
        for where, row in self.file.rows():
            if not all(isinstance(row.get(key), kind) for key, kind in FORM.items()):
                raise UserError(f"{where}: is no line of jaxllm rlhf collect (id, annotator, prompt, answers, rank, shown); "
                                "give another --output")
            self.by[row["id"], row["annotator"]] = row
            self.of.setdefault(row["id"], set()).add(row["annotator"])

    def put(self, row: dict) -> None:
        """Adds a line; one of the same item and annotator is replaced."""
        key = row["id"], row["annotator"]
        with self.lock:
            merged = {k: v for k, v in self.by.items() if k != key} | {key: row}
            if key in self.by:
                self.file.replace(list(map(as_line, merged.values())))
            else:
                self.file.append(as_line(row))
            self.by = merged
            self.of.setdefault(key[0], set()).add(key[1])

    def take_back(self, key: tuple[str, str]) -> None:
        """Removes a line."""
        with self.lock:
            left = {k: v for k, v in self.by.items() if k != key}
            self.file.replace(list(map(as_line, left.values())))
            self.by = left
            self.of[key[0]].discard(key[1])

    def annotators(self) -> list[str]:
        return sorted({annotator for _, annotator in self.by})

    def by_item(self) -> dict[str, dict[str, dict]]:
        """Returns {item's id: {annotator: line}}."""
        out: dict[str, dict[str, dict]] = {}
        for (item, annotator), row in self.by.items():
            out.setdefault(item, {})[annotator] = row
        return out


FORM = {"id": str, "annotator": str, "answers": list, "rank": list, "shown": list}


def as_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False)


def line_of(item: Item, sent: dict, objective: str | None) -> dict:
    """Returns the line of what the page sent: ranks in the order in which the answers were shown, 1 the best.

    Raises UserError for what is no comparison.
    """
    annotator = str(sent.get("annotator", ""))
    check_name(annotator, "label")
    n, shown, rank = len(item.answers), sent.get("shown"), sent.get("rank")
    if not isinstance(shown, list) or any(type(i) is not int for i in shown) or sorted(shown) != list(range(n)):
        raise UserError(f"label: shown={shown!r}: should be the places of the {n} answers, as they were shown")
    ranks = isinstance(rank, list) and len(rank) == n and all(type(r) is int and 1 <= r <= n for r in rank)
    if not ranks or 1 not in rank:
        raise UserError(f"label: rank={rank!r}: should be {n} numbers from 1, the best, to {n}")
    both_bad = sent.get("both_bad") is True
    if both_bad and set(rank) != {1}:
        raise UserError("label: answers that are all bad are tied: rank should be 1 of each")
    by_answer = [rank[shown.index(i)] for i in range(n)]
    row = {"prompt": item.prompt, "answers": list(item.answers), "rank": by_answer, "id": item.id, "annotator": annotator}
    row |= {"both_bad": True} if both_bad else {}
    row |= {"objective": objective} if objective else {}
    note = str(sent.get("note") or "")[:MAX_NOTE].encode("utf-8", "replace").decode()
    return row | ({"note": note} if note else {}) | {"shown": shown, "time": now()}


def shown_to(item: Item, annotator: str, seed: int) -> list[int]:
    """Returns the order in which an annotator sees an item's answers."""
    return sorted(range(len(item.answers)), key=lambda i: digest("answers", seed, annotator, item.id, i))
