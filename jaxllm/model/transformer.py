"""The trunk: embedding, stacked blocks, final norm. Heads stand in heads.py."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxllm.model.config import ModelConfig
from jaxllm.model.formulation import Formulation
from jaxllm.model.layers import NORMS, Attention, FeedForward, GatedFeedForward, dropout, rotation, std_of, weight
from jaxllm.partition import constrain

KEEP = jax.checkpoint_policies.save_only_these_names
NAMES = {  # name -> the tensors of a layer that it keeps
    "mlp": ("gate", "up"), "qkv_attention": ("qkv", "attention"), "qkv": ("qkv",), "attention": ("attention",), "full": (),
}
REMAT = {  # name -> what jax.checkpoint keeps besides a layer's input; "none" keeps everything and is not wrapped at all
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    **{name: KEEP(*kept) for name, kept in NAMES.items()},
}


def policy(remat: str, offload: bool):
    """Returns what jax.checkpoint does with a layer's tensors: those of `remat` are kept, and with `offload` they and the
    layer's input are kept in the host's memory."""
    if not offload:
        return REMAT[remat]
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["input", *NAMES[remat]],
        offload_src="device", offload_dst="pinned_host")


def residual(x_BTD):
    """Places the stream between matmuls: positions over `tensor` too (sequence parallelism), but not in a pipeline's stage,
    where the compiler would put permutations into a branch, and they would wait for stages that take another."""
    in_stage = "stage" in jax.sharding.get_abstract_mesh().manual_axes
    return constrain(x_BTD, "batch", "seq" if in_stage else "residual_seq", "act")


class Block(nnx.Module):
    """One pre-norm layer: attention, then feed-forward, each added to the residual."""

    def __init__(self, cfg: ModelConfig, form: Formulation, *, rngs: nnx.Rngs):
        norm, ff = NORMS[cfg.norm], GatedFeedForward if cfg.gated else FeedForward
        self.dropout = cfg.dropout
        self.attn_norm, self.attn = norm(cfg.d_model, cfg.norm_eps), Attention(cfg, form, rngs=rngs)
        self.mlp_norm, self.mlp = norm(cfg.d_model, cfg.norm_eps), ff(cfg, form, rngs=rngs)

    def __call__(self, x_BTD, angles, attend, cache=None, key=None):
        attn_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        y_BTD, cache = self.attn(self.attn_norm(x_BTD), angles, attend, cache)
        x_BTD = residual(x_BTD + dropout(y_BTD, self.dropout, attn_key))
        x_BTD += dropout(self.mlp(self.mlp_norm(x_BTD)), self.dropout, mlp_key)
        return residual(x_BTD), cache


class Trunk(nnx.Module):
    """Tokens to the hidden states of the last layer, normalised.

    `attend(q_BTNH, k_BTKH, v_BTKH, cache) -> (o_BTNH, cache)` is called once a layer, so masks, kernels and caches are
    the caller's: training gives a whole-sequence body and no cache, decoding a body that reads and extends its cache.
    """

    def __init__(self, cfg: ModelConfig, form: Formulation, *, rngs: nnx.Rngs):
        self.cfg, self.form, self.n_layers = cfg, form, cfg.n_layers
        self.embed_VD = weight(rngs, {"vocab": cfg.vocab_size, "embed": cfg.d_model}, std=std_of(cfg, cfg.d_model))
        key_L = jax.random.split(rngs.params(), cfg.n_layers)
        self.blocks_L = nnx.vmap(lambda key: Block(cfg, form, rngs=nnx.Rngs(key)))(key_L)
        self.norm = NORMS[cfg.norm](cfg.d_model, cfg.norm_eps)

    def __call__(self, token_BT, pos_BT, attend, cache_L=None, key=None):
        key_L = None if key is None else jax.random.split(key, self.n_layers)
        x_BTD, cache_L = self.blocks(self.embed(token_BT), pos_BT, attend, cache_L, key_L)
        return self.norm(x_BTD), cache_L

    def embed(self, token_BT):
        # The width is gathered first: a table split both ways cannot be looked up without copying all of it.
        table_VD = constrain(self.embed_VD[...], "vocab", None)
        return residual(table_VD[token_BT])

    def angles(self, pos_BT):
        """Returns what every layer rotates queries and keys by; None without rotary positions."""
        cfg = self.cfg
        return rotation(pos_BT, cfg.head_dim // 2, cfg.rope_theta, cfg.max_seq_len) if cfg.position == "rope" else None

    def blocks(self, x_BTD, pos_BT, attend, cache_L=None, key_L=None):
        """Runs the layers, all of them or those that a pipeline's stage holds; returns the residual stream and the caches,
        stacked as they came."""
        graph, stacked = nnx.split(self.blocks_L)
        angles = self.angles(pos_BT)

        def layer(x_BTD, xs):
            params, cache, key = xs
            x_BTD = checkpoint_name(x_BTD, "input") if self.form.offload else x_BTD
            return nnx.merge(graph, params)(x_BTD, angles, attend, cache, key)

        if self.form.remat in REMAT:
            layer = jax.checkpoint(layer, policy=policy(self.form.remat, self.form.offload))
        if not self.form.unroll:
            return jax.lax.scan(layer, x_BTD, (stacked, cache_L, key_L))
        caches = []
        for xs in unstack((stacked, cache_L, key_L), jax.tree.leaves(stacked)[0].shape[0]):
            x_BTD, cache = layer(x_BTD, xs)
            caches.append(cache)
        return x_BTD, None if cache_L is None else jax.tree.map(lambda *a: jnp.stack(a), *caches)


def unstack(tree, n: int) -> list:
    """Returns the n slices of a tree of stacked arrays; the transpose is one concatenation, not n padded sums."""
    leaves, structure = jax.tree.flatten(tree)
    if not leaves:
        return [tree] * n
    return [jax.tree.unflatten(structure, slices) for slices in zip(*map(jnp.unstack, leaves), strict=True)]
