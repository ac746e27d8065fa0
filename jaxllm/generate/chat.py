"""`jaxllm chat RUN`: talk to a trained model in the terminal. A base model goes on with the text so far; one that was tuned
on conversations answers in their template."""

import contextlib
import dataclasses
import sys

from jaxllm.errors import UserError
from jaxllm.generate.config import ChatVerb

TALK_HELP = """/reset        begin a new conversation
/system TEXT  what the system's message says, from the next conversation on (alone: nothing)
/set KEY=V    change a setting of the sample: temperature, top_p, max_tokens, ... (/set alone shows them)
/quit         leave, as does Ctrl-D; Ctrl-C stops an answer"""
HELP = """/reset        forget the text so far
/more         let the model go on without new text
/set KEY=V    change a setting of the sample: temperature, top_p, max_tokens, ... (/set alone shows them)
/quit         leave, as does Ctrl-D; Ctrl-C stops an answer"""


def main(cfg: ChatVerb) -> None:
    """Reads lines and writes continuations until the input ends."""
    from jaxllm.generate.verb import chat_of, load_engine

    engine, step = load_engine(cfg.run, cfg.step)
    chat = chat_of(cfg.run, engine.tokenizer)
    if sys.stdin.isatty():
        import readline  # noqa: F401  line editing and history for input()

        what = f"answers in the template {chat.name}" if chat else "a base model that goes on with your text"
        print(f"{cfg.run}, step {step}: {what}. /help for help, Ctrl-D leaves.")
    talk(engine, chat, cfg.sample) if chat else converse(engine, cfg.sample)


def lines():
    """Yields what is typed until the input ends."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        if line == "/quit":
            return
        yield line


def talk(engine, chat, sample) -> None:
    """Answers message by message; a conversation that becomes too long loses its first turns."""
    messages, system, turn = [], [], 0
    for line in lines():
        word, _, rest = line.partition(" ")
        if word == "/system":
            messages, system = [], [{"role": "system", "content": rest}] if rest.strip() else []
        elif word.startswith("/"):
            kept, sample = command(line, "kept", sample, TALK_HELP)
            messages = messages if kept else []
        elif line.strip():
            asked = [*messages, {"role": "user", "content": line}]
            try:
                ids, asked = fitting(engine, chat, system, asked, sample.max_tokens)
            except UserError as e:
                print(e)
                continue
            text = written(engine, ids, dataclasses.replace(sample, seed=sample.seed + turn))
            messages, turn = [*asked, {"role": "assistant", "content": text}] if text.strip() else asked[:-1], turn + 1
            print()


def fitting(engine, chat, system, messages, max_tokens: int):
    """Returns (prompt ids, the messages) without the first turns that leave no room for an answer."""
    room = engine.cfg.max_seq_len - min(max_tokens, engine.cfg.max_seq_len // 2)
    while True:
        ids = chat.prompt_ids([*system, *messages])
        if len(ids) <= room or len(messages) < 3:
            break
        messages = messages[2:]
    if len(ids) >= engine.cfg.max_seq_len:
        raise UserError(f"the message has {len(ids)} tokens with its template; the model reads fewer than "
                        f"{engine.cfg.max_seq_len}")
    return ids, messages


def converse(engine, sample) -> None:
    text, turn = "", 0
    for line in lines():
        if line.startswith("/") and line != "/more":
            text, sample = command(line, text, sample)
            continue
        text += "" if line == "/more" else line
        print("" if line == "/more" else line, end="", flush=True)
        text += answer(engine, text, dataclasses.replace(sample, seed=sample.seed + turn))
        turn += 1
        print()


def answer(engine, text: str, sample) -> str:
    """Streams a continuation; returns what was shown of it. A text that is too long loses its start."""
    ids = engine.tokenizer.encode(text)
    room = engine.cfg.max_seq_len - 1 - min(sample.max_tokens, engine.cfg.max_seq_len // 2)
    return written(engine, [engine.tokenizer.bos_id, *ids[-room:]], sample)


def written(engine, ids: list[int], sample) -> str:
    """Streams what follows a prompt; returns what was shown of it. Ctrl-C ends it early."""
    shown: list[str] = []

    def show(row: int, piece: str) -> None:
        shown.append(piece)
        print(piece, end="", flush=True)

    with contextlib.suppress(KeyboardInterrupt):
        engine.generate([ids], sample, on_text=show)
    return "".join(shown)


def command(line: str, text: str, sample, help_text: str = HELP):
    """Returns (text, sample) after a line that begins with a slash."""
    from jaxllm import config

    word, _, rest = line.partition(" ")
    if word == "/reset":
        return "", sample
    if word == "/set" and not rest:
        print("  ".join(f"{f.name}={getattr(sample, f.name)}" for f in dataclasses.fields(sample)))
        return text, sample
    if word == "/set":
        now = [f"{f.name}={getattr(sample, f.name)}" for f in dataclasses.fields(sample) if f.name != "stop"]
        try:
            changed = config.load(type(sample), None, [*now, rest.strip()])
        except UserError as e:
            print(e)
            return text, sample
        return text, dataclasses.replace(changed, stop=changed.stop or sample.stop)
    print(help_text if word == "/help" else f"unknown {word}\n{help_text}")
    return text, sample
