"""Records out of WARC, JSON-lines and Parquet files: each yields (data, id, metadata, problem).

`at` is a list of one number, which tells how many bytes of the file were read.
"""

import contextlib
import json
import pathlib
import zlib
from collections.abc import Iterator

from jaxllm.data.streams import Stream
from jaxllm.errors import UserError

CHUNK = 1 << 20
MOST = 1 << 28  # bytes of an unpacked body
Record = tuple[bytes | str | None, str, dict, str]


def json_lines(path: pathlib.Path, source, max_bytes: int, at: list[int]) -> Iterator[Record]:
    """Yields a record a line. A line that is too long is passed over without being held in memory."""
    for line in _lines(path, 8 * max_bytes, at):  # escapes in JSON take up to six bytes a byte
        if line is None:
            yield None, "", {}, "a line that is too long"
        elif line.strip():
            yield _of_json(line, source)


def _lines(path: pathlib.Path, limit: int, at: list[int]) -> Iterator[bytes | None]:
    held, skipping = bytearray(), False
    with Stream(path) as stream:
        chunk = stream.read_start(CHUNK)
        while chunk:
            at[0] = stream.position()
            *complete, rest = chunk.split(b"\n")
            for line in complete:
                if skipping:
                    yield None
                else:
                    yield bytes(held) + line
                held.clear()
                skipping = False
            if not skipping:
                held += rest
            if len(held) > limit:
                held.clear()
                skipping = True
            chunk = stream.read(CHUNK)
    if skipping or held:
        yield None if skipping else bytes(held)


def _of_json(line: bytes, source) -> Record:
    as_it_came = None
    try:
        try:
            found = json.loads(line.decode())
        except UnicodeDecodeError:
            found = json.loads(line.decode(errors="replace"))
            as_it_came = json.loads(line.decode(errors="surrogateescape"))
    except (ValueError, RecursionError):
        return None, "", {}, "not JSON"
    if not isinstance(found, dict):
        return None, "", {}, f"a JSON {type(found).__name__}, should be an object"
    text, given = found.pop(source.text_key, None), found.pop(source.id_key, "")
    if not isinstance(text, str):
        return None, str(given), {}, f"no string in field {source.text_key!r}"
    meta = found.pop("meta", None)
    meta = found | meta if isinstance(meta, dict) else found
    meta.pop("format", None)
    data = text.encode("utf-8", "replace")
    if as_it_came:
        with contextlib.suppress(UnicodeEncodeError):  # the reader counts what is not UTF-8
            data = as_it_came[source.text_key].encode("utf-8", "surrogateescape")
    return data, str(given if given is not None else ""), meta, ""


def parquet_rows(path: pathlib.Path, source, at: list[int]) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise _mistake(f"{path}: reading Parquet needs pyarrow: pip install 'jaxllm[parquet]'") from None
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if source.text_key not in names:
            raise _mistake(f"{path}: no column {source.text_key!r} (found: {', '.join(names[:12])})")
        done, size = 0, path.stat().st_size
        for batch in file.iter_batches(batch_size=128):
            done += batch.num_rows
            at[0] = size * done // max(file.metadata.num_rows, 1)
            for row in batch.to_pylist():
                text, given = row.pop(source.text_key), row.pop(source.id_key, "")
                text = text.encode("utf-8", "replace") if isinstance(text, str) else text
                problem = "" if isinstance(text, bytes) else f"no string in column {source.text_key!r}"
                row.pop("format", None)
                yield (text if not problem else None), str(given if given is not None else ""), row, problem
    except PermissionError as e:
        raise UserError(f"cannot be read: {e.strerror}") from None
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"cannot be read as Parquet: {str(e).splitlines()[0]}") from None


def _mistake(message: str) -> UserError:
    error = UserError(message)
    error.settings = True
    return error


def warc_pages(path: pathlib.Path, at: list[int]) -> Iterator[Record]:
    """Yields the response records (and plain resources) that hold HTML or text (ISO 28500)."""
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ModuleNotFoundError:
        raise _mistake(f"{path}: reading WARC needs fastwarc: pip install 'jaxllm[data]'") from None
    try:
        with path.open("rb") as raw:
            wanted = WarcRecordType.response | WarcRecordType.resource
            for record in ArchiveIterator(raw, record_types=wanted, parse_http=True):
                at[0] = raw.tell()
                kind = (record.http_content_type or record.headers.get("Content-Type") or "").split(";")[0].strip().lower()
                if kind in ("text/html", "application/xhtml+xml", "text/plain"):
                    yield _of_record(record, "text" if kind == "text/plain" else "html")
    except (OSError, EOFError, ValueError) as e:
        what = "cannot be read" if getattr(e, "errno", None) else "damaged, or ends early"
        raise UserError(f"{what}: {getattr(e, 'strerror', None) or e}") from None


def _of_record(record, kind: str) -> Record:
    meta = {"url": record.headers.get("WARC-Target-URI", ""), "date": record.headers.get("WARC-Date", ""), "format": kind}
    if record.http_charset:
        meta["charset"] = record.http_charset
    data, length = record.reader.read(), record.content_length
    if len(data) < length:  # the reader says nothing of it
        return None, record.record_id or "", meta, f"truncated: {len(data)} of {length} bytes are there"
    if record.is_http_parsed:
        try:
            data = _unpacked(data, record.http_headers)
        except zlib.error as e:
            return None, record.record_id or "", meta, f"damaged: {e}"
    return data, record.record_id or "", meta, ""


def _unpacked(data: bytes, http) -> bytes:
    """Returns what a body holds. Many archives keep headers of an encoding that they have undone: then it is as it is."""
    if (http.get("Transfer-Encoding") or "").lower() == "chunked":
        data = _joined(data)
    packed = (http.get("Content-Encoding") or "").lower()
    if packed in ("gzip", "x-gzip") and data[:2] == b"\x1f\x8b":
        unpacker = zlib.decompressobj(31)
    elif packed == "deflate" and data[:1] == b"\x78":
        unpacker = zlib.decompressobj()
    else:
        return data
    found = unpacker.decompress(data, MOST)
    if not unpacker.eof:
        raise zlib.error("the packed body ends early, or is too long")
    return found


def _joined(data: bytes) -> bytes:
    """Returns the chunks of a body one after the other (RFC 9112, section 7.1), or the body where it is not in chunks."""
    parts, at = [], 0
    while True:
        end = data.find(b"\r\n", at, at + 64)
        try:
            size = int(data[at:end].split(b";")[0], 16) if end > at else -1
        except ValueError:
            size = -1
        if size < 0 or end + 2 + size > len(data):
            return data
        if not size:
            return b"".join(parts)
        parts.append(data[end + 2 : end + 2 + size])
        at = end + 4 + size
