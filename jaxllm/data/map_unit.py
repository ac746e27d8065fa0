"""What a worker does with a unit: each document through the stages that look at one at a time, and the result on disk.

    units/00012/kept.jsonl.zst      the documents that are left
    units/00012/removed.jsonl.zst   the others: why, and the text of some of them
    units/00012/index.json          ids, sizes, counts: what the parent needs to decide over all documents
    units/00012/signatures.npy      for deduplication

A unit's folder appears whole or not at all, and depends on nothing but the unit and the settings.
"""

import bisect
import collections
import functools
import hashlib
import json
import pathlib
import shutil
import time

import numpy as np
import zstandard

from jaxllm.data.document import Document, Removal
from jaxllm.data.minhash import signatures
from jaxllm.data.raw import Item, Unit
from jaxllm.errors import writing

EXCERPT = 4000  # characters of a sample
PAIRS = 3  # before and after, of a unit: those whose ids hash lowest, as all samples, so that order does not matter
LENGTH_BINS = [0, *(int(10 ** (i / 4)) for i in range(4, 33))]  # characters, four bins a decade


class Worker:
    """Works on units, one after the other, in a process of its own: stages are built when the first one comes."""

    def __init__(self, cfg, folder: str):
        self.cfg, self.folder = cfg, folder

    @functools.cached_property
    def stages(self):
        from jaxllm.data.stages import per_document

        return per_document(self.cfg)

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


def unit_folder(folder: str | pathlib.Path, number: int) -> pathlib.Path:
    return pathlib.Path(folder) / "units" / f"{number:06}"


def read_index(folder: str | pathlib.Path, number: int) -> dict:
    return json.loads((unit_folder(folder, number) / "index.json").read_text(encoding="utf-8"))


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
        ident = item.id or place
        self.sha.update(f"{place}\0{item.id}\0".encode("utf-8", "surrogateescape"))
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
            self.remove(doc, "read", Removal(problem.split(":")[0].split("=")[0], problem))
            return None
        if not text.strip():
            self.remove(doc, "read", Removal("empty"))
            return None
        return doc

    def through(self, chain, doc: Document) -> Removal | None:
        for stage in chain:
            began = time.thread_time()
            try:
                why = stage(doc)
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

    def remove(self, doc: Document, stage: str, why: Removal) -> None:
        line = {"id": doc.id, "source": doc.source, "stage": stage, "rule": why.rule, "value": why.value}
        if why.duplicate_of is not None:
            line["duplicate_of"] = why.duplicate_of
        self.removed.append(line)
        self.rules[f"{stage}\t{why.rule}"] += 1
        _keep_lowest(self.samples.setdefault(f"{stage}\t{why.rule}", []), doc.id,
                     {**line, "text": doc.text[:EXCERPT]}, self.cfg.output.samples)

    def keep(self, doc: Document, before: str) -> None:
        text = doc.text.encode("utf-8", "replace")
        doc.text = text.decode()
        self.lengths["out"][_bin(doc.text)] += 1
        self.languages[str(doc.meta.get("language", "unknown"))] += 1
        doc.meta.pop("format", None)
        self.kept.append((doc, len(text)))
        pair = {"id": doc.id, "source": doc.source, "before": before[:EXCERPT], "after": doc.text[:EXCERPT]}
        _keep_lowest(self.pairs, doc.id, pair, PAIRS)

    def finish(self) -> None:
        docs = [doc for doc, _ in self.kept]
        write_lines(self.part / "kept.jsonl.zst",
                    ({"id": d.id, "source": d.source, "text": d.text, "meta": d.meta} for d in docs))
        write_lines(self.part / "removed.jsonl.zst", self.removed)
        index = {
            "unit": self.unit.number, "source": self.unit.source, "sha256": self.sha.hexdigest(),
            "inputs": len(self.unit.items), "ids": [d.id for d in docs], "bytes": [n for _, n in self.kept],
            "quality": [float(d.meta.get("quality_score", 1.0)) for d in docs],
            "domain": [str(d.meta.get("domain", d.source)) for d in docs],
            "funnel": self.funnel, "rules": dict(self.rules), "counts": dict(self.counts), "lengths": self.lengths,
            "languages": dict(self.languages),
            "pairs": [one for _, one in self.pairs], "seconds": dict(self.seconds),
            "samples": {rule: [one for _, one in found] for rule, found in self.samples.items()},
        }
        with writing(self.part):
            np.save(self.part / "signatures.npy", signatures([doc.text for doc in docs], self.cfg.dedup))
            (self.part / "index.json").write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")


def decode(data: bytes | str, meta: dict) -> tuple[str, bool]:
    """Returns (text, whether bytes were replaced): UTF-8, or what the HTTP header or a byte order mark says."""
    if isinstance(data, str):
        return data, False
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace"), False
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode(), False
    except UnicodeDecodeError:
        pass
    declared = meta.get("charset") or (_declared(data) if meta.get("format") == "html" else "")
    if declared and declared.lower().replace("-", "") != "utf8":
        try:
            return data.decode(declared, "replace"), False
        except LookupError:
            pass
    return data.decode(errors="replace"), True


def _declared(data: bytes) -> str:
    """Returns the encoding that a page's first bytes name (WHATWG HTML, "prescan a byte stream")."""
    head = data[:1024].lower()
    at = head.find(b"charset=")
    return "" if at < 0 else head[at + 8 :].lstrip(b"\"' ").split(b'"')[0].split(b"'")[0].split(b">")[0].split(b";")[0].decode(
        "ascii", "ignore").strip(" /")


def write_lines(path: pathlib.Path, rows) -> int:
    """Writes rows as .jsonl.zst; returns how many."""
    n = 0
    with writing(path), path.open("wb") as raw, zstandard.ZstdCompressor(level=3).stream_writer(raw) as out:
        for n, row in enumerate(rows, 1):  # noqa: B007
            out.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    return n


def read_lines(path: pathlib.Path):
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        held = b""
        while chunk := stream.read(1 << 20):
            *lines, held = (held + chunk).split(b"\n")
            yield from map(json.loads, lines)
        if held:
            yield json.loads(held)


def _bin(text: str) -> int:
    return bisect.bisect_right(LENGTH_BINS, len(text)) - 1


def _keep_lowest(found: list, ident: str, row: dict, most: int) -> None:
    found.append((hashlib.blake2b(ident.encode("utf-8", "surrogateescape"), digest_size=8).digest(), row))
    found.sort(key=lambda pair: pair[0])
    del found[most:]
