"""`jaxllm data` as a whole: its books balance, and neither kills nor the number of workers change what comes out."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from raw_corpus import (
    INPUTS,
    LONG,
    NOTICE,
    ROOT,
    UNIT_BYTES,
    command,
    hashes,
    kept_of,
    manifest,
    prose,
    removed_of,
    run,
    settings,
)

from jaxllm.data import outputs, pipeline, raw
from jaxllm.errors import RunError, UserError


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(raw, "UNIT_BYTES", UNIT_BYTES)


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
    assert all((row["value"] == 1) == (row["rule"] == "exact") and row["value"] > 0.5 for row in removed if row["stage"] == "dedup")
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


def test_items_are_found_before_their_lines_are_cut_masked_or_repaired(tmp_path):
    """With the default filters, every document that holds an item as it stands goes for that."""
    rng = random.Random(5)
    items = ["If today is the fifth of May, which day was it a week ago?\n(A) 04/28/2019\n(B) 06/19/2019\n(C) 05/12/2019",
             "Write to anna.schmidt@example.org or to 192.168.100.14 and ask, please?",
             "".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in "Which of the lakes freezes last in the year?"),
             "Who built the schÃ¶nste bridge of MÃ¼nchen, and when was that?", "{ the answer } lies in brackets {}, does it not?"]
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "quiz.jsonl").write_text("\n".join(json.dumps({"input": item, "target": "(A)"}) for item in items))
    (tmp_path / "raw").mkdir()
    lines = [json.dumps({"text": f"{prose(rng)}\n{text}\n{prose(rng)}"}) for text in [*items, "", "", ""]]
    (tmp_path / "raw" / "a.jsonl").write_text("\n".join(lines))
    config = settings(tmp_path / "raw", tmp_path / "out", **{"decontaminate.folder": tmp_path / "sets"})
    pipeline.main(config)
    gone = [row["rule"] for row in removed_of(tmp_path / "out") if row["stage"] == "decontaminate"]
    assert gone == ["quiz"] * len(items)


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_workers_change_nothing(workers, everything, whole, tmp_path):
    done = run("data", everything, f"--run.dir={tmp_path / 'out'}", f"--workers={workers}")
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "out") == whole


def test_a_finished_run_does_nothing(everything, whole, tmp_path):
    words = ["data", everything, f"--run.dir={tmp_path / 'out'}", "--json=-", "--workers=1"]
    assert run(*words).returncode == 0
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    done = run(*words)
    assert "nothing to do" in done.stderr and json.loads(done.stdout)["documents"] == whole["totals"]["documents"]
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before


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


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_request_to_stop_is_followed_and_the_same_command_goes_on(number, everything, whole, tmp_path):
    words = command("data", everything, f"--run.dir={tmp_path / 'out'}", "--workers=2")
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "out").glob("work/units/*")):
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "run the same command to go on" in said and "Traceback" not in said, said
    assert subprocess.run(words, cwd=ROOT, check=False, stderr=subprocess.DEVNULL).returncode == 0
    assert hashes(tmp_path / "out") == whole


def test_tasks_of_a_cluster_make_what_one_machine_does(everything, whole, tmp_path):
    pytest.importorskip("datatrove")
    code = f"""
from datatrove.executor import LocalPipelineExecutor
from jaxllm.data import raw
from jaxllm.data.cluster import MapUnits
raw.UNIT_BYTES = {UNIT_BYTES}
step = MapUnits({str(everything)!r}, ["run.dir={tmp_path / 'out'}"])
step.begin()
LocalPipelineExecutor(pipeline=[step], tasks=3, workers=1, logging_dir={str(tmp_path / 'logs')!r}).run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    units = sorted((tmp_path / "out" / "work" / "units").iterdir())
    assert len(units) > 3 and all((unit / "index.json").is_file() for unit in units)
    assert run("data", everything, f"--run.dir={tmp_path / 'out'}", "--workers=1").returncode == 0
    assert hashes(tmp_path / "out") == whole


