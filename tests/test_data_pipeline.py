"""`jaxllm data` as a whole: its books balance, and neither kills nor the number of workers change what comes out."""

import gzip
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import zstandard

from jaxllm import config
from jaxllm.data import pipeline, raw
from jaxllm.data.map_unit import read_lines
from jaxllm.data.pipeline_config import DataVerb
from jaxllm.errors import RunError, UserError

WORDS = "the cat sat on a mat and looked at rain over green hills while people of many towns walked home to eat and sleep".split()


def prose(rng: random.Random, words: int = 120) -> str:
    out = []
    for _ in range(words // 12):
        out.append(" ".join(rng.choice(WORDS) for _ in range(12)).capitalize() + ".")
    return " ".join(out)


def corpus(folder: pathlib.Path, pages: int = 60, lines: int = 400) -> pathlib.Path:
    """Writes pages and JSON lines, some of each broken."""
    rng = random.Random(0)
    (folder / "pages").mkdir(parents=True)
    for i in range(pages):
        body = "".join(f"<p>{prose(rng)}</p>" for _ in range(4))
        (folder / "pages" / f"{i:03}.html").write_text(f"<html><head><title>Page {i}</title></head><body>{body}</body></html>")
    with gzip.open(folder / "lines.jsonl.gz", "wt") as file:
        for i in range(lines):
            file.write(json.dumps({"id": f"line-{i % (lines - 5)}", "text": prose(rng), "url": f"http://example.org/{i}"}) + "\n")
        file.write('{"text": 5}\nnot json\n{"text": ""}\n')
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 10)
    return folder


