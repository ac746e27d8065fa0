"""RLHF as whole runs and as compiled steps: what must not depend on kills, meshes, or how a batch is cut."""

import json

import jax
import numpy as np
import pytest
import runs
import toy
import yaml
from flax import nnx

from jaxllm.align.algorithms import algorithm
from jaxllm.align.rl_program import build
from jaxllm.align.rlhf import trimmed
from jaxllm.align.rlhf_config import (
    ALGORITHMS,
    KLConfig,
    PPOConfig,
    RLDataConfig,
    RLHFConfig,
    RLTrainConfig,
    RolloutConfig,
    ScoreConfig,
)
from jaxllm.align.update import Models, Reading, places
from jaxllm.data.preference_config import PromptData
from jaxllm.mesh import MeshConfig
from jaxllm.model.formulation import REFERENCE
from jaxllm.model.heads import LanguageModel, ScoreModel
from jaxllm.partition import make_mesh, row_sharding
from jaxllm.train.config import OptimConfig
from jaxllm.train.log import RunLog
from jaxllm.train.optim import make_optimizer
from jaxllm.train.state import structure

P, R, B = 6, 10, 16
EACH = [name if name in ("ppo", "grpo") else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS]


def settings(name: str, **groups) -> RLHFConfig:
    samples = 1 if name == "ppo" else 4
    base = {
        "rollout": RolloutConfig(prompts=B // samples, samples=samples, response_len=R), "prompts": PromptData(prompt_len=P),
        "data": RLDataConfig(seq_len=P + R), "train": RLTrainConfig(minibatches=1 if name == "rloo" else 2), "kl": KLConfig(coef=0.1),
        "ppo": PPOConfig(whiten_rewards=True, entropy_coef=0.01), "optim": OptimConfig(name="sgd", lr=0.1, b1=0.0, schedule="constant", weight_decay=0.0, clip=0.0),
    }
    return RLHFConfig(algorithm=name, **base | groups)


def responses(seed: int = 0) -> dict[str, np.ndarray]:
    """Returns rows with prompts and responses of all lengths, as a sampler gives them, with scores."""
    rng = np.random.default_rng(seed)
    first_B, length_B = rng.integers(0, P - 1, B).astype(np.int32), rng.integers(1, R + 1, B).astype(np.int32)
    action_BR = (np.arange(R)[None] < length_B[:, None]).astype(np.float32)
    return {"token_BS": rng.integers(3, toy.MODEL.vocab_size - 2, (B, P + R)).astype(np.int32), "first_B": first_B, "length_B": length_B,
            "action_BR": action_BR, "logp_BR": (-4 + rng.normal(size=(B, R))).astype(np.float32) * action_BR,
            "ended_B": length_B < R, "score_B": rng.integers(0, 2, B).astype(np.float32)}


def program_of(cfg: RLHFConfig, devices: int = 1, *, model=toy.MODEL, **axes):
    mesh = make_mesh(MeshConfig(**({"data": 1} | axes)), jax.devices()[:devices])
    graph, abstract = structure(LanguageModel, model, mesh)

    def drawn(kind, abstract):
        made = nnx.state(kind(model, REFERENCE, rngs=nnx.Rngs(3)), nnx.Param)
        return jax.tree.map(lambda x, a: jax.device_put(np.asarray(x), a.sharding), made, abstract)

    start = {"policy": drawn(LanguageModel, abstract)}
    optimizers, critic_graph = {"policy": make_optimizer(cfg.optim, 10)}, None
    if cfg.algorithm == "ppo":
        critic_graph, abstract = structure(ScoreModel, model, mesh)
        start["critic"] = drawn(ScoreModel, abstract)
        optimizers["critic"] = make_optimizer(cfg.optim, 10)
    reading = Reading(np.dtype(np.float32), P, model.vocab_size - 2, cfg.rollout.temperature, 128, model.moe if model.moe.experts else None)
    return build(cfg, Models(graph, critic_graph), start, reading, algorithm(cfg), optimizers, mesh)


def one_iteration(cfg: RLHFConfig, devices: int = 1, **axes):
    """Returns (state, metrics of reading, metrics of the two updates)."""
    prog = program_of(cfg, devices, **axes)
    with jax.set_mesh(prog.mesh):
        state = prog.init()
        batch, moments, told = prog.read(state, jax.tree.map(lambda x: x * 1.05, state.params), jax.device_put(responses(), row_sharding(prog.mesh)))
        found = []
        for row_B in np.arange(B, dtype=np.int32).reshape(cfg.train.minibatches, -1):
            state, metrics = prog.update(state, batch, row_B, None)
            found.append({k: float(v) for k, v in metrics.items()})
        return prog.finish(state, told["kl"], moments), {k: float(v) for k, v in told.items()}, found


@pytest.fixture(scope="module")
def on_one_device():
    made = {}
    return lambda name: made.setdefault(name, one_iteration(settings(name)))


@pytest.mark.parametrize("name", ["ppo", "grpo"])
@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}], ids=["data x fsdp x tensor"])
def test_an_iteration_on_a_mesh_is_that_of_one_device(name, axes, on_one_device):
    state, told, found = one_iteration(settings(name), 8, **axes)
    expected, expected_told, expected_found = on_one_device(name)
    worst, where = toy.worst(state.params, expected.params)
    assert worst < 1e-5, where
    assert told == pytest.approx(expected_told, rel=1e-4, abs=1e-5)
    for one, other in zip(found, expected_found, strict=True):
        assert one["policy_loss"] == pytest.approx(other["policy_loss"], rel=1e-5, abs=1e-6)
    if name == "ppo":
        assert toy.worst(state.opt_state["critic"]["params"], expected.opt_state["critic"]["params"])[0] < 1e-5


