"""Files of a unit of work: rows as lines of JSON, packed in frames of some 256 kB, so that one is read without the others."""

import json
import pathlib
from collections.abc import Iterable, Iterator

import zstandard

from jaxllm.errors import writing

FRAME = 1 << 18  # bytes of a frame before it is packed


def unit_folder(folder: str | pathlib.Path, number: int) -> pathlib.Path:
    return pathlib.Path(folder) / "units" / f"{number:06}"


def read_index(folder: str | pathlib.Path, number: int, name: str = "index") -> dict:
    """Returns what a unit has in index.json (counts), documents.json (of each that is left) or shown.json (texts to show)."""
    return json.loads((unit_folder(folder, number) / f"{name}.json").read_text(encoding="utf-8"))


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file under another name and renames it, so that it is never there in part."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8", errors="replace")
        part.replace(path)


def write_lines(path: pathlib.Path, rows: Iterable[dict]) -> list[list[int]]:
    """Writes rows as .jsonl.zst; returns [number of the first row, place in the file] of each frame."""
    frames, held, n, packer = [], bytearray(), 0, zstandard.ZstdCompressor(level=3)
    with writing(path), path.open("wb") as out:
        for row in rows:
            if len(held) >= FRAME:
                out.write(packer.compress(bytes(held)))
                held.clear()
            if not held:
                frames.append([n, out.tell()])
            # what a Parquet file or an input's metadata holds beside JSON's kinds is written as it prints
            held += json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"
            n += 1
        out.write(packer.compress(bytes(held)))
    return frames


def read_frame(path: pathlib.Path, place: int) -> list[bytes]:
    """Returns the rows of the frame that begins there, as they are written."""
    with path.open("rb") as raw:
        raw.seek(place)
        with zstandard.ZstdDecompressor().stream_reader(raw) as stream:
            return stream.read().split(b"\n")[:-1]


def read_lines(path: pathlib.Path) -> Iterator[dict]:
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as stream:
        held = b""
        while chunk := stream.read(1 << 20):
            *lines, held = (held + chunk).split(b"\n")
            yield from map(json.loads, lines)
        if held:
            yield json.loads(held)
