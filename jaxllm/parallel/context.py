"""Attention over a sequence that is split over devices: keys and values gathered, or passed around a ring.

B batch, T position, S attended position, N query heads, K kv heads, G heads of a kv head, H head width, n parts of the
`context` axis. The sequence is cut in 2n chunks and device i holds chunks i and 2n - 1 - i, so that each has the same part
of the causal triangle (as in Brandon et al. 2023, Striped Attention, and Llama 3's context parallelism).
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import UserError
from jaxllm.model.formulation import Formulation
from jaxllm.partition import on_each_device

AXIS = "context"
MASKED = -1e30  # not -inf, which would turn a row of masked scores into NaN
HEADS = "batch", "seq", "kv_heads", None
PARTS = (HEADS, HEADS, HEADS, ("batch", "seq")), HEADS  # axes of q, k, v and the document ids, and of the result


def over_context(form: Formulation, n: int, method: str) -> Formulation:
    """Returns the formulation for sequences in n parts; `method`: gather or ring."""
    body = {"gather": partial(gathered, n, form.attention_at), "ring": partial(ring, n)}[method]
    return dataclasses.replace(form, context=n, order=partial(order, n=n) if n > 1 else form.order, split_attention=body,
                               flatten=form.flatten and n == 1)


def check_length(seq_len: int, mesh) -> None:
    """Raises UserError when the `context` axis cannot cut rows of `seq_len` in balanced chunks."""
    n = mesh.shape["context"]
    if n > 1 and seq_len % (2 * n):
        raise UserError(f"data.seq_len={seq_len} is not divisible by {2 * n}, twice mesh.context={n}; nearest: "
                        f"{max(round(seq_len / (2 * n)), 1) * 2 * n}")


def order(T: int, n: int) -> np.ndarray:
    """Returns, for each place of the split sequence, the position that stands there."""
    chunks = np.arange(T).reshape(2 * n, -1)
    return np.concatenate([chunks[[i, 2 * n - 1 - i]].ravel() for i in range(n)])


def balance(batch: dict, n: int) -> dict:
    """Returns a batch of [B, T] arrays whose positions stand as the devices hold them; a sum over positions is the same."""
    if n == 1:
        return batch
    T = batch["token_BT"].shape[1]
    return {name: x_BT[:, order(T, n)] for name, x_BT in batch.items()}


def gathered(n: int, attention_at, q_BTNH, k_BTKH, v_BTKH, doc_BT, *, window=None):
    """Attends with every device's keys and values brought to all; each computes only what its own queries may see.

    `attention_at(q, k, v, q_doc, k_doc, window=)` attends from the last positions of the keys' stretch.
    """

    def local(q_BTNH, k_BTKH, v_BTKH, doc_BT):
        C = q_BTNH.shape[1] // 2
        back = np.argsort(order(2 * n * C, n))
        k_BSKH, v_BSKH, doc_BS = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True)[:, back] for x in (k_BTKH, v_BTKH, doc_BT))

        def of_chunk(chunk, rows):
            S = (chunk + 1) * C
            return attention_at(q_BTNH[:, rows], k_BSKH[:, :S], v_BSKH[:, :S], doc_BT[:, rows], doc_BS[:, :S], window=window)

        def on_device(i):
            return lambda: jnp.concatenate([of_chunk(i, slice(0, C)), of_chunk(2 * n - 1 - i, slice(C, 2 * C))], axis=1)

        return jax.lax.switch(jax.lax.axis_index(AXIS), [on_device(i) for i in range(n)])

    # Computed again in the backward: the branches' intermediates would be kept side by side, n times as many.
    return on_each_device(jax.checkpoint(local), *PARTS)(q_BTNH, k_BTKH, v_BTKH, doc_BT)


def ring(n: int, q_BTNH, k_BTKH, v_BTKH, doc_BT, *, window=None):
    """Attends while keys and values go round the devices, a part at a time (Liu et al. 2023, Ring Attention).

    A device holds two parts of the keys at any time. What comes from an earlier device is seen in its first chunk by all
    queries, what comes from a later one is seen by the second chunk's queries alone: the same work for all.
    """

    def local(q_BTNH, k_BTKH, v_BTKH, doc_BT):
        i, (B, T, N, H) = jax.lax.axis_index(AXIS), q_BTNH.shape
        C, K = T // 2, k_BTKH.shape[2]
        q_BTKGH = (q_BTNH * H**-0.5).astype(jnp.float32).reshape(B, T, K, N // K, H)
        place_nT = jnp.asarray(order(2 * C * n, n).reshape(n, -1), jnp.int32)

        def seen(rows, cols):
            def branch(k_BSKH, v_BSKH, doc_BS, j):
                queries = q_BTKGH[:, rows], doc_BT[:, rows], place_nT[i, rows]
                keys = k_BSKH[:, cols], v_BSKH[:, cols], doc_BS[:, cols], place_nT[j, cols]
                return _in_place(_partial(*queries, *keys, window), rows, T)

            return branch

        everything, first, second = slice(0, T), slice(0, C), slice(C, T)
        branches = [seen(everything, first), seen(everything, everything), seen(second, everything)]

        def step(carry, s):
            total, kv = carry
            j = (i - s) % n  # whose keys these are
            total = _merge(total, jax.lax.switch(1 + jnp.sign(j - i), branches, *kv, j))
            return (total, jax.lax.ppermute(kv, AXIS, [(a, (a + 1) % n) for a in range(n)])), None

        nothing = (jnp.zeros(q_BTKGH.shape, jnp.float32), jnp.full(q_BTKGH.shape[:-1], MASKED), jnp.zeros(q_BTKGH.shape[:-1]))
        ((o_BTKGH, _, sum_BTKG), _), _ = jax.lax.scan(jax.checkpoint(step), (nothing, (k_BTKH, v_BTKH, doc_BT)), jnp.arange(n))
        return (o_BTKGH / sum_BTKG[..., None]).reshape(B, T, N, H).astype(q_BTNH.dtype)

    return on_each_device(local, *PARTS)(q_BTNH, k_BTKH, v_BTKH, doc_BT)


def _partial(q_BTKGH, doc_BT, place_T, k_BSKH, v_BSKH, doc_BS, place_S, window):
    """Returns (Σ e^(score - max) v, max, Σ e^(score - max)) over the keys that each query sees, float32."""
    k_BSKH, v_BSKH = k_BSKH.astype(jnp.float32), v_BSKH.astype(jnp.float32)
    seen_TS = place_S[None] <= place_T[:, None]
    if window is not None:
        seen_TS &= place_S[None] > place_T[:, None] - window
    seen_BTS = seen_TS[None] & (doc_BT[:, :, None] == doc_BS[:, None, :])
    seen_BKGTS = seen_BTS[:, None, None]
    score_BKGTS = jnp.where(seen_BKGTS, jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH), MASKED)
    max_BKGT = jnp.max(score_BKGTS, axis=-1)
    # where nothing is seen, the largest is MASKED too
    weight_BKGTS = jnp.where(seen_BKGTS, jnp.exp(score_BKGTS - max_BKGT[..., None]), 0.0)
    o_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weight_BKGTS, v_BSKH)
    return o_BTKGH, jnp.moveaxis(max_BKGT, 3, 1), jnp.moveaxis(jnp.sum(weight_BKGTS, axis=-1), 3, 1)


def _in_place(part, rows, T):
    """Returns a part of some rows as one of all T, in which the others have seen nothing."""
    o, top, total = part

    def pad(x, value):
        return jnp.pad(x, [(0, 0), (rows.start, T - rows.stop)] + [(0, 0)] * (x.ndim - 2), constant_values=value)

    return pad(o, 0.0), pad(top, MASKED), pad(total, 0.0)


def _merge(a, b):
    """Returns the softmax's parts over the keys of both (Milakov and Gimelshein 2018)."""
    (o_a, max_a, sum_a), (o_b, max_b, sum_b) = a, b
    top = jnp.maximum(max_a, max_b)
    of_a, of_b = jnp.exp(max_a - top), jnp.exp(max_b - top)
    return o_a * of_a[..., None] + o_b * of_b[..., None], top, sum_a * of_a + sum_b * of_b
