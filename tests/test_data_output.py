"""What `jaxllm data` writes is what pretraining, the review, a tokenizer and a later run take."""

import pathlib
import random
import re

import browser
import pytest
from raw_corpus import ROOT, UNIT_BYTES, kept_of, manifest, prose, removed_of, run, settings, write

from jaxllm import cli, config
from jaxllm.data import pipeline, raw, read
from jaxllm.data.config import Source
from jaxllm.data.review.config import ReviewVerb
from jaxllm.data.review.labels import Labels
from jaxllm.data.review.results import results
from jaxllm.data.review.sample import open_sample
from jaxllm.data.tokenize import prepare
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.data.unit_files import read_lines
from jaxllm.errors import UserError
from jaxllm.report.data_page import card, lengths, page
from jaxllm.train.config import PretrainConfig


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(raw, "UNIT_BYTES", UNIT_BYTES)


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_pretraining_reads_the_documents_and_nothing_else(file_format, source, tmp_path):
    out = tmp_path / "out"
    pipeline.main(settings(source, out, **{"output.format": file_format}))
    found = list(read.documents(Source(path=str(out)), "data.sources.web.path"))
    totals = manifest(out)["totals"]
    assert len(found) == totals["documents"] and sum(len(text.encode()) for text in found) == totals["bytes"]
    if file_format == "jsonl":
        assert found == [row["text"] for row in kept_of(out)]


def test_an_unfinished_folder_is_refused_and_others_are_as_they_were(source, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "write_all", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipeline.main(settings(source, tmp_path / "half"))
    for find in (lambda path: read.find_files(Source(path=str(path)), "key"), lambda path: raw.find_files(str(path), "key")):
        with pytest.raises(UserError, match="jaxllm data has not finished there"):
            find(tmp_path / "half")
    write(tmp_path / "mine" / "documents" / "a.txt", b"one")
    write(tmp_path / "mine" / "b.txt", b"two")
    write(tmp_path / "mine" / "manifest.json", b'{"made_by": "someone else"}')
    assert len(read.find_files(Source(path=str(tmp_path / "mine")), "key")) == 2


def test_a_run_takes_the_folder_of_another(source, tmp_path):
    pipeline.main(settings(source, tmp_path / "one"))
    pipeline.main(settings(tmp_path / "one", tmp_path / "two"))
    one, two = kept_of(tmp_path / "one"), kept_of(tmp_path / "two")
    assert [row["id"] for row in one] == [row["id"] for row in two] and [row["text"] for row in one] == [row["text"] for row in two]


def test_what_an_earlier_run_kept_is_not_kept_again(source, tmp_path):
    pipeline.main(settings(source, tmp_path / "one"))
    write(tmp_path / "more" / "new.txt", prose(random.Random(99)).encode())
    (old,) = [row["text"] for row in kept_of(tmp_path / "one") if row["id"] == "line-7"]
    write(tmp_path / "more" / "old.txt", old.encode())
    pipeline.main(settings(tmp_path / "more", tmp_path / "two", **{"dedup.earlier": f"[{tmp_path / 'one'}]"}))
    assert [row["id"] for row in kept_of(tmp_path / "two")] == ["web/new.txt"]
    (gone,) = removed_of(tmp_path / "two")
    assert gone["id"] == "web/old.txt" and gone["stage"] == "dedup" and gone["duplicate_of"] == "line-7"
    with pytest.raises(UserError, match=r"holds work with other settings or files \(the files of dedup\.earlier"):
        pipeline.main(settings(source, tmp_path / "one", **{"run.overwrite": "true"}))
        pipeline.main(settings(tmp_path / "more", tmp_path / "two", **{"dedup.earlier": f"[{tmp_path / 'one'}]"}))


def test_experts_review_what_a_run_wrote(everything, whole_folder):
    """Every rule that has text is drawn, with the text it was removed with; copies stand beside what they are copies of."""
    cfg = ReviewVerb(run=str(whole_folder), serve=False, per_rule=3, per_kept=5)
    sample = open_sample(whole_folder, whole_folder / "review", cfg)
    removed = {(row["id"], f"{row['stage']}/{row['rule']}"): row for row in removed_of(whole_folder)}
    rules = {rule for _, rule in removed if not rule.startswith(("read/", "mix/"))}
    assert {item.decision for item in sample.items} == rules | {"kept"}
    near = [item for item in sample.items if item.decision == "dedup/near"]
    written = {row["id"] for row in kept_of(whole_folder)}  # the mixture may have left out what a copy stood beside
    assert near and all(item.other and item.other != item.text for item in near if item.duplicate_of in written)
    for item in sample.items:
        assert item.text.strip()
        assert item.decision == "kept" or removed[item.id, item.decision]["value"] == item.value
    assert sum(sample.population.values()) == len([r for r in removed.values() if r["stage"] not in ("read", "mix")]) + \
        manifest(whole_folder)["totals"]["kept"]
    found = results(sample, Labels(whole_folder / "labels.csv"), cfg)
    assert found["documents"] == len(sample.items)
    assert cli.main(["data", "review", str(whole_folder), "--serve=false", f"--output={whole_folder / 'other'}"]) == 0


@pytest.fixture
def whole_folder(everything, tmp_path) -> pathlib.Path:
    out = tmp_path / "whole"
    done = run("data", everything, f"--run.dir={out}", "--workers=1")
    assert done.returncode == 0, done.stderr
    return out


def test_the_page_and_the_card_tell_what_the_manifest_does(source, tmp_path):
    out = tmp_path / "out"
    write(tmp_path / "raw" / "a.html", b"<p>Bad: &lt;script&gt;alert(1)&lt;/script&gt; said of the page that the people read</p>")
    write(tmp_path / "raw" / "b.txt", prose(random.Random(1)).encode())
    pipeline.main(settings(tmp_path / "raw", out))
    html, md = (out / "report.html").read_text(), (out / "card.md").read_text()
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    assert "filter gopher.min_words" in html and "| filter gopher.min_words | web | 1 |" in md
    found = manifest(out)
    assert f"{found['output_sha256'][:16]}" in html and md == card(found)
    samples = list(read_lines(out / "removed-text" / "part-00000.jsonl.zst"))
    assert [row["id"] for row in samples] == ["web/a.html"]
    assert not re.search(r"https?://|src=", page(found, samples, [], {}))  # no network


@pytest.mark.parametrize("n", [1, 2, 6, 7, 11, 29])
def test_labels_of_lengths_stay_within_their_frame(n):
    found = {"bins": [10 ** 5 * 178] * n, "in": [1] * n, "out": [1] * n}
    for x, label in re.findall(r'<text x="([0-9.]+)"[^>]*>([^<]+)<', lengths(found)):
        assert float(x) + 7 * len(label) <= 460, (x, label)
    assert "17.8M" in lengths(found)


@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="no chromium or chrome on this machine: the page is not looked at")
def test_the_page_fits_a_desk_and_a_phone(source, tmp_path):
    """Nothing is wider than the screen, and bars of a card are drawn to one scale, whatever is written beside them."""
    pipeline.main(settings(source, tmp_path / "out"))
    with browser.Browser(tmp_path / "profile") as look:
        look.open((tmp_path / "out" / "report.html").as_uri())
        look.wait("document.querySelector('.bars')")
        look.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        for width in (1280, 390):
            look.resize(width, 800)
            assert look.evaluate("document.documentElement.scrollWidth") <= width
            tracks = look.evaluate("[...document.querySelectorAll('.bars')].map(card => [...card.querySelectorAll('.bar')]"
                                   ".map(bar => bar.children[1].getBoundingClientRect()).map(r => [r.left, r.width].join()))")
            assert len(tracks) >= 3 and len(tracks[0]) > 5 and all(len(set(card)) == 1 for card in tracks), tracks


