"""Tokenised text on disk: memory-mapped arrays in a folder that appears whole or not at all.

    CACHE/tokens/KEY/            KEY: a hash of the text, the tokenizer and the settings
        meta.json                counts, number type, version
        train.tokens             uint16 where the vocabulary fits, else uint32
        train.ends               int64: where each document ends, in tokens
        train.bytes              int64: UTF-8 bytes of each document
        validation.…             the same of the held-out documents
    CACHE/tokens/KEY.lock        held by the process that writes KEY.tmp
    CACHE/files/                 what each source file's content hashed to, with its size and time
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import shutil
import time

import numpy as np

from jaxllm.errors import writing

VERSION = 1  # of the format; another one is another key
SPLITS = ("train", "validation")


@dataclasses.dataclass
class Counts:
    """What a source was made of."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0  # of UTF-8
    invalid: int = 0  # documents with bytes that are not UTF-8
    dropped: int = 0  # of those, left out
    empty: int = 0  # documents without text, left out

    def add(self, other: "Counts") -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclasses.dataclass(frozen=True)
class Store:
    """One split of one source: a stream of tokens and where its documents end."""

    tokens: np.ndarray
    ends: np.ndarray
    byte_counts: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def open_stores(folder: pathlib.Path) -> tuple[Counts, dict[str, Store]]:
    """Returns (counts, the stores by split) of a folder; raises ValueError when it is not whole."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    stores = {}
    for split in SPLITS:
        arrays = []
        for name, dtype in (("tokens", meta["dtype"]), ("ends", "int64"), ("bytes", "int64")):
            path = folder / f"{split}.{name}"
            size = meta["sizes"][path.name]
            if path.stat().st_size != size:
                raise ValueError(f"{path}: {path.stat().st_size} bytes, should be {size}")
            # asarray: the same memory without memmap's own class, whose slices cost five times as much
            arrays.append(np.asarray(np.memmap(path, dtype, "r")) if size else np.empty(0, dtype))
        stores[split] = Store(*arrays)
    return Counts(**meta["counts"]), stores


class StoreWriter:
    """Writes the splits of a source into a folder. A full disk is a RunError that names the file."""

    def __init__(self, folder: pathlib.Path, vocab_size: int):
        self.folder, self.counts = folder, Counts()
        self.dtype = token_dtype(vocab_size)
        self.n_tokens = dict.fromkeys(SPLITS, 0)
        self.began = None  # of a document that comes in parts: [split, first token, its bytes so far]
        self.under_way: Counts | None = None  # of the same document
        with writing(folder):
            folder.mkdir(parents=True)
            self.files = {f"{split}.{name}": (folder / f"{split}.{name}").open("wb")
                          for split in SPLITS for name in ("tokens", "ends", "bytes")}

    def __enter__(self):
        return self

    def __exit__(self, kind, *exception):
        for file in self.files.values():
            with contextlib.suppress(OSError) if kind else writing(file.name):
                file.close()

    def documents(self, split: str, tokens, lengths, byte_counts) -> None:
        """Appends whole documents: their tokens one after the other, and how many tokens and bytes each has."""
        ends = self.n_tokens[split] + np.cumsum(lengths, dtype=np.int64)
        self._append(f"{split}.tokens", tokens.astype(self.dtype))
        self._append(f"{split}.ends", ends)
        self._append(f"{split}.bytes", np.asarray(byte_counts, np.int64))
        self.n_tokens[split] += len(tokens)

    def part(self, split: str | None, tokens, n_bytes: int, *, last: bool) -> None:
        """Appends a part of one document; the first names the split."""
        if split is not None:
            self.began = [split, self.n_tokens[split], 0]
        split, first, _ = self.began
        self._append(f"{split}.tokens", tokens.astype(self.dtype))
        self.n_tokens[split] += len(tokens)
        self.began[2] += n_bytes
        if last:
            self._append(f"{split}.ends", np.array([self.n_tokens[split]], np.int64))
            self._append(f"{split}.bytes", np.array([self.began[2]], np.int64))
            self.began = None

    def forget_parts(self) -> None:
        """Takes back the parts of the document that is under way."""
        if self.began is not None:
            split, first, _ = self.began
            self.n_tokens[split] = first
            file = self.files[f"{split}.tokens"]
            file.seek(first * self.dtype.itemsize)
            file.truncate()
            self.began = None

    def finish(self, made_of: dict) -> None:
        """Writes what is left and the index; after that the folder may be renamed."""
        sizes = {}
        for name, file in self.files.items():
            with writing(file.name):
                file.flush()
                os.fsync(file.fileno())
                sizes[name] = file.tell()
        counts = dataclasses.asdict(self.counts)
        meta = {"version": VERSION, "dtype": self.dtype.name, "counts": counts, "sizes": sizes, **made_of}
        with writing(self.folder / "meta.json"), open(self.folder / "meta.json", "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def _append(self, name: str, array: np.ndarray) -> None:
        with writing(self.files[name].name):
            self.files[name].write(array.tobytes())


@contextlib.contextmanager
def locked(path: pathlib.Path, waiting=lambda: None):
    """Holds a lock file; calls `waiting` once if another process has it. The lock ends with the process that holds it."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows: the rename at the end still keeps half a folder from being seen
        yield
        return
    with writing(path):
        file = path.open("a+b")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as e:  # a file system without locks
            if e.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
        yield


def remove_leftovers(tokens: pathlib.Path) -> None:
    """Deletes what killed processes left unfinished; what a live one is writing is locked and stays."""
    try:
        import fcntl
    except ModuleNotFoundError:
        return
    for left in tokens.glob("*.tmp"):
        with open(tokens / f"{left.name.split('.')[0]}.lock", "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            shutil.rmtree(left, ignore_errors=True)


def publish(temporary: pathlib.Path, folder: pathlib.Path) -> None:
    """Gives a finished folder its name, unless another process was first."""
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / "meta.json").is_file():
            raise
        shutil.rmtree(temporary)


def file_hash(path: pathlib.Path, cache: pathlib.Path) -> str:
    """Returns a hash of a file's content; of a file whose size and time are as last time, the one found then."""
    stat = path.stat()
    seen = [str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    note = cache / "files" / f"{hashlib.sha256(seen[0].encode('utf-8', 'surrogateescape')).hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError):
        before, found = json.loads(note.read_text(encoding="utf-8"))
        if before == seen:
            return found
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time_ns() - stat.st_mtime_ns > 2_000_000_000:  # a file written just now may change again within one tick
        with writing(note):
            note.parent.mkdir(parents=True, exist_ok=True)
            fresh = note.with_suffix(f".{os.getpid()}.tmp")
            fresh.write_text(json.dumps([seen, found]), encoding="utf-8")
            fresh.replace(note)
    return found
