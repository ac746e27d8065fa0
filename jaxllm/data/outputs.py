"""The output folder: documents that are left, what was removed and why, and the manifest that accounts for all of them.

    documents/part-00012.jsonl.zst   {id, source, text, meta}, in the order of the input (or .parquet)
    removed.jsonl                    {id, source, stage, rule, value, duplicate_of}
    removed-text/part-00000.jsonl.zst  of each rule some with their text, for a look and for `jaxllm data review`
    manifest.json                    settings, versions, hashes, counts: inputs = kept + removed, checked
    card.md, report.html
"""

import hashlib
import json
import pathlib
import shutil

from jaxllm.data.map_unit import read_lines, unit_folder, write_lines
from jaxllm.errors import writing


class UnitWriter:
    """Writes a unit's part of the output; `fates` holds, for each unit, its documents' new ids, copies and removals."""

    def __init__(self, folder: str, file_format: str):
        self.folder, self.format = folder, file_format

    def __call__(self, task: tuple[int, list[str], list[int], dict[int, dict]]) -> dict:
        """Returns the counts of a unit: documents, copies, bytes, and the hash of the text that was written."""
        unit, ids, copies, removals = task
        out = pathlib.Path(self.folder) / "out"
        done = out / "parts" / f"{unit:06}.json"
        if done.is_file():
            return json.loads(done.read_text(encoding="utf-8"))
        rows, sha, n_bytes, source = [], hashlib.sha256(), 0, unit_folder(self.folder, unit)
        removed = list(read_lines(source / "removed.jsonl.zst"))
        for i, row in enumerate(read_lines(source / "kept.jsonl.zst")):
            row["id"] = ids[i]
            if i in removals:
                removed.append({"id": ids[i], "source": row["source"], **removals[i]})
                continue
            for copy in range(copies[i]):
                rows.append(row if copy == 0 else row | {"id": f"{ids[i]}#copy{copy + 1}"})
                sha.update(json.dumps(rows[-1], ensure_ascii=False, sort_keys=True).encode("utf-8", "replace"))
                n_bytes += len(row["text"].encode())
        if rows:
            self.write_documents(out / "documents", unit, rows)
        write_lines(out / "removed" / f"{unit:06}.jsonl.zst", removed)
        for line in removed:
            sha.update(json.dumps(line, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace"))
        found = {"unit": unit, "documents": len(rows), "kept": len(ids) - len(removals), "removed": len(removed),
                 "bytes": n_bytes, "sha256": sha.hexdigest()}
        with writing(done):
            part = done.with_suffix(".part")
            part.write_text(json.dumps(found), encoding="utf-8")
            part.replace(done)
        return found

    def write_documents(self, folder: pathlib.Path, unit: int, rows: list[dict]) -> None:
        if self.format == "parquet":
            import pyarrow
            from pyarrow import parquet

            columns = {k: [row[k] for row in rows] for k in ("id", "source", "text")}
            columns["meta"] = [json.dumps(row["meta"], ensure_ascii=False) for row in rows]
            with writing(folder):
                parquet.write_table(pyarrow.table(columns), folder / f"part-{unit:05}.parquet", compression="zstd")
        else:
            write_lines(folder / f"part-{unit:05}.jsonl.zst", rows)


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
        made = work / "out" / name
        if made.exists():
            with writing(target / name):
                if (target / name).is_dir():
                    shutil.rmtree(target / name)
                made.replace(target / name)
    shutil.rmtree(work, ignore_errors=True)