def test_nothing_that_is_shown_holds_personal_data(tmp_path):
    rng = random.Random(3)
    for i in range(6):
        text = "".join(f"<p>{p}</p>" for p in (f"Write to jane{i}@example.com or jim{i}&#64;example.org, +49 30 1234567.", prose(rng), prose(rng)))
        write(tmp_path / "raw" / f"{i}.html", f"<html><body>{text}</body></html>".encode())
        write(tmp_path / "raw" / f"{i}.txt", b"x" * (3990 * (i % 2)) + f" joe{i}@example.com ".encode() + b"y " * (300 * (i % 3)))
    for folder, more, addresses in (("masked", {}, False), ("open", {"privacy.email": "false"}, True)):
        pipeline.main(settings(tmp_path / "raw", tmp_path / folder, **more))
        report = (tmp_path / folder / "report.html").read_text()
        texts = " ".join(row["text"] for row in read_lines(tmp_path / folder / "removed-text" / "part-00000.jsonl.zst"))
        assert "Before and after" in report and "<PHONE>" not in report and "&lt;PHONE&gt;" in report and "1234567" not in report + texts
        for shown, names in ((report, r"jane\d@|jim\d@"), (texts, r"joe\d@")):
            assert bool(re.search(names, shown)) == addresses
            assert ("EMAIL" in shown) != addresses


def test_a_pretraining_config_tokenizes_the_folder_as_it_is(source, tmp_path):
    pipeline.main(settings(source, tmp_path / "out"))
    cfg = config.load(PretrainConfig, str(ROOT / "configs/pretrain/tiny.yaml"), [
        f"data.sources.text.path={tmp_path / 'out'}", f"data.cache={tmp_path / 'cache'}"])
    (stores,) = prepare(cfg.data, load_tokenizer("bytes"), log=lambda line: None).sources
    totals = manifest(tmp_path / "out")["totals"]
    assert stores.counts.documents == totals["documents"] and stores.counts.bytes == totals["bytes"]