STEPS = {  # a place in every step, at which the process dies without a word
    "in a unit": ("jaxllm.data.map_unit", "write_lines", 3), "between units": ("jaxllm.data.pipeline", "read_index", 2),
    "deciding": ("jaxllm.data.overall", "save", 0), "counting lines": ("jaxllm.data.passages", "line_hashes", 50),
    "cutting lines": ("jaxllm.data.passages", "write_change", 2), "writing": ("jaxllm.data.outputs", "write_lines", 3),
    "accounting": ("jaxllm.data.account", "write_lines", 0), "publishing": ("jaxllm.data.outputs", "move", 1), "clearing up": ("jaxllm.data.outputs", "shutil.rmtree", 0),
}


QUICK = ("in a unit", "deciding", "publishing")


@pytest.mark.parametrize("step", [step if step in QUICK else pytest.param(step, marks=pytest.mark.slow) for step in STEPS])
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


def test_settings_or_files_that_changed_under_unfinished_work_are_refused(source, tmp_path, monkeypatch):
    cfg = settings(source, tmp_path / "out")
    monkeypatch.setattr(pipeline, "write_all", lambda *a: (_ for _ in ()).throw(RunError("killed")))
    with pytest.raises(RunError):
        pipeline.main(cfg)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"read\.max_bytes: 16777216 -> 5"):
        pipeline.main(settings(source, tmp_path / "out", **{"read.max_bytes": 5}))
    pipeline.main(settings(source, tmp_path / "out", **{"read.max_bytes": 1 << 20, "run.overwrite": "true"}))


@pytest.mark.parametrize("gone", ["plan.json", "kept.jsonl.zst"])
def test_what_a_kill_after_the_manifest_left_is_removed(gone, source, tmp_path, monkeypatch):
    """The work folder is half deleted: the run is finished all the same, and the next start takes the rest away."""
    cfg = settings(source, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(outputs.shutil, "rmtree", lambda path, **_: [p.unlink() for p in path.rglob(gone)])
        done = pipeline.main(cfg)
    assert (tmp_path / "out" / "work").is_dir()
    assert pipeline.main(cfg)["documents"] == done["documents"]
    assert not (tmp_path / "out" / "work").exists()


@pytest.mark.parametrize("stop_at", ["work.old", "manifest.json", "documents", "removed.jsonl"])
@pytest.mark.parametrize("again", ["true", "false"])
def test_killed_while_it_overwrites(stop_at, again, source, tmp_path, monkeypatch):
    """Wherever the deletion of the old run ends, the same command goes on, and the result is that of an empty folder."""
    out, new = tmp_path / "out", {"read.max_bytes": 1 << 20}
    pipeline.main(settings(source, tmp_path / "fresh", **new))
    pipeline.main(settings(source, out))
    (out / "card.md").write_text("of the old run")
    remove = pipeline._remove

    def killed(path):
        if path.name == stop_at:
            raise RunError("killed")
        remove(path)

    with monkeypatch.context() as patch, pytest.raises(RunError, match="killed"):
        patch.setattr(pipeline, "_remove", killed)
        pipeline.main(settings(source, out, **new, **{"run.overwrite": "true"}))
    stopped_before_the_plan = stop_at == "work.old"
    overwrite = "true" if stopped_before_the_plan else again
    pipeline.main(settings(source, out, **new, **{"run.overwrite": overwrite}))
    assert hashes(out) == hashes(tmp_path / "fresh")
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "fresh").iterdir())


def test_a_folder_of_something_else_is_not_deleted(source, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in ("true", "false"):
        with pytest.raises(UserError, match=r"give another run\.dir"):
            pipeline.main(settings(source, tmp_path, **{"run.overwrite": overwrite}))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_output_within_the_input_is_refused(source):
    with pytest.raises(UserError, match=r"run\.dir=.*: lies in sources\.web\.path"):
        pipeline.main(settings(source, source / "out"))
    assert not (source / "out").exists()


def test_a_live_run_holds_the_folder(source, tmp_path):
    with pipeline.claimed(tmp_path / "out"), pytest.raises(UserError, match="in use by a live run"):
        pipeline.main(settings(source, tmp_path / "out"))
