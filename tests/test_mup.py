"""muP: at the base nothing changes, at another width init, rates and multipliers are those of the papers' tables."""

import ast
import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx

import jaxllm
from jaxllm.errors import UserError
from jaxllm.generate import cache
from jaxllm.model.config import LoRAConfig, ModelConfig, MoEConfig, MuPConfig
from jaxllm.model.formulation import REFERENCE
from jaxllm.model.heads import LanguageModel, ScoreModel
from jaxllm.model.lora import adapters
from jaxllm.train.config import OptimConfig
from jaxllm.train.optim import make_optimizer

SPARSE = MoEConfig(experts=4, every=2)
BASE = dataclasses.replace(toy.MODEL, mup=MuPConfig(base_width=32, base_depth=2, base_head_dim=8))  # toy.MODEL is 32 wide
WIDE = dataclasses.replace(toy.MODEL, d_model=128, d_ff=256, n_layers=4, mup=MuPConfig(base_width=32, base_depth=2, base_head_dim=8))
TIMES, DEPTH = 4, 2  # WIDE's, with heads four times as wide


def with_mup(model: ModelConfig, **changes) -> ModelConfig:
    return dataclasses.replace(model, **changes, mup=BASE.mup)


@pytest.mark.parametrize("name", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lion", "muon"))])
@pytest.mark.parametrize("change", [{}, pytest.param({"tied": True, "init": "normal", "moe": SPARSE}, marks=pytest.mark.slow)])
def test_at_the_base_training_is_the_standard_ones_bit_for_bit(name, change):
    cfg = OptimConfig(name=name, lr=1e-2, schedule="constant")
    plain, mup = (toy.run(toy.program(model, optim=cfg), [toy.batch(seed=i) for i in range(3)])
                  for model in (dataclasses.replace(toy.MODEL, **change), with_mup(toy.MODEL, **change)))
    assert plain[1] == mup[1]
    for path, leaf in toy.leaves(plain[0].params).items():
        np.testing.assert_array_equal(leaf, toy.leaves(mup[0].params)[path], err_msg=path)


def weights(model: ModelConfig, kind=LanguageModel) -> nnx.State:
    return nnx.state(kind(model, REFERENCE, rngs=nnx.Rngs(0)), nnx.Param)


@pytest.mark.parametrize("init", ["fan_in", "normal"])
def test_standard_deviations_follow_the_tables(init):
    """Yang et al. 2022, table 8: 1 for words, 1 / fan-in for matrices, of their base; Dey et al. 2025: those at base depth."""
    model = dataclasses.replace(WIDE, init=init, moe=SPARSE)
    found = toy.leaves(weights(model))
    D, F, m = 128, 256, TIMES
    hidden = {"fan_in": (D**-0.5, F**-0.5), "normal": (0.02 / m**0.5,) * 2}[init]
    words = {"fan_in": 32**-0.5, "normal": 0.02}[init]
    branch = (2 * 2) ** -0.5  # of the base's two layers, not of four
    want = {
        "embed_VD": words, "out_DV": words, "qkv_DKGH": hidden[0], "out_NHD": hidden[0] * branch, "gate_DF": hidden[0],
        "up_DF": hidden[0], "down_FD": hidden[1] * branch, "gate_EDF": hidden[0], "up_EDF": hidden[0],
        "down_EFD": hidden[1] * branch, "router_DE": words / m,  # as the head, its multiplier within
    }
    for name, leaf in found.items():
        own = name.split(".")[-1]
        if own in want:
            np.testing.assert_allclose(leaf.std(), want.pop(own), rtol=0.08, err_msg=name)
    assert not want


def test_scores_are_read_out_as_logits_are():
    std = toy.leaves(weights(dataclasses.replace(WIDE, d_model=2048, mup=MuPConfig(base_width=32), n_layers=1), ScoreModel))["score_DO"].std()
    np.testing.assert_allclose(std, 2049**-0.5 / (2048 / 32) ** 0.5, rtol=0.06)


def steps_of(name: str, params, model: ModelConfig | None, decay: float = 0.0, grads=None):
    """Returns the first update of each leaf at a rate of 1."""
    cfg = OptimConfig(name=name, lr=1.0, weight_decay=decay, schedule="constant", clip=0)
    optimizer = make_optimizer(cfg, 10, model)
    grads = jax.tree.map(jnp.ones_like, params) if grads is None else grads
    return toy.leaves(jax.jit(optimizer.tx.update)(grads, optimizer.tx.init(params), params, value=0.0)[0])


def rate_wanted(leaf: str, muon: bool = False) -> float:
    own = leaf.split(".")[-1]
    if own in ("embed_VD", "out_DV", "scale_D", "bias_D", "bias_E", "bias_O", "b"):
        return 1.0
    return TIMES**-0.5 if muon and own not in ("router_DE", "a", "score_DO") else 1 / TIMES


@pytest.mark.parametrize("name", ["adamw", "lion", pytest.param("muon", marks=pytest.mark.slow)])
def test_rates_of_weights_follow_the_tables(name):
    params = weights(dataclasses.replace(WIDE, moe=SPARSE))
    plain, mup = steps_of(name, params, None), steps_of(name, params, dataclasses.replace(WIDE, moe=SPARSE))
    for leaf, step in mup.items():
        np.testing.assert_allclose(step, plain[leaf] * rate_wanted(leaf, name == "muon"), rtol=2e-5, atol=1e-9, err_msg=leaf)


def test_rates_of_adapters_and_scores():
    """LoRA's A reads the width, B writes it (Hayou et al. 2024, LoRA+); a score reads it."""
    lora = adapters(weights(WIDE), LoRAConfig(rank=2), jax.random.key(0))
    for params in (lora, weights(WIDE, ScoreModel)):
        for leaf, step in steps_of("adamw", params, WIDE).items():
            np.testing.assert_allclose(step, -rate_wanted(leaf), rtol=1e-5, err_msg=leaf)


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_decay_times_rate_is_the_same_at_every_width(name):
    params = weights(WIDE)
    zeros = jax.tree.map(jnp.zeros_like, params)
    plain, mup = (steps_of(name, params, model, decay=0.1, grads=zeros) for model in (None, WIDE))
    assert np.abs(plain["trunk.blocks_L.mlp.up_DF"]).max() > 0.01
    for leaf, step in mup.items():
        np.testing.assert_allclose(step, plain[leaf], rtol=1e-6, atol=1e-9, err_msg=leaf)


def test_epsilon_falls_with_width_and_in_layers_with_depth():
    params, eps = weights(WIDE), 1e-3
    cfg = OptimConfig(lr=1.0, eps=eps, weight_decay=0, schedule="constant", clip=0)
    optimizer = make_optimizer(cfg, 10, WIDE)
    grads = jax.tree.map(lambda p: jnp.full_like(p, eps), params)
    for leaf, step in toy.leaves(optimizer.tx.update(grads, optimizer.tx.init(params), params, value=0.0)[0]).items():
        own = eps / (TIMES * (DEPTH if "blocks_L" in leaf else 1))
        np.testing.assert_allclose(step, -rate_wanted(leaf) * eps / (eps + own), rtol=1e-4, err_msg=leaf)


@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_rules_without_rules_of_mup_are_refused_in_one_line(name):
    with pytest.raises(UserError, match=f"optim.name={name} with model.mup.base_width=32.*adamw, lion, muon"):
        make_optimizer(OptimConfig(name=name), 10, WIDE)


@pytest.mark.parametrize(("change", "said"), [({"base_width": 0}, "base_width=0"), ({"base_depth": 2}, "base_width=null"),
                                              ({"base_head_dim": 8}, "base_width=null")])
def test_bad_settings_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        MuPConfig(**change)


def test_every_verb_that_trains_tells_the_optimizer_its_model():
    """Without it a verb would train a model of muP at the standard rates, and nobody would see."""
    calls = [(path, node) for path in pathlib.Path(jaxllm.__file__).parent.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "make_optimizer"]
    assert len(calls) >= 9
    assert not [path for path, call in calls if len(call.args) < 3]


# ---------------------------------------------------------------- the forward pass


def hidden_and_logits(model: ModelConfig, params):
    batch = toy.batch(2)
    graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(model, REFERENCE, rngs=nnx.Rngs(0))))

    @jax.jit
    def run(params):
        made = nnx.merge(graph, params)
        x_BTD = made.hidden(batch["token_BT"], batch["pos_BT"], batch["doc_BT"])
        return x_BTD, x_BTD @ made.head_DV()

    return run(params)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_a_mean_over_the_width_not_a_sum(tied):
    model = dataclasses.replace(WIDE, tied=tied)
    params = weights(model)
    x_BTD, logit_BTV = hidden_and_logits(model, params)
    head_DV = params["trunk"]["embed_VD"][...].T if tied else params["out_DV"][...]
    np.testing.assert_allclose(logit_BTV, x_BTD @ head_DV / TIMES, atol=1e-5)


