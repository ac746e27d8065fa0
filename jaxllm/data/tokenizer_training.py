"""Trains a SentencePiece tokenizer on a sample of text, and reports on text that it has not seen."""

import contextlib
import hashlib
import heapq
import json
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np

from jaxllm.data.config import Source, TokenizerConfig
from jaxllm.data.processes import n_cores
from jaxllm.data.progress import Progress
from jaxllm.data.read import blocks, find_files, texts, words_within
from jaxllm.data.tokenizer import SPECIALS, SentencePieceTokenizer
from jaxllm.errors import RunError, UserError, writing

SENTENCE = 4096  # characters of text that SentencePiece sees at once, line ends included
USE_BYTES = 20_000_000  # of the sample, read once more to see which pieces occur


def train(sources: dict[str, Source], cfg: TokenizerConfig, *, seed: int, overwrite: bool) -> dict:
    """Writes the model and its report; returns the report."""
    output = pathlib.Path(cfg.output).expanduser()
    if output.exists() and not overwrite:
        raise UserError(f"tokenizer.output={cfg.output}: is there already; --overwrite=true replaces it")
    if not sources:
        raise UserError("sources is empty: give at least one, e.g. --sources.books.path=books/")
    with writing(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
    seen, held_out = draw(sources, cfg, seed)
    _say(f"training {cfg.kind} with {cfg.vocab_size:,} pieces on {_mb(seen)} MB of text")
    model = _train(seen, cfg)
    tokenizer = SentencePieceTokenizer(model, str(output))
    report = {"output": str(output), "kind": cfg.kind, "vocab_size": cfg.vocab_size, "hash": tokenizer.hash, "seed": seed,
              "trained_on": {"documents": len(seen), "bytes": _bytes(seen)}, **measure(tokenizer, seen, held_out)}
    _write_whole(output.with_name(f"{output.name}.report.json"), json.dumps(report, indent=1).encode() + b"\n")
    _write_whole(output, model)  # last: where the model is, the report is
    _say(table(report))
    return report


# ---------------------------------------------------------------- sample


class Drawn(NamedTuple):
    source: str
    text: str


def draw(sources: dict[str, Source], cfg: TokenizerConfig, seed: int) -> tuple[list[Drawn], list[Drawn]]:
    """Returns (text to train on, text to report on), sampled from all documents when there are more than allowed.

    Each source gets its weight's share of `sample_bytes`; in a source each document has the same chance. The held-out
    documents are chosen by a hash of their text, so no copy of one is trained on.
    """
    total = sum(source.weight for source in sources.values())
    if not total:
        raise UserError("sources: all weights are 0")
    seen, held_out = [], []
    for name, source in sources.items():
        budget = int(cfg.sample_bytes * source.weight / total)
        keep, aside = Reservoir(budget), Reservoir(int(budget * cfg.held_out))
        for text, draw_of in _documents(name, source, seed):
            (aside if _share_of(text) < cfg.held_out else keep).add(draw_of, text)
        seen += [Drawn(name, text) for text in keep.texts()]
        held_out += [Drawn(name, text) for text in aside.texts()]
    if not seen:
        where = ", ".join(f"{name}: {source.path}" for name, source in sources.items())
        raise UserError(f"sources: no text to train on: {where}")
    return seen, held_out


class Reservoir:
    """A sample of documents in bounded memory: those whose random numbers are least, up to so many bytes."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.n_bytes, self.heap, self.n_seen = max_bytes, 0, [], 0

    def add(self, draw_of: float, text: str) -> None:
        self.n_seen += 1
        if self.n_bytes >= self.max_bytes and self.heap and draw_of >= -self.heap[0][0]:
            return
        size = len(text.encode())
        heapq.heappush(self.heap, (-draw_of, self.n_seen, size, text))
        self.n_bytes += size
        while self.n_bytes > self.max_bytes and len(self.heap) > 1:
            self.n_bytes -= heapq.heappop(self.heap)[2]

    def texts(self) -> list[str]:
        return [text for *_, text in sorted(self.heap, key=lambda entry: entry[1])]


def _documents(name: str, source: Source, seed: int):
    """Yields (text, a number in [0, 1) drawn for it) of each document of a source."""
    files = find_files(source, f"sources.{name}.path")
    progress, before, n = Progress(f"{name}: reading", sum(f.stat().st_size for f in files), _say), 0, 0
    for path in files:
        for block in blocks(path, source):
            for text, _ in texts(block, source.text_key, "replace"):
                if text:
                    n += 1
                    yield text, _unit(f"{seed}/{name}/{n}".encode())
            progress.show(before + block.position)
        before += path.stat().st_size


def _share_of(text: str) -> float:
    return _unit(text[: 1 << 16].encode())


def _unit(raw: bytes) -> float:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=7).digest(), "big") / 2.0**56  # 56 bits: never rounded up to 1


# ---------------------------------------------------------------- training


def _train(seen: list[Drawn], cfg: TokenizerConfig) -> bytes:
    """Returns a trained model. SentencePiece runs in a process of its own: it can be interrupted, and watched."""
    with tempfile.TemporaryDirectory(prefix="jaxllm-tokenizer-") as name:
        folder = pathlib.Path(name)
        with writing(folder / "sample.jsonl"), open(folder / "sample.jsonl", "w", encoding="utf-8") as file:
            for drawn in seen:
                file.writelines(json.dumps(piece) + "\n" for piece in words_within(drawn.text, SENTENCE))
        process = multiprocessing.get_context("spawn").Process(target=_child, args=(name, cfg), daemon=True)
        process.start()
        try:
            _watch(process, folder / "log", cfg)
        finally:
            process.kill()
            process.join()
        if (folder / "model").exists():
            return (folder / "model").read_bytes()
        raise _explained((folder / "error").read_text() if (folder / "error").exists() else "", process.exitcode, cfg)


def _child(folder: str, cfg: TokenizerConfig) -> None:
    """Trains; leaves `model` or `error` in the folder, and SentencePiece's own lines in `log`."""
    import sentencepiece

    os.dup2(os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT), 2)
    with open(f"{folder}/sample.jsonl", encoding="utf-8") as sample, open(f"{folder}/model.tmp", "wb") as model:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=map(json.loads, sample), model_writer=model, model_type=cfg.kind, vocab_size=cfg.vocab_size,
                character_coverage=cfg.character_coverage, num_threads=n_cores(),
                # text as it is: nothing normalised, no space added or taken away, bytes for what has no piece
                normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
                byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
                max_sentence_length=4 * SENTENCE + 4, **_special_ids())
        except (RuntimeError, OSError) as e:
            pathlib.Path(folder, "error").write_text(str(e))
            return
    pathlib.Path(folder, "model.tmp").replace(f"{folder}/model")


