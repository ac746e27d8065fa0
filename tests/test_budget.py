"""The budget of a model: FLOPs, money, memory, decoding, failures; and its architecture from a count."""

import dataclasses
import datetime
import math

import numpy as np
import pytest

from jaxllm import hardware
from jaxllm.errors import UserError
from jaxllm.model.config import ModelConfig, MoEConfig
from jaxllm.plan import budget, failures, rental, roofline, shapes
from jaxllm.train.flops import active_parameter_count, parameter_count, training_flops_per_token

SMALL = ModelConfig(d_model=512, n_layers=4, n_heads=8, n_kv_heads=2, d_ff=1408, vocab_size=1024)
V5E, H100 = hardware.find("TPU v5e"), hardware.find("H100 SXM")


# ---------------------------------------------------------------- FLOPs


def test_flops_are_the_trainer_s_and_full_attention_costs_twice_the_causal():
    causal = budget.flops_per_token(SMALL, 1024)
    assert sum(causal.values()) == training_flops_per_token(SMALL, 1024)
    whole = budget.flops_per_token(SMALL, 1024, causal=False)
    assert whole["scores"] / causal["scores"] == 1024 / 512.5
    assert {k: v for k, v in whole.items() if k != "scores"} == {k: v for k, v in causal.items() if k != "scores"}


def test_six_n_d_is_what_is_left_where_context_is_short_and_the_embedding_is_small():
    big = shapes.architecture(70e9, 32000)
    assert training_flops_per_token(big, 2048) / (6 * sum(parameter_count(big).values())) == pytest.approx(1.03, abs=0.02)


def test_experts_that_a_token_does_not_meet_cost_nothing():
    sparse = dataclasses.replace(SMALL, moe=MoEConfig(experts=8, top_k=2))
    per_token = sum(budget.flops_per_token(sparse, 1024).values()) - budget.flops_per_token(sparse, 1024)["scores"]
    parts = parameter_count(sparse)
    multiplied = active_parameter_count(sparse) - parts["embedding"] - parts["norms"]
    assert per_token == pytest.approx(6 * multiplied)


def test_what_remat_computes_again():
    part = {k: v / 3 for k, v in budget.flops_per_token(SMALL, 1024).items()}
    layers = part["projections"] + part["scores"] + part["feed-forward"]
    again = {remat: budget.recomputed_per_token(SMALL, 1024, remat)
             for remat in ("none", "dots", "full", "attention", "qkv", "mlp", "qkv_attention", "qkv+gate")}
    assert again["none"] == 0 and again["full"] == layers
    assert again["dots"] == part["scores"] == layers - again["attention"]
    assert again["mlp"] == pytest.approx(layers - part["feed-forward"] * 2 / 3)
    # queries 512 x 512, keys and values 512 x 128 each, of these and the output's 512 x 512
    assert again["qkv"] == pytest.approx(layers - part["projections"] * 768 / 1280)
    assert again["qkv_attention"] == pytest.approx(again["qkv"] - part["scores"])
    assert again["qkv+gate"] == pytest.approx(again["qkv"] - part["feed-forward"] / 3)


# ---------------------------------------------------------------- time, money, energy, memory


def test_time_money_and_energy():
    rate = budget.rate(H100, 0.4, usd_per_hour=2.0, watts=700)
    hours = rate.chip_hours(989.5e12 * 0.4 * 3600 * 1000)
    assert hours == pytest.approx(1000) and rate.usd(hours) == pytest.approx(2000) and rate.hours_for(2000) == pytest.approx(1000)
    assert rate.kwh(hours, 1.1) == pytest.approx(770)
    assert budget.rate(V5E, 0.4).usd_per_hour == 1.20 and budget.rate(V5E, 0.4).kwh(1, 1.1) is None
    unknown = budget.rate(hardware.find("TPU v2"), 0.4)
    with pytest.raises(UserError, match=r"no price of 'TPU v2' is held; give hardware\.usd_per_hour"):
        unknown.hours_for(100)
    # a v3 chip is two of jax's devices
    assert budget.rate(hardware.find("TPU v3"), 1.0).flops_per_hour == 123e12 * 3600


