"""Quality filters with the rules and thresholds of three papers. Every rule is a number in the config; null turns it off.

    gopher   Rae et al. 2021, arXiv 2112.11446, appendix A.1.1: quality filtering; repetition removal with its table A1
    c4       Raffel et al. 2020, arXiv 1910.10683, section 2.2: rules for lines, which change the text, and for pages
    fineweb  Penedo et al. 2024, arXiv 2406.17557, section 3.6: three heuristics found on pages that the others kept

A word is what stands between spaces. In a text most of whose words are characters of a script without spaces (Chinese,
Japanese, Thai, …) the papers' words have no meaning: characters are counted, `characters_per_word` of them a word, n-grams
are as many characters longer, and the rules on the length, letters and stop words of words do not apply.
"""

import re
from dataclasses import dataclass, field

import numpy as np

from jaxllm.data.document import Document, Removal
from jaxllm.data.repetition import duplicated_share, repeated_lines, top_share
from jaxllm.data.words import Words, between_spaces, code_points, hash_of, is_letter, spoken

ENDS = tuple(".!?\"'”’»…。！？．」』）｡؟۔।॥։።")  # of a sentence or a quotation, over scripts
BULLETS = tuple("•‣◦▪●∙·*-–")
_SENTENCE = re.compile(r"[.!?؟।॥](?=[\"'”’»)\]]*(?:\s|$))|[。！？]")
_CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
_PARAGRAPHS = re.compile(r"\n\s*\n")


@dataclass(frozen=True, kw_only=True)
class GopherConfig:
    use: bool = True  # the rules below
    min_words: int | None = 50  # fewer: dropped
    max_words: int | None = 100_000  # more: dropped
    min_word_length: float | None = 3.0  # mean characters of a word: shorter is dropped
    max_word_length: float | None = 10.0  # longer on average: dropped
    max_symbols: float | None = 0.1  # hash signs a word, and ellipses a word
    max_bullet_lines: float | None = 0.9  # share of lines that start with a bullet point
    max_ellipsis_lines: float | None = 0.3  # share of lines that end with an ellipsis
    min_alpha_words: float | None = 0.8  # share of words with at least one letter
    min_stop_words: int | None = 2  # different ones of stop_words that occur; only where the text's language is English
    # the words that are counted
    stop_words: list[str] = field(default_factory=lambda: ["the", "be", "to", "of", "and", "that", "have", "with"])
    max_duplicate_lines: float | None = 0.3  # share of lines that occurred before
    max_duplicate_paragraphs: float | None = 0.3  # share of paragraphs that occurred before
    max_duplicate_line_characters: float | None = 0.2  # share of characters in such lines
    max_duplicate_paragraph_characters: float | None = 0.2  # and in such paragraphs
    # share of characters in the most frequent 2-, 3- and 4-gram of words; [] turns the rule off
    max_top_n_grams: list[float] = field(default_factory=lambda: [0.2, 0.18, 0.16])
    # share of characters in 5-, 6-, … 10-grams that occurred before
    max_duplicate_n_grams: list[float] = field(default_factory=lambda: [0.15, 0.14, 0.13, 0.12, 0.11, 0.1])
    characters_per_word: float = 2.0  # of scripts without spaces

    def __post_init__(self):
        for name in ("max_bullet_lines", "max_ellipsis_lines", "min_alpha_words", "max_duplicate_lines",
                     "max_duplicate_paragraphs", "max_duplicate_line_characters", "max_duplicate_paragraph_characters"):
            _check_share(f"filter.gopher.{name}", getattr(self, name))
        for name in ("max_top_n_grams", "max_duplicate_n_grams"):
            for share in getattr(self, name):
                _check_share(f"filter.gopher.{name}", share)
        for name in ("min_words", "max_words", "min_word_length", "max_word_length", "max_symbols", "min_stop_words"):
            _check_amount(f"filter.gopher.{name}", getattr(self, name))
        if not self.characters_per_word >= 1:
            raise ValueError(f"filter.gopher.characters_per_word={self.characters_per_word}: should be at least 1")


