"""What the page of comparisons shows and takes: every comparison is on disk before it is answered."""

import pathlib

from jaxllm.align.collect.config import CollectVerb
from jaxllm.align.collect.items import Items, digest, fraction
from jaxllm.align.collect.labels import Labels, line_of, shown_to
from jaxllm.align.collect.results import results
from jaxllm.data.preference_rows import as_messages
from jaxllm.data.review.labels import check_name
from jaxllm.data.review.local import read_guidelines
from jaxllm.errors import UserError

GUIDELINES = """Which answer would you rather have been given?

Helpful: it does what was asked, all of it, and nothing else. It is right: check figures and claims that you can check. It is \
clear, and as long as it has to be; longer is not better.

Honest: it does not make things up, and says so where it does not know.

Harmless: it does not help to hurt anybody, does not insult, and gives no private details of people who are not public. Where \
being helpful would do harm, the answer that does no harm is the better one.

Tie: both are equally good. Do not use it for pairs that are only hard to decide: take the one you would keep.

Both bad: neither is of any use, so that it would be wrong to learn from the better one. For the reward model it is a tie.

The order of the answers is drawn by lot, and says nothing. Judge alone: agreement is measured, so please do not talk about \
single items before both of you have compared them."""


class Collect:
    """What the page asks for and sends (an App of data/review/local.py)."""

    page, takes = pathlib.Path(__file__).with_name("page.html"), ("/api/label", "/api/undo")

    def __init__(self, items: Items, labels: Labels, cfg: CollectVerb):
        self.items, self.labels, self.cfg = items, labels, cfg
        self.guidelines = read_guidelines(cfg.guidelines, GUIDELINES)
        self.orders: dict[str, list[int]] = {}
        self.wanted = [cfg.annotators if fraction("overlap", cfg.seed, key) < cfg.overlap else 1 for key in items.keys]

    def get(self, path: str, asked: dict[str, str]) -> dict | None:
        annotator, n = asked.get("annotator", ""), asked.get("n", "")
        if path == "/api/state":
            return self.state(annotator)
        if path == "/api/item" and n.isdigit() and int(n) < len(self.items.keys):
            return self.item(int(n), annotator)
        return self.results() if path == "/api/results" else None

    def post(self, path: str, sent: dict) -> dict:
        return self.undo(str(sent.get("annotator", ""))) if path == "/api/undo" else self.put(sent)

    def order(self, annotator: str) -> list[int]:
        """Returns the items in the order in which an annotator sees them."""
        if annotator not in self.orders:
            keys = self.items.keys
            self.orders[annotator] = sorted(range(len(keys)), key=lambda i: digest("items", self.cfg.seed, annotator, keys[i]))
        return self.orders[annotator]

    def state(self, annotator: str) -> dict:
        known = {"title": pathlib.Path(self.cfg.output).name, "guidelines": self.guidelines, "ranking": self.cfg.ranking,
                 "objective": self.cfg.objective, "annotators": self.labels.annotators(), "items": len(self.items.keys)}
        if not annotator:
            return known
        check_name(annotator, "annotator")
        done = [(found := self.items.known(i)) is not None and (found.id, annotator) in self.labels.by
                for i in self.order(annotator)]
        return known | {"done": done, "next": self.next_for(annotator, -1)}

    def item(self, n: int, annotator: str) -> dict:
        """Returns what an annotator sees at place n of his order."""
        check_name(annotator, "annotator")
        item = self.items.item(self.order(annotator)[n])
        if item is None:
            return {"n": n, "left_out": True}
        row = self.labels.by.get((item.id, annotator), {})
        shown = row.get("shown") or shown_to(item, annotator, self.cfg.seed)
        return {"n": n, "id": item.id, "prompt": as_messages(item.prompt), "answers": [item.answers[i] for i in shown],
                "shown": shown, "rank": [row["rank"][i] for i in shown] if row else None,
                "both_bad": bool(row.get("both_bad")), "note": row.get("note", "")}

    def next_for(self, annotator: str, after: int) -> int | None:
        """Returns the next place at which this annotator, and not enough others, have not compared; samples it if need be."""
        order = self.order(annotator)
        for n in [*range(after + 1, len(order)), *range(after + 1)]:
            known = self.items.known(order[n])
            found = self.labels.of.get(known.id, ()) if known else ()
            if annotator not in found and len(found) < self.wanted[order[n]] and (known or self.items.item(order[n])):
                return n
        return None

    def put(self, sent: dict) -> dict:
        """Saves a comparison; returns where the annotator goes on. Raises UserError for what is none."""
        n, annotator = sent.get("n"), str(sent.get("annotator", ""))
        check_name(annotator, "label")
        item = self.items.known(self.order(annotator)[n]) if type(n) is int and 0 <= n < len(self.items.keys) else None
        if item is None or item.id != sent.get("id"):
            raise UserError(f"item {sent.get('id')!r} is not at place {n!r} any more; load the page again")
        self.labels.put(line_of(item, sent, self.cfg.objective))
        return {"next": self.next_for(annotator, n)}

    def undo(self, annotator: str) -> dict:
        """Takes back the annotator's last comparison; returns where it is."""
        check_name(annotator, "annotator")
        place = {found.id: n for n, i in enumerate(self.order(annotator)) if (found := self.items.known(i))}
        mine = [key for key in self.labels.by if key[1] == annotator and key[0] in place]
        if not mine:
            raise UserError("there is nothing of yours to take back")
        self.labels.take_back(mine[-1])
        return {"n": place[mine[-1][0]]}

    def results(self) -> dict:
        return results(self.items, self.labels, self.cfg.confidence, self.cfg.seed)
