"""Harmful and biased text: measured by passage from three signals, then dropped, tagged, taken out or evened out.

The chance that a passage is harmful joins what each signal says (noisy or): 1 - (1 - c)·(1 - w)^k·(1 - i)^m, where c is a
trained classifier's, k how many words of a list it holds and m how many of those stand near a term for a group of people. A
list alone is a poor filter: it drops what people write about themselves (Dodge et al. 2021, arXiv 2104.08758), so one
listed word is not enough unless the config says so.

    filter          drop the document
    tag             put a control token in front: the model learns what harm looks like and can be asked for the rest
                    (Korbak et al. 2023, arXiv 2302.08582)
    redact          replace the harmful sentences
    counterfactual  swap pairs of words (he, she) in half of the documents, whatever their harm, so that what is said of one
                    is said of the other as often (counterfactual data substitution: Hall Maudslay 2019, arXiv 1909.00871)

    W words of a text, P passages
"""

import bisect
import itertools
import re
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from jaxllm.data.classifier import TrainingConfig, load, spans
from jaxllm.data.counterfactual import Swap
from jaxllm.data.document import Document, Removal
from jaxllm.data.lists import Phrases, entries
from jaxllm.data.words import Words, spoken
from jaxllm.errors import UserError

_LONGEST = 1000  # characters of a sentence; what is longer is none
_SENTENCE_END = re.compile(r"[.!?。！？।؟][\"'”’)\]]*\s*|\n+")


@dataclass(frozen=True, kw_only=True)
class HarmClassifierConfig:
    path: str = ""  # a trained classifier (.npz); where `train` names texts it is made and put here
    train: TrainingConfig = field(default_factory=lambda: TrainingConfig(passage_words=12, planted=4))


@dataclass(frozen=True, kw_only=True)
class HarmConfig:
    use: bool = False  # measure harm and act on it
    # drop harmful documents, tag or redact them, or even out words of women and men in all (see docs/data-filters.md)
    action: Literal["filter", "tag", "redact", "counterfactual"] = "filter"
    threshold: float = 0.95  # a passage that is harmful with this chance or more is acted on
    words: list[str] = field(default_factory=list)  # files of listed words and phrases, one a line
    word_weight: float = 0.5  # chance of harm that one listed word stands for
    identity: list[str] = field(default_factory=list)  # files of terms for groups of people, one a line
    identity_weight: float = 0.5  # chance of harm that a listed word near such a term adds
    near: int = 6  # words between them, at most
    passage_words: int = 12  # words of a passage where there is no classifier, which brings its own
    tag: str = "<|harmful|>"  # tag: goes in front of a harmful document
    clean_tag: str = ""  # tag: goes in front of all others
    redaction: str = "[removed]"  # redact: what stands for harmful sentences
    pairs: str = ""  # counterfactual: .csv of two words a line; empty: English words for women and men
    swapped: float = 0.5  # counterfactual: share of documents, chosen by a hash of their id
    classifier: HarmClassifierConfig = field(default_factory=HarmClassifierConfig)

    def __post_init__(self):
        for name in ("threshold", "word_weight", "identity_weight", "swapped"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"harm.{name}={getattr(self, name)}: should be in [0, 1]")
        if self.threshold == 0:
            raise ValueError("harm.threshold=0: every text would be harmful; should be above 0")
        if self.passage_words < 2:
            raise ValueError(f"harm.passage_words={self.passage_words}: should be at least 2")


