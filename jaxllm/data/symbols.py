"""Emoji and pictures among the letters, as words: "❄" becomes "snowflake".

Names come from Python's own Unicode tables, shortened where they describe the drawing more than the thing ("heavy black
heart"). What carries meaning as it stands is left alone: currency and mathematics, arrows, © and °, box drawing, and
everything that is a letter somewhere.
"""

import functools
import itertools
import re
import unicodedata

PICTURES = "\u231a\u231b\u2328\u23cf\u23e9-\u23f3\u23f8-\u23fa\u2600-\u26ff\u2700-\u2767" \
    "\u2795-\u2797\u2b1b\u2b1c\u2b50\u2b55\U0001f000-\U0001faff"
MODIFIERS = "\ufe0e\ufe0f\u20e3\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f"  # as text or picture, keycap, skin, flag of a region
FLAG = re.compile("[\U0001f1e6-\U0001f1ff]{2}")
# one picture: a flag, or a sign with its modifiers, joined to more of them
ONE = f"(?:[\U0001f1e6-\U0001f1ff]{{2}}|[{PICTURES}][{MODIFIERS}]*(?:\u200d[{PICTURES}\u2190-\u21ff][{MODIFIERS}]*)*)"
PICTURE = re.compile(ONE)
RUN = re.compile(f"{ONE}(?:[ \u00a0]?{ONE})*[{MODIFIERS}]*")
STARS = "★☆⭐"
FENCE = re.compile("(?m)^(`{3,4})[^\n]*$")
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?:(?: {4}|\t)[^\n]*(?:\n|\Z))+")
KEYCAP = re.compile("([0-9#*])\ufe0f?\u20e3")
SHORTER = {
    "❤": "heart", "♥": "heart", "♡": "heart", "☺": "smiling face", "☹": "frowning face", "☀": "sun", "★": "star", "☆": "star",
    "⭐": "star", "✓": "check mark", "✔": "check mark", "✅": "check mark", "☑": "check mark", "✗": "cross mark",
    "✘": "cross mark", "✖": "cross mark", "❌": "cross mark", "☎": "telephone", "✆": "telephone", "✉": "envelope",
    "✂": "scissors", "✈": "airplane", "🎉": "party popper", "👍": "thumbs up", "👎": "thumbs down",
    "♯": "sharp", "♭": "flat", "♮": "natural",
    "🤣": "rolling on the floor laughing", "💩": "pile of poo",
}
DRAWING = re.compile(r"\b(?:black|white|heavy|sign|symbol|emoji component)\b")


@functools.lru_cache(maxsize=4096)
def words_of(picture: str) -> str:
    """Returns the words for one picture, "" where Unicode has none."""
    if FLAG.fullmatch(picture):
        return "flag " + "".join(chr(ord(half) - 0x1F1E6 + ord("A")) for half in picture)
    names = [SHORTER.get(c) or unicodedata.name(c, "").lower() for c in re.sub(f"[{MODIFIERS}\u200d]", "", picture)]
    shorter = (" ".join(DRAWING.sub("", name).split()) or name for name in names)
    return " ".join(name.replace("-", " ") for name in shorter if name)


def to_words(text: str, *, remove: bool = False) -> tuple[str, dict[str, int]]:
    """Returns the text with its pictures as words (or without them), and how often each was there.

    A row of the same picture is said once, a row of stars is counted. Spaces are put where a word would touch another. Code,
    fenced or indented, keeps its pictures, and so does all text those that this Python's tables do not name.
    """
    counts: dict[str, int] = {}

    def said(found: re.Match) -> str:
        signs = PICTURE.findall(found[0])
        words = [words_of(sign) for sign in signs]
        for word in words:
            counts[word or "unnamed"] = counts.get(word or "unnamed", 0) + 1
        if not remove and not any(words):
            return found[0]
        told = "" if remove else row_of(signs)
        before, after = found.string[found.start() - 1:found.start()], found.string[found.end():found.end() + 1]
        if not told:
            return " " if before.isalnum() and after.isalnum() else ""
        return (" " if before.isalnum() or before in tuple(".,!?:;)") else "") + told + (" " if after.isalnum() else "")

    def in_prose(prose: str) -> str:
        return RUN.sub(said, KEYCAP.sub(r"\1", prose) if "\u20e3" in prose else prose)

    out, at = [], 0
    for start, end in code_spans(text):
        out += [in_prose(text[at:start]), text[start:end]]
        at = end
    return "".join(out) + in_prose(text[at:]), counts


def row_of(signs: list[str]) -> str:
    """Returns the words for pictures in a row: "3 of 5 stars", "party popper thumbs up"."""
    told: list[str] = []
    for stars, group in itertools.groupby(signs, key=lambda sign: sign[0] in STARS):
        row = list(group)
        n, empty = len(row), sum(sign[0] == "☆" for sign in row)
        if stars and n > 1 and empty < n:
            told.append(f"{n - empty} of {n} stars" if empty else f"{n} stars")
        else:
            told += [words_of(sign) or sign for sign in row]
    return " ".join(w for i, w in enumerate(told) if i == 0 or w != told[i - 1])


def code_spans(text: str) -> list[tuple[int, int]]:
    """Returns where code begins and ends: between ``` lines, and indented after an empty line, in order."""
    spans, opened = [], None
    for line in FENCE.finditer(text) if "```" in text else ():
        if opened is None:
            opened = line
        elif line[0].rstrip() == opened[1]:
            spans.append((opened.start(), line.end()))
            opened = None
    if "\n\n    " in text or "\n\n\t" in text or text[:1] in ("\t", " "):
        fenced, at = spans, 0
        spans = []
        for start, end in [*fenced, (len(text), len(text))]:
            spans += [found.span() for found in INDENTED.finditer(text, at, start)] + [(start, end)]
            at = end
    return spans
