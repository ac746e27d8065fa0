"""Removes documents, or the places in them, that contain items of evaluation sets.

1. Every item is known by some of its 3-word sequences (seeds), the rare ones. A sequence that many items share (a template,
   "which of the following is") is a seed only of an item that has no rarer ones.
2. Where a document has seeds of an item, in the order and at about the distances of the item, the place is compared with the
   whole item: the share of the item's different 4-character sequences (2 in scripts without spaces) that occur there, letters
   and digits alone, case apart.
   From `similarity` on, the item is there. A seed never counts alone.
3. A short item has to be more alike: `short_similarity`. It is there, too, where its words stand in order but for one that is
   deleted, replaced, or swapped with the next, if those that stand there are rare enough among the items: `short_bits`.
   One of fewer than `min_words` words is not looked for.
4. Items go through the same repairs as documents (`clean`), and are looked for as they stand, too.

What a fifth of a task's items begin or end with ("Question:", "Answer:", instructions) is not part of them.

W words of a document, S seeds, H places where a document has a seed
"""

import fnmatch
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from jaxllm.data import eval_items, units
from jaxllm.data.document import Document, Removal
from jaxllm.errors import UserError

SEED = 3  # words
GRAM, UNSPACED_GRAM = 4, 2  # characters of a sequence; in scripts without spaces
FEW, MOST = 4, 32  # seeds of an item
NEED = 0.2  # share of an item's seeds that a place must have to be compared
TEMPLATE = 0.2  # share of a task's items that have a sequence, from which it is none of the item's
PLACES = 256  # of a document, are compared: those with the most seeds


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig:
    folder: str | None = None  # of evaluation sets (.jsonl, .json, .tsv, .csv, .txt, also .gz, .zst); null: nothing is checked
    tasks: tuple[str, ...] = ("*",)  # which of them: patterns of paths within the folder, without endings, e.g. "gsm8k/test"
    action: Literal["document", "span"] = "document"  # what goes: the whole document, or the item's words in it
    similarity: float = 0.7  # share of an item's 4-character (Chinese, Japanese, …: 2) sequences that a place must have
    long_words: int = 8  # of items of fewer words, a place must have `short_similarity`
    short_similarity: float = 0.8  # the same for short items
    short_bits: float | None = 30.0  # or all their words but one, if log2(items / items with the word) sums to it; 0, null: off
    min_words: int = 5  # items of fewer words are not looked for
    common: int = 8  # a 3-word sequence that more items share is a template's

    def __post_init__(self):
        for name, ok, should in (
            ("similarity", 0 < self.similarity <= 1, "in (0, 1]"),
            ("short_similarity", 0 < self.short_similarity <= 1, "in (0, 1]"),
            ("short_bits", (self.short_bits or 0) >= 0, "at least 0, or null"),
            ("min_words", self.min_words >= SEED, f"at least {SEED}"),
            ("common", self.common >= 1, "at least 1"),
        ):
            if not ok:
                raise ValueError(f"decontaminate.{name}={getattr(self, name)}: should be {should}")


@dataclass
class Index:
    """Seeds of all items, sorted by hash."""

    hash_S: np.ndarray  # uint64
    item_S: np.ndarray  # int32
    place_S: np.ndarray  # int32: word of the item at which the seed begins
    text: list[str]  # of each item
    task: list[str]  # of each item
    words: np.ndarray  # of each item
    seeds: np.ndarray  # of each item
    looked_for: dict[str, int]  # items of each task
    too_short: dict[str, int]  # items of each task that are not looked for
    bits: dict[int, tuple[float, ...]]  # of each word of each short item: log2(items / items with the word)
    maybe: np.ndarray = field(init=False)  # whether any seed begins with these bits
    shift: np.uint64 = field(init=False)
    count_S: np.ndarray = field(init=False)  # how many seeds from here on have the same hash

    def __post_init__(self):
        bits = min(max(int(np.ceil(np.log2(len(self.hash_S) * 16 + 1))), 10), 27)
        self.shift = np.uint64(64 - bits)
        self.maybe = np.zeros(1 << bits, bool)
        self.maybe[self.hash_S >> self.shift] = True
        last_S = np.append(self.hash_S[1:] != self.hash_S[:-1], True)
        ends = np.flatnonzero(last_S) + 1
        self.count_S = ends[np.cumsum(last_S) - last_S] - np.arange(len(last_S))


