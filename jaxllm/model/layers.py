"""The layers of a block. B batch, T position, D width, N query heads, K kv heads, G heads of a group, H head width,
F feed-forward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxllm.model.config import ModelConfig
from jaxllm.model.formulation import Formulation
from jaxllm.model.split import columns, gain, rows, stream
from jaxllm.partition import constrain


def weight(rngs: nnx.Rngs, axes: dict[str, int], *, std: float) -> nnx.Param:
    """Returns a normal float32 parameter whose shape and logical axes are `axes`."""
    return nnx.Param(jax.random.normal(rngs.params(), tuple(axes.values()), jnp.float32) * std, axes=tuple(axes))


def std_of(cfg: ModelConfig, fan_in: int, *, residual: bool = False) -> float:
    """Standard deviation of a matrix's init; `residual`: its output is added to the stream 2 n_layers times (GPT-2).

    With muP both kinds of init fall with the width, and a base depth stands for the depth: see `Block.add`.
    """
    std = fan_in**-0.5 if cfg.init == "fan_in" else 0.02 * cfg.times_width**-0.5
    return std * (2 * (cfg.mup.base_depth or cfg.n_layers)) ** -0.5 if residual else std


def std_of_words(cfg: ModelConfig) -> float:
    """Standard deviation of the embedding's and the head's init; with muP the base's at every width."""
    return std_of(cfg, cfg.d_model) * cfg.times_width**0.5


def std_of_few(cfg: ModelConfig, std: float) -> float:
    """Standard deviation of a matrix from the width to a few numbers (a router's, a score's), of `std` without muP.

    They are read out as logits are (Yang et al. 2022, table 8), but with 1 / times_width in init and learning rate in place
    of a multiplier.
    """
    return std * cfg.times_width**-0.5


class RMSNorm(nnx.Module):
    """Divides by the root mean square over the width (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale_D = nnx.Param(jnp.ones(width, jnp.float32), axes=("norm",))

    def __call__(self, x_BTD):
        x32 = x_BTD.astype(jnp.float32)  # bfloat16 squares lose the mean's digits
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        return gain(x32.astype(x_BTD.dtype), self.scale_D[...])


class LayerNorm(nnx.Module):
    """Centres and scales to variance 1 over the width (Ba et al. 2016)."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale_D = nnx.Param(jnp.ones(width, jnp.float32), axes=("norm",))
        self.bias_D = nnx.Param(jnp.zeros(width, jnp.float32), axes=("norm",))

    def __call__(self, x_BTD):
        x32 = x_BTD.astype(jnp.float32)
        x32 -= jnp.mean(x32, -1, keepdims=True)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        return gain(x32.astype(x_BTD.dtype), self.scale_D[...], self.bias_D[...])


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def rotation(pos_BT, half: int, theta: float, longest: int):
    """Returns cos and sin of pos * theta^(-i / half), each [B, T, half], float32 (Su et al. 2021); positions from
    `longest` on give NaN."""
    freq_H = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)  # float32: bfloat16 cannot count past 256
    angle_PH = jnp.arange(longest, dtype=jnp.float32)[:, None] * freq_H[None]
    # A table and a look-up: XLA's CPU back end would compute a sine afresh wherever it is used, once for each head.
    look_up = partial(jnp.take, indices=pos_BT, axis=0, mode="fill", fill_value=jnp.nan)
    return look_up(jnp.cos(angle_PH)), look_up(jnp.sin(angle_PH))


@jax.custom_vjp
def rope(x_BTNH, cos_BTH, sin_BTH):
    """Rotates pairs (i, i + H/2) of a head by the angles of `rotation`; the derivative is the rotation back."""
    cos_BT1H, sin_BT1H = cos_BTH[:, :, None], sin_BTH[:, :, None]
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos_BT1H - b * sin_BT1H, b * cos_BT1H + a * sin_BT1H], -1).astype(x_BTNH.dtype)


