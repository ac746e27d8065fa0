"""Evaluation items planted in documents are found, as they stand and edited; other documents stay."""

import gzip
import json
import random
import re

import pytest
from planted import document, vocabulary

from jaxllm.data import eval_items, units
from jaxllm.data.decontaminate import Decontaminate, DecontaminateConfig, build_index
from jaxllm.data.document import Document
from jaxllm.errors import UserError


def edited(text: str, kind: str, pick: random.Random) -> str:
    """Returns a text with one light edit; a text without spaces is edited by its characters."""
    apart = " " if " " in text else ""
    words = text.split(" ") if apart else list(text)
    i = pick.randrange(len(words) - 1)
    if kind == "typo":
        at = pick.randrange(len(words[i]) or 1)
        words[i] = words[i][:at] + ("q" if apart else "龘") + words[i][at + 1 :]
    elif kind == "swap":
        words[i], words[i + 1] = words[i + 1], words[i]
    elif kind == "replace":
        words[i] = "something" if apart else "龘"
    elif kind == "insert":
        words.insert(i, "really" if apart else "龘")
    elif kind == "case":
        words = [word.upper() for word in words]
    elif kind == "punctuation":
        return text.replace(".", " …").replace(",", " ;").replace("'", "’").replace(" ", "  \n")
    return apart.join(words)


KINDS = ("typo", "swap", "replace", "insert", "case", "punctuation")


def written(sentences, apart) -> str:
    return ("! " if apart else "。").join(apart.join(s) for s in sentences)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two tasks, one without spaces, of items of 8 to 60 words in one template, and documents of the same vocabulary."""
    folder, pick = tmp_path_factory.mktemp("sets"), random.Random(0)
    tasks, words = {}, {"quiz": vocabulary(random.Random(2), True), "zh/exam": vocabulary(random.Random(1), False)}
    for task, apart in (("quiz", " "), ("zh/exam", "")):
        tasks[task] = [written(document(pick, words[task], pick.randrange(8 if apart else 14, 60)), apart) for _ in range(300)]
    (folder / "zh").mkdir()
    lines = [json.dumps({"query": f"Question: which of these is true?\n{t}\nAnswer:", "gold": 1, "choices": ["yes", "no"]}) for t in tasks["quiz"]]
    (folder / "quiz.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "zh" / "exam.json").write_text(json.dumps({"canary": "x", "examples": [{"input": t, "target": "a"} for t in tasks["zh/exam"]]}))
    (folder / "LICENSE").write_text("no task")
    texts = {task: [written(document(pick, words[task], 400), apart) for _ in range(500)] for task, apart in (("quiz", " "), ("zh/exam", ""))}
    return folder, tasks, texts


@pytest.fixture(scope="module")
def stage(made):
    return Decontaminate(DecontaminateConfig(folder=str(made[0])))


def test_planted_items_are_found(made, stage):
    """All as they stand, at least .95 of each kind of light edit and task, under the right task's name."""
    _, tasks, texts = made
    pick = random.Random(1)
    for kind in ("verbatim", *KINDS):
        for task, items in tasks.items():
            found = 0
            for item in items[:150]:
                host = pick.choice(texts[task])
                at = pick.randrange(len(host))
                doc = Document("1", "a", host[:at] + "\n" + (edited(item, kind, pick) if kind in KINDS else item) + "\n" + host[at:])
                removal = stage(doc)
                found += removal is not None and removal.rule == f"decontaminate.{task}" and doc.counts[f"decontaminate.task.{task}"] == 1
            assert found >= (150 if kind == "verbatim" else 0.95 * 150), (kind, task)


def test_documents_without_items_stay(made, stage):
    """At most one in a thousand documents of the items' own words goes; the template alone is no item."""
    texts = [text for each in made[2].values() for text in each]
    assert sum(stage(Document("1", "a", text)) is not None for text in texts) <= 0.001 * len(texts)
    assert stage(Document("1", "a", "Question: which of these is true? " * 20 + "Answer: Question: which of these")) is None
    assert stage(Document("1", "a", "")) is None


