"""Documents out of files. A source is streamed in blocks: no file, and no document, has to fit in memory.

    .txt              a document a file, or many: see Source.document_bytes and Source.separator
    .jsonl            a JSON object a line, the text in the field Source.text_key
    .parquet          a row a document, the text in the column Source.text_key
    folders, globs    of these, in the order of their paths

.txt and .jsonl may be compressed: .gz, .zst.
"""

import dataclasses
import difflib
import functools
import glob
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from jaxllm.data.config import Source
from jaxllm.data.streams import Stream
from jaxllm.errors import UserError

BLOCK = 1 << 20  # bytes of text that are handled at once
MAX_LINE = 1 << 28  # bytes of a JSON line, which cannot be read in parts
FORMATS = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@dataclasses.dataclass(frozen=True)
class Block:
    """What one worker takes at a time: whole documents, or one part of a document longer than a block."""

    path: str
    data: bytes | list  # JSON lines, or documents as bytes (None: null)
    first: int  # number of the first line or document, from 1
    position: int  # bytes of the file (as it lies on disk) that were read by the end of this block
    part: str = ""  # "": whole documents; else "first", "middle" or "last" of one document


class Text(NamedTuple):
    text: str | None  # None: dropped
    invalid: bool  # had bytes that are not UTF-8


def find_files(source: Source, key: str) -> list[pathlib.Path]:
    """Returns the source's files, sorted; raises UserError, naming the setting `key`, when there are none."""
    where = f"{key}={source.path}"
    return files_at(documents_of(pathlib.Path(source.path).expanduser(), where), FORMATS, where)


def files_at(path: pathlib.Path, formats: tuple[str, ...], where: str) -> list[pathlib.Path]:
    """Returns the files with these endings at a path, in a folder or of a pattern, sorted; raises UserError for none."""
    if path.is_file():
        if not path.name.lower().endswith(formats):
            raise UserError(f"{where}: unknown kind of file; should end in one of {', '.join(formats)}")
        return [path]
    found = path.rglob("*") if path.is_dir() else _matches(path)
    found = sorted(p for p in found if p.is_file() and not p.name.startswith("."))
    files = [p for p in found if p.name.lower().endswith(formats)]
    if files:
        return files
    if found:
        raise UserError(f"{where}: no file ends in one of {', '.join(formats)}; found e.g. {found[0].name}")
    if path.is_dir():
        raise UserError(f"{where}: the folder is empty")
    there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, 1)
    raise UserError(f"{where}: no such file or folder" + (f"; did you mean {path.parent / near[0]}?" if near else ""))


def fixed_part(pattern: pathlib.Path) -> pathlib.Path:
    """Returns the folders before a glob's first part with a wildcard."""
    return pathlib.Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))


def _matches(pattern: pathlib.Path) -> list[pathlib.Path]:
    """Returns what a glob matches; like a folder's search, its `**` does not go into links, which may lead back to it."""
    if "**" not in pattern.parts:
        return list(map(pathlib.Path, glob.glob(str(pattern))))  # noqa: PTH207
    base = fixed_part(pattern)
    rest = [*pattern.parts[len(base.parts):], *(["*"] if pattern.parts[-1] == "**" else [])]  # `**` alone: folders only
    return list(base.glob("/".join(rest)))


def documents_of(path: pathlib.Path, where: str) -> pathlib.Path:
    """Returns `documents` of a folder that `jaxllm data` wrote, any other path as it is; raises UserError for half a run."""
    if (path / "documents").is_dir() and _made_by_data(path / "manifest.json"):
        return path / "documents"
    if (path / "work" / "plan.json").is_file():
        raise UserError(f"{where}: jaxllm data has not finished there; run its command again")
    return path


def _made_by_data(manifest: pathlib.Path) -> bool:
    try:
        return json.loads(manifest.read_text(encoding="utf-8")).get("made_by") == "jaxllm data"
    except (OSError, ValueError, AttributeError):
        return False


def document_bytes(source: Source) -> int:
    """Returns how long .txt documents are cut, 0 for not at all."""
    if source.document_bytes is not None:
        return source.document_bytes
    return 8192 if pathlib.Path(source.path).expanduser().is_file() else 0


