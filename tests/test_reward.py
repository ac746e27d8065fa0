"""`jaxllm reward`: a whole run on preferences with a known cue, its scale, its report, and what must not change its numbers."""

import json
import random

import jax
import numpy as np
import pytest
import runs
import toy
import yaml

from jaxllm.align import reward
from jaxllm.align.reward_model import RewardModel, last_scores
from jaxllm.align.reward_report import measures
from jaxllm.align.supervised import program
from jaxllm.errors import UserError
from jaxllm.mesh import MeshConfig
from jaxllm.model.heads import ScoreModel
from jaxllm.partition import make_mesh, row_sharding
from jaxllm.train.config import OptimConfig
from jaxllm.train.optim import make_optimizer
from jaxllm.train.state import structure


def batch(B: int = 8, K: int = 3, T: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns groups of ranked answers of all lengths, some of fewer answers, for two objectives."""
    rng = np.random.default_rng(seed)
    length_BK = rng.integers(3, T + 1, (B, K)).astype(np.int32)
    return {"token_BKT": rng.integers(3, toy.MODEL.vocab_size, (B, K, T)).astype(np.int32), "length_BK": length_BK,
            "prompt_BK": np.full((B, K), 2, np.int32), "rank_BK": rng.permuted(np.tile(np.arange(K), (B, 1)), axis=1).astype(np.int32),
            "present_BK": np.arange(K)[None] < rng.integers(2, K + 1, B)[:, None], "objective_B": (np.arange(B) % 2).astype(np.int32),
            "margin_B": np.zeros(B, np.float32)}


def stepped(micro_batches: int = 1, devices: int = 1, **axes):
    from jaxllm.align.config import TuneConfig

    mesh = make_mesh(MeshConfig(**({"data": 1} | axes)), jax.devices()[:devices])
    graph, abstract = structure(ScoreModel, toy.MODEL, mesh, n_scores=2)
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda a: jax.device_put((0.2 * rng.normal(size=a.shape)).astype(a.dtype), a.sharding), abstract)
    optimizer = make_optimizer(OptimConfig(name="sgd", lr=0.1, b1=0.0, schedule="constant", weight_decay=0.0, clip=0.0), 4)
    cfg = TuneConfig(steps=4, batch_size=8, micro_batches=micro_batches)
    with jax.set_mesh(mesh):
        prog = program(graph, params, lambda *a: reward.loss(graph, np.dtype(np.float32), *a), optimizer, mesh, cfg, seed=0)
        state, metrics = prog.train_step(prog.init(), jax.device_put(batch(), row_sharding(mesh)))
    return state.params, {k: float(v) for k, v in metrics.items() if np.ndim(v) == 0}


def test_micro_batches_and_meshes_take_the_same_step():
    expected, told = stepped()
    for how in ({"micro_batches": 4}, {"devices": 8, "data": 2, "fsdp": 2, "tensor": 2}):
        params, metrics = stepped(**how)
        worst, where = toy.worst(params, expected)
        assert worst < 1e-5, (how, where)
        assert metrics == pytest.approx(told, rel=1e-5)


def test_the_score_is_read_at_the_last_real_token():
    """What stands behind an answer's end, and its length, change nothing."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    graph, abstract = structure(ScoreModel, toy.MODEL, mesh, n_scores=2)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda a: (0.2 * rng.normal(size=a.shape)).astype(a.dtype), abstract)
    token_BT = rng.integers(3, toy.MODEL.vocab_size, (2, 16)).astype(np.int32)
    with jax.set_mesh(mesh):
        whole = last_scores(graph, np.float32, params, token_BT[:, :9], np.full(2, 9, np.int32))
        padded = last_scores(graph, np.float32, params, token_BT, np.full(2, 9, np.int32))
        later = last_scores(graph, np.float32, params, token_BT, np.full(2, 10, np.int32))
    np.testing.assert_allclose(padded, whole, atol=1e-5)
    assert np.abs(later - whole).max() > 1e-3


def test_calibration_and_length_bias_are_measured():
    rng = np.random.default_rng(0)
    difference = rng.logistic(size=20_000) + 1.0
    n = len(difference)
    told = measures({"difference": difference, "longer": np.where(difference > 0, 1, -1), "objective": np.zeros(n),
                     "score": difference, "length": np.where(difference > 0, 1.0, -1.0)})
    assert told["accuracy"] == pytest.approx(1 / (1 + np.exp(-1)), abs=0.01)
    assert told["accuracy_longer_better"] == 1.0 and told["accuracy_shorter_better"] == 0.0 and told["length_correlation"] > 0.5
    sure = measures({"difference": np.full(100, 5.0) * np.where(np.arange(100) < 60, 1, -1), "longer": np.zeros(100),
                     "objective": np.zeros(100), "score": np.zeros(100), "length": np.zeros(100)})
    assert sure["calibration_error"] == pytest.approx(1 / (1 + np.exp(-5)) - 0.6, abs=1e-6)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    code, text = runs.finish(runs.start("pretrain", runs.config(folder, checkpoint={"every": 24, "keep": 1})))
    assert code == 0, text
    return folder / "run"


def preferences(folder) -> str:
    """Writes comparisons in which the answer with a "z" is better, and demonstrations."""
    rng, lines = random.Random(0), []
    for i in range(160):
        words = [" ".join(rng.choices(runs.WORDS, k=3)) for _ in range(2)]
        lines.append({"prompt": f"{i}?", "chosen": f"{words[0]} z", "rejected": words[1]})
    lines += [{"prompt": f"{i}!", "answers": [" ".join(rng.choices(runs.WORDS, k=3)) + " z"], "demonstration": True} for i in range(20)]
    path = folder / "preferences.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def config_of(folder, base, **groups):
    tree = {"run": {"dir": str(folder / "run")}, "base": {"run": str(base)}, "train": {"steps": 40, "batch_size": 16, "eval_every": 20},
            "data": {"seq_len": 48, "validation": 0.2, "sources": {"some": {"path": preferences(folder)}}},
            "optim": {"lr": 0.01, "schedule": "constant"}, "checkpoint": {"every": 10}, "log": {"tensorboard": False}}
    for name, keys in groups.items():
        tree[name] = tree.get(name, {}) | keys
    path = folder / "reward.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.slow
def test_a_cue_is_learned_scaled_and_used_whether_killed_or_not(base, tmp_path):
    unhurt, hurt = tmp_path / "a", tmp_path / "b"
    unhurt.mkdir()
    hurt.mkdir()
    code, text = runs.finish(runs.start("reward", config_of(unhurt, base)))
    assert code == 0, text
    told = json.loads((unhurt / "run/reward.json").read_text())
    assert told["objectives"]["preference"]["accuracy"] > 0.95 and told["zero_is_the_mean_of"] == "demonstrations"
    config = config_of(hurt, base)
    for after in (6.0, 7.5):
        runs.kill(runs.start("reward", config), after=after)
    code, text = runs.finish(runs.start("reward", config))
    assert code == 0, text
    assert runs.digest(hurt / "run") == runs.digest(unhurt / "run")
    assert json.loads((hurt / "run/reward.json").read_text()) == told

    from jaxllm.data.tokenizer import ByteTokenizer

    mesh, tokenizer = make_mesh(MeshConfig(data=1), jax.devices()[:1]), ByteTokenizer()
    model = RewardModel(str(unhurt / "run"), mesh, tokenizer)
    asked = [tokenizer.bos_id, *tokenizer.encode("1!\n")]  # as the plain template writes it
    scores = model([[*asked, *tokenizer.encode(f"the of {end}"), tokenizer.eos_id] for end in ("z", "and")])
    assert abs(scores[0]) < 3 < scores[0] - scores[1]  # demonstrations are about 0

    class Other(ByteTokenizer):
        hash = "another"

    with pytest.raises(UserError, match="tokenizer"):
        RewardModel(str(unhurt / "run"), mesh, Other())
    with pytest.raises(UserError, match=r"objectives\.kind"):
        RewardModel(str(unhurt / "run"), mesh, tokenizer, weights={"kind": 1.0})
    code, text = runs.finish(runs.start("generate", unhurt / "run", "--prompt=a"))
    assert code == 2 and "reward model, which writes no text" in text
