"""The output folder: documents that are left, what was removed and why, and the manifest that accounts for all of them.

    documents/part-00012.jsonl.zst   {id, source, text, meta}, in the order of the input (or .parquet)
    removed.jsonl                    {id, source, stage, rule, value, duplicate_of (of a copy), path (of what cannot be read)}
    removed-text/part-00000.jsonl.zst  of each rule some with their text, for a look and for `jaxllm data review`
    manifest.json                    settings, versions, hashes, counts: inputs = kept + removed, checked
    card.md, report.html
"""

import hashlib
import json
import pathlib
import shutil

from jaxllm.data.augment import AugmentConfig
from jaxllm.data.augment import versions as augmented
from jaxllm.data.document import Document
from jaxllm.data.passages import revised_texts
from jaxllm.data.unit_files import read_lines, unit_folder, write_lines, write_whole
from jaxllm.errors import writing


class UnitWriter:
    """Writes a unit's part of the output; a task holds, for each unit, its documents' ids, copies and removals."""

    def __init__(self, folder: str, file_format: str, augment: AugmentConfig):
        self.folder, self.format, self.augment = folder, file_format, augment

    def __call__(self, task: tuple[int, list[str], list[int], dict[int, dict]]) -> dict:
        """Returns the counts of a unit: documents, copies, bytes, and the hash of the text that was written."""
        unit, ids, copies, removals = task
        out = pathlib.Path(self.folder) / "out"
        done = out / "parts" / f"{unit:06}.json"
        if done.is_file():
            found = json.loads(done.read_text(encoding="utf-8"))
            if not found["documents"] or self.place(unit).is_file():  # it is not, where the run was killed while publishing
                return found
        rows, source, made = [], unit_folder(self.folder, unit), 0
        removed = list(read_lines(source / "removed.jsonl.zst"))
        changed = revised_texts(self.folder, unit)
        for i, row in enumerate(read_lines(source / "kept.jsonl.zst")):
            row["id"], row["text"] = ids[i], changed.get(i, row["text"])
            if i in removals:
                removed.append(removals[i])
                continue
            doc = Document(row["id"], row["source"], row["text"], row["meta"])
            versions = [{k: getattr(one, k) for k in row} for one in augmented(doc, self.augment)] if copies[i] else []
            made += len(versions)
            rows += [row if copy == 0 else row | {"id": f"{ids[i]}#copy{copy + 1}"} for copy in range(copies[i])]
            rows += versions
        if rows:
            self.write_documents(unit, rows)
        write_lines(out / "removed" / f"{unit:06}.jsonl.zst", removed)
        sha = hashlib.sha256()
        for line in (*rows, *removed):
            sha.update(json.dumps(line, ensure_ascii=False, sort_keys=True, default=str).encode("utf-8", "replace"))
        found = {"unit": unit, "documents": len(rows), "kept": len(ids) - len(removals), "removed": len(removed),
                 "augmented": made, "bytes": sum(len(row["text"].encode()) for row in rows), "sha256": sha.hexdigest()}
        write_whole(done, json.dumps(found))
        return found

    def place(self, unit: int) -> pathlib.Path:
        kind = "parquet" if self.format == "parquet" else "jsonl.zst"
        return pathlib.Path(self.folder) / "out" / "documents" / f"part-{unit:05}.{kind}"

    def write_documents(self, unit: int, rows: list[dict]) -> None:
        if self.format == "parquet":
            import pyarrow
            from pyarrow import parquet

            columns = {k: [row[k] for row in rows] for k in ("id", "source", "text")}
            columns["meta"] = [json.dumps(row["meta"], ensure_ascii=False, default=str) for row in rows]
            with writing(self.place(unit)):
                parquet.write_table(pyarrow.table(columns), self.place(unit), compression="zstd")
        else:
            write_lines(self.place(unit), rows)


def prepare(folder: pathlib.Path) -> None:
    for name in ("documents", "removed", "parts", "removed-text"):
        with writing(folder):
            (folder / "out" / name).mkdir(parents=True, exist_ok=True)


def gather_removed(folder: pathlib.Path, n_units: int) -> None:
    """Puts the units' removals into one file, in order."""
    path = folder / "out" / "removed.jsonl"
    with writing(path), path.open("w", encoding="utf-8", errors="replace") as file:
        for unit in range(n_units):
            for line in read_lines(folder / "out" / "removed" / f"{unit:06}.jsonl.zst"):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


PUBLISHED = ("documents", "removed-text", "removed.jsonl", "report.html", "card.md", "dedup", "manifest.json")


def publish(work: pathlib.Path, target: pathlib.Path) -> None:
    """Moves what is finished into the folder; the manifest comes last, so that a folder with one is whole."""
    for name in PUBLISHED:
        if (work / "out" / name).exists():
            move(work / "out" / name, target / name)
    shutil.rmtree(work, ignore_errors=True)


def move(made: pathlib.Path, place: pathlib.Path) -> None:
    with writing(place):
        if place.is_dir():
            shutil.rmtree(place)
        made.replace(place)
