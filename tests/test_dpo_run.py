"""`jaxllm dpo`: pairs out of groups, the reference read once, steps that do not depend on how a batch is cut, whole runs."""

import dataclasses
import json
import random
import shutil

import jax
import numpy as np
import pytest
import runs
import toy
import yaml
from flax import nnx

from jaxllm import cli, config
from jaxllm.align import dpo_run, reference
from jaxllm.align.config import BaseConfig, TuneConfig
from jaxllm.align.dpo_config import DPOVerb
from jaxllm.align.dpo_loss import Reading, logps
from jaxllm.align.dpo_program import DPOProgram
from jaxllm.align.reward import encoded
from jaxllm.align.start import load_weights
from jaxllm.data import preference
from jaxllm.data.chat import load_chat
from jaxllm.data.config import DataConfig
from jaxllm.data.pairs import next_with_another_prompt, ordered, pairs_of
from jaxllm.data.preference import Groups, TokenGroup
from jaxllm.data.preference_config import PreferenceData, PreferenceSource
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.mesh import MeshConfig
from jaxllm.model.config import LoRAConfig, ModelConfig
from jaxllm.partition import make_mesh, row_sharding
from jaxllm.train.checkpoint import Checkpoints, load_model
from jaxllm.train.config import CheckpointConfig, OptimConfig, PretrainConfig, RunConfig
from jaxllm.train.config import TrainConfig as PretrainTrain
from jaxllm.train.run_folder import begin

LOSSES = ("dpo", "ipo", "kto", "orpo", "simpo")
ROWS, T = 8, 24
MODEL = ModelConfig(d_model=16, n_layers=1, n_heads=2, d_ff=32, vocab_size=load_tokenizer("bytes").vocab_size, max_seq_len=64)


# ---------------------------------------------------------------- pairs


def groups(*of) -> Groups:
    made = Groups(16, 0)
    made.add_source([TokenGroup(np.int32(prompt), [np.int32([10 + r, 1]) for r in rank], list(rank), 0, 0.0) for prompt, rank in of])
    return made


@pytest.mark.parametrize("rank,which,expected", [
    ([2, 1, 3], "all", [(0, 2), (1, 0), (1, 2)]), ([1, 1, 2], "all", [(0, 2), (1, 2)]),
    ([2, 1, 3, 3], "best_worst", [(1, 2)]), ([1, 1], "all", []), ([1, 1], "best_worst", [])])
def test_pairs_are_of_different_ranks_the_better_one_first(rank, which, expected):
    assert sorted(ordered(rank, which)) == expected


def test_every_answer_is_read_once_and_found_again():
    found = preference.Preferences(groups(([5, 6], (2, 1, 3)), ([7], (1, 2))), groups(), groups(), {}, [1.0])
    train = pairs_of(found, "all", with_others=False).train
    assert len(train.answers) == 5 and len(train) == 4 and train.sizes == [4]
    for pair, places in zip(train.of, train.answer_N2, strict=True):
        for answer, place in zip(pair.answers, places, strict=True):
            assert np.array_equal(train.answers.of[place].answers[0], answer)
            assert np.array_equal(train.answers.of[place].prompt, pair.prompt)


def test_the_other_prompt_is_the_next_one_that_differs():
    pairs = pairs_of(preference.Preferences(groups(([1], (1, 2)), ([1], (1, 2)), ([2], (1, 2)), ([1], (1, 2))), groups(), groups(), {},
                                            [1.0]), "all", with_others=True).train
    assert next_with_another_prompt(pairs) == [2, 2, 3, 2]  # the last one is followed by the first ones, which have its prompt
    batch = pairs.gather(np.array([0, -1]), 2)
    assert batch["other_token_BKT"][0, 0, 0] == 1 and list(batch["real_B"]) == [1, 0] and not batch["other_prompt_BK"][1].any()


