"""Few-shot tasks beside RLHF: how well the model still answers questions as a base model, from examples in plain text.

    {"question": "Which is a fruit?", "choices": ["stone", "pear"], "answer": "pear"}     choices: the likeliest one counts
    {"prompt": "2 + 2 =", "answer": "4"}                                                  none: what the model writes counts

A question is written "Question: ...\\nAnswer:", a prompt as it stands, and its answer follows after a space; blank lines set
exemplars apart (Brown et al. 2020). No chat template: what alignment may cost is what pretraining had taught. Exemplars are a
file's first rows, which are never scored, the same ones for every question; all numbers of exemplars are measured on the same
rows.

B row of a batch, P prompt slot, R slot of an answer, S = P + R.
"""

import dataclasses
from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from jaxllm.align.rlhf_config import TaxTask
from jaxllm.data.json_rows import json_rows
from jaxllm.data.rationale import same_answer
from jaxllm.errors import UserError
from jaxllm.generate.config import SampleConfig
from jaxllm.generate.engine import power_of_two
from jaxllm.generate.rollout_arrays import Rollout
from jaxllm.partition import batch_parts

ROWS = 32  # texts that are read or continued at once
ASKS = {"question": "Question: {}\nAnswer:", "context": "Question: {}\nAnswer:", "prompt": "{}", "query": "{}"}


@dataclasses.dataclass(frozen=True)
class Item:
    text: str  # up to where the answer begins
    answers: tuple[str, ...]  # what is right; of choices, the one that is
    choices: tuple[str, ...]  # none: the answer is written

    @property
    def shown(self) -> str:
        return f"{self.text} {self.answers[0]}"


