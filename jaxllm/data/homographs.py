"""Words that different sources use differently: "cell" of a prison, of a body, of a spreadsheet.

A word's use in a source is the distribution of the words that stand around it. Two sources' uses are compared by their
Jensen-Shannon divergence (Lin 1991), which grows for two reasons that have nothing to do with meaning. Few occurrences
differ by chance: so each source's documents are split in two halves, and what the halves of one source differ by is taken
off. Sources speak of different things, whatever the word: so a word is told only where it stands out from the other words
of the same two sources.

    S sources, W candidate words, K context words; a document is in half 0 or 1
"""

import csv
import hashlib
import pathlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jaxllm.data.counterfactual import like
from jaxllm.data.document import Document, Removal
from jaxllm.data.words import hash_of, spoken
from jaxllm.errors import UserError

Texts = Callable[[], Iterable[tuple[str, str]]]  # gives (source, text) anew at each call


@dataclass(frozen=True, kw_only=True)
class HomographsConfig:
    use: bool = False  # report words that sources use differently
    window: int = 5  # words on each side that are a word's context
    min_count: int = 50  # occurrences of a word in each of two sources, at least
    max_words: int = 2000  # the most frequent such words that are compared
    skip: int = 100  # the most frequent words of all say too little: neither compared nor context
    context_words: int = 1000  # the next most frequent ones are context
    min_excess: float = 0.03  # bits by which two sources must differ beyond their own halves
    min_standing: float = 3.0  # and how far above other words, in robust standard deviations
    rows: int = 100  # of the report
    treatment: Literal["none", "tag", "terms"] = "none"  # tag: the source in front of each document; terms: a table's words
    tag: str = "<|{source}|>"  # {source} is the source's name
    terms: str = ""  # .csv with the columns word, source, replacement, made by an expert from the report

    def __post_init__(self):
        for name in ("window", "min_count", "max_words", "context_words", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"homographs.{name}={getattr(self, name)}: should be at least 1")
        if self.treatment == "tag" and "{source}" not in self.tag:
            raise ValueError(f"homographs.tag={self.tag}: should hold {{source}}")
        if (self.treatment == "terms") != bool(self.terms):
            raise ValueError(f"homographs.treatment={self.treatment}: homographs.terms={self.terms!r}: terms need a table, "
                             "and a table treatment=terms")


class Row(NamedTuple):
    """A word that two sources use differently."""

    word: str
    source_a: str
    source_b: str
    count_a: int
    count_b: int
    divergence: float  # bits between the sources
    baseline: float  # bits between halves of the less consistent source
    excess: float  # the first less the second
    typical: float  # the median excess of all words in these two sources
    standing: float  # robust standard deviations above it
    words_a: list[str]  # context words that are most of source a's own
    words_b: list[str]
    examples_a: list[str]
    examples_b: list[str]


def report(texts: Texts, cfg: HomographsConfig) -> list[Row]:
    """Returns the words that stand out, the most different first; reads the texts twice and keeps none of them."""
    sources, counts = _count(texts)
    if len(sources) < 2:
        return []
    hash_V = np.unique(np.concatenate([hashes for hashes, _ in counts]))
    count_SV = np.zeros((len(sources), len(hash_V)), np.int64)
    for s, (hashes, n) in enumerate(counts):
        count_SV[s, np.searchsorted(hash_V, hashes)] = n
    share_V = (count_SV / np.maximum(count_SV.sum(1, keepdims=True), 1)).sum(0)  # every source says as much
    ranked_V = np.lexsort((hash_V, -share_V))[cfg.skip:]
    context_K = np.sort(hash_V[ranked_V[:cfg.context_words]])
    second_V = np.sort(count_SV, axis=0)[-2]
    frequent_V = [v for v in ranked_V if second_V[v] >= cfg.min_count][:cfg.max_words]
    word_W = np.sort(hash_V[frequent_V])
    if not len(word_W) or not len(context_K):
        return []
    seen = _Contexts(sources, word_W, context_K, cfg.window)
    for source, text in texts():
        seen.add(source, text)
    seen.count()
    count_SW = count_SV[:, np.searchsorted(hash_V, word_W)]
    rows = [row for a in range(len(sources)) for b in range(a + 1, len(sources)) for row in _compare(seen, count_SW, a, b, cfg)]
    return sorted(rows, key=lambda r: (-r.standing, r.word, r.source_a, r.source_b))[:cfg.rows]


