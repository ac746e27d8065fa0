"""Tokens of instruction examples: each with the template of its source, kept where they are the same every time. NumPy only.

V vocabulary.
"""

import dataclasses

import numpy as np

from jaxllm.data.chat import Chat, load_chat
from jaxllm.data.instruction_config import InstructionData
from jaxllm.data.instruction_packing import Examples
from jaxllm.data.instructions import Instructions, Member, read_instructions
from jaxllm.data.tokenizer import Tokenizer


@dataclasses.dataclass
class Lost:
    """What became of examples that are longer than a row."""

    dropped: int = 0
    truncated: int = 0
    shortened: int = 0  # fitted with fewer exemplars


class Encoder:
    """Makes tokens of members' rows; keeps those that are the same every time."""

    def __init__(self, cfg: InstructionData, tokenizer: Tokenizer):
        self.cfg, self.tokenizer = cfg, tokenizer
        self.chats: dict[str, Chat] = {}
        self.kept: dict[tuple[str, int], tuple | None] = {}

    def chat(self, member: Member) -> Chat:
        return self.chat_of(member.source.template)

    def chat_of(self, template: str | None) -> Chat:
        """Returns the chat of a template; null: that of the data."""
        name = template or self.cfg.template or "plain"
        if name not in self.chats:
            self.chats[name] = load_chat(name, self.tokenizer)
        return self.chats[name]

    def encode(self, member: Member, i: int, time: int, seed: int, lost: Lost):
        """Returns (tokens, weights) of row i as it is drawn the `time`-th time, None for one that is dropped."""
        key = (member.name, id(member.rows), i)
        if member.fixed and key in self.kept:
            tokens, weights, what = self.kept[key]
        else:
            tokens, weights, what = self._encoded(member, i, time, seed)
            if member.fixed:
                self.kept[key] = tokens, weights, what
        if what:
            setattr(lost, what, getattr(lost, what) + 1)
        return None if tokens is None else (tokens, weights)

    def _encoded(self, member, i, time, seed):
        """Returns (tokens, weights, what became of it, as a field of `Lost`)."""
        chat, where, longest, what = self.chat(member), member.rows[i].where, self.cfg.seq_len + 1, ""
        example = member.example(i, time, seed)
        ids, weights = chat.encode(example.messages, where)
        while _used(weights) > longest and example.shots:
            example, what = member.example(i, time, seed, example.shots - 1), "shortened"
            ids, weights = chat.encode(example.messages, where)
        used = _used(weights)  # what follows the last learned token teaches nothing
        if used > longest:
            if self.cfg.too_long == "drop" or not any(weights[1:longest]):
                return None, None, "dropped"
            used, what = longest, "truncated"
        return np.array(ids[:used], np.int32), np.array(weights[:used], np.uint8), what


def _used(weights: list[int]) -> int:
    return len(weights) - weights[::-1].index(1)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Instruction data, read, checked and ready to be encoded."""

    instructions: Instructions
    encoder: Encoder
    pad_id: int
    token_bytes_V: np.ndarray


def prepare(cfg: InstructionData, tokenizer: Tokenizer, *, log=print) -> Prepared:
    """Returns all that the inputs below need; raises UserError for what is wrong in settings or files."""
    encoder = Encoder(cfg, tokenizer)
    instructions = read_instructions(cfg, log)
    for member in [*instructions.train, *instructions.validation, *instructions.unseen]:
        encoder.chat(member)  # a template that does not go with the tokenizer is told before anything is encoded
    return Prepared(instructions, encoder, tokenizer.pad_id, tokenizer.token_bytes())


def encode_all(encoder: Encoder, members: list[Member], order, seed: int, lost: dict[str, Lost]) -> Examples:
    """Returns the examples of an order, without those that are dropped."""
    arrays = []
    for m, i, time in zip(*(a.tolist() for a in order), strict=True):
        found = encoder.encode(members[m], i, time, seed, lost.setdefault(members[m].name, Lost()))
        if found is not None:
            arrays.append(found)
    if not arrays:
        return Examples(np.empty(0, np.int32), np.empty(0, np.uint8), np.empty(0, np.int64))
    tokens, weights = (np.concatenate(parts) for parts in zip(*arrays, strict=True))
    return Examples(tokens, weights, np.cumsum([len(one) for one, _ in arrays]))
