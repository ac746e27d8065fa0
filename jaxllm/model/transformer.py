"""The trunk: embedding, stacked blocks, final norm. Heads stand in heads.py."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxllm.model.config import ModelConfig
from jaxllm.model.formulation import Formulation
from jaxllm.model.layers import NORMS, Attention, FeedForward, GatedFeedForward, dropout, rotation, std_of_words, weight
from jaxllm.model.moe import SparseFeedForward
from jaxllm.model.remat import named
from jaxllm.model.split import GATHERED, look_up, spread_gains, stream
from jaxllm.partition import constrain, free_axes


def policy(remat: str, offload: bool):
    """Returns what jax.checkpoint does with a layer's tensors: those of `remat` are kept, and with `offload` they and the
    layer's input are kept in the host's memory."""
    tensors = named(remat)
    if tensors is None:
        return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    if not offload:
        return jax.checkpoint_policies.save_only_these_names(*tensors)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["input", *tensors],
        offload_src="device", offload_dst="pinned_host")


def residual(x_BTD):
    """Places the stream between matmuls."""
    return constrain(x_BTD, "batch", stream(), "act")


class Block(nnx.Module):
    """One pre-norm layer: attention, then feed-forward, each added to the residual."""

    def __init__(self, cfg: ModelConfig, form: Formulation, *, rngs: nnx.Rngs, sparse: bool = False):
        norm, ff = NORMS[cfg.norm], SparseFeedForward if sparse else GatedFeedForward if cfg.gated else FeedForward
        self.sparse, self.share = sparse, 1 / cfg.times_depth
        self.drop = partial(dropout, rate=cfg.dropout, order=form.order)
        self.attn_norm, self.attn = norm(cfg.d_model, cfg.norm_eps), Attention(cfg, form, rngs=rngs)
        self.mlp_norm, self.mlp = norm(cfg.d_model, cfg.norm_eps), ff(cfg, form, rngs=rngs)

    def __call__(self, x_BTD, angles, attend, cache=None, key=None, real_BT=None, capacity=None):
        """Returns the stream, the cache, and what a sparse layer's router did (Routed; None of a dense layer)."""
        attn_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        y_BTD, cache = self.attn(self.attn_norm(x_BTD), angles, attend, cache)
        x_BTD = self.add(x_BTD, y_BTD, attn_key)
        h_BTD = self.mlp_norm(x_BTD)
        y_BTD, routed = self.mlp(h_BTD, real_BT, capacity) if self.sparse else (self.mlp(h_BTD), None)
        return self.add(x_BTD, y_BTD, mlp_key), cache, routed

    def add(self, x_BTD, y_BTD, key=None):
        """Returns the stream with a layer's output added: with a base depth (CompleteP), base_depth / n_layers of it."""
        y_BTD = self.drop(y_BTD, key=key)
        return residual(x_BTD + (y_BTD if self.share == 1 else self.share * y_BTD))


class Turn(nnx.Module):
    """Some dense layers and the sparse one after them: what is stacked where not every layer is sparse.

    Its cache is a tuple of its layers' caches.
    """

    def __init__(self, cfg: ModelConfig, form: Formulation, *, rngs: nnx.Rngs):
        self.n = cfg.layers_a_unit
        for i in range(self.n):
            setattr(self, f"layer_{i}", Block(cfg, form, rngs=rngs, sparse=i == self.n - 1))

    def __call__(self, x_BTD, angles, attend, cache=None, key=None, real_BT=None, capacity=None):
        keys = [None] * self.n if key is None else jax.random.split(key, self.n)
        caches, found = [], None
        for i in range(self.n):
            block = getattr(self, f"layer_{i}")
            x_BTD, one, routed = block(x_BTD, angles, attend, cache and cache[i], keys[i], real_BT, capacity)
            caches, found = [*caches, one], found or routed
        return x_BTD, tuple(caches), found