def _count(texts: Texts) -> tuple[list[str], list[tuple[np.ndarray, np.ndarray]]]:
    """Returns the sources, sorted, and each one's (word hashes, counts)."""
    held: dict[str, list] = {}
    new: dict[str, int] = {}  # words since the last sum
    for source, text in texts():
        hash_W = spoken(text).hash_W
        held.setdefault(source, []).append((hash_W, np.ones(len(hash_W), np.int64)))
        new[source] = new.get(source, 0) + len(hash_W)
        if new[source] > 1 << 20:
            held[source], new[source] = [_added(held[source])], 0
    return sorted(held), [_added(held[source]) for source in sorted(held)]


def _added(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    hashes, place = np.unique(np.concatenate([h for h, _ in parts]), return_inverse=True)
    counts = np.zeros(len(hashes), np.int64)
    np.add.at(counts, place, np.concatenate([n for _, n in parts]))
    return hashes, counts


class _Contexts:
    """How often each context word stands near each candidate, by source and half of its documents."""

    def __init__(self, sources: list[str], word_W: np.ndarray, context_K: np.ndarray, window: int):
        self.sources, self.word_W, self.context_K, self.window = sources, word_W, context_K, window
        self.count_SHWK = np.zeros((len(sources), 2, len(word_W), len(context_K)), np.int32)
        self.names: dict[int, str] = {}  # of candidates and context words
        self.unnamed_W, self.unnamed_K = np.ones(len(word_W), bool), np.ones(len(context_K), bool)
        self.examples: dict[tuple[int, int], list[str]] = {}
        self.wanted_SW = np.full((len(sources), len(word_W)), 3, np.int8)  # examples
        self.pending: dict[tuple[int, int], list] = {}  # by source and half: documents that are not added up yet
        self.n_pending = 0  # their words

    def add(self, source: str, text: str) -> None:
        words, s = spoken(text), self.sources.index(source)
        half = hashlib.sha256(text.encode(errors="replace")).digest()[0] & 1
        word_N, context_N = _places(self.word_W, words.hash_W), _places(self.context_K, words.hash_W)
        held = self.pending.setdefault((s, half), [])
        nothing = np.full(self.window, -1)  # so that documents are not each other's context
        held += [(word_N, context_N), (nothing, nothing)]
        self.n_pending += len(word_N)
        if self.n_pending > 1 << 20:
            self.count()
        new = np.flatnonzero((self.unnamed_W[word_N] & (word_N >= 0)) | (self.unnamed_K[context_N] & (context_N >= 0)))
        for i in new.tolist():
            self.names[int(words.hash_W[i])] = text[words.start_W[i]:words.end_W[i]].lower()
        self.unnamed_W[word_N[new][word_N[new] >= 0]] = self.unnamed_K[context_N[new][context_N[new] >= 0]] = False
        for i in np.flatnonzero((self.wanted_SW[s, word_N] > 0) & (word_N >= 0)).tolist():
            if self.wanted_SW[s, word_N[i]] > 0:
                self.wanted_SW[s, word_N[i]] -= 1
                first, last = max(i - 8, 0), min(i + 8, len(words) - 1)
                passage = " ".join(text[words.start_W[first]:words.end_W[last]].split())
                self.examples.setdefault((s, int(word_N[i])), []).append(passage)

    def count(self) -> None:
        """Adds up what was put by."""
        for (s, half), held in self.pending.items():
            word_N, context_N = (np.concatenate(places) for places in zip(*held, strict=True))
            at = np.flatnonzero(word_N >= 0)
            for step in (*range(-self.window, 0), *range(1, self.window + 1)):
                near = at[(at + step >= 0) & (at + step < len(word_N))]
                near = near[context_N[near + step] >= 0]
                np.add.at(self.count_SHWK[s, half], (word_N[near], context_N[near + step]), 1)
        self.pending, self.n_pending = {}, 0

    def name(self, word: np.uint64) -> str:
        return self.names[int(word)]


def _places(sorted_: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Returns where each hash stands in a sorted array, -1 where it does not."""
    at = np.minimum(np.searchsorted(sorted_, hashes), len(sorted_) - 1)
    return np.where(sorted_[at] == hashes, at, -1)


def _compare(seen: _Contexts, count_SW: np.ndarray, a: int, b: int, cfg: HomographsConfig) -> list[Row]:
    chosen = [w for w in range(len(seen.word_W)) if min(count_SW[a, w], count_SW[b, w]) >= cfg.min_count
              and seen.count_SHWK[[a, b], :, w].sum(-1).all()]  # each half has seen it
    if not chosen:
        return []
    a0, a1, b0, b1 = (_shares(seen.count_SHWK[s, half, chosen]) for s in (a, b) for half in (0, 1))
    divergence = (jensen_shannon(a0, b1) + jensen_shannon(a1, b0)) / 2
    baseline = np.maximum(jensen_shannon(a0, a1), jensen_shannon(b0, b1))
    excess = divergence - baseline
    typical = float(np.median(excess))
    # 1.4826 makes of the median deviation of a normal distribution its standard deviation
    deviation = max(1.4826 * float(np.median(abs(excess - typical))), 1e-3)
    rows = []
    for i, w in enumerate(chosen):
        standing = float(excess[i] - typical) / deviation
        if excess[i] >= cfg.min_excess and (standing >= cfg.min_standing or len(chosen) < 20):  # few words have no usual
            p, q = (a0[i] + a1[i]) / 2, (b0[i] + b1[i]) / 2
            rows.append(Row(seen.name(seen.word_W[w]), seen.sources[a], seen.sources[b],
                            int(count_SW[a, w]), int(count_SW[b, w]),
                            *(round(float(x), 4) for x in (divergence[i], baseline[i], excess[i], typical, standing)),
                            _own(seen, p, q), _own(seen, q, p), seen.examples.get((a, w), []), seen.examples.get((b, w), [])))
    return rows


def _shares(count_WK: np.ndarray) -> np.ndarray:
    return count_WK / count_WK.sum(-1, keepdims=True)


def jensen_shannon(p_WK: np.ndarray, q_WK: np.ndarray) -> np.ndarray:
    """Returns the divergence of each pair of distributions in bits: 0 for equal ones, 1 for ones that share nothing."""
    return _entropy((p_WK + q_WK) / 2) - (_entropy(p_WK) + _entropy(q_WK)) / 2


def _entropy(p_WK: np.ndarray) -> np.ndarray:
    return -(p_WK * np.log2(np.where(p_WK > 0, p_WK, 1))).sum(-1)


def _own(seen: _Contexts, p_K: np.ndarray, q_K: np.ndarray) -> list[str]:
    """Returns the context words that tell the first use from the second."""
    told_K = p_K * np.log2(np.maximum(p_K, 1e-12) / np.maximum((p_K + q_K) / 2, 1e-12))
    return [seen.name(seen.context_K[k]) for k in np.lexsort((seen.context_K, -told_K))[:6] if told_K[k] > 0]


# ---------------------------------------------------------------- treatment


class Homographs:
    """Puts a source's tag in front of its documents, or an expert's terms for words that mean another thing elsewhere."""

    name = "homographs"

    def __init__(self, cfg: HomographsConfig):
        self.cfg, self.terms = cfg, read_terms(cfg.terms) if cfg.terms else {}

    def __call__(self, doc: Document) -> Removal | None:
        if self.cfg.treatment == "tag":
            doc.text = self.cfg.tag.replace("{source}", doc.source) + doc.text
            doc.counts["homographs.tagged"] = 1
        elif self.cfg.treatment == "terms" and (terms := self.terms.get(doc.source)):
            doc.text, doc.counts["homographs.replaced"] = _replaced(doc.text, terms)
        return None


def read_terms(path: str) -> dict[str, dict[int, str]]:
    """Returns {source: {hash of a word: what stands for it}} of a table."""
    columns, out = ["word", "source", "replacement"], {}
    try:
        with open(pathlib.Path(path).expanduser(), encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if sorted(reader.fieldnames or ()) != sorted(columns):
                raise UserError(f"homographs.terms={path}: has the columns {', '.join(reader.fieldnames or ())}; "
                                f"should have {', '.join(columns)}")
            for n, row in enumerate(reader, 2):
                word, source, replacement = ((row[c] or "").strip() for c in columns)
                if len(spoken(word)) != 1 or not source or not replacement:
                    raise UserError(f"homographs.terms={path}: row {n}: should be one word, a source and "
                                    "what stands for the word there")
                if out.setdefault(source, {}).setdefault(hash_of(word), replacement) != replacement:
                    raise UserError(f"homographs.terms={path}: row {n}: {word!r} of {source} has another replacement already")
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"homographs.terms={path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    return out


def _replaced(text: str, terms: dict[int, str]) -> tuple[str, int]:
    words, out, at, n = spoken(text), [], 0, 0
    listed = np.sort(np.array(list(terms), np.uint64))
    for i in np.flatnonzero(_places(listed, words.hash_W) >= 0):
        start, end = int(words.start_W[i]), int(words.end_W[i])
        out += [text[at:start], like(text[start:end], terms[int(words.hash_W[i])])]
        at, n = end, n + 1
    return "".join([*out, text[at:]]), n
