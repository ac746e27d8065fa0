"""What a compiled step sends: how often in a layer, over which axis, and what goes from slice to slice."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import toy
from jax.sharding import PartitionSpec

from jaxllm.model.split import gain, on_parts, reduce_scatter
from jaxllm.plan import collectives, hlo


def sent(n_layers: int = 2, **mesh) -> list[collectives.Collective]:
    prog = toy.program(dataclasses.replace(toy.MODEL, n_layers=n_layers), devices=8, **mesh)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in toy.batch().items()}
    with jax.set_mesh(prog.mesh):
        text = prog.train_step.lower(prog.abstract, batch).compile().as_text()
    return collectives.read(hlo.parse(text), dict(prog.mesh.shape))


def a_layer(**mesh) -> dict[str, int]:
    """Returns the collectives of one layer, forward and backward: what four layers have more than three."""
    counts = []
    for n in (3, 4):
        one: dict[str, int] = {}
        for c in sent(n, **mesh):
            one[f"{c.axis} {c.kind}"] = one.get(f"{c.axis} {c.kind}", 0) + c.times
        counts.append(one)
    return {name: n - counts[0].get(name, 0) for name, n in counts[1].items() if n != counts[0].get(name, 0)}


WEIGHTS = 5  # of a layer: queries, keys and values in one; out; gate; up; down


@pytest.mark.parametrize(("mesh", "counts"), [
    # XLA's CPU compiler takes the forward's gathered weights for the backward too; on TPU they are gathered again
    pytest.param({"fsdp": 8}, {"fsdp all-gather": WEIGHTS, "fsdp reduce-scatter": WEIGHTS}, id="fsdp"),
    # Megatron's four reductions, two forward and two backward, each as a reduce-scatter and a gathering of positions
    pytest.param({"data": 4, "tensor": 2}, {"tensor all-gather": 4, "tensor reduce-scatter": 4}, id="tensor"),
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp all-gather": WEIGHTS, "fsdp reduce-scatter": WEIGHTS,
                 "tensor all-gather": 4, "tensor reduce-scatter": 4}, id="all three", marks=pytest.mark.slow),
])
def test_a_layer_sends_no_more_than_it_must(mesh, counts):
    """One all-gather and one reduce-scatter for each weight over `fsdp`, Megatron's count over `tensor`, and nothing else: sums
    over `data` and of the norms' gains are joined to one for all layers."""
    assert a_layer(**mesh) == counts


@pytest.mark.parametrize("mesh", [
    {"data": 4}, {"fsdp": 4}, pytest.param({"data": 2, "tensor": 2}, marks=pytest.mark.slow), {"fsdp": 2, "tensor": 2},
], ids=lambda m: " ".join(f"{a}{n}" for a, n in m.items()))
def test_between_slices_only_gradients_are_summed_and_only_over_data(mesh):
    """The hierarchical sum: within a slice first, so that a device sends its own part of the gradients to its likes."""
    found = sent(slices=2, **mesh)
    crossing = [c for c in found if len({place // 4 for place in c.group}) > 1]
    assert {(c.axis, c.kind) for c in crossing} == {("data", "all-reduce")}
    split = math.prod(mesh.values()) // mesh.get("data", 1)
    params = jax.tree.leaves(toy.program().abstract.params)
    gains = sum(p.size for p in params if p.ndim <= 2 and p.shape[-1] == 32 and p.shape[0] in (2, 32))
    own = 4 * (sum(p.size for p in params) - gains) / split + 4 * gains
    scalars = 2 * 4  # the loss and the number of targets
    assert sum(c.payload * c.times for c in crossing) == own + scalars
    assert all(c.times == 1 for c in crossing)


def test_a_chunk_of_logits_sums_the_heads_gradient_and_sends_nothing_else():
    """There are three chunks here. XLA's CPU compiler gathers the head once before them; on TPU each gathers it."""
    found = [(c.kind, c.times, c.payload) for c in sent(fsdp=8) if c.times > 1]
    assert found == [("reduce-scatter", 3, 4 * toy.MODEL.d_model * toy.MODEL.vocab_size)]


def test_gains_have_the_gradient_of_every_position_on_every_mesh():
    x_BTD = np.random.default_rng(0).normal(size=(8, 24, 32)).astype(np.float32)

    def gradients(devices, **mesh):
        with jax.set_mesh(toy.program(devices=devices, **mesh).mesh):
            of_all = jax.jit(jax.grad(lambda x_BTD, scale, bias: (gain(x_BTD, scale, bias) ** 3).sum(), argnums=(0, 1, 2)))
            return of_all(x_BTD, np.linspace(0.5, 2, 32, dtype=np.float32), np.linspace(-1, 1, 32, dtype=np.float32))

    one = gradients(1)
    for mesh in ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 4}):
        for a, b in zip(gradients(8, **mesh), one, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_a_sum_in_phases_leaves_each_device_the_same_part():
    def parts(phases):
        def local(x):
            return reduce_scatter(x, 0, ("fsdp",), phases)

        with jax.set_mesh(toy.program(devices=8, fsdp=8).mesh):
            split = PartitionSpec("fsdp")
            fun = jax.jit(lambda x: on_parts(local, (split,), split)(x))
            return fun(x), jax.jit(jax.grad(lambda x: (fun(x) ** 2).sum()))(x)

    x = np.random.default_rng(0).normal(size=(8 * 16, 3)).astype(np.float32)
    for phased, whole in zip(parts((("fsdp", (2, 4)),)), parts(()), strict=True):
        np.testing.assert_allclose(phased, whole, rtol=1e-5, atol=1e-5)
