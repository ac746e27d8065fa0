"""What meets a split weight: matmuls, the look-up of tokens, and the norms' gains, each device on its own part.

The collectives are written out, not left to the compiler, so that there are no others and they are the cheapest: a weight
is gathered over `fsdp` where it is used and its gradient reduce-scattered (Rajbhandari et al. 2020, ZeRO stage 3), then
summed over `data`; positions are gathered over `tensor` before the first of two matmuls and reduce-scattered after the second
(Korthikanti et al. 2022, sequence parallelism). Backward passes follow by transposition: a gather's is a reduce-scatter.

B batch, T position, D width, V vocabulary, L layers.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxllm.model.formulation import Formulation
from jaxllm.partition import RULES, free_axes, kept

GATHERED = "gathered"  # what is named so is gathered again in the backward pass, whatever else a remat policy keeps


def stream() -> str:
    """Returns how positions are split between matmuls: over `tensor` too (sequence parallelism), but not in a pipeline's stage,
    where the compiler would put permutations into a branch, and they would wait for stages that take another."""
    return "seq" if "stage" in jax.sharding.get_abstract_mesh().manual_axes else "residual_seq"


def columns(x_BTD, *weights: nnx.Param, form: Formulation) -> tuple[jax.Array, ...]:
    """Returns x_BTD @ w [D, …] for each weight: every device computes its own heads or features."""
    if not free_axes():
        return several(x_BTD, [w[...] for w in weights], form.flatten)
    x_axes = kept(x_BTD.shape, "batch", stream(), "act")
    seq = kept(x_BTD.shape, "batch", "seq", "act")[1]
    w_axes = [kept(w.shape, *w.axes) for w in weights]

    def local(x_BTD, *w_locals):
        x_BTD = gather(x_BTD, 1, x_axes[1][len(seq):], form.phases)
        whole = [gather(w, 0, axes[0], form.phases) for w, axes in zip(w_locals, w_axes, strict=True)]
        return several(x_BTD, whole, form.flatten)

    out_axes = tuple(placed([x_axes[0], seq, *axes[1:]]) for axes in w_axes)
    return on_parts(local, (placed(x_axes), *map(placed, w_axes)), out_axes)(x_BTD, *(w[...] for w in weights))


def rows(h, w: nnx.Param, form: Formulation) -> jax.Array:
    """Returns h [B, T, …] @ w […, D]: every device multiplies its own heads or features, and the products are summed."""
    *features, D = w.shape
    if not free_axes():
        return dense(h.reshape(*h.shape[:2], -1), w[...].reshape(-1, D), form.flatten)
    w_axes, h_axes = kept(w.shape, *w.axes), kept(h.shape, "batch", "seq", *w.axes[:-1])
    y_axes = kept((*h.shape[:2], D), "batch", stream(), "act")
    summed = tuple(a for axes in w_axes[:-1] for a in axes)

    def local(h, w):
        w = gather(w, len(features), w_axes[-1], form.phases)
        y_BTD = dense(h.reshape(*h.shape[:2], -1), w.reshape(-1, D), form.flatten)
        return scatter(y_BTD, 1, y_axes[1][len(h_axes[1]):], summed, form.phases)

    return on_parts(local, (placed(h_axes), placed(w_axes)), placed(y_axes))(h, w[...])


def look_up(table_VD: nnx.Param, token_BT, form: Formulation) -> jax.Array:
    """Returns the rows of a table that is split by words: each device looks up its own words, and the parts are summed."""
    if not free_axes():
        return table_VD[...][token_BT]
    t_axes, token_axes = kept(table_VD.shape, *table_VD.axes), kept(token_BT.shape, "batch", "seq")
    y_axes = kept((*token_BT.shape, table_VD.shape[1]), "batch", stream(), "act")

    def local(table_VD, token_BT):
        table_VD = gather(table_VD, 1, t_axes[1], form.phases)
        own_BT = token_BT - place(t_axes[0]) * table_VD.shape[0]
        here_BT = (own_BT >= 0) & (own_BT < table_VD.shape[0])
        x_BTD = jnp.where(here_BT[..., None], table_VD[jnp.where(here_BT, own_BT, 0)], jnp.zeros((), table_VD.dtype))
        return scatter(x_BTD, 1, y_axes[1][len(token_axes[1]):], t_axes[0], form.phases)

    return on_parts(local, (placed(t_axes), placed(token_axes)), placed(y_axes))(table_VD[...], token_BT)


def gain(x_BTD, scale, bias=None) -> jax.Array:
    """Returns x_BTD * scale + bias, of [D], or of what `spread` made of it."""
    if not spreads():
        y_BTD = x_BTD * scale[None, None]
        return y_BTD if bias is None else y_BTD + bias[None, None]
    given = [spread(a) if a.ndim == 1 else a for a in (scale, bias) if a is not None]
    x_axes = placed(kept(x_BTD.shape, "batch", stream(), "act"))

    def local(x_BTD, scale_11D, *bias_11D):
        return x_BTD * scale_11D + bias_11D[0] if bias_11D else x_BTD * scale_11D

    return on_parts(local, (x_axes, *[placed(spread_over())] * len(given)), x_axes)(x_BTD, *given)


def spreads() -> bool:
    """Returns whether gains are spread; inside of a caller's shard_map jax 0.7 could not place them."""
    return bool(free_axes()) and not jax.sharding.get_abstract_mesh().manual_axes


