"""The FLOP count against a hand count and against XLA's; the chip table is whole and dated."""

import dataclasses
import datetime

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm import hardware
from jaxllm.errors import UserError
from jaxllm.model.config import ModelConfig, MoEConfig
from jaxllm.model.formulation import REFERENCE
from jaxllm.model.heads import LanguageModel
from jaxllm.train import flops
from jaxllm.train.loss import next_token_loss

CONFIGS = {
    "grouped, gated, untied": ModelConfig(d_model=512, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=1024),
    "plain, tied, layernorm": ModelConfig(d_model=512, n_layers=2, n_heads=8, vocab_size=1024, activation="gelu", tied=True,
                                          norm="layernorm"),
    "geglu, window": ModelConfig(d_model=512, n_layers=2, n_heads=4, vocab_size=1024, activation="geglu", window=32),
    "one kv head, no positions": ModelConfig(d_model=512, n_layers=2, n_heads=8, n_kv_heads=1, vocab_size=1024,
                                             activation="relu2", position="none"),
    "experts": ModelConfig(d_model=512, n_layers=2, n_heads=8, vocab_size=1024, moe=MoEConfig(experts=4, top_k=2)),
    "experts every second layer, one shared": ModelConfig(d_model=512, n_layers=2, n_heads=8, vocab_size=1024,
                                                          moe=MoEConfig(experts=8, top_k=2, every=2, shared=1, d_ff=256)),
}


def evenly(x_MD, w_EDF, size_E):
    """Returns the experts' matmul as if each had as many rows: XLA counts a ragged one as if every expert had them all."""
    x_ERD = x_MD.reshape(len(w_EDF), -1, x_MD.shape[1])
    return jnp.einsum("ERD,EDF->ERF", x_ERD, w_EDF).reshape(len(x_MD), -1)


def test_a_hand_count():
    cfg = ModelConfig(d_model=8, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=16, vocab_size=32)
    # width 8, heads of 2: queries 8x8, keys and values 8x4 each, output 8x8; gate, up, down 8x16; head 8x32
    attention, feed_forward, head = 64 + 32 + 32 + 64, 3 * 128, 256
    assert flops.parameter_count(cfg) == {
        "embedding": 256, "attention": 3 * attention, "feed-forward": 3 * feed_forward, "norms": 7 * 8, "head": head}
    # a row of 5: the queries see 1, 2, 3, 4, 5 positions; two matmuls of 2 multiply-adds over 4 heads of 2
    scores = 3 * (2 * 2 * 4 * 2) * (1 + 2 + 3 + 4 + 5) / 5
    forward = 2 * (3 * attention + 3 * feed_forward + head) + scores
    assert sum(flops.forward_flops_per_token(cfg, 5).values()) == forward
    assert flops.training_flops_per_token(cfg, 5) == 3 * forward


@pytest.mark.parametrize("window", [None, 1, 3, 7, 8, 100])
def test_mean_seen_is_the_mask_s_mean(window):
    t_T1, s_1S = np.arange(8)[:, None], np.arange(8)[None]
    mask_TS = (s_1S <= t_T1) & (s_1S > t_T1 - (window or 8))
    assert flops.mean_seen(8, window) == mask_TS.sum() / 8


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_count_is_xla_s(cfg):
    T = 128
    form = dataclasses.replace(REFERENCE, unroll=True, grouped=evenly)  # XLA counts a loop's body once
    graph, params = nnx.split(nnx.eval_shape(lambda: LanguageModel(cfg, form, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(flops.parameter_count(cfg).values())

    def loss(params, token_BT, pos_BT):
        model = nnx.merge(graph, params)
        x_BTD = model.hidden(token_BT, pos_BT)
        return next_token_loss(x_BTD, model.head_DV(), token_BT, jnp.ones(token_BT.shape), chunk=T)[0]

    tokens = jax.ShapeDtypeStruct((2, T), jnp.int32)
    xla = jax.jit(jax.grad(loss)).lower(params, tokens, tokens).cost_analysis()["flops"] / (2 * T)
    # this attention body computes all T scores of a query, and masks
    unmasked = 3 * 4 * cfg.n_layers * cfg.d_model * (T - flops.mean_seen(T, cfg.window))
    assert xla == pytest.approx(flops.training_flops_per_token(cfg, T) + unmasked, rel=0.01)


def test_formula_gives_its_own_sum():
    cfg = CONFIGS["grouped, gated, untied"]
    assert f"{flops.training_flops_per_token(cfg, 256) / 1e6:.2f} MFLOPs" in flops.formula(cfg, 256)
    assert "\n" not in flops.formula(cfg, 256)


def test_every_figure_has_a_source_and_a_date():
    assert len(hardware.chips()) >= 18
    for chip in hardware.chips().values():
        assert chip.kinds and chip.vendor in ("google", "nvidia"), chip.name
        assert {"memory_gib", "memory_gb_per_s"} <= chip.figures.keys(), chip.name
        assert chip.peak_flops("float32") and chip.memory_bytes and chip.memory_bytes_per_s, chip.name
        for name, figure in chip.figures.items():
            assert figure.value > 0 and figure.source.startswith("https://"), (chip.name, name)
            assert datetime.date(2026, 1, 1) <= figure.date <= datetime.datetime.now(tz=datetime.UTC).date(), (chip.name, name)


def test_dense_rates_keep_their_ratios():
    """A figure "with sparsity" would be twice what its neighbours say: 8 bits run at most twice as fast as 16 bits do."""
    for chip in hardware.chips().values():
        wide = (chip.figures.get("bf16_tflops") or chip.figures.get("fp16_tflops") or chip.figures["fp32_tflops"]).value
        for name in ("int8_tflops", "fp8_tflops"):
            if name in chip.figures:
                assert 0.99 * wide <= chip.figures[name].value <= 2.01 * wide, (chip.name, name)
        if "tf32_tflops" in chip.figures:
            assert chip.figures["tf32_tflops"].value == pytest.approx(wide / 2, rel=0.03), chip.name


def test_kinds_are_unique_and_unknown_ones_stay_unknown():
    kinds = [k for chip in hardware.chips().values() for k in chip.kinds]
    assert len(kinds) == len(set(kinds))
    assert hardware.chip("TPU v5 lite").name == "TPU v5e"
    assert hardware.chip("TPU v3").bf16_flops == 123e12 / 2  # jax shows a v3 chip's two cores as two devices
    for kind in ("cpu", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "TPU v9", ""):
        assert hardware.chip(kind) is None
    assert hardware.chip("Tesla T4").peak_flops("bfloat16") is None  # Turing has no bfloat16


def test_find_gives_the_nearest_name():
    assert hardware.find("tpu v5E").name == "TPU v5e"
    with pytest.raises(UserError, match=r"unknown chip 'h100'; did you mean 'H100 SXM' or 'H100 PCIe'\?"):
        hardware.find("h100")
    with pytest.raises(UserError, match="did you mean 'TPU v5e'"):
        hardware.find("TPU v5ee")
    with pytest.raises(UserError, match="known: TPU v2, "):
        hardware.find("zzz")
