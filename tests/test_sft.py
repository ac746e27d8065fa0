"""Instruction tuning: what is minimised, what is trained, and runs that stop, go on and say what is wrong."""

import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import signal
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import toy
import yaml

from jaxllm import cli, config
from jaxllm.align.sft_config import PretrainingMix, SFTConfig, SFTTrain
from jaxllm.align.sft_loss import held_out_loss, lengths, noisy, sft_loss
from jaxllm.data.chat import load_chat
from jaxllm.data.instruction_config import InstructionData, InstructionSource
from jaxllm.data.instruction_input import InstructionInput, prepare
from jaxllm.data.instruction_packing import empty_batch
from jaxllm.data.tokenizer import ByteTokenizer
from jaxllm.errors import UserError
from jaxllm.generate import chat
from jaxllm.generate.config import SampleConfig
from jaxllm.mesh import MeshConfig
from jaxllm.model.config import LoRAConfig
from jaxllm.model.heads import LanguageModel
from jaxllm.model.lora import adapters
from jaxllm.partition import batch_sharding, make_mesh
from jaxllm.train.state import structure
from jaxllm.train.step import Objective

MODEL = dataclasses.replace(toy.MODEL, vocab_size=272)
NO_LORA, LORA = LoRAConfig(), LoRAConfig(rank=2)


def chats(folder, n=40) -> str:
    """Writes conversations of some turns; returns the file."""
    pick = random.Random(0)
    rows = []
    for i in range(n):
        turns = range(pick.randrange(1, 3))
        rows.append({"messages": [m for t in turns for m in ({"role": "user", "content": f"{i} {t}?"},
                                                            {"role": "assistant", "content": "yes" * pick.randrange(1, 4)})]})
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = 16


def epoch(folder, *, pack: bool = True):
    """Returns the rows of an epoch, and padding, as one batch."""
    cfg = InstructionData(sources={"a": InstructionSource(path=chats(folder, 14))}, seq_len=32, template="own", validation=0, pack=pack)
    data = InstructionInput(prepare(cfg, ByteTokenizer()), cfg, 1, 0)
    batch, n = empty_batch(ROWS, 32, 0), data.epoch(0).n_rows
    for name, array in data.batch(range(n)).items():
        batch[name][:n] = array
    return batch


def objective(mesh=None):
    mesh = mesh or make_mesh(MeshConfig(data=1), jax.devices()[:1])
    graph, _ = structure(LanguageModel, MODEL, mesh)
    return Objective(graph, jnp.float32, 16, 0.0, 0.0, 0.0)


def loss_of(noise=0.0, lora=NO_LORA, mesh=None):
    return jax.jit(jax.value_and_grad(partial(sft_loss, objective(mesh), noise, lora), has_aux=True))


@pytest.fixture(scope="module")
def plain():
    """(parameters, None, batch, key) -> ((loss, (count, {})), gradients), compiled once."""
    return loss_of()


@pytest.fixture(scope="module")
def weights():
    prog = toy.program(MODEL)
    with jax.set_mesh(prog.mesh):
        return prog.init().params


# ---------------------------------------------------------------- what is minimised


def test_packed_is_unpacked(tmp_path, weights, plain):
    (packed, (n, _)), grads = plain(weights, None, epoch(tmp_path, pack=True), None)
    (alone, (m, _)), others = plain(weights, None, epoch(tmp_path, pack=False), None)
    assert n == m > 50 and abs(packed / n - alone / m) < 1e-6 * alone / m
    assert toy.worst(grads, others)[0] < 1e-5


def test_only_what_the_assistant_writes_is_learned(tmp_path, weights, plain):
    batch = epoch(tmp_path)
    (total, (n, _)), _ = plain(weights, None, batch, None)
    other = dict(batch, target_BT=np.where(batch["weight_BT"] > 0, batch["target_BT"], 17))
    assert plain(weights, None, other, None)[0][0] == total and n == batch["weight_BT"].sum() < 0.6 * (batch["doc_BT"] > 0).sum()


@pytest.mark.slow
def test_sharded_is_one_device(tmp_path, weights, plain):
    batch = epoch(tmp_path)
    (one, (n, _)), grads = plain(weights, None, batch, None)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, shapes = structure(LanguageModel, MODEL, mesh)
    placed = jax.tree.map(lambda a, s: jax.device_put(np.asarray(a), s.sharding), weights, shapes)
    with jax.set_mesh(mesh):
        (split, (m, _)), others = loss_of(mesh=mesh)(placed, None, jax.device_put(batch, batch_sharding(mesh)), None)
    assert abs(float(split) - float(one)) < 1e-5 * float(one) and float(m) == float(n)
    assert toy.worst(others, grads)[0] < 1e-5


