"""What instruction tuning minimises: next-token loss where the assistant writes, over whole weights or adapters beside them.

B row, T position, D width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.align.supervised import of_routers
from jaxllm.model.config import LoRAConfig
from jaxllm.model.heads import cast
from jaxllm.model.lora import merged
from jaxllm.train.loss import next_token_loss
from jaxllm.train.step import Objective, eval_step, loss_and_routed, routers_loss


def whole(lora: LoRAConfig, params, frozen):
    """Returns a model's weights of what is trained: themselves, or what adapters make of frozen ones."""
    return merged(frozen, params, lora) if lora.rank else params


def sft_loss(objective: Objective, noise: float, lora: LoRAConfig, params, frozen, batch, key):
    """Returns (summed loss, (number of learned tokens, what is told)) of a batch; `key` turns dropout and noise on."""
    weights, drop_key = whole(lora, params, frozen), key if objective.dropout else None
    if not noise or key is None:
        loss, (n, routed_L) = loss_and_routed(objective, weights, batch, drop_key)
        return loss, (n, of_routers(routed_L))
    # The only cast: compute runs in `dtype`, gradients come back in float32.
    model = nnx.merge(objective.graph, cast(weights, objective.dtype))
    x_BTD = noisy(model.trunk.embed(batch["token_BT"]), batch["pos_BT"], batch["doc_BT"], noise, jax.random.fold_in(key, 1))
    key_L = None if drop_key is None else jax.random.split(drop_key, model.trunk.n_units)
    x_BTD, routed_L = model.layers(x_BTD, batch["pos_BT"], batch["doc_BT"], key_L, objective.capacity)
    loss, n = next_token_loss(model.trunk.norm(x_BTD), model.head_DV(), batch["target_BT"], batch["weight_BT"],
                              chunk=objective.chunk, z_loss=objective.z_loss, label_smoothing=objective.label_smoothing)
    return loss + n * routers_loss(objective.moe, routed_L), (n, of_routers(routed_L))


def held_out_loss(objective: Objective, lora: LoRAConfig, params, frozen, batch):
    """Returns (summed loss, number of learned tokens) without dropout and noise."""
    return eval_step(objective, whole(lora, params, frozen), batch)


def noisy(x_BTD, pos_BT, doc_BT, alpha: float, key):
    """Returns embeddings with uniform noise in ±alpha / sqrt(L D), L the length of each position's example (Jain et al. 2024,
    NEFTune, where L is the row's)."""
    B, T, D = x_BTD.shape
    size_BT = alpha / jnp.sqrt(lengths(pos_BT, doc_BT).astype(jnp.float32) * D)
    noise_BTD = jax.random.uniform(key, (B, T, D), jnp.float32, -1.0, 1.0)
    return (x_BTD.astype(jnp.float32) + noise_BTD * size_BT[..., None]).astype(x_BTD.dtype)


def lengths(pos_BT, doc_BT):
    """Returns int32 [B, T]: how many positions the document of each has."""
    B, T = doc_BT.shape
    at_T = jnp.arange(T, dtype=jnp.int32)
    ends_BT = jnp.concatenate([doc_BT[:, 1:] != doc_BT[:, :-1], jnp.ones((B, 1), bool)], axis=1)
    last_BT = jax.lax.cummin(jnp.where(ends_BT, at_T[None], T), axis=1, reverse=True)  # the nearest end from here on
    return last_BT - at_T[None] + pos_BT + 1
