"""Instruction data out of files: conversations, prompts with responses, tasks with templates; what is held out of it.

    .jsonl (.gz, .zst)   {"messages": [{"role", "content"}, ...]} a line, or {"prompt", "response"} (also "instruction" with
                         "input", "question"; "output", "answer", "completion"), with "system" and "rationale" where wanted
    .json                a task: see instruction_tasks.py; its "rows" are in the file, or in one beside it (.jsonl, .tsv)

Whether an example is held out for validation is decided by a hash of its line; tasks of the clusters in data.hold_out are
never trained on.
"""

import dataclasses
import hashlib
import json
import pathlib

from jaxllm.data.chat import checked, shown, with_answer
from jaxllm.data.draws import permutation
from jaxllm.data.instruction_config import InstructionData, InstructionSource
from jaxllm.data.instruction_tasks import Example, Row, Task, TaskTemplate, task_of
from jaxllm.data.json_rows import FORMATS, json_rows
from jaxllm.data.rationale import split_answer
from jaxllm.data.read import files_at
from jaxllm.data.streams import BOM, Stream
from jaxllm.data.tokenize import is_held_out
from jaxllm.errors import UserError, nearest

PROMPTS, RESPONSES = ("prompt", "instruction", "question"), ("response", "output", "answer", "completion")


@dataclasses.dataclass(frozen=True)
class Conversations:
    """Rows that are conversations as they stand; beside `Task`, the other kind of member of a mixture."""

    name: str
    source: InstructionSource
    cluster: str
    rows: list[Row]  # fields: {"messages"}
    fixed = True

    def example(self, i: int, time: int, seed: int, most_shots: int | None = None) -> Example:
        return Example(self.rows[i].fields["messages"])


Member = Conversations | Task


@dataclasses.dataclass(frozen=True)
class Instructions:
    """All members of a mixture, and what each is for."""

    train: list[Member]
    validation: list[Member]
    unseen: list[Member]  # of the clusters that are held out


def read_instructions(cfg: InstructionData, log=lambda text: None) -> Instructions:
    """Returns all sources of weight above 0, read and checked; raises UserError that names file and line."""
    used = {name: source for name, source in cfg.sources.items() if source.weight > 0}
    if not used:
        raise UserError("data.sources: should hold at least one source with a weight above 0")
    members = [member for name, source in used.items() for member in read_source(name, source)]
    clusters = {member.cluster for member in members} - {""}
    for cluster in cfg.hold_out:
        if cluster not in clusters:
            raise UserError(f"data.hold_out: no cluster {cluster!r}; {nearest(cluster, clusters)}")
    unseen = [member for member in members if member.cluster in cfg.hold_out]
    members = [member for member in members if member.cluster not in cfg.hold_out]
    if not members:
        raise UserError(f"data.hold_out={cfg.hold_out}: every task is of these clusters; nothing is left to train on")
    share = 0.0 if cfg.validation_path else cfg.validation
    train, held_out = zip(*(_split(member, share) for member in members), strict=True)
    for member, rest in zip(members, train, strict=True):
        if not rest.rows:
            raise UserError(f"data.validation={cfg.validation}: holds out every example of {member.name} ({len(member.rows)})")
    validation = [member for member in held_out if member.rows]
    if cfg.validation_path:
        source = InstructionSource(path=cfg.validation_path)
        validation = read_source("validation", source, "data.validation_path")
    elif cfg.validation and not validation:
        log(f"no example was held out: there are few, and data.validation={cfg.validation}; nothing to evaluate on")
    return Instructions(list(train), validation, unseen)


def _split(member: Member, share: float) -> tuple[Member, Member]:
    """Returns the member's rows that are trained on, of which exemplars are drawn, and those that are held out."""
    held_out = [is_held_out(canonical(row), share) for row in member.rows]
    train, rest = ([row for row, out in zip(member.rows, held_out, strict=True) if out == wanted] for wanted in (False, True))
    exemplars = {"exemplars": train} if isinstance(member, Task) else {}
    return dataclasses.replace(member, rows=train, **exemplars), dataclasses.replace(member, rows=rest, **exemplars)


