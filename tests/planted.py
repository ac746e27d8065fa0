"""Made-up documents with planted near-duplicates whose true similarity is known, by plain Python sets.

A family is a document and edited copies of it. Two languages: one with spaces, one without (Han characters). The similarity of
documents of different families is next to none; within a family it is computed for every pair.
"""

import dataclasses
import random
import re

EDITS = ("typo", "replace", "insert", "delete", "swap", "case", "space", "footer", "header", "cut")


@dataclasses.dataclass
class Planted:
    texts: list[str]
    family: list[int]

    def similar(self, threshold: float, n: int = 5) -> list[tuple[int, int]]:
        """Returns the pairs whose Jaccard similarity is at least `threshold`."""
        members, pairs = {}, []
        for i, family in enumerate(self.family):
            members.setdefault(family, []).append(i)
        for group in members.values():
            sets = {i: shingle_set(self.texts[i], n) for i in group}
            pairs += [(a, b) for a in group for b in group if a < b and similarity(sets[a], sets[b]) >= threshold]
        return pairs


def words_of(text: str) -> list[str]:
    return re.findall(r"[\u4e00-\u9fff]|[^\W_\u4e00-\u9fff]+", text.lower())


def shingle_set(text: str, n: int) -> set:
    words = words_of(text)
    return {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))} if words else set()


def similarity(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a and b else 0.0


def vocabulary(pick: random.Random, spaced: bool) -> list[str]:
    if not spaced:
        return [chr(0x4E00 + i) for i in pick.sample(range(8000), 3000)]
    syllables = ["ba", "do", "ken", "li", "mor", "na", "per", "qui", "ras", "sto", "ten", "vul", "wy", "é", "ost"]
    return ["".join(pick.choices(syllables, k=pick.choice((1, 2, 2, 3, 3, 4)))) for _ in range(6000)]


def document(pick: random.Random, words: list[str], n_words: int) -> list[list[str]]:
    """Returns sentences of words, drawn so that a few are common (Zipf's law)."""
    sentences = []
    while n_words > 0:
        n = min(n_words, pick.randrange(6, 25))
        sentences.append([words[min(int(len(words) ** pick.random()) - 1, len(words) - 1)] for _ in range(n)])
        n_words -= n
    return sentences


def edited(pick: random.Random, sentences: list[list[str]], words: list[str], kind: str, strength: float) -> list[list[str]]:
    """Returns an edited copy; `strength` is the share of words, or of the text, that is touched."""
    copy = [list(s) for s in sentences]
    total = sum(map(len, copy))
    if kind in ("footer", "header"):
        extra = document(pick, words, max(int(total * strength), 3))
        return copy + extra if kind == "footer" else extra + copy
    if kind == "cut":
        left = max(int(total * (1 - strength)), 1)
        while sum(map(len, copy)) > left:
            copy[-1].pop()
            copy = [s for s in copy if s]
        return copy
    for _ in range(max(int(total * strength / 5), 1)):  # a word touches five shingles
        sentence = pick.choice([s for s in copy if s])
        i = pick.randrange(len(sentence))
        if kind == "typo":
            sentence[i] = sentence[i][:-1] + "x" if sentence[i].isascii() else pick.choice(words)
        elif kind == "replace":
            sentence[i] = pick.choice(words)
        elif kind == "insert":
            sentence.insert(i, pick.choice(words))
        elif kind == "delete" and total > 8:
            sentence.pop(i)
        elif kind == "swap" and len(sentence) > 1:
            j = (i + 1) % len(sentence)
            sentence[i], sentence[j] = sentence[j], sentence[i]
    return [s for s in copy if s]


def written(sentences: list[list[str]], spaced: bool, kind: str, pick: random.Random) -> str:
    join, stop = (" ", ". ") if spaced else ("", "。")
    text = stop.join(join.join(s) for s in sentences)
    if kind == "case":
        text = text.upper().replace(".", " !")
    elif kind == "space":
        text = text.replace(stop, stop.strip() + "\n\n  ")
    return text


def planted(families: int, seed: int = 0, lengths: tuple[int, ...] = (20, 60, 200, 800), copies: int = 3) -> Planted:
    """Returns shuffled documents: half of the families have edited copies, of any similarity from .4 to 1."""
    pick, texts, family = random.Random(seed), [], []
    vocabularies = [vocabulary(random.Random(1), False), vocabulary(random.Random(2), True)]
    for i in range(families):
        spaced = i % 2 == 0
        words = vocabularies[spaced]
        base = document(pick, words, int(pick.choice(lengths) * pick.uniform(0.7, 1.3)))
        variants = [(base, "")]
        if i % 4 >= 2:
            for _ in range(copies):
                kind = pick.choice(EDITS)
                variants.append((edited(pick, base, words, kind, pick.uniform(0, 0.4)), kind))
        texts += [written(sentences, spaced, kind, pick) for sentences, kind in variants]
        family += [i] * len(variants)
    order = list(range(len(texts)))
    pick.shuffle(order)
    return Planted([texts[i] for i in order], [family[i] for i in order])
