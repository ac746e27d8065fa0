"""Raw input files as units of work: some megabytes of documents each, the same ones whoever works on them.

    .html .htm .xhtml         a document a file
    .warc .warc.gz            a document a response record whose type is HTML or text
    .jsonl (.gz .zst)         a document a line; fields other than id and text become its metadata
    .parquet                  a document a row, likewise
    .txt (.gz .zst)           a document a file
    folders, globs            of these, in the order of their paths

What cannot be read is an item with a `problem`: counted, named, and the rest goes on.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxllm.data.raw_records import json_lines, parquet_rows, warc_pages
from jaxllm.data.read import documents_of, files_at, fixed_part
from jaxllm.data.streams import Stream
from jaxllm.errors import UserError

HTML, WARC, JSON = (".html", ".htm", ".xhtml"), (".warc", ".warc.gz"), (".jsonl", ".jsonl.gz", ".jsonl.zst")
TEXT, PARQUET = (".txt", ".txt.gz", ".txt.zst"), (".parquet",)
FORMATS = HTML + WARC + JSON + PARQUET + TEXT
UNIT_BYTES = 8 << 20  # of input that one worker takes at a time
UNIT_ITEMS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawSource:
    path: str  # a file, a folder or a glob: .html .htm .warc(.gz) .jsonl(.gz .zst) .parquet .txt(.gz .zst)
    text_key: str = "text"  # the field of a JSON line, or the column of a Parquet file, that holds the text
    id_key: str = "id"  # the field that holds a document's id; where it is missing an id is made of the place in the file
    format: str = "auto"  # what the text is: html, text; auto: html in .html and .warc, else text
    domain: str = ""  # what `mix` may call this source's domain; "": its name

    def __post_init__(self):
        if not self.path.strip():
            raise ValueError("path of a source is empty: should be a file, a folder or a glob")
        if self.format not in ("auto", "html", "text"):
            raise ValueError(f"format={self.format!r} of source {self.path}: should be auto, html or text")


class Item(NamedTuple):
    """One input document before it is decoded."""

    path: str  # relative to the source's folder
    number: int  # in its file, from 1; 0: the file is the document
    kind: str  # "html" or "text"
    data: bytes | str | None  # None: the worker reads the file
    id: str = ""
    meta: dict[str, Any] = {}
    problem: str = ""  # why it cannot be read


class Unit(NamedTuple):
    source: str
    number: int  # among all units of all sources
    items: list[Item]
    root: str
    position: int  # bytes of all files that were read by its end, about


def find_files(path: str, key: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """Returns (the folder that names are relative to, the files, sorted); raises UserError when there are none."""
    given = pathlib.Path(path).expanduser()
    try:
        given.stat()
        given = documents_of(given, f"{key}={path}")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as e:
        raise UserError(f"{key}={path}: cannot be read: {e.strerror}") from None
    files = files_at(given, FORMATS, f"{key}={path}")
    if given.is_file():
        return given.parent, files
    if given.is_dir():
        return given, sorted(files + _passed_over(given))
    return fixed_part(given), files


def _passed_over(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns what is no file to read within: folders that may not be read, links to folders, which are not followed, and
    links to nothing, pipes and the like that are named as a file would be."""
    errors: list[OSError] = []
    found = []
    for place, folders, names in os.walk(folder, onerror=errors.append):
        found += [link for name in folders if (link := pathlib.Path(place) / name).is_symlink()]
        found += [path for name in names if name.lower().endswith(FORMATS) and not name.startswith(".")
                  and not (path := pathlib.Path(place) / name).is_file()]
    return [*found, *(pathlib.Path(e.filename) for e in errors)]


def status_of(path: pathlib.Path) -> os.stat_result:
    """Returns size and times of a file, or of the link where that leads nowhere."""
    try:
        return path.stat()
    except FileNotFoundError:
        return path.lstat()


def units(sources: dict[str, RawSource], files: dict, max_bytes: int) -> Iterator[Unit]:
    """Yields all units in order; they depend on nothing but the files and the settings."""
    number, done = itertools.count(), 0
    for name, source in sources.items():
        root, paths = files[name]
        held, size = [], 0
        for path in paths:
            at = [0]  # in the file; the readers move it
            for item in _items(path, root, source, max_bytes, at):
                own = len(item.data) if item.data is not None else status_of(path).st_size if not item.problem else 0
                if held and (size + own > UNIT_BYTES or len(held) >= UNIT_ITEMS):
                    yield Unit(name, next(number), held, str(root), done + at[0])
                    held, size = [], 0
                held.append(item)
                size += own
            done += status_of(path).st_size
        if held:
            yield Unit(name, next(number), held, str(root), done)


def _items(path: pathlib.Path, root: pathlib.Path, source: RawSource, max_bytes: int, at: list[int]) -> Iterator[Item]:
    """Yields the documents of a file; of a file that cannot be read to its end, those before and one problem."""
    relative, name = path.relative_to(root).as_posix(), path.name.lower()
    if path.is_dir():
        yield Item(relative, 0, "text", None, problem="a link to a folder: not followed" if path.is_symlink() else
                   "a folder: may not be read")
        return
    if not path.is_file():
        yield Item(relative, 0, "text", None, problem="a link to nothing" if path.is_symlink() else "not a file")
        return
    if not path.stat().st_size and not name.endswith(HTML + TEXT):
        yield Item(relative, 0, "text", None, problem="empty")
        return
    default = "html" if name.endswith(HTML + WARC) else "text"
    kind = default if source.format == "auto" else source.format
    if name.endswith(HTML + TEXT):
        yield _whole_file(path, relative, kind, max_bytes)
        return
    reader = warc_pages(path, at) if name.endswith(WARC) else parquet_rows(path, source, at) if name.endswith(PARQUET) else (
        json_lines(path, source, max_bytes, at))
    number = 0
    try:
        for number, (data, given, meta, problem) in enumerate(reader, 1):
            if not problem and len(data) > max_bytes:
                data, problem = None, f"longer than read.max_bytes={max_bytes}"
            yield Item(relative, number, meta.pop("format", kind), data, given, meta, problem)
    except UserError as e:  # a column is missing: a mistake in the settings, not in the data
        if getattr(e, "settings", False):
            raise
        yield Item(relative, number + 1, kind, None, problem=str(e).removeprefix(f"{path}: "))


def _whole_file(path: pathlib.Path, relative: str, kind: str, max_bytes: int) -> Item:
    if path.suffix.lower() in (".gz", ".zst"):
        try:
            with Stream(path) as stream:
                data = bytearray()
                while len(data) <= max_bytes and (chunk := stream.read(1 << 20)):
                    data += chunk
        except UserError as e:
            return Item(relative, 0, kind, None, problem=str(e).removeprefix(f"{path}: "))
        too_long = len(data) > max_bytes
        return Item(relative, 0, kind, None if too_long else bytes(data),
                    problem=f"longer than read.max_bytes={max_bytes}" if too_long else "")
    if path.stat().st_size > max_bytes:
        return Item(relative, 0, kind, None, problem=f"longer than read.max_bytes={max_bytes}")
    return Item(relative, 0, kind, None)
