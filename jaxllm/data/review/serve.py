"""What the page of the review shows and takes: every label is on disk before it is answered."""

import pathlib

from jaxllm.data.review import labels as labels_file
from jaxllm.data.review.config import ReviewVerb
from jaxllm.data.review.labels import Label, Labels
from jaxllm.data.review.local import read_guidelines
from jaxllm.data.review.results import results
from jaxllm.data.review.sample import Sample
from jaxllm.errors import UserError

GUIDELINES = """Would you want a language model to learn from this text?

Keep: connected, readable text that says something, in whatever field, style or language. Mistakes of spelling, slang and \
opinions are no reason to drop it. Code, tables and dialogues are text too.

Drop: menus, cookie notices and lists of links; text broken by the extraction; keyword spam and advertising; text that a \
template or a machine turned out and that says nothing; hate, threats and sexual content about real people; private details of \
people who are not public.

Part good, part bad: keep it if you would keep it as it stands, with the bad part in it.

Copies: where two texts stand side by side, drop means that nothing is lost without the first one.

Unsure: if you cannot tell after a minute. Say why in the note; it helps to mend these guidelines.

Judge alone: agreement is measured, so please do not talk about single documents before both of you have labelled them."""


class Review:
    """What the page asks for and sends (an App of local.py)."""

    page, takes = pathlib.Path(__file__).with_name("page.html"), ("/api/label",)

    def __init__(self, sample: Sample, labels: Labels, cfg: ReviewVerb):
        self.sample, self.labels, self.cfg = sample, labels, cfg
        self.guidelines = read_guidelines(cfg.guidelines, GUIDELINES)
        self.place = {item.id: n for n, item in enumerate(sample.items)}

    def get(self, path: str, asked: dict[str, str]) -> dict | None:
        if path == "/api/state":
            return self.state(asked.get("expert", ""))
        n = asked.get("n", "")
        if path == "/api/item" and n.isdigit() and int(n) < len(self.sample.items):
            return self.item(int(n), asked.get("expert", ""))
        return self.results() if path == "/api/results" else None

    def post(self, path: str, sent: dict) -> dict:
        return self.put(sent)

    def state(self, expert: str) -> dict:
        mine = {doc: label.label for (doc, who), label in list(self.labels.by.items()) if who == expert}
        return {"title": pathlib.Path(self.cfg.run).resolve().name, "guidelines": self.guidelines,
                "reasons": list(self.cfg.reasons), "experts": self.labels.experts(), "documents": len(self.sample.items),
                "labels": [mine.get(item.id) for item in self.sample.items], "next": self.next_for(expert, -1)}

    def item(self, n: int, expert: str) -> dict:
        item = self.sample.items[n]
        label = self.labels.by.get((item.id, expert), Label(""))
        shown = {"n": n, "id": item.id, "source": item.source, "text": item.text, "copy_of": item.duplicate_of,
                 "other": item.other, "label": label.label, "reasons": label.reasons, "note": label.note}
        if self.cfg.show_decision:
            shown |= {"decision": item.decision, "value": item.value}
        return shown

    def next_for(self, expert: str, after: int) -> int | None:
        """Returns the next document this expert has not labelled and that others have not labelled often enough."""
        by_document = self.labels.by_document()
        n = len(self.sample.items)
        settles = expert == self.cfg.adjudicator
        for i in [*range(after + 1, n), *range(after + 1)]:
            found = by_document.get(self.sample.items[i].id, {})
            others = [label for who, label in found.items() if who != self.cfg.adjudicator]
            wanted = len(set(others)) > 1 if settles else len(others) < self.cfg.labels_each
            if expert not in found and wanted:
                return i
        return None

    def put(self, sent: dict) -> dict:
        """Saves a label; returns where the expert goes on. Raises UserError for what is no label."""
        expert, doc = str(sent.get("expert", "")), sent.get("id")
        if doc not in self.place:
            raise UserError(f"document {doc!r} is not in the sample")
        reasons = [r for r in self.cfg.reasons if r in (sent.get("reasons") or [])]
        row = {"label": str(sent.get("label", "")), "expert": expert, "note": str(sent.get("note") or "")}
        label = labels_file.checked(row, "label")
        self.labels.put({(doc, expert): Label(label.label, tuple(reasons), label.note, labels_file.now())})
        return {"next": self.next_for(expert, self.place[doc]), "saved": label.label}

    def results(self) -> dict:
        found = results(self.sample, self.labels, self.cfg)
        return found | {"disagreements": [row | {"n": self.place[row["id"]]} for row in found["disagreements"]]}
