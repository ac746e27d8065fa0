"""The chunked loss equals the formula on whole logits, and never holds whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy.testing import assert_allclose

from jaxllm.train.loss import next_token_loss, token_logps


def reference(x_BTD, head_DV, target_BT, weight_BT, z_loss=0.0, label_smoothing=0.0):
    logp_BTV = jax.nn.log_softmax(x_BTD @ head_DV, axis=-1)
    log_z_BT = jax.nn.logsumexp(x_BTD @ head_DV, axis=-1)
    wanted_BTV = jax.nn.one_hot(target_BT, head_DV.shape[1]) * (1 - label_smoothing) + label_smoothing / head_DV.shape[1]
    return jnp.sum(weight_BT * (z_loss * log_z_BT**2 - jnp.sum(wanted_BTV * logp_BTV, axis=-1))), jnp.sum(weight_BT)


def inputs(T=37, B=4, D=16, V=64, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    x_BTD, head_DV = jax.random.normal(keys[0], (B, T, D), dtype), jax.random.normal(keys[1], (D, V), dtype)
    weight_BT = jnp.round(jax.random.uniform(keys[2], (B, T)) * 4) / 2  # zeros among them
    return x_BTD, head_DV, jax.random.randint(keys[3], (B, T), 0, V), weight_BT


def value_and_grads(loss, *args):
    (total, n), grads = jax.value_and_grad(loss, argnums=(0, 1, 3), has_aux=True)(*args)
    return total, n, *grads


def assert_close(ours, plain, rtol):
    for name, a, b in zip(("loss", "n_tokens", "d_x", "d_head", "d_weight"), ours, plain, strict=True):
        assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.0), (1e-2, 0.0), (0.0, 0.1), (1e-2, 0.1)])
@pytest.mark.parametrize(("T", "chunk"), [(32, 8), (37, 8), (37, 37), (37, 1000), (1, 8), (5, 4)])
def test_equals_the_formula_on_whole_logits(T, chunk, z_loss, smoothing):
    args, how = inputs(T), dict(z_loss=z_loss, label_smoothing=smoothing)
    ours = jax.jit(lambda *a: value_and_grads(lambda *x: next_token_loss(*x, chunk=chunk, **how), *a))(*args)
    plain = jax.jit(lambda *a: value_and_grads(lambda *x: reference(*x, **how), *a))(*args)
    assert_close(ours, plain, 1e-6)
    assert_allclose(next_token_loss(*args, chunk=chunk, **how)[0], plain[0], rtol=1e-6)


def test_tokens_of_weight_zero_give_nothing():
    x_BTD, head_DV, target_BT, _ = inputs()
    loss, n, d_x, d_head, _ = value_and_grads(
        lambda *x: next_token_loss(*x, chunk=8), x_BTD, head_DV, target_BT, jnp.zeros(target_BT.shape, jnp.float32))
    assert loss == n == 0 and not d_x.any() and not d_head.any()


def test_the_gradient_follows_what_is_done_to_the_loss():
    args = inputs()
    ours, plain = (jax.grad(lambda x, f=f: jnp.square(f(x, *args[1:])[0]))(args[0])
                   for f in (lambda *a: next_token_loss(*a, chunk=8), reference))
    assert_allclose(ours, plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())


def test_bfloat16_keeps_its_dtype_and_takes_the_softmax_in_float32():
    args = inputs(dtype=jnp.bfloat16)
    ours = value_and_grads(lambda *x: next_token_loss(*x, chunk=8), *args)
    plain = value_and_grads(reference, *(a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in args))
    assert [a.dtype for a in ours] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float32]
    assert_allclose(ours[0], plain[0], rtol=1e-6)
    assert_close([a.astype(jnp.float32) for a in ours], plain, 1e-2)


@pytest.mark.parametrize("chunk", [8, 1000])
def test_token_logps_are_the_log_softmax_at_the_target(chunk):
    x_BTD, head_DV, target_BT, weight_BT = inputs()

    def ours(x_BTD, head_DV):
        return token_logps(x_BTD, head_DV, target_BT, chunk=chunk)

    def plain(x_BTD, head_DV):
        return jnp.take_along_axis(jax.nn.log_softmax(x_BTD @ head_DV), target_BT[..., None], -1)[..., 0]

    for f in (lambda f: f(x_BTD, head_DV), lambda f: jax.vjp(f, x_BTD, head_DV)[1](weight_BT)):
        for a, b in zip(jax.tree.leaves(f(ours)), jax.tree.leaves(f(plain)), strict=True):
            assert_allclose(a, b, rtol=1e-5, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("what", ["loss", "gradients", "logps"])
def test_whole_logits_are_never_held(what):
    args = inputs(T=256, B=4, V=4096)
    loss = {
        "loss": lambda *a: next_token_loss(*a, chunk=16),
        "gradients": lambda *a: value_and_grads(lambda *x: next_token_loss(*x, chunk=16), *a),
        "logps": lambda *a: jax.grad(lambda x: jnp.sum(token_logps(x, a[1], a[2], chunk=16)))(a[0]),
    }[what]
    whole = 4 * 256 * 4096 * 4
    assert jax.jit(loss).lower(*args).compile().memory_analysis().temp_size_in_bytes < whole / 2


def test_the_value_alone_makes_no_gradient():
    args = inputs()
    flops = [jax.jit(f).lower(*args).compile().cost_analysis()["flops"] for f in (
        lambda *a: next_token_loss(*a, chunk=1000),
        lambda *a: value_and_grads(lambda *x: next_token_loss(*x, chunk=1000), *a))]
    assert flops[0] < flops[1] / 2, "one matmul of three"


@pytest.mark.parametrize("spec", [("data", None), ("data", "tensor"), (None, "tensor")])
def test_split_over_rows_and_vocabulary_equals_one_device(spec):
    rows, vocabulary = spec
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    P, args = PartitionSpec, inputs()
    place = [NamedSharding(mesh, s) for s in (P(rows), P(None, vocabulary), P(rows), P(rows))]

    def step(*a):
        return value_and_grads(lambda *x: next_token_loss(*x, chunk=8, z_loss=1e-2, label_smoothing=0.1), *a)

    everywhere = NamedSharding(mesh, P())
    out = (everywhere, everywhere, place[0], place[1], place[3])
    split = jax.jit(step, in_shardings=place, out_shardings=out)(*map(jax.device_put, args, place))
    assert_close(split, jax.jit(step)(*args), 1e-5)