# ---------------------------------------------------------------- what is compiled


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The run folder of an untrained model on the byte tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "run"
    folder.mkdir()
    cfg = PretrainConfig(run=RunConfig(dir=str(folder)), model=MODEL, train=PretrainTrain(steps=24), mesh=MeshConfig(data=1),
                         data=DataConfig(seq_len=32))
    program = toy.program(MODEL)
    with Checkpoints(folder, CheckpointConfig()) as checkpoints:
        checkpoints.save(24, program.init(), {"step": 24, "made_of": {}})
    begin(cfg, config.to_dict(cfg))
    return folder


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    rng, path = random.Random(0), tmp_path_factory.mktemp("data") / "ranked.jsonl"
    rows = [{"prompt": f"{i}", "answers": [" ".join(rng.choices(runs.WORDS, k=rng.randint(1, 3))) + f"{k}" for k in range(3)],
             "rank": rng.sample([1, 2, 3], 3)} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(base, ranked, **groups) -> DPOVerb:
    made = {
        "base": BaseConfig(run=str(base), step=24), "model": MODEL,
        "data": PreferenceData(sources={"s": PreferenceSource(path=str(ranked))}, seq_len=T, validation=0.25, tokenizer="bytes",
                               template="plain"),
        "train": TuneConfig(batch_size=ROWS, steps=4, loss_chunk=10), "mesh": MeshConfig(data=1),
        # IPO's loss is a square: its gradients are hundreds of times the others'
        "optim": OptimConfig(name="sgd", lr=2e-4 if groups.get("loss") == "ipo" else 0.1, b1=0.0, schedule="constant",
                             weight_decay=0.0, clip=0.0)}
    return DPOVerb(**made | groups)


def pairs_for(cfg: DPOVerb):
    tokenizer = load_tokenizer("bytes")
    chat = load_chat("plain", tokenizer)
    found = preference.read(cfg.data, lambda prompt, answer: encoded(chat, prompt, answer), tokenizer.pad_id)
    return pairs_of(found, cfg.pairs, with_others=cfg.loss == "kto")


def referred(found, cfg: DPOVerb, folder, mesh, *, begun=False):
    reference.with_references(found, folder, cfg.base, mesh, dtype=np.dtype(np.float32), chunk=10, rows=2 * ROWS, begun=begun)
    return found


def one_step(cfg: DPOVerb, devices: int = 1, **axes):
    """Returns (state, metrics, evaluation) after a step on a batch whose references are not the policy's."""
    mesh = make_mesh(MeshConfig(**({"data": 1} | axes)), jax.devices()[:devices])
    found = pairs_for(cfg)
    for split, seed in ((found.train, 0), (found.validation, 1)):
        rng = np.random.default_rng(seed)
        split.ref_logp_N2 = rng.normal(-60, 5, (len(split), 2)).astype(np.float32)
        split.ref_other_N2 = rng.normal(-90, 5, (len(split), 2)).astype(np.float32)
    program = DPOProgram(cfg, mesh, np.dtype(np.float32), 4)
    batch = next(preference.PreferenceInput(found, ROWS, 0).batches())
    with jax.set_mesh(mesh):
        state, metrics = program.steps.train_step(program.steps.init(), jax.device_put(batch, row_sharding(mesh)))
        return state, {name: float(x) for name, x in metrics.items() if x.ndim == 0}, program.evaluate(found.validation, 0, state.params)


def literal_logp(graph, params, prompt, answer) -> float:
    """Returns log p of an answer behind its prompt, without padding, token by token."""
    token_1T = np.concatenate([prompt, answer])[None]
    model = nnx.merge(graph, params)
    logit_TV = np.asarray(model.hidden(token_1T, np.arange(token_1T.shape[1], dtype=np.int32)[None]) @ model.head_DV(), np.float64)[0]
    return sum(logit_TV[t - 1, token_1T[0, t]] - np.log(np.exp(logit_TV[t - 1]).sum()) for t in range(len(prompt), token_1T.shape[1]))


@pytest.fixture(scope="module")
def on_one_device(base, ranked):
    made = {}
    return lambda loss: made.setdefault(loss, one_step(settings(base, ranked, loss=loss)))


@pytest.mark.parametrize("loss", [loss if loss in ("dpo", "kto") else pytest.param(loss, marks=pytest.mark.slow) for loss in LOSSES])
def test_micro_batches_change_nothing(loss, base, ranked, on_one_device):
    """KTO's baseline is one of the whole batch, and of all held-out pairs: a part's own would make another step."""
    cfg = settings(base, ranked, loss=loss)
    state, metrics, held_out = one_step(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, micro_batches=4)))
    expected, expected_metrics, expected_held_out = on_one_device(loss)
    worst, where = toy.worst(state.params, expected.params)
    assert worst < 1e-6, where
    assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-5) and metrics["grad_norm"] > 1e-6
    assert held_out == pytest.approx(expected_held_out, rel=1e-5, abs=1e-5) and held_out
    assert loss != "kto" or metrics["kl"] > 1


