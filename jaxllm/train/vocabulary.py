"""A head whose vocabulary is split over devices (Shoeybi et al. 2019, Megatron-LM): which part each has, and the sums.

B batch, T position, D width, V vocabulary.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jaxllm.model.split import by_stages, on_parts, place, placed, scatter, size, stream
from jaxllm.partition import free_axes, kept

HEAD = "embed", "vocab"


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a device has of a loss's arrays: the mesh axes that split each, none of them on one device."""

    vocabulary: int  # words, over all devices
    of_words: tuple[str, ...] = ()
    of_width: tuple[str, ...] = ()  # of the head's D
    of_rows: tuple[str, ...] = ()
    of_targets: tuple[str, ...] = ()  # of the positions of targets and weights
    of_stream: tuple[str, ...] = ()  # of the positions of x, beyond those
    phases: tuple = ()  # of sums over an axis: partition.phases

    def share(self, chunk: int) -> int:
        """Returns how many positions a device computes at a time, for `chunk` over all of them."""
        return max(chunk // size(self.of_targets), 1)

    def positions(self, x_BTD):
        """Returns x at all positions that the device has targets of."""
        return jax.lax.all_gather(x_BTD, self.of_stream, axis=1, tiled=True) if self.of_stream else x_BTD

    def own_positions(self, d_x_BTD):
        """Returns the sum of the gradient over the parts of the vocabulary, as x is split."""
        return scatter(d_x_BTD, 1, self.of_stream, self.of_words, self.phases)

    def is_target(self, target_BC, words: int):
        return (target_BC - place(self.of_words) * words)[..., None] == jnp.arange(words, dtype=target_BC.dtype)[None, None]

    def largest(self, x):
        return jax.lax.pmax(x, self.of_words) if self.of_words else x

    def over_vocabulary(self, x):
        return jax.lax.psum(x, self.of_words) if self.of_words else x

    def over_tokens(self, x):
        return by_stages(x, self.of_rows + self.of_targets)

    def whole_width(self, head_DV):
        return jax.lax.all_gather(head_DV, self.of_width, axis=0, tiled=True) if self.of_width else head_DV

    def own_width(self, d_head_DV):
        """Returns a chunk's gradient as the head is split: summed over the devices that share its width out."""
        if not self.of_width:
            return d_head_DV
        tokens = self.of_rows + self.of_targets
        d_head_DV = scatter(d_head_DV, 0, self.of_width, tuple(a for a in tokens if a in self.of_width), self.phases)
        # Without a barrier the compiler sums once, after the last chunk, and keeps the whole width until then.
        return jax.lax.optimization_barrier(d_head_DV)

    def over_copies(self, d_head_DV):
        """Returns the sum of `own_width`'s over the devices that have the same part."""
        return by_stages(d_head_DV, tuple(a for a in self.of_rows + self.of_targets if a not in self.of_width))


def on_vocabulary(local, x_BTD, head_DV, tokens, returns, phases: tuple = ()):
    """Returns `local(parts, x_BTD, head_DV, *tokens)` run by every device on its part of each; `returns` names what comes
    back: total, x, head or tokens."""
    if not free_axes():
        return local(Parts(head_DV.shape[1]), x_BTD, head_DV, *tokens)
    x_axes, t_axes = kept(x_BTD.shape, "batch", stream(), "act"), kept(tokens[0].shape, "batch", "seq")
    head_axes = kept(head_DV.shape, *HEAD)
    parts = Parts(head_DV.shape[1], head_axes[1], head_axes[0], x_axes[0], t_axes[1], x_axes[1][len(t_axes[1]):],
                  phases)
    specs = {"total": placed([]), "x": placed(x_axes), "head": placed(head_axes), "tokens": placed(t_axes)}

    out = tuple(specs[name] for name in returns)
    given = specs["x"], specs["head"], *[specs["tokens"]] * len(tokens)
    return on_parts(partial(local, parts), given, out if len(out) > 1 else out[0])(x_BTD, head_DV, *tokens)


def summed(weight_BT):
    """Returns the float32 sum of [B, T]."""
    if not free_axes():
        return jnp.sum(weight_BT, dtype=jnp.float32)
    axes = kept(weight_BT.shape, "batch", "seq")

    def local(weight_BT):
        return by_stages(jnp.sum(weight_BT, dtype=jnp.float32), axes[0] + axes[1])

    return on_parts(local, (placed(axes),), placed([]))(weight_BT)