rope.defvjp(lambda x, cos, sin: (rope(x, cos, sin), (cos, sin)), lambda saved, d: (rope(d, saved[0], -saved[1]), None, None))


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023) around a body that the caller gives."""

    def __init__(self, cfg: ModelConfig, form: Formulation, *, rngs: nnx.Rngs):
        D, K, H = cfg.d_model, cfg.kv_heads, cfg.head_dim
        G = cfg.n_heads // K
        self.form, self.query_scale = form, cfg.query_scale
        # One matmul for all three; a kv head's G queries, key and value stay on one device.
        self.qkv_DKGH = weight(rngs, {"embed": D, "kv_heads": K, "qkv": G + 2, "head_dim": H}, std=std_of(cfg, D))
        self.out_NHD = weight(rngs, {"heads": cfg.n_heads, "head_dim": H, "embed": D},
                              std=std_of(cfg, D, residual=True))

    def __call__(self, x_BTD, angles, attend, cache=None):
        (qkv_BTKGH,) = columns(x_BTD, self.qkv_DKGH, form=self.form)
        qkv_BTKGH = checkpoint_name(constrain(qkv_BTKGH, "batch", "seq", "kv_heads", None, None), "qkv")
        B, T, K, G, H = qkv_BTKGH.shape
        # split, not slices: its derivative is one concatenation instead of a sum of padded arrays
        q_BTKGH, k_BTK1H, v_BTK1H = jnp.split(qkv_BTKGH, [G - 2, G - 1], axis=3)
        q_BTNH, k_BTKH, v_BTKH = q_BTKGH.reshape(B, T, K * (G - 2), H), k_BTK1H[:, :, :, 0], v_BTK1H[:, :, :, 0]
        if angles is not None:
            q_BTNH, k_BTKH = rope(q_BTNH, *angles), rope(k_BTKH, *angles)
        if self.query_scale != 1:  # here, before any body of attention, which all multiply with 1 / sqrt(H)
            q_BTNH *= self.query_scale
        o_BTNH, cache = attend(q_BTNH, k_BTKH, v_BTKH, cache)
        return rows(o_BTNH, self.out_NHD, self.form), cache


ACTIVATIONS = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu, "gelu": jax.nn.gelu, "relu2": lambda x: jnp.square(jax.nn.relu(x))}


class FeedForward(nnx.Module):
    """Two matmuls around an activation."""

    def __init__(self, cfg: ModelConfig, form: Formulation, *, rngs: nnx.Rngs):
        D, F = cfg.d_model, cfg.ff_width
        self.form, self.activation = form, cfg.activation
        self.up_DF = weight(rngs, {"embed": D, "mlp": F}, std=std_of(cfg, D))
        self.down_FD = weight(rngs, {"mlp": F, "embed": D}, std=std_of(cfg, F, residual=True))

    def __call__(self, x_BTD):
        (up_BTF,) = columns(x_BTD, self.up_DF, form=self.form)
        up_BTF = checkpoint_name(constrain(up_BTF, "batch", "seq", "mlp"), "up")
        return rows(ACTIVATIONS[self.activation](up_BTF), self.down_FD, self.form)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(activation, gate_BTF, up_BTF):
    """Multiplies activation(gate) with up; the backward starts from both again and keeps nothing else."""
    return activation(gate_BTF) * up_BTF


def _gated_backward(activation, saved, d_BTF):
    gate_BTF, up_BTF = saved
    h_BTF, pull = jax.vjp(activation, gate_BTF)
    return pull(d_BTF * up_BTF)[0], d_BTF * h_BTF


gated.defvjp(lambda activation, gate, up: (gated(activation, gate, up), (gate, up)), _gated_backward)


class GatedFeedForward(nnx.Module):
    """SwiGLU and its kin: one of two matmuls gates the other (Shazeer 2020)."""

    def __init__(self, cfg: ModelConfig, form: Formulation, *, rngs: nnx.Rngs):
        D, F = cfg.d_model, cfg.ff_width
        self.form, self.activation = form, cfg.activation
        self.gate_DF = weight(rngs, {"embed": D, "mlp": F}, std=std_of(cfg, D))
        self.up_DF = weight(rngs, {"embed": D, "mlp": F}, std=std_of(cfg, D))
        self.down_FD = weight(rngs, {"mlp": F, "embed": D}, std=std_of(cfg, F, residual=True))

    def __call__(self, x_BTD):
        gate_BTF, up_BTF = columns(x_BTD, self.gate_DF, self.up_DF, form=self.form)
        gate_BTF, up_BTF = constrain(gate_BTF, "batch", "seq", "mlp"), constrain(up_BTF, "batch", "seq", "mlp")
        gate_BTF, up_BTF = checkpoint_name(gate_BTF, "gate"), checkpoint_name(up_BTF, "up")
        return rows(gated(ACTIVATIONS[self.activation], gate_BTF, up_BTF), self.down_FD, self.form)


def dropout(x_BTD, rate: float, key, order):
    """Sets a share `rate` to 0 and scales the rest up; `key` None: returns `x_BTD`.

    Each position has a key of its own by its place in the row before `order` (Formulation) moved it to another device.
    """
    if key is None or rate == 0:
        return x_BTD
    B, T, D = x_BTD.shape
    place_BT = np.arange(B, dtype=np.uint32)[:, None] * np.uint32(T) + order(T).astype(np.uint32)[None]
    key_BT = jax.vmap(jax.vmap(partial(jax.random.fold_in, key)))(constrain(jnp.asarray(place_BT), "batch", stream()))
    keep_BTD = jax.vmap(jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (D,))))(key_BT)
    return jnp.where(keep_BTD, x_BTD / (1 - rate), jnp.zeros((), x_BTD.dtype))
