"""Prompts of reinforcement learning out of JSON lines, in an endless shuffled order. NumPy only.

    {"prompt": "text" or messages, "answer": ..., ...}     all of a line but the prompt is kept for what scores the response

B prompt of a batch, P prompt slot (prompts end at the last one).
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from jaxllm.data.json_rows import json_rows
from jaxllm.data.preference import shortened, to_stderr
from jaxllm.data.preference_config import PromptData
from jaxllm.data.preference_rows import Prompt as PromptText
from jaxllm.data.preference_rows import prompt_of, split_key
from jaxllm.data.shuffle import EndlessOrder
from jaxllm.data.tokenize import is_held_out
from jaxllm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prompt:
    text: str  # of messages: each one's role and content, set apart by blank lines
    tokens: list[int]
    row: dict  # the line's object, the prompt in it as it was given


@dataclasses.dataclass(frozen=True)
class Prompts:
    train: list[Prompt]
    validation: list[Prompt]
    sizes: list[int]  # training prompts of each source
    weights: list[float]
    counts: dict[str, dict[str, int]]  # source -> prompts, held out, too long, truncated, longest

    @property
    def made_of(self) -> dict[str, list]:
        """Returns, of each source, a digest of its prompts and its weight: with the seed, what an iteration depends on."""
        out, first = {}, 0
        for name, size, weight in zip(self.counts, self.sizes, self.weights, strict=True):
            said = repr([(prompt.tokens, prompt.row) for prompt in self.train[first : first + size]]).encode()
            out[name], first = [hashlib.blake2b(said, digest_size=12).hexdigest(), weight], first + size
        return out

    def describe(self) -> str:
        """Returns a line a source."""
        return "\n".join(
            f"prompts: {name}: {n['prompts']:,} prompts, {n['held out']:,} held out; longest {n['longest']:,} tokens"
            + (f"; left out: {n['too long']:,} too long" if n["too long"] else "")
            + (f"; {n['truncated']:,} truncated" if n["truncated"] else "") for name, n in self.counts.items())


def read(cfg: PromptData, encode: Callable[[PromptText], list[int]], key: str = "prompts",
         log: Callable[[str], None] = to_stderr) -> Prompts:
    """Returns the prompts of all sources; `encode` gives a prompt's ids up to where the response begins.

    Raises UserError, with file and line, for what is no prompt; `key` is the settings' group, which errors name.
    """
    if not cfg.sources:
        raise UserError(f"{key}.sources: none given; should be e.g. --{key}.sources.NAME.path=prompts.jsonl")
    train, validation, sizes, counts = [], [], [], {}
    for name, source in cfg.sources.items():
        n = counts[name] = dict.fromkeys(("prompts", "held out", "too long", "truncated", "longest"), 0)
        before = len(train)
        for where, row in json_rows(source.path, f"{key}.sources.{name}.path", log):
            if "prompt" not in row:
                raise UserError(f'{where}: no "prompt" (found: {", ".join(sorted(row)[:12]) or "nothing"})')
            prompt = prompt_of(row["prompt"], where)
            try:
                tokens = list(encode(prompt))
            except (UserError, ValueError) as e:  # what the template refuses
                raise UserError(f"{where}: {e}") from None
            if len(tokens) > cfg.prompt_len:
                n["too long" if cfg.too_long == "drop" else "truncated"] += 1
                if cfg.too_long == "drop":
                    continue
                tokens = shortened(tokens, cfg.prompt_len)
            n["longest"] = max(n["longest"], len(tokens))
            held_out = is_held_out(split_key(prompt), cfg.validation)
            n["held out" if held_out else "prompts"] += 1
            (validation if held_out else train).append(Prompt(text_of(prompt), tokens, row))
        sizes.append(len(train) - before)
    found = Prompts(train, validation, sizes, [source.weight for source in cfg.sources.values()], counts)
    if not train:
        raise UserError(f"{key}.sources: no prompt is left to train on; " + found.describe().replace("\n", "; "))
    return found


def text_of(prompt: PromptText) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)


class PromptInput:
    """The prompts of each iteration, without end, shuffled anew every epoch: a function of the seed and the iteration."""

    def __init__(self, prompts: Prompts, batch_size: int, seed: int):
        self.prompts, self.batch_size = prompts, batch_size
        self.order = EndlessOrder(prompts.sizes, prompts.weights, seed)
        if not self.order.epoch_size:
            raise UserError("prompts.sources: no source has both prompts and a weight above 0")

    def batch(self, iteration: int) -> list[Prompt]:
        """Returns the prompts of an iteration, counted from 0; the same on every process."""
        return [self.prompts.train[row] for row in self.order.rows(iteration * self.batch_size, self.batch_size)]


def left_padded(prompts: Sequence[list[int]], slots: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (token_BP, first_B): prompts that end at the last slot, and the slot of each one's first token."""
    token_BP = np.full((len(prompts), slots), pad_id, np.int32)
    first_B = np.array([slots - len(ids) for ids in prompts], np.int32)
    for b, ids in enumerate(prompts):
        token_BP[b, first_B[b] :] = ids
    return token_BP, first_B
