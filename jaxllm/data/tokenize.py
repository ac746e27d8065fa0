"""Tokenises sources once: one process reads, many tokenise, one writes in order, so their number changes nothing.

A document becomes <bos> text <eos>. Whether it is held out for validation is decided by a hash of its text (the first
64 kB of it), so that the same document is on the same side in every source, run and machine.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil

import numpy as np

from jaxllm.data.config import DataConfig, Source
from jaxllm.data.processes import in_order, n_cores
from jaxllm.data.progress import Progress
from jaxllm.data.read import BLOCK, Block, blocks, document_bytes, find_files, texts, words_within
from jaxllm.data.store import (
    SPLITS,
    VERSION,
    Counts,
    Store,
    StoreWriter,
    file_hash,
    locked,
    open_stores,
    publish,
    remove_leftovers,
    token_dtype,
)
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import RunError, UserError, writing

LARGE = 2_000_000_000  # bytes of files that take a while to hash
SMALL = 4 << 20  # bytes of text that are tokenised sooner than another process has started


@dataclasses.dataclass(frozen=True)
class SourceStores:
    """A tokenised source."""

    name: str
    key: str  # a hash of all that the tokenised text depends on
    weight: float
    counts: Counts
    train: Store
    validation: Store


@dataclasses.dataclass(frozen=True)
class Stores:
    """All tokenised sources, and what training has to know of the tokenizer."""

    sources: list[SourceStores]
    token_bytes_V: np.ndarray
    pad_id: int


def prepare(cfg: DataConfig, tokenizer: Tokenizer, *, log=print) -> Stores:
    """Returns the tokenised sources of weight above 0, from the cache where they are there."""
    used = {name: source for name, source in cfg.sources.items() if source.weight > 0}
    if not used:
        raise UserError("data.sources: should hold at least one source with a weight above 0")
    cache = pathlib.Path(cfg.cache).expanduser()
    with writing(cache):
        (cache / "tokens").mkdir(parents=True, exist_ok=True)
    remove_leftovers(cache / "tokens")
    found = [_source(name, source, cfg, tokenizer, cache, log) for name, source in used.items()]
    if not any(len(one.validation.tokens) for one in found) and cfg.validation:
        log(f"no document was held out: there are few, and data.validation={cfg.validation}; nothing to evaluate on")
    return Stores(found, tokenizer.token_bytes(), tokenizer.pad_id)


def _source(name: str, source: Source, cfg: DataConfig, tokenizer: Tokenizer, cache: pathlib.Path, log) -> SourceStores:
    """Returns one source's stores; makes them unless they are there."""
    files = find_files(source, f"data.sources.{name}.path")
    before = [_stamp(path) for path in files]
    if (n_bytes := sum(size for size, _ in before)) > LARGE:
        log(f"{name}: looking whether these {n_bytes / 1e9:,.1f} GB are tokenised already")
    made_of = {
        "version": VERSION, "tokenizer": tokenizer.hash, "validation": cfg.validation, "invalid_utf8": cfg.invalid_utf8,
        "text_key": source.text_key, "document_bytes": document_bytes(source), "separator": source.separator,
        "files": [["".join(path.suffixes[-2:]), _hash(path, cache)] for path in files],
    }
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24]
    folder = cache / "tokens" / key
    lock = cache / "tokens" / f"{key}.lock"
    with locked(lock, waiting=lambda: log(f"{name}: another process is tokenising the same text; waiting for it")):
        opened = _open(folder, log)
        if opened is None:
            writing = Progress(f"{name}: tokenising", n_bytes, log)
            _make(folder, files, before, source, cfg, tokenizer, made_of, writing)
            opened = open_stores(folder)
    counts, stores = opened
    if not len(stores["train"].tokens):
        what = f"all {counts.documents} documents were held out" if counts.documents else _nothing(counts)
        raise UserError(f"data.sources.{name}.path={source.path}: no tokens to train on: {what}")
    log(f"{name}: {_said(counts)}")
    return SourceStores(name, key, source.weight, counts, stores["train"], stores["validation"])


def _hash(path: pathlib.Path, cache: pathlib.Path) -> str:
    try:
        return file_hash(path, cache)
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None


def _open(folder: pathlib.Path, log):
    """Returns what the folder holds, or None; a damaged one is deleted."""
    if not folder.is_dir():
        return None
    try:
        return open_stores(folder)
    except (OSError, ValueError, KeyError, TypeError) as e:
        log(f"{folder}: damaged ({e}); tokenising again")
        shutil.rmtree(folder)
        return None


def _said(counts: Counts) -> str:
    said = f"{counts.documents:,} documents, {counts.tokens:,} tokens, {counts.bytes:,} bytes"
    left_out = ", ".join(f"{n:,} {what}" for n, what in (
        (counts.invalid - counts.dropped, "with bytes that are not UTF-8 (replaced)"),
        (counts.dropped, "dropped for bytes that are not UTF-8"), (counts.empty, "empty")) if n)
    return said + (f"; {left_out}" if left_out else "")


