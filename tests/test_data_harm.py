"""Harm and quality are measured by passage, by signals that join; what the actions leave behind is counted.

All words here are made up: "grumf" and "blarg" stand for insults, "zorks" for a group of people.
"""

import csv
import json
import pathlib
import random

import numpy as np
import pytest

from jaxllm.data import classifier as c
from jaxllm.data.counterfactual import Swap
from jaxllm.data.document import Document
from jaxllm.data.filters import FilterConfig, Filters
from jaxllm.data.harm import Harm, HarmClassifierConfig, HarmConfig
from jaxllm.data.lists import Lists, ListsConfig, Phrases, blocked_host
from jaxllm.data.words import spoken
from jaxllm.errors import UserError

PLAIN = [f"plain{i}" for i in range(300)]
TRAINING = c.TrainingConfig(passage_words=12, planted=2, bits=14, lr=0.3)
BAD = [f"rude{i}" for i in range(12)]


def sentence(draw: random.Random, n: int, *extra: str) -> str:
    words = [*(draw.choice(PLAIN) for _ in range(n)), *extra]
    draw.shuffle(words)
    return " ".join(words).capitalize() + "."


def texts(seed: int, n: int) -> list[tuple[str, bool]]:
    """Returns short texts, every other one of which holds rude words."""
    draw = random.Random(seed)
    return [(sentence(draw, 5, *draw.sample(BAD, 4)), True) if i % 2 else (sentence(draw, 14), False) for i in range(n)]


@pytest.fixture(scope="module")
def trained() -> c.Classifier:
    return c.train(texts(0, 1200), TRAINING)


