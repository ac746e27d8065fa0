"""How much planted toxic text the harm stage finds, and how much clean text it drops: no row is trained on and measured.

    python benchmarks/harm.py DATA [--keep=FILE]    # DATA: a folder with davidson_hate, hatecheck, diasafety, wikitext2, …

Trained on: four fifths of the labelled tweets (Davidson et al. 2017; chosen by a hash of their words), the answers of
DiaSafety's training part that were labelled offending or biased (and its safe ones), and ordinary text: wikitext-2's
validation part, samples of C4 and Wikipedia, Shakespeare, dialogues about orders and worked exercises. Measured on:
documents of wikitext-2's test part, as they are and with a toxic passage among their sentences, which is one held-out
tweet, or three that follow one another. Dropped: the share of clean documents, and of those that hold no listed word,
as some of wikitext's quote slurs and curses.

HateCheck is measured and not trained on: its sentences differ by what is said of whom, which counts of words do not see.
"""

import argparse
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import pathlib
import random
import re
import tempfile
import time

import numpy as np

from jaxllm.data.classifier import auc, train
from jaxllm.data.harm import Harm, HarmClassifierConfig, HarmConfig
from jaxllm.data.words import spoken


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--keep", help="where the trained classifier goes")
    parser.add_argument("--train", default="{}", help="settings of the training as JSON")
    args = parser.parse_args()
    tweets = read_tweets(args.data)
    held_out = [t for t in tweets if fold(t["text"]) == 0]
    texts = [(t["text"], t["bad"]) for t in tweets if fold(t["text"])] + read_diasafety(args.data) + ordinary(args.data)
    begun = time.process_time()
    classifier = train(texts, dataclasses.replace(HarmClassifierConfig().train, **json.loads(args.train)))
    n_bad = sum(bad for _, bad in texts)
    print(f"trained on {len(texts)} texts, {n_bad} of them toxic, in {time.process_time() - begun:.0f} s")
    with tempfile.TemporaryDirectory() as folder:
        path = args.keep or f"{folder}/harm.npz"
        classifier.save(path)
        print(f"classifier file: {pathlib.Path(path).stat().st_size / 1e6:.1f} MB")
        words = [str(args.data / "ldnoobw" / "en")] if (args.data / "ldnoobw" / "en").exists() else []
        for name, knobs in (("classifier", {}), ("classifier and list", {"words": words}), ("list alone", {"words": words})):
            found = HarmClassifierConfig(path="" if name == "list alone" else path)
            if name == "classifier" or words:
                report(name, Harm(HarmConfig(action="tag", classifier=found, **knobs)), held_out, args.data, words)


def report(name: str, stage: Harm, held_out: list[dict], data: pathlib.Path, words: list[str]) -> None:
    def score(texts):
        out = []
        for text in texts:
            chance = stage.passages(spoken(text))[2]
            out.append(float(chance.max()) if len(chance) else 0.0)
        return np.array(out)

    clean = documents(data)
    print(f"{name}:")
    toxic = [t["text"] for t in held_out if t["bad"]]
    agreed = [t["text"] for t in held_out if t["bad"] and t["agreed"]]
    benign = [t["text"] for t in held_out if not t["bad"]]
    begun = time.process_time()
    scored = score(clean)
    seconds = time.process_time() - begun
    unlisted = np.array([not listed(text, words) for text in clean])
    draw = random.Random(0)
    rows = {"one toxic tweet": [plant(draw, clean, [t]) for t in toxic],
            "one that all annotators called toxic": [plant(draw, clean, [t]) for t in agreed],
            "three of those": [plant(draw, clean, draw.sample(agreed, 3)) for _ in range(1000)],
            "one tweet that is not toxic": [plant(draw, clean, [t]) for t in benign]}
    rows = {kind: score(found) for kind, found in rows.items()}
    print(f"  {'threshold':>9} {'dropped':>8} {'unlisted':>9}  " + "  ".join(rows))
    for threshold in (0.5, 0.8, 0.9, 0.95, 0.98, 0.99):
        dropped = scored >= threshold
        print(f"  {threshold:9} {dropped.mean():8.4f} {dropped[unlisted].mean():9.4f}  "
              + "  ".join(f"{(found >= threshold).mean():{len(kind)}.4f}" for kind, found in rows.items()))
    tweets = score([t["text"] for t in held_out])
    bad = np.array([t["bad"] for t in held_out])
    cases = list(csv.DictReader(opened(data / "hatecheck" / "test_suite_cases.csv.gz")))
    hateful = np.array([c["label_gold"] == "hateful" for c in cases])
    checked = score([c["test_case"] for c in cases])
    print(f"  area under the ROC curve: tweets {auc(tweets[bad], tweets[~bad]):.4f}, "
          f"HateCheck (never trained on) {auc(checked[hateful], checked[~hateful]):.4f}")
    print(f"  {sum(len(t.encode()) for t in clean) / seconds / 1e6:.0f} MB/s of CPU time")