def _nothing(counts: Counts) -> str:
    if counts.dropped:
        return f"{counts.dropped} documents were dropped for bytes that are not UTF-8, {counts.empty} are empty"
    return f"{counts.empty} documents, all empty" if counts.empty else "no text in its files"


# ---------------------------------------------------------------- making a store


def _make(folder: pathlib.Path, files, before, source: Source, cfg: DataConfig, tokenizer, made_of: dict, progress) -> None:
    """Tokenises files, which had the stamps `before` when they were hashed, into a folder."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        worker = Worker(tokenizer, source.text_key, cfg.invalid_utf8, cfg.validation)
        n_workers = 1 if progress.total < SMALL else cfg.workers or n_cores()
        with StoreWriter(temporary, tokenizer.vocab_size) as writer:
            for result in in_order(worker, _blocks(files, source), n_workers):
                _write(writer, result)
                progress.show(result.position, f"{writer.counts.tokens / 1e6:,.1f} M tokens")
            changed = [path for path, stamp in zip(files, before, strict=True) if _stamp(path) != stamp]
            if changed:
                raise RunError(f"{changed[0]}: changed while it was read; run again")
            writer.finish(made_of)
        with writing(folder):
            publish(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    return stat.st_size, stat.st_mtime_ns


def _blocks(files, source: Source):
    """Yields the blocks of all files, their positions counted through."""
    before = 0
    for path in files:
        for block in blocks(path, source):
            yield dataclasses.replace(block, position=before + block.position)
        before += path.stat().st_size


@dataclasses.dataclass(frozen=True)
class Result:
    """A block's tokens, split by split."""

    part: str
    splits: dict[str, tuple]  # (tokens, tokens of each document, bytes of each document)
    counts: Counts
    position: int


class Worker:
    """Tokenises a block; what each process holds."""

    def __init__(self, tokenizer: Tokenizer, text_key: str, invalid: str, validation: float):
        self.tokenizer, self.text_key, self.invalid, self.validation = tokenizer, text_key, invalid, validation
        self.dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, block: Block) -> Result:
        opens, closes = block.part in ("", "first"), block.part in ("", "last")
        splits = {split: ([], [], []) for split in SPLITS}  # arrays of tokens, tokens and bytes of each document
        counts = Counts()
        for text, invalid in texts(block, self.text_key, self.invalid):
            counts.invalid += invalid
            if text is None:
                counts.dropped, counts.empty = counts.dropped + invalid, counts.empty + (not invalid)
                continue
            raw = text.encode()
            tokens = self._tokens(text, opens, closes)
            arrays, lengths, sizes = splits[SPLITS[is_held_out(raw, self.validation)]]
            arrays.append(tokens)
            lengths.append(len(tokens))
            sizes.append(len(raw))
            counts.add(Counts(documents=int(closes), tokens=len(tokens), bytes=len(raw)))
        joined = {s: (np.concatenate(tokens), *rest) for s, (tokens, *rest) in splits.items() if tokens}
        return Result(block.part, joined, counts, block.position)

    def _tokens(self, text: str, opens: bool, closes: bool) -> np.ndarray:
        ends = np.array([self.tokenizer.bos_id, self.tokenizer.eos_id], self.dtype)
        pieces = (self.tokenizer.encode_array(piece).astype(self.dtype) for piece in words_within(text, BLOCK))
        return np.concatenate([ends[: int(opens)], *pieces, ends[1 : 1 + int(closes)]])


def is_held_out(raw: bytes, share: float) -> bool:
    """Tells whether a document is of the validation split, by a hash of its first 64 kB."""
    return int.from_bytes(hashlib.blake2b(raw[: 1 << 16], digest_size=8).digest(), "big") < share * 2.0**64


def _write(writer: StoreWriter, result: Result) -> None:
    if not result.part:
        for split, (tokens, lengths, sizes) in result.splits.items():
            writer.documents(split, tokens, lengths, sizes)
        writer.counts.add(result.counts)
        return
    if result.part == "first":
        writer.under_way = Counts()
    under_way = writer.under_way
    if under_way is None:  # an earlier part was dropped, and the document with it
        return
    under_way.add(result.counts)
    under_way.invalid = min(under_way.invalid, 1)
    if not result.splits:
        writer.forget_parts()
        writer.counts.add(Counts(invalid=1, dropped=1))
        writer.under_way = None
        return
    (split, (tokens, _, sizes)), = result.splits.items()
    writer.part(split if result.part == "first" else None, tokens, sizes[0], last=result.part == "last")
    if result.part == "last":
        writer.counts.add(under_way)
