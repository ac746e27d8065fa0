"""Adapters: nothing at first, A B times alpha / rank after that, and gradients of them alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx

from jaxllm.mesh import MeshConfig
from jaxllm.model.config import LoRAConfig, ModelConfig, MoEConfig
from jaxllm.model.heads import LanguageModel
from jaxllm.model.lora import adapters, merged
from jaxllm.partition import make_mesh
from jaxllm.train.stability import leaf_names
from jaxllm.train.state import placed_shapes, structure

LORA = LoRAConfig(rank=4, alpha=8.0)
SPARSE = ModelConfig(d_model=32, n_layers=2, n_heads=4, d_ff=64, vocab_size=64, moe=MoEConfig(experts=2, shared=1, every=2))


def drawn(abstract, seed: int):
    """Returns normal numbers in the places of these shapes, the same on every mesh."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jax.device_put(rng.normal(size=a.shape).astype(a.dtype) * 0.2, a.sharding), abstract)


def weights_and_adapters(devices: int = 1, model=toy.MODEL, **axes):
    mesh = make_mesh(MeshConfig(**({"data": 1} | axes)), jax.devices()[:devices])
    graph, abstract = structure(LanguageModel, model, mesh)
    base = drawn(abstract, 0)
    make = partial(adapters, cfg=LORA, key=jax.random.key(0))
    return mesh, graph, base, make, placed_shapes(lambda: make(base), mesh)


@pytest.fixture(scope="module")
def one():
    return weights_and_adapters()


def test_at_the_start_the_weights_are_the_bases_exactly(one):
    _, _, base, make, _ = one
    lora = make(base)
    assert any(np.any(np.asarray(x)) for x in jax.tree.leaves(lora)), "A is drawn"
    before, after = toy.leaves(base), toy.leaves(merged(base, lora, LORA))
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)


def test_the_sum_is_alpha_over_rank_times_the_product_of_each_layer(one):
    _, _, base, _, abstract = one
    lora = drawn(abstract, 1)
    a, b, before = toy.leaves(lora), toy.leaves(base), toy.leaves(merged(base, lora, LORA))
    name, (D, H, K, G) = "trunk.blocks_L.attn", (32, 8, 2, 4)
    for layer in range(toy.MODEL.n_layers):
        added = np.zeros((D, K, G, H))
        a_DR, b_RKGH = a[f"{name}.qkv_DKGH.a"][layer], a[f"{name}.qkv_DKGH.b"][layer]
        for r in range(LORA.rank):
            added += a_DR[:, r, None, None, None] * b_RKGH[r][None]
        np.testing.assert_allclose(before[f"{name}.qkv_DKGH"][layer], b[f"{name}.qkv_DKGH"][layer] + 8.0 / 4 * added, atol=1e-5)
        out = np.zeros((4, H, D))
        a_NHR, b_RD = a[f"{name}.out_NHD.a"][layer], a[f"{name}.out_NHD.b"][layer]
        for r in range(LORA.rank):
            out += a_NHR[:, :, r, None] * b_RD[r][None, None]
        np.testing.assert_allclose(before[f"{name}.out_NHD"][layer], b[f"{name}.out_NHD"][layer] + 8.0 / 4 * out, atol=1e-5)


def test_what_is_adapted_is_what_the_settings_name(one):
    _, _, base, _, _ = one

    def names(**settings):
        made = jax.eval_shape(lambda: adapters(base, LoRAConfig(rank=2, **settings), jax.random.key(0)))
        return {name.split(".")[-2] for name in leaf_names(made)}

    attention, mlp = {"qkv_DKGH", "out_NHD"}, {"gate_DF", "up_DF", "down_FD"}
    assert names() == attention | mlp and names(mlp=False) == attention and names(attention=False) == mlp


def test_experts_and_routers_are_left_alone():
    _, _, base, make, abstract = weights_and_adapters(model=SPARSE)
    lora, before = drawn(abstract, 1), toy.leaves(base)
    after = toy.leaves(merged(base, lora, LORA))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    sparse = {name for name in before if "expert" in name.lower() or "router" in name or "EDF" in name or "EFD" in name}
    assert sparse and not changed & sparse
    assert any("shared" in name or "gate_DF" in name for name in changed), "the dense feed-forwards are adapted"


def loss_of(graph, params, token_BT):
    model = nnx.merge(graph, params)
    pos_BT = jnp.broadcast_to(jnp.arange(token_BT.shape[1])[None], token_BT.shape)
    return jnp.mean(jnp.square(model.hidden(token_BT, pos_BT) @ model.head_DV()))


def gradients(devices: int = 1, **axes):
    mesh, graph, base, _, abstract = weights_and_adapters(devices, **axes)
    token_BT = np.random.default_rng(0).integers(0, 64, (4, 8)).astype(np.int32)
    with jax.set_mesh(mesh):
        f = jax.jit(jax.value_and_grad(lambda lora, base: loss_of(graph, merged(base, lora, LORA), token_BT)))
        return f(drawn(abstract, 1), base)


def test_gradients_are_of_the_adapters_and_the_same_on_a_mesh():
    loss, grads = gradients()
    assert {name.rsplit(".")[-1] for name in toy.leaves(grads)} == {"a", "b"}
    assert all(np.abs(g).max() > 0 for g in toy.leaves(grads).values())
    on_mesh, theirs = gradients(4, fsdp=2, tensor=2)
    assert float(on_mesh) == pytest.approx(float(loss), rel=1e-5)
    worst, where = toy.worst(theirs, grads)
    assert worst < 1e-5, where