def listed(text: str, words: list[str]) -> bool:
    if not words:
        return False
    entries = [re.escape(w) for w in pathlib.Path(words[0]).read_text(encoding="utf-8").split("\n") if w]
    return bool(re.search(rf"\b(?:{'|'.join(entries)})\b", text, re.I))


def plant(draw: random.Random, clean: list[str], passage: list[str]) -> str:
    sentences = draw.choice(clean).split(" . ")
    sentences.insert(draw.randrange(len(sentences) + 1), " ".join(passage))
    return " . ".join(sentences)


def documents(data: pathlib.Path) -> list[str]:
    """Returns wikitext-2's test part in documents of four paragraphs."""
    paragraphs = long_lines(opened(data / "wikitext2" / "test.txt.gz").read())
    return [" ".join(paragraphs[i:i + 4]) for i in range(0, len(paragraphs) - 3, 4)]


def ordinary(data: pathlib.Path) -> list[tuple[str, bool]]:
    texts = long_lines(opened(data / "wikitext2" / "valid.txt.gz").read())
    texts += [json.loads(line)["text"] for line in opened(data / "c4_wiki_sample" / "c4_demo.jsonl.gz")]
    texts += long_lines(opened(data / "c4_wiki_sample" / "wiki_demo.txt.gz").read())
    texts += opened(data / "tinyshakespeare" / "input.txt.gz").read().split("\n\n")
    for path in sorted((data / "taskmaster").glob("*.json.gz")):
        texts += [" ".join(u["text"] for u in talk["utterances"]) for talk in json.load(opened(path))]
    for path in sorted((data / "flan_cot").glob("*.tsv.gz")):
        texts += opened(path).read().split("\n")[:1000]
    return [(text, False) for text in texts]


def long_lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if len(line) > 100]


def read_tweets(data: pathlib.Path) -> list[dict]:
    """Returns the labelled tweets, each once; `agreed`: no annotator said otherwise."""
    rows = {}
    for row in csv.DictReader(opened(data / "davidson_hate" / "labeled_data.csv.gz")):
        toxic = int(row["hate_speech"]) + int(row["offensive_language"])
        text = re.sub(r"&#?\w+;|https?://\S+", " ", row["tweet"])
        rows[key(text)] = {"text": text, "bad": row["class"] != "2", "agreed": toxic in (0, int(row["count"]))}
    return list(rows.values())


def key(text: str) -> str:
    """Returns what retweets of one text share: its words without who is spoken to."""
    return " ".join(re.findall(r"[a-z]+", re.sub(r"\brt\b|@\w+", " ", text.lower())))


def fold(text: str) -> int:
    return int(hashlib.sha256(key(text).encode()).hexdigest()[:8], 16) % 5


def read_diasafety(data: pathlib.Path) -> list[tuple[str, bool]]:
    rows = json.load(opened(data / "diasafety" / "train.json.gz"))
    kinds = {"Offending User", "Biased Opinion", "Toxicity Agreement"}
    return [(row["response"], row["label"] != "Safe") for row in rows if row["category"] in kinds]


def opened(path: pathlib.Path) -> io.TextIOBase:
    return io.TextIOWrapper(gzip.open(path), encoding="utf-8")


if __name__ == "__main__":
    main()