def test_every_rental_figure_has_a_source_and_a_date():
    names = rental._read()["chips"]
    assert set(names) <= set(hardware.chips())
    priced = {n for n, one in rental._prices().items() if one.usd_per_hour is not None}
    assert not priced & {n for n, entry in names.items() if "usd_per_hour" in entry}  # a price stands in one file
    assert rental.usd_per_hour("H100 SXM").value == rental._prices()["H100 SXM"].usd_per_hour.value
    figures = [rental.usd_per_hour(n) for n in [*names, *priced]] + [rental.watts(n) for n in names] + [rental.chip_hours_between_failures()]
    for figure in filter(None, figures):
        assert figure.value > 0 and figure.source.startswith("http")
        assert datetime.date(2024, 1, 1) <= figure.date <= datetime.datetime.now(tz=datetime.UTC).date()
    assert all(0 < r.mfu < 1 and r.source.startswith("http") for r in rental.reported_mfu())
    assert rental.chip_hours_between_failures().value == pytest.approx(16384 * 54 * 24 / 419, rel=0.001)


def test_checkpoint_bytes():
    assert budget.checkpoint_bytes(1e9) == {"training state": 12e9, "weights, float32": 4e9, "weights, bfloat16": 2e9}


@pytest.mark.parametrize(("config", "devices", "rows", "seq_len", "remat", "chunk", "compiled"), [
    (dict(d_model=2048, n_layers=16, n_heads=16, d_ff=7168), 16, 4, 2048, "full", 256, 3.265),
    (dict(d_model=4096, n_layers=32, n_heads=32, d_ff=11008), 256, 4, 2048, "full", 256, 5.748),
    (dict(d_model=4096, n_layers=32, n_heads=32, d_ff=11008), 64, 4, 4096, "qkv_attention", 256, 30.215),
])
def test_memory_is_near_what_was_compiled(config, devices, rows, seq_len, remat, chunk, compiled):
    """The compiled peaks stand in docs/plan-compile.md; the estimate leaves out buffers and gaps."""
    cfg = ModelConfig(**config, vocab_size=32000, max_seq_len=seq_len)
    held = budget.device_bytes(cfg, devices=devices, rows=rows, seq_len=seq_len, remat=remat, loss_chunk=chunk)
    assert 0.75 < sum(held.values()) / 1e9 / compiled < 1.0
    assert held["weights"] + held["moments"] == pytest.approx(12 * sum(parameter_count(cfg).values()) / devices)


# ---------------------------------------------------------------- decoding


def test_decoding_a_row_reads_the_weights_and_a_large_batch_multiplies():
    cfg = shapes.architecture(7e9, 32000)
    parts = parameter_count(cfg)
    one = roofline.decode(cfg, V5E, 8, batch=1, context=2048)
    assert one.weight_bytes == 2 * (sum(parts.values()) - parts["embedding"])
    assert one.cache_bytes == 2 * cfg.n_layers * 8 * 128 * 2048 * 2  # keys and values of 8 kv heads
    assert one.bound == "memory" and one.seconds == pytest.approx((one.weight_bytes + one.cache_bytes) / (8 * 819e9))
    assert one.flops == pytest.approx(2 * (sum(parts.values()) - parts["embedding"] - parts["norms"])
                                      + 4 * cfg.n_layers * cfg.d_model * 2048)
    many = roofline.decode(cfg, V5E, 8, batch=2048, context=16)
    assert many.bound == "compute" and 2048 / many.seconds > 100 / one.seconds
    assert not roofline.decode(cfg, V5E, 1, batch=64, context=4096).fits


def test_a_window_bounds_the_cache_and_experts_are_read_as_rows_meet_them():
    windowed = dataclasses.replace(SMALL, window=128)
    assert roofline.decode(windowed, V5E, 1, batch=4, context=4096).cache_bytes == \
        roofline.decode(SMALL, V5E, 1, batch=4, context=128).cache_bytes
    sparse = dataclasses.replace(SMALL, moe=MoEConfig(experts=8, top_k=2))
    read = [roofline.decode(sparse, V5E, 1, batch=b, context=1).weight_bytes for b in (1, 4, 10_000)]
    parts = parameter_count(sparse)
    rest = 2 * (sum(parts.values()) - parts["embedding"] - parts["experts"])
    assert read == pytest.approx([rest + 2 * parts["experts"] * s for s in (1 / 4, 1 - 0.75**4, 1)])


