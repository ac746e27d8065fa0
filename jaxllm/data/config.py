"""Settings of text sources, the tokenizer and the input of training. No jax here."""

import math
from dataclasses import dataclass, field
from typing import Literal

LEAST_VOCABULARY = 272  # special and chat tokens, and 256 bytes


@dataclass(frozen=True, kw_only=True)
class Source:
    path: str  # a .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, a folder of them, or a glob
    weight: float = 1.0  # share of rows drawn from this source, relative to the others' weights
    text_key: str = "text"  # the field of a JSON line, or the column of a Parquet file, that holds the text
    # .txt: a longer file is cut at blank lines into documents of about this many bytes; 0: one document a file;
    # not set: 8192 where `path` is one file, 0 where it is a folder or a glob
    document_bytes: int | None = None
    separator: str = ""  # .txt: documents end at this string, e.g. "\n<|endoftext|>\n", which is not part of them

    def __post_init__(self):
        if self.document_bytes and not 256 <= self.document_bytes <= 1 << 20:
            raise ValueError(f"document_bytes={self.document_bytes} of source {self.path}: should be 0, or 256 to {1 << 20}")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight={self.weight} of source {self.path}: should be 0 or more, and finite")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    sources: dict[str, Source] = field(default_factory=dict)
    tokenizer: str = "bytes"  # a SentencePiece .model file, or `bytes`: one token a byte, nothing to train
    seq_len: int = 512  # tokens a row
    validation: float = 0.01  # share of documents held out, chosen by a hash of their text
    invalid_utf8: Literal["replace", "drop", "error"] = "replace"  # what becomes of a document with bytes that are not UTF-8
    cache: str = "~/.cache/jaxllm"  # tokenised text is kept here, by a hash of what it was made from
    workers: int = 0  # processes that tokenise; 0: one a core

    def __post_init__(self):
        if self.seq_len < 2:
            raise ValueError(f"data.seq_len={self.seq_len}: should be at least 2")
        if not 0 <= self.validation < 1:
            raise ValueError(f"data.validation={self.validation}: should be in [0, 1)")
        if self.workers < 0:
            raise ValueError(f"data.workers={self.workers}: should be 0 or more")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    kind: Literal["bpe", "unigram"] = "bpe"  # how SentencePiece builds pieces
    vocab_size: int = 8192  # pieces, with the special, chat and byte ones
    character_coverage: float = 0.9995  # share of characters that get a piece; the rest becomes bytes
    # text to train on, in bytes; of more, each source gives its weight's share, each of its documents with the same chance
    sample_bytes: int = 200_000_000
    held_out: float = 0.02  # share of documents kept from training for the report
    output: str = "tokenizer.model"  # where the model goes; a .json report is written beside it

    def __post_init__(self):
        for name, ok, should in (
            ("vocab_size", self.vocab_size >= LEAST_VOCABULARY, f"at least {LEAST_VOCABULARY}, for special tokens and bytes"),
            ("character_coverage", 0 < self.character_coverage <= 1, "in (0, 1]"),
            ("sample_bytes", self.sample_bytes >= 1, "at least 1"), ("held_out", 0 <= self.held_out < 1, "in [0, 1)"),
        ):
            if not ok:
                raise ValueError(f"tokenizer.{name}={getattr(self, name)}: should be {should}")


@dataclass(frozen=True, kw_only=True)
class TokenizerVerb:
    sources: dict[str, Source] = field(default_factory=dict)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    seed: int = 0  # of the sample
    overwrite: bool = False  # replace a tokenizer that is there