def test_a_part_of_an_item_is_not_the_item(made, stage):
    """A third of an item's words, in a row, is no reason to remove a document."""
    for task, items in made[1].items():
        apart = " " if task == "quiz" else ""
        for item in items[:100]:
            words = item.split(" ") if apart else list(item)
            part = apart.join(words[: max(len(words) // 3, 4)])
            assert stage(Document("1", "a", f"{made[2][task][0]}\n{part}\n{made[2][task][1]}")) is None


def test_only_the_item_is_cut(made):
    folder, tasks, texts = made
    stage = Decontaminate(DecontaminateConfig(folder=str(folder), action="span"))
    item, host = tasks["quiz"][0], texts["quiz"][0]
    assert stage.index.text[0] == item
    doc = Document("1", "a", f"{host}\n\n{item}\n\n{texts['quiz'][1]}")
    assert stage(doc) is None
    assert doc.text == f"{host}\n\n\n\n{texts['quiz'][1]}"
    assert doc.counts == {"decontaminate.task.quiz": 1, "decontaminate.characters_cut": len(item)}
    assert stage(Document("1", "a", item)).rule == "decontaminate.quiz"


def test_what_many_items_share_does_not_count_alone(tmp_path):
    """Items that differ in two words of forty are told from text that has only the rest."""
    pick = random.Random(0)
    words = vocabulary(random.Random(2), True)
    shared = document(pick, words, 60)
    frame = written(shared, " ").split(" ")
    items = [" ".join([*frame[:20], f"name{i} kind{i} of city{i} and year{i} with town{i} near lake{i} under hill{i}", *frame[40:]]) for i in range(100)]
    (tmp_path / "t.txt").write_text("\n".join(items))
    stage = Decontaminate(DecontaminateConfig(folder=str(tmp_path)))
    assert all(stage(Document("1", "a", "before " + item)) for item in items)
    assert stage(Document("1", "a", " ".join(frame[:20]) + " and other words follow " + " ".join(frame[40:]))) is None


def test_variants_of_one_text_are_all_found(tmp_path):
    """An item all of whose sequences are in many items is looked for all the same."""
    pick = random.Random(0)
    parts = [[" ".join(f"{part}{i}w{j}" for j in range(4)) for i in range(6)] for part in "abc"]
    items = [f"{a} {b} {c}" for a in parts[0] for b in parts[1] for c in parts[2] if pick.random() < 0.98]
    (tmp_path / "t.txt").write_text("\n".join([*items, *(f"other item number {i} about thing {i} and matter {i}" for i in range(900))]))
    stage = Decontaminate(DecontaminateConfig(folder=str(tmp_path), common=4))
    found = [stage(Document("1", "a", "before it " + item.replace("w3", "w3,") + " and after")) for item in items]
    assert all(found)


def test_questions_shorter_than_their_answers_are_found(tmp_path):
    """Any question of `min_words`, alone; labels, short answers and addresses alone are not; an item of short texts is, whole."""
    item = {"kind": "an ordinary label", "question": "Which of the nine harbours freezes first?",
            "answers": ["It is the one that lies farthest from all warm currents of the western sea, as sailors have long known.",
                        "no harbour freezes"], "source": "https://example.org/a/b/c/which-harbour-is-it-that-freezes"}
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, (item, {"q": "Largest moon?", "a": ["Ganymede moon", "Titan"]}))))
    stage = Decontaminate(DecontaminateConfig(folder=str(tmp_path)))
    for text, there in ((item["question"], True), (item["answers"][0], True), ("Largest moon?\n(A) Ganymede moon\n(B) Titan", False),
                        ("Largest moon?\nGanymede moon\nTitan", True), (item["source"], False), (item["answers"][1], False)):
        assert bool(stage.find(f"Before it stands this. {text} And this after it.")) == there, text


