"""What a worker does with a unit: each document through the stages that look at one at a time, and the result on disk.

    units/00012/kept.jsonl.zst      the documents that are left
    units/00012/removed.jsonl.zst   the others: why, and the text of some of them
    units/00012/documents.json      ids, sizes, qualities of those that are left: what is needed to decide over all
    units/00012/shown.json          beginnings of some removed documents, and of some before and after
    units/00012/index.json          counts
    units/00012/signatures.npy      for deduplication

A unit's folder appears whole or not at all, and depends on nothing but the unit and the settings.
"""

import bisect
import collections
import functools
import hashlib
import html
import json
import math
import pathlib
import re
import shutil
import time

import numpy as np

from jaxllm.data.charset import page_text
from jaxllm.data.document import Document, Removal
from jaxllm.data.minhash import signatures
from jaxllm.data.privacy import Privacy
from jaxllm.data.raw import Item, Unit
from jaxllm.data.unit_files import unit_folder, write_lines
from jaxllm.errors import UserError, writing

EXCERPT = 4000  # characters of a sample
AHEAD = 500  # characters more are read, so that an address at an excerpt's end is seen whole
# in a page's source: + - . letters and @
REFERENCES = re.compile(r"&#0*(?:4[3-9]|[5-9]\d|1[01]\d|12[0-2]|[xX](?:2[bBdDeE]|[34567][\da-fA-F]));|&(?:commat|period);")
PAIRS = 3  # before and after, of a unit: those whose ids hash lowest, as all samples, so that order does not matter
LENGTH_BINS = [0, *(int(10 ** (i / 4)) for i in range(4, 33))]  # characters, four bins a decade


class Worker:
    """Works on units, one after the other, in a process of its own: stages are built when the first one comes."""

    def __init__(self, cfg, folder: str):
        self.cfg, self.folder = cfg, folder

    @functools.cached_property
    def stages(self):
        from jaxllm.data.stages import per_document

        return per_document(self.cfg, self.folder)

    def __call__(self, unit: Unit) -> tuple[int, int]:
        """Does a unit, unless it is done; returns its number and how many documents it holds."""
        done = unit_folder(self.folder, unit.number)
        if not (done / "index.json").is_file():
            part = done.with_suffix(".part")
            with writing(part):
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            work = _Work(unit, part, self.cfg)
            work.documents(self.stages)
            work.finish()
            with writing(done):
                part.rename(done)
        return unit.number, len(unit.items)