def canonical(row: Row) -> bytes:
    """Returns a row as bytes that do not depend on the order of its fields."""
    return json.dumps(row.fields, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")


def digest(member: Member) -> str:
    """Returns a hash of all that decides what a member's examples are."""
    found = hashlib.sha256()
    for row in member.rows:
        found.update(canonical(row) + b"\n")
    if isinstance(member, Task):
        settings = [member.templates, member.inverted, member.system, member.between, member.separator, member.source.few_shot,
                    member.source.shots, member.source.rationale, member.source.invert]
        found.update(repr(settings).encode("utf-8", "surrogatepass"))
    return found.hexdigest()[:24]


# ---------------------------------------------------------------- reading


def read_source(name: str, source: InstructionSource, key: str | None = None) -> list[Member]:
    """Returns a source's members, one of each file; raises UserError that names file and line."""
    where = f"{key or f'data.sources.{name}.path'}={source.path}"
    files = files_at(pathlib.Path(source.path).expanduser(), (*FORMATS, ".json"), where)
    tasks = {path: _object(path) for path in files if path.name.lower().endswith(".json")}
    of_tasks = {(path.parent / task["rows"]).resolve() for path, task in tasks.items() if isinstance(task.get("rows"), str)}
    files = [path for path in files if path in tasks or path.resolve() not in of_tasks]
    members: dict[str, Member] = {}
    for path in files:
        own = str(tasks[path].get("name", path.stem)) if path in tasks else path.name.partition(".jsonl")[0]
        own = name if len(files) == 1 else f"{name}/{own}"
        if own in members:
            raise UserError(f"{path}: a second task named {own!r} in {where}; names should differ")
        if path in tasks:
            rows = _at_most(source.max_examples, _rows_of_task(tasks[path], path), own)
            members[own] = task_of(tasks[path], rows, own, source, str(path))
        else:
            members[own] = _of_lines(own, source, _at_most(source.max_examples, _lines(path), own), path)
    return list(members.values())


def _at_most(n: int | None, rows: list[Row], name: str) -> list[Row]:
    return [rows[i] for i in sorted(permutation(len(rows), "max_examples", name)[:n])] if n else rows


def _of_lines(name: str, source: InstructionSource, rows: list[Row], path) -> Member:
    """Returns the member of a .jsonl file: conversations, or a task whose one template is the prompt and the response."""
    if not rows:
        raise UserError(f"{path}: holds no examples")
    if _is_conversation(rows[0].fields):
        return Conversations(name, source, source.cluster, [Row({"messages": _messages(row)}, row.where) for row in rows])
    pairs = [Row(_pair(row, source.answer_separator), row.where) for row in rows]
    return Task(name, source, source.cluster, pairs, pairs, [TaskTemplate("{prompt}", "{response}")], [])


def _is_conversation(fields: dict) -> bool:
    return "messages" in fields or isinstance(fields.get("prompt"), list)


def _messages(row: Row) -> list[dict]:
    fields = row.fields
    if not _is_conversation(fields):
        raise UserError(f"{row.where}: no field 'messages', which the lines before have; {nearest('messages', fields)}")
    if "messages" not in fields:  # a prompt of several turns
        answer = [{"role": "assistant", "content": _one_of(row, RESPONSES)[1]}]
        fields = {"messages": [*fields["prompt"], *answer]}
    messages = with_answer(checked(fields["messages"], row.where), row.where)
    return [m if m["role"] == "assistant" else {"role": m["role"], "content": m["content"]} for m in messages]


def _pair(row: Row, separator: str) -> dict:
    """Returns {"prompt", "response"}, with "system" and "rationale" where the line has them."""
    if _is_conversation(row.fields):
        raise UserError(f"{row.where}: is a conversation, the lines before are prompts and responses; should be of one kind")
    key, prompt = _one_of(row, PROMPTS)
    response = _one_of(row, RESPONSES)[1]
    if key == "instruction" and row.fields.get("input"):
        prompt = f"{prompt}\n\n{row.fields['input']}"
    out = {"prompt": prompt, "response": response}
    out |= {k: row.fields[k] for k in ("system", "rationale") if row.fields.get(k)}
    for k in ("system", "rationale"):
        if not isinstance(out.get(k, ""), str):
            raise UserError(f"{row.where}: {k}: should be text, was {shown(out[k])}")
    if separator:
        found = split_answer(response, separator)
        if found is None:
            raise UserError(f"{row.where}: no {separator!r} (answer_separator) between two texts in {shown(response)}")
        out["rationale"], out["response"] = found
    return out


def _one_of(row: Row, names: tuple[str, ...]) -> tuple[str, str]:
    """Returns (name, text) of the first of these fields that the row has."""
    name = next((name for name in names if name in row.fields), None)
    if name is None:
        raise UserError(f"{row.where}: none of the fields {', '.join(names)}; {nearest(names[0], row.fields)}")
    value = row.fields[name]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{row.where}: {name}: should be a text that is not empty, was {shown(value)}")
    return name, value


def _rows_of_task(task: dict, path: pathlib.Path) -> list[Row]:
    rows, columns = task.get("rows"), task.get("columns")
    if isinstance(rows, list):
        found = [Row(row, f"{path}: row {i}") for i, row in enumerate(rows, 1)]
    elif not isinstance(rows, str):
        raise UserError(f"{path}: rows: should be a list, or the path of a .jsonl or .tsv file, was {shown(rows)}")
    elif ".tsv" in (file := path.parent / rows).suffixes:
        if not isinstance(columns, list) or not all(isinstance(column, str) for column in columns):
            raise UserError(f"{path}: columns: should be a list of names for the columns of {rows}, was {shown(columns)}")
        found = [_of_columns(line, columns, f"{file}:{n}") for n, line in _text_lines(file)]
    else:
        found = _lines(file, f"{path}: rows")
    for row in found:
        if not isinstance(row.fields, dict):
            raise UserError(f"{row.where}: should be an object, was {shown(row.fields)}")
    return found


def _of_columns(line: str, columns: list[str], where: str) -> Row:
    values = line.split("\t")
    if len(values) != len(columns):
        raise UserError(f"{where}: {len(values)} columns; should have {len(columns)}: {', '.join(columns)}")
    return Row(dict(zip(columns, values, strict=True)), where)


def _object(path: pathlib.Path) -> dict:
    text = "\n".join(line for _, line in _text_lines(path))
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON: {e}") from None
    if not isinstance(found, dict) or "templates" not in found:
        raise UserError(f"{path}: should hold a task, an object with \"templates\" and \"rows\"; examples go in .jsonl files")
    return found


def _lines(path: pathlib.Path, key: str = "data.sources") -> list[Row]:
    return [Row(fields, where) for where, fields in json_rows(str(path), key)]


def _text_lines(path: pathlib.Path) -> list[tuple[int, str]]:
    """Returns (number, text) of each line that is not blank."""
    with Stream(path) as stream:
        raw = b"".join(iter(lambda: stream.read(1 << 20), b"")).removeprefix(BOM)
    lines = []
    for n, line in enumerate(raw.split(b"\n"), 1):
        try:
            text = line.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as e:
            raise UserError(f"{path}:{n}: not UTF-8: {e.reason} at byte {e.start + 1} of the line") from None
        if text.strip():
            lines.append((n, text))
    return lines
