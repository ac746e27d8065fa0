"""Items of evaluation sets out of the files of a folder.

    .jsonl              an item a line
    .json               an item each element of the list, or of the lists of objects within the object ({"examples": [...]})
    .tsv, .csv          an item a row
    .txt                an item a line

each also with .gz or .zst. The task's name is the path within the folder without these endings. Which texts of an item are
looked for: see `looked_for`. Labels and short answers are not.
"""

import csv
import io
import json
import pathlib
from collections.abc import Iterator

from jaxllm.data.streams import BOM, Stream
from jaxllm.errors import UserError

FORMATS = (".jsonl", ".json", ".tsv", ".csv", ".txt")
ASKS = ("?", "\uff1f", "\u061f", ":")  # what questions end with; Chinese and Arabic ones, too


def task_name(path: pathlib.Path, folder: pathlib.Path) -> str | None:
    """Returns a file's task; None for a file of another kind."""
    name = path.relative_to(folder).as_posix().removesuffix(".gz").removesuffix(".zst")
    return next((name.removesuffix(kind) for kind in FORMATS if name.endswith(kind)), None)


def files(folder: str, key: str) -> list[tuple[str, pathlib.Path]]:
    """Returns the folder's tasks and their files, sorted; raises UserError, naming the setting `key`, where there are none."""
    root = pathlib.Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"{key}={folder}: no such folder; should hold evaluation sets ({', '.join(FORMATS)})")
    paths = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    found = [(task_name(path, root), path) for path in paths]
    found = [(task, path) for task, path in found if task]
    if not found:
        raise UserError(f"{key}={folder}: no evaluation sets; files should end in one of {', '.join(FORMATS)} (.gz, .zst)")
    return found


def items(path: pathlib.Path) -> Iterator[list[str]]:
    """Yields the texts of each item of a file."""
    with Stream(path) as stream:
        raw = b"".join(iter(lambda: stream.read(1 << 20), b"")).removeprefix(BOM)
    text, name = raw.decode("utf-8", "replace"), path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".jsonl"):
        for n, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield strings(_json(line, f"{path}:{n}"))
    elif name.endswith(".json"):
        if text.lstrip()[:1] == "{" and "\n{" in text.strip():  # objects one a line, whatever the name says
            for n, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    yield strings(_json(line, f"{path}:{n}"))
        else:
            yield from map(strings, _elements(_json(text, str(path))))
    elif name.endswith((".tsv", ".csv")):
        if name.endswith(".tsv"):
            rows = (line.split("\t") for line in text.splitlines())
        else:
            rows = csv.reader(io.StringIO(text))
        try:
            yield from (row for row in rows if row)
        except csv.Error as e:
            raise UserError(f"{path}: not valid CSV: {e}") from None
    else:
        yield from ([line] for line in text.splitlines() if line.strip())


OTHER = 13  # words of a text that is no question, from which it is looked for (Brown et al. 2020, GPT-3, appendix C)


def looked_for(texts: list[tuple[str, int]], min_words: int) -> list[int]:
    """Returns which of an item's texts, each with its number of words, are looked for by themselves: every question from
    `min_words` on (where the item has none, its first text), any other from `OTHER` on; no bare address of a page.

    Shorter ones are answers, inputs of functions and lines of code, which stand in many places by chance.
    """
    enough = [i for i, (text, n) in enumerate(texts) if n >= min_words and not (text.startswith("http") and " " not in text)]
    asked = {i for i, (text, _) in enumerate(texts) if text.rstrip().endswith(ASKS)} or set(enough[:1])
    return [i for i in enough if i in asked or texts[i][1] >= OTHER]


def strings(value) -> list[str]:
    """Returns every text within a JSON value."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [s for inner in value.values() for s in strings(inner)]
    return [s for inner in value for s in strings(inner)] if isinstance(value, list) else []


def _json(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not valid JSON: {e}") from None


def _elements(value) -> Iterator:
    """Yields a file's items: elements of lists, objects that hold a text of their own."""
    if isinstance(value, list):
        for inner in value:
            yield from _elements(inner) if isinstance(inner, list) else [inner]
    elif isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and any(isinstance(x, dict) for x in v)]
        if lists:
            for inner in lists:
                yield from _elements(inner)
        elif any(isinstance(v, str) for v in value.values()):
            yield value
        else:
            for inner in value.values():
                yield from _elements(inner)