@pytest.fixture(scope="module")
def path(trained, tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("classifier") / "harm.npz"
    trained.save(file)
    return str(file)


def listed(tmp_path, *words: str, name: str = "words.txt") -> str:
    file = tmp_path / name
    file.write_text("# made up\n\n" + "\n".join(words), encoding="utf-8")
    return str(file)


def document(text: str, **meta) -> Document:
    return Document("1", "web", text, meta)


# ---------------------------------------------------------------- the classifier


def test_a_classifier_tells_texts_that_it_has_not_seen(trained):
    found = c.measure(trained, texts(1, 200))
    assert found["auc"] > 0.99 and found["bad_found"] > 0.95 and found["good_kept"] > 0.95


def test_planted_passages_are_found_in_long_documents(trained):
    """Recall at least .95 where at most 1 % of clean documents are dropped."""
    draw = random.Random(2)
    clean, planted = [], []
    for _ in range(200):
        parts = [sentence(draw, 11) for _ in range(20)]
        clean.append(" ".join(parts))
        parts.insert(draw.randrange(20), sentence(draw, 5, *draw.sample(BAD, 4)))
        planted.append(" ".join(parts))
    score = {kind: np.array([trained.passages(spoken(text)).logit_P.max() for text in found])
             for kind, found in (("clean", clean), ("planted", planted))}
    threshold = np.quantile(score["clean"], 0.99, method="higher")
    assert (score["planted"] > threshold).mean() >= 0.95


@pytest.mark.parametrize("n", [0, 1, 2, 5, 11, 12, 13, 40])
def test_a_passage_is_scored_as_if_it_stood_alone(n):
    trained = c.Classifier(np.random.default_rng(n).normal(size=1 << 12).astype(np.float32), 0.5, 12, {})
    words = random.Random(n).choices(PLAIN + BAD, k=n)
    found = trained.passages(spoken(" ".join(words)))
    assert len(found.start_P) >= 1 and found.end_P[-1] == n
    covered = set()
    for start, end, logit in zip(*found, strict=True):
        covered |= set(range(start, end))
        alone = trained.passages(spoken(" ".join(words[start:end])))
        if end > start:
            assert alone.logit_P[0] == pytest.approx(logit, abs=1e-4)
    assert covered == set(range(n))


def test_training_twice_gives_the_same_bytes(tmp_path, trained, path):
    again = c.train(texts(0, 1200), TRAINING)
    again.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == pathlib.Path(path).read_bytes()
    loaded = c.load(path, "x")
    assert loaded.score("plain1 rude2 rude3") == trained.score("plain1 rude2 rude3") < trained.score("plain1 plain2")


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_classifier_is_trained_from_files_once(tmp_path):
    file = jsonl(tmp_path / "labelled.jsonl", [{"text": text, "label": int(bad)} for text, bad in texts(3, 400)])
    cfg = c.ClassifierConfig(path=str(tmp_path / "made" / "c.npz"), train=c.TrainingConfig(labelled=file, passage_words=12, bits=14))
    about = c.ready(cfg, "filter.classifier")
    assert about["held_out"]["auc"] > 0.95 and about["trained_on"] + about["held_out"]["texts"] == 400
    made = (tmp_path / "made" / "c.npz").stat().st_mtime_ns
    assert c.ready(cfg, "filter.classifier") == about
    assert (tmp_path / "made" / "c.npz").stat().st_mtime_ns == made  # the same texts: not again
    with open(file, "a", encoding="utf-8") as f:
        f.write('{"text": "plain1 plain2", "label": 0}\n')
    assert c.ready(cfg, "filter.classifier")["texts"] != about["texts"]
    assert c.ready(c.ClassifierConfig(), "filter.classifier") is None


def test_a_classifier_is_trained_from_two_folders(tmp_path):
    for name, wanted in (("good", False), ("bad", True)):
        (tmp_path / name).mkdir()
        for i, (text, bad) in enumerate(texts(4, 300)):
            if bad == wanted:
                (tmp_path / name / f"{i}.txt").write_text(text, encoding="utf-8")
    cfg = c.ClassifierConfig(path=str(tmp_path / "c.npz"), train=c.TrainingConfig(good=str(tmp_path / "good"), bad=str(tmp_path / "bad"), bits=14))
    assert c.ready(cfg, "filter.classifier")["trained_on"] > 250
    stage = Filters(FilterConfig(gopher=GOPHER_OFF, c4=C4_OFF, fineweb=FINEWEB_OFF, classifier=cfg))
    good, bad = document("plain1 plain2 plain3 plain4 plain5"), document("plain1 rude2 rude3 rude4 plain2")
    assert stage(good) is None and good.meta["quality_score"] > 0.5
    assert stage(bad) == ("classifier.min_score", bad.meta["quality_score"], None)


GOPHER_OFF, C4_OFF, FINEWEB_OFF = (type(getattr(FilterConfig(), g))(use=False) for g in ("gopher", "c4", "fineweb"))


@pytest.mark.parametrize("lines, part", [
    (['{"text": "a b", "label": 2}'], "labelled.jsonl:1: label=2: should be 0 or 1"), (['{"text": "a"}'], "should be a JSON object with 'text'"),
    (["nonsense"], "labelled.jsonl:1: should be a JSON object"), (['{"text": "a b", "label": 1}'], "no good text has a word"),
])
def test_labels_that_cannot_be_used_say_where(tmp_path, lines, part):
    (tmp_path / "labelled.jsonl").write_text("\n".join(lines), encoding="utf-8")
    cfg = c.ClassifierConfig(path=str(tmp_path / "c.npz"), train=c.TrainingConfig(labelled=str(tmp_path / "labelled.jsonl")))
    with pytest.raises(UserError, match=part):
        c.ready(cfg, "harm.classifier")


def test_a_file_that_is_no_classifier_is_named(tmp_path):
    for name, data in (("a.npz", b"text"), ("b.npz", b"PK\x03\x04 cut short")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"harm\.classifier\.path=.*{name}: cannot be read as a classifier"):
            c.load(str(tmp_path / name), "harm.classifier.path")
    with pytest.raises(UserError, match="No such file"):
        c.load(str(tmp_path / "none.npz"), "harm.classifier.path")


# ---------------------------------------------------------------- signals


def harm(**knobs) -> Harm:
    return Harm(HarmConfig(use=True, **knobs))


def test_one_listed_word_is_not_enough_and_three_or_a_target_are(tmp_path):
    stage = harm(threshold=0.5, word_weight=0.3, words=[listed(tmp_path, "grumf", "total blarg")], identity=[listed(tmp_path, "zorks", name="identity.txt")])
    for text, score in (("You said grumf once in a while.", 0.3), ("Grumf, total BLARG and grumf.", 1 - 0.7**3),
                        ("All zorks are grumf.", 1 - 0.7 * 0.5), ("The zorks live here in peace.", 0.0), ("A blarg.", 0.0),
                        ("Zorks " + "and so on " * 3 + "grumf", 0.3)):
        doc = document(text)
        removal = stage(doc)
        assert doc.meta["harm_score"] == pytest.approx(score, abs=1e-4), text
        assert removal == (("harm.threshold", doc.meta["harm_score"], None) if score >= 0.5 else None)


def test_a_list_and_a_classifier_join(tmp_path, path):
    text = "Plain1 plain2 rude3 plain4 grumf plain5."
    alone = document(text)
    harm(action="tag", classifier=HarmClassifierConfig(path=path), threshold=0.99)(alone)
    both = document(text)
    harm(action="tag", classifier=HarmClassifierConfig(path=path), threshold=0.99, words=[listed(tmp_path, "grumf")],
         word_weight=0.3)(both)
    assert both.meta["harm_score"] == pytest.approx(1 - (1 - alone.meta["harm_score"]) * 0.7, abs=1e-3)


# ---------------------------------------------------------------- actions


def corpus(n: int = 40) -> list[Document]:
    """Returns documents of ten sentences, every fourth of which has a rude one."""
    draw, out = random.Random(7), []
    for i in range(n):
        parts = [sentence(draw, 12) for _ in range(10)]
        if i % 4 == 0:
            parts[draw.randrange(10)] = sentence(draw, 4, *draw.sample(BAD, 8))
        out.append(Document(str(i), "web", "\n".join(parts)))
    return out


def totals(docs: list[Document]) -> dict[str, float]:
    return {key: sum(doc.counts.get(key, 0) for doc in docs) for doc in docs for key in doc.counts}


@pytest.mark.parametrize("action, harmful_after, documents_after", [("filter", 0, 30), ("tag", 10, 40), ("redact", 0, 40)])
def test_shares_before_and_after(path, action, harmful_after, documents_after):
    stage, docs = harm(action=action, classifier=HarmClassifierConfig(path=path), threshold=0.9), corpus()
    removed = [doc for doc in docs if stage(doc)]
    found = totals(docs)
    assert (found["harm.documents_before"], found["harm.harmful_documents_before"]) == (40, 10)
    assert (found["harm.documents_after"], found["harm.harmful_documents_after"]) == (documents_after, harmful_after)
    assert 0 < found["harm.harmful_characters_before"] < found["harm.characters_before"] / 10
    assert [doc.id for doc in removed] == ([str(i) for i in range(0, 40, 4)] if action == "filter" else [])


def test_only_the_harmful_sentence_is_redacted(path):
    stage = harm(action="redact", classifier=HarmClassifierConfig(path=path), threshold=0.9)
    for doc, original in zip(corpus(), corpus(), strict=True):
        assert stage(doc) is None
        lines = [line for line in original.text.split("\n") if "rude" not in line]
        assert [line for line in doc.text.split("\n") if line != "[removed]"] == lines
        assert doc.text.count("[removed]") == doc.counts.get("harm.redacted", 0) == int(len(lines) == 9)


def test_what_stays_harmful_after_redaction_is_dropped(tmp_path):
    stage = harm(action="redact", words=[listed(tmp_path, "grumf")], word_weight=1.0, redaction="grumf")
    assert stage(document("So grumf."))[0] == "harm.redact"
    kept = document("First. İİ so grumf! Last. \n\nNext.")  # the lower case of İ is two characters
    assert harm(action="redact", words=[listed(tmp_path, "grumf")], word_weight=1.0)(kept) is None
    assert kept.text == "First. [removed] Last. \n\nNext."


def test_tags_stand_in_front(path):
    stage = harm(action="tag", classifier=HarmClassifierConfig(path=path), threshold=0.9, clean_tag="<|fine|>")
    docs = corpus()
    assert not any(stage(doc) for doc in docs)
    tagged = [doc.text.startswith("<|harmful|>" + original.text) for doc, original in zip(docs, corpus(), strict=True)]
    assert tagged == [i % 4 == 0 for i in range(40)]
    assert all(doc.text.startswith("<|fine|>") for i, doc in enumerate(docs) if i % 4)


@pytest.mark.parametrize("text, swapped", [
    ("She said his book is hers, but HE saw her.", "He said her book is his, but SHE saw him."),
    ("Her brother told him that the girl is his.", "His sister told her that the boy is hers."),
    ("The actress's mother, Mrs. Smith", "The actress's father, Mr. Smith"), ("nothing here", "nothing here"), ("", ""),
])
def test_pairs_are_swapped_with_their_capitals(text, swapped):
    swap = Swap("", 1.0)
    assert swap.swapped(text) == swapped
    assert swap.swapped(swapped) == text


def test_half_of_the_documents_are_swapped_and_the_sides_come_to_balance():
    stage = harm(action="counterfactual")
    docs = [Document(str(i), "web", "He took his hat. She waved. He left, the man.") for i in range(400)]
    assert not any(stage(doc) for doc in docs)
    found = totals(docs)
    assert (found["harm.first_words_before"], found["harm.second_words_before"]) == (400, 1600)
    assert 160 < found["harm.swapped"] < 240
    assert found["harm.first_words_after"] / found["harm.second_words_after"] == pytest.approx(1, abs=0.25)
    assert {doc.text for doc in docs} == {"He took his hat. She waved. He left, the man.", "She took her hat. He waved. She left, the woman."}


def test_pairs_come_from_a_table(tmp_path):
    with open(tmp_path / "pairs.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([["zork", "blip"], ["Zorks", "blips"]])
    swap = Swap(str(tmp_path / "pairs.csv"), 1.0)
    assert swap.swapped("Blips and a ZORK, he said.") == "Zorks and a BLIP, he said."
    for text, part in (("a,b\nb,c\n", "row 2: 'b' is in another pair"), ("a b,c\n", "row 1 is 'a b,c'"), ("", "holds no pair")):
        (tmp_path / "pairs.csv").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=part):
            Swap(str(tmp_path / "pairs.csv"), 1.0)


@pytest.mark.parametrize("knobs, part", [
    (dict(threshold=0.0), "harm.threshold=0"), (dict(word_weight=2.0), "harm.word_weight=2.0"), (dict(passage_words=1), "harm.passage_words=1"),
])
def test_a_setting_that_cannot_be_is_named(knobs, part):
    with pytest.raises(ValueError, match=part):
        HarmConfig(**knobs)


def test_harm_without_a_signal_is_refused():
    with pytest.raises(UserError, match="nothing to find harm by"):
        harm()


# ---------------------------------------------------------------- lists


@pytest.mark.parametrize("url, host", [
    ("https://www.bad.example/x", "bad.example"), ("http://a.b.bad.example:80/", "bad.example"), ("bad.example", "bad.example"),
    ("https://notbad.example/bad.example", None), ("https://example/", None), ("http://[::1", None), ("", None),
])
def test_hosts_and_what_lies_under_them(url, host):
    assert blocked_host(url, frozenset({"bad.example"})) == host


def test_lists_drop_by_url_and_by_words(tmp_path):
    stage = Lists(ListsConfig(hosts=[listed(tmp_path, "www.bad.example", name="h")], url_words=[listed(tmp_path, "blarg", name="u")],
                              words=[listed(tmp_path, "grumf", "total zork", name="w")]))
    assert stage(document("fine", url="https://sub.bad.example/")) == ("lists.host", "bad.example", None)
    assert stage(document("fine", url="https://good.example/some-Blarg/1")) == ("lists.url_word", "blarg", None)
    assert stage(document("fine", url="https://good.example/blarging")) is None
    assert stage(document("plain " * 199 + "grumf")) is None  # 5 a thousand
    assert stage(document("plain " * 198 + "Grumf"))[:2] == ("lists.words", pytest.approx(1000 / 199))
    assert stage(document("plain " * 100 + "Total\nZORK"))[0] == "lists.words"
    doc = document("zork total plain")
    assert stage(doc) is None and doc.counts == {"lists.words": 0}


def test_phrases_are_found_where_they_stand():
    phrases = Phrases(["grumf", "total zork", "  ", "今天"])
    assert phrases.find(spoken("a Grumf total zork, total. 我今天")) == [(1, 2), (2, 4), (6, 8)]
    assert not Phrases([]) and Phrases([]).find(spoken("a")) == []


def test_a_list_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"filter\.lists\.words=.*none: cannot be read: No such file"):
        Lists(ListsConfig(words=[str(tmp_path / "none")]))
    with pytest.raises(UserError, match="holds no entry"):
        Lists(ListsConfig(hosts=[listed(tmp_path)]))
