"""`jaxllm data` on input that is broken: counted and named, or one line that says what; nothing half-written."""

import gzip
import json
import os
import pathlib
import random
import resource
import tempfile
import zlib

import pytest
import zstandard
from raw_corpus import UNIT_BYTES, hashes, kept_of, manifest, page, prose, removed_of, run, settings, warc, write

from jaxllm.data import pipeline, raw
from jaxllm.errors import RunError, UserError

JUDGED_BY_NOTHING = {f"filter.{name}.use": "false" for name in ("gopher", "c4", "fineweb")}


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(raw, "UNIT_BYTES", UNIT_BYTES)


def whole_warc() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "a.warc.gz"
        warc(path, [page(f"Page {i}", prose(random.Random(i), 1000)) for i in range(3)])
        return path.read_bytes()


def noise(lines: int) -> bytes:
    rng = random.Random(0)
    return "".join(json.dumps({"text": prose(rng)}) + "\n" for _ in range(lines)).encode()


BROKEN = {
    "truncated gzip": ("a.jsonl.gz", lambda: gzip.compress(b'{"text": "hello there"}\n' * 5000)[:-30], "truncated"),
    "truncated zst": ("a.jsonl.zst", lambda: zstandard.compress(noise(2_000))[:-30], "truncated"),
    "not a gzip": ("a.txt.gz", lambda: b"hello" * 100, "damaged"),
    "a long line": ("a.jsonl", lambda: b'{"text": "' + b"x" * 300_000 + b'"}\n{"text": "ok, and more"}\n', "longer than read.max_bytes"),
    "a very long line": ("a.jsonl", lambda: b'{"text": "' + b"x" * 3_000_000 + b'"}\n{"text": "ok, and more"}\n', "too long"),
    "binary": ("a.txt", lambda: b"\0\1\2" * 50, "binary"),
    "truncated WARC": ("a.warc.gz", lambda: whole_warc()[:-400], "truncated"),
    "not a WARC": ("a.warc.gz", lambda: b"hello" * 100, "damaged"),
    "not Parquet": ("a.parquet", lambda: b"PAR1 no", "Parquet"),
    "not JSON": ("a.jsonl", lambda: b'{"text": "one"}\n{"text": "two"\n{"text": "three and more"}\n', "not JSON"),
    "too long": ("a.txt", lambda: b"word " * 10_000, "longer than read.max_bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_counted_and_named_and_the_rest_goes_on(name, tmp_path):
    file, data, says = BROKEN[name]
    write(tmp_path / "raw" / file, data())
    write(tmp_path / "raw" / "good.txt", b"A good document.")
    more = {"read.max_bytes": 20_000, **JUDGED_BY_NOTHING}
    pipeline.main(settings(tmp_path / "raw", tmp_path / "out", **more))
    removed = removed_of(tmp_path / "out")
    assert any(says in str(row["value"]) and row["path"].startswith(f"web/{file}") for row in removed), removed
    assert "web/good.txt" in {row["id"] for row in kept_of(tmp_path / "out")}
    with pytest.raises(UserError, match=f"{file}.*{says}"):
        pipeline.main(settings(tmp_path / "raw", tmp_path / "stop", **more, **{"read.on_error": "stop"}))
    assert not (tmp_path / "stop" / "manifest.json").exists()


@pytest.mark.parametrize("lines", [300, 1200, 12_000])
@pytest.mark.parametrize("cut", [10, 100])
def test_all_whole_lines_of_a_truncated_file_are_used(lines, cut, tmp_path):
    data = gzip.compress(noise(lines))[:-cut]
    whole = zlib.decompressobj(31).decompress(data).count(b"\n")
    write(tmp_path / "raw" / "a.jsonl.gz", data)
    files = {"web": raw.find_files(str(tmp_path / "raw"), "path")}
    items = [item for unit in raw.units({"web": raw.RawSource(path=str(tmp_path / "raw"))}, files, 20_000) for item in unit.items]
    assert sum(not item.problem for item in items) == whole > lines - 20
    assert [item.problem for item in items if item.problem] == ["ends early: the file is truncated"]


def test_whole_blocks_and_pages_of_truncated_files_are_used(tmp_path):
    data = noise(3_000)
    write(tmp_path / "a.jsonl.zst", zstandard.compress(data)[:-30])
    write(tmp_path / "a.warc.gz", gzip.compress(gzip.decompress(whole_warc()))[:-12])
    read = {}
    for name in ("a.jsonl.zst", "a.warc.gz"):
        files = {"web": raw.find_files(str(tmp_path / name), "path")}
        items = [item for unit in raw.units({"web": raw.RawSource(path=str(tmp_path / name))}, files, 20_000) for item in unit.items]
        read[name] = sum(len(item.data) for item in items if not item.problem), sum(not item.problem for item in items)
    assert read["a.jsonl.zst"][0] > (len(data) - (128 << 10)) * 0.97 and read["a.warc.gz"][1] == 3, read


def test_lines_of_json_that_are_not_utf8_are_counted(tmp_path):
    lines = [b'{"text": "a \xff one, \\u00e9", "id": "\xfe1"}', b'{"text": "two \xc3", "id": 2}', b'{"text": "three", "id": "\xff3"}', b'{"text": "\\ud800 \xff"}',
             '{"text": "vier ä �"}'.encode()]
    write(tmp_path / "raw" / "a.jsonl", b"\n".join(lines))
    pipeline.main(settings(tmp_path / "raw", tmp_path / "out", **JUDGED_BY_NOTHING))
    assert [row["text"] for row in kept_of(tmp_path / "out")] == ["a � one, é", "two �", "three", "? �", "vier ä �"]
    assert manifest(tmp_path / "out")["counts"]["read.invalid_utf8"] == 2


def test_a_file_that_may_not_be_read_is_counted(tmp_path, monkeypatch):
    for name in ("a.html", "a.jsonl", "a.warc.gz", "a.parquet", "a.txt.gz", "good.txt"):
        write(tmp_path / "raw" / name, b"A good document.")
    forbidden = pathlib.Path.open

    def open_(self, mode="r", *args, **more):
        if self.parent.name == "raw" and self.name != "good.txt":
            raise PermissionError(13, "Permission denied", str(self))
        return forbidden(self, mode, *args, **more)

    monkeypatch.setattr(pathlib.Path, "open", open_)  # a test may run as one who may read all
    monkeypatch.setattr("pyarrow.parquet.ParquetFile", lambda path: open_(path))
    pipeline.main(settings(tmp_path / "raw", tmp_path / "out", **JUDGED_BY_NOTHING))
    assert {row["path"].split("#")[0]: row["value"] for row in removed_of(tmp_path / "out")} == dict.fromkeys(
        (f"web/{name}" for name in ("a.html", "a.jsonl", "a.warc.gz", "a.parquet", "a.txt.gz")), "cannot be read: Permission denied")


BROKEN_PAGES = {
    "an open tag": b"<html><body><p>One two three <b>four <a href='x>five", "no markup": b"just words of no page at all",
    "deep": b"<div>" * 50_000 + b"words", "attributes": b"<p " + b"a=1 " * 200_000 + b">words</p>",
    "nothing": b"<html><body></body></html>", "entities": b"&#xD800;&#0;&#x110000;&bogus; words of a page",
    "long line": b"<p>" + b"word " * 200_000, "half characters": b"<p>caf\xc3</p>\xff\xfe words",
    "frames": b"<frameset><frame src=a></frameset>", "comment": b"<!-- never closed <p>words",
}


def test_broken_pages_end_in_text_or_in_a_reason(tmp_path):
    for name, data in BROKEN_PAGES.items():
        write(tmp_path / "raw" / f"{name}.html", data)
    pipeline.main(settings(tmp_path / "raw", tmp_path / "out", **JUDGED_BY_NOTHING))
    kept, removed = kept_of(tmp_path / "out"), removed_of(tmp_path / "out")
    assert len(kept) + len(removed) == len(BROKEN_PAGES)
    assert {row["id"] for row in kept} >= {f"web/{name}.html" for name in ("an open tag", "long line", "entities", "half characters")}
    assert {row["id"]: row["rule"] for row in removed}["web/deep.html"] == "nesting"
    assert not any(row["rule"] == "error" for row in removed)


def test_a_page_that_a_stage_stumbles_over_costs_no_other(tmp_path, monkeypatch):
    from jaxllm.data.clean import Clean

    def stumbles(self, doc):
        if doc.id.endswith("a.txt"):
            raise RuntimeError("a surprise")

    monkeypatch.setattr(Clean, "__call__", stumbles)
    for name in "ab":
        write(tmp_path / "raw" / f"{name}.txt", f"Text {name} of no page.".encode())
    pipeline.main(settings(tmp_path / "raw", tmp_path / "out", **JUDGED_BY_NOTHING))
    (gone,) = removed_of(tmp_path / "out")
    assert (gone["id"], gone["stage"], gone["rule"], gone["value"]) == ("web/a.txt", "clean", "error", "RuntimeError: a surprise")
    assert [row["id"] for row in kept_of(tmp_path / "out")] == ["web/b.txt"]


def test_bytes_that_are_not_utf8_are_counted_or_read_as_the_page_says(tmp_path):
    write(tmp_path / "raw" / "a.txt", b"caf\xe9 au lait, and more of it")
    write(tmp_path / "raw" / "b.html", b'<html><meta charset="iso-8859-1"><body><p>caf\xe9 au lait</p></body></html>')
    write(tmp_path / "raw" / "c.html", '<html><body><p>tea\u2014and caf\xe9</p></body></html>'.encode("cp1252"))
    pipeline.main(settings(tmp_path / "raw", tmp_path / "out", **JUDGED_BY_NOTHING))
    texts = {row["id"]: row["text"] for row in kept_of(tmp_path / "out")}
    assert texts["web/b.html"] == "café au lait" and texts["web/c.html"] == "tea—and café" and "caf\ufffd" in texts["web/a.txt"]
    assert manifest(tmp_path / "out")["counts"]["read.invalid_utf8"] == 1


def test_a_rule_that_removes_everything_stops_and_is_named(source, tmp_path):
    with pytest.raises(RunError, match=r"every document of source web was removed \(filter\.gopher\.min_words 9\d%"):
        pipeline.main(settings(source, tmp_path / "out", **{"filter.gopher.min_words": 5000}))
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(RunError, match=r"every document that the stages before had left was removed \(mix\.share 9\d%"):
        pipeline.main(settings(source, tmp_path / "mix", **{"mix.total": 1e-9}))


@pytest.mark.parametrize("most", [3_000, pytest.param(20_000, marks=pytest.mark.slow), 80_000])
def test_a_full_disk_ends_in_one_line_and_the_same_command_goes_on(most, everything, whole, tmp_path):
    """A bound on the size of files stands for a full disk; it hits a different file at each size."""
    words = ["data", everything, f"--run.dir={tmp_path / 'out'}", "--workers=1"]
    done = run(*words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
    assert done.returncode == 1 and "cannot be written" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run(*words).returncode == 0 and hashes(tmp_path / "out") == whole


@pytest.mark.parametrize(("path", "says"), [
    ("nothing-here", "no such file or folder"), ("empty", "the folder is empty"), ("odd", "no file ends in one of"),
])
def test_a_source_without_documents_is_one_line(path, says, tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "odd" / "a.docx", b"x")
    with pytest.raises(UserError, match=says):
        pipeline.main(settings(tmp_path / path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_no_documents_in_a_file_stops(tmp_path):
    write(tmp_path / "raw" / "a.jsonl", b"\n\n")
    with pytest.raises(UserError, match="no source holds a document"):
        pipeline.main(settings(tmp_path / "raw", tmp_path / "out"))


def test_a_source_of_which_nothing_is_left_stops_and_names_the_rule(tmp_path):
    write(tmp_path / "raw" / "a.txt", b"\0" * 100)
    with pytest.raises(RunError, match=r"every document of source web was removed \(read.binary 100%\)"):
        pipeline.main(settings(tmp_path / "raw", tmp_path / "out"))


@pytest.mark.parametrize(("key", "value", "says"), [
    ("decontaminate.folder", "nowhere", "no such folder"), ("filter.lists.words", "[nowhere]", "nowhere"),
    ("dedup.earlier", "[nope]", "has no signatures.json"), ("run.dir", "{raw}", "run.dir=.*(lies in|holds) sources.web.path"),
    ("run.dir", "{raw}/inside", "lies in sources.web.path"), ("run.dir", "{raw}/..", "holds sources.web.path"),
    ("sources.web.path", "{out}", "run.dir=.*(lies in|holds) sources.web.path"), ("dedup.earlier", "[{out}]", "run.dir=.* dedup.earlier"),
])
def test_overwrite_deletes_nothing_before_all_is_checked(key, value, says, tmp_path):
    raw_folder, out = tmp_path / "a" / "raw", tmp_path / "out"
    write(raw_folder / "a.txt", prose(random.Random(0)).encode())
    pipeline.main(settings(raw_folder, out))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    more = {"run.overwrite": "true", key: value.format(raw=raw_folder, out=out)}
    with pytest.raises(UserError, match=says):
        pipeline.main(settings(raw_folder, out, **more))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_corrected_command_goes_on(tmp_path):
    """A mistake that can be known before the work leaves nothing behind that would refuse the right command."""
    write(tmp_path / "raw" / "a.txt", prose(random.Random(0)).encode())
    for more in ({"mix.method": "weights", "mix.weights.nope": 2}, {"dedup.earlier": "[nope]"}):
        with pytest.raises(UserError, match="nope"):
            pipeline.main(settings(tmp_path / "raw", tmp_path / "out", **more))
        assert not (tmp_path / "out").exists()
    pipeline.main(settings(tmp_path / "raw", tmp_path / "out"))


@pytest.mark.parametrize(("key", "value", "says"), [
    ("workers", -3, "workers=-3: should be"), ("output.samples", -5, "output.samples=-5: should be"),
    ("filter.gopher.min_words", -5, "gopher.min_words=-5: should be"), ("filter.fineweb.short_line", -5, "short_line=-5: should be"),
    ("filter.c4.min_line_words", -5, "c4.min_line_words=-5: should be"), ("filter.classifier.min_score", 7, "min_score=7.*: should be"),
    ("sources.web.path", "", "path of a source is empty"), ("homographs.terms", "{folder}/terms.csv", "homographs.terms: source.nope"),
    ("mix.quality_edges", "[0.5]", "the documents have no quality"),
])
def test_settings_that_do_nothing_are_one_line(key, value, says, tmp_path):
    write(tmp_path / "raw" / "a.txt", prose(random.Random(0)).encode())
    write(tmp_path / "terms.csv", b"word,source,replacement\nbank,nope,shore\n")
    more = {key: str(value).format(folder=tmp_path)}
    more |= {"homographs.treatment": "terms"} if key == "homographs.terms" else {}
    more |= {"mix.quality_factors": "[1,2]"} if key == "mix.quality_edges" else {}
    with pytest.raises(UserError, match=says):
        pipeline.main(settings(tmp_path / "raw", tmp_path / "out", **more))


def test_stops_at_what_cannot_be_read_without_samples(tmp_path):
    write(tmp_path / "raw" / "a.jsonl", b'not json\n{"text": "one"}\n')
    with pytest.raises(UserError, match=r"web/a.jsonl#1: not JSON"):
        pipeline.main(settings(tmp_path / "raw", tmp_path / "out", **{"read.on_error": "stop", "output.samples": 0}))


def test_a_damaged_manifest_is_one_line(tmp_path):
    write(tmp_path / "raw" / "a.txt", prose(random.Random(0)).encode())
    write(tmp_path / "out" / "manifest.json", b'{"made_by": ')
    with pytest.raises(UserError, match=r"manifest.json: cannot be read"):
        pipeline.main(settings(tmp_path / "raw", tmp_path / "out"))


@pytest.mark.parametrize("pattern", ["?4.jsonl", "[ac]4.jsonl"])
def test_globs_of_every_kind(pattern, tmp_path):
    write(tmp_path / "raw" / "a4.jsonl", json.dumps({"text": prose(random.Random(0))}).encode())
    pipeline.main(settings(tmp_path / "raw" / pattern, tmp_path / "out"))
    assert len(kept_of(tmp_path / "out")) == 1


def test_a_glob_does_not_read_a_file_again_by_a_link(tmp_path):
    write(tmp_path / "raw" / "inner" / "a.txt", b"A good document.")
    (tmp_path / "raw" / "again").symlink_to("inner")
    (tmp_path / "raw" / "inner" / "up").symlink_to("..")
    for i, pattern in enumerate(("raw/**/*.txt", "raw/inner/up/**/*.txt", "raw/*/*.txt")):
        pipeline.main(settings(tmp_path / pattern, tmp_path / str(i), **JUDGED_BY_NOTHING, **{"dedup.use": "false"}))
    assert [manifest(tmp_path / str(i))["totals"]["inputs"] for i in range(3)] == [1, 1, 2]  # the last names links as it does folders


def test_an_empty_source_beside_a_full_one_is_told_before_the_work(tmp_path):
    write(tmp_path / "raw" / "a.txt", prose(random.Random(0)).encode())
    write(tmp_path / "empty" / "a.jsonl", b"")
    with pytest.raises(UserError, match=r"sources.two.path=.*: its files are empty"):
        pipeline.main(settings(tmp_path / "raw", tmp_path / "out", **{"sources.two.path": tmp_path / "empty"}))
    assert not (tmp_path / "out").exists()


def test_folders_that_are_passed_over_are_named(tmp_path, monkeypatch):
    for name in ("raw/a.txt", "elsewhere/b.txt"):
        write(tmp_path / name, b"A good document.")
    (tmp_path / "raw" / "shut").mkdir()
    write(tmp_path / "raw" / "nothing.jsonl.gz", b"")
    (tmp_path / "raw" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "raw" / "gone.html").symlink_to(tmp_path / "nowhere.html")
    (tmp_path / "raw" / ".#lock.txt").symlink_to("an editor's, and hidden")
    os.mkfifo(tmp_path / "raw" / "pipe.txt")
    scandir = os.scandir

    def refused(path="."):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)  # root may read everything
    pipeline.main(settings(tmp_path / "raw", tmp_path / "out", **JUDGED_BY_NOTHING))
    assert {(row["path"], row["rule"]) for row in removed_of(tmp_path / "out")} == {
        ("web/link", "a link to a folder"), ("web/shut", "a folder"), ("web/nothing.jsonl.gz", "empty"),
        ("web/gone.html", "a link to nothing"), ("web/pipe.txt", "not a file")}
