"""Emoji and pictures among the letters, as words: "❄" becomes "snowflake".

Names come from Python's own Unicode tables, shortened where they describe the drawing more than the thing ("heavy black
heart"). What carries meaning as it stands is left alone: currency and mathematics, arrows, © and °, box drawing, and
everything that is a letter somewhere.
"""

import functools
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
KEYCAP = re.compile("([0-9#*])\ufe0f?\u20e3")
SHORTER = {
    "❤": "heart", "♥": "heart", "♡": "heart", "☺": "smiling face", "☹": "frowning face", "☀": "sun", "★": "star", "☆": "star",
    "⭐": "star", "✓": "check mark", "✔": "check mark", "✅": "check mark", "☑": "check mark", "✗": "cross mark",
    "✘": "cross mark", "✖": "cross mark", "❌": "cross mark", "☎": "telephone", "✆": "telephone", "✉": "envelope",
    "✂": "scissors", "✈": "airplane", "🎉": "party popper", "👍": "thumbs up", "👎": "thumbs down",
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

    A row of the same picture is said once. Spaces are put where a word would touch another.
    """
    counts: dict[str, int] = {}

    def said(found: re.Match) -> str:
        words = [words_of(picture) for picture in PICTURE.findall(found[0])]
        for word in words:
            counts[word or "unnamed"] = counts.get(word or "unnamed", 0) + 1
        told = "" if remove else " ".join(w for i, w in enumerate(words) if w and (i == 0 or w != words[i - 1]))
        before, after = text[found.start() - 1:found.start()], text[found.end():found.end() + 1]
        if not told:
            return " " if before.isalnum() and after.isalnum() else ""
        return (" " if before.isalnum() or before in tuple(".,!?:;)") else "") + told + (" " if after.isalnum() else "")

    text = KEYCAP.sub(r"\1", text) if "\u20e3" in text else text
    return RUN.sub(said, text), counts
