"""What is compared: prompts with two or more different answers, read from a file. Answers of a model: sampling.py."""

import functools
import hashlib
import json
from dataclasses import dataclass
from typing import Protocol

from jaxllm.align.collect.config import MOST_ANSWERS
from jaxllm.data.json_rows import json_rows
from jaxllm.data.preference_rows import Prompt, Unusable, pair, prompt_of
from jaxllm.errors import UserError


@dataclass(frozen=True)
class Item:
    """A prompt and the answers that are shown, in the order in which they are numbered in the output."""

    prompt: Prompt
    answers: tuple[str, ...]

    @functools.cached_property
    def id(self) -> str:
        return digest(self.prompt, *self.answers)


class Items(Protocol):
    """Items in a fixed order; some may have no answers yet."""

    keys: list[str]  # what each item is known by before it has answers

    def known(self, i: int) -> Item | None:
        """Returns item i where its answers are there."""

    def item(self, i: int) -> Item | None:
        """Returns item i, sampling its answers if need be; None where there are not two different ones."""


class ReadyItems:
    """Items of a file of ready answers."""

    def __init__(self, path: str, most: int, seed: int):
        self.of, self.n_same = read_answers(path)
        self.of = drawn(self.of, [item.id for item in self.of], most, seed)
        self.keys = [item.id for item in self.of]

    def known(self, i):
        return self.of[i]

    item = known


def read_answers(path: str) -> tuple[list[Item], int]:
    """Returns (the items of a file, how many lines were left out as their answers are the same or empty)."""
    found, n_same = {}, 0
    for where, row in json_rows(path, "answers"):
        prompt, answers = _answers(row, where)
        if len(answers) < 2:
            raise UserError(f"{where}: {len(answers)} answer{'s' * (len(answers) != 1)}: should be two or more to compare")
        if len(answers) > MOST_ANSWERS:
            raise UserError(f"{where}: {len(answers)} answers: should be at most {MOST_ANSWERS}, one a digit key")
        item = Item(prompt, different(answers))
        if len(item.answers) < 2:
            n_same += 1
        else:
            found[item.id] = item
    if not found:
        raise UserError(f"answers={path}: no line has two different answers")
    return list(found.values()), n_same


def _answers(row: dict, where: str) -> tuple[Prompt, list[str]]:
    if "chosen" in row or "rejected" in row:
        try:
            return pair(row, where)
        except Unusable as e:
            raise UserError(f"{where}: {e}") from None
    answers = row.get("answers")
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise UserError(f'{where}: should be {{"prompt": ..., "answers": ["...", "..."]}} '
                        f'(found: {", ".join(sorted(row)[:12]) or "nothing"})')
    if "prompt" not in row:
        raise UserError(f'{where}: no "prompt" (found: {", ".join(sorted(row)[:12])})')
    return prompt_of(row["prompt"], where), answers


def read_prompts(path: str, most: int, seed: int) -> list[Prompt]:
    """Returns the prompts of a file, each once."""
    found = {}
    for where, row in json_rows(path, "prompts"):
        if "prompt" not in row:
            raise UserError(f'{where}: no "prompt" (found: {", ".join(sorted(row)[:12]) or "nothing"})')
        prompt = prompt_of(row["prompt"], where)
        found[digest(prompt)] = prompt
    if not found:
        raise UserError(f"prompts={path}: holds no prompt")
    return drawn(list(found.values()), list(found), most, seed)


def different(answers) -> tuple[str, ...]:
    """Returns the answers that are not empty, each once."""
    return tuple(dict.fromkeys(answer for answer in answers if answer.strip()))


def drawn(of: list, keys: list[str], most: int, seed: int) -> list:
    """Returns `most` of a list, chosen by a hash of their keys, in their order; all where most is 0."""
    if not most or most >= len(of):
        return of
    chosen = set(sorted(range(len(of)), key=lambda i: digest("drawn", seed, keys[i]))[:most])
    return [one for i, one in enumerate(of) if i in chosen]


def digest(*parts) -> str:
    """Returns a hash of plain values as 16 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def fraction(*parts) -> float:
    """Returns a hash of plain values as a number in [0, 1)."""
    return int(digest(*parts), 16) / 2.0**64
