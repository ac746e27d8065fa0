"""Text as it was meant: wrong encodings repaired, Unicode in one form, no control characters, pictures as words.

Most text needs none of it. Each repair therefore first looks for what it could repair, and ASCII text passes with three looks.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from jaxllm.data.document import Document, Removal
from jaxllm.data.spelling import respelled
from jaxllm.data.symbols import RUN, to_words
from jaxllm.errors import UserError

LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
ESCAPES = re.compile("\x1b(?:\\[[0-?]*[ -/]*[@-~]|\\][^\x07\x1b]*(?:\x07|\x1b\\\\))")  # a terminal's colours and titles
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")
# Beyond ASCII: C1 controls, soft hyphen, invisible marks, directions, byte order marks, private use, not characters.
# Joiners (U+200C, U+200D) stay where Indic, Arabic and emoji need them, and go between ASCII letters.
INVISIBLE = re.compile("[\x80-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f"
                       "\ue000-\uf8ff\ufeff\ufff9-\ufffb\ufffe\uffff\U000f0000-\U0010ffff]|(?<=[ -~])[\u200c\u200d](?=[ -~])")
SPACES = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f]")
TRAILING, BLANK_LINES = re.compile(r"(?<![ \t])[ \t]+(?=\n|\Z)"), re.compile(r"\n{4,}")
# Letters that some typeset text has glued or widened, and styled "𝐥𝐞𝐭𝐭𝐞𝐫𝐬" in words; single ones are mathematics.
WIDE = re.compile("[\ufb00-\ufb06\uff10-\uff19\uff21-\uff3a\uff41-\uff5a]+|[\U0001d400-\U0001d7ff]{3,}")
# UTF-8 read as Windows-1252 (Ã©, â€™), as Windows-1251 (Рѓ, СЃ) or as Mac Roman (‚Äô, √©): worth a look by ftfy.
_C1252 = "\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
MOJIBAKE = re.compile(f"[\xc2-\xdf][{_C1252}]|[\xe0-\xef][{_C1252}]{{2}}|\xf0[{_C1252}]{{3}}"
                      "|[РС][Ђ-Џђ-џ°±ІіµЃ№»ЅЎў]|‚Ä|√[©®†º≥±≤]")
# Latin letters and those of other scripts that look the same.
CYRILLIC = dict(zip("АВЕКМНОРСТХаеорсухіјѕ", "ABEKMHOPCTXaeopcyxijs", strict=True))
GREEK = dict(zip("ΑΒΕΖΗΙΚΜΝΟΡΤΥΧο", "ABEZHIKMNOPTYXo", strict=True))
TO_LATIN = str.maketrans(CYRILLIC | GREEK)
TO_CYRILLIC = str.maketrans({latin: cyrillic for cyrillic, latin in CYRILLIC.items() if cyrillic not in "іјѕ"})
MIXED = re.compile("[A-Za-z][\u0370-\u03ff\u0400-\u04ff]|[\u0370-\u03ff\u0400-\u04ff][A-Za-z]")
WORD = re.compile("[A-Za-z\u00c0-\u024f\u0370-\u03ff\u0400-\u04ff]+")


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    encoding: bool = True  # repair text that was decoded with the wrong encoding ("schÃ¶n")
    normalize: Literal["NFC", "NFKC", "none"] = "NFC"  # Unicode's form; NFKC also rewrites ½, ² and full-width punctuation
    symbols: Literal["words", "remove", "keep"] = "words"  # emoji: as words (❄: snowflake), dropped, or as they are
    lookalikes: bool = True  # letters of another script within a word (Cyrillic а in "pаypal") become the word's own
    spelling: bool = False  # put frequent English misspellings right ("recieve"), never in code, names or quotes
    whitespace: bool = True  # spaces of every width become one kind; none at a line's end; at most two blank lines


class Clean:
    """Repairs a document's text in place, tallying each repair; removes nothing but what holds no text afterwards."""

    name = "clean"

    def __init__(self, cfg: CleanConfig):
        self.cfg, self.fix_encoding = cfg, None
        if cfg.encoding:
            try:
                import ftfy
            except ModuleNotFoundError:
                raise UserError("clean.encoding=true needs ftfy: pip install 'jaxllm[data]'") from None
            self.fix_encoding = ftfy.fix_encoding

    def __call__(self, doc: Document) -> Removal | None:
        text, tally = doc.text, _Tally(doc.counts)
        text = self._lines_and_controls(text, tally)
        if not text.isascii():
            text = self._beyond_ascii(text, tally)
        if self.cfg.spelling:
            text, n = respelled(text)
            if n:
                tally("spelling", n)
        if self.cfg.whitespace:
            text = TRAILING.sub("", text) if " \n" in text or "\t\n" in text or text[-1:] in (" ", "\t") else text
            text = BLANK_LINES.sub("\n\n\n", text) if "\n\n\n\n" in text else text
        if text != doc.text:
            tally("documents_changed", 1)
            doc.text = text
        return None if text and not text.isspace() else Removal("no_text", len(text))

    def _lines_and_controls(self, text: str, tally) -> str:
        if "\x1b" in text:
            text = tally.sub("escapes", ESCAPES, "", text)
        if LINE_ENDS.search(text):
            text = tally.sub("line_ends", LINE_ENDS, "\n", text)
        return tally.sub("control", CONTROL, "", text) if CONTROL.search(text) else text

    def _beyond_ascii(self, text: str, tally) -> str:
        cfg = self.cfg
        if self.fix_encoding is not None and MOJIBAKE.search(text):
            text = self._repair_encoding(text, tally)
        text = tally.sub("invisible", INVISIBLE, "", text)
        if cfg.whitespace:
            text = tally.sub("spaces", SPACES, " ", text)
        text = tally.sub("styled_letters", WIDE, lambda found: unicodedata.normalize("NFKC", found[0]), text)
        if cfg.normalize != "none" and not unicodedata.is_normalized(cfg.normalize, text):
            text = unicodedata.normalize(cfg.normalize, text)
            tally("normalized", 1)
        if cfg.lookalikes and MIXED.search(text):
            text = repair_lookalikes(text, tally)
        if cfg.symbols != "keep" and RUN.search(text):
            text, found = to_words(text, remove=cfg.symbols == "remove")
            for words, n in found.items():
                tally(f"symbol.{words}", n)
        if (n := text.count("\ufffd")):
            tally("unreadable", n)
        return text

    def _repair_encoding(self, text: str, tally) -> str:
        """Returns the text with those lines repaired that look decoded wrongly, each by itself, as pages are glued of parts."""
        lines = text.split("\n")
        for i, line in enumerate(lines):
            if MOJIBAKE.search(line) and (repaired := self.fix_encoding(line)) != line:
                lines[i] = repaired
                tally("encoding", 1)
        return "\n".join(lines)


class _Tally:
    """Adds to a document's counts under the stage's name."""

    def __init__(self, counts: dict):
        self.counts = counts

    def __call__(self, what: str, n: int) -> None:
        self.counts[f"clean.{what}"] = self.counts.get(f"clean.{what}", 0) + n

    def sub(self, what: str, pattern: re.Pattern, becomes, text: str) -> str:
        text, n = pattern.subn(becomes, text)
        if n:
            self(what, n)
        return text


def repair_lookalikes(text: str, tally) -> str:
    """Returns the text with words of one script where a few letters are another's that look the same.

    A word changes only if it then is of one script: "μm", "Δx" and "Яndex" stay, "pаypal" (Cyrillic а) does not.
    """
    def repaired(found: re.Match) -> str:
        word = found[0]
        if not MIXED.search(word):
            return word
        tables = (TO_LATIN, TO_CYRILLIC)
        for table in tables if 2 * sum(c < "\u0250" for c in word) >= len(word) else reversed(tables):
            becomes = word.translate(table)
            if len({"latin" if c < "\u0250" else "greek" if c < "\u0400" else "cyrillic" for c in becomes}) == 1:
                break
        else:
            return word
        tally("lookalikes", 1)
        return becomes

    return WORD.sub(repaired, text)
