"""A text as a row of 64-bit hashes, one a word, and hashes of windows over such rows. Vectorised: no loop over words.

A word is a run of letters, digits and marks, whatever its case; all else only separates. In scripts that are written
without spaces (Han, kana, Thai, Lao, Tibetan, Burmese, Khmer) every character is a word of its own.

A hash of a window is a difference of two prefix sums: with r odd, sum(x_i r^i) over i in [a, b), times r^-a, is the same
wherever the window stands (all modulo 2^64).

C characters, W words
"""

import functools
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PIECE = 1 << 15  # characters that are handled at once: the arrays of a piece stay in the processor's cache
LIMIT = 0x33480  # no letter of Unicode 17 stands above
SINGLE = np.uint32(1 << 31)  # marks a character that is a word of its own
ROOT = 0x9E3779B97F4A7C15  # r
UNSPACED = ((0x0E00, 0x0F00), (0x0F00, 0x10A0), (0x1780, 0x1800), (0x1950, 0x19E0), (0x3040, 0x3100), (0x31F0, 0x3200),
            (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0xFF66, 0xFFA0), (0x1B000, 0x1B170), (0x20000, LIMIT))


class Units(NamedTuple):
    hash_W: np.ndarray  # uint64
    start_W: np.ndarray  # int64: characters of the text
    end_W: np.ndarray


@functools.cache
def folding() -> np.ndarray:
    """Returns, by code point, the lower-case one (SINGLE set where it is a word by itself), 0 for what separates."""
    table = np.zeros(LIMIT + 1, np.uint32)
    for code in range(LIMIT):
        if unicodedata.category(chr(code))[0] in "LNM":
            lower = chr(code).lower()
            table[code] = ord(lower) if len(lower) == 1 else code
    for first, last in UNSPACED:
        table[first:last] |= np.where(table[first:last] > 0, SINGLE, 0).astype(np.uint32)
    return table


@functools.cache
def _ascii_folding() -> bytes:
    return bytes(chr(code).lower().encode()[0] if code < 128 and chr(code).isalnum() else 0 for code in range(256))


@functools.cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """Returns r^i and r^-i for i up to PIECE."""
    both = []
    for base in (ROOT, pow(ROOT, -1, 1 << 64)):
        powers = np.ones(PIECE + 1, np.uint64)
        powers[1:] = base
        both.append(np.cumprod(powers))  # wraps around, as meant
    return both[0], both[1]


def mix(x: np.ndarray) -> np.ndarray:
    """Returns 64-bit hashes in which every bit depends on every bit of `x` (Stafford's variant 13 of the Murmur3 finaliser)."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def fold(text: str) -> np.ndarray:
    """Returns a text's characters folded: uint8 or uint32, 0 for what separates words."""
    if text.isascii():
        return np.frombuffer(text.encode().translate(_ascii_folding()), np.uint8)
    return folding().take(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32), mode="clip")


def units(text: str) -> Units:
    """Returns the words of a text: their hashes, and where they begin and end."""
    pieces, at = [], 0
    while at < len(text):
        folded_C = fold(text[at : at + PIECE])
        first_W, last_W = _bounds(folded_C)
        cut = len(folded_C)
        if at + cut < len(text) and first_W.size > 1 and last_W[-1] == cut:  # the last word may go on in the next piece
            cut, first_W, last_W = int(first_W[-1]), first_W[:-1], last_W[:-1]
        pieces.append(Units(_hashes(folded_C, first_W, last_W), first_W + at, last_W + at))
        at += cut
    if len(pieces) == 1:
        return pieces[0]
    empty = Units(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64))
    return Units(*(np.concatenate(arrays) for arrays in zip(empty, *pieces, strict=True)))


def units_of_each(texts: Sequence[str]) -> list[Units]:
    """Returns the words of each text; faster than one by one where texts are short."""
    found = units("\n".join(texts))
    begins = np.concatenate([[0], np.cumsum([len(text) + 1 for text in texts], dtype=np.int64)])
    cuts = np.searchsorted(found.start_W, begins)
    return [Units(found.hash_W[a:b], found.start_W[a:b] - begin, found.end_W[a:b] - begin)
            for a, b, begin in zip(cuts[:-1], cuts[1:], begins[:-1], strict=True)]


def characters(text: str) -> np.ndarray:
    """Returns a hash for each character of a text's words, with one space between words that are set apart."""
    pieces, after_word = [np.zeros(0, np.uint64)], False
    for at in range(0, len(text), PIECE):
        folded_C = fold(text[at : at + PIECE])
        word_C = folded_C != 0
        keep_C = word_C.copy()
        keep_C[1:] |= word_C[:-1]  # the first separator after a word
        keep_C[0] |= after_word
        after_word = bool(word_C[-1])
        pieces.append(mix(folded_C[keep_C].astype(np.uint64) + np.uint64(ROOT)))
    return np.concatenate(pieces)


def _bounds(folded_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns where words begin and end."""
    word = np.zeros(len(folded_C) + 2, bool)
    np.not_equal(folded_C, 0, out=word[1:-1])
    if folded_C.dtype == np.uint32 and (single_C := folded_C >= SINGLE).any():
        single = np.zeros_like(word)
        single[1:-1] = single_C
        edge = ~(word[1:] & word[:-1]) | single[1:] | single[:-1]  # between a character and the one before
        return np.flatnonzero(edge[:-1] & word[1:-1]), np.flatnonzero(edge[1:] & word[1:-1]) + 1
    edges = np.flatnonzero(word[1:] != word[:-1])
    return edges[0::2], edges[1::2]


def _hashes(folded_C: np.ndarray, first_W: np.ndarray, last_W: np.ndarray) -> np.ndarray:
    power, inverse = _powers()
    total = np.zeros(len(folded_C) + 1, np.uint64)
    np.cumsum(folded_C * power[: len(folded_C)], out=total[1:])
    return mix((total[last_W] - total[first_W]) * inverse[first_W])


def of_ranges(hash_W: np.ndarray, first_N: np.ndarray, last_N: np.ndarray) -> np.ndarray:
    """Returns a hash of each range of neighbours; ranges stand in order, and none is longer than PIECE."""
    out, at = np.empty(len(first_N), np.uint64), 0
    while at < len(first_N):
        begin = int(first_N[at])
        stop = max(int(np.searchsorted(last_N, begin + PIECE, "right")), at + 1)
        out[at:stop] = _hashes(hash_W[begin : last_N[stop - 1]], first_N[at:stop] - begin, last_N[at:stop] - begin)
        at = stop
    return out


def windows(hash_W: np.ndarray, n: int) -> np.ndarray:
    """Returns a hash of every n neighbours: W - n + 1 of them, none where there are fewer than n."""
    count = max(len(hash_W) - n + 1, 0)
    if n == 1:
        return hash_W
    out, (power, inverse), step = np.empty(count, np.uint64), _powers(), PIECE - n
    for at in range(0, count, step):
        part = hash_W[at : at + step + n - 1]
        total = np.zeros(len(part) + 1, np.uint64)
        np.cumsum(part * power[: len(part)], out=total[1:])
        made = len(part) - n + 1
        out[at : at + made] = mix((total[n:] - total[:-n]) * inverse[:made])
    return out
