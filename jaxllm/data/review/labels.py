"""The experts' labels: a CSV file that is whole after every click, and CSV files that come from spreadsheets."""

import csv
import dataclasses
import difflib
import io
import os
import pathlib
import re
import threading
import time

from jaxllm.data.review.sample import Item
from jaxllm.errors import RunError, UserError, writing

LABELS = ("keep", "drop", "unsure")
COLUMNS = ("id", "expert", "label", "reasons", "note", "time")
MAX_NAME, MAX_NOTE = 60, 2000


@dataclasses.dataclass(frozen=True)
class Label:
    label: str
    reasons: tuple[str, ...] = ()
    note: str = ""
    time: str = ""


class Labels:
    """{(document, expert): Label}, kept in a file that is written anew, under another name and renamed, at every change."""

    def __init__(self, path: pathlib.Path):
        self.path, self.lock, self.by = path, threading.Lock(), {}
        if path.exists():
            for number, row in read_csv(path):
                self.by[row["id"], row["expert"]] = checked(row, f"{path}:{number}")

    def put(self, changes: dict[tuple[str, str], Label]) -> None:
        """Adds labels, or replaces those of the same document and expert; all of them or none."""
        with self.lock:
            merged = self.by | changes
            self._write(merged)
            self.by = merged

    def _write(self, by: dict) -> None:
        text = io.StringIO()
        out = csv.writer(text, lineterminator="\n")
        out.writerow(COLUMNS)
        for (doc, expert), label in sorted(by.items()):
            out.writerow([doc, expert, label.label, ";".join(label.reasons), label.note, label.time])
        part = self.path.with_name(self.path.name + ".part")
        with writing(self.path):
            with open(part, "w", encoding="utf-8", newline="", errors="surrogatepass") as file:
                file.write(text.getvalue())
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)

    def experts(self) -> list[str]:
        return sorted({expert for _, expert in self.by})

    def of(self, doc: str) -> dict[str, Label]:
        """Returns {expert: label} of one document."""
        return {expert: label for (labelled, expert), label in self.by.items() if labelled == doc}

    def by_document(self) -> dict[str, dict[str, str]]:
        """Returns {document: {expert: "keep", "drop" or "unsure"}}."""
        out: dict[str, dict[str, str]] = {}
        for (doc, expert), label in sorted(self.by.items()):
            out.setdefault(doc, {})[expert] = label.label
        return out


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def checked(row: dict, where: str) -> Label:
    """Returns the label of a row of text; raises UserError that names the place."""
    label = (row.get("label") or "").strip().lower()
    if label not in LABELS:
        near = difflib.get_close_matches(label, LABELS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{where}: label {label!r}: should be keep, drop or unsure{hint}")
    check_name(row.get("expert") or "", where)
    reasons = tuple(part.strip() for part in (row.get("reasons") or "").split(";") if part.strip())
    return Label(label, reasons, (row.get("note") or "")[:MAX_NOTE], row.get("time") or "")


def check_name(expert: str, where: str) -> None:
    if not re.fullmatch(rf"[^\s\W](?:[\w .@'-]{{0,{MAX_NAME - 2}}}[\w.])?", expert):
        raise UserError(f"{where}: expert {expert[:80]!r}: should be a name of letters, digits, spaces and . @ ' -, "
                        f"{MAX_NAME} characters at most")


def read_csv(path: pathlib.Path):
    """Yields (line number, row) of a CSV file with a heading; raises UserError where it has no id or label."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or 'is not UTF-8'}") from None
    heading = text.partition("\n")[0]
    between = max(",;\t", key=heading.count)  # some countries' spreadsheets write semicolons
    csv.field_size_limit(1 << 30)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=between)
    for name in ("id", "label"):
        if name not in (rows.fieldnames or ()):
            raise UserError(f"{path}: no column {name!r}; should have id, label, and may have expert, reasons, note; "
                            f"found {', '.join(rows.fieldnames or ['nothing'])}")
    for row in rows:
        yield rows.line_num, row


def export(items: list[Item], labels: Labels, expert: str, path: pathlib.Path) -> int:
    """Writes the sample as a CSV file for a spreadsheet, with an expert's labels where there are any; returns the rows."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\r\n")
    out.writerow(["id", "source", "text", "copy_of", "label", "reasons", "note", "expert"])
    for item in items:
        mine = labels.by.get((item.id, expert)) or Label("")
        out.writerow([item.id, item.source, harmless(item.text), harmless(item.other or ""), mine.label, ";".join(mine.reasons),
                      harmless(mine.note), expert])
    with writing(path):
        part = path.with_name(path.name + ".part")
        part.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode("utf-8", "replace"))  # the mark makes spreadsheets read UTF-8
        part.replace(path)
    return len(items)


def harmless(text: str) -> str:
    """Returns text that no spreadsheet takes for a formula, nor cuts (they hold 32,767 characters a cell)."""
    text = text[:32_000]
    return "'" + text if text.lstrip()[:1] in ("=", "+", "-", "@") else text


def take(path: pathlib.Path, items: list[Item], labels: Labels, expert: str) -> int:
    """Reads labels from a CSV file, all of them or none; returns how many. Rows without a label are passed over."""
    known, changes = {item.id for item in items}, {}
    for number, row in read_csv(path):
        if not (row.get("label") or "").strip():
            continue
        where = f"{path}:{number}"
        row["expert"] = (row.get("expert") or "").strip() or expert
        if not row["expert"]:
            raise UserError(f"{where}: no expert; should have a column `expert`, or --expert=NAME be given")
        if row["id"] not in known:
            raise UserError(f"{where}: document {row['id']!r} is not in the sample")
        changes[row["id"], row["expert"]] = checked({"time": now(), **row}, where)
    if not changes:
        raise RunError(f"{path}: no row has a label; nothing was taken")
    labels.put(changes)
    return len(changes)
