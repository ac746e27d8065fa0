"""Sparse layers: a router and its experts, in place of a dense feed-forward.

B row, T position, N token of a device, A experts of a token, E expert, L experts of one device, M row of a matmul, S slot,
D width, F an expert's feed-forward.
"""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from jaxllm.model.config import ModelConfig, MoEConfig
from jaxllm.model.dispatch import dropless, with_capacity
from jaxllm.model.formulation import Formulation
from jaxllm.model.layers import ACTIVATIONS, FeedForward, GatedFeedForward, gated, std_of, std_of_few, weight
from jaxllm.model.split import placed
from jaxllm.partition import kept, spec


class Routed(NamedTuple):
    """What a sparse layer's router did, as sums over the tokens that are not padding; all float32."""

    chosen_E: jax.Array  # tokens that chose each expert, before any were dropped
    score_E: jax.Array  # their scores, which sum to 1 for each token
    log_z_squared: jax.Array  # squared log-normaliser of the router's logits
    tokens: jax.Array
    dropped: jax.Array  # choices that found their expert full


def losses(routed: Routed):
    """Returns (load-balancing loss, router z-loss) of sparse layers, each the mean over tokens.

    The first is E Σ_e (share of choices that went to e) (mean score of e): 1 at perfect balance (Fedus et al. 2021, Switch;
    Lepikhin et al. 2020, GShard). The second is mean log² Z (Zoph et al. 2022, ST-MoE). Axes before E are layers.
    """
    tokens = jnp.maximum(routed.tokens, 1)
    choices = jnp.maximum(jnp.sum(routed.chosen_E, axis=-1), 1)
    both = jnp.sum(routed.chosen_E * routed.score_E, axis=-1) / (choices * tokens)
    return routed.chosen_E.shape[-1] * both, routed.log_z_squared / tokens


def choose(logit_NE, bias_E, cfg: MoEConfig):
    """Returns (weight_NA, expert_NA, score_NE): each token's `top_k` best experts and what their outputs are multiplied by.

    `bias_E` counts in the choice alone, never in the weights, so no gradient reaches it (Wang et al. 2024).
    """
    score_NE = jax.nn.softmax(logit_NE, axis=-1) if cfg.router == "softmax" else jax.nn.sigmoid(logit_NE)
    _, expert_NA = jax.lax.top_k(score_NE if bias_E is None else score_NE + bias_E[None], cfg.top_k)
    weight_NA = jnp.take_along_axis(score_NE, expert_NA, axis=1)
    if cfg.normalized:
        weight_NA /= jnp.sum(weight_NA, axis=1, keepdims=True) + 1e-20  # sigmoids may all be 0
    return weight_NA, expert_NA, score_NE