def test_a_step_on_a_mesh_is_that_of_one_device(base, ranked, on_one_device):
    state, metrics, held_out = one_step(settings(base, ranked), 8, data=2, fsdp=2, tensor=2)
    expected, expected_metrics, expected_held_out = on_one_device("dpo")
    worst, where = toy.worst(state.params, expected.params)
    assert worst < 1e-5, where
    assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-5)
    assert held_out == pytest.approx(expected_held_out, rel=1e-5, abs=1e-5)


def test_the_reference_is_read_once_and_is_what_the_base_says(base, ranked, tmp_path, monkeypatch, capsys):
    cfg = settings(base, ranked, loss="kto")
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    found = referred(pairs_for(cfg), cfg, tmp_path, mesh)
    graph, params = load_weights(cfg.base, mesh)
    for split in (found.train, found.validation):
        batch = split.gather(np.arange(len(split)), 2)
        for prefix, name in (("", "ref_logp_BK"), ("other_", "ref_other_BK")):
            arrays = [batch[f"{prefix}{n}"] for n in ("token_BKT", "length_BK", "prompt_BK")]
            now_BK, _ = logps(Reading(graph, np.dtype(np.float32), 10), params, None, *arrays)
            np.testing.assert_allclose(batch[name], now_BK, rtol=1e-5)
    pair = found.train.of[0]
    assert found.train.ref_logp_N2[0, 1] == pytest.approx(literal_logp(graph, params, pair.prompt, pair.answers[1]), rel=1e-5)
    kept = found.train.ref_logp_N2
    measured = reference.measured
    monkeypatch.setattr(reference, "measured", lambda *a, **k: pytest.fail("measured again"))
    assert np.array_equal(referred(pairs_for(cfg), cfg, tmp_path, mesh).train.ref_logp_N2, kept)
    calls = []
    monkeypatch.setattr(reference, "measured", lambda *a, **k: calls.append(1) or measured(*a, **k))
    (tmp_path / reference.FILE).write_bytes((tmp_path / reference.FILE).read_bytes()[:-40])
    assert np.array_equal(referred(pairs_for(cfg), cfg, tmp_path, mesh).train.ref_logp_N2, kept) and len(calls) == 1
    other = dataclasses.replace(cfg, pairs="best_worst")
    assert len(referred(pairs_for(other), other, tmp_path, mesh).train.ref_logp_N2) < len(kept) and len(calls) == 2
    monkeypatch.setattr(reference, "weights_digest", lambda base: "another")
    with pytest.raises(Exception, match="not those that this run began with"):
        referred(pairs_for(other), other, tmp_path, mesh, begun=True)
    referred(pairs_for(other), other, tmp_path, mesh)
    assert len(calls) == 3 and "is of other weights" in capsys.readouterr().err


# ---------------------------------------------------------------- the command


