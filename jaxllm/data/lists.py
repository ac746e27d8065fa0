"""Block lists: hosts and words of URLs, and words of texts, out of plain text files of the user's.

A file holds an entry a line; blank lines and lines that start with # are passed over. Nothing is blocked but by a list
that the config names. Penedo et al. 2023 (RefinedWeb, arXiv 2306.01116, section 3.1) drop by URL before anything is read.
"""

import pathlib
import re
import urllib.parse
from dataclasses import dataclass, field

import numpy as np

from jaxllm.data.document import Document, Removal
from jaxllm.data.words import Words, spoken
from jaxllm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ListsConfig:
    hosts: list[str] = field(default_factory=list)  # files of hosts, e.g. example.com, which stands for its subdomains too
    url_words: list[str] = field(default_factory=list)  # files of words that a URL must not hold, as whole words
    url_key: str = "url"  # where a document's metadata has its URL
    words: list[str] = field(default_factory=list)  # files of words and phrases that a text must not hold too often
    # listed words a thousand words of text: more are dropped; 0: one drops, as C4 does, which loses what minorities write
    # about themselves (Dodge et al. 2021, arXiv 2104.08758, section 5.3)
    max_per_thousand: float = 5.0

    def __post_init__(self):
        if self.max_per_thousand < 0:
            raise ValueError(f"filter.lists.max_per_thousand={self.max_per_thousand}: should be 0 or more")


class Lists:
    """Drops documents by their URL, and by how many listed words they hold."""

    def __init__(self, cfg: ListsConfig):
        self.cfg = cfg
        hosts = [host for path in cfg.hosts for host in entries(path, "filter.lists.hosts")]
        self.hosts = frozenset(host.lower().removeprefix("www.") for host in hosts)
        self.url_words = frozenset(word.lower() for path in cfg.url_words for word in entries(path, "filter.lists.url_words"))
        self.words = Phrases([word for path in cfg.words for word in entries(path, "filter.lists.words")])

    def __call__(self, doc: Document) -> Removal | None:
        if (self.hosts or self.url_words) and (url := doc.meta.get(self.cfg.url_key)):
            if host := blocked_host(str(url), self.hosts):
                return Removal("lists.host", host)
            if found := sorted(self.url_words.intersection(re.split(r"[\W_]+", urllib.parse.unquote(str(url)).lower()))):
                return Removal("lists.url_word", found[0])
        if self.words:
            words = spoken(doc.text)
            found = len(self.words.find(words))
            doc.counts["lists.words"] = found
            per_thousand = 1000 * found / max(len(words), 1)
            if found and per_thousand > self.cfg.max_per_thousand:
                return Removal("lists.words", per_thousand)
        return None


def blocked_host(url: str, hosts: frozenset[str]) -> str | None:
    """Returns the listed host that a URL's host is or lies under."""
    try:
        host = urllib.parse.urlsplit(url if "//" in url else f"//{url}").hostname or ""
    except ValueError:  # e.g. half an IPv6 address
        return None
    parts = host.rstrip(".").split(".")
    return next((tail for i in range(len(parts)) if (tail := ".".join(parts[i:])) in hosts), None)


def entries(path: str, key: str) -> list[str]:
    """Returns the entries of a list; raises UserError, naming the setting `key`, where it cannot be read or is empty."""
    try:
        lines = pathlib.Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{key}={path}: cannot be read: {getattr(e, 'strerror', None) or e}; should be a text file, "
                        "an entry a line") from None
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise UserError(f"{key}={path}: holds no entry; should be a text file, an entry a line")
    return found


class Phrases:
    """A list of words and phrases that is looked up in all of a text at once, in any case."""

    def __init__(self, listed: list[str]):
        self.by_first: dict[int, set[tuple[int, ...]]] = {}  # phrases as hashes of their words, by the first
        for phrase in listed:
            if hashes := tuple(spoken(phrase).hash_W.tolist()):
                self.by_first.setdefault(hashes[0], set()).add(hashes)
        self.maybe = np.zeros(1 << 16, bool)  # whether a word whose hash has these first bits starts a phrase: few do
        self.maybe[[first >> 48 for first in self.by_first]] = True

    def __bool__(self) -> bool:
        return bool(self.by_first)

    def find(self, words: Words) -> list[tuple[int, int]]:
        """Returns (first word, word after the last) of every listed phrase in a text."""
        found = []
        for i in self.maybe[words.hash_W >> np.uint64(48)].nonzero()[0].tolist():
            for phrase in self.by_first.get(int(words.hash_W[i]), ()):
                if len(phrase) == 1 or tuple(words.hash_W[i:i + len(phrase)].tolist()) == phrase:
                    found.append((i, i + len(phrase)))
        return sorted(found)
