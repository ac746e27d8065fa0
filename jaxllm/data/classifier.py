"""A small text classifier: logistic regression over hashed words and pairs of words, trained and applied with numpy alone.

A text is read in passages of some tens of words that overlap by half. A passage's log-odds are the sum of its words' and
pairs' weights, so that ordinary words around a few telling ones take nothing from them; the sums of all passages are
differences of one running sum. A long text is judged by its worst passage (harm) or by their mean (quality).

    W words of a text, F features of a passage, P passages, B passages of a training batch
"""

import dataclasses
import hashlib
import json
import pathlib
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxllm.data.config import Source
from jaxllm.data.document import Document, Removal
from jaxllm.data.read import blocks, documents, find_files
from jaxllm.data.words import Words, mixed, n_grams, spoken
from jaxllm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    good: str = ""  # texts to be like: a folder, glob or file as under `sources`
    bad: str = ""  # texts to be unlike
    labelled: str = ""  # or both in one: .jsonl with a text and a label a line
    text_key: str = "text"  # the field that holds the text
    label_key: str = "label"  # 1 or true: bad (harmful); 0 or false: good
    passage_words: int = 40  # words of a passage
    bits: int = 20  # 2 to the power of this many weights
    min_count: int = 3  # words and pairs in fewer passages get no weight: they say nothing about other texts
    # times that a text of a few passages is also shown among words of good texts: by it the classifier learns to find it
    # there, and not that tweets are unlike books
    planted: int = 0
    epochs: int = 3  # times that every passage is seen
    lr: float = 0.1  # step of AdaGrad
    max_passages: int = 200_000  # of each class that are trained on: every n-th one of more
    seed: int = 0  # of the order and of what is planted

    def __post_init__(self):
        for name, ok, should in (("passage_words", self.passage_words >= 2, "at least 2"),
                                 ("bits", 8 <= self.bits <= 26, "8 to 26"),
                                 ("epochs", self.epochs >= 1, "at least 1"), ("lr", self.lr > 0, "more than 0")):
            if not ok:
                raise ValueError(f"classifier.train.{name}={getattr(self, name)}: should be {should}")
        if bool(self.good) != bool(self.bad):
            raise ValueError("classifier.train: good and bad need each other")

    def __bool__(self) -> bool:
        return bool(self.good or self.labelled)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    path: str = ""  # a trained classifier (.npz); where `train` names texts it is made and put here
    min_score: float = 0.5  # chance of being a good text; a document of less is dropped
    train: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self):
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"classifier.min_score={self.min_score}: should be in [0, 1]")


class Passages(NamedTuple):
    start_P: np.ndarray  # first word
    end_P: np.ndarray  # the one after the last
    logit_P: np.ndarray  # log-odds of being bad


class Classifier:
    """Gives passages of a text their log-odds of being bad."""

    def __init__(self, weight: np.ndarray, bias: float, passage_words: int, made_of: dict):
        self.weight, self.bias, self.passage_words, self.made_of = weight, bias, passage_words, made_of
        self.shift = np.uint64(64 - (len(weight) - 1).bit_length())

    def passages(self, words: Words) -> Passages:
        n = len(words)
        start_P, end_P = spans(n, self.passage_words)
        sum_W = np.zeros(n + 1)
        one_W, two_W = features(words.hash_W, self.shift)
        weight_W = self.weight[one_W].astype(np.float64)
        weight_W[1:] += self.weight[two_W]  # a pair counts where its second word stands
        np.cumsum(weight_W, out=sum_W[1:])
        total_P = sum_W[end_P] - sum_W[start_P]
        total_P[start_P > 0] -= self.weight[two_W][start_P[start_P > 0] - 1]  # the pair with the word before the passage
        return Passages(start_P, end_P, self.bias + total_P)

    def score(self, text: str) -> float:
        """Returns the chance that a text is good: that of the mean of its passages' log-odds."""
        words = spoken(text)
        return float(1 / (1 + np.exp(np.mean(self.passages(words).logit_P)))) if len(words) else 0.0

    def save(self, path: str | pathlib.Path) -> None:
        path = pathlib.Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(path.name + ".new")
        with open(new, "wb") as file:
            np.savez(file, weight=self.weight, about=np.frombuffer(json.dumps(
                {"bias": self.bias, "passage_words": self.passage_words, "made_of": self.made_of}).encode(), np.uint8))
        new.replace(path)