def build_index(cfg: DecontaminateConfig, clean: Callable[[str], str] | None = None) -> Index:
    """Returns the index of the folder's items, and of what `clean` makes of them. Raises UserError where there is none."""
    text, task, looked_for, too_short, hash_WN = [], [], Counter(), Counter(), []
    found = [(name, path) for name, path in eval_items.files(cfg.folder, "decontaminate.folder")
             if any(fnmatch.fnmatch(name, pattern) for pattern in cfg.tasks)]
    if not found:
        raise UserError(f"decontaminate.tasks={list(cfg.tasks)}: no file in {cfg.folder} has such a name")
    for name, path in found:
        bodies, skipped = _bodies(eval_items.items(path), cfg, clean)
        hash_WN += [hash_W for _, hash_W in bodies]
        text += [body for body, _ in bodies]
        task += [name] * len(bodies)
        looked_for[name] += len(bodies)
        too_short[name] += skipped
    if not text:
        raise UserError(f"decontaminate.folder={cfg.folder}: no item has decontaminate.min_words={cfg.min_words} words")
    hash_S, item_S, place_S = _seeds(hash_WN, cfg)
    words, seeds = np.array([len(one) for one in hash_WN], np.int32), np.bincount(item_S, minlength=len(text))
    bits = _bits(hash_WN, cfg.long_words)
    return Index(hash_S, item_S, place_S, text, task, words, seeds, dict(looked_for), dict(too_short), bits)


def _bodies(all_items, cfg: DecontaminateConfig, clean=None) -> tuple[list[tuple[str, np.ndarray]], int]:
    """Returns each different text that is looked for, without its template, and the hashes of its words, and how many items
    are too short."""
    chosen, skipped, all_items = {}, 0, list(all_items)
    if clean:
        changed = ([new for text in texts if not text.isascii() and (new := clean(text)) != text] for texts in all_items)
        all_items += [texts for texts in changed if texts]
    words_of_each = iter(units.units_of_each([text for texts in all_items for text in texts]))
    for texts in all_items:
        each = [(text, next(words_of_each)) for text in texts]
        some = eval_items.looked_for([(text, len(words.hash_W)) for text, words in each], cfg.min_words)
        some = [each[i] for i in some]
        if not some:  # together they may be long enough
            (words,) = units.units_of_each([whole := "\n".join(texts)])
            some = [(whole, words)] if len(words.hash_W) >= cfg.min_words else []
        skipped += not some
        chosen |= {words.hash_W.tobytes(): (text, words) for text, words in some}
    edge = np.full(SEED - 1, units.ROOT, np.uint64)  # so that one word alone can be what items begin or end with
    grams = [units.windows(np.concatenate([edge, words.hash_W, edge]), SEED) for _, words in chosen.values()]
    template = _shared_by(grams) > max(10, TEMPLATE * min(len(grams), len(all_items)))
    bodies, at = [], 0
    for (text, (hash_W, start_W, end_W)), gram in zip(chosen.values(), grams, strict=True):
        own = np.flatnonzero(~template[at : at + len(gram)])
        at += len(gram)
        first, last = (int(own[0]), int(own[-1]) - SEED + 2) if len(own) else (0, 0)  # without the template's words
        if last - first < min(cfg.long_words, len(hash_W)):
            first, last = 0, len(hash_W)
        bodies.append((text[start_W[first] : end_W[last - 1]], hash_W[first:last]))
    return bodies, skipped


def _shared_by(grams: list[np.ndarray]) -> np.ndarray:
    """Returns, for each item's sequences one after the other, by how many items each is shared."""
    if not grams:
        return np.zeros(0, np.int64)
    hash_ = np.concatenate(grams)
    item = np.repeat(np.arange(len(grams)), [len(g) for g in grams])
    order = np.lexsort((item, hash_))
    new_hash, new_item = (np.concatenate([[True], x[order[1:]] != x[order[:-1]]]) for x in (hash_, item))
    group = np.cumsum(new_hash) - 1
    shared = np.empty(len(order), np.int64)
    shared[order] = np.bincount(group[new_hash | new_item])[group]
    return shared


