"""Schedules equal their closed forms at every step; optimizers decay what they should and follow the loss when asked."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx

from jaxllm.train.config import OptimConfig
from jaxllm.train.optim import decayed, make_optimizer, muon_dimensions
from jaxllm.train.schedules import make_schedule

STEPS, WARM, PEAK = 120, 20, 0.5
CLOSED_FORMS = {  # s: steps since the warm-up ended; n: steps after it
    "constant": lambda s, n: PEAK,
    "linear": lambda s, n: PEAK + (0.1 * PEAK - PEAK) * min(s / n, 1),
    "cosine": lambda s, n: 0.1 * PEAK + 0.9 * PEAK * (1 + math.cos(math.pi * min(s / n, 1))) / 2,
    "wsd": lambda s, n: PEAK if s <= n - 24 else PEAK * (1 - 0.9 * min((s - (n - 24)) / 24, 1)),
    "inverse_sqrt": lambda s, n: PEAK * math.sqrt(WARM / (WARM + s)),
    "step": lambda s, n: PEAK * 0.5 ** (s // 30),
    "exponential": lambda s, n: PEAK * 0.5 ** (s / 30),
    "plateau": lambda s, n: PEAK,
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_schedule_equals_its_closed_form_at_every_step(name):
    rate = make_schedule(OptimConfig(lr=PEAK, schedule=name, warmup=WARM, step_every=30), STEPS)
    got = jax.jit(jax.vmap(rate))(jnp.arange(STEPS + 30))
    want = [PEAK * (step + 1) / WARM if step < WARM else CLOSED_FORMS[name](step - WARM, STEPS - WARM) for step in range(STEPS + 30)]
    np.testing.assert_allclose(got, want, rtol=2e-6)


def test_without_warmup_the_first_step_has_the_peak():
    for name in CLOSED_FORMS:
        assert make_schedule(OptimConfig(lr=PEAK, schedule=name), STEPS)(0) == PEAK


def plateau_reference(losses, factor, patience, threshold, least):
    scale, best, waited, out = 1.0, math.inf, 0, []
    for loss in losses:
        if loss < best * (1 - threshold):
            best, waited = loss, 0
        else:
            waited += 1
        if waited == patience:
            scale, waited = max(scale * factor, least), 0
        out.append(scale)
    return out


def test_plateau_lowers_the_rate_when_the_loss_stops_falling():
    cfg = OptimConfig(name="sgd", b1=0.0, lr=1.0, clip=0, weight_decay=0, schedule="plateau", factor=0.5, patience=3, final=0.1)
    optimizer = make_optimizer(cfg, 100)
    params = nnx.State({"w": nnx.Param(jnp.zeros(2), axes=("norm",))})
    state = optimizer.tx.init(params)
    losses = [5, 4, 3, *[3.0] * 8, 2, *[2.5] * 12]
    update = jax.jit(optimizer.tx.update)
    got, rates = [], []
    for step, loss in enumerate(losses):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params, value=jnp.float32(loss))
        got.append(-float(jax.tree.leaves(updates)[0][0]))
        rates.append(float(optimizer.rate(step, state)))
    want = plateau_reference(losses, 0.5, 3, cfg.threshold, 0.1)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(rates, want, rtol=1e-6)
    assert min(want) == 0.1  # the test reaches the floor


@pytest.mark.parametrize("asked", [False, True])
def test_norms_and_embeddings_do_not_decay_unless_asked(asked):
    params = toy.program().abstract.params
    shrinks = {name: bool(v) for name, v in toy.leaves(decayed(params, OptimConfig(decay_embeddings=asked))).items()}
    assert {name for name, yes in shrinks.items() if not yes} == {name for name in shrinks if name.endswith("scale_D")} | (
        set() if asked else {"trunk.embed_VD"})


def test_weight_decay_is_decoupled_and_times_the_rate():
    cfg = OptimConfig(name="adamw", lr=0.1, weight_decay=0.5, schedule="constant", clip=0)
    optimizer = make_optimizer(cfg, 10)
    params = nnx.State({"w": nnx.Param(jnp.full(3, 2.0), axes=("embed",))})
    updates, _ = optimizer.tx.update(jax.tree.map(jnp.zeros_like, params), optimizer.tx.init(params), params, value=0.0)
    np.testing.assert_allclose(jax.tree.leaves(updates)[0], -0.1 * 0.5 * 2.0, rtol=1e-6)  # the gradient is zero


def test_clipping_is_by_the_global_norm():
    optimizer = make_optimizer(OptimConfig(name="sgd", b1=0.0, lr=1.0, clip=1.0, weight_decay=0, schedule="constant"), 10)
    params = nnx.State({n: nnx.Param(jnp.zeros(2), axes=("norm",)) for n in "ab"})
    grads = jax.tree.map(lambda p: jnp.array([3.0, 4.0]), params)
    updates, _ = optimizer.tx.update(grads, optimizer.tx.init(params), params, value=0.0)
    np.testing.assert_allclose(jax.tree.leaves(updates)[0], -np.array([3.0, 4.0]) / math.sqrt(50), rtol=1e-6)


def test_muon_takes_block_matrices():
    dims = jax.tree_util.tree_leaves_with_path(
        muon_dimensions(toy.program().abstract.params), is_leaf=lambda x: hasattr(x, "reduction_axis"))
    found = {toy_name(path): (d.reduction_axis, d.output_axis) for path, d in dims}
    assert found == {
        "trunk.blocks_L.attn.qkv_DKGH": ((1,), (2, 3, 4)), "trunk.blocks_L.attn.out_NHD": ((1, 2), (3,)),
        "trunk.blocks_L.mlp.gate_DF": ((1,), (2,)), "trunk.blocks_L.mlp.up_DF": ((1,), (2,)),
        "trunk.blocks_L.mlp.down_FD": ((1,), (2,)),
    }


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adafactor", "muon"))])
def test_every_optimizer_learns_a_fixed_batch(name):
    cfg = OptimConfig(name=name, lr={"sgd": 0.5, "lion": 2e-3}.get(name, 1e-2), schedule="constant")
    losses = toy.run(toy.program(optim=cfg), [toy.batch()] * 20)[1]
    assert losses[-1] < 0.8 * losses[0]


def toy_name(path):
    from jaxllm.partition import leaf_name

    return leaf_name(path)
