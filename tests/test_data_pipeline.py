"""`jaxllm data` as a whole: its books balance, and neither kills nor the number of workers change what comes out."""

import gzip
import json
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import zstandard

from jaxllm import config
from jaxllm.data import pipeline, raw
from jaxllm.data.pipeline_config import DataVerb
from jaxllm.data.unit_files import read_lines
from jaxllm.errors import RunError, UserError

ROOT = pathlib.Path(__file__).parents[1]
WORDS = """the cat sat on a mat and looked at rain over green hills while people of many towns walked home to eat sleep river
    stone bread winter garden letter market bridge window candle harbour meadow lantern orchard village mirror kettle saddle
    thunder pebble violin copper ribbon basket feather blanket chimney quarry""".split()
NOTICE = "This notice stands below every page of ours and says nothing about what the page is for."
ITEM = "Which metal do divers of the northern lakes prefer for lanterns that must not rust in brackish water?"
JUDGED_BY_NOTHING = {f"filter.{name}.use": "false" for name in ("gopher", "c4", "fineweb")}


def prose(rng: random.Random, words: int = 120) -> str:
    out = []
    for _ in range(words // 12):
        out.append(" ".join(rng.choice(WORDS) for _ in range(12)).capitalize() + ".")
    return " ".join(out)


LONG = prose(random.Random(7), 60)


def page(title: str, *paragraphs: str) -> str:
    return f"<html><head><title>{title}</title></head><body>{''.join(f'<p>{p}</p>' for p in paragraphs)}</body></html>"


def warc(path: pathlib.Path, pages: list[str]) -> None:
    """Writes response records as crawlers do, each a gzip member of its own, and one of a kind that holds no text."""
    with path.open("wb") as file:
        for i, body in enumerate([*pages, "\x89PNG"]):
            kind = "image/png" if i == len(pages) else "text/html; charset=utf-8"
            http = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n\r\n{body}".encode()
            head = (f"WARC/1.1\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:{i}>\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
                    f"WARC-Target-URI: http://example.org/{i}\r\nContent-Type: application/http; msgtype=response\r\n"
                    f"Content-Length: {len(http)}\r\n\r\n")
            file.write(gzip.compress(head.encode() + http + b"\r\n\r\n"))


def corpus(folder: pathlib.Path, pages: int = 40, lines: int = 300) -> pathlib.Path:
    """Writes files of every kind, some broken, with copies, an evaluation item, repeated lines and a long passage."""
    import pyarrow
    from pyarrow import parquet

    rng = random.Random(0)
    (folder / "pages").mkdir(parents=True)
    texts = [[prose(rng) for _ in range(4)] for _ in range(pages)]
    for i, paragraphs in enumerate(texts):
        (folder / "pages" / f"{i:03}.html").write_text(page(f"Page {i}", *paragraphs, NOTICE))
    # near duplicates of the first ten, an evaluation item in the eleventh, and the long passage in five
    again = [page(f"Page {i} again", *texts[i][:3], texts[i][3] + " And the rest.", NOTICE) for i in range(10)]
    warc(folder / "crawl.warc.gz", [*again, page("Quiz", prose(rng), ITEM, prose(rng)),
                                    *(page(f"Quote {i}", prose(rng), LONG, prose(rng)) for i in range(5))])
    rows = [{"id": f"line-{i % (lines - 5)}", "text": prose(rng), "url": f"http://example.org/{i}"} for i in range(lines)]
    with gzip.open(folder / "lines.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.write('{"text": 5}\nnot json\n{"text": ""}\n')
    write(folder / "more.jsonl.zst", zstandard.compress(b"".join(json.dumps({"text": prose(rng)}).encode() + b"\n" for _ in range(50))))
    parquet.write_table(pyarrow.table({"text": [prose(rng) for _ in range(50)], "id": [f"row {i}" for i in range(50)]}),
                        folder / "rows.parquet")
    (folder / "prose.txt").write_text(prose(rng) + "\n" + rows[0]["text"])
    (folder / "z-copy.txt").write_text(rows[1]["text"])
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 10)
    return folder


INPUTS = 40 + 16 + 300 + 3 + 50 + 50 + 3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus") / "raw")


@pytest.fixture(scope="module")
def everything(source, tmp_path_factory) -> pathlib.Path:
    """A config with every stage that can be on without a trained classifier, over two sources."""
    folder = tmp_path_factory.mktemp("everything")
    write(folder / "eval" / "quiz.jsonl", json.dumps({"question": ITEM}).encode())
    for i in range(20):
        write(folder / "more" / f"{i}.txt", prose(random.Random(i + 100)).encode())
    write(folder / "slurs.txt", b"dreadfulslur\n")
    (folder / "c.yaml").write_text(f"""
sources: {{web: {{path: {source}}}, other: {{path: {folder}/more, domain: notes}}}}
decontaminate: {{folder: {folder}/eval}}
harm: {{use: true, words: [{folder}/slurs.txt]}}
repeats: {{use: true, max_documents: 5, table_bits: 12}}
substrings: {{use: true}}
mix: {{method: temperature, alpha: 0.3, max_epochs: 3}}
homographs: {{use: true, min_count: 5, skip: 5}}
augment: {{use: true, shuffle: 0.5}}
""")
    return folder / "c.yaml"


def settings(source: pathlib.Path, out: pathlib.Path, **more) -> DataVerb:
    return config.load(DataVerb, None, [f"sources.web.path={source}", f"run.dir={out}", "workers=1",
                                        *(f"{k}={v}" for k, v in more.items())])


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(raw, "UNIT_BYTES", 30_000)


def command(*words) -> list[str]:
    """Returns a command line of jaxllm with units as small as in this process."""
    code = "from jaxllm.data import raw; raw.UNIT_BYTES = 30_000; from jaxllm.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", code, *map(str, words)]


