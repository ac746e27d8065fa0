"""`jaxllm chat RUN`: talk to a trained model in the terminal. A base model goes on with the text so far."""

import contextlib
import dataclasses
import sys

from jaxllm.errors import UserError
from jaxllm.generate.config import ChatVerb

HELP = """/reset        forget the text so far
/more         let the model go on without new text
/set KEY=V    change a setting of the sample: temperature, top_p, max_tokens, ... (/set alone shows them)
/quit         leave, as does Ctrl-D; Ctrl-C stops an answer"""


def main(cfg: ChatVerb) -> None:
    """Reads lines and writes continuations until the input ends."""
    from jaxllm.generate.verb import load_engine

    engine, step = load_engine(cfg.run, cfg.step)
    if sys.stdin.isatty():
        import readline  # noqa: F401  line editing and history for input()

        print(f"{cfg.run}, step {step}: a base model that goes on with your text. /help for help, Ctrl-D leaves.")
    converse(engine, cfg.sample)


def converse(engine, sample) -> None:
    text, turn = "", 0
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
        if line.startswith("/") and line != "/more":
            text, sample = command(line, text, sample)
            continue
        text += "" if line == "/more" else line
        print("" if line == "/more" else line, end="", flush=True)
        text += answer(engine, text, dataclasses.replace(sample, seed=sample.seed + turn))
        turn += 1
        print()


def answer(engine, text: str, sample) -> str:
    """Streams a continuation; returns what was shown of it. Ctrl-C ends it early; a text that is too long loses its start."""
    shown: list[str] = []

    def show(row: int, piece: str) -> None:
        shown.append(piece)
        print(piece, end="", flush=True)

    ids = engine.tokenizer.encode(text)
    room = engine.cfg.max_seq_len - 1 - min(sample.max_tokens, engine.cfg.max_seq_len // 2)
    with contextlib.suppress(KeyboardInterrupt):
        engine.generate([[engine.tokenizer.bos_id, *ids[-room:]]], sample, on_text=show)
    return "".join(shown)


def command(line: str, text: str, sample):
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
    print(HELP if word == "/help" else f"unknown {word}\n{HELP}")
    return text, sample