def test_the_largest_size_within_a_latency():
    def shape(n):
        return shapes.architecture(n, 32000)

    n = roofline.largest(0.010, shape, 1e7, V5E, 8, batch=1, context=2048)
    assert roofline.decode(shape(n), V5E, 8, batch=1, context=2048).seconds <= 0.010
    assert roofline.decode(shape(n * 1.05), V5E, 8, batch=1, context=2048).seconds > 0.010
    assert roofline.largest(1e-9, shape, 1e7, V5E, 8, batch=1, context=2048) == 0
    held = roofline.largest(1e9, shape, 1e7, V5E, 1, batch=1, context=2048)  # endless time: what fits the memory
    assert 0.95 < roofline.decode(shape(held), V5E, 1, batch=1, context=2048).held_bytes / V5E.memory_bytes <= 1


# ---------------------------------------------------------------- failures


def test_young_and_daly_are_where_goodput_is_highest():
    save, restart, between = 60, 300, 20_000
    best = max(range(200, 6000), key=lambda t: failures.goodput(t, save, restart, between))
    assert failures.daly(save, between) == pytest.approx(best, rel=0.005)
    assert failures.young(save, between) == math.sqrt(2 * save * between) == pytest.approx(best, rel=0.06)
    assert failures.daly(3 * between, between) == between


def test_goodput_is_that_of_a_simulated_run():
    work, save, restart, between, rng = 1500.0, 60.0, 300.0, 10_000.0, np.random.default_rng(0)
    done = spent = 0.0
    left = rng.exponential(between)  # until the next failure
    while done < 3e7:
        if left >= work + save:
            left, spent, done = left - work - save, spent + work + save, done + work
            continue
        spent, left = spent + left, rng.exponential(between)
        while left < restart:  # a restart may fail too
            spent, left = spent + left, rng.exponential(between)
        left, spent = left - restart, spent + restart
    assert failures.goodput(work, save, restart, between) == pytest.approx(done / spent, rel=0.01)


def test_more_chips_fail_more_often():
    few, many = (failures.expect(30 * 86400, chips, 50_700, 60, 600) for chips in (16, 16384))
    assert few.between == pytest.approx(1024 * many.between) and few.goodput > 0.98 > 0.9 > many.goodput > 0.5
    assert many.wall == pytest.approx(30 * 86400 / many.goodput) and many.restarts == pytest.approx(many.wall / many.between)
    assert failures.expect(86400, 10**9, 50_700, 60, 600).goodput == 0.0


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("vocab_size", [256, 32_000, 128_256])
def test_an_architecture_has_the_count_and_round_widths(vocab_size):
    for n in np.geomspace(max(3e6, 2.5 * shapes.smallest(vocab_size)), 2e12, 24):
        cfg = shapes.architecture(n, vocab_size)
        assert sum(parameter_count(cfg).values()) == pytest.approx(n, rel=0.02)
        assert cfg.d_model % 128 == 0 and cfg.ff_width % 128 == 0 and cfg.head_dim in (64, 128)
        if n > 2e8:
            assert 50 < cfg.d_model / cfg.n_layers < 160 and 2.2 < cfg.ff_width / cfg.d_model < 3.3
            assert 4 <= cfg.kv_heads <= 8 if cfg.n_heads >= 16 else cfg.kv_heads == cfg.n_heads


def test_small_models_share_the_embedding_with_the_head_unless_told():
    assert shapes.architecture(2e7, 32_000).tied and not shapes.architecture(7e9, 32_000).tied
    assert not shapes.architecture(2e7, 32_000, tied=False).tied
    with pytest.raises(UserError, match=r"parameters=1e\+06.*from 4,260,224 to 1e13"):
        shapes.architecture(1e6, 32_000)
