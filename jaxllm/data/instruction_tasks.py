"""Tasks written by many templates, as FLAN's (Wei et al. 2022; Longpre et al. 2023): a file of templates and rows.

    {"name": "nli", "cluster": "inference", "rows": "nli.jsonl",
     "templates": [{"input": "{premise}\\nIs it true that {hypothesis}?\\n{options}", "target": "{answer}"}],
     "inverted": [{"input": "Write a sentence from which follows: {hypothesis}", "target": "{premise}"}]}

{field} is the row's field; {{ and }} are braces. Where a row has "options", {options} lists them, {letter} is the answer's
letter, and an "answer" that is a number is the option of this index. Where it has a "rationale", a share of the examples
has it before the answer (`rationale_input` and `rationale_target` of a template say how). Which template, which exemplars
before it, rationale or not, inverted or not: each is drawn by (seed, pass over the rows, row).
"""

import dataclasses
import functools
import re

from jaxllm.data.draws import draw, permutation, pick
from jaxllm.data.instruction_config import InstructionSource
from jaxllm.data.rationale import asked, reasoned
from jaxllm.errors import UserError, nearest

FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TASK_KEYS = ("name", "cluster", "rows", "columns", "templates", "inverted", "system", "between", "separator")
TEMPLATE_KEYS = ("input", "target", "rationale_input", "rationale_target", "options")
STYLES = {  # how {options} is written
    "dashes": lambda options: "OPTIONS:\n" + "\n".join(f"- {option}" for option in options),
    "letters": lambda options: "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)),
}


@dataclasses.dataclass(frozen=True)
class Row:
    fields: dict
    where: str  # file and line

    @property
    def reasons(self) -> bool:
        return bool(self.fields.get("rationale"))


@dataclasses.dataclass(frozen=True)
class TaskTemplate:
    input: str
    target: str
    rationale_input: str = ""  # empty: the input, and a line that asks for reasoning
    rationale_target: str = ""  # empty: the rationale, and "The answer is" the target
    options: str = "dashes"  # one of STYLES


@dataclasses.dataclass(frozen=True)
class Example:
    """What one row becomes."""

    messages: list[dict]
    shots: int = 0  # exemplars in front


@dataclasses.dataclass(frozen=True)
class Task:
    """Rows and the templates by which they become prompts and targets."""

    name: str
    source: InstructionSource
    cluster: str
    rows: list[Row]
    exemplars: list[Row]  # those that may stand before others
    templates: list[TaskTemplate]
    inverted: list[TaskTemplate]
    system: str = ""
    between: str = "\n"  # between an exemplar's input and its target
    separator: str = "\n\n"  # behind an exemplar

    @functools.cached_property
    def fixed(self) -> bool:
        """Whether a row becomes the same example every time."""
        source, reasons = self.source, any(row.reasons for row in self.rows)
        return len(self.templates) == 1 and not source.few_shot and not (self.inverted and source.invert) and (
            source.rationale in (0, 1) or not reasons)

    def example(self, i: int, time: int, seed: int, most_shots: int | None = None) -> Example:
        """Returns row i as it is drawn the `time`-th time, with `most_shots` exemplars at most."""
        source, row, key = self.source, self.rows[i], (seed, self.name, time, i)
        inverted = bool(self.inverted) and draw("invert", *key) < source.invert
        template = pick(self.inverted if inverted else self.templates, "template", *key)
        reasons = not inverted and row.reasons and draw("rationale", *key) < source.rationale
        shots = 1 + int(draw("shots", *key) * source.shots) if draw("few-shot", *key) < source.few_shot else 0
        shots = shots if most_shots is None else min(shots, most_shots)
        return self.written(row, template, self._exemplars(row, shots, reasons, key), reasons)

    def question(self, i: int, *, template: int = 0, shots: int = 0, reasons: bool = False, seed: int = 0) -> Example:
        """Returns row i by one template, to measure with: the last message is the target."""
        row = self.rows[i]
        exemplars = self._exemplars(row, shots, reasons, (seed, self.name, "question", i))
        return self.written(row, self.templates[template], exemplars, reasons)

    def written(self, row: Row, template: TaskTemplate, exemplars: list[Row], reasons: bool) -> Example:
        """Returns an example: exemplars and the row's input as one user's message, its target as the answer."""
        shown = [self.between.join(_written(one, template, reasons and one.reasons)) + self.separator for one in exemplars]
        ask, target = _written(row, template, reasons)
        system = row.fields.get("system") or self.system
        messages = [{"role": "system", "content": system}] * bool(system)
        messages += [{"role": "user", "content": "".join(shown) + ask}, {"role": "assistant", "content": target}]
        return Example(messages, len(exemplars))

    def _exemplars(self, row: Row, shots: int, reasons: bool, key) -> list[Row]:
        """Returns exemplars: never the row itself, nor one that asks the same; ones that reason where it does."""
        if not shots:
            return []
        n, own, found = len(self.exemplars), self._asks(row), {}
        many = n > 64 * shots  # then a few draws find enough
        order = (int(draw("exemplar", j, *key) * n) for j in range(16 * shots)) if many else permutation(n, "exemplar", *key)
        for i in order:
            one = self.exemplars[i]
            if one is not row and self._asks(one) != own and (one.reasons or not reasons):
                found.setdefault(self._asks(one), one)
            if len(found) == shots:
                break
        return list(found.values())

    def _asks(self, row: Row) -> str:
        return fill(self.templates[0].input, row, self.templates[0].options)


