"""Matmuls of sorted rows with their experts' weights, for CPUs: a loop over blocks of rows, with its own backward.

M row, E expert, D width in, F width out, R rows of a block. XLA's CPU lowering of `ragged_dot` multiplies every row with
every expert's weights; here the number of matmuls follows the sizes of the groups, and what is padding costs nothing.
"""

import jax
import jax.numpy as jnp

MOST_ROWS = 128  # of a block: large enough for a matmul's speed, small enough to waste little at a group's end


@jax.custom_vjp
def by_blocks(x_MD, w_EDF, size_E):
    """Returns y_MF: the first size_E[0] rows times w_EDF[0], the next size_E[1] times w_EDF[1], …, and 0 after the last."""
    M, R = len(x_MD), _block(len(x_MD), len(size_E))
    x_MD = jnp.pad(x_MD, ((0, R), (0, 0)))

    def visit(y_MF, expert, start, real_R1):
        y_RF = jax.lax.dynamic_slice_in_dim(x_MD, start, R) @ w_EDF[expert]
        # rows past the group's end are the next group's, which comes later and writes over them
        return jax.lax.dynamic_update_slice_in_dim(y_MF, jnp.where(real_R1, y_RF, 0), start, 0)

    return _over_blocks(visit, jnp.zeros((M + R, w_EDF.shape[2]), x_MD.dtype), size_E, R)[:M]


def _forward(x_MD, w_EDF, size_E):
    return by_blocks(x_MD, w_EDF, size_E), (x_MD, w_EDF, size_E)


def _backward(saved, d_MF):
    x_MD, w_EDF, size_E = saved
    R = _block(len(x_MD), len(size_E))
    x_pad_MD, d_pad_MF = (jnp.pad(a, ((0, R), (0, 0))) for a in (x_MD, d_MF))

    def visit(d_w_EDF, expert, start, real_R1):
        x_RD = jnp.where(real_R1, jax.lax.dynamic_slice_in_dim(x_pad_MD, start, R), 0)
        return d_w_EDF.at[expert].add(x_RD.T @ jax.lax.dynamic_slice_in_dim(d_pad_MF, start, R))

    d_w_EDF = _over_blocks(visit, jnp.zeros_like(w_EDF), size_E, R)
    return by_blocks(d_MF, w_EDF.swapaxes(1, 2), size_E), d_w_EDF, None


by_blocks.defvjp(_forward, _backward)


def _block(M: int, E: int) -> int:
    """Returns the rows of a block: about those of an expert, a power of two from 8 to MOST_ROWS."""
    return min(max(1 << (-(-M // E) - 1).bit_length(), 8), MOST_ROWS)


def _over_blocks(visit, carry, size_E, R: int):
    """Returns the last carry of `visit(carry, expert, first row, which of its R rows are the expert's)` over all blocks."""
    end_E = jnp.cumsum(size_E)
    blocks_E = -(-size_E // R)
    last_E = jnp.cumsum(blocks_E)

    def one(i, carry):
        expert = jnp.searchsorted(last_E, i, side="right")
        start = end_E[expert] - size_E[expert] + (i - (last_E[expert] - blocks_E[expert])) * R
        return visit(carry, expert, start, (start + jnp.arange(R) < end_E[expert])[:, None])

    return jax.lax.fori_loop(0, last_E[-1], one, carry)
