"""Pairs of words swapped in a share of the documents: what is said of one side is then said of the other as often."""

import csv
import hashlib
import pathlib

from jaxllm.data.document import Document
from jaxllm.data.words import hash_of, spoken
from jaxllm.errors import UserError

# English words for women and men that differ in nothing else. his, him and her are no pairs: see `_pronoun`
PAIRS = (("she", "he"), ("herself", "himself"), ("woman", "man"), ("women", "men"), ("girl", "boy"), ("girls", "boys"),
         ("mother", "father"), ("mothers", "fathers"), ("daughter", "son"), ("daughters", "sons"), ("sister", "brother"),
         ("sisters", "brothers"), ("wife", "husband"), ("wives", "husbands"), ("aunt", "uncle"), ("aunts", "uncles"),
         ("niece", "nephew"), ("grandmother", "grandfather"), ("mom", "dad"), ("female", "male"), ("females", "males"),
         ("lady", "gentleman"), ("ladies", "gentlemen"), ("mrs", "mr"), ("actress", "actor"), ("queen", "king"),
         ("princess", "prince"), ("waitress", "waiter"), ("bride", "groom"), ("widow", "widower"), ("hers", "his"))
# after these "her" is an object and "his" stands alone; before any other word they belong to it
_NO_NOUN = frozenset((
    "a", "an", "the", "and", "or", "but", "nor", "so", "yet", "to", "in", "on", "at", "by", "of", "for", "from", "with",
    "into", "onto", "about", "after", "before", "as", "that", "than", "then", "when", "while", "if", "because", "is",
    "was", "were", "are", "be", "been", "has", "had", "will", "would", "again", "away", "back", "down", "up", "out",
    "off", "over", "there", "here", "too", "also", "not"))


class Swap:
    """Swaps listed pairs in a document where the hash of its id says so; a word keeps its capitals."""

    def __init__(self, path: str, share: float):
        self.share, self.pronouns = share, not path
        pairs = _read(path) if path else PAIRS
        self.other = {hash_of(a): b for a, b in pairs} | {hash_of(b): a for a, b in pairs}
        self.first, self.second = (frozenset(hash_of(pair[i]) for pair in pairs) for i in (0, 1))
        if self.pronouns:
            self.her, self.his, self.him = map(hash_of, ("her", "his", "him"))
            self.first, self.second = self.first | {self.her}, self.second | {self.his, self.him}

    def __call__(self, doc: Document) -> bool:
        """Returns whether the document's text was changed."""
        if int(hashlib.sha256(doc.id.encode(errors="replace")).hexdigest()[:8], 16) >= self.share * 2**32:
            return False
        swapped = self.swapped(doc.text)
        changed, doc.text = swapped != doc.text, swapped
        return changed

    def swapped(self, text: str) -> str:
        words, out, at = spoken(text), [], 0
        bounds = list(zip(words.start_W.tolist(), words.end_W.tolist(), strict=True))
        for i, word in enumerate(words.hash_W.tolist()):
            other = self._pronoun(word, text, bounds, i) if self.pronouns else None
            if other := other or self.other.get(word):
                start, end = bounds[i]
                out += [text[at:start], like(text[start:end], other)]
                at = end
        return "".join([*out, text[at:]])

    def tally(self, text: str) -> tuple[int, int]:
        """Returns how many words of the first and of the second side a text holds."""
        found = spoken(text).hash_W.tolist()
        return sum(word in self.first for word in found), sum(word in self.second for word in found)

    def _pronoun(self, word: int, text: str, bounds: list[tuple[int, int]], i: int) -> str | None:
        """Returns what "her", "his" or "him" becomes: "her" is two words in one, told apart by what follows."""
        if word == self.him:
            return "her"
        if word not in (self.her, self.his):
            return None
        end = bounds[i][1]
        after = text[slice(*bounds[i + 1])].lower() if i + 1 < len(bounds) and text[end:bounds[i + 1][0]] == " " else ""
        belongs = bool(after) and after not in _NO_NOUN
        if word == self.her:
            return "his" if belongs else "him"
        return "her" if belongs else "hers"


def like(word: str, other: str) -> str:
    """Returns `other` with the capitals of `word`."""
    if word.isupper() and len(word) > 1:
        return other.upper()
    return other[:1].upper() + other[1:] if word[:1].isupper() else other


def _read(path: str) -> list[tuple[str, str]]:
    try:
        with open(pathlib.Path(path).expanduser(), encoding="utf-8", newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row and not row[0].startswith("#")]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"harm.pairs={path}: cannot be read: {getattr(e, 'strerror', None) or e}; "
                        "should be .csv, two words a line") from None
    seen: dict[str, str] = {}
    for n, row in enumerate(rows, 1):
        if len(row) != 2 or any(len(spoken(cell)) != 1 for cell in row):
            raise UserError(f"harm.pairs={path}: row {n} is {','.join(row)!r}; should be two words")
        for word in row:
            if seen.setdefault(word.lower(), row[0]) != row[0]:
                raise UserError(f"harm.pairs={path}: row {n}: {word!r} is in another pair already; a word has one counterpart")
    if not rows:
        raise UserError(f"harm.pairs={path}: holds no pair; should be .csv, two words a line")
    return [(a, b) for a, b in rows]
