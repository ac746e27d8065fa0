"""Attention on accelerators. Each body has one call: (q_BTNH, k_BTKH, v_BTKH, doc_BT, *, window) -> o_BTNH.

B batch, T position, S attended position, N query heads, K kv heads, H head width. A query at t sees the keys s <= t of
its own document, the latest `window` of them if a window is given. Softmax is float32 in every body.
"""

import jax
import jax.numpy as jnp

from jaxllm.partition import on_each_device

LANES = 128  # splash attention's blocks are multiples of the TPU's vector lanes


def dense_masked(q_BTNH, k_BTKH, v_BTKH, doc_BT=None, *, window: int | None = None, implementation: str | None = None):
    """Attends with the whole [T, S] mask, through jax.nn.dot_product_attention."""
    mask_BNTS = None if doc_BT is None else (doc_BT[:, :, None] == doc_BT[:, None, :])[:, None]
    reach = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=mask_BNTS, is_causal=True, local_window_size=reach, implementation=implementation
    )


def dense_at(q_BTNH, k_BSKH, v_BSKH, doc_BT, doc_BS, *, window: int | None = None):
    """Attends from the last T of S positions with the whole [T, S] mask."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    place_T1, place_1S = jnp.arange(S - T, S)[:, None], jnp.arange(S)[None]
    seen_TS = place_1S <= place_T1
    if window is not None:
        seen_TS &= place_1S > place_T1 - window
    mask_BNTS = (seen_TS[None] & (doc_BT[:, :, None] == doc_BS[:, None, :]))[:, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BNTS)


def splash(q_BTNH, k_BTKH, v_BTKH, doc_BT=None, *, window: int | None = None):
    """Attends with the splash kernel (Pallas, TPU only), each device on its own rows and heads.

    The kernel wants blocks of 128 positions: other lengths take `dense_masked`.
    """
    T = q_BTNH.shape[1]
    if T % LANES:
        return dense_masked(q_BTNH, k_BTKH, v_BTKH, doc_BT, window=window)
    if doc_BT is None:
        doc_BT = jnp.ones(q_BTNH.shape[:2], jnp.int32)

    def local(q_BTNH, k_BTKH, v_BTKH, doc_BT):
        return splash_at(q_BTNH, k_BTKH, v_BTKH, doc_BT, doc_BT, window=window)

    heads = "batch", None, "kv_heads", None
    return on_each_device(local, (heads, heads, heads, ("batch", None)), heads)(q_BTNH, k_BTKH, v_BTKH, doc_BT)


def splash_at(q_BTNH, k_BSKH, v_BSKH, doc_BT, doc_BS, *, window: int | None = None):
    """Attends from the last T of S positions with the splash kernel, on one device; both must be multiples of 128."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    (_, T, N, H), S = q_BTNH.shape, k_BSKH.shape[1]
    if T % LANES or S % LANES:
        return dense_at(q_BTNH, k_BSKH, v_BSKH, doc_BT, doc_BS, window=window)
    kernel = _splash_kernel(N, T, S, window)
    q_BNTH, k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (q_BTNH * H**-0.5, k_BSKH, v_BSKH))

    def one_row(q_NTH, k_KSH, v_KSH, doc_T, doc_S):
        return kernel(q_NTH, k_KSH, v_KSH, splash_attention_kernel.SegmentIds(q=doc_T, kv=doc_S))

    return jax.vmap(one_row)(q_BNTH, k_BKSH, v_BKSH, doc_BT, doc_BS).swapaxes(1, 2)


def _splash_kernel(n_heads: int, T: int, S: int, window: int | None):
    # Imported here: Pallas takes a second to import, and only TPU programs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    one = splash_attention_mask.CausalMask((T, S), offset=S - T)
    if window is not None:
        one = splash_attention_mask.LocalMask((T, S), (window - 1, 0), S - T)
    block = next(b for b in (512, 256, 128) if T % b == 0 and S % b == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )
    # Made while tracing, never kept: its mask tables are then constants of the program. Made eagerly, they would be arrays
    # on the mesh's devices, which do not exist when a program is compiled for a topology.
    return splash_attention_kernel.make_splash_mha(
        mask=splash_attention_mask.MultiHeadMask([one] * n_heads), head_shards=1, q_seq_shards=1, block_sizes=sizes,
        residual_checkpoint_name="attention",  # its output and normalisers, which a remat policy may keep
    )