def blocks(path: pathlib.Path, source: Source) -> Iterator[Block]:
    """Yields a file's text in blocks that depend on nothing but the file and the source's settings."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        yield from _grouped(path, *_parquet(path, source.text_key))
    elif name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        yield from _json_lines(path)
    else:
        yield from _text(path, source)


def texts(block: Block, text_key: str, invalid: str) -> Iterator[Text]:
    """Yields the documents of a block (or its part of one); empty and null ones as dropped."""
    if isinstance(block.data, bytes):
        for n, line in enumerate(block.data.split(b"\n"), block.first):
            if line.strip():
                yield _of_json(line, f"{block.path}:{n}", text_key, invalid)
    else:
        for n, raw in enumerate(block.data, block.first):
            yield _decoded(raw, f"{block.path}: document {n}", invalid) if raw else Text(None, False)


def documents(source: Source, key: str, invalid: str = "replace") -> Iterator[str]:
    """Yields the texts of a source, a document longer than a block in parts."""
    for path in find_files(source, key):
        for block in blocks(path, source):
            yield from (found.text for found in texts(block, source.text_key, invalid) if found.text)


def words_within(text: str, limit: int) -> Iterator[str]:
    """Yields a text in pieces of at most `limit` characters, cut before a space that follows none where there is one."""
    at = 0
    while len(text) - at > limit:
        stop = text.rfind(" ", at + 1, at + limit)
        while stop > at + 1 and text[stop - 1] == " ":
            stop -= 1
        stop = stop if stop > at + 1 else at + limit
        yield text[at:stop]
        at = stop
    yield text[at:]


# ---------------------------------------------------------------- text


def _text(path: pathlib.Path, source: Source) -> Iterator[Block]:
    size = document_bytes(source)
    if source.separator:
        cut = functools.partial(_cut_at_separator, separator=source.separator.encode())
    elif size:
        cut = functools.partial(_cut_at_blank_line, size=size)
    else:
        cut = _cut_whole
    with Stream(path) as stream:
        yield from _grouped(path, _pieces(stream, cut), stream.position)


def _pieces(stream: Stream, cut) -> Iterator[tuple[bytes, bool]]:
    """Yields (bytes, whether a document ends with them). `cut` sees two blocks ahead, or all that is left."""
    buffer, at, ended = stream.read_start(BLOCK), 0, False
    while True:
        if len(buffer) - at < 2 * BLOCK and not ended:
            buffer, at = buffer[at:], 0
            while len(buffer) < 3 * BLOCK and not ended:
                chunk = stream.read(BLOCK)
                buffer, ended = buffer + chunk, not chunk
        if at == len(buffer):
            return
        stop, skip, ends = cut(buffer, at, ended)
        yield buffer[at:stop], ends
        at = stop + skip


def _cut_whole(buffer: bytes, at: int, ended: bool):
    if ended and len(buffer) - at <= BLOCK:
        return len(buffer), 0, True
    return _between_words(buffer, at + BLOCK // 2, at + BLOCK), 0, False


def _cut_at_separator(buffer: bytes, at: int, ended: bool, *, separator: bytes):
    found = buffer.find(separator, at)
    if 0 <= found <= at + BLOCK:
        return found, len(separator), True
    if found < 0 and ended and len(buffer) - at <= BLOCK:
        return len(buffer), 0, True
    return _between_words(buffer, at + BLOCK // 2, at + BLOCK), 0, False


def _cut_at_blank_line(buffer: bytes, at: int, ended: bool, *, size: int):
    """Cuts after the first blank line `size` bytes on, else after a line, else between words, within twice the size."""
    low, high = at + size, at + 2 * size
    if ended and len(buffer) <= high:
        return len(buffer), 0, True
    blank = [i + len(mark) for mark in (b"\n\n", b"\n\r\n") if (i := buffer.find(mark, low, high)) >= 0]
    line = buffer.find(b"\n", low, high) + 1
    return (min(blank) if blank else line or _between_words(buffer, low, high)), 0, True


def _between_words(buffer: bytes, low: int, high: int) -> int:
    """Returns the last place in (low, high] before a space that follows none, else any that splits no character."""
    at = buffer.rfind(b" ", low, high)
    while at > low and buffer[at - 1] == 0x20:
        at -= 1
    if at > low:
        return at
    return next((i for i in range(high, high - 4, -1) if buffer[i] & 0xC0 != 0x80), high)


def _grouped(path: pathlib.Path, pieces, position) -> Iterator[Block]:
    """Yields blocks of whole documents, and documents longer than a block in parts."""
    held, n_bytes, number, inside = [], 0, 1, False
    for piece, ends in pieces:
        if (inside or not ends) and held:
            yield Block(str(path), held, number - len(held), position())
            held, n_bytes = [], 0
        if inside or not ends:
            part = "first" if not inside else "last" if ends else "middle"
            yield Block(str(path), [piece], number, position(), part)
        else:
            held.append(piece)
            n_bytes += len(piece or b"")
        inside, number = not ends, number + ends
        if n_bytes >= BLOCK:
            yield Block(str(path), held, number - len(held), position())
            held, n_bytes = [], 0
    if held:
        yield Block(str(path), held, number - len(held), position())


def _decoded(raw: bytes, where: str, invalid: str) -> Text:
    try:
        return Text(raw.decode(), False)
    except UnicodeDecodeError as e:
        if invalid == "error":
            raise UserError(f"{where}: byte 0x{raw[e.start]:02x} at {e.start} is not UTF-8; "
                            "data.invalid_utf8=replace or =drop goes on") from None
        return Text(raw.decode(errors="replace") if invalid == "replace" else None, True)


# ---------------------------------------------------------------- JSON lines


def _json_lines(path: pathlib.Path) -> Iterator[Block]:
    with Stream(path) as stream:
        held, number = bytearray(stream.read_start(BLOCK)), 1
        searched = 0  # no line ends before here
        while True:
            end = held.rfind(b"\n", searched) + 1
            if end and end >= BLOCK // 2:
                yield Block(str(path), bytes(held[:end]), number, stream.position())
                number += held.count(b"\n", 0, end)
                del held[:end]
            searched = len(held)
            if searched > MAX_LINE:
                at = number + held.count(b"\n")
                raise UserError(f"{path}:{at}: a line of more than {MAX_LINE >> 20} MB; should be one JSON object a line "
                                "(text that long: a .txt file is read in parts)")
            chunk = stream.read(BLOCK)
            if not chunk:
                break
            held += chunk
        if held:
            yield Block(str(path), bytes(held), number, stream.position())


def _of_json(line: bytes, where: str, key: str, invalid: str) -> Text:
    text, was_invalid = _decoded(line, where, invalid)
    if text is None:
        return Text(None, True)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not a JSON object: {e}") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: should be a JSON object, found {type(found).__name__}")
    if key not in found:
        raise UserError(f"{where}: no field {key!r}{_nearest(key, list(found))}")
    value = found[key]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: field {key!r} holds {type(value).__name__}, should be a string")
    if value and not value.isascii():  # "\ud800" in JSON is half a character, and no UTF-8
        raw = value.encode("utf-8", "surrogatepass")
        value, half = _decoded(raw, where, invalid)
        was_invalid |= half
    return Text(value or None, was_invalid)


def _nearest(key: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key, names, 1)
    return (f"; did you mean text_key={near[0]!r}?" if near else "") + f" (found: {', '.join(names[:12])})"


# ---------------------------------------------------------------- Parquet


def _parquet(path: pathlib.Path, key: str):
    """Returns (documents as bytes, a function that tells how many bytes of the file were read)."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'jaxllm[parquet]'") from None
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{path}: cannot be read as Parquet: {str(e).splitlines()[0]}") from None
    schema = file.schema_arrow
    if key not in schema.names:
        raise UserError(f"{path}: no column {key!r}{_nearest(key, schema.names)}")
    kind = schema.field(key).type
    if not any(is_text(kind) for is_text in (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_binary)):
        raise UserError(f"{path}: column {key!r} holds {kind}, should be strings")
    rows, done = file.metadata.num_rows, [0]

    def documents():
        try:
            for batch in file.iter_batches(batch_size=128, columns=[key]):
                done[0] += batch.num_rows
                # as bytes: a string that is not UTF-8 is then counted like any other
                yield from ((value, True) for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist())
        except (pyarrow.ArrowException, OSError) as e:
            raise UserError(f"{path}: cannot be read as Parquet: {str(e).splitlines()[0]}") from None

    return documents(), lambda: path.stat().st_size * done[0] // max(rows, 1)