def load(path: str, key: str) -> Classifier:
    """Returns a saved classifier; raises UserError, naming the setting `key`, where there is none."""
    try:
        with open(pathlib.Path(path).expanduser(), "rb") as file, np.load(file) as held:
            about = json.loads(held["about"].tobytes())
            return Classifier(held["weight"], about["bias"], about["passage_words"], about["made_of"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
        raise UserError(f"{key}={path}: cannot be read as a classifier: {getattr(e, 'strerror', None) or e}; "
                        "should be a file that classifier.train made") from None


def spans(n: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (first words, words after the last) of passages that overlap by half and leave no word out."""
    start_P = np.arange(0, max(n - (length - length // 2), 1), max(length // 2, 1))
    return start_P, np.minimum(start_P + length, n)


def features(hash_W: np.ndarray, shift: np.uint64) -> tuple[np.ndarray, np.ndarray]:
    """Returns which weight each word and each pair of words has."""
    return (hash_W >> shift).astype(np.int64), (mixed(n_grams(hash_W, 2)) >> shift).astype(np.int64)


class ByClassifier:
    """Records how likely a document is a good one, and drops it where that is too little."""

    def __init__(self, cfg: ClassifierConfig):
        self.cfg, self.classifier = cfg, load(cfg.path, "filter.classifier.path")

    def __call__(self, doc: Document) -> Removal | None:
        doc.meta["quality_score"] = score = round(self.classifier.score(doc.text), 4)
        return Removal("classifier.min_score", score) if score < self.cfg.min_score else None


# ---------------------------------------------------------------- training


def ready(cfg: ClassifierConfig, key: str) -> dict | None:
    """Trains the classifier that a config describes and saves it, unless the same is there; returns how good it is.

    A twentieth of the texts, chosen by a hash of them, is held out from training and measured.
    """
    if not cfg.train:
        return None
    if not cfg.path:
        raise UserError(f"{key}.path: is empty; should name the file that {key}.train is to make")
    texts = list(labelled_texts(cfg.train, f"{key}.train"))
    knobs = dataclasses.asdict(cfg.train) | {"good": "", "bad": "", "labelled": ""}
    digest = hashlib.sha256(repr([knobs, texts]).encode()).hexdigest()
    if pathlib.Path(cfg.path).expanduser().exists() and (held := load(cfg.path, f"{key}.path").made_of).get("texts") == digest:
        return held
    held_out = [int(hashlib.sha256(text.encode(errors="replace")).hexdigest()[:8], 16) % 20 == 0 for text, _ in texts]
    classifier = train([t for t, out in zip(texts, held_out, strict=True) if not out], cfg.train, f"{key}.train")
    tested = [t for t, out in zip(texts, held_out, strict=True) if out]
    classifier.made_of = {"texts": digest, "held_out": measure(classifier, tested), "trained_on": len(texts) - len(tested)}
    classifier.save(cfg.path)
    return classifier.made_of


def labelled_texts(cfg: TrainingConfig, key: str) -> Iterator[tuple[str, bool]]:
    """Yields (text, whether it is bad)."""
    for name in ("good", "bad"):
        if path := getattr(cfg, name):
            yield from ((text, name == "bad") for text in documents(Source(path=path, text_key=cfg.text_key), f"{key}.{name}"))
    if not cfg.labelled:
        return
    source = Source(path=cfg.labelled, text_key=cfg.text_key)
    for path in find_files(source, f"{key}.labelled"):
        if ".jsonl" not in path.name:
            raise UserError(f"{key}.labelled={cfg.labelled}: {path.name} has no labels; should be .jsonl")
        n = 0
        for block in blocks(path, source):
            for n, line in enumerate(block.data.split(b"\n"), block.first):
                if line.strip():
                    yield _labelled(line, f"{path}:{n}", cfg)


def _labelled(line: bytes, where: str, cfg: TrainingConfig) -> tuple[str, bool]:
    try:
        row = json.loads(line)
        text, label = row[cfg.text_key], row[cfg.label_key]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{where}: should be a JSON object with {cfg.text_key!r} and {cfg.label_key!r}: {e}") from None
    if not isinstance(text, str) or label not in (0, 1):
        raise UserError(f"{where}: {cfg.label_key}={label!r}: should be 0 or 1, and {cfg.text_key} a string")
    return text, bool(label)


def train(texts: Iterable[tuple[str, bool]], cfg: TrainingConfig, key: str = "classifier.train") -> Classifier:
    """Returns a classifier fit by AdaGrad (Duchi et al. 2011) to passages of texts, both classes weighing the same."""
    rng, shift = np.random.default_rng(cfg.seed), np.uint64(64 - cfg.bits)
    read = [(spoken(text).hash_W, bad) for text, bad in texts]
    if cfg.planted:
        hosts = [hash_W for hash_W, bad in read if not bad and len(hash_W) > cfg.passage_words]
        short = [(hash_W, bad) for hash_W, bad in read if 0 < len(hash_W) <= 4 * cfg.passage_words] if hosts else []
        read += [(_planted(hash_W, hosts, cfg.passage_words, rng), bad) for hash_W, bad in short for _ in range(cfg.planted)]
    by_class = ([], [])
    for hash_W, bad in read:
        by_class[bad].extend(_passages_of(hash_W, shift, cfg.passage_words))
    for name, found in zip(("good", "bad"), by_class, strict=True):
        if not found:
            raise UserError(f"{key}: no {name} text has a word; both kinds are needed")
    rows, label = [], []
    for bad, found in enumerate(by_class):
        step = max(len(found) / cfg.max_passages, 1)
        chosen = [found[int(i * step)] for i in range(int(len(found) / step))]
        rows += chosen
        label += [bad] * len(chosen)
    label_R = np.array(label, np.float64)
    balance_R = np.where(label_R == 1, 0.5 / label_R.mean(), 0.5 / (1 - label_R.mean()))
    weight, squares = np.zeros(1 << cfg.bits, np.float32), np.full(1 << cfg.bits, 1e-6)
    bias, bias_squares = 0.0, 1e-6
    counted = np.bincount(np.concatenate(rows), minlength=1 << cfg.bits) >= cfg.min_count
    for _ in range(cfg.epochs):
        order = rng.permutation(len(rows))
        for first in range(0, len(rows), 128):
            batch = order[first:first + 128]
            error_B, feature, length_B = _error(weight, bias, [rows[i] for i in batch], label_R[batch], balance_R[batch])
            touched, place = np.unique(feature, return_inverse=True)
            gradient = np.bincount(place, np.repeat(error_B, length_B)) * counted[touched]
            squares[touched] += gradient**2
            weight[touched] -= cfg.lr * gradient / np.sqrt(squares[touched])
            bias_squares += error_B.sum() ** 2
            bias -= cfg.lr * error_B.sum() / np.sqrt(bias_squares)
    return Classifier(weight, float(bias), cfg.passage_words, {})


def _planted(hash_W: np.ndarray, hosts: list[np.ndarray], length: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a passage that holds a short text, or half a passage of a longer one, among words of another text."""
    host_W = hosts[rng.integers(len(hosts))]
    first = rng.integers(max(len(host_W) - 2 * length, 1))
    held = min(len(hash_W), (length + 1) // 2)
    joined_W = np.concatenate([np.resize(host_W[first:first + length], length), hash_W,
                               np.resize(host_W[first + length:first + 2 * length], length)])
    start = rng.integers(held, length + len(hash_W) - held + 1)
    return joined_W[start:start + length]


def _passages_of(hash_W: np.ndarray, shift: np.uint64, length: int) -> Iterator[np.ndarray]:
    one_W, two_W = features(hash_W, shift)
    for start in range(0, len(hash_W), length):
        start = max(min(start, len(hash_W) - length), 0)  # the last is as long as the others
        yield np.concatenate([one_W[start:start + length], two_W[start:start + length - 1]])


def _error(weight, bias: float, rows: list[np.ndarray], label_B, balance_B):
    """Returns (the loss's derivative by each passage's log-odds over the batch's size, all features, how many each has)."""
    feature, length_B = np.concatenate(rows), np.array([len(row) for row in rows])
    sum_B = np.add.reduceat(weight[feature].astype(np.float64), np.cumsum(length_B) - length_B)
    chance_B = 1 / (1 + np.exp(-np.clip(bias + sum_B, -50, 50)))
    return (chance_B - label_B) * balance_B / len(rows), feature, length_B


def measure(classifier: Classifier, texts: list[tuple[str, bool]]) -> dict:
    """Returns the accuracy on texts of each class and the area under the ROC curve."""
    score = np.array([classifier.score(text) for text, _ in texts])
    bad = np.array([is_bad for _, is_bad in texts], bool)
    if not bad.any() or bad.all():
        return {"texts": len(texts)}
    return {"texts": len(texts), "good_kept": float((score[~bad] >= 0.5).mean()), "bad_found": float((score[bad] < 0.5).mean()),
            "auc": auc(score[~bad], score[bad])}


def auc(high: np.ndarray, low: np.ndarray) -> float:
    """Returns the chance that one of `high` is above one of `low`, ties half."""
    low = np.sort(low)
    return float((np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")).mean() / 2 / len(low))