def _special_ids() -> dict:
    named = {f"{name}_{what}": value for i, name in enumerate(("pad", "bos", "eos", "unk"))
             for what, value in (("id", i), ("piece", SPECIALS[i]))}
    return named | {"control_symbols": list(SPECIALS[4:])}  # control: no text that is typed becomes one


def _watch(process, log: pathlib.Path, cfg: TokenizerConfig, every: float = 5.0) -> None:
    """Waits for the process; says how far it is."""
    began = said = time.perf_counter()
    while process.is_alive():
        process.join(0.2)
        now = time.perf_counter()
        if now - said > every:
            said = now
            lines = log.read_text(errors="replace")[-4000:] if log.exists() else ""
            steps = re.findall(r"merges=(\d+)|EM sub_iter=\d+ size=(\d+)", lines)
            far = f"{steps[-1][0]} of {cfg.vocab_size} merges" if steps and steps[-1][0] else (
                f"{steps[-1][1]} pieces left, to come to {cfg.vocab_size}" if steps else "counting")
            _say(f"training: {far}, {now - began:.0f} s")


def _explained(error: str, exitcode: int | None, cfg: TokenizerConfig) -> Exception:
    if high := re.search(r"too high .*?<= (\d+)", error):
        return UserError(f"tokenizer.vocab_size={cfg.vocab_size}: too large for this text; the largest possible is {high[1]}")
    if low := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return UserError(f"tokenizer.vocab_size={cfg.vocab_size}: too small; special tokens, bytes and the text's characters "
                         f"need {low[1]}, unless tokenizer.character_coverage={cfg.character_coverage} is lowered")
    if not error and exitcode and exitcode < 0:
        return RunError(f"SentencePiece was killed by signal {-exitcode} (out of memory?); "
                        f"lower tokenizer.sample_bytes={cfg.sample_bytes}")
    return RunError(f"SentencePiece failed: {' '.join(error.split()) or f'exit code {exitcode}'}")


