"""Chat templates in Jinja, as models in the Hugging Face format come with: a .jinja file, or a tokenizer_config.json.

A template makes one text of all messages, in which control tokens are text too. So that none that a user typed becomes
one, a mark is put into every such name in the contents before, and taken out again when the text has been cut at its
control tokens. What the assistant writes stands in {% generation %} … {% endgeneration %}, or, in templates without, is
what the text gains over that of the messages before with the generation prompt.
"""

import functools
import hashlib
import json
import pathlib
import re

from jaxllm.data.chat import TypedText, at, checked, checked_prompt, control_id, shown, with_answer
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import UserError, nearest

MARKS = "\U0010fff0\U0010fff1\U0010fff2"  # a name that was typed; an answer begins; it ends (others where a text has these)
LOOKS_LIKE_CONTROL = re.compile(r"<\|\w+\|>|<(?:start|end)_of_\w+>")


def load_jinja(path: str, tokenizer: Tokenizer) -> "JinjaChat":
    """Returns the chat of a .jinja file, or of the chat_template in a tokenizer_config.json."""
    file = pathlib.Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        there = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(f"template {path}: no such file; {nearest(file.name, there)}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"template {path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if path.endswith(".jinja"):
        beside = file.with_name("tokenizer_config.json")
        return JinjaChat(text, tokenizer, path, _config(beside.read_text(encoding="utf-8"), beside) if beside.is_file() else {})
    config = _config(text, path)
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    if not isinstance(template, str):
        raise UserError(f"template {path}: holds no chat_template; should be a text, or a list with one named default")
    return JinjaChat(template, tokenizer, path, config)


def _config(text: str, path) -> dict:
    try:
        config = json.loads(text)
    except ValueError as e:
        raise UserError(f"template {path}: not valid JSON: {e}") from None
    if not isinstance(config, dict):
        raise UserError(f"template {path}: should hold an object, found {shown(config)}")
    return config


class JinjaChat:
    """A Jinja template with a tokenizer: the same interface as chat.TemplateChat."""

    def __init__(self, source: str, tokenizer: Tokenizer, name: str = "jinja", config: dict | None = None):
        self.name, self.source, config = name, source, config or {}
        self.hash = hashlib.sha256(source.encode()).hexdigest()[:16]
        special = {token: i for token, i in getattr(tokenizer, "special", {}).items() if token != "<unk>"}
        written = {i: token for token, i in special.items()}
        bos = _token(config.get("bos_token")) or written.get(tokenizer.bos_id, "<bos>")
        eos = _token(config.get("eos_token")) or written.get(tokenizer.eos_id, "<eos>")
        controls = {bos: tokenizer.bos_id, eos: tokenizer.eos_id} | special
        for token in sorted(_control_names(config) | set(LOOKS_LIKE_CONTROL.findall(source))):
            try:
                controls.setdefault(token, control_id(token, tokenizer, name))
            except UserError:
                if token in source and token not in controls:  # one that is never written may be missing
                    raise
        self.text = TypedText(tokenizer, controls)
        self.variables = {"bos_token": bos, "eos_token": eos, "tools": None, "documents": None}
        self.marks_answers = re.search(r"\{%[-+]?\s*generation\b", source) is not None
        self.compiled = {MARKS: _compile(source, MARKS, name)}

    @functools.cached_property
    def end_id(self) -> int:
        ids, weights = self.encode([{"role": "user", "content": "a"}, PROBE])
        last = max(i for i, weight in enumerate(weights) if weight)
        if ids[last] not in self.text.ids:
            raise UserError(f"template {self.name}: no control token ends the assistant's turn, so sampling would not stop")
        return ids[last]

    def encode(self, messages, where=""):
        messages = with_answer(checked(messages, where), where)
        marks = _free_marks(messages)
        return self._encode(messages, self._render(messages, marks, where), marks, where)

    def prompt_ids(self, messages, where=""):
        messages = checked_prompt(checked(messages, where), where)
        marks = _free_marks(messages)
        prompt = self._render(messages, marks, where, prompt=True)
        self._check_prompt(prompt, [*messages, PROBE], marks, where)
        return self._encode(messages, prompt, marks, where)[0]

    def _encode(self, messages, text: str, marks: str, where):
        """Returns (ids, weights) of a text that was made of messages."""
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if self.marks_answers:
            text, spans = _marked(text, marks)
            if len(spans) != len(answers):
                raise UserError(f"{at(where)}template {self.name}: has {{% generation %}} around {len(spans)} of "
                                f"{len(answers)} answers")
        else:
            spans = [self._gained(text, messages, i, marks, where) for i in answers]
        pieces, done = [], 0
        for (begin, end), i in zip(spans, answers, strict=True):
            pieces += [*self._cut(text[done:begin], 0, marks), (None, 0)]
            pieces += [*self._cut(text[begin:end], messages[i].get("weight", 1), marks), (None, 0)]
            done = end
        return self.text.encode([*pieces, *self._cut(text[done:], 0, marks)], where)

    def _cut(self, text: str, weight: int, marks: str):
        pieces = [piece if isinstance(piece, int) else piece.replace(marks[0], "") for piece in self.text.split(text)]
        return [(piece, weight) for piece in pieces]

    def _gained(self, text: str, messages, i: int, marks: str, where) -> tuple[int, int]:
        """Returns where in the text answer i stands: from the end of its prompt to the token that ends its turn."""
        if i == 0:
            raise UserError(f"{at(where)}message 1: is the assistant's; template {self.name} needs a message before it")
        prompt = self._render(messages[:i], marks, where, prompt=True)
        upto = self._render(messages[: i + 1], marks, where)
        self._check_prompt(prompt, messages[: i + 1], marks, where)
        if not text.startswith(prompt) or not text.startswith(upto):
            raise UserError(f"{at(where)}message {i + 1}: template {self.name} writes it otherwise when others follow, so "
                            "what is learned would not be what is sampled; put {% generation %} around its answers")
        ends = [found.end() for found in self.text.in_template.finditer(upto, len(prompt))]
        return len(prompt), ends[-1] if ends else len(upto)

    def _check_prompt(self, prompt: str, messages, marks: str, where) -> None:
        """Raises UserError where the template does not open the turn of the last message when it is asked to."""
        if prompt != self._render(messages[:-1], marks, where):
            return
        text, _ = _marked(self._render(messages, marks, where), marks)
        opened = text[len(_marked(prompt, marks)[0]) :]
        opening = opened.partition(self._protected(messages[-1]["content"].strip(), marks))[0].replace(marks[0], "")
        if opening.strip():  # without: turns that need no opening, as those of [INST] … [/INST]
            raise UserError(f"{at(where)}template {self.name}: has no generation prompt: add_generation_prompt=true adds "
                            f"nothing, yet {shown(opening)} stands before the answer")

    def _render(self, messages, marks: str, where, *, prompt: bool = False) -> str:
        import jinja2

        if marks not in self.compiled:
            self.compiled[marks] = _compile(self.source, marks, self.name)
        given = [{"role": m["role"], "content": self._protected(m["content"], marks)} for m in messages]
        try:
            return self.compiled[marks].render(messages=given, add_generation_prompt=prompt, **self.variables)
        except jinja2.TemplateError as e:
            raise UserError(f"{at(where)}template {self.name}: {' '.join(str(e).split())}") from None
        except Exception as e:  # a template is the user's program
            raise UserError(f"{at(where)}template {self.name}: {type(e).__name__}: {' '.join(str(e).split())}") from None

    def _protected(self, content: str, marks: str) -> str:
        """Returns a content with a mark in every control token's name."""
        while found := self.text.names.search(content):
            content = f"{content[: found.start() + 1]}{marks[0]}{content[found.start() + 1 :]}"
        return content


PROBE = {"role": "assistant", "content": "b"}


def _control_names(config: dict) -> set[str]:
    """Returns the control tokens that a tokenizer_config.json names."""
    added = config.get("added_tokens_decoder") or {}
    names = [_token(token) for token in added.values() if not isinstance(token, dict) or token.get("special", True)]
    names += [_token(config.get(f"{kind}_token")) for kind in ("bos", "eos", "pad")]
    return {name for name in [*names, *map(_token, config.get("additional_special_tokens") or [])] if name}


def _token(token) -> str | None:
    """Returns a token's text; it is given as text, or as an object that holds it."""
    return token.get("content") if isinstance(token, dict) else token


def _compile(source: str, marks: str, name: str):
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ModuleNotFoundError:
        raise UserError(f"template {name}: needs jinja2: pip install 'jaxllm[chat]'") from None

    class Generation(jinja2.ext.Extension):
        """{% generation %}: puts marks around what it holds."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line) for mark in marks[1:])
            return [begin, *body, end]

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    # As Hugging Face renders them, but without strftime_now: a date would make the tokens others each day.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as e:
        raise UserError(f"template {name}: line {e.lineno}: {e.message}") from None


def _free_marks(messages) -> str:
    """Returns three characters of private use that no content holds."""
    contents = "".join(m["content"] for m in messages)
    if not any(mark in contents for mark in MARKS):
        return MARKS
    return "".join([c for c in map(chr, range(0xF0000, 0xFFFFD)) if c not in contents][:3])


def _marked(text: str, marks: str) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text without the marks of answers, and where these begin and end in it."""
    spans, out = [], ""
    for n, part in enumerate(re.split(f"[{marks[1:]}]", text)):
        if n % 2:
            spans.append((len(out), len(out) + len(part)))
        out += part
    return out, spans
