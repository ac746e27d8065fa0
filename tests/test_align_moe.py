"""Tuning a model with sparse layers: what pretraining adds to the loss, logs, and does to the routers' biases."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
import test_reward
import test_rlhf
import toy
from flax import nnx

from jaxllm.align import dpo_loss, reward, supervised
from jaxllm.align.config import TuneConfig
from jaxllm.align.dpo_config import DPOVerb
from jaxllm.align.sft_loss import held_out_loss, sft_loss
from jaxllm.align.update import places
from jaxllm.model.config import LoRAConfig, MoEConfig
from jaxllm.model.heads import LanguageModel, ScoreModel
from jaxllm.model.lora import adapters
from jaxllm.partition import batch_sharding, row_sharding
from jaxllm.train.config import OptimConfig
from jaxllm.train.optim import make_optimizer
from jaxllm.train.state import structure
from jaxllm.train.step import Objective, eval_step

MOE = MoEConfig(experts=8, top_k=2, d_ff=32, capacity=1.25, balance_loss=0.5, z_loss=0.1, bias_rate=0.01)
MODEL = dataclasses.replace(toy.MODEL, moe=MOE)
SGD = OptimConfig(name="sgd", lr=0.3, b1=0.0, schedule="constant", weight_decay=0.0, clip=0.0)
NO_LORA, LORA = LoRAConfig(), LoRAConfig(rank=2)


@pytest.fixture(scope="module")
def pretraining():
    return toy.program(MODEL, optim=SGD)


def sft_program(prog, params, *, lora=NO_LORA, frozen=None, micro_batches=1):
    objective = Objective(prog.graph, np.dtype(np.float32), 10, 0.0, 0.0, 0.0, MOE)
    cfg = TuneConfig(steps=10, batch_size=toy.ROWS, micro_batches=micro_batches)
    return supervised.program(prog.graph, params, partial(sft_loss, objective, 0.0, lora), make_optimizer(SGD, 10), prog.mesh, cfg,
                              seed=0, frozen=frozen, bias_rate=MOE.bias_rate)


def numbers(metrics) -> dict[str, float]:
    return {name: float(x) for name, x in metrics.items() if np.ndim(x) == 0}


@pytest.mark.parametrize("micro_batches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sft_moves_as_a_step_of_pretraining_on_the_same_batch(pretraining, micro_batches):
    """Weights, biases of the selection, and every logged number: losses of balance count, and full experts drop tokens."""
    prog = pretraining if micro_batches == 1 else toy.program(MODEL, optim=SGD, micro_batches=2)
    batch = jax.device_put(toy.batch(), batch_sharding(prog.mesh))
    with jax.set_mesh(prog.mesh):
        params = prog.init().params
        of = sft_program(prog, params, micro_batches=micro_batches)
        tuned, told = of.train_step(of.init(), batch)
        state, expected = prog.train_step(prog.init(), batch)
    assert toy.worst(tuned.params, state.params)[0] < 1e-6 < toy.worst(tuned.params, params)[0]
    told, expected = numbers(told), numbers(prog.read(expected))
    assert {"expert_load", "balance_loss", "dropped_share"} <= told.keys() and told["dropped_share"] > 0
    assert told == pytest.approx({name: expected[name] for name in told}, rel=1e-5)


@pytest.mark.slow
def test_held_out_loss_of_sft_is_of_the_text_alone(pretraining):
    prog, batch = pretraining, toy.batch()
    objective = Objective(prog.graph, np.dtype(np.float32), 10, 0.0, 0.0, 0.0, MOE)
    with jax.set_mesh(prog.mesh):
        params = prog.init().params
        loss = jax.jit(partial(held_out_loss, objective, NO_LORA))(params, None, batch)[0]
        plain = jax.jit(partial(eval_step, objective._replace(moe=None)))(params, batch)[0]
        trained = jax.jit(partial(sft_loss, objective, 0.0, NO_LORA))(params, None, batch, None)[0]
    assert float(loss) == pytest.approx(float(plain), rel=1e-6) and float(trained) > 1.05 * float(loss)


@pytest.mark.slow
def test_adapters_leave_the_biases_alone_and_log_the_load(pretraining):
    prog = pretraining
    batch = jax.device_put(toy.batch(), batch_sharding(prog.mesh))
    with jax.set_mesh(prog.mesh):
        params = prog.init().params
        of = sft_program(prog, adapters(params, LORA, jax.random.key(0)), lora=LORA, frozen=params)
        begun = of.init()
        before = jax.tree.map(np.asarray, begun.params)
        state, told = of.train_step(begun, batch)
    assert toy.leaves(state.params).keys() == toy.leaves(before).keys() and toy.worst(state.params, before)[0] > 1e-5
    assert numbers(told)["expert_load"] > 1


def biases(params) -> np.ndarray:
    return next(x for name, x in toy.leaves(params).items() if name.endswith("bias_E"))


@pytest.mark.slow
def test_the_reward_model_is_balanced_too(pretraining):
    mesh = pretraining.mesh
    graph, abstract = structure(ScoreModel, MODEL, mesh, n_scores=2)
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda a: jax.device_put((0.2 * rng.normal(size=a.shape)).astype(a.dtype), a.sharding), abstract)
    batch = jax.device_put(test_reward.batch(), row_sharding(mesh))
    of = partial(reward.loss, graph, np.dtype(np.float32))
    check_balanced(mesh, graph, params, partial(of, moe=MOE), of, batch)


@pytest.mark.slow
def test_dpo_is_balanced_too(pretraining):
    mesh = pretraining.mesh
    graph, abstract = structure(LanguageModel, MODEL, mesh)
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda a: jax.device_put((0.2 * rng.normal(size=a.shape)).astype(a.dtype), a.sharding), abstract)
    batch = test_reward.batch(K=2)
    batch = {name: batch[name] for name in ("token_BKT", "length_BK", "prompt_BK")} | {
        "ref_logp_BK": rng.normal(-20, 1, (8, 2)).astype(np.float32), "real_B": np.ones(8, np.float32), "margin_B": np.zeros(8, np.float32)}
    reading, of_pairs = dpo_loss.Reading(graph, np.dtype(np.float32), 10), dpo_loss.formula(DPOVerb())
    check_balanced(mesh, graph, params, partial(dpo_loss.loss, reading._replace(moe=MOE), of_pairs),
                   partial(dpo_loss.loss, reading, of_pairs), jax.device_put(batch, row_sharding(mesh)))


def check_balanced(mesh, graph, params, trained, plain, batch):
    """Asserts that the trained loss is the plain one and the routers' losses once for each that it counts, that the load is
    logged, that each bias moves by the rate, and that an evaluation is of the plain loss."""
    cfg = TuneConfig(steps=10, batch_size=8)
    with jax.set_mesh(mesh):
        of = supervised.program(graph, params, trained, make_optimizer(SGD, 10), mesh, cfg, seed=0, held_out=plain, bias_rate=MOE.bias_rate)
        state, told = of.train_step(of.init(), batch)
        total, (n, routed) = jax.jit(lambda p, b: (lambda x: (x[0], (x[1][0], x[1][1]["routed"])))(trained(p, None, b, None)))(params, batch)
        alone, (_, said) = of.eval_step(params, batch)
    chosen_LE, score_LE = np.asarray(routed.chosen_E, np.float64), np.asarray(routed.score_E, np.float64)
    balance_L = 8 * (chosen_LE * score_LE).sum(-1) / chosen_LE.sum(-1) / np.asarray(routed.tokens)
    z_L = np.asarray(routed.log_z_squared) / np.asarray(routed.tokens)
    assert float(total - alone) == pytest.approx(float(n) * float(0.5 * balance_L.sum() + 0.1 * z_L.sum()), rel=1e-4)
    assert "routed" not in said
    assert numbers(told)["loss"] == pytest.approx(float(total) / float(n), rel=1e-5)
    assert numbers(told)["expert_load"] == pytest.approx((chosen_LE.max(-1) / chosen_LE.mean(-1)).max(), rel=1e-5)
    moved = biases(state.params) - biases(params)
    np.testing.assert_allclose(moved, 0.01 * np.sign(chosen_LE.mean(-1, keepdims=True) - chosen_LE), atol=1e-6)


@pytest.mark.slow
def test_a_policy_and_its_critic_are_balanced_in_rlhf_too():
    """An update's losses are those without sparse layers' own and these once for each action; each bias moves by the rate."""
    told, states = {}, {}
    for moe in (MOE, dataclasses.replace(MOE, balance_loss=0.0, z_loss=0.0)):
        prog = test_rlhf.program_of(test_rlhf.settings("ppo"), model=dataclasses.replace(toy.MODEL, moe=moe))
        with jax.set_mesh(prog.mesh):
            begun = prog.init()
            before = {"policy": jax.tree.map(np.asarray, begun.params), "critic": jax.tree.map(np.asarray, begun.opt_state["critic"]["params"])}
            batch, *_ = prog.read(begun, begun.params, jax.device_put(test_rlhf.responses(), row_sharding(prog.mesh)))
            states[moe], told[moe] = prog.update(begun, batch, np.arange(test_rlhf.B, dtype=np.int32), None)
    loss_of = {"policy": ("policy_loss", ""), "critic": ("value_loss", "critic_")}
    for name, kind in (("policy", LanguageModel), ("critic", ScoreModel)):
        routed = routed_of(prog.mesh, kind, before[name], batch)
        chosen_LE, score_LE = np.asarray(routed.chosen_E, np.float64), np.asarray(routed.score_E, np.float64)
        balance_L = 8 * (chosen_LE * score_LE).sum(-1) / chosen_LE.sum(-1) / np.asarray(routed.tokens)
        z_L = np.asarray(routed.log_z_squared) / np.asarray(routed.tokens)
        loss, prefix = loss_of[name]
        with_losses, without = (float(found[loss]) for found in told.values())
        assert with_losses - without == pytest.approx(0.5 * balance_L.sum() + 0.1 * z_L.sum(), rel=1e-4)
        assert float(told[MOE][f"{prefix}expert_load"]) == pytest.approx((chosen_LE.max(-1) / chosen_LE.mean(-1)).max(), rel=1e-5)
        after = states[MOE].params if name == "policy" else states[MOE].opt_state["critic"]["params"]
        moved = biases(after) - biases(before[name])
        np.testing.assert_allclose(moved, 0.01 * np.sign(chosen_LE.mean(-1, keepdims=True) - chosen_LE), atol=1e-6)


def routed_of(mesh, kind, params, batch):
    """Returns what the routers do on all slots of a batch but the last."""
    model = nnx.merge(structure(kind, MODEL, mesh)[0], params)
    pos_BS, doc_BS = places(batch, test_rlhf.P + test_rlhf.R - 1, test_rlhf.P)
    read = model.hidden_and_routed if kind is LanguageModel else model.scores_and_routed
    with jax.set_mesh(mesh):
        return read(batch["token_BS"][:, :-1], pos_BS, doc_BS)[1]