def run(*words, **more) -> subprocess.CompletedProcess:
    return subprocess.run(command(*words), capture_output=True, text=True, check=False, cwd=ROOT, **more)


def manifest(folder: pathlib.Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def kept_of(folder: pathlib.Path) -> list[dict]:
    return [row for part in sorted((folder / "documents").iterdir()) for row in read_lines(part)]


def removed_of(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "removed.jsonl").read_text().splitlines()]


def hashes(folder: pathlib.Path) -> dict:
    """Returns what must not depend on kills or workers."""
    found = manifest(folder)
    del found["plan"]["settings"]
    return found | {name: (folder / name).read_bytes() for name in ("removed.jsonl", "card.md")} | {
        p.name: p.read_bytes() for p in sorted((folder / "documents").iterdir())}


def write(path: pathlib.Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_every_document_is_kept_or_removed_with_a_reason(source, tmp_path):
    out = tmp_path / "out"
    pipeline.main(settings(source, out))
    found, kept, removed = manifest(out), kept_of(out), removed_of(out)
    totals = found["totals"]
    assert totals["inputs"] == len(kept) + len(removed) == INPUTS
    assert totals["kept"] == len(kept) and totals["removed"] == len(removed)
    names = [row["id"] for row in [*kept, *removed]]
    assert len(set(names)) == len(names)  # five lines had an id that was there before
    assert totals["renamed"] == 5
    rules = {(row["stage"], row["rule"]) for row in removed}
    assert rules >= {("read", "binary"), ("read", "not JSON"), ("read", "empty"), ("read", "no string in field 'text'"),
                     ("dedup", "exact"), ("dedup", "near")}
    assert all({"id", "source", "stage", "rule", "value"} <= row.keys() for row in removed)
    assert sum(r["documents"] for r in found["rules"]) == len(removed)
    copies = {row["id"]: row["duplicate_of"] for row in removed if row["stage"] == "dedup"}
    assert copies["web/z-copy.txt"] == "line-1" and set(copies.values()) <= {row["id"] for row in kept}
    assert sum(name.startswith("web/pages") or "urn:uuid" in name for name in copies) == 10
    (url,) = {row["meta"]["url"] for row in kept if row["id"] == "line-7"}
    assert url == "http://example.org/7" and all(row["meta"]["language"] for row in kept)
    funnel = found["sources"]["web"]["funnel"]
    assert [n for n, _ in funnel.values()] == sorted((n for n, _ in funnel.values()), reverse=True)
    assert funnel["mix"][0] == len(kept)


def test_every_stage_does_its_part(everything, tmp_path):
    out = tmp_path / "out"
    done = run("data", everything, f"--run.dir={out}", "--workers=1")
    assert done.returncode == 0, done.stderr
    found, kept, removed = manifest(out), kept_of(out), removed_of(out)
    assert found["totals"]["inputs"] == found["totals"]["kept"] + len(removed) == INPUTS + 20
    stages = {row["stage"] for row in removed}
    assert stages >= {"read", "decontaminate", "dedup"}
    (quiz,) = [row for row in removed if row["stage"] == "decontaminate"]
    assert quiz["rule"] == "quiz" and quiz["value"] == 1
    assert found["counts"]["decontaminate.task.quiz"] == 1
    assert found["decided"]["evaluation items"] == [{"task": "quiz", "looked for": 1, "too short to look for": 0}]
    assert not any(NOTICE in row["text"] for row in kept)
    assert found["counts"]["repeats.lines_across"] >= 30
    once = [row for row in kept if not re.search(r"#(copy|augmented)\d+$", row["id"])]
    assert sum(LONG in row["text"] for row in once) == 1 and found["counts"]["substrings.passages"] >= 4
    again = [row for row in kept if row["id"].endswith("#augmented1")]
    assert len(again) == found["totals"]["augmented"] > 10
    assert found["totals"]["documents"] == len(kept)
    assert {row["name"] for row in found["decided"]["mixture"]} >= {"web", "other", "notes"}
    assert sum(row["documents"] for row in found["rules"]) == len(removed)


def test_neither_workers_nor_a_second_run_change_anything(everything, tmp_path):
    found = []
    for workers in (1, 2, 4):
        done = run("data", everything, f"--run.dir={tmp_path / str(workers)}", f"--workers={workers}")
        assert done.returncode == 0, done.stderr
        found.append(hashes(tmp_path / str(workers)))
    assert found[0] == found[1] == found[2]
    done = run("data", everything, f"--run.dir={tmp_path / '1'}", "--json=-")
    assert "nothing to do" in done.stderr and json.loads(done.stdout)["documents"] == found[0]["totals"]["documents"]


@pytest.mark.slow
def test_killed_at_ten_random_moments_is_never_killed(everything, whole, tmp_path):
    """Each folder's run is killed until it is through, at moments from its start to its end; with two workers."""
    rng, kills, out = random.Random(os.environ.get("PYTEST_SEED", "1")), 0, 0
    began = time.monotonic()
    assert run("data", everything, f"--run.dir={tmp_path / 'unhurt'}", "--workers=2").returncode == 0
    took = time.monotonic() - began
    while kills < 10:
        out += 1
        words = command("data", everything, "--workers=2", f"--run.dir={tmp_path / str(out)}")
        for _ in range(4):
            process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
            try:
                assert process.wait(rng.uniform(0.2, 1) * took) == 0
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
        assert subprocess.run(words, cwd=ROOT, check=False, stderr=subprocess.DEVNULL).returncode == 0
        assert hashes(tmp_path / str(out)) == whole
        assert not (tmp_path / str(out) / "work").exists()


STEPS = {  # a place in every step, at which the process dies without a word
    "in a unit": ("jaxllm.data.map_unit", "write_lines", 3), "between units": ("jaxllm.data.pipeline", "read_index", 2),
    "deciding": ("jaxllm.data.overall", "save", 0), "counting lines": ("jaxllm.data.passages", "line_hashes", 50),
    "cutting lines": ("jaxllm.data.passages", "write_change", 2), "writing": ("jaxllm.data.outputs", "write_lines", 3),
    "accounting": ("jaxllm.data.account", "write_lines", 0), "publishing": ("jaxllm.data.outputs", "move", 1), "clearing up": ("jaxllm.data.outputs", "shutil.rmtree", 0),
}


@pytest.mark.parametrize("step", STEPS)
def test_killed_in_any_step_is_never_killed(step, everything, whole, tmp_path):
    module, name, after = STEPS[step]
    code = f"""
import importlib, itertools, os, signal, sys
from jaxllm.data import raw
from jaxllm.cli import main
raw.UNIT_BYTES = 30_000
holder, calls = importlib.import_module({module!r}), itertools.count()
*path, last = {name!r}.split(".")
for part in path: holder = getattr(holder, part)
real = getattr(holder, last)
def dies(*args, **more):
    if next(calls) >= {after}: os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **more)
setattr(holder, last, dies)
sys.exit(main(sys.argv[1:]))
"""
    words = ["data", everything, f"--run.dir={tmp_path / 'out'}", "--workers=1"]
    died = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert died.returncode == -signal.SIGKILL, died.stderr
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "out") == whole