def test_short_items_have_to_be_more_alike(tmp_path):
    (tmp_path / "t.csv").write_text('"Which moon, of all, is largest?",Ganymede\ntoo short,x\n')
    index = build_index(DecontaminateConfig(folder=str(tmp_path)))
    assert (index.looked_for, index.too_short) == ({"t": 1}, {"t": 1})
    stage = Decontaminate(DecontaminateConfig(folder=str(tmp_path)), index)
    assert stage(Document("1", "a", "He asked: which MOON of all is largest, and left"))
    assert stage(Document("1", "a", "He asked: which mooon of all is largest, and left"))
    assert stage(Document("1", "a", "He asked: which star of all is the largest, and left")) is None  # .64
    assert Decontaminate(DecontaminateConfig(folder=str(tmp_path), short_similarity=0.6), index)(
        Document("1", "a", "He asked: which star of all is the largest, and left"))
    assert stage(Document("1", "a", "too short too short too short")) is None


@pytest.fixture
def rare(tmp_path):
    """A folder of 64 items of 6 words, each of which is in one item alone: 6 bits a word, 30 for 5 of them."""
    (tmp_path / "t.txt").write_text("\n".join(" ".join(f"{name}{chr(97 + i // 8)}{chr(97 + i % 8)}" for name in "pqrstu") for i in range(64)))
    return tmp_path


ONE_EDIT = ("paa qaa raa taa uaa", "paa qaa raa horse taa uaa", "qaa raa saa taa uaa", "paa qaa raa saa taa horse", "qaa paa raa saa taa uaa")
TWO_EDITS = ("paa qaa raa uaa", "paa qaa raa horse uaa", "paa qaa raa very old taa uaa", "saa taa uaa paa qaa raa", "paa qaa raa taa", "paa qaa raa")


def test_a_short_rare_item_is_found_with_one_edit(rare):
    """One word deleted, replaced or swapped, at an end or within; not two; only what stands there is cut."""
    cfg = DecontaminateConfig(folder=str(rare), short_similarity=1.0, action="span")
    stage = Decontaminate(cfg)
    for text in ONE_EDIT:
        (found,) = stage.find(f"He said: {text}, and left")
        assert (found[0], found[1] < 1) == (0, True), text
        doc = Document("1", "a", f"He said: {text}, and left")
        assert stage(doc) is None
        assert doc.text in ("He said: , and left", "He said:  horse, and left")
    for text in TWO_EDITS:
        assert not stage.find(f"He said: {text}, and left"), text


@pytest.mark.parametrize(("bits", "found"), [(30.0, 5), (30.01, 1), (36.0, 1), (36.01, 0), (0, 0), (None, 0)])
def test_bits_of_a_short_item(rare, bits, found):
    """Five of six words have 30 bits, two swapped have 36; 0 and null turn it off."""
    stage = Decontaminate(DecontaminateConfig(folder=str(rare), short_similarity=1.0, short_bits=bits))
    assert sum(bool(stage.find(f"He said: {text}, and left")) for text in ONE_EDIT) == found


def test_a_short_item_of_common_words_is_not_found_edited(tmp_path):
    """Of two questions as short, edited alike, the one whose words many items have is not taken for the item."""
    others = (f"what is the name of the city that lies in region number {i}" for i in range(2000))
    (tmp_path / "t.txt").write_text("\n".join(["What is the name of that?", "Do axolotls regenerate amputated limbs?", *others]))
    stage = Decontaminate(DecontaminateConfig(folder=str(tmp_path), short_similarity=1.0))
    assert stage.find("He asked: what is the name of that? And left.")
    for kind, rare, common in (("deleted", "do regenerate amputated limbs", "what the name of that"),
                               ("replaced", "do really regenerate amputated limbs", "what was the name of that"),
                               ("swapped", "axolotls do regenerate amputated limbs", "is what the name of that")):
        assert stage.find(f"He asked: {rare}? And left."), kind
        assert not stage.find(f"He asked: {common}? And left."), kind


