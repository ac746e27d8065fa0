"""A run that was killed, stopped, damaged or moved goes on as if it had not been. Real processes, real signals."""

import importlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time

import pytest
import runs

from jaxllm.errors import Stopped, stopping_at_once


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    """A run that nothing happened to: (its folder, its config)."""
    folder = tmp_path_factory.mktemp("never_killed")
    config = runs.config(folder)
    code, text = runs.finish(runs.start("pretrain", config))
    assert code == 0, text
    return folder / "run", config


def go_on(config, folder, steps=24, **how):
    return runs.finish(runs.start("pretrain", config, f"--run.dir={folder}", f"--train.steps={steps}", **how))


def same_run(a: pathlib.Path, b: pathlib.Path):
    assert runs.digest(a) == runs.digest(b)
    assert runs.lines(a / "metrics.jsonl", *runs.NUMBERS) == runs.lines(b / "metrics.jsonl", *runs.NUMBERS)


@pytest.mark.slow
def test_killed_at_ten_random_moments_is_never_killed(never_killed, tmp_path):
    folder, config = never_killed
    rng, killed = random.Random(os.environ.get("PYTEST_SEED", "1")), tmp_path / "run"
    moments = []
    for _ in range(10):
        process = runs.start("pretrain", config, f"--run.dir={killed}")
        runs.wait_for(lambda p=process: (killed / "run.lock").exists() or p.poll() is not None)
        runs.kill(process, after=rng.uniform(0.5, 4.5))
        # a line counts when its end was written; a kill may come before the first
        whole = (killed / "metrics.jsonl").read_text().split("\n")[:-1] if (killed / "metrics.jsonl").exists() else []
        moments.append(json.loads(whole[-1])["step"] if whole else 0)
        if moments[-1] >= 22:  # begin anew, so that each kill meets a run that is under way
            code, text = go_on(config, killed)
            assert code == 0, text
            same_run(folder, killed)
            shutil.rmtree(killed)
    code, text = go_on(config, killed)
    assert code == 0, text
    assert any(moments), "no kill met a run that had taken a step"
    same_run(folder, killed)


def test_stopped_on_request_saves_and_goes_on(never_killed, tmp_path):
    _, config = never_killed
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    process = runs.start("pretrain", config, f"--run.dir={stopped}", "--checkpoint.every=1000000", "--train.steps=1000000")
    runs.wait_for(lambda: (stopped / "metrics.jsonl").exists() and len(runs.lines(stopped / "metrics.jsonl")) > 2)
    os.kill(process.pid, signal.SIGTERM)
    code, text = runs.finish(process)
    assert code == 75, text
    assert "run the same command to go on" in text
    step = max(line["step"] for line in runs.lines(stopped / "metrics.jsonl"))
    assert (stopped / "checkpoints" / str(step)).is_dir()
    assert runs.lines(stopped / "incidents.jsonl")[-1]["kind"] == "stopped"
    for folder in (stopped, straight):
        code, text = go_on(config, folder, steps=step + 3)
        assert code == 0, text
    ours, theirs = ([x for x in runs.lines(f / "metrics.jsonl", "step", "loss") if "loss" in x] for f in (stopped, straight))
    assert ours == theirs
    assert runs.digest(stopped) == runs.digest(straight)


def test_a_stopped_run_that_overwrote_says_not_to_overwrite_again(tmp_path):
    config, run = runs.config(tmp_path), tmp_path / "run"
    process = runs.start("pretrain", config, "--run.overwrite=true", "--checkpoint.every=1000000", "--train.steps=1000000")
    runs.wait_for(lambda: (run / "metrics.jsonl").exists() and len(runs.lines(run / "metrics.jsonl")) > 2)
    os.kill(process.pid, signal.SIGTERM)
    code, text = runs.finish(process)
    assert code == 75, text
    assert "without run.overwrite=true, which would delete it" in text


def test_a_signal_does_not_break_into_an_import(tmp_path, monkeypatch):
    """An exception inside a half-made extension module would crash the process: the signal comes again when it is made."""
    (tmp_path / "interrupted.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nwhole = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Stopped, match="SIGTERM"), stopping_at_once():
        importlib.import_module("interrupted")
        time.sleep(5)
    assert sys.modules["interrupted"].whole


def test_a_signal_that_is_swallowed_comes_again():
    """As in a garbage collector's callback, whose exceptions Python drops."""
    swallowed = 0
    with pytest.raises(Stopped, match="SIGTERM"), stopping_at_once():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except Stopped:
            swallowed = 1
        time.sleep(5)
    assert swallowed == 1


def test_a_second_signal_leaves_alone_what_cleans_up():
    cleaned = False
    with pytest.raises(Stopped), stopping_at_once():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)  # the first one comes again in the meantime
            cleaned = True
    assert cleaned


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_stopped_before_the_first_step_can_be_run_again(tmp_path, sent):
    config, run = runs.config(tmp_path), tmp_path / "run"
    process = runs.start("pretrain", config)
    runs.wait_for(lambda: (run / "run.lock").exists() and (run / "run.lock").read_text())
    os.kill(process.pid, sent)
    code, text = runs.finish(process)
    assert code == 75, text
    assert f"stopped by {sent.name}; run the same command to go on" in text and "Traceback" not in text, text
    assert not (run / "metrics.jsonl").exists()


