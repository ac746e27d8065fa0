"""Expert review: figures against published examples, estimates against planted truth, and the page in a real browser."""

import contextlib
import csv
import http.client
import io
import itertools
import json
import pathlib
import re
import signal
import subprocess
import sys
import threading

import browser
import numpy as np
import pytest
import zstandard
from reviewed import write_folder

from jaxllm import cli
from jaxllm.data.review import agreement, estimate
from jaxllm.data.review.config import ReviewVerb
from jaxllm.data.review.estimate import Stratum
from jaxllm.data.review.labels import Label, Labels, export, take
from jaxllm.data.review.local import make_server
from jaxllm.data.review.results import results, verdicts
from jaxllm.data.review.sample import Item, Sample, draw, limit, lines, nearness, open_sample, rows
from jaxllm.data.review.serve import Review
from jaxllm.errors import RunError, UserError


def counts(rows, categories) -> np.ndarray:
    return np.array([[list(row).count(c) for c in categories] for row in rows], float)

ROOT = pathlib.Path(__file__).parents[1]


# ---------------------------------------------------------------- agreement

DIAGNOSES = (  # Fleiss 1971, table 1: 30 patients, 6 psychiatrists, 5 diagnoses
    "444444 222555 233335 555555 222444 113333 333355 113334 114444 555555 144444 124444 222333 144444 224445 "
    "333335 111455 111112 224444 133555 555555 244444 224555 114444 144445 222224 111155 224444 133333 555555").split()
FOUR = ("123321412...", "1233224125.3", ".33323422 51".replace(" ", "") + ".", "12332441251.")  # Krippendorff 2011, C: "." is missing


def test_fleiss_is_the_published_one():
    kappa = agreement.fleiss(counts(DIAGNOSES, "12345"), np.ones((1, 30)))
    assert kappa[0] == pytest.approx(0.4302445, abs=5e-8)  # 0.430 in the paper; more digits: R's irr, kappam.fleiss


def test_cohen_is_the_published_one():
    """SAS/STAT's example of simple kappa, as in statsmodels' tests: 0.4842; and Wikipedia's of Cohen's kappa: 0.4."""
    for table, kappa in (([[0, 4, 1], [0, 8, 0], [0, 1, 5]], 0.4842), ([[20, 5, 0], [10, 15, 0], [0, 0, 0]], 0.4)):
        a, b = np.nonzero(np.array(table))
        times = np.array(table)[a, b]
        a, b = np.repeat(a, times), np.repeat(b, times)
        assert agreement.cohen(a, b, 3, np.ones((1, len(a))))[0] == pytest.approx(kappa, abs=5e-5)


@pytest.mark.parametrize(("coders", "categories", "alpha"), [
    (("0100000010", "1110010000"), "01", 0.095),
    (("aabbdcccedda", "babbbccceddd"), "abcde", 0.692),
    (FOUR, "12345", 0.743),
])
def test_krippendorff_is_the_published_one(coders, categories, alpha):
    """Computing Krippendorff's Alpha-Reliability (2011), examples A, B and C."""
    rows = [[coder[i] for coder in coders if coder[i] != "."] for i in range(len(coders[0]))]
    found = agreement.krippendorff(counts(rows, categories), np.ones((1, len(rows))))
    assert found[0] == pytest.approx(alpha, abs=5e-4)


def test_agreement_is_one_when_all_agree_and_about_nought_by_chance():
    rng = np.random.default_rng(0)
    same = {f"d{i}": dict.fromkeys("abc", label) for i, label in enumerate(rng.choice(["keep", "drop"], 50))}
    chance = {f"d{i}": {e: str(rng.choice(["keep", "drop", "unsure"])) for e in "abc"} for i in range(400)}
    for labels, low, high in ((same, 1, 1), (chance, -0.14, 0.14)):  # by chance: four standard deviations of sqrt(2/9 / 400) / (2/3)
        found = agreement.summary(labels, ("keep", "drop", "unsure"), 0.95, 0)
        for e in (found["krippendorff"], found["fleiss"], *(pair["kappa"] for pair in found["cohen"])):
            assert low <= round(e.value, 9) <= high and e.low <= e.value <= e.high
    assert len(found["cohen"]) == 3


