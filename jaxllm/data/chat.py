"""Conversations as tokens: how a template writes messages, and which of the tokens the assistant has to learn.

A message is {"role": "system", "user", "assistant" or "tool", "content": text}. The weight of a token is 1 where the
assistant writes it, the token that ends its turn included, and 0 elsewhere. Control tokens are put in as ids and nothing
else becomes one: a user who types <|im_end|> has typed ten characters.

A template is data: `Template` and the six of them below. Templates in Jinja, as models of others come with: chat_jinja.py.
"""

import hashlib
import itertools
import pathlib
import re
from dataclasses import dataclass
from typing import Protocol

from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import UserError, nearest

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Turn:
    """What a template writes around one message."""

    before: str
    after: str  # an assistant's first control token here ends its turn; what follows that is not learned
    joint: str = ""  # between two messages of this role in a row, in place of `after` and `before`


@dataclass(frozen=True)
class Template:
    """How messages are written. The control tokens in its strings are those in `controls`; <bos> and <eos> are the
    tokenizer's own, whatever it calls them."""

    name: str
    controls: tuple[str, ...]
    begin: str  # in front of everything
    turns: dict[str, Turn]  # a role that is not here cannot be written
    default_system: str = ""  # where a conversation has no system message
    system_joint: str = ""  # without a system turn: between its content and the first user's, which it is put before
    trim: bool = False  # white space around contents is removed


def _headed(name: str, head: str, end: str, controls: tuple[str, ...], roles: dict[str, str], **settings) -> Template:
    """Returns a template whose turns are all alike: a head with the role's name, the content, an end."""
    return Template(name, controls, turns={r: Turn(head.format(written), end) for r, written in roles.items()}, **settings)


# jaxllm's own, of the control tokens that each of its tokenizers has; a tool speaks behind <|reserved_0|>
OWN = Template("own", ("<bos>", "<|system|>", "<|user|>", "<|assistant|>", "<|reserved_0|>", "<|end|>"), "<bos>", {
    "system": Turn("<|system|>", "<|end|>"), "user": Turn("<|user|>", "<|end|>"),
    "assistant": Turn("<|assistant|>", "<|end|>"), "tool": Turn("<|reserved_0|>", "<|end|>")})
# text and nothing around it, for base models: prompt, a line's end, answer, <eos>
PLAIN = Template("plain", ("<bos>", "<eos>"), "<bos>", {
    "system": Turn("", "\n\n"), "user": Turn("", ""), "assistant": Turn("\n", "<eos>"), "tool": Turn("\n", "")})