def _written(row: Row, template: TaskTemplate, reasons: bool) -> tuple[str, str]:
    """Returns (input, target)."""
    ask, target = (fill(text, row, template.options) for text in (template.input, template.target))
    if not reasons:
        return ask, target
    return (fill(template.rationale_input, row, template.options) if template.rationale_input else asked(ask),
            fill(template.rationale_target, row, template.options) if template.rationale_target
            else reasoned(str(row.fields["rationale"]), target))


def fill(text: str, row: Row, style: str = "dashes") -> str:
    """Returns a template's text with the row's fields in it."""
    return FIELD.sub(lambda found: found[0][0] if found[1] is None else _value(found[1], row, style), text)


def _value(name: str, row: Row, style: str) -> str:
    options = row.fields.get("options")
    if name == "options" and options:
        return STYLES[style](options)
    if name in ("answer", "letter") and options:
        answer = row.fields["answer"]
        index = answer if isinstance(answer, int) else options.index(answer)
        return options[index] if name == "answer" else f"({LETTERS[index]})"
    return str(row.fields[name])


# ---------------------------------------------------------------- reading a task


def task_of(file: dict, rows: list[Row], name: str, source: InstructionSource, where: str) -> Task:
    """Returns the task of a file's object; raises UserError that names the template or the row."""
    known(file, TASK_KEYS, where)
    texts = {key: file.get(key, default) for key, default in (
        ("cluster", source.cluster), ("system", ""), ("between", "\n"), ("separator", "\n\n"))}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise UserError(f"{where}: {key}: should be text, was {value!r}")
    templates, inverted = (_templates(file.get(key, []), f"{where}: {key}") for key in ("templates", "inverted"))
    if not templates or not rows:
        raise UserError(f"{where}: {'templates' if rows else 'rows'}: should be a list with at least one")
    for key, group in (("templates", templates), ("inverted", inverted)):
        for i, template in enumerate(group, 1):
            _check_fields(template, rows, f"{key} {i} of {where}")
    return Task(name, source, rows=rows, exemplars=rows, templates=templates, inverted=inverted, **texts)


def known(given: dict, keys: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in keys:
            raise UserError(f"{where}: unknown key {key!r}: should be one of {', '.join(keys)}; {nearest(key, keys)}")


def _templates(given, where: str) -> list[TaskTemplate]:
    if not isinstance(given, list):
        raise UserError(f"{where}: should be a list, was {type(given).__name__}")
    return [_template(one, f"{where} {i}") for i, one in enumerate(given, 1)]


def _template(one, where: str) -> TaskTemplate:
    if not isinstance(one, dict):
        raise UserError(f"{where}: should be {{\"input\", \"target\"}}, was {type(one).__name__}")
    known(one, TEMPLATE_KEYS, where)
    for key in ("input", "target"):
        if not isinstance(one.get(key), str) or not one[key].strip():
            raise UserError(f"{where}: {key}: should be a text, was {one.get(key)!r}")
    if one.get("options", "dashes") not in STYLES:
        raise UserError(f"{where}: options={one['options']!r}: should be {' or '.join(STYLES)}")
    return TaskTemplate(**one)


def _check_fields(template: TaskTemplate, rows: list[Row], where: str) -> None:
    """Raises UserError for a row that lacks a field of the template, or whose answer is none of its options."""
    always, reasoning = (set(filter(None, FIELD.findall(" ".join(texts)))) for texts in (
        (template.input, template.target), (template.rationale_input, template.rationale_target)))
    for row in rows:
        options, has = row.fields.get("options"), row.fields.keys() | ({"letter"} if "options" in row.fields else set())
        for name in sorted(always | (reasoning if row.reasons else set())):
            value = row.fields.get(name, "" if name == "letter" else None)
            if name not in has or value is None:
                raise UserError(f"{row.where}: no field {name!r}, which {where} has; {nearest(name, has - {name})}")
            if isinstance(value, (dict, list)) and name != "options":
                raise UserError(f"{row.where}: {name}: should be text or a number for {where}, was {type(value).__name__}")
        if options is not None and not (always | reasoning).isdisjoint({"options", "letter", "answer"}):
            _check_options(row, options)


def _check_options(row: Row, options) -> None:
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS) or not all(isinstance(o, str) for o in options):
        raise UserError(f"{row.where}: options: should be a list of 2 to {len(LETTERS)} texts, was {options!r:.60}")
    answer = row.fields.get("answer")
    if isinstance(answer, bool) or not (answer in range(len(options)) if isinstance(answer, int) else answer in options):
        raise UserError(f"{row.where}: answer {answer!r}: should be one of the options {options}, or its index from 0")