class SparseFeedForward(nnx.Module):
    """Experts that each compute the tokens a router sends them, and shared ones that compute every token."""

    def __init__(self, cfg: ModelConfig, form: Formulation, *, rngs: nnx.Rngs):
        moe, D, F = cfg.moe, cfg.d_model, cfg.expert_width
        self.moe, self.activation, self.grouped = moe, cfg.activation, form.grouped
        self.router_DE = weight(rngs, {"embed": D, "router": moe.experts}, std=std_of_few(cfg, std_of(cfg, D)))
        into = {"experts": moe.experts, "embed": D, "mlp": F}
        if cfg.gated:
            self.gate_EDF = weight(rngs, into, std=std_of(cfg, D))
        self.up_EDF = weight(rngs, into, std=std_of(cfg, D))
        self.down_EFD = weight(rngs, {"experts": moe.experts, "mlp": F, "embed": D}, std=std_of(cfg, F, residual=True))
        if moe.bias_rate:
            self.bias_E = nnx.Param(jnp.zeros(moe.experts, jnp.float32), axes=("balance",))
        if moe.shared:
            dense = GatedFeedForward if cfg.gated else FeedForward
            self.shared = dense(dataclasses.replace(cfg, d_ff=F * moe.shared), form, rngs=rngs)

    def __call__(self, x_BTD, real_BT=None, capacity: float | None = None):
        """Returns (y_BTD, Routed). Tokens that are not `real_BT` are routed nowhere; `capacity` None: none are dropped."""
        if real_BT is None:
            real_BT = jnp.ones(x_BTD.shape[:2], bool)
        names = [n for n in ("router_DE", "bias_E", "gate_EDF", "up_EDF", "down_EFD") if hasattr(self, n)]
        weights = {n: getattr(self, n)[...] for n in names}
        mesh = jax.sharding.get_abstract_mesh()
        if not any(size > 1 for size in mesh.shape.values()):
            y_BTD, routed = self._local(x_BTD, real_BT, weights, capacity)
        else:
            # Each device routes its own tokens. Sums over devices stand in a leading axis and are taken outside, where
            # the partitioner reduces them once forward and not at all backward.
            x_axes = kept(x_BTD.shape, "batch", "seq", "act")
            batch, every = placed(x_axes), (*x_axes[0], *x_axes[1])

            def one_device(x_BTD, real_BT, weights):
                y_BTD, routed = self._local(x_BTD, real_BT, _whole(weights, mesh), capacity, mesh.shape["expert"])
                return y_BTD[None], jax.tree.map(lambda a: a[None], routed)

            own = {n: spec(*getattr(self, n).axes) for n in names}
            sums = Routed(*(placed([every, ()] if f.endswith("_E") else [every]) for f in Routed._fields))
            ours = {a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
            parts = jax.shard_map(
                one_device, in_specs=(batch, placed(x_axes[:2]), own), out_specs=(PartitionSpec("tensor", *batch), sums),
                axis_names=ours, check_vma=False)(x_BTD, real_BT, weights)
            y_BTD, routed = jax.tree.map(lambda a: jnp.sum(a, axis=0), parts)
        y_BTD = y_BTD.astype(x_BTD.dtype)
        return (y_BTD + self.shared(x_BTD) if self.moe.shared else y_BTD), routed

    def _local(self, x_BTD, real_BT, weights, capacity, parts: int = 1):
        """Returns (y_BTD, Routed) of one device's tokens; with `parts`, its experts are one part of so many."""
        (B, T, D), E, A = x_BTD.shape, self.moe.experts, self.moe.top_k
        x_ND, real_N = x_BTD.reshape(B * T, D), real_BT.reshape(B * T)
        # float32: a rounded logit is another expert (Fedus et al. 2021, selective precision)
        logit_NE = jnp.dot(x_ND.astype(jnp.float32), weights["router_DE"], precision=jax.lax.Precision.HIGHEST)
        weight_NA, expert_NA, score_NE = choose(logit_NE, weights.get("bias_E"), self.moe)
        if capacity is None:
            y_NAD = dropless(x_ND, expert_NA, real_N, E, parts, partial(self._experts, weights))
            dropped = jnp.zeros((), jnp.float32)
        else:
            C = min(math.ceil(capacity * A * T / E), T)
            y_BTAD, dropped = with_capacity(x_BTD, expert_NA.reshape(B, T, A), real_BT, E, parts, C,
                                            partial(self._experts, weights, size_E=None))
            y_NAD = y_BTAD.reshape(B * T, A, D)
        y_ND = jnp.sum(y_NAD.astype(jnp.float32) * weight_NA[:, :, None], axis=1)
        real_N1 = real_N[:, None].astype(jnp.float32)
        chosen_NE = jnp.sum(jax.nn.one_hot(expert_NA, E, dtype=jnp.float32), axis=1)
        routed = Routed(
            chosen_E=jnp.sum(chosen_NE * real_N1, axis=0), tokens=jnp.sum(real_N1), dropped=dropped.astype(jnp.float32),
            score_E=jnp.sum(score_NE / (jnp.sum(score_NE, axis=1, keepdims=True) + 1e-20) * real_N1, axis=0),
            log_z_squared=jnp.sum(jnp.square(jax.nn.logsumexp(logit_NE, axis=1)) * real_N1[:, 0]))
        return y_ND.reshape(B, T, D).astype(x_BTD.dtype), routed

    def _experts(self, weights, x, size_E):
        """Runs rows sorted by expert, x_MD, in groups of `size_E`; or, where that is None, S slots of each expert, x_ESD."""
        multiply = partial(self.grouped, size_E=size_E) if size_E is not None else jax.lax.batch_matmul
        activation = ACTIVATIONS[self.activation]
        up = multiply(x, weights["up_EDF"])
        h = gated(activation, multiply(x, weights["gate_EDF"]), up) if "gate_EDF" in weights else activation(up)
        return multiply(h, weights["down_EFD"])


def _whole(weights: dict, mesh) -> dict:
    """Returns the weights with their width gathered; the derivative scatters the sum of the gradients."""
    if mesh.shape["fsdp"] == 1:
        return weights
    width = {"router_DE": 0, "gate_EDF": 1, "up_EDF": 1, "down_EFD": 2}
    return {n: jax.lax.all_gather(w, "fsdp", axis=width[n], tiled=True) if n in width else w for n, w in weights.items()}
