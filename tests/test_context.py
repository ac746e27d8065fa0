"""A sequence over several devices: each has the same part of the work, and attention is that of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.mesh import MeshConfig
from jaxllm.model.attention import dense_masked
from jaxllm.model.formulation import for_platform
from jaxllm.parallel.context import check_length, order, over_context
from jaxllm.partition import make_mesh


@pytest.mark.parametrize("n", [1, 2, 4])
def test_every_device_has_the_same_part_of_the_causal_triangle(n):
    places = order(48, n).reshape(n, -1)
    assert sorted(places.ravel()) == list(range(48))
    seen = [int(np.sum(part + 1)) for part in places]
    assert len(set(seen)) == 1


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("method", ["gather", "ring"])
def test_attention_in_parts_is_attention(method, window):
    n, (B, T, N, K, H) = 4, (2, 32, 4, 2, 8)
    q, k, v, d = (jax.random.normal(jax.random.key(i), (B, T, heads, H)) for i, heads in enumerate((N, K, K, N)))
    doc_BT = jnp.array([[1] * 11 + [2] * 21, [1] * 30 + [0] * 2], jnp.int32)
    at = order(T, n)

    def value_and_grads(body, q, k, v, doc_BT, d):
        o, pull = jax.vjp(lambda q, k, v: body(q, k, v, doc_BT, window=window), q, k, v)
        return o, *pull(d)

    want = jax.jit(lambda *a: value_and_grads(dense_masked, *a))(q, k, v, doc_BT, d)
    form = over_context(for_platform("cpu"), n, method)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=n), jax.devices()[:n])):
        found = jax.jit(lambda *a: value_and_grads(form.split_attention, *a))(*(x[:, at] for x in (q, k, v, doc_BT, d)))
    for ours, theirs in zip(found, want, strict=True):
        np.testing.assert_allclose(ours, theirs[:, at], rtol=1e-5, atol=2e-6)


def test_a_length_that_does_not_divide_is_told():
    mesh = make_mesh(MeshConfig(data=2, context=4))
    with pytest.raises(UserError, match=r"data\.seq_len=100 is not divisible by 8, twice mesh\.context=4; nearest: 96"):
        check_length(100, mesh)
    check_length(104, mesh)