def test_documents_of_one_cluster_count_once_for_an_interval():
    """Each document four times over: the figures stay, and only with clusters do the intervals."""
    rng = np.random.default_rng(3)
    once = {f"d{i:02}": {e: str(rng.choice(["keep", "drop"], p=[0.8, 0.2])) for e in "ab"} for i in range(60)}
    often = {f"{doc}/{k}": found for doc, found in once.items() for k in range(4)}
    alone, apart = agreement.summary(once, ("keep", "drop"), 0.95, 0), agreement.summary(often, ("keep", "drop"), 0.95, 0)
    together = agreement.summary(often, ("keep", "drop"), 0.95, 0, cluster=lambda doc: doc.split("/")[0])
    for name in ("fleiss", "krippendorff"):
        assert together[name].low == pytest.approx(alone[name].low, abs=0.01) and apart[name].low > alone[name].low + 0.03
    assert together["cohen"][0]["kappa"] == pytest.approx(alone["cohen"][0]["kappa"])


def test_agreement_is_not_defined_when_there_is_one_label_only():
    found = agreement.summary({"a": {"x": "keep", "y": "keep"}, "b": {"x": "keep", "y": "keep"}}, ("keep", "drop"), 0.95, 0)
    assert found["krippendorff"].value is None and found["cohen"][0]["kappa"].value is None
    assert agreement.summary({"a": {"x": "keep"}}, ("keep", "drop"), 0.95, 0) == {"documents": 0, "same": 0}


def test_bootstrap_interval_holds_the_truth_about_as_often_as_it_says():
    rng, inside, weight_RU = np.random.default_rng(1), 0, agreement.resamples(150, 0)
    for _ in range(40):  # two experts who see the truth with probability 0.9 each: kappa = 0.64 with balanced labels
        truth = rng.random(150) < 0.5
        a, b = (np.where(rng.random(150) < 0.9, truth, ~truth).astype(int) for _ in range(2))
        e = agreement.interval(agreement.cohen(a, b, 2, weight_RU), 0.95)
        inside += e.low <= 0.64 <= e.high
    assert inside >= 33  # 95 % of 40 is 38; fewer than 33 has a chance below 0.1 %


# ---------------------------------------------------------------- estimates