def test_scores_are_products_over_the_heads_width():
    """q k / H x sqrt(base head): with heads of 32 and a base of 8, half of q k / sqrt(H)."""
    model = dataclasses.replace(WIDE, n_layers=1, mup=MuPConfig(base_width=32, base_head_dim=8))
    same = dataclasses.replace(model, mup=MuPConfig(base_width=32))
    params = weights(model)
    want = jax.tree.map(jnp.copy, params)
    # what queries are made by, halved: rotations are linear. Of a kv head's G + 2 matrices the last two are key and value
    qkv = want["trunk"]["blocks_L"]["attn"]["qkv_DKGH"]
    qkv[...] = qkv[...].at[..., :-2, :].multiply(math.sqrt(8 / 32))
    np.testing.assert_allclose(hidden_and_logits(model, params)[0], hidden_and_logits(same, want)[0], atol=1e-5)
    assert np.abs(hidden_and_logits(model, params)[0] - hidden_and_logits(same, params)[0]).max() > 1e-3


def test_a_layer_adds_base_depth_over_depth_of_its_output():
    deep = dataclasses.replace(WIDE, mup=MuPConfig(base_width=32, base_depth=1))  # four layers: a quarter
    same = dataclasses.replace(WIDE, mup=MuPConfig(base_width=32))
    params = weights(deep)
    want = jax.tree.map(jnp.copy, params)
    blocks = want["trunk"]["blocks_L"]
    for part, name in (("attn", "out_NHD"), ("mlp", "down_FD")):
        blocks[part][name][...] = blocks[part][name][...] / 4
    np.testing.assert_allclose(hidden_and_logits(deep, params)[0], hidden_and_logits(same, want)[0], atol=1e-5)


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_cached_decoding_is_the_full_forward(tied):
    model = dataclasses.replace(WIDE, tied=tied)
    params = weights(model)
    token_BT = toy.batch(2)["token_BT"]
    graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(model, REFERENCE, rngs=nnx.Rngs(0))))

    @jax.jit
    def decoded(params):
        made = nnx.merge(graph, params)
        B, T = token_BT.shape
        x_BD, cache_L = cache.read_prompt(made, None, token_BT[:, :4], jnp.zeros(B, jnp.int32), T)
        out = [x_BD]
        for t in range(4, 10):
            x_BD, cache_L = cache.read_token(made, None, token_BT[:, t], t, jnp.full(B, t), cache_L)
            out.append(x_BD)
        full_BTD = made.hidden(token_BT, jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.ones((B, T), jnp.int32))
        return jnp.stack(out, 1) @ made.head_DV(), full_BTD[:, 3:10] @ made.head_DV()

    np.testing.assert_allclose(*decoded(params), atol=2e-5)


@pytest.fixture(scope="module")
def one_device():
    return toy.run(toy.program(WIDE), [toy.batch(seed=i) for i in range(2)])


@pytest.mark.parametrize("mesh", [{"fsdp": 2, "tensor": 2}, {"stage": 2, "micro_batches": 4}], ids=["fsdp-tensor", "pipeline"])
def test_every_mesh_trains_as_one_device(one_device, mesh):
    devices = math.prod(n for name, n in mesh.items() if name != "micro_batches")
    state, losses = toy.run(toy.program(WIDE, devices=devices, **mesh), [toy.batch(seed=i) for i in range(2)])
    np.testing.assert_allclose(losses, one_device[1], rtol=1e-5)
    # Adam turns a gradient's sign into a step: where it is all but 0, rounding decides, hence the bound
    assert toy.worst(state.params, one_device[0].params)[0] < 1e-3
