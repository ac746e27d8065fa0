"""Sparse layers: routers and dispatch equal their definitions, on one device and over the `expert` axis.

Paths: "dropless" on one device sorts rows (`by_blocks` on CPU, `by_ragged_dot` elsewhere); over `expert` it is the dense
exchange, a fixed number of slots from each device to each (XLA:CPU has no ragged all-to-all); "capacity" is the same
dense all-to-all on every platform.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx

from jaxllm.errors import UserError
from jaxllm.model.config import ModelConfig, MoEConfig
from jaxllm.model.dispatch import by_ragged_dot
from jaxllm.model.formulation import PLATFORMS, REFERENCE
from jaxllm.model.heads import LanguageModel
from jaxllm.model.layers import GatedFeedForward
from jaxllm.model.moe import Routed, SparseFeedForward, choose, losses
from jaxllm.model.moe_cpu import by_blocks
from jaxllm.partition import batch_sharding
from jaxllm.train import flops
from jaxllm.train.config import OptimConfig, TrainConfig
from jaxllm.train.stages import pipelined, schedule_of
from jaxllm.train.step import Objective, accumulated

MOE = MoEConfig(experts=8, top_k=2, d_ff=32)
E, A = MOE.experts, MOE.top_k
ONE_PART = TrainConfig(steps=1)


def model_of(**moe) -> ModelConfig:
    return dataclasses.replace(toy.MODEL, moe=dataclasses.replace(MOE, **moe))


def tokens(rows=4, T=24, seed=0, width=32):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, T, width)).astype(np.float32), rng.random((rows, T)) < 0.8


def plain_loop(layer: SparseFeedForward, x_BTD, real_BT, capacity_slots=None):
    """The layer in NumPy and float64, a token and an expert at a time; returns (y_BTD, choices dropped, chosen_E)."""
    w = {n.split(".")[0]: v.astype(np.float64) for n, v in toy.leaves(nnx.state(layer, nnx.Param)).items()}
    y_BTD, dropped, chosen_E = np.zeros(x_BTD.shape), 0, np.zeros(E)
    for b in range(len(x_BTD)):
        filled_E = np.zeros(E, int)
        for t in range(x_BTD.shape[1]):
            if not real_BT[b, t]:
                continue
            x_D = x_BTD[b, t].astype(np.float64)
            logit_E = x_D @ w["router_DE"]
            p_E = np.exp(logit_E - logit_E.max()) / np.exp(logit_E - logit_E.max()).sum()
            best = np.argsort(-p_E)[:A]
            for e in best:
                chosen_E[e] += 1
                if capacity_slots is not None and filled_E[e] >= capacity_slots:
                    dropped += 1
                    continue
                filled_E[e] += 1
                gate = x_D @ w["gate_EDF"][e]
                y_BTD[b, t] += p_E[e] / p_E[best].sum() * ((gate / (1 + np.exp(-gate)) * (x_D @ w["up_EDF"][e])) @ w["down_EFD"][e])
    return y_BTD, dropped, chosen_E


def layer_of(cfg=None, form=PLATFORMS["cpu"], seed=0):
    return SparseFeedForward(cfg or model_of(), form, rngs=nnx.Rngs(seed))


@pytest.mark.parametrize("form", [PLATFORMS["cpu"], REFERENCE], ids=["by_blocks", "by_ragged_dot"])
def test_dropless_is_a_plain_loop_over_experts(form):
    x_BTD, real_BT = tokens()
    layer = layer_of(form=form)
    y_BTD, routed = layer(jnp.asarray(x_BTD), jnp.asarray(real_BT))
    want_BTD, _, chosen_E = plain_loop(layer, x_BTD, real_BT)
    assert np.abs(np.asarray(y_BTD) - want_BTD).max() / np.abs(want_BTD).max() < 1e-5
    np.testing.assert_array_equal(routed.chosen_E, chosen_E)  # padding is in no expert's load
    assert routed.tokens == real_BT.sum() and routed.dropped == 0


@pytest.mark.parametrize("capacity", [0.5, 1.0])
def test_the_dropped_share_is_a_plain_count(capacity):
    x_BTD, real_BT = tokens()
    layer, slots = layer_of(), int(np.ceil(capacity * A * 24 / E))
    y_BTD, routed = layer(jnp.asarray(x_BTD), jnp.asarray(real_BT), capacity)
    want_BTD, dropped, _ = plain_loop(layer, x_BTD, real_BT, slots)
    assert dropped > 10 and routed.dropped == dropped
    assert np.abs(np.asarray(y_BTD) - want_BTD).max() / np.abs(want_BTD).max() < 1e-5


def test_capacity_that_is_large_enough_is_dropless():
    x_BTD, real_BT = map(jnp.asarray, tokens())
    layer = layer_of()

    def total(x_BTD, capacity):
        return jnp.sum(jnp.sin(layer(x_BTD, real_BT, capacity)[0]))

    np.testing.assert_allclose(layer(x_BTD, real_BT, E / A)[0], layer(x_BTD, real_BT)[0], atol=1e-6)
    np.testing.assert_allclose(jax.grad(total)(x_BTD, E / A), jax.grad(total)(x_BTD, None), atol=1e-5)


def test_a_full_expert_drops_later_tokens_never_earlier_ones_nor_other_rows():
    x_BTD, real_BT = tokens()
    layer, changed = layer_of(), x_BTD.copy()
    changed[0, 12:], changed[1] = 3 * changed[0, 12:] + 1, changed[1] - 1
    one, other = (np.asarray(layer(jnp.asarray(x), jnp.asarray(real_BT), 0.5)[0]) for x in (x_BTD, changed))
    np.testing.assert_allclose(other[0, :12], one[0, :12], atol=1e-6)
    np.testing.assert_allclose(other[2:], one[2:], atol=1e-6)
    assert np.abs(other[0, 12:] - one[0, 12:]).max() > 0.1


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_padding_gets_nothing_and_takes_no_place(capacity):
    x_BTD, real_BT = tokens()
    layer, other_BTD = layer_of(), np.where(real_BT[..., None], x_BTD, 7.0).astype(np.float32)
    one, other = (layer(jnp.asarray(x), jnp.asarray(real_BT), capacity) for x in (x_BTD, other_BTD))
    assert np.abs(np.asarray(one[0])[~real_BT]).max() == 0
    np.testing.assert_allclose(other[0], one[0], atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), other[1], one[1])


@pytest.mark.parametrize(("router", "capacity"), [("softmax", None), ("softmax", 1.0), ("sigmoid", None)])
def test_one_expert_is_the_dense_layer(router, capacity):
    cfg = model_of(experts=1, top_k=1, d_ff=None, router=router, normalize=router == "sigmoid")
    sparse, dense = layer_of(cfg), GatedFeedForward(toy.MODEL, PLATFORMS["cpu"], rngs=nnx.Rngs(1))
    for ours, theirs in (("gate_EDF", "gate_DF"), ("up_EDF", "up_DF"), ("down_EFD", "down_FD")):
        setattr(sparse, ours, nnx.Param(getattr(dense, theirs)[...][None], axes=getattr(sparse, ours).axes))
    x_BTD = jnp.asarray(tokens()[0])
    want_BTD = dense(x_BTD)
    assert np.abs(np.asarray(sparse(x_BTD, None, capacity)[0] - want_BTD)).max() / np.abs(np.asarray(want_BTD)).max() < 1e-6


def test_shared_experts_are_added_to_the_routed_ones():
    x_BTD, real_BT = map(jnp.asarray, tokens())
    layer = layer_of(model_of(shared=2))
    y_BTD, shared_BTD = layer(x_BTD, real_BT)[0], layer.shared(x_BTD)
    assert layer.shared.up_DF.shape == (32, 64)
    del layer.shared
    layer.moe = dataclasses.replace(layer.moe, shared=0)
    np.testing.assert_allclose(y_BTD, layer(x_BTD, real_BT)[0] + shared_BTD, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_each_routers_weights_are_numpys(router, normalize):
    rng = np.random.default_rng(0)
    logit_NE, bias_E = rng.normal(size=(50, E)).astype(np.float32), rng.normal(size=E).astype(np.float32) * 0.3
    weight_NA, expert_NA, score_NE = choose(logit_NE, bias_E, dataclasses.replace(MOE, router=router, normalize=normalize))
    z = logit_NE.astype(np.float64)
    score = np.exp(z) / np.exp(z).sum(1, keepdims=True) if router == "softmax" else 1 / (1 + np.exp(-z))
    best = np.argsort(-(score + bias_E), axis=1)[:, :A]
    weight = np.take_along_axis(score, best, axis=1)
    np.testing.assert_array_equal(expert_NA, best)
    np.testing.assert_allclose(weight_NA, weight / weight.sum(1, keepdims=True) if normalize else weight, rtol=1e-5)
    np.testing.assert_allclose(score_NE, score, rtol=1e-5)
    assert (best != np.argsort(-score, axis=1)[:, :A]).any()  # the bias chose, and is not in the weights


def test_the_routers_losses_are_their_formulas():
    x_BTD, real_BT = tokens()
    layer = layer_of()
    _, routed = layer(jnp.asarray(x_BTD), jnp.asarray(real_BT))
    logit_NE = x_BTD[real_BT].astype(np.float64) @ np.asarray(layer.router_DE[...])
    p_NE = np.exp(logit_NE) / np.exp(logit_NE).sum(1, keepdims=True)
    share_E = np.bincount(np.argsort(-p_NE, axis=1)[:, :A].reshape(-1), minlength=E) / (len(p_NE) * A)
    balance, z = losses(routed)
    np.testing.assert_allclose(balance, E * (share_E * p_NE.mean(0)).sum(), rtol=1e-5)
    np.testing.assert_allclose(z, (np.log(np.exp(logit_NE).sum(1)) ** 2).mean(), rtol=1e-5)
    even = Routed(jnp.full(E, 10.0), jnp.full(E, 5.0), jnp.zeros(()), jnp.float32(40), jnp.zeros(()))
    assert losses(even)[0] == 1


def test_grouped_matmuls_agree_forward_and_backward():
    rng = np.random.default_rng(0)
    x_MD, w_EDF = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((300, 16), (5, 16, 12)))
    size_E, c_MF = jnp.array([130, 0, 1, 140, 9], jnp.int32), rng.normal(size=(300, 12)).astype(np.float32)
    found = []
    for body in (by_blocks, by_ragged_dot):
        found.append(jax.jit(jax.value_and_grad(lambda x, w, body=body: jnp.sum(body(x, w, size_E) * c_MF), argnums=(0, 1)))(x_MD, w_EDF))
        assert np.abs(np.asarray(body(x_MD, w_EDF, size_E))[280:]).max() == 0
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    assert toy.worst(found[0][1], found[1][1])[0] < 1e-5


MODES = {
    "dropless": {"balance_loss": 1e-2, "z_loss": 1e-3},
    "capacity": {"capacity": 0.75, "router": "sigmoid", "bias_rate": 1e-2, "every": 2, "shared": 1},
}
MESHES = {"expert2": {"devices": 2, "expert": 2}}
MORE = {"expert8": {"expert": 8}, "fsdp2 expert2 tensor2": {"fsdp": 2, "expert": 2, "tensor": 2}, "expert4": {"devices": 4, "expert": 4},
        "data2 expert4": {"data": 2, "expert": 4}, "fsdp2 expert4": {"fsdp": 2, "expert": 4},
        "expert4 tensor2": {"expert": 4, "tensor": 2}, "context2 expert2 tensor2": {"context": 2, "expert": 2, "tensor": 2}}


def loss_and_grads(prog, model, batch, train=ONE_PART):
    objective = Objective(prog.graph, np.dtype(np.float32), 10, 0.0, 0.0, 0.0, model.moe)
    fun = partial(accumulated, objective, train.micro_batches)
    if schedule := schedule_of(model, train, prog.mesh):
        fun = pipelined(objective, schedule, prog.mesh, prog.abstract.params)
    with jax.set_mesh(prog.mesh):
        run = jax.jit(lambda p, b: fun(p, b, None))
        (loss, (n, routed_L)), grads = run(prog.init().params, jax.device_put(batch, batch_sharding(prog.mesh)))
        return float(loss), float(n), jax.device_get(routed_L), jax.device_get(grads)


def padded(seed: int):
    batch = toy.batch(seed=seed)
    for name in ("doc_BT", "weight_BT"):
        batch[name][::3, -7:] = 0
    return batch


@pytest.fixture(scope="module", params=[mode if mode == "dropless" else pytest.param(mode, marks=pytest.mark.slow) for mode in MODES])
def one_device(request):
    model, batches = model_of(**MODES[request.param]), [padded(i) for i in range(10)]
    prog = toy.program(model)
    state, curve = toy.run(prog, batches)
    return model, batches, loss_and_grads(prog, model, batches[0]), curve, state


@pytest.mark.parametrize("mesh", [pytest.param(mesh, id=name, marks=[pytest.mark.slow] if name in MORE else [])
                                  for name, mesh in (MESHES | MORE).items()])
def test_experts_over_a_mesh_compute_what_one_device_computes(mesh, one_device):
    model, batches, (loss, n, routed, grads), curve, state = one_device
    if "context" in mesh and model.moe.capacity is not None:
        with pytest.raises(UserError, match="along whole rows; take capacity=null"):
            toy.program(model, devices=8, **mesh)
        return
    prog = toy.program(model, **{"devices": 8} | mesh)
    found = loss_and_grads(prog, model, batches[0])
    assert found[1] == n and abs(found[0] - loss) / loss < 1e-6
    np.testing.assert_array_equal(found[2].chosen_E, routed.chosen_E)
    np.testing.assert_array_equal(found[2].dropped, routed.dropped)
    assert (routed.dropped.sum() > 0) == (model.moe.capacity is not None)
    error, leaf = toy.worst(found[3], grads)
    assert error < 1e-5, leaf
    other, other_curve = toy.run(prog, batches)
    np.testing.assert_allclose(other_curve, curve, rtol=1e-5)
    if model.moe.bias_rate:
        bias = toy.leaves(other.params)["trunk.blocks_L.layer_1.mlp.bias_E"]
        np.testing.assert_array_equal(bias, toy.leaves(state.params)["trunk.blocks_L.layer_1.mlp.bias_E"])
        assert np.abs(bias).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "mesh"), [
    ("1f1b", {"stage": 2, "expert": 4}), ("zero_bubble", {"stage": 2, "fsdp": 2, "expert": 2}),
    ("interleaved", {"stage": 2, "expert": 2, "tensor": 2, "virtual_stages": 2})], ids=str)
def test_experts_in_a_pipeline_compute_what_one_device_computes(mode, name, mesh):
    """Not over ten steps: of the 30,000 choices of eight layers some are so near a tie that rounding takes the other expert."""
    model, batch = dataclasses.replace(model_of(**MODES[mode]), n_layers=8), padded(0)
    (loss, n, routed, grads), found = (
        loss_and_grads(toy.program(model, devices=d, micro_batches=4, pipeline=name, **axes), model, batch,
                       TrainConfig(steps=1, micro_batches=4, pipeline=name, virtual_stages=axes.get("virtual_stages", 1)))
        for d, axes in ((1, {}), (8, mesh)))
    assert found[1] == n and abs(found[0] - loss) / loss < 1e-6
    np.testing.assert_array_equal(found[2].chosen_E, routed.chosen_E)  # of every layer, in the model's order
    np.testing.assert_array_equal(found[2].dropped, routed.dropped)
    error, leaf = toy.worst(found[3], grads)
    assert error < 1e-5, leaf


@pytest.mark.parametrize("mode", MODES)
def test_the_compiled_step_exchanges_by_all_to_all(mode):
    model, counts = model_of(**MODES[mode]), {}
    for name, mesh in {"expert": {"data": 2, "expert": 4}, "data": {"data": 8}}.items():
        prog = toy.program(model, devices=8, **mesh)
        batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=batch_sharding(prog.mesh)) for k, v in toy.batch().items()}
        with jax.set_mesh(prog.mesh):
            text = prog.train_step.lower(prog.abstract, batch).compile().as_text()
        counts[name] = sum(text.count(f" {op}(") for op in ("all-to-all", "all-to-all-start"))
        experts = model.moe.experts // prog.mesh.shape["expert"]
        assert f"f32[{experts},32,32]" in text  # an expert's weights stay on its device
        assert name == "data" or "f32[8,32,32]" not in text
    # there and back, forward and backward, in each sparse layer; dropless also sends how many rows each device gets
    assert counts == {"expert": model.sparse_layers * (4 if mode == "capacity" else 5), "data": 0}


@pytest.mark.slow
def test_micro_batches_are_one_batch_without_auxiliary_losses():
    model, batches = model_of(capacity=0.75, every=2, bias_rate=1e-2), [padded(i) for i in range(3)]
    optim = OptimConfig(name="sgd", lr=0.1, b1=0.9)
    state, losses_ = toy.run(toy.program(model, optim=optim), batches)
    other, others = toy.run(toy.program(model, optim=optim, micro_batches=4), batches)
    np.testing.assert_allclose(others, losses_, rtol=1e-6)
    assert toy.worst(other.params, state.params)[0] < 1e-6


@pytest.mark.parametrize("knob", [{"bias_rate": 2e-2}, pytest.param({"balance_loss": 0.05}, marks=pytest.mark.slow)])
def test_balance_evens_the_load(knob):
    loads = {}
    for name, moe in {"off": {}, "on": knob}.items():
        prog = toy.program(model_of(router="sigmoid", **moe), optim=OptimConfig(lr=3e-3, schedule="constant"))
        batches, found = [toy.batch(seed=i) for i in range(60)], []
        with jax.set_mesh(prog.mesh):
            state = prog.init()
            for one in batches:
                state, metrics = prog.train_step(state, jax.device_put(one, batch_sharding(prog.mesh)))
                found.append(float(metrics["expert_load"]))
        loads[name] = np.mean(found[-10:])
    assert loads["off"] > 3 and loads["on"] - 1 < (loads["off"] - 1) / 2, loads  # 1: even


def test_only_the_balance_moves_the_biases():
    optim = OptimConfig(name="adamw", lr=0.1, weight_decay=0.5, schedule="constant")
    prog = toy.program(model_of(bias_rate=0.25), optim=optim)
    state, _ = toy.run(prog, [toy.batch(seed=i) for i in range(4)])
    bias = toy.leaves(state.params)["trunk.blocks_L.mlp.bias_E"]
    np.testing.assert_array_equal(bias / 0.25, np.round(bias / 0.25))
    assert np.abs(bias).max() >= 0.5


def test_flops_and_parameters_count_the_active_experts():
    cfg = model_of(every=2, shared=1, bias_rate=1e-3)
    params = nnx.state(nnx.eval_shape(lambda: LanguageModel(cfg, REFERENCE, rngs=nnx.Rngs(0))), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(flops.parameter_count(cfg).values())
    assert flops.active_parameter_count(cfg) == sum(flops.parameter_count(cfg).values()) - (E - A) * 3 * 32 * 32
    dense, expert = 3 * 32 * 64, 3 * 32 * 32
    assert flops.forward_flops_per_token(cfg, 24)["feed-forward"] == 2 * (dense + (A + 1) * expert + 32 * E)


@pytest.mark.parametrize("change", [pytest.param({}, marks=pytest.mark.slow), {"every": 2, "router": "sigmoid", "bias_rate": 1e-3, "capacity": 0.5}])
def test_cached_decoding_is_the_full_forward(change):
    import test_generate

    model = dataclasses.replace(test_generate.MODEL, moe=dataclasses.replace(MOE, **change))
    prog, params, engine = test_generate.make(model)
    cfg = test_generate.SampleConfig(max_tokens=24, temperature=0)
    written = engine.generate(test_generate.PROMPTS, cfg, logprobs=True)
    for prompt, one in zip(test_generate.PROMPTS, written, strict=True):
        ids = [test_generate.BYTES.bos_id, *test_generate.BYTES.encode(prompt), *one.tokens]
        want = test_generate.trainers_logps(prog, params, ids)[-len(one.tokens):]
        np.testing.assert_allclose(one.logprobs, want, atol=1e-5)
    assert engine.generate(test_generate.PROMPTS[:1], cfg)[0].tokens == written[0].tokens  # other rows and padding don't matter
    sharded = test_generate.make(model, devices=8, data=2, expert=4)[2]
    assert [c.tokens for c in sharded.generate(test_generate.PROMPTS, cfg)] == [c.tokens for c in written]


@pytest.mark.parametrize(("moe", "mesh", "says"), [
    ({"experts": 6}, {"devices": 4, "expert": 4}, "model.moe.experts=6 is not divisible by mesh.expert=4"),
    ({"experts": 0}, {"devices": 2, "expert": 2}, "mesh.expert=2 is an axis that a dense model can't use"),
    ({}, {"devices": 8, "expert": 8, "batch_size": 12}, "mesh.expert=8 does not divide; nearest batch_size: 16"),
])
def test_what_a_mesh_cannot_do_is_said_before_compiling(moe, mesh, says):
    with pytest.raises(UserError, match=says):
        toy.program(model_of(**moe), **mesh)


@pytest.mark.parametrize(("moe", "says"), [
    ({"top_k": 9}, "model.moe.top_k=9 is more than model.moe.experts=8"), ({"capacity": 0.0}, "model.moe.capacity=0.0: should be above 0"),
    ({"every": 3}, "model.n_layers=2 is not divisible by model.moe.every=3"), ({"experts": -1}, "model.moe.experts=-1"),
])
def test_a_setting_that_cannot_be_gets_one_line(moe, says):
    with pytest.raises(ValueError, match=says):
        model_of(**moe)
