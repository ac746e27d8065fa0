"""Words that sources use differently are found, words that they only use in different company are not; and what treats them."""

import random

import numpy as np
import pytest

from jaxllm.data.document import Document
from jaxllm.data.homographs import Homographs, HomographsConfig, jensen_shannon, report
from jaxllm.errors import UserError

COMMON = [f"common{i}" for i in range(60)]
FIELD = {"law": [f"lex{i}" for i in range(60)], "medicine": [f"med{i}" for i in range(60)]}
SHARED = [f"shared{i}" for i in range(40)]
PLANTED = {"cell": {"law": ["prison", "guard", "bars"], "medicine": ["tissue", "membrane", "nucleus"]},
           "Trial": {"law": ["jury", "judge", "court"], "medicine": ["placebo", "dose", "patients"]}}
KNOBS = dict(min_count=30, skip=0)


def corpus(seed: int = 0, planted: bool = True, n: int = 120):
    """Yields documents of two sources that speak of their fields half of the time; planted words have their own company in each."""
    draw, out = random.Random(seed), []
    for _ in range(n):
        for source, own in FIELD.items():
            words = [draw.choice(draw.choice([COMMON, own])) for _ in range(60)]
            for shared in draw.sample(SHARED, 12):
                words.insert(draw.randrange(len(words)), shared)
            for word, company in PLANTED.items() if planted else ():
                near = [word, *draw.sample(company[source], 2)]
                draw.shuffle(near)
                at = draw.randrange(len(words))
                words[at:at] = near
            out.append((source, " ".join(words) + "."))
    return out


def test_planted_words_are_found_and_no_others():
    rows = report(lambda: iter(corpus()), HomographsConfig(**KNOBS))
    told = {row.word for row in rows}
    assert {"cell", "trial"} <= told <= {"cell", "trial", *(w for c in PLANTED.values() for v in c.values() for w in v)}
    row = next(row for row in rows if row.word == "cell")
    assert (row.source_a, row.source_b, row.count_a, row.count_b) == ("law", "medicine", 120, 120)
    assert set(row.words_a) >= {"prison", "guard", "bars"} and set(row.words_b) >= {"tissue", "membrane", "nucleus"}
    assert 0 < row.baseline < row.divergence <= 1 and row.excess == pytest.approx(row.divergence - row.baseline, abs=2e-4)
    assert row.standing > 3 and row.excess > row.typical > 0  # the fields alone make some difference
    assert len(row.examples_a) == 3 and all("cell" in example for example in row.examples_a + row.examples_b)


@pytest.mark.parametrize("seed", range(3))
def test_different_company_of_all_words_is_no_homograph(seed):
    assert report(lambda: iter(corpus(seed, planted=False)), HomographsConfig(**KNOBS)) == []


def test_a_rare_word_that_differs_by_chance_is_not_told():
    """Two sources that are the same: with few occurrences their contexts share little, and so do a source's own halves."""
    draw = random.Random(5)
    vocabulary = [f"v{i}" for i in range(400)]
    texts = [(source, " ".join(draw.choice(vocabulary) for _ in range(50))) for _ in range(250) for source in ("a", "b")]
    assert report(lambda: iter(texts), HomographsConfig(min_count=20, skip=0)) == []


def test_the_order_of_documents_changes_no_number():
    texts = corpus(n=60)
    rows = report(lambda: iter(texts), HomographsConfig(**KNOBS))
    turned = report(lambda: reversed(texts), HomographsConfig(**KNOBS))
    assert rows and [row[:-2] for row in rows] == [row[:-2] for row in turned]
    assert rows == report(lambda: iter(texts), HomographsConfig(**KNOBS))


def test_one_source_or_no_text_has_no_homographs():
    assert report(lambda: iter([]), HomographsConfig()) == []
    assert report(lambda: iter([("a", "cell " * 200)]), HomographsConfig(**KNOBS)) == []
    assert report(lambda: iter([("a", "cell " * 200), ("b", "")]), HomographsConfig(**KNOBS)) == []


def test_divergence():
    p, q = np.array([[0.5, 0.5, 0], [1, 0, 0]]), np.array([[0.5, 0.5, 0], [0, 0, 1.0]])
    assert jensen_shannon(p, q) == pytest.approx([0, 1])


def table(tmp_path, text: str) -> str:
    path = tmp_path / "terms.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_an_experts_terms_stand_for_words_of_their_source(tmp_path):
    stage = Homographs(HomographsConfig(treatment="terms", terms=table(
        tmp_path, "word,source,replacement\ncell,law,prison cell\nTrial,medicine,clinical study\n")))
    law, medicine = (Document("1", source, "The CELL, a cell's trial; Cell cells.") for source in ("law", "medicine"))
    assert stage(law) is stage(medicine) is None
    assert law.text == "The PRISON CELL, a cell's trial; Prison cell cells." and law.counts == {"homographs.replaced": 2}
    assert medicine.text == "The CELL, a cell's clinical study; Cell cells." and medicine.counts == {"homographs.replaced": 1}
    other = Document("1", "news", "The cell.")
    assert stage(other) is None and other.text == "The cell." and not other.counts


def test_a_tag_names_the_source():
    doc = Document("1", "law", "Text.")
    assert Homographs(HomographsConfig(treatment="tag"))(doc) is None
    assert doc.text == "<|law|>Text."


@pytest.mark.parametrize("text, part", [
    ("word,source\ncell,law\n", "has the columns word, source; should have word, source, replacement"),
    ("word,source,replacement\nprison cell,law,x\n", "row 2: should be one word"),
    ("word,source,replacement\ncell,law,\n", "row 2: should be one word"),
    ("word,source,replacement\ncell,law,x\nCell,law,y\n", "row 3: 'Cell' of law has another replacement"),
])
def test_a_table_that_cannot_be_used_says_where(tmp_path, text, part):
    with pytest.raises(UserError, match=part):
        Homographs(HomographsConfig(treatment="terms", terms=table(tmp_path, text)))


@pytest.mark.parametrize("knobs, part", [
    (dict(window=0), "homographs.window=0"), (dict(treatment="tag", tag="<|x|>"), "should hold {source}"),
    (dict(treatment="terms"), "terms need a table"), (dict(terms="x.csv"), "terms need a table"),
])
def test_a_setting_that_cannot_be_is_named(knobs, part):
    with pytest.raises(ValueError, match=part):
        HomographsConfig(**knobs)
