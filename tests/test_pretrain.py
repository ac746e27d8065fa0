"""The run from outside: what it writes, what it refuses, how it stops. In this process, on the emulated devices."""

import errno
import json
import math
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import runs
import toy
import yaml

from jaxllm import cli
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.config import CheckpointConfig


def pretrain(config, *words) -> int:
    return cli.main(["pretrain", str(config), *words])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run: (its folder, its config)."""
    folder = tmp_path_factory.mktemp("done")
    config = runs.config(folder, log={"every": 5, "tensorboard": True}, train={"sample_every": 12, "sample_prompts": ["the ", ""]})
    assert pretrain(config, f"--json={folder}/result.json") == 0
    return folder / "run", config


def test_the_run_folder_holds_what_is_promised(done):
    folder, _ = done
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["versions"]["jax"] == jax.__version__ and "commit" in saved
    assert saved["model"]["vocab_size"] >= 256 and saved["optim"]["b2"] == 0.95  # what was filled in, and defaults
    assert sorted(p.name for p in (folder / "checkpoints").iterdir() if p.name.isdigit()) == ["20", "24"]
    train = [x for x in runs.lines(folder / "metrics.jsonl") if "loss" in x]
    assert [x["step"] for x in train] == [5, 10, 15, 20, 24]
    for line in train:
        assert line["tokens"] == line["step"] * 8 * 32
        assert {"loss", "grad_norm", "lr", "tokens_per_s", "step_s", "model_tflops_per_s", "host_gb"} <= line.keys()
        assert "mfu" not in line  # this chip's peak is not known: no figure rather than a wrong one
    held_out = [x for x in runs.lines(folder / "metrics.jsonl") if "eval_loss" in x]
    assert [x["step"] for x in held_out] == [8, 16, 24]
    assert held_out[-1]["eval_loss"] < held_out[0]["eval_loss"]
    assert held_out[0]["eval_perplexity"] == pytest.approx(math.exp(held_out[0]["eval_loss"]))
    samples = runs.lines(folder / "samples.jsonl")
    assert [(s["step"], s["prompt"]) for s in samples] == [(12, "the "), (12, ""), (24, "the "), (24, "")]
    assert any((folder / "tensorboard").iterdir())
    assert "<svg" in (folder / "report.html").read_text()
    result = json.loads((folder.parent / "result.json").read_text())
    assert result["step"] == 24 and result["eval_loss"] == held_out[-1]["eval_loss"]


def test_bits_per_byte_of_a_byte_model_is_the_loss_in_bits(done):
    """A byte tokenizer has one token a byte, except for the end of a document, which stands for no byte."""
    folder, _ = done
    line = [x for x in runs.lines(folder / "metrics.jsonl") if "eval_loss" in x][-1]
    bits = line["eval_loss"] / math.log(2)
    assert bits < line["eval_bits_per_byte"] < bits * 1.1


def test_tensorboard_files_hold_every_number_and_sample(done):
    """Read back by the format: records of length, checksum, message, checksum."""
    import struct

    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in (done[0] / "tensorboard").iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            found |= {(value.tag, event.step): value for value in event.summary.value}
    for line in runs.lines(done[0] / "metrics.jsonl"):
        for name in line.keys() - {"step", "time"}:
            assert found[name, line["step"]].simple_value == pytest.approx(line[name], rel=1e-6)
    assert any(tag.startswith("sample") for tag, _ in found)


def test_a_changed_key_that_may_not_change_is_named_and_nothing_is_touched(done, capsys):
    folder, config = done
    before = (folder / "config.yaml").read_bytes(), sorted(p.name for p in folder.rglob("*"))
    assert pretrain(config, "--model.d_ff=64", "--optim.b1=0.8") == 2
    error = capsys.readouterr().err
    assert "model.d_ff: 32 -> 64" in error and "optim.b1: 0.9 -> 0.8" in error
    assert before == ((folder / "config.yaml").read_bytes(), sorted(p.name for p in folder.rglob("*")))


def test_a_changed_key_that_may_change_is_an_incident(done, tmp_path):
    folder, config = done
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    assert pretrain(config, f"--run.dir={copy}", "--train.steps=26", "--optim.lr=0.02") == 0
    incidents = runs.lines(copy / "incidents.jsonl")
    assert [i["kind"] for i in incidents] == ["resumed", "config_changed"]
    assert "optim.lr: 0.01 -> 0.02" in incidents[1]["message"] and "train.steps: 24 -> 26" in incidents[1]["message"]
    assert runs.lines(copy / "metrics.jsonl")[-2]["lr"] == pytest.approx(0.02)


@pytest.mark.parametrize("mistake", ["--data.sources.words.path=nowhere.jsonl", "--mesh.tensor=8", "--train.batch_size=12"])
def test_overwrite_with_a_mistake_deletes_nothing(done, tmp_path, mistake):
    folder, config = done
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    before = sorted(p.relative_to(copy) for p in copy.rglob("*"))
    assert pretrain(config, f"--run.dir={copy}", "--run.overwrite=true", mistake) == 2
    assert before == sorted(p.relative_to(copy) for p in copy.rglob("*"))
    assert (copy / "config.yaml").read_bytes() == (folder / "config.yaml").read_bytes()


def test_overwrite_deletes_nothing_that_no_run_has_written(tmp_path, capsys):
    theirs = tmp_path / "run" / "checkpoints" / "precious"
    theirs.mkdir(parents=True)
    assert pretrain(runs.config(tmp_path), "--run.overwrite=true") == 2
    assert "would delete checkpoints, which no run of jaxllm has written" in capsys.readouterr().err
    assert theirs.exists()


def test_a_runs_own_config_does_not_overwrite_the_run(tmp_path):
    config = runs.config(tmp_path)
    assert pretrain(config, "--run.overwrite=true", "--train.steps=4") == 0
    assert pretrain(tmp_path / "run/config.yaml", "--train.steps=6") == 0
    assert [x["kind"] for x in runs.lines(tmp_path / "run/incidents.jsonl")] == ["resumed", "config_changed"]


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_tokenizer_when_the_original_is_gone(tmp_path, capsys):
    original = tmp_path / "t.model"
    config = runs.config(tmp_path, data={"tokenizer": str(original)}, train={"eval_every": 0})
    tokenizer = tmp_path / "tokenizer.yaml"
    tokenizer.write_text(f"sources: {{words: {{path: {tmp_path}/corpus.jsonl}}}}\n"
                         f"tokenizer: {{vocab_size: 310, held_out: 0, output: {original}}}\n", encoding="utf-8")
    assert cli.main(["tokenizer", str(tokenizer)]) == 0
    content = original.read_bytes()
    assert pretrain(config, "--train.steps=2") == 0
    original.unlink()
    assert pretrain(config, "--train.steps=4") == 0
    assert f"{original} is gone; the run's own copy is used" in capsys.readouterr().err
    assert pretrain(config, "--train.steps=6", f"--data.tokenizer={tmp_path}/run/tokenizer.model") == 0
    assert (tmp_path / "run/tokenizer.model").read_bytes() == content


def test_a_home_folder_is_written_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert pretrain(runs.config(tmp_path), "--run.dir=~/mine", "--train.steps=1") == 0
    assert (tmp_path / "mine" / "config.yaml").exists() and not (tmp_path / "~").exists()


def test_what_is_no_damage_is_not_told_as_damage(done, monkeypatch):
    from jaxllm.errors import RunError

    def no_files_left(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    with Checkpoints(done[0]) as checkpoints:
        monkeypatch.setattr(checkpoints.manager, "restore", no_files_left)
        with pytest.raises(RunError, match=r"cannot be read now, though it may be whole: OSError: .*Too many open files"):
            checkpoints.restore(None, damaged=lambda *_: pytest.fail("told as damage"))


def test_a_runs_own_config_is_a_config(done, tmp_path):
    folder, _ = done
    assert pretrain(folder / "config.yaml", f"--run.dir={tmp_path}/again", "--train.steps=2", "--train.sample_every=0") == 0


def test_parameters_that_are_not_finite_are_not_saved(tmp_path, capsys):
    config = runs.config(tmp_path)
    assert pretrain(config, "--train.steps=1", "--optim.lr=3e38", "--optim.weight_decay=1000", "--train.eval_every=0") == 1
    assert "not finite after its update: parameter" in capsys.readouterr().err
    assert not any(p.name.isdigit() for p in (tmp_path / "run/checkpoints").iterdir())


def test_a_folder_from_before_a_key_existed_goes_on(done, tmp_path):
    folder, config = done
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    saved = yaml.safe_load((copy / "config.yaml").read_text())
    del saved["model"]["rope_theta"], saved["train"]["z_loss"]
    (copy / "config.yaml").write_text(yaml.safe_dump(saved), encoding="utf-8")
    assert pretrain(config, f"--run.dir={copy}", "--train.steps=25") == 0
    told = runs.lines(copy / "incidents.jsonl")[-1]["message"]
    assert "train.steps: 24 -> 25" in told and "rope" not in told


def test_a_broken_config_of_a_run_is_told_in_a_line(done, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(done[0], copy)
    (copy / "config.yaml").write_text("train: {steps: [1", encoding="utf-8")
    assert cli.main(["inspect", str(copy)]) == 2
    assert "config.yaml: not valid YAML" in capsys.readouterr().err


def test_without_a_place_for_compiled_programs_training_goes_on(tmp_path, capsys, monkeypatch):
    from jaxllm.platform import start_jax

    (tmp_path / "file").touch()
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        start_jax(tmp_path / "cache")  # several CPU devices: programs out of the cache may hang there
        assert jax.config.jax_compilation_cache_dir is None and not jax.config.jax_enable_compilation_cache
        jax.config.update("jax_enable_compilation_cache", True)
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        start_jax(tmp_path / "file" / "cache")
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_enable_compilation_cache", True)
    assert "compiled programs are not kept" in capsys.readouterr().err


def test_the_time_left_counts_what_is_done_beside_training():
    from jaxllm.train.loop import Clock

    clock = Clock()
    for _ in range(4):
        clock.step_done()
    clock.was_aside(8.0)
    assert clock.seconds_left(10, 0.5) == 10 * (0.5 + 8 / 4)


@pytest.mark.slow
def test_overwrite_starts_anew(done, tmp_path):
    folder, config = done
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    (copy / "notes.txt").write_text("mine")
    assert pretrain(config, f"--run.dir={copy}", "--run.overwrite=true", "--model.d_ff=64", "--train.steps=4") == 0
    assert max(x["step"] for x in runs.lines(copy / "metrics.jsonl")) == 4
    assert (copy / "notes.txt").read_text() == "mine"  # only what a run writes is deleted


def test_a_loss_that_is_not_finite_stops_with_the_leaf_and_the_last_good_checkpoint(tmp_path, capsys):
    config = runs.config(tmp_path, checkpoint={"every": 2})
    assert pretrain(config, "--train.steps=4") == 0
    capsys.readouterr()
    assert pretrain(config, "--optim.lr=1e38", "--optim.clip=0") == 1
    error = capsys.readouterr().err
    assert "not finite: parameter" in error or "not finite: gradient of" in error
    assert f"last good checkpoint: {tmp_path}/run/checkpoints/4" in error
    assert runs.lines(tmp_path / "run" / "incidents.jsonl")[-1]["kind"] == "not_finite"
    assert max(int(p.name) for p in (tmp_path / "run/checkpoints").iterdir() if p.name.isdigit()) == 4
    assert pretrain(config) == 0  # with the settings mended, it goes on


def test_the_leaf_that_is_named_is_the_one_that_broke():
    from jaxllm.train.stability import leaf_names, not_finite

    prog = toy.program()
    with jax.set_mesh(prog.mesh):
        state = prog.init()
        params = state.params
        params["trunk"]["blocks_L"]["mlp"]["down_FD"] = jax.tree.map(
            lambda x: x.at[1, 3, 4].set(np.inf), params["trunk"]["blocks_L"]["mlp"]["down_FD"])
        _, metrics = prog.train_step(state, toy.batch())
    metrics = {k: np.asarray(v) for k, v in metrics.items()}
    why = not_finite(leaf_names(prog.abstract.params), metrics)
    assert "parameter trunk.blocks_L.mlp.down_FD" in why and " more" not in why


@pytest.mark.parametrize(("words", "says"), [
    (["--model.vocab_size=100"], "model.vocab_size=100 is smaller than the"),
    (["--data.tokenizer=nowhere.model"], "nowhere.model"),
    (["--data.sources.words.path=nowhere.jsonl"], "nowhere.jsonl"),
    (["--data.sources.words.text_key=txet"], "text"),
    (["--train.batch_size=12"], "nearest batch_size: 16"),
    (["--mesh.tensor=8", "--mesh.data=1"], "which mesh.tensor=8 does not divide"),
    (["--mesh.data=3"], "needs 3 devices, found 8"),
    (["--data.seq_len=128"], "data.seq_len=128 is longer than model.max_seq_len=64"),
    (["--train.sample_every=4", f"--train.sample_prompts=[{'a' * 64}]"], "train.sample_prompts: prompt 1 has 65 tokens"),
    (["--run.dir=/dev/null"], "/dev/null"),
    (["--run.dir=/dev/null/run"], "/dev/null/run: cannot be written: Not a directory"),
    (["--json=/nowhere/x.json"], "/nowhere/x.json: cannot be written: No such file or directory"),
    (["--json"], "--json: should be --json=FILE"),
    (["--data.sources.words.weight=inf"], "should be 0 or more, and finite"),
    (["--train.z_loss=-1"], "train.z_loss=-1.0: should be 0 or more"),
    (["--train.eval_every=-5"], "train.eval_every=-5: should be 0 or more"),
    (["--model.norm_eps=-1"], "model.norm_eps=-1.0: should be above 0"),
    (["--optim.eps=0"], "optim.eps=0.0: should be above 0"),
    (["--data.workers=-3"], "data.workers=-3: should be 0 or more"),
])
def test_a_mistake_gets_one_line_and_exit_code_2(tmp_path, words, says, capsys):
    assert pretrain(runs.config(tmp_path), *words) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jaxllm: ")]
    assert len(error) == 1 and says in error[0]


def test_a_config_without_sources_says_how_to_give_one(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(f"train: {{steps: 2}}\nrun: {{dir: {tmp_path}/run}}\n", encoding="utf-8")
    assert pretrain(path) == 2
    assert "--data.sources" in capsys.readouterr().err


def test_a_checkpoint_of_another_shape_is_refused_by_name(tmp_path):
    from jaxllm.errors import UserError

    prog, other = toy.program(), toy.program(toy.ModelConfig(**{**toy.MODEL.__dict__, "d_ff": 32}))
    state, _ = toy.run(prog, [toy.batch()])
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints, jax.set_mesh(prog.mesh):
        checkpoints.save(1, state, {"step": 1})
        checkpoints.wait()
        with pytest.raises(UserError, match=r"mlp\.down_FD is \[2, 64, 32\] float32, the model of these settings has \[2, 32, 32\]"):
            checkpoints.restore(other.abstract)


@pytest.mark.parametrize("mesh", [{"devices": 1}, {"devices": 4, "fsdp": 2, "tensor": 2}, pytest.param({"devices": 8, "data": 8}, marks=pytest.mark.slow)])
def test_a_checkpoint_restores_bit_for_bit_on_any_mesh(tmp_path, mesh):
    saver, reader = toy.program(devices=8, data=2, fsdp=2, tensor=2), toy.program(**mesh)
    state, _ = toy.run(saver, [toy.batch()])
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        with jax.set_mesh(saver.mesh):
            checkpoints.save(1, state, {"step": 1})
            checkpoints.wait()
        with jax.set_mesh(reader.mesh):
            restored, position = checkpoints.restore(reader.abstract)
    assert position == {"step": 1}
    assert toy.worst(restored, state)[0] == 0
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(reader.abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_old_checkpoints_go_and_every_so_many_stay(tmp_path):
    prog = toy.program()
    state, _ = toy.run(prog, [])
    with Checkpoints(tmp_path, CheckpointConfig(keep=2, keep_every=4)) as checkpoints, jax.set_mesh(prog.mesh):
        for step in range(1, 11):
            checkpoints.save(step, state, {"step": step})
        checkpoints.wait()
        assert checkpoints.steps() == [4, 8, 9, 10]


def test_saving_goes_on_while_the_arrays_are_reused(tmp_path):
    """The next step gives the saved arrays' memory away while they are being written."""
    prog = toy.program()
    state, _ = toy.run(prog, [toy.batch()])
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        for step in range(1, 6):
            wanted = jax.device_get(state)
            with jax.set_mesh(prog.mesh):
                checkpoints.save(step, state, {"step": step})
            state, _ = toy.run(prog, [toy.batch(seed=step)], state)
        checkpoints.wait()
        with jax.set_mesh(prog.mesh):
            restored, _ = checkpoints.restore(prog.abstract)
    assert toy.worst(restored, wanted)[0] == 0


@pytest.mark.slow
def test_peak_memory_while_saving_is_bounded(tmp_path):
    """One copy of the state may wait to be written, and what the writer holds besides stays below another."""
    code = f"""
import jax, pathlib, resource, sys
sys.path[:0] = [{str(pathlib.Path(__file__).parent)!r}]
import toy
from jaxllm.model.config import ModelConfig
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.config import CheckpointConfig
model = ModelConfig(d_model=512, n_layers=4, n_heads=8, vocab_size=8192)
prog = toy.program(model)
with jax.set_mesh(prog.mesh):
    state = prog.init()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    import orbax.checkpoint
    with Checkpoints(pathlib.Path({str(tmp_path)!r}), CheckpointConfig(keep=1)) as checkpoints:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for step in range(1, 4):
            checkpoints.save(step, state, {{"step": step}})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / size)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=runs.ROOT,
                          env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(runs.ROOT)})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 2.0
