"""Causal attention for CPUs: a block of queries at a time against the keys it may see, with its own backward.

Axes: B batch, T position, S attended position, N heads, K kv heads, G query heads of a kv head, H head width.
"""

from functools import partial

import jax
import jax.numpy as jnp

BLOCK = 128  # least queries a time: fewer waste less work above the diagonal, more keep the matmuls large
BLOCKS = 16  # most blocks of a sequence: each is a piece of program to compile
MASKED = -1e30  # not -inf, which would turn a row of masked scores into NaN


def causal_chunked(q_BTNH, k_BTKH, v_BTKH, doc_BT=None, *, window=None):
    """Returns softmax(q kᵀ / √H) v over the positions up to each query's own, as o_BTNH.

    Query head n reads kv head n // (N // K). With `doc_BT` a query sees only its own document; with `window` only the
    last `window` positions, its own among them. Keys that no query of a block may see are left out, which halves the
    work. The backward is FlashAttention-2's (Dao 2023) but for keeping the softmax weights, B N T² / 2 numbers: XLA's CPU
    compiler would merge their recomputation with the forward's and keep them all the same.
    """
    B, T, N, H = q_BTNH.shape
    K, dtype = k_BTKH.shape[2], q_BTNH.dtype
    # float32 throughout: a CPU computes no faster in bfloat16, and the softmax needs it
    q_BTNH, k_BTKH, v_BTKH = (x.astype(jnp.float32) for x in (q_BTNH, k_BTKH, v_BTKH))
    o_BTKGH = _attend(window, q_BTNH.reshape(B, T, K, N // K, H), k_BTKH, v_BTKH, doc_BT)
    return o_BTKGH.reshape(B, T, N, H).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(window, q_BTKGH, k_BTKH, v_BTKH, doc_BT):
    return _forward(window, q_BTKGH, k_BTKH, v_BTKH, doc_BT)[0]


# Each matmul below has the operands in the order of axes that XLA's CPU matmuls are fastest with, which for batches of
# small ones matters up to 3 ×: heads lead, the right operand's last axis is the result's, and results are wide, not tall.


def _forward(window, q_BTKGH, k_BTKH, v_BTKH, doc_BT):
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4) * q_BTKGH.shape[-1] ** -0.5
    k_BKHS, v_BKSH = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.swapaxes(1, 2)
    outs, sums, weights = [], [], []
    for rows, cols in _blocks(q_BKGTH.shape[3], window):
        score_BKGTS = jnp.einsum("BKGTH,BKHS->BKGTS", q_BKGTH[..., rows, :], k_BKHS[..., cols])
        score_BKGTS = jnp.where(_visible(rows, cols, doc_BT, window), score_BKGTS, MASKED)
        weight_BKGTS = jnp.exp(score_BKGTS - jnp.max(score_BKGTS, axis=-1, keepdims=True))
        sum_BKGT1 = jnp.sum(weight_BKGTS, axis=-1, keepdims=True)
        outs.append(jnp.einsum("BKGTS,BKSH->BKGTH", weight_BKGTS, v_BKSH[..., cols, :]) / sum_BKGT1)
        sums.append(sum_BKGT1)
        weights.append(weight_BKGTS)
    o_BTKGH = jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4)
    return o_BTKGH, (q_BKGTH, k_BKHS, v_BKSH, o_BTKGH, jnp.concatenate(sums, axis=3), weights)


def _backward(window, saved, do_BTKGH):
    q_BKGTH, k_BKHS, v_BKSH, o_BTKGH, sum_BKGT1, weights = saved
    k_BKSH, v_BKHS = k_BKHS.swapaxes(2, 3), v_BKSH.swapaxes(2, 3)
    # The weights are not divided by their sums, which would be one more pass over [T, S]: do is, once.
    do_BKGTH = do_BTKGH.transpose(0, 2, 3, 1, 4) / sum_BKGT1
    # Σ_s weight_ts dweight_ts of the softmax's derivative is also o · do.
    mean_BKGT1 = jnp.sum(o_BTKGH * do_BTKGH, axis=-1).transpose(0, 2, 3, 1)[..., None] / sum_BKGT1
    dqs = []
    dk_BKHS, dv_BKHS = jnp.zeros_like(k_BKHS), jnp.zeros_like(v_BKHS)
    for (rows, cols), weight_BKGTS in zip(_blocks(q_BKGTH.shape[3], window), weights, strict=True):
        q, do = q_BKGTH[..., rows, :], do_BKGTH[..., rows, :]
        dweight_BKGTS = jnp.einsum("BKGTH,BKHS->BKGTS", do, v_BKHS[..., cols])
        dscore_BKGTS = weight_BKGTS * (dweight_BKGTS - mean_BKGT1[..., rows, :])
        dqs.append(jnp.einsum("BKGTS,BKSH->BKGTH", dscore_BKGTS, k_BKSH[..., cols, :]))
        dk_BKHS = dk_BKHS.at[..., cols].add(jnp.einsum("BKGTH,BKGTS->BKHS", q, dscore_BKGTS))
        dv_BKHS = dv_BKHS.at[..., cols].add(jnp.einsum("BKGTH,BKGTS->BKHS", do, weight_BKGTS))
    dq_BTKGH = jnp.concatenate(dqs, axis=3).transpose(0, 3, 1, 2, 4) * q_BKGTH.shape[-1] ** -0.5
    return dq_BTKGH, dk_BKHS.transpose(0, 3, 1, 2), dv_BKHS.transpose(0, 3, 1, 2), None


_attend.defvjp(_forward, _backward)


def _blocks(T, window):
    """Yields each block's queries and the keys that at least one of them may see."""
    size = max(BLOCK, -(-T // BLOCKS))
    for start in range(0, T, size):
        stop = min(start + size, T)
        first = 0 if window is None else max(start - window + 1, 0)
        yield slice(start, stop), slice(first, stop)


def _visible(rows, cols, doc_BT, window):
    """Returns which keys each query of a block sees, in the axes of the scores."""
    t_T1, s_1S = jnp.arange(rows.start, rows.stop)[:, None], jnp.arange(cols.start, cols.stop)[None, :]
    seen_TS = s_1S <= t_T1
    if window is not None:
        seen_TS &= s_1S > t_T1 - window
    seen_BKGTS = seen_TS[None, None, None]
    if doc_BT is not None:
        same_BTS = doc_BT[:, rows, None] == doc_BT[:, None, cols]
        seen_BKGTS = seen_BKGTS & same_BTS[:, None, None]
    return seen_BKGTS
