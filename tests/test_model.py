"""The model is the one in the papers, whichever way a platform spells it."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx

from jaxllm.model.config import ModelConfig
from jaxllm.model.formulation import PLATFORMS, REFERENCE, Formulation
from jaxllm.model.heads import LanguageModel
from jaxllm.model.layers import gated, rope, rotation

FORMS = {"cpu": PLATFORMS["cpu"], "reference": REFERENCE, "cpu scanned": dataclasses.replace(PLATFORMS["cpu"], unroll=False),
         "cpu unflattened": dataclasses.replace(PLATFORMS["cpu"], flatten=False)}


def logits(cfg: ModelConfig, form: Formulation, batch, seed=0):
    model = LanguageModel(cfg, form, rngs=nnx.Rngs(seed))
    run = jax.jit(lambda params, b: (lambda m: m.hidden(b["token_BT"], b["pos_BT"], b["doc_BT"]) @ m.head_DV())(
        nnx.merge(graph, params)))
    graph, params = nnx.split(model)
    return np.asarray(run(params, batch)), toy.leaves(params)


def llama(cfg: ModelConfig, w: dict, token_T, pos_T, doc_T):
    """The decoder of Touvron et al. 2023 for one row, in NumPy and float64, a head at a time."""
    H, K, G, T = cfg.head_dim, cfg.kv_heads, cfg.n_heads // cfg.kv_heads, len(token_T)
    w = {name: x.astype(np.float64) for name, x in w.items()}

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * scale

    def rotate(x):  # pairs (i, i + H/2) turn by pos / theta^(2i/H)
        out = np.empty_like(x)
        for i in range(H // 2):
            angle = pos_T * cfg.rope_theta ** (-2 * i / H)
            out[:, i] = x[:, i] * np.cos(angle) - x[:, i + H // 2] * np.sin(angle)
            out[:, i + H // 2] = x[:, i + H // 2] * np.cos(angle) + x[:, i] * np.sin(angle)
        return out

    x = w["trunk.embed_VD"][token_T]
    sees = np.array([[s <= t and doc_T[s] == doc_T[t] and (cfg.window is None or t - s < cfg.window) for s in range(T)]
                     for t in range(T)])
    for layer in range(cfg.n_layers):
        b = {n.split("blocks_L.")[1]: v[layer] for n, v in w.items() if "blocks_L" in n}
        h, out = norm(x, b["attn_norm.scale_D"]), 0
        for n in range(cfg.n_heads):
            q, k, v = (h @ b["attn.qkv_DKGH"][:, n // G, g] for g in (n % G, G, G + 1))
            score = np.where(sees, rotate(q) @ rotate(k).T / math.sqrt(H), -np.inf)
            p = np.exp(score - score.max(-1, keepdims=True))
            out = out + (p / p.sum(-1, keepdims=True)) @ v @ b["attn.out_NHD"][n]
        x = x + out
        h = norm(x, b["mlp_norm.scale_D"])
        gate, up = h @ b["mlp.gate_DF"], h @ b["mlp.up_DF"]
        x = x + gate / (1 + np.exp(-gate)) * up @ b["mlp.down_FD"]
    head = w["trunk.embed_VD"].T if cfg.tied else w["out_DV"]
    assert K * G == cfg.n_heads
    return norm(x, w["trunk.norm.scale_D"]) @ head


@pytest.mark.parametrize(("change", "T"), [({}, 24), ({"tied": True}, 24), ({"window": 5}, 24), ({"n_kv_heads": None}, 24),
                                           ({"n_kv_heads": 1, "n_layers": 1}, 128)])
def test_equals_a_llama_written_from_the_paper(change, T):
    cfg, batch = dataclasses.replace(toy.MODEL, **change), toy.batch(2, T=T)
    got, weights = logits(cfg, PLATFORMS["cpu"], batch)
    for row in range(2):
        want = llama(cfg, weights, batch["token_BT"][row], batch["pos_BT"][row], batch["doc_BT"][row])
        np.testing.assert_allclose(got[row], want, atol=2e-5)


@pytest.mark.parametrize("change", [{"activation": a} for a in ("geglu", "gelu", "relu2")] + [{"norm": "layernorm"}, {"position": "none"}])
@pytest.mark.parametrize("form", ["cpu scanned", "cpu unflattened", "cpu"])
def test_every_formulation_computes_the_same(change, form):
    cfg, batch = dataclasses.replace(toy.MODEL, **change), toy.batch(2)
    got, want = logits(cfg, FORMS[form], batch)[0], logits(cfg, REFERENCE, batch)[0]
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert np.abs(want - logits(toy.MODEL, REFERENCE, batch)[0]).max() > 1e-3  # the knob does something


def test_own_derivatives_are_those_of_the_formulas():
    x_BTNH, d_BTNH, other_BTNH = (jax.random.normal(jax.random.key(i), (2, 6, 3, 8)) for i in range(3))
    angles = rotation(jnp.arange(6)[None].repeat(2, 0), 4, 100.0, 6)
    for own, *given in ((lambda x: rope(x, *angles), x_BTNH), (partial(gated, jax.nn.silu), x_BTNH, other_BTNH)):
        plain = {1: lambda x: rope.__wrapped__(x, *angles), 2: lambda gate, up: jax.nn.silu(gate) * up}[len(given)]
        for ours, theirs in zip(jax.vjp(own, *given)[1](d_BTNH), jax.vjp(plain, *given)[1](d_BTNH), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_position_beyond_the_longest_is_not_taken_for_another():
    cos_BTH, _ = rotation(jnp.array([[5, 6]]), 4, 100.0, 6)
    assert np.isfinite(cos_BTH[0, 0]).all() and np.isnan(cos_BTH[0, 1]).all()


def test_rope_only_sees_differences_of_positions():
    batch, far = toy.batch(2), toy.batch(2)
    far["pos_BT"] = far["pos_BT"] + 37
    np.testing.assert_allclose(logits(toy.MODEL, PLATFORMS["cpu"], far)[0], logits(toy.MODEL, PLATFORMS["cpu"], batch)[0], atol=2e-5)
    stretched = batch | {"pos_BT": batch["pos_BT"] * 2}
    assert np.abs(logits(toy.MODEL, PLATFORMS["cpu"], stretched)[0] - logits(toy.MODEL, PLATFORMS["cpu"], batch)[0]).max() > 1e-3


def test_bfloat16_compute_stays_near_float32_and_leaves_float32_gradients():
    from jaxllm.partition import batch_sharding
    from jaxllm.train.step import Objective, loss_sum

    prog = toy.program()
    losses = {}
    with jax.set_mesh(prog.mesh):
        params, batch = prog.init().params, jax.device_put(toy.batch(), batch_sharding(prog.mesh))
        for dtype in ("float32", "bfloat16"):
            objective = Objective(prog.graph, np.dtype(dtype) if dtype == "float32" else jax.numpy.dtype(dtype), 10, 0.0, 0.0, 0.0)
            (loss, n), grads = jax.jit(jax.value_and_grad(lambda p, o=objective: loss_sum(o, p, batch), has_aux=True))(params)
            assert loss.dtype == n.dtype == np.float32
            assert all(g.dtype == np.float32 for g in jax.tree.leaves(grads))
            losses[dtype] = float(loss / n)
    assert losses["bfloat16"] != losses["float32"]
    assert abs(losses["bfloat16"] - losses["float32"]) < 0.02


@pytest.mark.parametrize("init", ["fan_in", "normal"])
def test_initial_weights_have_the_stated_spread(init):
    cfg = ModelConfig(d_model=128, n_layers=8, n_heads=4, vocab_size=512, init=init)
    weights = toy.leaves(nnx.state(LanguageModel(cfg, REFERENCE, rngs=nnx.Rngs(0)), nnx.Param))
    base = 128**-0.5 if init == "fan_in" else 0.02
    assert weights["trunk.blocks_L.attn.qkv_DKGH"].std() == pytest.approx(base, rel=0.02)
    assert weights["trunk.blocks_L.attn.out_NHD"].std() == pytest.approx(base / math.sqrt(16), rel=0.02)
    assert not np.array_equal(weights["trunk.blocks_L.mlp.down_FD"][0], weights["trunk.blocks_L.mlp.down_FD"][1])


def test_an_unknown_axis_and_a_mesh_axis_used_twice_are_errors():
    from jaxllm.partition import spec

    with pytest.raises(ValueError, match="unknown logical axis 'embd'"):
        spec("embd")
    with pytest.raises(ValueError, match="use a mesh axis twice"):
        spec("mlp", "vocab")