@pytest.mark.parametrize("name", EACH)
def test_micro_batches_change_nothing(name, on_one_device):
    """Losses are sums and counts: responses of other lengths in each part would make a mean of means another step."""
    cfg = settings(name, train=RLTrainConfig(minibatches=1 if name == "rloo" else 2, micro_batches=4))
    state, _, found = one_iteration(cfg)
    expected, _, expected_found = on_one_device(name)
    worst, where = toy.worst(state.params, expected.params)
    assert worst < 1e-6, where
    for one, other in zip(found, expected_found, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", EACH)
def test_every_algorithm_moves_the_policy(name, on_one_device):
    state, _, found = on_one_device(name)
    before = program_of(settings(name)).init().params
    assert toy.worst(state.params, before)[0] > 1e-5 and all(np.isfinite(list(m.values())).all() for m in found)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_read_is_the_softmax_at_the_sampling_temperature_of_the_right_model(temperature):
    """The reference's log-probabilities against a pass over each row alone, without padding, softmax written out."""
    cfg, given = settings("ppo", rollout=RolloutConfig(prompts=B, response_len=R, temperature=temperature)), responses()
    prog = program_of(cfg)
    graph = structure(LanguageModel, toy.MODEL, prog.mesh)[0]
    with jax.set_mesh(prog.mesh):
        state = prog.init()
        reference = jax.tree.map(lambda x: x * 1.05, state.params)
        batch, _, told = prog.read(state, reference, given)
        model, kls = nnx.merge(graph, reference), []
        for b in range(4):
            first, n = int(given["first_B"][b]), int(given["length_B"][b])
            row = given["token_BS"][b : b + 1, first : P + n]
            x_TD = np.asarray(model.hidden(row, np.arange(row.shape[1], dtype=np.int32)[None]))[0]
            logit_TV = (x_TD @ np.asarray(model.head_DV()))[:, : toy.MODEL.vocab_size - 2] / temperature
            logp_TV = logit_TV - np.log(np.exp(logit_TV).sum(axis=1, keepdims=True))
            expected = [logp_TV[P - first - 1 + t, row[0, P - first + t]] for t in range(n)]
            np.testing.assert_allclose(batch["ref_logp_BR"][b, :n], expected, atol=2e-5)
            kls.append(given["logp_BR"][b, :n].sum() - sum(expected))
    every = given["logp_BR"].sum(axis=1) - (np.asarray(batch["ref_logp_BR"]) * given["action_BR"]).sum(axis=1)
    assert float(told["kl"]) == pytest.approx(every.mean(), rel=1e-4) and every[:4] == pytest.approx(kls, rel=1e-4)


def test_positions_count_from_a_prompts_first_token_and_padding_is_no_document():
    pos_BS, doc_BS = places({"first_B": np.array([0, 4]), "length_B": np.array([2, 1])}, P + 3, P)
    np.testing.assert_array_equal(pos_BS, [[0, 1, 2, 3, 4, 5, 6, 7, 0], [0, 0, 0, 0, 0, 1, 2, 0, 0]])
    np.testing.assert_array_equal(doc_BS, [[1, 1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 0, 0]])


def test_slots_that_no_response_fills_are_left_out_and_change_nothing():
    cfg, given = settings("ppo"), responses()
    given["length_B"] = np.minimum(given["length_B"], 7).astype(np.int32)
    given["action_BR"] = (np.arange(R)[None] < given["length_B"][:, None]).astype(np.float32)
    prog, found = program_of(cfg), []
    with jax.set_mesh(prog.mesh):
        for arrays in (given, trimmed(given)):
            state = prog.init()
            batch, _, told = prog.read(state, state.params, arrays)
            state, metrics = prog.update(state, batch, np.arange(B, dtype=np.int32), None)
            found.append((float(metrics["policy_loss"]), float(told["kl"]), float(metrics["value_loss"])))
    assert trimmed(given)["token_BS"].shape == (B, P + 7)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_scores_are_read_penalised_normalised_and_cut_in_this_order():
    cfg = settings("ppo", rollout=RolloutConfig(prompts=B, response_len=R, no_end_penalty=5.0), score=ScoreConfig(normalise=True, clip=2.0))
    prog = program_of(cfg)
    with jax.set_mesh(prog.mesh):
        state = prog.init()
        batch, moments, _ = prog.read(state, state.params, responses())
    given = responses()
    raw = given["score_B"] - 5.0 * ~given["ended_B"]
    np.testing.assert_allclose(batch["score_B"], np.clip((raw - raw.mean()) / raw.std(), -2, 2), atol=1e-5)
    assert float(moments.count) == B


@pytest.mark.parametrize(("start", "kept"), [(0, []), (2, [0, 1, 2])])
def test_a_run_that_was_killed_before_its_first_checkpoint_logs_its_first_evaluation_once(start, kept, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(4)))
    with RunLog(tmp_path, steps=6, start=start, tensorboard=False):
        assert [line["step"] for line in runs.lines(tmp_path / "metrics.jsonl")] == kept


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The run folder of a small pretrained model on the byte tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    code, text = runs.finish(runs.start("pretrain", runs.config(folder, checkpoint={"every": 24, "keep": 1})))
    assert code == 0, text
    return folder / "run"