class Task:
    """A file of questions, ready to be asked at every number of exemplars in `shots`."""

    def __init__(self, name: str, cfg: TaxTask, tokenizer, max_seq_len: int):
        self.name, self.cfg, self.tokenizer, self.max_seq_len = name, cfg, tokenizer, max_seq_len
        key, most = f"tax.{name}", max(cfg.shots)
        items = [item_of(row, where) for where, row in json_rows(cfg.path, f"{key}.path")]
        self.exemplars = items[:most]
        taught = {item.text for item in self.exemplars}
        asked = [item for item in items if item.text not in taught]
        fit = [item for item in asked if self._longest(item, 0) <= max_seq_len]
        self.too_long = len(asked) - len(fit)
        if not fit:
            raise UserError(f"{key}.path={cfg.path}: {len(items)} questions, of which the first {most} are exemplars "
                            f"({key}.shots), leave none to ask" + (f"; {self.too_long} are too long" if self.too_long else ""))
        if len({bool(item.choices) for item in fit}) > 1:
            raise UserError(f"{key}.path={cfg.path}: some questions have choices, some have none; should be two files")
        n = min(cfg.limit, len(fit)) if cfg.limit else len(fit)
        self.items = [fit[i * len(fit) // n] for i in range(n)]  # spread evenly over the file
        self.by_choice = bool(fit[0].choices)

    def scores(self, sampler) -> dict[str, float]:
        """Returns the share of questions answered right, by `eval_NAME_Kshot`."""
        return {f"eval_{self.name}_{k}shot": float(np.mean(self.right(sampler, k))) for k in self.cfg.shots}

    def right(self, sampler, k: int) -> list[bool]:
        """Returns of each question whether the model answers it right after k exemplars."""
        contexts = [self.context(item, k) for item in self.items]
        if self.by_choice:
            return self._chosen(sampler, contexts)
        written = self._written(sampler, [self._ids(text) for text in contexts])
        return [any(same_answer(one, answer) for answer in item.answers) for one, item in zip(written, self.items, strict=True)]

    def context(self, item: Item, k: int) -> str:
        """Returns a question's text behind its exemplars: k, or as many of these as the model's length allows."""
        while k and self._longest(item, k) > self.max_seq_len:
            k -= 1
        return self._before(k) + item.text

    def describe(self) -> str:
        chance = np.mean([1 / len(item.choices) for item in self.items]) if self.by_choice else 0.0
        shorter = sum(self._longest(item, max(self.cfg.shots)) > self.max_seq_len for item in self.items)
        return (f"task {self.name}: {len(self.items):,} questions with {', '.join(map(str, self.cfg.shots))} exemplars, "
                + (f"by likelihood of choices (chance {chance:.1%})" if self.by_choice else "answers written")
                + (f"; left out: {self.too_long:,} too long" if self.too_long else "")
                + (f"; {shorter:,} with fewer exemplars, to fit" if shorter else ""))

    def _before(self, k: int) -> str:
        return "".join(f"{one.shown}\n\n" for one in self.exemplars[:k])

    def _ids(self, text: str) -> list[int]:
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]

    def _longest(self, item: Item, k: int) -> int:
        """Returns how many tokens are needed to ask and answer."""
        text = self._before(k) + item.text
        if not item.choices:
            return len(self._ids(text)) + self.cfg.answer_len
        return max(len(self._ids(f"{text} {choice}")) for choice in item.choices)

    def _chosen(self, sampler, contexts: Sequence[str]) -> list[bool]:
        """Returns whether the right choice has the largest mean log-probability of a token."""
        pairs = []
        for text, item in zip(contexts, self.items, strict=True):
            alone = self._ids(text)
            for choice in item.choices:
                whole = self._ids(f"{text} {choice}")
                # a token may reach over the border: an answer's are those from the first that is not the question's own
                n = min(len(list(takewhile(lambda ab: ab[0] == ab[1], zip(alone, whole, strict=False)))), len(whole) - 1)
                pairs.append((whole[:n], whole[n:]))
        mean = iter(mean_logps(sampler, pairs, self.tokenizer.pad_id))
        right = []
        for item in self.items:
            found = [next(mean) for _ in item.choices]
            right.append(item.choices[int(np.argmax(found))] in item.answers)
        return right

    def _written(self, sampler, prompts: list[list[int]]) -> list[str]:
        """Returns the first line that the model writes after each prompt, the likeliest token each time."""
        line_end = self.tokenizer.encode("a\n")[-1]
        stops = {self.tokenizer.eos_id} | ({line_end} if self.tokenizer.decode([line_end]) == "\n" else set())
        how = SampleConfig(max_tokens=self.cfg.answer_len, temperature=0.0)
        rollout = sampler.sample(prompts, n=1, cfg=how, seeds=np.zeros(len(prompts), np.uint32), rows=ROWS,
                                 prompt_slots=max(map(len, prompts)), response_slots=self.cfg.answer_len, stop_ids=tuple(stops))
        return [self.tokenizer.decode(rollout.response(i)).partition("\n")[0].strip() for i in range(len(prompts))]


def item_of(row: dict, where: str) -> Item:
    """Returns the question of a line; raises UserError for one in no known form."""
    key = next((key for key in ASKS if isinstance(row.get(key), str) and row[key].strip()), None)
    if key is None:
        raise UserError(f'{where}: no "question" or "prompt" (found: {", ".join(sorted(row)[:12]) or "nothing"})')
    text, choices = ASKS[key].format(row[key].strip() if key != "prompt" else row[key].rstrip()), row.get("choices")
    answer = row.get("answer", row.get("gold"))
    if choices is not None:
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
            raise UserError(f"{where}: choices={choices!r:.60}: should be a list of two or more texts")
        choices = [choice.strip() for choice in choices]
        if type(answer) is int and 0 <= answer < len(choices):
            answer = choices[answer]
        if not isinstance(answer, str) or answer.strip() not in choices:
            raise UserError(f"{where}: answer={answer!r:.60}: should be one of the choices, or its place, counted from 0")
        return Item(text, (answer.strip(),), tuple(choices))
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or any(isinstance(a, bool) or not isinstance(a, str | int | float) or not str(a).strip() for a in answers):
        raise UserError(f"{where}: answer={answer!r:.60}: should be a text or a number, or a list of what is right")
    return Item(text, tuple(str(a).strip() for a in answers), ())


def mean_logps(sampler, pairs: Sequence[tuple[list[int], list[int]]], pad_id: int) -> np.ndarray:
    """Returns of each (ids before, ids of an answer) the answer's mean log-probability of a token, in nats."""
    parts = batch_parts(sampler.mesh)
    rows = -(-ROWS // parts) * parts
    P = power_of_two(max(len(before) for before, _ in pairs), 16)
    R = power_of_two(max(len(answer) for _, answer in pairs), 8)
    found = []
    for at in range(0, len(pairs), rows):
        part = pairs[at : at + rows]
        token_BS, first_B = np.full((rows, P + R), pad_id, np.int32), np.full(rows, P - 1, np.int32)
        length_B = np.ones(rows, np.int32)
        for b, (before, answer) in enumerate(part):
            first_B[b], length_B[b] = P - len(before), len(answer)
            token_BS[b, first_B[b] : P], token_BS[b, P : P + len(answer)] = before, answer
        action_BR = (np.arange(R)[None] < length_B[:, None]).astype(np.float32)
        rollout = Rollout(token_BS, first_B, length_B, action_BR, np.zeros_like(action_BR), np.zeros(rows, bool))
        found.append((sampler.score(rollout).sum(axis=1) / length_B)[: len(part)])
    return np.concatenate(found)