@pytest.mark.parametrize(("k", "n", "low", "high"), [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_is_the_published_one(k, n, low, high):
    """Newcombe 1998, Two-sided confidence intervals for the single proportion, table I, method 3."""
    assert estimate.wilson(k / n, n, 0.95) == pytest.approx((low, high), abs=5e-5)


def test_a_stratum_weighs_as_its_documents_not_as_its_sample():
    strata = [Stratum("a", "r", 9000, 10, 1), Stratum("b", "r", 1000, 90, 90)]
    assert estimate.share_bad(strata, 0.95).value == pytest.approx(0.9 * 0.1 + 0.1 * 1.0)
    one = [Stratum("a", "r", 10**9, 50, 20)]
    assert estimate.share_bad(one, 0.95) == pytest.approx((0.4, *estimate.wilson(0.4, 50, 0.95)), abs=1e-6)


def test_a_stratum_that_nobody_judged_takes_certainty_away():
    judged, open_ = Stratum("a", "r", 1, 1, 0), Stratum("a", "r", 2, 0, 0)
    assert estimate.share_bad([judged], 0.95) == pytest.approx((0, 0, 0))
    found = estimate.share_bad([judged, open_], 0.95)
    assert found.value == 0 and found.high > 0.5
    kept = Stratum("a", "kept", 10, 10, 5)
    assert estimate.recall(estimate.amounts([judged, open_, kept], 0), {"r"}, 0.95).high > 0.1


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, hits = np.random.default_rng(2), np.zeros(3)
    shape = {("web", "f"): (400, 0.85), ("books", "f"): (50, 0.6), ("web", "kept"): (5000, 0.05), ("books", "kept"): (2000, 0.01)}
    n_bad = {key: round(n * p) for key, (n, p) in shape.items()}
    truth = (n_bad["web", "f"] + n_bad["books", "f"]) / 450, sum(v for (_, d), v in n_bad.items() if d == "f") / sum(n_bad.values())
    for i in range(150):
        strata = [Stratum(*key, n, 30, int(rng.hypergeometric(n_bad[key], n - n_bad[key], 30))) for key, (n, _) in shape.items()]
        precision, recall = estimate.share_bad(strata[:2], 0.95), estimate.recall(estimate.amounts(strata, i), {"f"}, 0.95)
        hits += precision.low <= truth[0] <= precision.high, recall.low <= truth[1] <= recall.high, recall.low <= recall.value <= recall.high
    assert hits[0] >= 132 and hits[1] >= 132 and hits[2] == 150  # 95 % of 150 is 142; fewer than 132 has a chance below 0.1 %


def test_no_bad_document_in_a_sample_is_no_proof_that_there_is_none():
    strata = [Stratum("a", "f", 100, 20, 20), Stratum("a", "kept", 100_000, 20, 0)]
    found = estimate.recall(estimate.amounts(strata, 0), {"f"}, 0.95)
    assert found.value == 1 and found.high == 1 and found.low < 0.1
    assert estimate.recall(estimate.amounts(strata[:1], 0), {"f"}, 0.95).value is None  # nothing kept was judged


def test_a_source_is_weighed_by_its_good_text_once_that_is_known():
    sure = [Stratum("web", "kept", 1000, 200, 100), Stratum("books", "kept", 1000, 200, 2)]
    web, books = sorted(estimate.source_weights(sure, {"web": 500, "books": 500}, 0.95), key=lambda r: -r["good"].low)[::-1]
    assert (web["source"], web["differs"]) == ("web", True)
    assert web["weight"] / books["weight"] == pytest.approx(0.5 / 0.99)
    few = [Stratum("web", "kept", 1000, 4, 2), Stratum("books", "kept", 1000, 4, 1)]
    assert [row["weight"] for row in estimate.source_weights(few, {"web": 300, "books": 700}, 0.95)] == pytest.approx([0.7, 0.3])


# ---------------------------------------------------------------- sample and results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"))


def cfg_of(folder, **settings):
    return ReviewVerb(run=str(folder), **settings)


def test_the_sample_has_every_stratum_and_its_true_size(folder):
    sample = draw(folder, cfg_of(folder, per_rule=8, per_kept=12))
    removed = [row for row in lines(folder / "removed.jsonl") if row["stage"] in ("filter", "dedup")]  # with a text to judge
    kept = [row for row in rows(folder / "documents") if "#copy" not in row["id"]]
    assert sum(sample.population.values()) == len(removed) + len(kept)
    for name, population in sample.population.items():
        source, decision = name.split(" | ")[:2]
        there = [r for r in removed if (r["source"], f"{r['stage']}/{r['rule']}") == (source, decision)] if decision != "kept" else \
            [r for r in kept if r["source"] == source]
        assert population <= len(there)
        assert len([i for i in sample.items if i.stratum == name]) == min(12 if decision == "kept" else 8, population), name
    assert all(item.text for item in sample.items) and len({item.id for item in sample.items}) == len(sample.items)
    copies = [item for item in sample.items if item.duplicate_of]
    assert copies and all(item.text == item.other + " (copy)" for item in copies)


def test_the_sample_shrinks_to_what_can_be_labelled(folder):
    full, small, least = (draw(folder, cfg_of(folder, documents=n)) for n in (600, 60, 1))
    assert {i.id for i in small.items} < {i.id for i in full.items} and 50 <= len(small.items) <= 60
    assert small.population == full.population and {i.stratum for i in small.items} == set(full.population)
    assert len(least.items) == len(least.population)  # one of each


def test_near_is_near_the_threshold(folder):
    values = np.array([49, 48, 47, 45, 44, 40, 30, 12, 5, 1], float)  # a rule that drops below 50 words
    near = nearness(values, 0.2, None)
    assert [near(v) for v in values] == [True, True] + [False] * 8
    assert [nearness(values, 0.2, 0)(v) for v in (1, 5, 49)] == [True, True, False]
    assert [limit(rule, [0.2, 0.9]) for rule in ("min_words", "max_words", "near", "words")] == [0.9, 0.2, 0.2, None]
    assert not nearness(np.ones(20), 0.2, None)(1.0)
    assert not nearness(np.full(20, np.nan), 0.2, None)("x")
    sample = draw(folder, cfg_of(folder, thresholds={"min_words": 0}))
    web = [i for i in sample.items if i.decision == "filter/gopher.min_words" and i.source == "web"]
    assert max(i.value for i in web if i.near) < min(i.value for i in web if not i.near)
    web = [i for i in draw(folder, cfg_of(folder)).items if i.decision == "filter/gopher.min_words" and i.source == "web"]
    assert min(i.value for i in web if i.near) > max(i.value for i in web if not i.near)
    kept = [i for i in sample.items if i.decision == "kept" and i.source == "web"]
    assert max(i.value for i in kept if i.near) < min(i.value for i in kept if not i.near)


def test_the_sample_does_not_depend_on_the_order_of_the_files(folder, tmp_path):
    documents = list(rows(folder / "documents"))[::-1]
    for path in ("removed.jsonl", "manifest.json"):
        (tmp_path / path).write_bytes((folder / path).read_bytes())
    (tmp_path / "removed-text").symlink_to(folder / "removed-text")
    (tmp_path / "documents").mkdir()
    for n, part in enumerate((documents[:50], documents[50:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"documents/part-0000{n}.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    assert draw(tmp_path, cfg_of(folder)).items == draw(folder, cfg_of(folder)).items
    assert draw(folder, cfg_of(folder, seed=1)).items != draw(folder, cfg_of(folder)).items


def test_one_rule_can_be_reviewed_and_a_wrong_name_is_told(folder):
    for only in (("dedup",), ("dedup/minhash",)):
        assert {i.decision for i in draw(folder, cfg_of(folder, only=only)).items} == {"kept", "dedup/minhash"}
    with pytest.raises(UserError, match=r"only=filtre: nothing was removed by it; did you mean 'filter'\?"):
        draw(folder, cfg_of(folder, only=("filtre",)))
    with pytest.raises(UserError, match=r"thresholds=min_word: nothing was removed by it; did you mean 'min_words'\?"):
        draw(folder, cfg_of(folder, thresholds={"min_word": 50}))


def test_a_rule_with_few_texts_is_not_split(folder, tmp_path):
    for path in ("documents", "manifest.json", "removed.jsonl"):
        (tmp_path / path).symlink_to(folder / path)
    (tmp_path / "removed-text").mkdir()
    values = {row["id"]: row["value"] for row in lines(folder / "removed.jsonl") if row["rule"] == "gopher.min_words" and row["source"] == "web"}
    texts = [row for row in rows(folder / "removed-text") if values.get(row["id"], 99) < 20]
    (tmp_path / "removed-text/part-00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    sample = draw(tmp_path, cfg_of(folder))
    assert {name: n for name, n in sample.population.items() if "min_words" in name} == {"web | filter/gopher.min_words": len(values)}
    assert not any("minhash" in name for name in sample.population)  # without any text: left out


def test_parquet_gives_the_same_sample(folder, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for path in ("removed.jsonl", "manifest.json"):
        (tmp_path / path).write_bytes((folder / path).read_bytes())
    (tmp_path / "removed-text").symlink_to(folder / "removed-text")
    (tmp_path / "documents").mkdir()
    table = [row | {"meta": json.dumps(row["meta"])} for row in rows(folder / "documents")]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "documents/part-00000.parquet")
    assert draw(tmp_path, cfg_of(folder)) == draw(folder, cfg_of(folder))


def test_labels_of_everything_give_the_truth_itself(folder, tmp_path):
    cfg = cfg_of(folder, per_rule=10_000, per_kept=10_000, documents=10_000)
    sample, labels = draw(folder, cfg), Labels(tmp_path / "labels.csv")
    labels.put({(item.id, "ada"): Label("drop" if "BAD" in item.text else "keep") for item in sample.items})
    told = {row["decision"]: row for row in results(sample, labels, cfg)["filters"]}
    bad = {where: sum("BAD" in i.text for i in sample.items if (i.decision == "kept") == (where == "kept") and not i.duplicate_of) for where in ("kept", "removed")}
    n = sum(i.decision == "filter/gopher.min_words" for i in sample.items)
    rule = told["filter/gopher.min_words"]
    assert rule["precision"] == pytest.approx([bad["removed"] / n] * 3)
    assert rule["recall"] == pytest.approx([bad["removed"] / sum(bad.values())] * 3)
    assert told["kept"]["share_bad"] == pytest.approx([bad["kept"] / told["kept"]["kept"]] * 3)
    assert "recall" not in told["dedup/minhash"]  # a copy is no bad text


def test_a_sample_of_labels_comes_near_the_truth(folder, tmp_path):
    cfg = cfg_of(folder)
    sample, labels = draw(folder, cfg), Labels(tmp_path / "labels.csv")
    labels.put({(item.id, "ada"): Label("drop" if "BAD" in item.text else "keep") for item in sample.items})
    told = {row["decision"]: row for row in results(sample, labels, cfg)["filters"]}
    text = {row["id"]: row["text"] for row in rows(folder / "removed-text")}
    removed = [text[r["id"]] for r in lines(folder / "removed.jsonl") if r["stage"] == "filter"]
    caught, missed = sum("BAD" in t for t in removed), sum("BAD" in r["text"] for r in rows(folder / "documents") if "#copy" not in r["id"])
    rule = told["filter/gopher.min_words"]
    assert rule["precision"].low <= caught / len(removed) <= rule["precision"].high
    assert rule["recall"].low <= caught / (caught + missed) <= rule["recall"].high
    assert rule["recall"].high - rule["recall"].low < 0.5


def test_majority_decides_and_the_adjudicator_settles():
    labels = {"a": {"x": "drop", "y": "drop", "z": "keep"}, "b": {"x": "drop", "y": "keep"}, "c": {"x": "unsure"},
              "d": {"x": "drop", "y": "keep", "final": "keep"}, "e": {"x": "drop", "y": "drop", "final": "keep"}}
    assert verdicts(labels, "final") == {"a": True, "d": False, "e": False}


def test_another_draw_or_other_data_is_told(folder, tmp_path):
    kept = open_sample(folder, tmp_path, cfg_of(folder))
    assert open_sample(folder, tmp_path, cfg_of(folder, port=1)).items == kept.items
    with pytest.raises(UserError, match="per_rule was 20, is 5; --output=FOLDER draws another"):
        open_sample(folder, tmp_path, cfg_of(folder, per_rule=5))
    with pytest.raises(UserError, match=r"no manifest.json there; should be the output folder"):
        open_sample(tmp_path / "none", tmp_path, cfg_of(folder))
    (tmp_path / "sample.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"remove sample.json to draw it again"):
        open_sample(folder, tmp_path, cfg_of(folder))


# ---------------------------------------------------------------- labels and CSV

ITEMS = [Item("d1", "web", "kept", False, text="=1+1"), Item("d2", "web", "kept", False, text="Two, \"quoted\"\nlines 字"), Item("d3", "web", "x/y", True, text="t")]


def rows_of(path) -> list[dict]:
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))


def test_labels_survive_a_full_disk(tmp_path, monkeypatch):
    labels = Labels(tmp_path / "labels.csv")
    labels.put({("d1", "ada"): Label("keep", ("copy",), "a; \"b\"\n,c", "t")})
    before = (tmp_path / "labels.csv").read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="No space left"):
        labels.put({("d2", "ada"): Label("drop")})
    assert (tmp_path / "labels.csv").read_bytes() == before and list(labels.by) == [("d1", "ada")]
    assert Labels(tmp_path / "labels.csv").by == labels.by


def test_labels_of_many_threads_are_all_there(tmp_path):
    labels = Labels(tmp_path / "labels.csv")
    threads = [threading.Thread(target=lambda e=e: [labels.put({(f"d{i}", e): Label("keep")}) for i in range(15)]) for e in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Labels(tmp_path / "labels.csv").by) == 60


@pytest.mark.parametrize("between", [",", ";"])
def test_csv_goes_out_to_a_spreadsheet_and_comes_back(tmp_path, between):
    labels, path = Labels(tmp_path / "labels.csv"), tmp_path / "out.csv"
    labels.put({("d1", "ada"): Label("drop", ("copy", "harmful"), "=note")})
    export(ITEMS, labels, "ada", path)
    rows = rows_of(path)
    assert [row["text"] for row in rows] == ["'=1+1", ITEMS[1].text, "t"]  # no formula runs
    assert rows[0]["label"] == "drop" and rows[0]["reasons"] == "copy;harmful" and rows[0]["note"] == "'=note"
    rows[1]["label"], rows[0]["expert"], rows[1]["expert"] = " Keep", "grace", ""
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        out = csv.DictWriter(file, rows[0], delimiter=between)
        out.writeheader()
        out.writerows(rows)
    assert take(path, ITEMS, labels, "grace") == 2
    assert {key: label.label for key, label in labels.by.items()} == {("d1", "ada"): "drop", ("d1", "grace"): "drop", ("d2", "grace"): "keep"}


@pytest.mark.parametrize(("text", "says"), [
    ("id,label\nd1,keeep\n", r"in.csv:2: label 'keeep': should be keep, drop or unsure; did you mean 'keep'\?"),
    ("id,label\nd9,keep\n", "in.csv:2: document 'd9' is not in the sample"),
    ("id,lable\nd1,keep\n", "in.csv: no column 'label'; should have id, label"),
    ("id,label,expert\nd1,keep,<b>\n", "in.csv:2: expert '<b>': should be a name"),
])
def test_a_wrong_csv_is_told_and_nothing_of_it_taken(tmp_path, text, says):
    labels, path = Labels(tmp_path / "labels.csv"), tmp_path / "in.csv"
    path.write_text(text.replace("\n", "\nd2,drop,ada\n" if "expert" in text else "\nd2,drop\n", 1).replace(":2", ":3"), encoding="utf-8")
    with pytest.raises(UserError, match=says.replace(":2", ":3")):
        take(path, ITEMS, labels, "ada")
    assert not labels.by


def test_the_verb_from_the_command_line(folder, tmp_path, capsys):
    common = ["data", "review", str(folder), f"--output={tmp_path / 'r'}"]
    assert cli.main([*common, f"--export_csv={tmp_path / 'out.csv'}"]) == 0
    rows = rows_of(tmp_path / "out.csv")
    (tmp_path / "in.csv").write_text("id,label,expert\n" + "".join(
        f"{row['id']},{'drop' if 'BAD' in row['text'] else 'keep'},{e}\n" for row in rows for e in ("ada", "grace")), encoding="utf-8")
    assert cli.main([*common, f"--import_csv={tmp_path / 'in.csv'}", f"--json={tmp_path / 'r.json'}"]) == 0
    told = capsys.readouterr().out
    assert "Krippendorff's alpha 1.00 [1.00, 1.00]" in told and "method: weights" in told
    assert json.loads((tmp_path / "r.json").read_text())["labelled"] == len(rows)
    assert cli.main([*common, "--serve=false", "--per_rule=3"]) == 2
    assert cli.main(["data", "review", str(tmp_path)]) == 2
    assert "should be the output folder of `jaxllm data`" in capsys.readouterr().err


def test_the_verb_serves_until_it_is_interrupted(folder, tmp_path):
    command = [sys.executable, "-m", "jaxllm", "data", "review", str(folder), f"--output={tmp_path / 'r'}", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        port = int(re.search(r"http://127.0.0.1:(\d+)/", process.stdout.readline())[1])
        item = json.loads(asked(port, "GET", "/api/item?n=0&expert=ada")[1])
        assert asked(port, "POST", "/api/label", {"id": item["id"], "expert": "ada", "label": "keep"})[0] == 200
        second = subprocess.run([*command, "--serve=false"], capture_output=True, text=True, cwd=ROOT, check=False)
        assert second.returncode == 2 and "another `jaxllm data review` serves it" in second.stderr
        process.send_signal(signal.SIGINT)
        told, wrong = process.communicate(timeout=30)
    assert process.returncode == 0 and "labelled, 1 decided, by 1 expert" in told and not wrong
    assert json.loads((tmp_path / "r/results.json").read_text())["labelled"] == 1
    with make_server(None, 0) as server, pytest.raises(UserError, match="--port=0 takes any that is free"):
        make_server(None, server.server_address[1])


def test_a_kill_loses_no_label_that_was_answered(folder, tmp_path):
    command = [sys.executable, "-m", "jaxllm", "data", "review", str(folder), f"--output={tmp_path / 'r'}", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        port = int(re.search(r"http://127.0.0.1:(\d+)/", process.stdout.readline())[1])
        ids = [json.loads(asked(port, "GET", f"/api/item?n={n}")[1])["id"] for n in range(40)]
        timer, answered = threading.Timer(0.01, process.kill), []
        with contextlib.suppress(OSError, http.client.HTTPException):
            for n in itertools.count():
                if n == 20:
                    timer.start()
                expert = f"e{n // 40}"
                assert asked(port, "POST", "/api/label", {"id": ids[n % 40], "expert": expert, "label": "drop"})[0] == 200
                answered.append((ids[n % 40], expert))
        timer.join()
    there = Labels(tmp_path / "r/labels.csv").by
    assert len(answered) >= 20 and set(answered) <= there.keys() and len(there) <= len(answered) + 1
    assert cli.main([*command[3:-1], "--serve=false"]) == 0  # the same command goes on


# ---------------------------------------------------------------- the page


@pytest.fixture
def served(folder, tmp_path):
    """(the review, its server's port); one document's text is an attack."""
    cfg = cfg_of(folder, labels_each=2)
    sample = draw(folder, cfg_of(folder, per_rule=3, per_kept=3))
    sample.items[0].text = "<img src=x onerror='document.title=\"owned\"'><script>document.title='owned'</script>"
    review = Review(Sample(sample.items, sample.population, sample.kept_bytes), Labels(tmp_path / "labels.csv"), cfg)
    server = make_server(review, 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield review, server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def asked(port, method, path, body=None, **headers):
    headers = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request(method, path, body if isinstance(body, (str, type(None))) else json.dumps(body), headers)
        with connection.getresponse() as answer:
            text = answer.read().decode()
    return answer.status, text


def test_only_this_machines_page_is_answered(served):
    review, port = served
    label = {"id": review.sample.items[0].id, "expert": "ada", "label": "keep"}
    assert asked(port, "GET", "/api/state?expert=ada")[0] == 200
    assert asked(port, "GET", "/api/state", Host=f"evil.example:{port}")[0] == 403
    assert asked(port, "POST", "/api/label", label, Origin="http://evil.example")[0] == 403
    assert asked(port, "POST", "/api/label", label, Content_Type="text/plain")[0] == 404
    assert asked(port, "GET", "/../labels.csv")[0] == 404 and asked(port, "GET", "/api/item?n=999999")[0] == 404
    assert not review.labels.by
    assert asked(port, "POST", "/api/label", label, Origin=f"http://127.0.0.1:{port}")[0] == 200
    for wrong, says in (({"label": "good"}, "should be keep, drop or unsure"), ({"expert": "a/b"}, "should be a name"), ({"id": "x"}, "not in the sample")):
        status, text = asked(port, "POST", "/api/label", label | wrong)
        assert status == 400 and says in json.loads(text)["error"]
    assert asked(port, "POST", "/api/label", "[")[0] == 400 and asked(port, "POST", "/api/label", "x" * 70_000)[0] == 413
    assert list(review.labels.by) == [(label["id"], "ada")]


def test_experts_are_not_told_what_the_filter_said(served):
    review, port = served
    text = "".join(asked(port, "GET", f"/api/item?n={n}&expert=ada")[1] for n in range(len(review.sample.items)))
    assert "min_words" not in text and "kept" not in text


def test_enough_labels_are_enough_and_the_adjudicator_sees_disagreements(served):
    review, _ = served
    first, second = review.sample.items[:2]
    review.labels.put({(first.id, "a"): Label("keep"), (first.id, "b"): Label("drop"), (second.id, "a"): Label("keep"), (second.id, "b"): Label("keep")})
    assert review.next_for("c", -1) == 2 and review.next_for("a", -1) == 2
    assert review.next_for("final", -1) == 0
    review.put({"id": first.id, "expert": "final", "label": "drop"})
    assert review.next_for("final", -1) is None


def test_the_page_loads_nothing_from_elsewhere():
    page = (ROOT / "jaxllm/data/review/page.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:,)[^"']|https?://|@import|url\(|innerHTML|outerHTML|insertAdjacent|eval\(""", page)


@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="no chromium or chrome on this machine: the page is not tried")
def test_labelling_in_a_browser(served, tmp_path):
    review, port = served
    n, address = len(review.sample.items), f"http://127.0.0.1:{port}/"
    with browser.Browser(tmp_path / "profile") as page:
        page.open(address)
        page.wait("document.activeElement.id === 'name'")  # type at once
        page.type("Ada L.")
        page.evaluate("document.querySelector('#who form').requestSubmit()")
        page.wait("document.querySelector('.text')")
        assert "Would you want a language model" in page.evaluate("document.querySelector('#guide div').innerText")
        # a page of text is text: nothing in it runs
        assert page.evaluate("document.querySelector('.text').textContent") == review.sample.items[0].text
        assert page.evaluate("document.title") != "owned" and not page.evaluate("document.querySelector('.text').children.length")
        # keys: two reasons, a note, drop; it is saved and the next is shown
        for key in "12n":
            page.press(key)
        page.wait("document.activeElement.id === 'note'")
        for key in ("k", "i", "d", "Escape"):  # letters in a note are no labels
            page.press(key)
        page.press("d")
        page.wait("item.n === 1")
        saved = review.labels.by[review.sample.items[0].id, "Ada L."]
        assert (saved.label, saved.reasons, saved.note) == ("drop", review.cfg.reasons[:2], "kid")
        assert Labels(review.labels.path).by == review.labels.by
        page.press("m")
        page.wait("getComputedStyle(document.querySelector('.text')).fontFamily.includes('monospace')")
        # back: what was said is shown; changed and saved
        page.press("ArrowLeft")
        page.wait("item.n === 0 && document.querySelector('[data-label=drop]').ariaPressed === 'true'")
        page.press("2")
        page.wait("document.getElementById('said').textContent === 'saved: drop'")
        assert review.labels.by[review.sample.items[0].id, "Ada L."].reasons == review.cfg.reasons[:1]
        # skipped: what was ticked and typed is still there on the way back
        page.press("ArrowRight")
        page.wait("item.n === 1")
        page.press("3")
        page.press("ArrowRight")
        page.wait("item.n === 2")
        page.press("ArrowLeft")
        page.wait("item.n === 1 && chosen.size === 1")
        # comes back: goes on where it was
        page.open("about:blank")
        page.open(address + "?expert=Ada%20L.")
        page.wait("document.querySelector('.text') && item.n === 1")
        assert page.evaluate("document.getElementById('progress').textContent") == f"1 of {n} labelled by you"
        # a second expert, by mouse, labels all
        page.open(address + "?expert=grace")
        page.wait("document.querySelector('.text') && expert === 'grace'")
        for i in range(n):
            page.evaluate(f"document.querySelector('[data-label={'keep' if i % 3 else 'drop'}]').click()")
            page.wait(f"!busy && state.labels.filter(Boolean).length === {i + 1}")
        page.wait("!document.getElementById('done').hidden")
        # results, and from a disagreement to its document
        page.evaluate("enter('Ada L.')")
        page.wait("expert === 'Ada L.' && item.n === 1")
        page.press("d")  # grace kept the second
        page.wait("item.n === 2")
        page.press("r")
        page.wait("document.querySelector('#results [data-open]')")
        told = page.evaluate("document.getElementById('results').innerText")
        assert "Krippendorff's alpha" in told and "filter/gopher.min_words" in told and "proposed weight" in told
        page.evaluate("document.querySelector('[data-open=\"1\"]').click()")
        page.wait("!document.getElementById('label').hidden && item.n === 1")
        # a phone: everything within the width, the buttons in sight
        page.resize(400, 800)
        for shown in ("open(0)", "results()"):
            page.evaluate(shown)
            assert page.evaluate("document.documentElement.scrollWidth") <= 400
        page.evaluate("open(0)")
        assert page.evaluate("[...document.querySelectorAll('[data-label]')].every(b => b.getBoundingClientRect().bottom <= innerHeight)")
        # only this server was asked
        hosts = page.evaluate("[...new Set(performance.getEntriesByType('resource').map(e => new URL(e.name).host))]")
        assert hosts == [f"127.0.0.1:{port}"] and not page.console


@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="no chromium or chrome on this machine: the page is not tried")
def test_a_label_that_cannot_be_saved_is_said(served, tmp_path, monkeypatch):
    _, port = served

    def full(fd):
        raise OSError(28, "No space left on device")

    with browser.Browser(tmp_path / "profile") as page:
        page.open(f"http://127.0.0.1:{port}/?expert=ada")
        page.wait("document.querySelector('.text')")
        monkeypatch.setattr("os.fsync", full)
        page.press("k")
        page.wait("document.getElementById('said').textContent.includes('No space left')")
        assert page.evaluate("item.n") == 0 and page.evaluate("state.labels.filter(Boolean).length") == 0
        monkeypatch.undo()
        page.press("k")
        page.wait("item.n === 1")