def rlhf_config(folder, base, **groups):
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i} the", "answer": "of"}) + "\n" for i in range(20)))
    tree = {
        "run": {"dir": str(folder / "run")}, "base": {"run": str(base)}, "data": {"seq_len": 24},
        "prompts": {"sources": {"some": {"path": str(prompts)}}, "prompt_len": 12, "validation": 0.2},
        "rollout": {"prompts": 4, "samples": 2, "response_len": 10}, "rewards": {"short": {"kind": "length", "limit": 2, "soft": 8}},
        "train": {"iterations": 6, "minibatches": 2, "epochs": 2, "eval_every": 3, "eval_prompts": 4, "sample_every": 3},
        "optim": {"lr": 0.01}, "checkpoint": {"every": 2, "keep": 2}, "log": {"tensorboard": False},
    }
    for name, keys in groups.items():
        tree[name] = tree.get(name, {}) | keys if isinstance(keys, dict) else keys
    path = folder / "rlhf.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


NUMBERS = ("step", "tokens", "score", "kl", "policy_loss", "value_loss", "kl_coef", "entropy", "ptx_loss", "eval_score", "eval_greedy", "eval_text_loss",
           "eval_majority_right", "eval_any_right", "eval_sums_0shot", "eval_sums_1shot")


@pytest.mark.slow
@pytest.mark.parametrize("how", [
    {"algorithm": "ppo", "kl": {"controller": "adaptive", "target": 0.5, "horizon": 50}, "score": {"normalise": True}},
    {"algorithm": "grpo", "rewards": {"right": {"kind": "exact"}}, "train": {"eval_samples": 2}, "tax": {}},
    {"algorithm": "ppo", "rollout": {"stale": 1}}], ids=["ppo, ptx, ema", "grpo, tax, votes", "stale"])
def test_killed_anywhere_is_never_killed(how, base, tmp_path):
    """SIGKILL in rollouts, scoring, updates and saves: weights, critic, moments, coefficient and every logged number are as if not."""
    if "ema" in str(how) or how["algorithm"] == "ppo":
        how = how | {"train": {"ema": 0.9}, "ptx": {"coef": 0.5, "examples": 1.0, "eval_rows": 4,
                                                   "sources": {"words": {"path": str(runs.corpus(tmp_path))}}}}
    if "tax" in how:
        (tmp_path / "sums.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(8)))
        how = how | {"tax": {"sums": {"path": str(tmp_path / "sums.jsonl"), "shots": [0, 1], "answer_len": 3}}}
    unhurt, hurt = tmp_path / "a", tmp_path / "b"
    unhurt.mkdir()
    hurt.mkdir()
    code, text = runs.finish(runs.start("rlhf", rlhf_config(unhurt, base, **how)))
    assert code == 0, text
    config, rng = rlhf_config(hurt, base, **how), np.random.default_rng(1)
    for _ in range(20):
        process = runs.start("rlhf", config)
        runs.wait_for(lambda process=process: (hurt / "run/metrics.jsonl").exists() or process.poll() is not None)
        runs.kill(process, after=float(rng.uniform(1, 8)))
        if process.returncode == 0:
            break
    code, text = runs.finish(runs.start("rlhf", config))
    assert code == 0, text
    assert runs.digest(hurt / "run") == runs.digest(unhurt / "run")
    logged = runs.lines(unhurt / "run/metrics.jsonl", *NUMBERS)
    assert runs.lines(hurt / "run/metrics.jsonl", *NUMBERS) == logged
    assert "tax" not in how or {"eval_majority_right", "eval_sums_1shot"} <= logged[0].keys()
