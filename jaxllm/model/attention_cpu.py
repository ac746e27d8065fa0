"""Causal attention for CPUs: a block of queries at a time against the keys it may see, with its own backward.

Axes: B batch, T position, S attended position, N heads, K kv heads, G query heads of a kv head, H head width.
"""

from functools import partial

import jax
import jax.numpy as jnp

BLOCK = 128  # queries a time: fewer waste less work above the diagonal, more keep the matmuls large
MASKED = -1e30  # not -inf, which would turn a row of masked scores into NaN


def causal_chunked(q_BTNH, k_BTKH, v_BTKH, doc_BT=None, *, window=None):
    """Returns softmax(q kᵀ / √H) v over the positions up to each query's own, as o_BTNH.

    Query head n reads kv head n // (N // K). With `doc_BT` a query sees only its own document; with `window` only the
    last `window` positions, its own among them. Blocks that no query of a block may see are never computed, which
    halves the work, and the backward recomputes the probabilities from the saved log-sums, so that nothing of size
    T × T is kept (Dao 2023, FlashAttention-2; here a block of queries meets all its keys at once, without the online
    softmax, as a CPU has the memory for it).
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


def _forward(window, q_BTKGH, k_BTKH, v_BTKH, doc_BT):
    # Heads lead from here on: a matmul over leading batch axes needs no transpose of its own.
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    outs, log_sums = [], []
    for rows, cols in _blocks(q_BKGTH.shape[3], window):
        score_BKGTS = _scores(q_BKGTH[..., rows, :], k_BKSH[..., cols, :])
        score_BKGTS = jnp.where(_visible(rows, cols, doc_BT, window), score_BKGTS, MASKED)
        max_BKGT1 = jnp.max(score_BKGTS, axis=-1, keepdims=True)
        weight_BKGTS = jnp.exp(score_BKGTS - max_BKGT1)
        sum_BKGT1 = jnp.sum(weight_BKGTS, axis=-1, keepdims=True)
        outs.append(jnp.einsum("BKGTS,BKSH->BKGTH", weight_BKGTS, v_BKSH[..., cols, :]) / sum_BKGT1)
        log_sums.append(max_BKGT1 + jnp.log(sum_BKGT1))
    o_BKGTH, log_sum_BKGT1 = jnp.concatenate(outs, axis=3), jnp.concatenate(log_sums, axis=3)
    o_BTKGH = o_BKGTH.transpose(0, 3, 1, 2, 4)
    return o_BTKGH, (q_BKGTH, k_BKSH, v_BKSH, doc_BT, o_BKGTH, log_sum_BKGT1)


def _backward(window, saved, do_BTKGH):
    q_BKGTH, k_BKSH, v_BKSH, doc_BT, o_BKGTH, log_sum_BKGT1 = saved
    do_BKGTH = do_BTKGH.transpose(0, 2, 3, 1, 4)
    # Σ_s p_ts dp_ts of the softmax's derivative, which is also o · do.
    mean_BKGT1 = jnp.sum(o_BKGTH * do_BKGTH, axis=-1, keepdims=True)
    dqs = []
    dk_BKSH, dv_BKSH = jnp.zeros_like(k_BKSH), jnp.zeros_like(v_BKSH)
    for rows, cols in _blocks(q_BKGTH.shape[3], window):
        q, do, k, v = q_BKGTH[..., rows, :], do_BKGTH[..., rows, :], k_BKSH[..., cols, :], v_BKSH[..., cols, :]
        p_BKGTS = jnp.exp(_scores(q, k) - log_sum_BKGT1[..., rows, :])
        p_BKGTS = jnp.where(_visible(rows, cols, doc_BT, window), p_BKGTS, 0.0)
        dp_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", do, v)
        ds_BKGTS = p_BKGTS * (dp_BKGTS - mean_BKGT1[..., rows, :]) * q.shape[-1] ** -0.5
        dqs.append(jnp.einsum("BKGTS,BKSH->BKGTH", ds_BKGTS, k))
        dk_BKSH = dk_BKSH.at[..., cols, :].add(jnp.einsum("BKGTS,BKGTH->BKSH", ds_BKGTS, q))
        dv_BKSH = dv_BKSH.at[..., cols, :].add(jnp.einsum("BKGTS,BKGTH->BKSH", p_BKGTS, do))
    dq_BTKGH = jnp.concatenate(dqs, axis=3).transpose(0, 3, 1, 2, 4)
    return dq_BTKGH, dk_BKSH.swapaxes(1, 2), dv_BKSH.swapaxes(1, 2), None


_attend.defvjp(_forward, _backward)


def _blocks(T, window):
    """Yields each block's queries and the keys that at least one of them may see."""
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        first = 0 if window is None else max(start - window + 1, 0)
        yield slice(start, stop), slice(first, stop)


def _visible(rows, cols, doc_BT, window):
    """Returns which keys each query sees, in the axes of the scores (their heads broadcast)."""
    t_T1 = jnp.arange(rows.start, rows.stop)[:, None]
    s_1S = jnp.arange(cols.start, cols.stop)[None, :]
    seen_TS = s_1S <= t_T1
    if window is not None:
        seen_TS &= s_1S > t_T1 - window
    seen_BKGTS = seen_TS[None, None, None]
    if doc_BT is not None:
        same_BTS = doc_BT[:, rows, None] == doc_BT[:, None, cols]
        seen_BKGTS = seen_BKGTS & same_BTS[:, None, None]
    return seen_BKGTS


def _scores(q_BKGTH, k_BKSH):
    return jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH) * q_BKGTH.shape[-1] ** -0.5