def spread_over() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the free mesh axes that split activations: of them `data`, and the others."""
    free = free_axes()
    axes = tuple(a for a in (*RULES["batch"], *RULES["residual_seq"]) if a in free)
    return tuple(a for a in axes if a == "data"), tuple(a for a in axes if a != "data")


def spread(scale):
    """Returns [D] or [L, D] as [(L,) data, others, D]: a copy for every device that splits activations, on that device.

    A copy's gradient is its device's own. The sum is the transpose of the copying: once for all layers, not in each of them;
    first within a slice and then over `data`.
    """
    layers = scale.shape[:-1]
    for i, axes in enumerate(spread_over()):
        shape = (*scale.shape[: len(layers) + i], size(axes), scale.shape[-1])
        scale = jnp.broadcast_to(jnp.expand_dims(scale, -2), shape)
        sharding = PartitionSpec(*[None] * len(layers), *(a or None for a in spread_over()[: i + 1]), None)
        scale = jax.lax.with_sharding_constraint(scale, sharding)
    return scale


def spread_gains(stacked):
    """Returns the parameters of stacked layers with the norms' spread, before they are cut into layers."""
    if not spreads():
        return stacked
    return jax.tree.map(lambda var: var.replace(spread(var[...])) if var.axes == ("norm",) else var, stacked,
                        is_leaf=lambda x: isinstance(x, nnx.Variable))


def dense(x_BTD: jax.Array, w: jax.Array, flatten: bool) -> jax.Array:
    """Contracts the last axis of `x_BTD` with the first of `w`; returns [B, T, *w.shape[1:]]."""
    return several(x_BTD, [w], flatten)[0]


def several(x_BTD: jax.Array, weights, flatten: bool) -> tuple[jax.Array, ...]:
    """Returns `dense` for each of the weights, from one array of inputs: what waits for the weights' gradients is one, too."""
    if not flatten:
        return tuple(jax.lax.dot_general(x_BTD, w, (((2,), (0,)), ((), ()))) for w in weights)
    B, T, D = x_BTD.shape
    x_MD = x_BTD.reshape(B * T, D)
    return tuple((x_MD @ w.reshape(D, -1)).reshape(B, T, *w.shape[1:]) for w in weights)


def on_parts(local, in_specs, out_specs):
    """Returns `local` run by every device on its own parts, over all mesh axes that no caller has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    free = {axis for axis in mesh.axis_names if axis not in mesh.manual_axes}
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, axis_names=free, check_vma=False)


def placed(axes) -> PartitionSpec:
    return PartitionSpec(*(a or None for a in axes))


def place(axes: tuple[str, ...]):
    """Returns which part this device has of what these axes split."""
    return jax.lax.axis_index(axes) if axes else 0


def gather(x, dim: int, axes: tuple[str, ...], phases: tuple = ()):
    """Returns all parts of `x`, side by side along `dim`."""
    return checkpoint_name(all_gather(x, dim, axes, phases), GATHERED) if axes else x


def scatter(x, dim: int, axes: tuple[str, ...], summed: tuple[str, ...], phases: tuple = ()):
    """Returns the sum of `x` over the mesh axes `summed`, of which a device keeps its part of `dim`, by `axes`."""
    x = by_stages(x, tuple(a for a in summed if a not in axes))
    copies = size(a for a in axes if a not in summed)
    x = x if copies == 1 else x / copies
    return reduce_scatter(x, dim, axes, phases) if axes else x


# These two are each other's transpose. jax knows that; but a sum in phases would have a gathering in phases, which needs none.


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def all_gather(x, dim: int, axes: tuple[str, ...], phases: tuple):
    return jax.lax.all_gather(x, axes, axis=dim, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def reduce_scatter(x, dim: int, axes: tuple[str, ...], phases: tuple):
    """Returns a device's part of the sum, in one phase for each direction of the network that the axis lies over.

    In one go XLA's TPU compiler makes it an all-reduce that is cut, which sends twice the bytes.
    """
    sizes = dict(phases).get(axes[0], ()) if len(axes) == 1 else ()
    if len(sizes) < 2:
        return jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
    places = np.arange(math.prod(sizes)).reshape(sizes)
    for i, n in enumerate(sizes):
        groups = np.moveaxis(places, i, -1).reshape(-1, n).tolist()
        x = jax.lax.psum_scatter(x, axes[0], scatter_dimension=dim, tiled=True, axis_index_groups=groups)
    return x


all_gather.defvjp(lambda x, *how: (all_gather(x, *how), None),
                  lambda dim, axes, phases, _, d: (reduce_scatter(d, dim, axes, phases),))
reduce_scatter.defvjp(lambda x, *how: (reduce_scatter(x, *how), None),
                      lambda dim, axes, phases, _, d: (all_gather(d, dim, axes, phases),))


def by_stages(x, axes: tuple[str, ...]):
    """Returns the sum over these mesh axes: within a slice first, then over `data`."""
    for some in (tuple(a for a in axes if a != "data"), tuple(a for a in axes if a == "data")):
        x = jax.lax.psum(x, some) if some else x
    return x


def size(axes) -> int:
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[a] for a in axes)