@pytest.fixture(scope="module")
def whole(everything, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    done = run("data", everything, f"--run.dir={out}", "--workers=1")
    assert done.returncode == 0, done.stderr
    return hashes(out)


def test_settings_or_files_that_changed_under_unfinished_work_are_refused(source, tmp_path, monkeypatch):
    cfg = settings(source, tmp_path / "out")
    monkeypatch.setattr(pipeline, "write_all", lambda *a: (_ for _ in ()).throw(RunError("killed")))
    with pytest.raises(RunError):
        pipeline.main(cfg)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"read\.max_bytes: 16777216 -> 5"):
        pipeline.main(settings(source, tmp_path / "out", **{"read.max_bytes": 5}))
    pipeline.main(settings(source, tmp_path / "out", **{"read.max_bytes": 1 << 20, "run.overwrite": "true"}))


def test_a_folder_of_something_else_is_not_deleted(source, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in ("true", "false"):
        with pytest.raises(UserError, match=r"give another run\.dir"):
            pipeline.main(settings(source, tmp_path, **{"run.overwrite": overwrite}))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def noise(lines: int) -> bytes:
    rng = random.Random(0)
    return "".join(json.dumps({"text": prose(rng)}) + "\n" for _ in range(lines)).encode()


def whole_warc() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "a.warc.gz"
        warc(path, [page(f"Page {i}", prose(random.Random(i), 1000)) for i in range(3)])
        return path.read_bytes()


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


@pytest.mark.parametrize("most", [3_000, 20_000, 80_000])
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


def test_a_live_run_holds_the_folder(source, tmp_path):
    with pipeline.claimed(tmp_path / "out"), pytest.raises(UserError, match="in use by a live run"):
        pipeline.main(settings(source, tmp_path / "out"))