class _Work:
    def __init__(self, unit: Unit, part: pathlib.Path, cfg):
        self.unit, self.part, self.cfg = unit, part, cfg
        self.sha = hashlib.sha256()
        self.counts: collections.Counter = collections.Counter()
        self.seconds: collections.Counter = collections.Counter()  # of processor time by stage
        self.funnel: dict[str, list] = {}  # stage -> [documents, bytes] that came out of it
        self.removed: list[dict] = []
        self.rules: collections.Counter = collections.Counter()
        self.kept: list[tuple[Document, int]] = []  # and bytes of its text
        self.pairs: list = []  # before and after
        self.samples: dict[str, list] = {}
        self.lengths = {"in": [0] * len(LENGTH_BINS), "out": [0] * len(LENGTH_BINS)}
        self.languages: collections.Counter = collections.Counter()

    def documents(self, chain) -> None:
        for item in self.unit.items:
            doc = self.read(item)
            if doc is None:
                continue
            before = doc.text
            self.lengths["in"][_bin(before)] += 1
            why = self.through(chain, doc)
            self.counts.update(doc.counts)
            if why is None:
                self.keep(doc, before)

    def read(self, item: Item) -> Document | None:
        """Returns the document of an item; None where it cannot be read, which is noted."""
        data, problem = item.data, item.problem
        if data is None and not problem:
            try:
                data = (pathlib.Path(self.unit.root) / item.path).read_bytes()
            except OSError as e:
                problem = f"cannot be read: {e.strerror}"
        place = f"{self.unit.source}/{item.path}" + (f"#{item.number}" if item.number else "")
        ident = (item.id or place).encode("utf-8", "replace").decode()
        self.sha.update(f"{place}\0{item.id}\0".encode("utf-8", "surrogatepass"))
        self.sha.update(data if data is not None else problem.encode())
        meta = {"path": item.path} | item.meta | {"format": item.kind}
        if data is not None and b"\0" in data[:1024] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
            problem = "binary"
        text, invalid = ("", False) if problem else decode(data, meta)
        self.count("read", len(text.encode("utf-8", "surrogatepass")) if not problem else 0)
        doc = Document(ident, self.unit.source, text, meta)
        if invalid:
            self.counts["read.invalid_utf8"] += 1
        if problem:
            self.remove(doc, "read", Removal(problem.split(":")[0].split("=")[0], problem), place)
            return None
        if not text.strip():
            self.remove(doc, "read", Removal("empty"), place)
            return None
        return doc

    def through(self, chain, doc: Document) -> Removal | None:
        for stage in chain:
            began = time.thread_time()
            try:
                why = stage(doc)
            except (MemoryError, UserError):
                raise
            except Exception as e:  # a page that a library stumbles over must not cost the others
                why = Removal("error", f"{type(e).__name__}: {e}"[:200])
            self.seconds[stage.name] += time.thread_time() - began
            if why is None and not doc.text.strip():
                why = Removal("nothing_left")
            if why is not None:
                self.remove(doc, stage.name, why)
                return why
            self.count(stage.name, len(doc.text.encode("utf-8", "replace")))
        return None

    def count(self, stage: str, size: int) -> None:
        row = self.funnel.setdefault(stage, [0, 0])
        row[0] += 1
        row[1] += size

    def remove(self, doc: Document, stage: str, why: Removal, place: str = "") -> None:
        rule, value = why.rule.removeprefix(f"{stage}."), why.value
        value = value.item() if isinstance(value, np.generic) else value
        line = {"id": doc.id, "source": doc.source, "stage": stage, "rule": rule, "value": value}
        if stage == "read":
            line["path"] = place
        self.removed.append(line)
        self.rules[f"{stage}\t{rule}"] += 1
        _keep_lowest(self.samples.setdefault(f"{stage}\t{rule}", []), doc.id,
                     {**line, "text": doc.text[:EXCERPT + AHEAD]}, self.cfg.output.samples)

    def keep(self, doc: Document, before: str) -> None:
        text = doc.text.encode("utf-8", "replace")
        doc.text = text.decode()
        self.lengths["out"][_bin(doc.text)] += 1
        self.languages[str(doc.meta.get("language", "unknown"))] += 1
        doc.meta.pop("format", None)
        self.kept.append((doc, len(text)))
        pair = {"id": doc.id, "source": doc.source, "before": before[:EXCERPT + AHEAD], "after": doc.text[:EXCERPT]}
        _keep_lowest(self.pairs, doc.id, pair, PAIRS)

    def finish(self) -> None:
        docs = [doc for doc, _ in self.kept]
        privacy = Privacy(self.cfg.privacy)  # what is shown of a document has not always been through this stage
        for key, rows in [("before", self.pairs), *(("text", found) for found in self.samples.values())]:
            for _, row in rows:
                row[key] = excerpt(row[key], privacy)
        domain = self.cfg.sources[self.unit.source].domain or self.unit.source
        frames = write_lines(self.part / "kept.jsonl.zst",
                             ({"id": d.id, "source": d.source, "text": d.text, "meta": d.meta} for d in docs))
        write_lines(self.part / "removed.jsonl.zst", self.removed)
        tables = {
            "documents": {
                "source": self.unit.source, "ids": [d.id for d in docs], "bytes": [n for _, n in self.kept], "frames": frames,
                "quality": [number(d.meta.get("quality_score")) for d in docs],
                "domain": [str(d.meta.get("domain") or domain) for d in docs]},
            "shown": {
                "pairs": [one for _, one in self.pairs],
                "samples": {rule: [one for _, one in found] for rule, found in self.samples.items()}},
            "index": {
                "source": self.unit.source, "sha256": self.sha.hexdigest(), "inputs": len(self.unit.items),
                "left": len(docs), "funnel": self.funnel, "rules": self.rules, "counts": self.counts,
                "lengths": self.lengths, "languages": self.languages, "seconds": self.seconds},
        }
        with writing(self.part):
            if self.cfg.dedup.use:
                np.save(self.part / "signatures.npy", signatures([doc.text for doc in docs], self.cfg.dedup))
            for name, table in tables.items():
                (self.part / f"{name}.json").write_text(json.dumps(table, ensure_ascii=False, default=str), encoding="utf-8",
                                                        errors="replace")


def excerpt(text: str, privacy: Privacy) -> str:
    """Returns the beginning of a text or a page's source, masked, also where references of characters spell it."""
    masked, _ = privacy.masked(REFERENCES.sub(lambda found: html.unescape(found[0]), text))
    return masked[:EXCERPT] if len(text) < EXCERPT + AHEAD else masked[:min(EXCERPT, len(masked) - AHEAD)]


def decode(data: bytes | str, meta: dict) -> tuple[str, bool]:
    """Returns (text, whether bytes were replaced): of a page as its transport, its head or its bytes say, else UTF-8."""
    if isinstance(data, str):
        return data, False
    if meta["format"] == "html":
        text, _ = page_text(data, meta.get("charset"))
        return text, "\ufffd" in text and b"\xef\xbf\xbd" not in data
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace"), False
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode(), False
    except UnicodeDecodeError:
        return data.decode(errors="replace"), True


def number(value, otherwise: float = math.nan) -> float:
    """Returns what an input's metadata has for a number, where it is one."""
    return float(value) if isinstance(value, (int, float)) else otherwise


def _bin(text: str) -> int:
    return bisect.bisect_right(LENGTH_BINS, len(text)) - 1


def _keep_lowest(found: list, ident: str, row: dict, most: int) -> None:
    found.append((hashlib.blake2b(ident.encode(), digest_size=8).digest(), row))
    found.sort(key=lambda pair: pair[0])
    del found[most:]
