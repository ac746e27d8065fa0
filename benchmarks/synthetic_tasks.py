"""Small text tasks in clusters, as instructions and as plain lists: what instruction_tuning.py trains and measures on.

A task turns an input (a few words, numbers or letters) into an output by a rule. As an instruction it is asked for in the
eight ways of `templates`; in pretraining text it is a list of inputs with their outputs, under a title or under none.
Whether an input is for measuring is decided by a hash of its text, for all tasks alike: no training text, of this task or
of another, list or instruction, holds it as an input.
"""

import pathlib
import random
from collections.abc import Callable
from dataclasses import dataclass

import yaml

from jaxllm.data.draws import draw

WORDING = yaml.safe_load(pathlib.Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
KINDS = {kind: words.split() for kind, words in WORDING["kinds"].items()}
WORDS = [word for words in KINDS.values() for word in words]
IRREGULAR = {"sheep", "mouse", "wolf", "knife"}
NOUNS = [word for kind in ("animal", "tool", "place") for word in KINDS[kind] if word not in IRREGULAR]
OPPOSITE = {a: b for pair in WORDING["opposites"] for a, b in (pair.split(), pair.split()[::-1])}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Every item stands behind a space, so that it is the same token wherever it is.
FRAMES = ("{ask}: {x}", "List: {x}\n{ask}.", "Input: {x}\nTask: {ask}.", "Please read this: {x}. Now {lower}.")
LISTS = ("- {x} -> {y}\n", "- {x} = {y}\n", "- {x} : {y}\n", "Input: {x}\nOutput: {y}\n", " {x}\n {y}\n\n")
FEW = 8  # items of a list in pretraining text
HELD_OUT = 0.2  # share of inputs that are for measuring


@dataclass(frozen=True)
class SyntheticTask:
    name: str
    cluster: str
    make: Callable[[random.Random, Callable[[list], list]], tuple[str, str]]  # an input of some items, and its output
    titles: tuple[str, ...]  # over a list in pretraining text
    asks: tuple[str, ...]  # what an instruction asks for, in other words
    guess: Callable[[str], float]  # chance to be right without knowing which task of its cluster it is

    def templates(self) -> list[dict]:
        """Returns the ways to ask, as templates of `jaxllm sft`: each wording in two frames."""
        pairs = [(ask, FRAMES[(i + j) % 4]) for j in (0, 1) for i, ask in enumerate(self.asks)]
        texts = [frame.replace("{ask}", ask).replace("{lower}", ask[0].lower() + ask[1:]) for ask, frame in pairs]
        return [{"input": text, "target": " {y}"} for text in texts]

    def rows(self, n: int, *, held_out: bool, seed: int = 0) -> list[dict]:
        """Returns n rows {"x", "y"} of different inputs, all for measuring or all for training."""
        rng, found = random.Random(f"{seed} {self.name} {held_out}"), {}
        for _ in range(200 * n):
            x, y = self.make(rng, lambda items: items)
            if is_held_out(x) == held_out:
                found[x] = y
            if len(found) == n:
                return [{"x": x, "y": y} for x, y in found.items()]
        raise ValueError(f"task {self.name} has {len(found)} different inputs, fewer than the {n} asked for")

    def document(self, rng: random.Random, titled: float = 0.5) -> str:
        """Returns a list of training inputs and outputs as pretraining text has it.

        Its items are a few that come again and again, as the words of a text do: without such burstiness small models
        hardly learn to look at what stands before (Chan et al. 2022).
        """
        line, rows, few = rng.choice(LISTS), [], {}

        def some(items: list) -> list:
            return few.setdefault(tuple(items), rng.sample(items, min(len(items), FEW)))

        while len(rows) < 10:
            x, y = self.make(rng, some)
            if not is_held_out(x):
                rows.append(line.replace("{x}", x).replace("{y}", y))
        title = f"{rng.choice(self.titles)}\n\n" if rng.random() < titled else ""
        return title + "".join(rows)


def is_held_out(x: str) -> bool:
    return draw("held out", x) < HELD_OUT


def inputs_of(document: str) -> list[str]:
    """Returns the inputs of a list, read back from its text."""
    lines = [line for line in document.split("\n") if line]
    mark = next((mark for mark in (" -> ", " = ", " : ") if mark in document), None)
    if mark:
        return [line.removeprefix("- ").partition(mark)[0] for line in lines if mark in line]
    if "Input: " in document:
        return [line.removeprefix("Input: ") for line in lines if line.startswith("Input: ")]
    return [line.strip() for line in lines if line.startswith(" ")][::2]


def of_list(items: list[str], answer: Callable[[list[str]], list[str] | str], least: int = 3, most: int = 4):
    """Returns a maker whose input is a few of the items."""
    def make(rng: random.Random, among) -> tuple[str, str]:
        n = rng.randint(least, most)
        some = rng.sample(among(items), n)
        out = answer(some)
        return " ".join(some), out if isinstance(out, str) else " ".join(out)
    return make


def numbers(answer, least: int = 3, most: int = 3):
    return of_list([str(i) for i in range(2, 99)], lambda some: answer([int(i) for i in some]), least, most)


def texts(ints) -> list[str]:
    return [str(i) for i in ints]


def repeated(rng: random.Random, among) -> tuple[str, str]:
    """Makes a list in which the word in front is counted."""
    word, *others = rng.sample(among(WORDS), 4)
    some = [word] * rng.randint(1, 4) + others[: rng.randint(1, 3)]
    rng.shuffle(some)
    return f"{word} in {' '.join(some)}", str(some.count(word))


def member(present: str, absent: str):
    def make(rng: random.Random, among) -> tuple[str, str]:
        word, *some = rng.sample(among(WORDS), rng.randint(4, 6))
        inside = rng.random() < 0.5
        if inside:
            some[rng.randrange(len(some))] = word
        return f"{word} in {' '.join(some)}", present if inside else absent
    return make


def one_of_kind(kind: str):
    def make(rng: random.Random, among) -> tuple[str, str]:
        others = [word for other, words in KINDS.items() if other != kind for word in words]
        word, some = rng.choice(among(KINDS[kind])), rng.sample(among(others), rng.randint(2, 3))
        some.insert(rng.randint(0, len(some)), word)
        return " ".join(some), word
    return make


def arithmetic(sign: str):
    def make(rng: random.Random, among) -> tuple[str, str]:
        a, b = rng.randint(2, 49), rng.randint(2, 49)
        a, b = max(a, b), min(a, b)
        return f"{a} and {b}", str(a + b if sign == "+" else a - b)
    return make


def plural(word: str) -> str:
    if word.endswith("x"):
        return word + "es"
    return word[:-1] + "ies" if word.endswith("y") and word[-2] not in "aeiou" else word + "s"


def one_of(x: str) -> float:
    return 1 / len(x.split())


def half(x: str) -> float:
    return 0.5


def task(name: str, cluster: str, make, guess=lambda x: 0.0) -> SyntheticTask:
    wording = WORDING["tasks"][name]
    return SyntheticTask(name, cluster, make, tuple(wording["titles"]), tuple(wording["asks"]), guess)


TASKS = (
    # clusters that models are tuned on
    task("reverse", "order", of_list(WORDS, lambda s: s[::-1])),
    task("ascending", "order", numbers(lambda s: texts(sorted(s)))),
    task("descending", "order", numbers(lambda s: texts(sorted(s)[::-1]))),
    task("find-animal", "kinds", one_of_kind("animal")),
    task("find-food", "kinds", one_of_kind("food")),
    task("find-colour", "kinds", one_of_kind("colour")),
    task("drop-first", "edit", of_list(WORDS, lambda s: s[1:])),
    task("drop-last", "edit", of_list(WORDS, lambda s: s[:-1])),
    task("double", "edit", of_list(WORDS, lambda s: [w for w in s for _ in (0, 1)], 2, 3)),
    task("length", "count", of_list(WORDS, lambda s: str(len(s)), 2, 7)),
    task("occurrences", "count", repeated),
    task("next-numbers", "step", numbers(lambda s: texts(i + 1 for i in s), 2, 3)),
    task("previous-numbers", "step", numbers(lambda s: texts(i - 1 for i in s), 2, 3)),
    task("next-letters", "step", of_list(list(LETTERS[:-1]), lambda s: [chr(ord(c) + 1) for c in s], 3, 4)),
    task("contains", "membership", member("yes", "no"), half),
    task("lacks", "membership", member("present", "missing"), half),
    task("copy", "copy", of_list(WORDS, lambda s: s)),
    task("copy-commas", "copy", of_list(WORDS, lambda s: ", ".join(s))),
    task("sum", "sums", arithmetic("+")),
    task("difference", "sums", arithmetic("-")),
    # clusters that are measured
    task("first-word", "position", of_list(WORDS, lambda s: s[0]), one_of),
    task("last-word", "position", of_list(WORDS, lambda s: s[-1]), one_of),
    task("second-word", "position", of_list(WORDS, lambda s: s[1]), one_of),
    task("largest", "compare", numbers(lambda s: str(max(s))), one_of),
    task("smallest", "compare", numbers(lambda s: str(min(s))), one_of),
    task("opposites", "lexical", of_list(list(OPPOSITE), lambda s: [OPPOSITE[w] for w in s], 2, 3)),
    task("plurals", "lexical", of_list(NOUNS, lambda s: [plural(w) for w in s], 2, 3)),
    task("first-letters", "letters", of_list(WORDS, lambda s: [w[0] for w in s])),
    task("last-letters", "letters", of_list(WORDS, lambda s: [w[-1] for w in s])),
)
# in the order in which tuning gets more of them
SEEN = ("order", "kinds", "edit", "count", "step", "membership", "copy", "sums")
UNSEEN = ("position", "compare", "lexical", "letters")


def answer_of(text: str) -> str:
    """Returns the answer in what a model wrote: its first line that is not empty, without the space around it."""
    return text.strip().split("\n")[0].strip()


def is_right(text: str, y: str) -> bool:
    """Exact match, but for space around the target as around the answer."""
    return answer_of(text) == y.strip()