def test_text_that_changed_under_a_run_is_an_incident(never_killed, tmp_path):
    folder, config = never_killed
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    other = runs.corpus(tmp_path, seed=1)
    code, text = runs.finish(runs.start("pretrain", config, f"--run.dir={copy}", f"--data.sources.words.path={other}", "--train.steps=25"))
    assert code == 0, text
    told = [x["message"] for x in runs.lines(copy / "incidents.jsonl") if x["kind"] == "data_changed"]
    assert len(told) == 1 and "data.sources words; rows from step 25 on" in told[0]


def test_a_finished_run_says_so_and_does_nothing(never_killed):
    folder, config = never_killed
    before = {p: p.stat().st_mtime_ns for p in (folder / "checkpoints").rglob("*")}
    code, text = runs.finish(runs.start("pretrain", config))
    assert code == 0
    assert "finished: step 24 of 24" in text
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "checkpoints").rglob("*")}


def damage_truncate(checkpoint: pathlib.Path):
    largest = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def damage_flip(checkpoint: pathlib.Path):
    for data in (p for p in checkpoint.rglob("*") if p.is_file() and p.parent.name == "d"):
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 4
        data.write_bytes(content)


def damage_remove(checkpoint: pathlib.Path):
    shutil.rmtree(checkpoint / "train")


def damage_mix(checkpoint: pathlib.Path):
    """Puts another step's parameters in: every file can be read, only the checksums tell."""
    shutil.rmtree(checkpoint / "params")
    shutil.copytree(checkpoint.with_name("20") / "params", checkpoint / "params")


@pytest.mark.parametrize("damage", [
    damage_flip, *(pytest.param(one, marks=pytest.mark.slow) for one in (damage_truncate, damage_remove, damage_mix))])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(damage, never_killed, tmp_path):
    folder, config = never_killed
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    damage(copy / "checkpoints" / "24")
    code, text = runs.finish(runs.start("pretrain", config, f"--run.dir={copy}", "--train.steps=28"))
    assert code == 0, text
    assert f"checkpoint {copy}/checkpoints/24 is damaged" in text
    assert "goes on from step 20" in text
    assert any((copy / "damaged-checkpoints").iterdir())  # nothing is deleted
    steps = [x["step"] for x in runs.lines(copy / "metrics.jsonl") if "loss" in x]
    assert steps == list(range(1, 29))
    theirs = runs.lines(folder / "metrics.jsonl", "step", "loss")
    assert [x for x in runs.lines(copy / "metrics.jsonl", "step", "loss") if "loss" in x][:24] == [x for x in theirs if "loss" in x]


@pytest.mark.slow
def test_other_device_counts_see_the_same_rows_and_nearly_the_same_losses(never_killed, tmp_path):
    folder, config = never_killed
    other = tmp_path / "run"
    code, text = runs.finish(runs.start("pretrain", config, f"--run.dir={other}", "--train.steps=12", devices=8))
    assert code == 0, text
    code, text = go_on(config, other, devices=2)
    assert code == 0, text
    assert "mesh" not in text or "goes on from step 12" in text
    ours, theirs = (runs.lines(f / "metrics.jsonl", "step", "loss") for f in (other, folder))
    ours, theirs = ({x["step"]: x["loss"] for x in side if "loss" in x} for side in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for step, loss in theirs.items():
        assert abs(ours[step] - loss) / loss < 1e-5, step


def test_a_full_disk_stops_the_run_and_leaves_the_older_checkpoint(tmp_path):
    config = runs.config(tmp_path)
    code, text = runs.finish(runs.start("pretrain", config, "--train.steps=4"))
    assert code == 0, text
    # No file may become larger than 8 kB, which a checkpoint's must and no other need. Python ignores SIGXFSZ: it is an error.
    code, text = runs.finish(runs.start("pretrain", config, "--train.eval_every=0", "--log.every=1000", prefix="ulimit -f 16"))
    assert code == 1, text
    assert "checkpoint not written" in text and "complete checkpoints: 4" in text, text
    code, text = runs.finish(runs.start("pretrain", config))
    assert code == 0, text
    assert "goes on from step 4" in text


@pytest.mark.parametrize("board", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_full_disk_while_logging_stops_the_run_and_does_not_hang(tmp_path, board):
    config = runs.config(tmp_path, log={"every": 1}, checkpoint={"every": 100_000})
    code, text = go_on(config, tmp_path / "first", steps=1)  # tokenises
    assert code == 0, text
    code, text = runs.finish(runs.start("pretrain", config, "--train.steps=100000", "--train.eval_every=0",
                                        f"--log.tensorboard={board}", prefix="ulimit -f 24"))
    assert code == 1, text
    assert "cannot be written: File too large" in text and "Traceback" not in text, text[-2000:]


def test_a_folder_in_use_is_refused(tmp_path):
    config = runs.config(tmp_path, train={"steps": 100_000})
    process = runs.start("pretrain", config)
    try:
        runs.wait_for(lambda: (tmp_path / "run" / "config.yaml").exists())
        code, text = runs.finish(runs.start("pretrain", config))
        assert code == 2
        assert f"in use by a live run (process {process.pid}" in text
    finally:
        runs.kill(process, after=0)
