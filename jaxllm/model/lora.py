"""Low-rank adapters: W + alpha / rank · A B beside frozen weights (Hu et al. 2021, LoRA).

The sum is made once a step, for all positions of a batch, so that every layer, mesh and formulation computes as without an
adapter; gradients and optimizer state are of A and B alone.

L layers, I inputs of a matrix, R rank, O outputs.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.model.config import LoRAConfig
from jaxllm.partition import leaf_name

OF_ATTENTION, OF_MLP = ("qkv_DKGH", "out_NHD"), ("gate_DF", "up_DF", "down_FD")


def adapters(params: nnx.State, cfg: LoRAConfig, key) -> nnx.State:
    """Returns A, normal with variance 1 / inputs, and B, zero, of each matrix that `cfg` names: at first nothing is added."""
    wanted = (OF_ATTENTION if cfg.attention else ()) + (OF_MLP if cfg.mlp else ())
    tree: dict = {}
    for path, var in _variables(params):
        *above, own = leaf_name(path).split(".")
        if own not in wanted or "experts" in var.axes:
            continue
        key, own_key = jax.random.split(key)
        layers, n_in = _stacked(var), _inputs(var)
        inputs, outputs = var.shape[len(layers) : len(layers) + n_in], var.shape[len(layers) + n_in :]
        a = jax.random.normal(own_key, (*layers, *inputs, cfg.rank), jnp.float32) * math.prod(inputs) ** -0.5
        b = jnp.zeros((*layers, cfg.rank, *outputs), jnp.float32)
        place = tree
        for name in above:
            place = place.setdefault(name, {})
        place[own] = {"a": nnx.Param(a, axes=(*var.axes[:n_in], "rank")), "b": nnx.Param(b, axes=("rank", *var.axes[n_in:]))}
    return nnx.State(tree)


def merged(params: nnx.State, lora: nnx.State, cfg: LoRAConfig) -> nnx.State:
    """Returns the weights with what the adapters add to them."""
    found = {leaf_name(path): var for path, var in _variables(lora)}

    def one(path, var):
        name = leaf_name(path)
        if f"{name}.a" not in found:
            return var
        layers, n_in = _stacked(var), _inputs(var)
        inputs = math.prod(var.shape[len(layers) : len(layers) + n_in])
        a_LIR, b_LRO = found[f"{name}.a"][...], found[f"{name}.b"][...]
        a_LIR, b_LRO = a_LIR.reshape(*layers, inputs, cfg.rank), b_LRO.reshape(*layers, cfg.rank, -1)
        added = jnp.einsum("...IR,...RO->...IO", a_LIR, b_LRO).reshape(var.shape)
        return var.replace(var[...] + cfg.alpha / cfg.rank * added)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _variables(tree):
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _stacked(var) -> tuple[int, ...]:
    """Returns the leading sizes of a weight that its axes do not name: layers."""
    return var.shape[: var.ndim - len(var.axes)]


def _inputs(var) -> int:
    """Returns how many of a matrix's own axes are multiplied with the stream: its width, or all but the last."""
    return 1 if var.axes[0] == "embed" else len(var.axes) - 1
