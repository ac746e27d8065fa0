"""The CPU attention equals the plain formula, whatever the length, the heads, the documents and the window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy.testing import assert_allclose

from jaxllm.model.attention_cpu import BLOCK, causal_chunked


def reference(q_BTNH, k_BTKH, v_BTKH, doc_BT=None, window=None):
    B, T, N, H = q_BTNH.shape
    k_BSNH, v_BSNH = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k_BTKH, v_BTKH))
    t, s = np.arange(T)[:, None], np.arange(T)[None, :]
    seen_BTS = jnp.asarray((s <= t) & (s > t - (window or T)))[None]
    if doc_BT is not None:
        seen_BTS = seen_BTS & (doc_BT[:, :, None] == doc_BT[:, None, :])
    score_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / np.sqrt(H)
    p_BNTS = jax.nn.softmax(jnp.where(seen_BTS[:, None], score_BNTS, -np.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", p_BNTS, v_BSNH)


def inputs(T, N, K, B=2, H=8, dtype=jnp.float32):
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)
    keys = jax.random.split(jax.random.key(T), 4)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def documents(T, B=2):
    cuts = np.random.default_rng(0).random((B, T)) < 5 / T
    return jnp.asarray(np.cumsum(cuts, axis=1), jnp.int32)


def value_and_grads(attend, q, k, v, do):
    o, pull = jax.vjp(attend, q, k, v)
    return o, *pull(do)


@pytest.mark.parametrize("window", [None, 1, 50, BLOCK + 7])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("T", "N", "K"), [(2 * BLOCK, 4, 4), (BLOCK + 33, 4, 2), (17, 6, 1), (1, 2, 2)])
def test_equals_the_formula(T, N, K, packed, window):
    q, k, v, do = inputs(T, N, K)
    doc_BT = documents(T) if packed else None
    ours = jax.jit(lambda *a: value_and_grads(lambda *x: causal_chunked(*x, doc_BT, window=window), *a))(q, k, v, do)
    plain = jax.jit(lambda *a: value_and_grads(lambda *x: reference(*x, doc_BT, window), *a))(q, k, v, do)
    for name, a, b in zip(("o", "dq", "dk", "dv"), ours, plain, strict=True):
        assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=name)


def test_large_scores_do_not_overflow():
    q, k, v, do = inputs(BLOCK + 1, 2, 2)
    for a in value_and_grads(causal_chunked, 1e3 * q, 1e3 * k, v, do):
        assert np.isfinite(a).all()


def test_bfloat16_keeps_its_dtype_and_sums_in_float32():
    q, k, v, do = inputs(BLOCK + 9, 4, 2, dtype=jnp.bfloat16)
    ours = value_and_grads(causal_chunked, q, k, v, do)
    plain = value_and_grads(reference, *(x.astype(jnp.float32) for x in (q, k, v, do)))
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.abs(a.astype(jnp.float32) - b).max() < 0.02 * np.abs(b).max()


def test_sharded_over_batch_and_heads_equals_one_device():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    place = NamedSharding(mesh, PartitionSpec("data", None, "tensor", None))
    args = inputs(BLOCK + 5, 4, 2, B=4)
    doc_BT = documents(BLOCK + 5, B=4)
    step = jax.jit(lambda *a: value_and_grads(lambda *x: causal_chunked(*x, doc_BT, window=40), *a))
    split = jax.jit(step, in_shardings=place, out_shardings=place)
    for a, b in zip(split(*(jax.device_put(x, place) for x in args)), step(*args), strict=True):
        assert_allclose(a, b, atol=1e-5)
    compiled = split.lower(*args).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert f" {collective}(" not in compiled, "each device holds whole heads of whole rows: nothing to send"