# ---------------------------------------------------------------- report


def measure(tokenizer: SentencePieceTokenizer, seen: list[Drawn], held_out: list[Drawn]) -> dict:
    """Returns the figures of the report, on held-out text where there is some."""
    on = held_out or seen
    sp = tokenizer.sp
    is_byte_V = np.array([sp.is_byte(i) for i in range(tokenizer.vocab_size)])
    is_piece_V = np.array([sp.is_control(i) or sp.is_unknown(i) for i in range(tokenizer.vocab_size)]) == is_byte_V  # neither
    used_V = np.zeros(tokenizer.vocab_size, np.int64)
    n_tokens, n_bytes, errors = {}, {}, 0
    for source, text in on:
        ids = tokenizer.encode_array(text)
        used_V += np.bincount(ids, minlength=tokenizer.vocab_size)
        n_tokens[source] = n_tokens.get(source, 0) + len(ids)
        n_bytes[source] = n_bytes.get(source, 0) + len(text.encode())
        errors += tokenizer.decode(ids.tolist()) != text
    tokens = max(sum(n_tokens.values()), 1)
    found = {
        "measured_on": "held-out text" if held_out else "the text it was trained on (no document was held out)",
        "documents": len(on), "bytes": sum(n_bytes.values()), "tokens": tokens,
        "bytes_per_token": round(sum(n_bytes.values()) / tokens, 4),
        "bytes_per_token_by_source": {name: round(n_bytes[name] / n_tokens[name], 4) for name in n_tokens},
        "unknown_rate": float(used_V[sp.unk_id()] / tokens),
        "byte_fallback_rate": round(float(used_V[is_byte_V].sum() / tokens), 6),
        "round_trip_errors": errors,
    }
    n_read = 0
    for _, text in seen if held_out else []:
        if n_read > USE_BYTES:
            break
        n_read += len(text)
        used_V += np.bincount(tokenizer.encode_array(text), minlength=tokenizer.vocab_size)
    return found | {"pieces": int(is_piece_V.sum()), "pieces_used": int((used_V[is_piece_V] > 0).sum())}


def table(report: dict) -> str:
    """Returns the report for reading."""
    rows = [
        ("model", f"{report['output']} ({report['kind']}, {report['vocab_size']:,} tokens)"),
        ("trained on", f"{report['trained_on']['bytes'] / 1e6:,.2f} MB, {report['trained_on']['documents']:,} documents"),
        ("measured on", f"{report['measured_on']}: {report['bytes'] / 1e6:,.3f} MB, {report['documents']:,} documents"),
        ("bytes per token", f"{report['bytes_per_token']:.3f}"),
        *((f"  {name}", f"{value:.3f}") for name, value in report["bytes_per_token_by_source"].items()),
        ("unknown tokens", f"{report['unknown_rate']:.4%}"),
        ("tokens that are bytes", f"{report['byte_fallback_rate']:.4%}"),
        ("round-trip errors", f"{report['round_trip_errors']} of {report['documents']:,} documents"),
        ("pieces that occur", f"{report['pieces_used']:,} of {report['pieces']:,}"),
    ]
    return "\n".join(f"{name:<22} {value}" for name, value in rows)


def _write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            fresh.write_bytes(content)
            fresh.replace(path)
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)


def _bytes(drawn: list[Drawn]) -> int:
    return sum(len(one.text.encode()) for one in drawn)


def _mb(drawn: list[Drawn]) -> str:
    return f"{_bytes(drawn) / 1e6:,.1f}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