_IM = ("<|im_start|>", "<|im_end|>")
CHATML = _headed("chatml", "<|im_start|>{}\n", "<|im_end|>\n", _IM, {role: role for role in ROLES}, begin="")
# Qwen 2.5
QWEN = Template("qwen", _IM, "", CHATML.turns | {
    "tool": Turn("<|im_start|>user\n<tool_response>\n", "\n</tool_response><|im_end|>\n",
                 "\n</tool_response>\n<tool_response>\n")},
    default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
LLAMA3 = _headed("llama3", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>",
                 ("<bos>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
                 {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython"}, begin="<bos>", trim=True)
GEMMA = _headed("gemma", "<start_of_turn>{}\n", "<end_of_turn>\n", ("<bos>", "<start_of_turn>", "<end_of_turn>"),
                {"user": "user", "assistant": "model"}, begin="<bos>", system_joint="\n\n", trim=True)
TEMPLATES = {template.name: template for template in (OWN, PLAIN, CHATML, QWEN, LLAMA3, GEMMA)}


class Chat(Protocol):
    """A template and a tokenizer."""

    name: str
    hash: str  # of the template

    def encode(self, messages: list[dict], where: str = "") -> tuple[list[int], list[int]]:
        """Returns (ids, weights) of a conversation with at least one answer; raises UserError that begins with `where`."""

    def prompt_ids(self, messages: list[dict], where: str = "") -> list[int]:
        """Returns the ids after which the assistant writes: the conversation and what opens its next turn."""

    @property
    def end_id(self) -> int:
        """The token that ends the assistant's turn, at which sampling stops."""


def load_chat(template: str, tokenizer: Tokenizer) -> Chat:
    """Returns the chat of a template by name, or of a .jinja file or a tokenizer_config.json by path."""
    if template in TEMPLATES:
        return TemplateChat(TEMPLATES[template], tokenizer)
    if template.endswith((".jinja", ".json")):
        from jaxllm.data.chat_jinja import load_jinja

        return load_jinja(template, tokenizer)
    raise UserError(f"template {template!r}: should be {', '.join(TEMPLATES)}, or a .jinja or tokenizer_config.json file; "
                    f"{nearest(template, TEMPLATES)}")


def template_file(template: str, folder: pathlib.Path) -> str:
    """Returns a template as `load_chat` takes it; of one that is a file which is gone, the copy in a run's folder."""
    own = folder / pathlib.Path(template).name
    return str(own) if template not in TEMPLATES and not pathlib.Path(template).exists() and own.is_file() else template


class TemplateChat:
    """One of the templates above with a tokenizer that has its control tokens."""

    def __init__(self, template: Template, tokenizer: Tokenizer):
        self.name, self.template = template.name, template
        self.hash = hashlib.sha256(repr(template).encode()).hexdigest()[:16]
        self.text = TypedText(tokenizer, {c: control_id(c, tokenizer, template.name) for c in template.controls})

    @property
    def end_id(self) -> int:
        return next(piece for piece in self.text.split(self.template.turns["assistant"].after) if isinstance(piece, int))

    def encode(self, messages, where=""):
        messages = with_answer(checked(messages, where), where)
        return self.text.encode(self._pieces(messages, where), where)

    def prompt_ids(self, messages, where=""):
        pieces = self._pieces(checked_prompt(checked(messages, where), where), where)
        pieces += [(piece, 0) for piece in self.text.split(self.template.turns["assistant"].before)]
        return self.text.encode(pieces, where)[0]

    def _pieces(self, messages, where) -> list[tuple[str | int | None, int]]:
        """Returns text and control ids in order, each with its weight; None where an answer begins."""
        template = self.template
        pieces = [(piece, 0) for piece in self.text.split(template.begin)]
        messages = self._with_system(messages, where)
        for i, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role not in template.turns:
                raise UserError(f"{at(where)}message {i + 1}: template {template.name} has no {role} role")
            turn, learned = template.turns[role], int(role == "assistant" and message["weight"])
            joins = [i > 0 and messages[i - 1]["role"] == role, i + 1 < len(messages) and messages[i + 1]["role"] == role]
            if not (turn.joint and joins[0]):
                pieces += [(piece, 0) for piece in self.text.split(turn.before)]
            pieces += [(None, 0)] * (role == "assistant")
            pieces.append((content.strip() if template.trim else content, learned))
            after = self.text.split(turn.joint if turn.joint and joins[1] else turn.after)
            ends = next((n + 1 for n, piece in enumerate(after) if isinstance(piece, int)), 0)
            pieces += [(piece, learned * (n < ends)) for n, piece in enumerate(after)]
        return pieces

    def _with_system(self, messages, where):
        """Returns the messages with the system's as the template has it: its own, the default, or in the first user's."""
        template, has = self.template, messages[0]["role"] == "system"
        if not has and template.default_system:
            return [{"role": "system", "content": template.default_system, "weight": 0}, *messages]
        if not has or not template.system_joint:
            return messages
        if len(messages) == 1 or messages[1]["role"] != "user":
            raise UserError(f"{at(where)}message 1: template {template.name} has no system role and writes the system's into "
                            "the user's message after it, which is missing")
        system, user, *rest = messages
        return [user | {"content": system["content"].strip() + template.system_joint + user["content"].strip()}, *rest]


# ---------------------------------------------------------------- messages


def checked(messages, where: str) -> list[dict]:
    """Returns messages as {"role", "content", "weight"}, the content as text; raises UserError that names the message."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{at(where)}messages should be a list with at least one message, was {shown(messages)}")
    out = [_message(message, f"{at(where)}message {i}") for i, message in enumerate(messages, 1)]
    for i, message in enumerate(out[1:], 2):
        if message["role"] == "system":
            what = "a second system message" if out[0]["role"] == "system" else "a system message behind others"
            raise UserError(f"{at(where)}message {i}: {what}; there should be one at most, the first")
    return out


def _message(message, where: str) -> dict:
    if not isinstance(message, dict):
        raise UserError(f"{where}: should be {{\"role\", \"content\"}}, was {shown(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else "no text"
        raise UserError(f"{where}: role {role!r}: should be {', '.join(ROLES)}; {hint}")
    if message.get("tool_calls"):
        raise UserError(f"{where}: tool_calls are not read; should be written into the content, as the model is to write them")
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(f"{where}: content of {role} should be text, was {shown(content)}")
    if not content.strip():
        raise UserError(f"{where}: content of {role} is empty")
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise UserError(f"{where}: weight={weight!r}: should be 1, or 0 for an answer that is read but not learned")
    return {"role": role, "content": content, "weight": int(weight)}


def with_answer(messages: list[dict], where: str) -> list[dict]:
    """Returns the messages as they are; raises UserError where there is no answer to learn."""
    if not any(m["role"] == "assistant" for m in messages):
        raise UserError(f"{at(where)}no assistant's answer in {len(messages)} messages: there is nothing to learn")
    if not any(m["role"] == "assistant" and m["weight"] for m in messages):
        raise UserError(f"{at(where)}every answer in {len(messages)} messages has weight 0: there is nothing to learn")
    return messages


def checked_prompt(messages: list[dict], where: str) -> list[dict]:
    """Returns the messages as they are; raises UserError where an answer could not be the next."""
    if (role := messages[-1]["role"]) in ("assistant", "system"):
        raise UserError(f"{at(where)}message {len(messages)} is the {role}'s; a prompt should end in a user's or a tool's")
    return messages


def at(where: str) -> str:
    return f"{where}: " if where else ""


def shown(value) -> str:
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:57]}..."


# ---------------------------------------------------------------- text and control tokens


def control_id(name: str, tokenizer: Tokenizer, template: str) -> int:
    """Returns the id of a template's control token: a control token of the tokenizer, or a piece of exactly this text."""
    if name in ("<bos>", "<eos>"):
        return tokenizer.bos_id if name == "<bos>" else tokenizer.eos_id
    try:
        return tokenizer.special_id(name)
    except UserError:
        pieces = tokenizer.encode(name)  # SentencePiece has user-defined pieces, which are no control tokens (Gemma's are)
        if len(pieces) == 1:
            return pieces[0]
    raise UserError(f"template {template}: tokenizer {tokenizer.name} has no token {name!r}; template own goes with the "
                    "tokenizers that `jaxllm tokenizer` makes, plain with any") from None


class TypedText:
    """Encodes text between control tokens, so that no text becomes one."""

    def __init__(self, tokenizer: Tokenizer, controls: dict[str, int]):
        self.tokenizer, self.controls = tokenizer, controls
        special = {name: i for name, i in getattr(tokenizer, "special", {}).items() if name != "<unk>"}
        self.ids = {*controls.values(), *special.values()}
        self.names = _any_of([*controls, *special])
        self.in_template = _any_of(controls)

    def split(self, text: str) -> list[str | int]:
        """Returns a template's text with its control tokens as ids."""
        return [self.controls.get(piece, piece) for piece in self.in_template.split(text) if piece]

    def encode(self, pieces: list[tuple[str | int | None, int]], where: str) -> tuple[list[int], list[int]]:
        """Returns (ids, weights). Neighbouring texts are encoded as one, but not over a None: sampling begins there, after
        a prompt whose tokens are fixed."""
        ids, weights, text = [], [], ""
        for n, (piece, weight) in enumerate(pieces):
            if isinstance(piece, str):
                text += piece
                if n + 1 < len(pieces) and isinstance(pieces[n + 1][0], str) and pieces[n + 1][1] == weight:
                    continue
                found, text = self.typed(text, where), ""
            else:
                found = [] if piece is None else [piece]
            ids += found
            weights += [weight] * len(found)
        return ids, weights

    def typed(self, text: str, where: str = "") -> list[int]:
        """Returns the ids of text. A control token's name in it is cut, where the tokenizer would take it for the token."""
        ids = self.tokenizer.encode(text)
        if self.ids.isdisjoint(ids):
            return ids
        cuts = [0, *(found.start() + 1 for found in self.names.finditer(text)), len(text)]
        ids = [i for a, b in itertools.pairwise(cuts) for i in self.tokenizer.encode(text[a:b])]
        if not self.ids.isdisjoint(ids):
            raise UserError(f"{at(where)}the tokenizer {self.tokenizer.name} makes a control token of the text {shown(text)}")
        return ids


def _any_of(names) -> re.Pattern:
    written = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.compile(f"({written or '(?!)'})")  # (?!) is found nowhere
