"""Tokenizers: text to token ids and back, exactly, for any text.

Text that a user types never becomes a control token: `encode` knows plain text only, and `<eos>` in it is five
characters. Control tokens are put between texts by id (`bos_id`, `special_id("<|user|>")`).
"""

import codecs
import difflib
import functools
import hashlib
import pathlib
import re
from typing import Protocol

import numpy as np

from jaxllm.errors import UserError

# The first ids of every tokenizer of ours, in this order. <unk> is there because SentencePiece wants one; bytes stand
# for what has no piece, so it is never used.
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
            *(f"<|reserved_{i}|>" for i in range(8)))
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


class Tokenizer(Protocol):
    name: str
    hash: str  # of all that decides what `encode` returns
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Returns the ids of plain text, without <bos> or <eos>."""

    def encode_array(self, text: str) -> np.ndarray:
        """Returns the same as int32."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, ids, *, final: bool = True) -> str:
        """Returns the text of ids; control tokens are left out.

        With final=False a character at the end whose bytes are not all there yet is left out too, so that what is
        returned stays true whatever follows: the text of a longer sequence begins with it.
        """

    def special_id(self, name: str) -> int:
        """Returns the id of a control token such as <|user|>."""

    def token_bytes(self) -> np.ndarray:
        """Returns int32 [V]: the UTF-8 bytes that each token stands for, 0 for control tokens."""


class _BytesOfIds:
    """What tokenizers share that know the bytes of each id: `bytes_V`, a list of bytes; and `special`, name to id."""

    def encode(self, text):
        return self.encode_array(text).tolist()

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids, *, final=True):
        size = self.vocab_size  # a model's vocabulary may be padded beyond the tokenizer's
        joined = b"".join([self.bytes_V[i] for i in ids if 0 <= i < size])
        return codecs.getincrementaldecoder("utf-8")("replace").decode(joined, final)

    def special_id(self, name):
        if name not in self.special:
            near = difflib.get_close_matches(name, self.special, 1)
            raise UserError(f"{self.name}: no control token {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return self.special[name]

    def token_bytes(self):
        return np.array([len(b) for b in self.bytes_V], np.int32)


class ByteTokenizer(_BytesOfIds):
    """One token a byte, after the special ones: nothing to train, and any text has a round trip."""

    name = "bytes"
    hash = "bytes-1"
    pad_id, bos_id, eos_id = 0, 1, 2
    vocab_size = len(SPECIALS) + 256
    special = {name: i for i, name in enumerate(SPECIALS)}
    bytes_V = [b""] * len(SPECIALS) + [bytes([b]) for b in range(256)]

    def encode_array(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + len(SPECIALS)


class SentencePieceTokenizer(_BytesOfIds):
    """A SentencePiece model. One trained by `jaxllm tokenizer` gives any text back exactly."""

    def __init__(self, model: bytes, name: str):
        import sentencepiece

        self.name, self.model, self.hash = name, model, hashlib.sha256(model).hexdigest()[:16]
        try:
            sp = sentencepiece.SentencePieceProcessor(model_proto=model)
            pieces = sp.id_to_piece(list(range(sp.vocab_size())))
        except (RuntimeError, OSError):
            raise UserError(f"{name}: not a SentencePiece model") from None
        self.sp, self.vocab_size = sp, sp.vocab_size()
        self.bos_id, self.eos_id = sp.bos_id(), sp.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{name}: has no <bos> or no <eos> token; train one with `jaxllm tokenizer`")
        self.pad_id = max(sp.pad_id(), 0)  # padding has no weight anywhere, so any id does
        self.special = {p: i for i, p in enumerate(pieces) if sp.is_control(i) or sp.is_unknown(i)}
        self.bytes_V = [_piece_bytes(sp, i, piece) for i, piece in enumerate(pieces)]
        self.adds_space = sp.encode("a", out_type=str)[0].startswith(SPACE)  # other people's models: "dummy prefix"
        # Where no piece goes on after a word's end, words are encoded one by one and remembered: the same ids, 5 x faster.
        self.by_words = not self.adds_space and not any(SPACE in piece.lstrip(SPACE) for piece in pieces)
        self.known_words: dict[str, bytes] = {}

    def __reduce__(self):
        return SentencePieceTokenizer, (self.model, self.name)

    def encode_array(self, text):
        if not self.by_words:
            return np.asarray(self.sp.encode(text), np.int32)
        known = self.known_words
        return np.frombuffer(b"".join([known.get(word) or self._word(word) for word in _WORD.findall(text)]), np.int32)

    def _word(self, word: str) -> bytes:
        """Returns the ids of one word as bytes of int32.

        SentencePiece writes a space as U+2581 and so takes a U+2581 in the text for a space: that character is given as
        its three bytes instead.
        """
        stretches = [self.sp.encode(stretch) for stretch in word.split(SPACE)]
        ids = stretches[0]
        for stretch in stretches[1:]:
            ids = [*ids, *self._space_mark, *stretch]
        found = np.array(ids, np.int32).tobytes()
        if len(word) <= 32 and len(self.known_words) < 500_000:
            self.known_words[word] = found
        return found

    @functools.cached_property
    def _space_mark(self) -> list[int]:
        return [self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    def decode(self, ids, *, final=True):
        text = super().decode(ids, final=final)
        return text.removeprefix(" ") if self.adds_space else text


# Spaces and what follows them; 4096 characters without a space (Chinese, base64) are cut.
_WORD = re.compile(r" *[^ ]{1,4096}| +")


def _piece_bytes(sp, i: int, piece: str) -> bytes:
    if sp.is_byte(i):
        return bytes([int(piece[3:5], 16)])  # <0x0A>
    if sp.is_control(i) or sp.is_unknown(i):
        return b""
    return piece.replace(SPACE, " ").encode()


def load_tokenizer(path: str) -> Tokenizer:
    """Returns the byte tokenizer for "bytes", else the SentencePiece model in that file."""
    if path == "bytes":
        return ByteTokenizer()
    file = pathlib.Path(path).expanduser()
    try:
        return SentencePieceTokenizer(file.read_bytes(), str(path))
    except FileNotFoundError:
        there = [p.name for p in file.parent.glob("*.model")] if file.parent.is_dir() else []
        near = difflib.get_close_matches(file.name, there, 1) or there[:1]
        hint = f"; did you mean {file.parent / near[0]}?" if near else "; train one with `jaxllm tokenizer`, or use `bytes`"
        raise UserError(f"tokenizer {path}: no such file{hint}") from None
    except OSError as e:
        raise UserError(f"tokenizer {path}: cannot be read: {e.strerror}") from None


def main(cfg) -> dict:
    """`jaxllm tokenizer CONFIG`: trains a tokenizer; returns its report."""
    from jaxllm.data.tokenizer_training import train

    return train(cfg.sources, cfg.tokenizer, seed=cfg.seed, overwrite=cfg.overwrite)
