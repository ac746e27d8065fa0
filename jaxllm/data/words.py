"""Words of a text as arrays: where each starts and ends, and a 64-bit hash of it. Filters and classifiers count with these.

    C code points of a text, W its words, G its n-grams

A character of a script that writes no spaces (Chinese, Japanese, Thai, …) is a word by itself.
"""

import functools
import sys
import unicodedata
from typing import NamedTuple

import numpy as np

# a code point is not part of a word; part of one; a word by itself; part of the word before it; part of one inside it only
OTHER, LETTER, ALONE, MARK, INSIDE = range(5)
# Unicode blocks of scripts without spaces: Thai and Lao, Myanmar, Khmer, kana, Han (and its extensions)
WITHOUT_SPACES = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3041, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF),
                  (0x4E00, 0x9FFF), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F), (0xF900, 0xFAFF), (0xFF66, 0xFF9D), (0x20000, 0x323AF))
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_MIX = np.uint64(0xBF58476D1CE4E5B9)


class Words(NamedTuple):
    start_W: np.ndarray  # first character of each word
    end_W: np.ndarray  # the one after its last
    hash_W: np.ndarray  # uint64: equal words have equal hashes; others differ but for a chance of 2^-64 a pair
    alone_W: np.ndarray  # whether it is a character of a script without spaces

    def __len__(self) -> int:
        return len(self.start_W)

    @property
    def length_W(self) -> np.ndarray:
        return self.end_W - self.start_W


def code_points(text: str) -> np.ndarray:
    """Returns a text's characters as uint32; half characters (surrogates) as they stand."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@functools.lru_cache(maxsize=4)  # stages that follow one another ask for the same text
def spoken(text: str) -> Words:
    """Returns the runs of letters and digits of a text in lower case, apostrophes inside them included."""
    return split(_lower()[code_points(text)], _letters())


def hash_of(word: str) -> int:
    """Returns the hash that `spoken` gives a word."""
    return int(spoken(word).hash_W[0])


@functools.lru_cache(maxsize=2)
def between_spaces(text: str) -> Words:
    """Returns what stands between spaces in a text as it is written: the words of the papers' filters."""
    return split(code_points(text), _visible())


def split(code_C: np.ndarray, kind_of: np.ndarray) -> Words:
    """Returns the words of a text, given each code point's kind."""
    kind_C = kind_of[code_C]
    for i in (kind_C == INSIDE).nonzero()[0].tolist():  # an apostrophe
        kind_C[i] = LETTER if 0 < i < len(kind_C) - 1 and kind_C[i - 1] == kind_C[i + 1] == LETTER else OTHER
    inside_C = kind_C != OTHER
    starts_C = inside_C.copy()
    starts_C[1:] &= (kind_C[1:] == ALONE) | ~inside_C[:-1] | ((kind_C[1:] == LETTER) & (kind_C[:-1] != LETTER))
    start_W = starts_C.nonzero()[0]
    inside_C[:-1] &= starts_C[1:] | ~inside_C[1:]
    end_W = inside_C.nonzero()[0] + 1
    return Words(start_W, end_W, _hash(code_C, start_W, end_W), kind_C[start_W] == ALONE)


def _hash(code_C: np.ndarray, start_W: np.ndarray, end_W: np.ndarray) -> np.ndarray:
    """Returns sum of code·B^i over each word, counted from the word's start, and mixed: all words at once by a prefix sum."""
    power, inverse = _powers(len(code_C))
    sum_C = np.empty(len(code_C) + 1, np.uint64)
    sum_C[0] = 0
    (code_C * power).cumsum(out=sum_C[1:])  # modulo 2^64, in which B^i has an inverse
    hash_W = (sum_C[end_W] - sum_C[start_W]) * inverse[start_W]
    return mixed(hash_W)


def mixed(hash_W: np.ndarray) -> np.ndarray:
    """Returns hashes whose every bit depends on every bit (the finaliser of SplitMix64, Steele et al. 2014)."""
    hash_W = (hash_W ^ (hash_W >> np.uint64(30))) * _MIX
    return hash_W ^ (hash_W >> np.uint64(31))


def n_grams(hash_W: np.ndarray, n: int) -> np.ndarray:
    """Returns a hash of every n words that follow one another."""
    hash_G = hash_W[: max(len(hash_W) - n + 1, 0)]
    for i in range(1, n):
        hash_G = hash_G * np.uint64(_BASE) + hash_W[i: len(hash_W) - n + 1 + i]
    return hash_G


_held = [np.ones(1, np.uint64), np.ones(1, np.uint64)]


def _powers(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns B^i and B^-i modulo 2^64 for i < n; those of the longest text so far are held."""
    if len(_held[0]) < n:
        size = max(1 << 16, 1 << (n - 1).bit_length())
        for i, base in enumerate((_BASE, pow(_BASE, -1, 1 << 64))):
            steps = np.full(size, base, np.uint64)
            steps[0] = 1
            _held[i] = np.cumprod(steps)
    return _held[0][:n], _held[1][:n]


@functools.cache
def _visible() -> np.ndarray:
    """Returns the kind of every code point where words are what stands between spaces."""
    kind = np.full(sys.maxunicode + 1, LETTER, np.uint8)
    kind[[c for c in range(0x3001) if chr(c).isspace()]] = OTHER
    for first, last in ((0x3001, 0x303F), (0xFF01, 0xFF65)):  # the punctuation of Chinese and Japanese stands between words
        kind[[c for c in range(first, last + 1) if unicodedata.category(chr(c))[0] in "PS"]] = OTHER
    return _alone(kind)


@functools.cache
def _letters() -> np.ndarray:
    """Returns the kind of every code point where words are runs of letters, marks and digits."""
    kind = np.full(sys.maxunicode + 1, OTHER, np.uint8)
    kind[[c for c in range(0x32400) if unicodedata.category(chr(c))[0] in "LMN"]] = LETTER
    kind[[ord("'"), ord("’")]] = INSIDE
    return _alone(kind)


def _alone(kind: np.ndarray) -> np.ndarray:
    for first, last in WITHOUT_SPACES:
        for c in range(first, last + 1):
            if (category := unicodedata.category(chr(c))[0]) in "LNM":
                kind[c] = MARK if category == "M" else ALONE
    return kind


@functools.cache
def _lower() -> np.ndarray:
    """Returns each code point's lower case where that is one character, so that places in a text stay what they are."""
    lower = np.arange(sys.maxunicode + 1, dtype=np.uint32)
    for c in range(0x20000):
        if len(small := chr(c).lower()) == 1:
            lower[c] = ord(small)
    return lower


@functools.cache
def is_letter() -> np.ndarray:
    """Returns whether each code point is a letter."""
    letter = np.zeros(sys.maxunicode + 1, bool)
    letter[[c for c in range(0x32400) if chr(c).isalpha()]] = True
    return letter
