"""How many evaluation items are found where they are planted in web pages: as they stand, and with one light edit or two.

    python benchmarks/decontaminate.py DATA [--items=1500]    # DATA: a folder with evaluation sets and c4_wiki_sample

An item is planted as a user's page would hold it: a question alone, or all texts of an item a line each. Drawn are as many
of the one as of the other, tasks alike whatever their size, of 5 words or more; the planted text is not asked what the index
chose of it. False removals: of the same pages, and of Wikipedia's articles in pieces of 2,500 characters, without an item.
"""

import argparse
import collections
import gzip
import json
import pathlib
import random
import re
import time

from jaxllm.data import eval_items, units
from jaxllm.data.decontaminate import Decontaminate, DecontaminateConfig

EDITS = ("as it stands", "typo", "word replaced", "word deleted", "word inserted", "two words swapped", "case", "punctuation",
         "typo and word replaced")
# not the ordinary text beside them
TASKS = ("eval_gauntlet/*", "bbh/*", "bbq/*", "gsm8k/*", "truthfulqa/*", "mt_bench/*", "self_instruct/*")
GROUPS = {"8 or more": (8, 10**9), "5 to 7": (5, 8), "all": (5, 10**9)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--items", type=int, default=1500)
    parser.add_argument("--tasks", default=",".join(TASKS), help="patterns of paths in DATA, without endings")
    args = parser.parse_args()
    pages, articles = hosts(args.data / "c4_wiki_sample")
    begun = time.process_time()
    cfg, pick = DecontaminateConfig(folder=str(args.data), tasks=tuple(args.tasks.split(","))), random.Random(0)
    stage = Decontaminate(cfg)
    took = time.process_time() - begun
    print(f"{len(stage.index.text):,} texts of {len(stage.index.looked_for)} tasks, index in {took:.1f} s", flush=True)
    planted = drawn(args.data, stage, args.items, pick)
    found = collections.Counter()
    for text, n_words in planted:
        for edit in EDITS:
            page, at = pick.choice(pages), pick.randrange(1500)
            hit = bool(stage.find(f"{page[:at]}\n{edited(text, edit, pick)}\n{page[at:]}"))
            for group, (low, high) in GROUPS.items():
                found[group, edit] += hit and low <= n_words < high
    for group, (low, high) in GROUPS.items():
        n = sum(low <= n_words < high for _, n_words in planted)
        print(f"{group:<10}{n:>6}  " + "  ".join(f"{edit} {found[group, edit] / max(n, 1):.3f}" for edit in EDITS))
    for name, texts in (("web pages", pages), ("pieces of Wikipedia", articles)):
        begun, size = time.process_time(), sum(len(text.encode()) for text in texts)
        hits = sum(bool(stage.find(text)) for text in texts)
        print(f"{name}: {hits} of {len(texts):,} go, {size / 1e6 / (time.process_time() - begun):.1f} MB/s")


def hosts(folder: pathlib.Path) -> tuple[list[str], list[str]]:
    """Returns web pages, and an encyclopedia in pieces."""
    with gzip.open(folder / "c4_demo.jsonl.gz", "rt", encoding="utf-8") as file:
        pages = [json.loads(line)["text"] for line in file]
    with gzip.open(folder / "wiki_demo.txt.gz", "rt", encoding="utf-8") as file:
        text = file.read()
    return pages, [text[i : i + 2500] for i in range(0, len(text), 2500)]


def drawn(data: pathlib.Path, stage: Decontaminate, n: int, pick: random.Random) -> list[tuple[str, int]]:
    """Returns (text, its words): questions and whole items, task after task in turn."""
    by_task = {}
    for name, path in eval_items.files(str(data), "data"):
        if name in stage.index.looked_for:
            items = list(eval_items.items(path))
            kinds = ["\n".join(texts) for texts in items], [t for texts in items for t in texts if t.rstrip().endswith("?")]
            by_task[name] = [pick.sample(texts, min(len(texts), n)) for texts in kinds]
    out, turn = [], 0
    while len(out) < n and any(any(kinds) for kinds in by_task.values()):
        for kinds in by_task.values():
            text = kinds[turn % 2].pop() if kinds[turn % 2] else None
            n_words = len(units.units(text).hash_W) if text else 0
            if n_words >= 5:
                out.append((text, n_words))
        turn += 1
    return out[:n]


def edited(text: str, edit: str, pick: random.Random) -> str:
    """Returns a text with the edit, at a word drawn by chance."""
    words = [found.span() for found in re.finditer(r"\S+", text)]
    i = pick.randrange(max(len(words) - 1, 1))
    low, high = words[i]
    word, at = text[low:high], low + pick.randrange(high - low)
    if edit == "typo":
        return text[:at] + pick.choice("aeiostrn") + text[at + 1 :]
    if edit == "word replaced":
        return text[:low] + "something" + text[high:]
    if edit == "word deleted":
        return text[:low] + text[high:].lstrip()
    if edit == "word inserted":
        return text[:low] + "really " + text[low:]
    if edit == "two words swapped" and i + 1 < len(words):
        first, last = words[i + 1]
        return text[:low] + text[first:last] + text[high:first] + word + text[last:]
    if edit == "case":
        return text.upper()
    if edit == "punctuation":
        return text.replace(".", " …").replace(",", " ;").replace("'", "’").replace(" ", "  ")
    if edit == "typo and word replaced":
        return edited(edited(text, "typo", pick), "word replaced", pick)
    return text


if __name__ == "__main__":
    main()