class Trunk(nnx.Module):
    """Tokens to the hidden states of the last layer, normalised.

    `attend(q_BTNH, k_BTKH, v_BTKH, cache) -> (o_BTNH, cache)` is called once a layer, so masks, kernels and caches are
    the caller's: training gives a whole-sequence body and no cache, decoding a body that reads and extends its cache.
    """

    def __init__(self, cfg: ModelConfig, form: Formulation, *, rngs: nnx.Rngs):
        self.cfg, self.form, self.n_units = cfg, form, cfg.n_layers // cfg.layers_a_unit
        self.embed_VD = weight(rngs, {"vocab": cfg.vocab_size, "embed": cfg.d_model}, std=std_of_words(cfg))
        unit = Turn if cfg.layers_a_unit > 1 else partial(Block, sparse=bool(cfg.moe.experts))
        key_L = jax.random.split(rngs.params(), self.n_units)
        self.blocks_L = nnx.vmap(lambda key: unit(cfg, form, rngs=nnx.Rngs(key)))(key_L)
        self.norm = NORMS[cfg.norm](cfg.d_model, cfg.norm_eps)

    def __call__(self, token_BT, pos_BT, attend, cache_L=None, key=None, real_BT=None, capacity=None):
        key_L = None if key is None else jax.random.split(key, self.n_units)
        x_BTD, cache_L, routed_L = self.blocks(self.embed(token_BT), pos_BT, attend, cache_L, key_L, real_BT, capacity)
        return self.norm(x_BTD), cache_L, routed_L

    def within(self, doc_BT):
        """Returns the `attend` of a pass over whole sequences: documents kept apart, no cache."""

        def attend(q_BTNH, k_BTKH, v_BTKH, cache):
            body = self.form.split_attention or self.form.attention
            return body(q_BTNH, k_BTKH, v_BTKH, doc_BT, window=self.cfg.window), cache

        return attend

    def embed(self, token_BT):
        return residual(look_up(self.embed_VD, token_BT, self.form))

    def angles(self, pos_BT):
        """Returns what every layer rotates queries and keys by; None without rotary positions."""
        cfg = self.cfg
        return rotation(pos_BT, cfg.head_dim // 2, cfg.rope_theta, cfg.max_seq_len) if cfg.position == "rope" else None

    def blocks(self, x_BTD, pos_BT, attend, cache_L=None, key_L=None, real_BT=None, capacity=None):
        """Runs the layers, all of them or those that a pipeline's stage holds; returns the residual stream, the caches and
        what the routers did, both stacked.

        Sparse layers leave tokens that are not `real_BT` (padding) alone; with `capacity`, full experts drop tokens.
        """
        graph, stacked = nnx.split(self.blocks_L)
        stacked = spread_gains(stacked)
        angles = self.angles(pos_BT)

        def layer(x_BTD, xs):
            params, cache, key = xs
            x_BTD = checkpoint_name(x_BTD, "input") if self.form.offload else x_BTD
            x_BTD, cache, routed = nnx.merge(graph, params)(x_BTD, angles, attend, cache, key, real_BT, capacity)
            return x_BTD, (cache, routed)

        if self.form.remat != "none":
            layer = jax.checkpoint(layer, policy=policy(self.form.remat, self.form.offload))
        elif free_axes():
            layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_anything_except_these_names(GATHERED))
        if not self.form.unroll:
            x_BTD, (cache_L, routed_L) = jax.lax.scan(layer, x_BTD, (stacked, cache_L, key_L))
            return x_BTD, cache_L, routed_L
        found = []
        for xs in unstack((stacked, cache_L, key_L), jax.tree.leaves(stacked)[0].shape[0]):
            x_BTD, one = layer(x_BTD, xs)
            found.append(one)
        cache_L, routed_L = jax.tree.map(lambda *a: jnp.stack(a), *found)
        return x_BTD, cache_L, routed_L


def unstack(tree, n: int) -> list:
    """Returns the n slices of a tree of stacked arrays; the transpose is one concatenation, not n padded sums."""
    leaves, structure = jax.tree.flatten(tree)
    if not leaves:
        return [tree] * n
    return [jax.tree.unflatten(structure, slices) for slices in zip(*map(jnp.unstack, leaves), strict=True)]