def written(folder, base, ranked, /, **groups):
    tree = {
        "run": {"dir": str(folder / "run")}, "base": {"run": str(base)}, "mesh": {"data": 1},
        "data": {"sources": {"s": {"path": str(ranked)}}, "seq_len": T, "validation": 0.25},
        "train": {"steps": 8, "batch_size": ROWS, "eval_every": 4, "sample_every": 4, "sample_prompts": ["1"],
                  "sample": {"max_tokens": 4}},
        "optim": {"lr": 0.01, "schedule": "constant"}, "checkpoint": {"every": 2}, "log": {"every": 1, "tensorboard": False}}
    for name, keys in groups.items():
        tree[name] = tree.get(name, {}) | keys if isinstance(keys, dict) else keys
    path = folder / "dpo.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def refused(capsys, path) -> str:
    assert cli.main(["dpo", str(path)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("groups,expected", [
    ({"base": {"run": ""}}, "base.run is not set"),
    ({"base": {"run": "nowhere"}}, "nowhere: not a run folder"),
    ({"dpo": {"beta": 0}}, "dpo.beta=0"), ({"dpo": {"label_smoothing": 0.5}}, "label_smoothing=0.5"), ({"ipo": {"tau": -1}}, "ipo.tau=-1"),
    ({"kto": {"desirable_weight": 0}}, "kto.desirable_weight=0"), ({"orpo": {"weight": 0}}, "orpo.weight=0"),
    ({"simpo": {"gamma": -1}}, "simpo.gamma=-1"), ({"loss": "rdpo"}, "loss"), ({"pairs": "some"}, "pairs"),
    ({"loss": "orpo", "reference": {"run": "x"}}, "has no reference"), ({"data": {"seq_len": 100}}, "longer than the base model's"),
    ({"train": {"sample_prompts": ["x" * 80]}}, "prompt 1 has")])
def test_a_mistake_is_told_in_a_line(groups, expected, base, ranked, tmp_path, capsys):
    assert expected in refused(capsys, written(tmp_path, base, ranked, **groups))


def test_pairs_prompts_and_references_that_cannot_be_used_are_told(base, ranked, tmp_path, capsys, monkeypatch):
    tied, one = tmp_path / "tied.jsonl", tmp_path / "one.jsonl"
    tied.write_text('{"prompt": "1", "answers": ["a", "b"], "rank": [1, 1]}\n')
    one.write_text('{"prompt": "1", "chosen": "a", "rejected": "b"}\n' * 3)
    where = {"sources": {"s": {"path": str(tied)}}, "validation": 0.0}
    assert "no group of ranked answers is left" in refused(capsys, written(tmp_path, base, ranked, data=where))
    where["sources"]["s"]["path"] = str(one)
    assert "has the same prompt" in refused(capsys, written(tmp_path, base, ranked, loss="kto", data=where))
    wider = shutil.copytree(base, tmp_path / "wider")
    (wider / "config.yaml").write_text((base / "config.yaml").read_text().replace("d_model: 16", "d_model: 32"))
    said = refused(capsys, written(tmp_path, base, ranked, reference={"run": str(wider)}))
    assert "d_model=32" in said and "has 16" in said
    monkeypatch.setattr(dpo_run, "tokenizer_of", lambda folder: dataclasses.make_dataclass("Other", [("hash", str, "else")])())
    assert "is not that of this run" in refused(capsys, written(tmp_path, base, ranked))
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.mark.slow
@pytest.mark.parametrize("loss,more", [("dpo", {"lora": {"rank": 2}}), ("ipo", {}), ("kto", {}), ("orpo", {}), ("simpo", {"lora": {"rank": 2}})])
def test_a_whole_run_learns_its_pairs_and_its_model_writes(loss, more, base, ranked, tmp_path):
    code, text = runs.finish(runs.start("dpo", written(tmp_path, base, ranked, loss=loss, **more)), timeout=600)
    assert code == 0, text
    lines = [line for line in runs.lines(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["accuracy"] > 0.6
    assert runs.lines(tmp_path / "run/metrics.jsonl")[-1]["eval_accuracy"] >= 0
    if loss == "dpo":
        assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-5) and lines[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert (tmp_path / "run" / reference.FILE).exists() == (loss in ("dpo", "ipo", "kto"))
    assert len(runs.lines(tmp_path / "run/samples.jsonl")) == 2
    if "lora" in more:
        found, _, params, step = load_model(tmp_path / "run")
        before, after = toy.leaves(load_model(base)[2]), toy.leaves(params)
        assert step == 8 and found.lora.rank == 2 and found.base_step == 24
        changed = {name.split(".")[-1] for name in before if not np.array_equal(before[name], after[name])}
        assert changed == {"qkv_DKGH", "out_NHD", "gate_DF", "up_DF", "down_FD"}
    for words in (("generate", "--prompt=1", "--sample.max_tokens=4"), ("inspect",), ("report",)):
        code, text = runs.finish(runs.start(words[0], tmp_path / "run", *words[1:]), timeout=600)
        assert code == 0, text


@pytest.mark.slow
def test_killed_anywhere_is_never_killed(base, ranked, tmp_path):
    """SIGKILL while the reference is read, in steps and in saves: weights, moments and logged numbers are as if not."""
    unhurt, hurt = tmp_path / "a", tmp_path / "b"
    unhurt.mkdir()
    hurt.mkdir()
    how = {"loss": "kto", "lora": LoRAConfig(rank=2).__dict__, "train": {"steps": 24}}
    code, text = runs.finish(runs.start("dpo", written(unhurt, base, ranked, **how)), timeout=600)
    assert code == 0, text
    path, rng = written(hurt, base, ranked, **how), np.random.default_rng(1)
    for _ in range(3):
        process = runs.start("dpo", path)
        runs.wait_for(lambda: (hurt / "run/metrics.jsonl").exists() or process.poll() is not None, timeout=600)  # noqa: B023
        runs.kill(process, after=float(rng.uniform(0, 2)))
        if process.returncode == 0:
            break
    code, text = runs.finish(runs.start("dpo", path), timeout=600)
    assert code == 0, text
    assert runs.digest(hurt / "run") == runs.digest(unhurt / "run")
    numbers = (*runs.NUMBERS, "accuracy", "margin", "kl", "eval_accuracy", "eval_kl")
    assert runs.lines(hurt / "run/metrics.jsonl", *numbers) == runs.lines(unhurt / "run/metrics.jsonl", *numbers)