def _seeds(hash_WN: list[np.ndarray], cfg: DecontaminateConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the seeds of items: hash, item and place, sorted by hash."""
    grams = [units.windows(hash_W, SEED) for hash_W in hash_WN]
    item = np.repeat(np.arange(len(grams), dtype=np.int32), [len(g) for g in grams])
    hash_ = np.concatenate(grams)
    place = np.concatenate([np.arange(len(g), dtype=np.int32) for g in grams])
    shared = _shared_by(grams)
    rank = np.empty(len(hash_), np.int64)  # of each sequence in its item: rare ones first, then as they come, spread out
    by = np.lexsort((_spread(place), np.where(shared <= cfg.common, 1, shared), item))
    first = np.concatenate([[0], np.cumsum([len(g) for g in grams])])[:-1]
    rank[by] = np.arange(len(by)) - first[item[by]]
    keep = (rank < FEW) | ((rank < MOST) & (shared <= cfg.common))
    order = np.flatnonzero(keep)[np.argsort(hash_[keep], kind="stable")]
    return hash_[order], item[order], place[order]


def _bits(hash_WN: list[np.ndarray], long_words: int) -> dict[int, tuple[float, ...]]:
    """Returns how rare each word of each item of fewer than `long_words` words is: log2(items / items with the word)."""
    bits, ends = np.log2(len(hash_WN) / _shared_by(hash_WN)), np.cumsum([len(hash_W) for hash_W in hash_WN])
    return {item: tuple(bits[end - len(hash_W) : end].tolist())
            for item, (hash_W, end) in enumerate(zip(hash_WN, ends, strict=True)) if len(hash_W) < long_words}


def _spread(place: np.ndarray) -> np.ndarray:
    """Returns keys by which the first of many places are spread over all: the golden ratio's multiples."""
    return (place.astype(np.uint64) * np.uint64(units.ROOT)) >> np.uint64(32)


class Decontaminate:
    """Looks for evaluation items in documents; tallies them by task."""

    name = "decontaminate"

    def __init__(self, cfg: DecontaminateConfig, index: Index | None = None):
        self.cfg = cfg
        self.index = index or (build_index(cfg) if cfg.folder else None)
        self.grams_of = functools.lru_cache(1 << 14)(self._grams_of)

    def __call__(self, doc: Document) -> Removal | None:
        found = self.find(doc.text) if self.index else []
        if not found:
            return None
        for item, _, _, _ in found:
            key = f"decontaminate.task.{self.index.task[item]}"
            doc.counts[key] = doc.counts.get(key, 0) + 1
        item, similarity, _, _ = max(found, key=lambda f: f[1])
        removal = Removal(f"decontaminate.{self.index.task[item]}", round(similarity, 3))
        if self.cfg.action == "document":
            return removal
        text = _without(doc.text, [(start, end) for _, _, start, end in found])
        doc.counts["decontaminate.characters_cut"] = len(doc.text) - len(text)
        doc.text = text
        return None if len(units.units(text).hash_W) else removal

    def _grams_of(self, item: int) -> tuple[int, np.ndarray]:
        """Returns how many characters an item's sequences have, and the sequences."""
        text = self.index.text[item]
        gram = GRAM if len(text) > 2 * self.index.words[item] else UNSPACED_GRAM
        return gram, _grams(text, gram)

    def find(self, text: str) -> list[tuple[int, float, int, int]]:
        """Returns (item, similarity, first character, end) of each place that holds an item."""
        words, found = units.units(text), []
        for item, first, last in self._places(words.hash_W):
            n = int(self.index.words[item])
            slack = max(3, n // 8)
            a, b = max(first - slack, 0), min(last + n + slack, len(words.hash_W))
            gram, mine = self.grams_of(item)
            similarity = _containment(mine, _grams(text[words.start_W[a] : words.end_W[b - 1]], gram))
            if similarity >= (self.cfg.similarity if n >= self.cfg.long_words else self.cfg.short_similarity):
                begin, end = _aligned(units.units(self.index.text[item]).hash_W, words.hash_W[a:b])
            elif self.cfg.short_bits and item in self.index.bits:
                item_W = units.units(self.index.text[item]).hash_W
                bits, begin, end = _one_edit(item_W.tolist(), words.hash_W[a:b].tolist(), self.index.bits[item])
                if bits < self.cfg.short_bits:
                    continue
            else:
                continue
            found.append((item, similarity, int(words.start_W[a + begin]), int(words.end_W[a + end - 1])))
        return found

    def _places(self, hash_W: np.ndarray) -> list[tuple[int, int, int]]:
        """Returns (item, least and largest word at which it would begin), those with the most of its seeds first."""
        index, gram_W = self.index, units.windows(hash_W, SEED)
        at = np.flatnonzero(index.maybe[gram_W >> index.shift])
        low = np.searchsorted(index.hash_S, gram_W[at])
        there = index.hash_S[np.minimum(low, len(index.hash_S) - 1)] == gram_W[at]
        at, low = at[there], low[there]
        if not len(at):
            return []
        count = index.count_S[low]
        seed_H = np.repeat(low - np.cumsum(count) + count, count) + np.arange(count.sum())
        item_H = index.item_S[seed_H]
        begin_H = np.repeat(at, count) - index.place_S[seed_H]
        order = np.lexsort((begin_H, item_H))
        item_H, begin_H = item_H[order], begin_H[order]
        slack_H = np.maximum(4, index.words[item_H] // 4)
        new = np.concatenate([[True], (item_H[1:] != item_H[:-1]) | (begin_H[1:] - begin_H[:-1] > slack_H[1:])])
        first = np.flatnonzero(new)
        last = np.concatenate([first[1:], [len(new)]]) - 1
        share = (last - first + 1) / index.seeds[item_H[first]]
        best = np.argsort(-share, kind="stable")[:PLACES]
        return [(int(item_H[first[i]]), int(begin_H[first[i]]), int(begin_H[last[i]])) for i in best if share[i] >= NEED]


def _grams(text: str, n: int) -> np.ndarray:
    return np.sort(units.windows(units.characters(text), n))


def _containment(mine: np.ndarray, there: np.ndarray) -> float:
    """Returns the share of an item's different character sequences that a place has; both sorted."""
    if not len(mine) or not len(there):
        return 0.0
    mine = mine[np.append(True, mine[1:] != mine[:-1])]
    return float(np.mean(there[np.minimum(np.searchsorted(there, mine), len(there) - 1)] == mine))


def _aligned(item_W: np.ndarray, place_W: np.ndarray) -> tuple[int, int]:
    """Returns which words of a place are the item's: from the first to the last sequence that both have."""
    at = np.flatnonzero(np.isin(units.windows(place_W, SEED), units.windows(item_W, SEED)))
    return int(at[0]), int(at[-1]) + SEED


def _one_edit(item: list[int], place: list[int], bits: tuple[float, ...]) -> tuple[float, int, int]:
    """Returns the most bits of an item's words that stand in a place with one word deleted, replaced, or swapped with the next,
    and the first of these words of the place and their end; 0 bits where they do not."""
    n, there, best = len(item), set(place), (0.0, 0, 0)
    if sum(word in there for word in item) < n - 1:
        return best
    for i in range(n):
        left, right, rest = item[:i], item[i + 1 :], sum(bits[:i] + bits[i + 1 :])
        forms = [(left, 0, right, rest), (left, 1, right, rest)]  # words, then so many others, then words
        if i in (0, n - 1):  # what stands before or after the rest is not the item's
            forms.pop()
        if i + 1 < n:
            forms.append(([*left, item[i + 1], item[i]], 0, item[i + 2 :], sum(bits)))
        for before, others, after, sum_ in forms:
            size = len(before) + others + len(after)
            for at in range(len(place) - size + 1):
                end = at + size
                if sum_ > best[0] and place[at : at + len(before)] == before and place[end - len(after) : end] == after:
                    best = sum_, at, end
    return best


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    pieces, at = [], 0
    for start, end in sorted(spans):
        if start > at:
            pieces.append(text[at:start])
        at = max(at, end)
    return "".join([*pieces, text[at:]])