class Harm:
    """Records a document's harm score and acts on it; counts harmful documents and characters before and after."""

    name = "harm"

    def __init__(self, cfg: HarmConfig):
        self.cfg = cfg
        self.act = {"filter": self._filter, "tag": self._tag, "redact": self._redact, "counterfactual": self._swap}[cfg.action]
        if cfg.action == "counterfactual":
            self.swap = Swap(cfg.pairs, cfg.swapped)
            return
        self.words = Phrases([word for path in cfg.words for word in entries(path, "harm.words")])
        self.identity = Phrases([word for path in cfg.identity for word in entries(path, "harm.identity")])
        self.classifier = load(cfg.classifier.path, "harm.classifier.path") if cfg.classifier.path else None
        if not self.words and not self.classifier:
            raise UserError(f"harm.action={cfg.action}: nothing to find harm by; "
                            "should have harm.words or harm.classifier.path")

    def __call__(self, doc: Document) -> Removal | None:
        return self.act(doc)

    def passages(self, words: Words) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (first words, words after the last, chance of harm) of a text's passages."""
        n = len(words)
        if self.classifier:
            start_P, end_P, logit_P = self.classifier.passages(words)
            fine_P = 1 / (1 + np.exp(np.clip(logit_P, -50, 50)))  # the chance of no harm
        else:
            start_P, end_P = spans(n, self.cfg.passage_words)
            fine_P = np.ones(len(start_P))
        if listed := self.words.find(words):
            place = np.array([first for first, _ in listed])
            near = place[self._near(words, place)]
            for at, weight in ((place, self.cfg.word_weight), (near, self.cfg.identity_weight)):
                fine_P = fine_P * (1 - weight) ** _held(at, n, start_P, end_P)
        return start_P, end_P, 1 - fine_P

    def _near(self, words: Words, place: np.ndarray) -> np.ndarray:
        """Returns which listed words stand near a term for people."""
        terms = np.array([first for first, _ in self.identity.find(words)])
        if not len(terms):
            return np.zeros(len(place), bool)
        after = np.searchsorted(terms, place)
        left, right = terms[np.maximum(after - 1, 0)], terms[np.minimum(after, len(terms) - 1)]
        return np.minimum(abs(place - left), abs(right - place)) <= self.cfg.near

    def _measure(self, doc: Document) -> tuple[float, list[tuple[int, int]]]:
        """Returns (score, character spans of harmful passages), and counts the document as it comes in."""
        score, found = self._harmful(doc.text)
        doc.meta["harm_score"] = score
        self._count(doc, "before", score, found)
        return score, found

    def _harmful(self, text: str) -> tuple[float, list[tuple[int, int]]]:
        words = spoken(text)
        if not len(words):
            return 0.0, []
        start_P, end_P, chance_P = self.passages(words)
        over_P = chance_P >= self.cfg.threshold
        return round(float(chance_P.max()), 4), _joined(words.start_W[start_P[over_P]], words.end_W[end_P[over_P] - 1])

    def _count(self, doc: Document, when: str, score: float, found: list[tuple[int, int]]) -> None:
        doc.counts[f"harm.documents_{when}"] = 1
        doc.counts[f"harm.harmful_documents_{when}"] = int(bool(found))
        doc.counts[f"harm.characters_{when}"] = len(doc.text)
        doc.counts[f"harm.harmful_characters_{when}"] = sum(b - a for a, b in found)

    # ------------------------------------------------------------ actions

    def _filter(self, doc: Document) -> Removal | None:
        score, found = self._measure(doc)
        if found:
            return Removal("harm.threshold", score)
        self._count(doc, "after", score, found)
        return None

    def _tag(self, doc: Document) -> None:
        score, found = self._measure(doc)
        if found:
            doc.counts["harm.tagged"] = 1
        doc.text = (self.cfg.tag if found else self.cfg.clean_tag) + doc.text
        self._count(doc, "after", score, found)  # the harm stays; harm.tagged says how much of it is marked

    def _redact(self, doc: Document) -> Removal | None:
        score, found = self._measure(doc)
        for whole in (False, False, True, True, True):  # sentences; then what is harmful only together
            if not found:
                break
            cut = _joined(*np.array(found if whole else self._sentences(doc.text, found)).T)
            out, at = [], 0
            for a, b in cut:
                removed = doc.text[a:b]
                out += [doc.text[at:a], self.cfg.redaction, removed[len(removed.rstrip()):]]
                at = b
            doc.text = "".join([*out, doc.text[at:]])
            doc.counts["harm.redacted"] = doc.counts.get("harm.redacted", 0) + len(cut)
            score, found = self._harmful(doc.text)
        if found:  # e.g. a redaction that is itself listed
            return Removal("harm.redact", score)
        self._count(doc, "after", score, found)
        return None

    def _sentences(self, text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Returns the sentences that reach into harmful spans and are harmful alone; a span as it is where none are."""
        ends, out = [0, *(m.end() for m in _SENTENCE_END.finditer(text)), len(text)], []
        for start, end in spans:
            reach = ends[bisect.bisect_right(ends, start) - 1:bisect.bisect_left(ends, end) + 1]
            out += [(a, b) for a, b in itertools.pairwise(reach) if a < b <= a + _LONGEST and self._harmful(text[a:b])[1]] or [
                (start, end)]
        return out

    def _swap(self, doc: Document) -> None:
        before = self.swap.tally(doc.text)
        changed = self.swap(doc)
        after = self.swap.tally(doc.text)
        for when, (first, second) in (("before", before), ("after", after)):
            doc.counts[f"harm.first_words_{when}"], doc.counts[f"harm.second_words_{when}"] = first, second
        doc.counts["harm.swapped"] = int(changed)


def _held(place: np.ndarray, n: int, start_P: np.ndarray, end_P: np.ndarray) -> np.ndarray:
    """Returns how many places each passage holds."""
    sum_W = np.zeros(n + 1, np.int64)
    np.add.at(sum_W, place + 1, 1)
    sum_W = sum_W.cumsum()
    return sum_W[end_P] - sum_W[start_P]


def _joined(start, end) -> list[tuple[int, int]]:
    """Returns spans with those that touch or overlap made one."""
    out: list[tuple[int, int]] = []
    for a, b in sorted(zip(map(int, start), map(int, end), strict=True)):
        if out and a <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], b)
        else:
            out.append((a, b))
    return out