@pytest.mark.parametrize(("name", "text", "items"), [
    ("a.json", '[{"q": "x y", "a": ["b", {"c": "d"}]}, "z"]', [["x y", "b", "d"], ["z"]]),
    ("a.json", '{"canary": "c", "examples": [{"input": "x"}, {"input": "y"}]}', [["x"], ["y"]]),
    ("a.json", '{"group": {"name": ["x", "y"], "other": ["z"]}}', [["x"], ["y"], ["z"]]),
    ("a.json", '{"q": "x"}\n{"q": "y"}\n', [["x"], ["y"]]),
    ("a.json", '{\n "q": "x"\n}', [["x"]]),
    ("a.jsonl", '\ufeff{"q": "x"}\n\n{"q": null, "n": 1}\n', [["x"], []]),
    ("a.tsv", 'x\t"y\nz\n', [["x", '"y'], ["z"]]),
    ("a.csv", '"x, 1",y\n', [["x, 1", "y"]]),
    ("a.txt", "x\n\n  \ny z\n", [["x"], ["y z"]]),
])
def test_items_of_files(tmp_path, name, text, items):
    (tmp_path / name).write_text(text)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    assert list(eval_items.items(tmp_path / name)) == list(eval_items.items(tmp_path / f"{name}.gz")) == items
    assert eval_items.files(str(tmp_path), "k") == [("a", tmp_path / name), ("a", tmp_path / f"{name}.gz")]


def test_mistakes_are_said(tmp_path, made):
    with pytest.raises(UserError, match=r"^decontaminate.folder=nowhere: no such folder"):
        Decontaminate(DecontaminateConfig(folder="nowhere"))
    with pytest.raises(UserError, match=r"no evaluation sets; files should end in one of .jsonl"):
        build_index(DecontaminateConfig(folder=str(tmp_path)))
    with pytest.raises(UserError, match=r"decontaminate.tasks=\['gsm\*'\]: no file in .* has such a name"):
        build_index(DecontaminateConfig(folder=str(made[0]), tasks=("gsm*",)))
    (tmp_path / "a.jsonl").write_text('{"q": "x"}\n{"q": \n')
    with pytest.raises(UserError, match=r"a.jsonl:2: not valid JSON"):
        build_index(DecontaminateConfig(folder=str(tmp_path)))
    (tmp_path / "a.jsonl").write_text('{"q": "x"}\n')
    with pytest.raises(UserError, match=r"no item has decontaminate.min_words=5 words"):
        build_index(DecontaminateConfig(folder=str(tmp_path)))
    with pytest.raises(ValueError, match=r"decontaminate.min_words=2: should be at least 3"):
        DecontaminateConfig(min_words=2)
    with pytest.raises(ValueError, match=r"decontaminate.short_bits=-1: should be at least 0, or null"):
        DecontaminateConfig(short_bits=-1)
    assert Decontaminate(DecontaminateConfig())(Document("1", "a", "nothing is looked for")) is None


@pytest.mark.slow
def test_real_evaluation_sets(shared_data):
    """Of real sets, every item of 5 words or more is found as it stands, .95 of those of 8 or more with an edit; of web pages
    that hold no item at most one in a hundred goes."""
    cfg = DecontaminateConfig(folder=str(shared_data), tasks=("eval_gauntlet/arc*", "eval_gauntlet/[gps]*", "eval_gauntlet/tri*", "bbh/*",
                                                              "gsm8k/test", "truthfulqa/*", "winobias/*type?.txt*"))
    stage, pick = Decontaminate(cfg), random.Random(0)
    with gzip.open(shared_data / "c4_wiki_sample" / "c4_demo.jsonl.gz", "rt", encoding="utf-8") as file:
        pages = [json.loads(line)["text"] for line in file]
    assert sum(bool(stage.find(page)) for page in pages) <= 0.01 * len(pages)
    shown = [text for name, path in eval_items.files(cfg.folder, "k") if name in stage.index.looked_for
             for texts in eval_items.items(path) for text in ("\n".join(texts), *(t for t in texts if t.rstrip().endswith("?")))]
    for text in pick.sample([text for text in shown if len(units.units(text).hash_W) >= cfg.min_words], 600):
        page = pick.choice(pages)
        assert stage.find(page[:500] + "\n" + text + "\n" + page[500:]), text
    for kind in KINDS:
        chosen = [i for i in pick.sample(range(len(stage.index.text)), 300) if stage.index.words[i] >= cfg.long_words]
        found = 0
        for i in chosen:
            item = stage.index.text[i]
            item = edited(item, kind, pick) if kind in KINDS and re.search(r"\s", item) else item
            page = pick.choice(pages)
            found += bool(stage.find(page[:500] + "\n" + item + "\n" + page[500:]))
        assert found >= 0.95 * len(chosen), kind
