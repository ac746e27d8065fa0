"""The objects of JSON-lines files, each with the place that an error names."""

import json
import pathlib
import re
from collections.abc import Callable, Iterator

from jaxllm.data.config import Source
from jaxllm.data.progress import Progress
from jaxllm.data.read import blocks, files_at
from jaxllm.errors import UserError

HALF = re.compile(rb"\\u[dD][89a-fA-F]")
FORMATS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def json_rows(path: str, key: str, log: Callable[[str], None] | None = None) -> Iterator[tuple[str, dict]]:
    """Yields ("file:line", the object of that line) of a file, a folder or a glob; blank lines are passed over.

    `log` gets a line every few seconds that says how far it is, for work that takes longer. Raises UserError that names the
    setting `key` where there is no such file, and the line where one is no JSON object.
    """
    files = files_at(pathlib.Path(path).expanduser(), FORMATS, f"{key}={path}")
    progress, before = log and Progress(f"{path}: reading", sum(file.stat().st_size for file in files), log), 0
    for file in files:
        for block in blocks(file, Source(path=str(file))):
            for number, line in enumerate(block.data.split(b"\n"), block.first):
                if line.strip():
                    yield f"{file}:{number}", _object(line, f"{file}:{number}")
            if progress:
                progress.show(before + block.position)
        before += file.stat().st_size


def _object(line: bytes, where: str) -> dict:
    try:
        found = json.loads(line.decode())
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: byte 0x{line[e.start]:02x} at {e.start} is not UTF-8") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not a JSON object: {e}") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: should be a JSON object, found {type(found).__name__}")
    if HALF.search(line):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    return found