def settings(source: pathlib.Path, out: pathlib.Path, **more) -> DataVerb:
    return config.load(DataVerb, None, [f"sources.web.path={source}", f"run.dir={out}", "workers=1",
                                        *(f"{k}={v}" for k, v in more.items())])


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(raw, "UNIT_BYTES", 30_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus") / "raw")


def manifest(folder: pathlib.Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def test_every_document_is_kept_or_removed_with_a_reason(source, tmp_path):
    pipeline.main(settings(source, tmp_path / "out"))
    found, out = manifest(tmp_path / "out"), tmp_path / "out"
    kept = [row for part in sorted((out / "documents").iterdir()) for row in read_lines(part)]
    removed = [json.loads(line) for line in (out / "removed.jsonl").read_text().splitlines()]
    totals = found["totals"]
    assert totals["inputs"] == len(kept) + len(removed) == 60 + 400 + 3 + 1
    assert totals["kept"] == len(kept) and totals["removed"] == len(removed)
    names = [row["id"] for row in [*kept, *removed]]
    assert len(set(names)) == len(names)  # five lines had an id that was there before
    assert totals["renamed"] >= 1
    assert {row["rule"] for row in removed} >= {"binary", "not JSON", "empty", "no string in field 'text'"}
    assert all({"id", "source", "stage", "rule", "value"} <= row.keys() for row in removed)
    assert sum(r["documents"] for r in found["rules"]) == len(removed)


def test_neither_workers_nor_a_second_run_change_anything(source, tmp_path):
    hashes = []
    for workers in (1, 3):
        out = tmp_path / f"w{workers}"
        code = "from jaxllm.data import raw; raw.UNIT_BYTES = 30_000\nfrom jaxllm.cli import main\nimport sys; sys.exit(main(sys.argv[1:]))"
        run = [sys.executable, "-c", "if __name__ == '__main__':\n " + code.replace("\n", "\n "), "data", "/dev/null"]
        (tmp_path / "c.yaml").write_text(f"sources: {{web: {{path: {source}}}}}\n")
        run[-1] = str(tmp_path / "c.yaml")
        done = subprocess.run([*run, f"--run.dir={out}", f"--workers={workers}"], capture_output=True, text=True, check=False,
                              cwd=pathlib.Path(__file__).parents[1])
        assert done.returncode == 0, done.stderr
        found = manifest(out)
        hashes.append((found["output_sha256"], found["input_sha256"], found["rules"], found["counts"]))
    assert hashes[0] == hashes[1]
    again = pipeline.main(settings(source, tmp_path / "w1"))
    assert again["documents"] == found["totals"]["documents"] and manifest(tmp_path / "w1")["output_sha256"] == hashes[0][0]


@pytest.mark.slow
def test_killed_at_ten_random_moments_is_never_killed(source, tmp_path):
    (tmp_path / "c.yaml").write_text(f"sources: {{web: {{path: {source}}}}}\n")
    code = "from jaxllm.data import raw; raw.UNIT_BYTES = 30_000\nfrom jaxllm.cli import main\nimport sys; sys.exit(main(sys.argv[1:]))"
    run = [sys.executable, "-c", code, "data", str(tmp_path / "c.yaml"), "--workers=1"]
    root = pathlib.Path(__file__).parents[1]
    began = time.monotonic()
    assert subprocess.run([*run, f"--run.dir={tmp_path / 'whole'}"], cwd=root, check=False).returncode == 0
    took, rng = time.monotonic() - began, random.Random(os.environ.get("PYTEST_SEED", "1"))
    for _ in range(10):
        process = subprocess.Popen([*run, f"--run.dir={tmp_path / 'killed'}"], cwd=root)
        try:
            process.wait(rng.uniform(0.2, 1) * took)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert subprocess.run([*run, f"--run.dir={tmp_path / 'killed'}"], cwd=root, check=False).returncode == 0
    a, b = manifest(tmp_path / "whole"), manifest(tmp_path / "killed")
    assert a["output_sha256"] == b["output_sha256"] and a["totals"] == b["totals"] and a["rules"] == b["rules"]
    for name in ("removed.jsonl", "card.md"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert not (tmp_path / "killed" / "work").exists()


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


def write(path: pathlib.Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


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
    "too long": ("a.txt", lambda: b"word " * 10_000, "longer than read.max_bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_counted_and_named_and_the_rest_goes_on(name, tmp_path):
    file, data, says = BROKEN[name]
    write(tmp_path / "raw" / file, data())
    write(tmp_path / "raw" / "good.txt", b"A good document.")
    cfg = settings(tmp_path / "raw", tmp_path / "out", **{"read.max_bytes": 20_000})
    pipeline.main(cfg)
    removed = [json.loads(line) for line in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()]
    assert any(says in str(row["value"]) and file in row["id"] for row in removed), removed
    assert manifest(tmp_path / "out")["totals"]["documents"] >= 1
    with pytest.raises(UserError, match=f"{file}.*{says}"):
        pipeline.main(settings(tmp_path / "raw", tmp_path / "stop", **{"read.max_bytes": 20_000, "read.on_error": "stop"}))


def test_bytes_that_are_not_utf8_are_counted_or_read_as_the_page_says(tmp_path):
    write(tmp_path / "raw" / "a.txt", b"caf\xe9 au lait, and more of it")
    write(tmp_path / "raw" / "b.html", b'<html><meta charset="iso-8859-1"><body><p>caf\xe9 au lait</p></body></html>')
    pipeline.main(settings(tmp_path / "raw", tmp_path / "out"))
    texts = [row["text"] for part in (tmp_path / "out" / "documents").iterdir() for row in read_lines(part)]
    assert any("café" in t for t in texts)
    assert manifest(tmp_path / "out")["counts"]["read.invalid_utf8"] == 1


@pytest.mark.parametrize(("path", "says"), [
    ("nothing-here", "no such file or folder"), ("empty", "the folder is empty"), ("odd", "no file ends in one of"),
])
def test_a_source_without_documents_is_one_line(path, says, tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "odd" / "a.docx", b"x")
    with pytest.raises(UserError, match=says):
        pipeline.main(settings(tmp_path / path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_source_of_which_nothing_is_left_stops_and_names_the_rule(tmp_path):
    write(tmp_path / "raw" / "a.txt", b"\0" * 100)
    with pytest.raises(RunError, match=r"every document of source web was removed \(read.binary 100%\)"):
        pipeline.main(settings(tmp_path / "raw", tmp_path / "out"))


def test_a_live_run_holds_the_folder(source, tmp_path):
    with pipeline.claimed(tmp_path / "out"), pytest.raises(UserError, match="in use by a live run"):
        pipeline.main(settings(source, tmp_path / "out"))