@dataclass(frozen=True, kw_only=True)
class C4Config:
    use: bool = True  # the rules below
    # drop lines that do not end in a terminal mark; off, as FineWeb (section 3.5) found that it costs 30 % of the text
    terminal_punctuation: bool = False
    min_line_words: int | None = 5  # lines of fewer words are dropped: menus; words of scripts without spaces are not counted
    max_word_length: int | None = 1000  # lines with a longer word are dropped
    javascript: bool = True  # drop lines that hold the word
    policies: bool = True  # drop lines that speak of terms of use, privacy policies and cookies
    citations: bool = True  # take out Wikipedia's [1], [edit] and [citation needed]
    lorem_ipsum: bool = True  # drop documents that hold it
    curly_bracket: bool = True  # drop documents with "{": turn this off for sources that hold code
    min_sentences: int | None = 3  # of what is left; fewer: dropped

    def __post_init__(self):
        for name in ("min_line_words", "max_word_length", "min_sentences"):
            _check_amount(f"filter.c4.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class FineWebConfig:
    use: bool = True  # the rules below
    min_ended_lines: float | None = 0.12  # share of lines that end with punctuation: this or less is dropped
    max_duplicate_line_characters: float | None = 0.1  # share of characters in repeated lines: this or more is dropped
    max_short_lines: float | None = 0.67  # share of short lines: this or more is dropped
    short_line: int = 30  # a line of fewer characters is short

    def __post_init__(self):
        for name in ("min_ended_lines", "max_duplicate_line_characters", "max_short_lines"):
            _check_share(f"filter.fineweb.{name}", getattr(self, name))
        _check_amount("filter.fineweb.short_line", self.short_line)


def _check_share(key: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{key}={value}: should be in [0, 1], or null for off")


def _check_amount(key: str, value: float | None) -> None:
    if value is not None and not value >= 0:
        raise ValueError(f"{key}={value}: should be 0 or more")


def lines_of(text: str) -> list[str]:
    """Returns the lines of a text that are not blank, without the space around them."""
    return [stripped for line in text.split("\n") if (stripped := line.strip())]


# ---------------------------------------------------------------- Gopher


class Gopher:
    def __init__(self, cfg: GopherConfig):
        self.cfg, self.stop_S = cfg, np.array([hash_of(word) for word in cfg.stop_words], np.uint64)

    def __call__(self, doc: Document) -> Removal | None:
        words, lines = between_spaces(doc.text), lines_of(doc.text)
        return self._words(doc, words) or self._lines(lines) or self._repetition(doc.text, lines, words)

    def _words(self, doc: Document, words: Words) -> Removal | None:
        cfg, n_alone, spaceless = self.cfg, int(words.alone_W.sum()), without_spaces(words)
        n_words = len(words) - n_alone + n_alone / cfg.characters_per_word
        if cfg.min_words is not None and n_words < cfg.min_words:
            return Removal("gopher.min_words", n_words)
        if cfg.max_words is not None and n_words > cfg.max_words:
            return Removal("gopher.max_words", n_words)
        if cfg.max_symbols is not None and n_words:
            for symbols in (doc.text.count("#"), doc.text.count("...") + doc.text.count("…")):
                if symbols > cfg.max_symbols * n_words:
                    return Removal("gopher.max_symbols", symbols / n_words)
        if spaceless or not n_words:
            return None
        mean = float(words.length_W.mean())
        if cfg.min_word_length is not None and mean < cfg.min_word_length:
            return Removal("gopher.min_word_length", mean)
        if cfg.max_word_length is not None and mean > cfg.max_word_length:
            return Removal("gopher.max_word_length", mean)
        if cfg.min_alpha_words is not None:
            share = alpha_words(doc.text, words) / len(words)
            if share < cfg.min_alpha_words:
                return Removal("gopher.min_alpha_words", share)
        if cfg.min_stop_words is not None and doc.meta.get("language", "en") == "en":
            start = doc.text[:2000]  # nearly always enough
            found = stop_words(spoken(start).hash_W, self.stop_S)
            if found < cfg.min_stop_words and len(start) < len(doc.text):
                found = stop_words(spoken(doc.text).hash_W, self.stop_S)
            if found < cfg.min_stop_words:
                return Removal("gopher.min_stop_words", found)
        return None

    def _lines(self, lines: list[str]) -> Removal | None:
        for rule, marks, matches in (("max_bullet_lines", BULLETS, str.startswith),
                                     ("max_ellipsis_lines", ("...", "…"), str.endswith)):
            limit, n = getattr(self.cfg, rule), sum(matches(line, marks) for line in lines)
            if limit is not None and n > limit * len(lines):
                return Removal(f"gopher.{rule}", n / len(lines))
        return None

    def _repetition(self, text: str, lines: list[str], words: Words) -> Removal | None:
        cfg = self.cfg
        paragraphs = [p.strip() for p in _PARAGRAPHS.split(text.strip())] if "\n" in text else [text]
        for kind, parts in (("line", lines), ("paragraph", paragraphs)):
            share, characters = repeated_lines(parts)
            for rule, value in ((f"max_duplicate_{kind}s", share), (f"max_duplicate_{kind}_characters", characters)):
                if (limit := getattr(cfg, rule)) is not None and value > limit:
                    return Removal(f"gopher.{rule}", value)
        length_W = words.length_W
        longer = cfg.characters_per_word if without_spaces(words) else 1
        total = max(int(length_W.sum()), 1)
        for n, limit in enumerate(cfg.max_top_n_grams, 2):
            value = top_share(words.hash_W, length_W, round(n * longer), total)
            if value > limit:
                return Removal(f"gopher.top_{n}_gram", value)
            if not value:  # no n-gram occurs twice, so no longer one does
                return None
        before = None
        for n, limit in enumerate(cfg.max_duplicate_n_grams, 5):
            value, before = duplicated_share(words.hash_W, length_W, round(n * longer), total, before)
            if value > limit:
                return Removal(f"gopher.duplicate_{n}_grams", value)
            if not value:
                return None
        return None


def without_spaces(words: Words) -> bool:
    """Returns whether most words of a text are characters of a script that writes no spaces."""
    return bool(2 * words.alone_W.sum() > len(words))


def alpha_words(text: str, words: Words) -> int:
    """Returns how many words hold a letter."""
    letters_C = is_letter()[code_points(text)]
    return int(np.logical_or.reduceat(letters_C, words.start_W).sum())  # from a word's start to the next: spaces are no letters


def stop_words(hash_W: np.ndarray, stop_S: np.ndarray) -> int:
    """Returns how many of the stop words occur."""
    return int((hash_W[:, None] == stop_S[None]).any(0).sum())


# ---------------------------------------------------------------- C4

POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


class C4:
    def __init__(self, cfg: C4Config):
        self.cfg = cfg
        self.phrases = ("javascript",) * cfg.javascript + POLICIES * cfg.policies

    def __call__(self, doc: Document) -> Removal | None:
        cfg, low = self.cfg, doc.text.lower()
        if cfg.lorem_ipsum and "lorem ipsum" in low:
            return Removal("c4.lorem_ipsum", 1)
        if cfg.curly_bracket and "{" in doc.text:
            return Removal("c4.curly_bracket", doc.text.count("{"))
        text = _CITATION.sub("", doc.text) if cfg.citations and "[" in doc.text else doc.text
        phrases = [phrase for phrase in self.phrases if phrase in low]
        kept, sentences = [], 0
        for line in text.split("\n"):
            stripped = line.strip()
            if not stripped:
                kept.append(line)  # a blank line parts paragraphs
            elif rule := self._drops(stripped, phrases):
                doc.counts[f"c4.lines.{rule}"] = doc.counts.get(f"c4.lines.{rule}", 0) + 1
            else:
                kept.append(line)
                sentences += n_sentences(stripped)
        if cfg.min_sentences is not None and sentences < cfg.min_sentences:
            return Removal("c4.min_sentences", sentences)
        if len(kept) < text.count("\n") + 1 or text is not doc.text:
            doc.text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")
        return None

    def _drops(self, line: str, phrases: list[str]) -> str | None:
        """Returns the rule by which a line goes, None where it stays."""
        cfg = self.cfg
        if cfg.terminal_punctuation and (not line.endswith(ENDS) or line.endswith(("...", "…"))):
            return "terminal_punctuation"
        if cfg.max_word_length is not None and len(line) > cfg.max_word_length:
            words = between_spaces(line)
            if words.length_W.max() > cfg.max_word_length:
                return "max_word_length"
        n = cfg.min_line_words
        if n and len(line.split(None, n - 1)) < n and (line.isascii() or not without_spaces(between_spaces(line))):
            return "min_line_words"
        if phrases and any(phrase in line.lower() for phrase in phrases):
            return "phrases"
        return None


def n_sentences(line: str) -> int:
    """Returns the sentences of a line; words after the last mark count as one."""
    n = len(_SENTENCE.findall(line))
    return n if line.rstrip("\"'”’»)]").endswith(ENDS) and n else n + 1


# ---------------------------------------------------------------- FineWeb


class FineWeb:
    def __init__(self, cfg: FineWebConfig):
        self.cfg = cfg

    def __call__(self, doc: Document) -> Removal | None:
        cfg, lines = self.cfg, lines_of(doc.text)
        n = max(len(lines), 1)
        ended = sum(line.endswith(ENDS) for line in lines) / n
        if cfg.min_ended_lines is not None and ended <= cfg.min_ended_lines:
            return Removal("fineweb.min_ended_lines", ended)
        repeated = repeated_lines(lines)[1]
        if cfg.max_duplicate_line_characters is not None and repeated >= cfg.max_duplicate_line_characters:
            return Removal("fineweb.max_duplicate_line_characters", repeated)
        short = sum(len(line) < cfg.short_line for line in lines) / n
        if cfg.max_short_lines is not None and short >= cfg.max_short_lines:
            return Removal("fineweb.max_short_lines", short)
        return None