# ---------------------------------------------------------------- adapters


def test_adapters_begin_as_the_base_and_leave_it_alone(tmp_path, weights, plain):
    batch, lora = epoch(tmp_path), adapters(weights, LORA, jax.random.key(0))
    loss = loss_of(lora=LORA)
    (total, _), grads = loss(lora, weights, batch, None)
    of_base = plain(weights, None, batch, None)[0][0]
    assert abs(total - of_base) < 1e-6 * of_base
    assert toy.leaves(grads).keys() == toy.leaves(lora).keys()
    moved = jax.tree.map(lambda x, g: x - 1e-4 * g, lora, grads)
    assert loss(moved, weights, batch, None)[0][0] < total - 1e-3


# ---------------------------------------------------------------- noise


def test_lengths_of_documents():
    doc_BT = jnp.array([[1, 1, 1, 2, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    pos_BT = jnp.array([[0, 1, 2, 0, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7]])
    found = lengths(pos_BT, doc_BT)
    assert found[0, :6].tolist() == [3, 3, 3, 1, 2, 2] and found[1].tolist() == [8] * 8


def test_noise_is_uniform_and_as_large_as_the_paper_says():
    x_BTD = jnp.ones((4, 8, 512))
    doc_BT, pos_BT = jnp.repeat(jnp.array([[1] * 6 + [2] * 2]), 4, 0), jnp.repeat(jnp.array([[*range(6), *range(2)]]), 4, 0)
    added_BTD = np.asarray(noisy(x_BTD, pos_BT, doc_BT, 5.0, jax.random.key(0)) - x_BTD)
    for part, length in ((slice(0, 6), 6), (slice(6, 8), 2)):
        most = 5.0 / np.sqrt(length * 512)
        noise = added_BTD[:, part]
        assert np.abs(noise).max() <= most * 1.0001 and np.abs(noise).max() > 0.99 * most
        assert abs(noise.mean()) < 0.03 * most and abs(noise.std() - most / np.sqrt(3)) < 0.02 * most
    assert not np.array_equal(added_BTD[0], added_BTD[1])


def test_noise_of_nothing_is_the_plain_loss_and_evaluation_has_none(tmp_path, weights, plain):
    batch, key = epoch(tmp_path), jax.random.key(0)
    of_none = plain(weights, None, batch, None)[0][0]
    little, much = (jax.jit(partial(sft_loss, objective(), noise, NO_LORA)) for noise in (1e-9, 50.0))
    assert abs(little(weights, None, batch, key)[0] - of_none) < 1e-5 * of_none
    noise = [much(weights, None, batch, jax.random.key(i))[0] for i in range(2)]
    assert noise[0] != noise[1] and abs(noise[0] - of_none) > 1e-4 * of_none
    held_out = jax.jit(partial(held_out_loss, objective(), NO_LORA))(weights, None, batch)
    assert abs(held_out[0] - of_none) < 1e-6 * of_none and held_out[1] == batch["weight_BT"].sum()


def test_no_noise_without_a_key(tmp_path, weights, plain):
    batch = epoch(tmp_path)
    of_none = plain(weights, None, batch, None)[0][0]
    assert abs(jax.jit(partial(sft_loss, objective(), 50.0, NO_LORA))(weights, None, batch, None)[0] - of_none) < 1e-6 * of_none


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a pretrained model in `run`, and the config of an sft run of 24 steps that starts from it."""
    folder = tmp_path_factory.mktemp("base")
    code, text = command("pretrain", runs.config(folder))
    assert code == 0, text
    tree = {
        "run": {"dir": str(folder / "sft")}, "base": {"run": str(folder / "run")},
        "data": {"sources": {"chats": {"path": chats(folder)}}, "template": "own", "seq_len": 64, "validation": 0.2},
        "train": {"steps": 24, "batch_size": 8, "eval_every": 8, "sample_every": 24, "sample_prompts": ["1 0?"],
                  "sample": {"max_tokens": 6}},
        "optim": {"lr": 0.01, "schedule": "constant"}, "checkpoint": {"every": 4}, "log": {"every": 1, "tensorboard": False},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(tree))
    return folder


def command(*words) -> tuple[int, str]:
    """Runs a command line in this process, on its eight devices; returns (exit code, what it said)."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = cli.main([str(word) for word in words])
    return code, said.getvalue()


def tune(base, folder, *flags):
    return command("sft", base / "sft.yaml", f"--run.dir={folder}", *flags)


def arrays(folder) -> dict[str, str]:
    """Returns a SHA-256 of every array of a run."""
    assert command("inspect", folder, "--digest", f"--json={folder}/digest.json")[0] == 0
    return json.loads((folder / "digest.json").read_text())["digest"]


def losses(folder) -> list[float]:
    return [line["loss"] for line in runs.lines(folder / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def straight(base):
    code, text = tune(base, base / "sft")
    assert code == 0, text
    return base / "sft", text


@pytest.mark.slow
def test_a_run_learns_and_says_what_it_does(straight):
    folder, text = straight
    assert losses(folder)[-1] < 0.6 * losses(folder)[0]
    for said in ("template own", "data: an epoch: ", "held-out at step 24", "finished: step 24"):
        assert said in text
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["verb"] == "sft" and saved["model"]["vocab_size"] == 272 and (folder / "report.html").exists()
    assert runs.lines(folder / "samples.jsonl")[0]["prompt"] == "1 0?"


@pytest.mark.slow
def test_stopped_and_gone_on_with_is_never_stopped(base, straight, tmp_path):
    """Parameters, moments, order and every logged loss; whole weights do not need the base once the run has begun."""
    folder, stopped = straight[0], tmp_path / "sft"
    assert tune(base, stopped, "--train.steps=10")[0] == 0
    shutil.move(base / "run", base / "moved")
    try:
        code, text = tune(base, stopped)
    finally:
        shutil.move(base / "moved", base / "run")
    assert code == 0, text
    assert arrays(folder) == arrays(stopped)
    at_end_of_first = [line for line in runs.lines(stopped / "metrics.jsonl", *runs.NUMBERS) if not (line["step"] == 10 and "eval_loss" in line)]
    assert runs.lines(folder / "metrics.jsonl", *runs.NUMBERS) == at_end_of_first


@pytest.mark.slow
def test_killed_and_run_again_is_never_killed(base, tmp_path):
    """In processes of their own, at ends that a kill and a signal find."""
    def started(folder):
        return runs.start("sft", base / "sft.yaml", f"--run.dir={folder}", "--train.sample_every=0", devices=8)

    folder, killed = tmp_path / "straight", tmp_path / "killed"
    code, text = runs.finish(started(folder))
    assert code == 0, text
    for end in (signal.SIGKILL, signal.SIGTERM):
        seen, process = len(losses(killed)) if (killed / "metrics.jsonl").exists() else 0, started(killed)
        runs.wait_for(lambda n=seen: (killed / "metrics.jsonl").exists() and len((killed / "metrics.jsonl").read_text().split("\n")) > n + 4)
        os.killpg(process.pid, end)
        process.communicate()
    code, text = runs.finish(started(killed))
    assert code == 0, text
    assert arrays(folder) == arrays(killed)
    assert runs.lines(folder / "metrics.jsonl", *runs.NUMBERS) == runs.lines(killed / "metrics.jsonl", *runs.NUMBERS)


@pytest.mark.slow
def test_adapters_noise_and_pretraining_rows_in_a_run(base, tmp_path):
    flags = ["--lora.rank=2", "--train.noise=5", "--pretraining.share=0.25", f"--pretraining.sources.text.path={base / 'corpus.jsonl'}",
             f"--pretraining.cache={tmp_path / 'cache'}", "--train.epochs=2", "--train.steps=null"]
    code, text = tune(base, tmp_path / "lora", *flags)
    assert code == 0, text
    for said in ("adapters of rank 2: ", "25.0% of the rows are of pretraining", "finished: step"):
        assert said in text
    code, text = tune(base, tmp_path / "lora", *flags)
    assert code == 0 and "finished: step" in text and "raise train.epochs" in text
    code, again = tune(base, tmp_path / "lora", *[f for f in flags if "epochs" not in f], "--train.epochs=3")
    assert code == 0 and "finished: step" in again
    trained = {name for name in arrays(tmp_path / "lora") if name.startswith("params")}
    assert trained and all(name.endswith((".a", ".b")) for name in trained)
    code, text = command("generate", tmp_path / "lora", "--prompt=a", "--sample.max_tokens=4")
    assert code == 0, text


@pytest.mark.slow
def test_generate_speaks_the_template(straight, capsys):
    folder, _ = straight
    flags = ["--sample.max_tokens=12", "--sample.temperature=0"]
    assert cli.main(["generate", str(folder), "--prompt=1 0?", *flags, "--json=-"]) == 0
    [made] = json.loads(capsys.readouterr().out)["continuations"]
    end = ByteTokenizer().special_id("<|end|>")
    assert made["tokens"][-1] == end and made["finish"] == "eos" and end not in made["tokens"][:-1]  # it learned to end its turn
    assert made["text"].replace("yes", "") == ""
    assert cli.main(["generate", str(folder), "--prompt=1 0?", *flags, "--chat=false", "--json=-"]) == 0
    assert json.loads(capsys.readouterr().out)["continuations"][0]["tokens"] != made["tokens"]


class Yes:
    """An engine that answers "yes", and keeps what it was asked."""

    tokenizer, cfg = ByteTokenizer(), types.SimpleNamespace(max_seq_len=64)

    def __init__(self):
        self.asked = []

    def generate(self, prompts, sample, on_text):
        self.asked.append(self.tokenizer.decode(prompts[0]))
        on_text(0, "yes")


def test_a_conversation_in_the_terminal(monkeypatch, capsys):
    said = iter(["1 0?", "/system Be kind.", "2 0?", *["and now a long one?"] * 4, "/bogus", "x" * 80, "/set temperature=0", "/reset",
                 "1 0?", "/system", "bye"])

    def say(prompt=""):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    engine = Yes()
    monkeypatch.setattr("builtins.input", say)
    chat.talk(engine, load_chat("own", engine.tokenizer), SampleConfig(max_tokens=12))
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "yes" and "unknown /bogus" in out and any("/system TEXT" in line for line in out)
    assert "the message has 94 tokens with its template; the model reads fewer than 64" in out
    long = "and now a long one?"
    assert engine.asked == [
        "1 0?", "Be kind.2 0?", f"Be kind.2 0?yes{long}",
        *[f"Be kind.{long}"] * 3,  # the first turns went, the system's message stayed
        "Be kind.1 0?", "bye"]


@pytest.mark.slow
def test_a_base_model_has_no_template(base, capsys):
    assert cli.main(["generate", str(base / "run"), "--prompt=a", "--chat=true"]) == 2
    assert "chat=true: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_template_that_is_a_file_is_kept_in_the_run(base, tmp_path):
    pytest.importorskip("jinja2")
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
                    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
    flags = [f"--data.template={file}", "--train.sample_every=0"]
    code, text = tune(base, tmp_path / "sft", *flags, "--train.steps=2")
    assert code == 0, text
    file.unlink()
    code, text = tune(base, tmp_path / "sft", *flags, "--train.steps=4")
    assert code == 0 and "finished: step 4" in text, text
    code, text = command("generate", tmp_path / "sft", "--prompt=a", "--sample.max_tokens=4")
    assert code == 0, text


def told(base, *flags, folder=None):
    from jaxllm.align import sft

    cfg = config.load(SFTConfig, str(base / "sft.yaml"), [f"run.dir={folder or base / 'never'}", *flags])
    with pytest.raises(UserError) as e:
        sft.main(cfg)
    return str(e.value)


@pytest.mark.slow
def test_mistakes_are_told_before_the_folder_changes(base, straight, tmp_path):
    (tmp_path / "none").mkdir()
    assert told(base, "base.run=") == "base.run is not set: give the run folder to start from, e.g. --base.run=runs/demo"
    assert told(base, f"base.run={tmp_path / 'none'}").startswith(f"{tmp_path / 'none'}: not a run folder (no config.yaml)")
    assert told(base, "data.seq_len=128") == "data.seq_len=128 is longer than the base model's max_seq_len=64"
    assert told(base, "data.template=chatml").startswith("template chatml: tokenizer bytes has no token '<|im_start|>'")
    assert told(base, "train.sample_prompts=[aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa]").startswith(
        "train.sample_prompts: prompt 1 has 75 tokens in template own; should be fewer than the base model's max_seq_len=64")
    assert told(base, "train.batch_size=4", folder=base / "sft").startswith(
        f"{base / 'sft'} holds a run with other settings (train.batch_size: 8 -> 4)")
    assert told(base, folder=base / "run").startswith(f"{base / 'run'} holds a run of jaxllm pretrain: give another run.dir")
    assert told(base, "mesh.context=2").startswith("mesh.context=2: alignment uses data, fsdp, expert and tensor")
    assert not (base / "never" / "config.yaml").exists()


@pytest.mark.parametrize("make, message", [
    (lambda: SFTTrain(noise=-1), "train.noise=-1: should be 0 or more"),
    (lambda: PretrainingMix(share=1), r"pretraining.share=1: should be in \[0, 1\)"),
    (lambda: PretrainingMix(share=0.1), "pretraining.share=0.1: needs pretraining.sources"),
    (lambda: SFTTrain(steps=1, epochs=1), "give one of train.steps and train.epochs"),
])
def test_mistakes_in_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_no_sources():
    from jaxllm.align import sft

    with pytest.raises(UserError, match=r"data\.sources is empty: give at least one, e\.g\. --data\.sources\.chat\.path=chat\.jsonl"):
        sft.main(SFTConfig())
