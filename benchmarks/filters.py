"""CPU time of each filter on real text, one core: MB of text a second, and its share of a document's time.

    python benchmarks/filters.py DATA    # DATA: a folder with c4_wiki_sample, wikitext2, davidson_hate, ldnoobw
"""

import gzip
import json
import pathlib
import sys
import tempfile
import time

from jaxllm.data.classifier import ByClassifier, ClassifierConfig, TrainingConfig, train
from jaxllm.data.document import Document
from jaxllm.data.harm import Harm, HarmClassifierConfig, HarmConfig
from jaxllm.data.language import Language, LanguageConfig
from jaxllm.data.lists import Lists, ListsConfig
from jaxllm.data.quality import C4, C4Config, FineWeb, FineWebConfig, Gopher, GopherConfig

ROUNDS = 5


def main(data: pathlib.Path) -> None:
    pages = [json.loads(line)["text"] for line in read(data / "c4_wiki_sample" / "c4_demo.jsonl.gz").split("\n") if line]
    articles = [a for a in read(data / "c4_wiki_sample" / "wiki_demo.txt.gz").split("\n") if a]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/c.npz"
        train([(text, False) for text in pages] + [(text, True) for text in articles], TrainingConfig(epochs=1)).save(path)
        words = [str(data / "ldnoobw" / "en")]
        stages = [Language(LanguageConfig()), Lists(ListsConfig(words=words)), Gopher(GopherConfig()), C4(C4Config()),
                  FineWeb(FineWebConfig()), ByClassifier(ClassifierConfig(path=path, min_score=0)),
                  Harm(HarmConfig(action="tag", words=words, classifier=HarmClassifierConfig(path=path))),
                  Harm(HarmConfig(action="counterfactual"))]
    for name, texts in (("pages of C4", pages), ("articles of Wikipedia", articles)):
        size = sum(len(text.encode()) for text in texts)
        print(f"{name}: {len(texts)} documents of {size / len(texts) / 1e3:.1f} kB")
        total = 0.0
        for stage in stages:
            seconds = min(timed(stage, texts) for _ in range(ROUNDS))
            counted = not (isinstance(stage, Harm) and stage.cfg.action == "counterfactual")
            total += seconds * counted
            label = type(stage).__name__ + (f" ({stage.cfg.action})" if isinstance(stage, Harm) else "")
            print(f"  {label:<24}{size / seconds / 1e6:8.1f} MB/s {seconds / len(texts) * 1e6:8.0f} us a document")
        print(f"  {'all but the last':<24}{size / total / 1e6:8.1f} MB/s")
        together = min(timed(chain(stages[:-1]), texts) for _ in range(ROUNDS))
        print(f"  {'one after the other':<24}{size / together / 1e6:8.1f} MB/s: words are found once for stages that follow")


def read(path: pathlib.Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def chain(stages):
    def run(doc: Document) -> None:
        for stage in stages:
            stage(doc)

    return run


def timed(stage, texts: list[str]) -> float:
    docs = [Document(str(i), "x", " " + text) for i, text in enumerate(texts)]  # a new string: nothing of it is remembered
    begun = time.process_time()
    for doc in docs:
        stage(doc)
    return time.process_time() - begun


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
