"""Attention on accelerators. Each body has one call: (q_BTNH, k_BTKH, v_BTKH, doc_BT, *, window) -> o_BTNH.

B batch, T position, S attended position, N query heads, K kv heads, H head width. A query at t sees the keys s <= t of
its own document, the latest `window` of them if a window is given. Softmax is float32 in every body.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxllm.partition import spec

LANES = 128  # splash attention's blocks are multiples of the TPU's vector lanes


def dense_masked(q_BTNH, k_BTKH, v_BTKH, doc_BT=None, *, window: int | None = None, implementation: str | None = None):
    """Attends with the whole [T, S] mask, through jax.nn.dot_product_attention."""
    mask_BNTS = None if doc_BT is None else (doc_BT[:, :, None] == doc_BT[:, None, :])[:, None]
    reach = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=mask_BNTS, is_causal=True, local_window_size=reach, implementation=implementation
    )


def splash(q_BTNH, k_BTKH, v_BTKH, doc_BT=None, *, window: int | None = None):
    """Attends with the splash kernel (Pallas, TPU only), each device on its own rows and heads.

    The kernel wants blocks of 128 positions: other lengths take `dense_masked`.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    if T % LANES:
        return dense_masked(q_BTNH, k_BTKH, v_BTKH, doc_BT, window=window)
    if doc_BT is None:
        doc_BT = jnp.ones(q_BTNH.shape[:2], jnp.int32)

    def local(q_BTNH, k_BTKH, v_BTKH, doc_BT):
        kernel = _splash_kernel(q_BTNH.shape[2], T, window)
        q_BNTH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (q_BTNH * H**-0.5, k_BTKH, v_BTKH))
        o_BNTH = jax.vmap(lambda q, k, v, doc: kernel(q, k, v, _segments(doc)))(q_BNTH, k_BKTH, v_BKTH, doc_BT)
        return o_BNTH.swapaxes(1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q_BTNH, k_BTKH, v_BTKH, doc_BT)
    heads = spec("batch", None, "kv_heads", None)
    return jax.shard_map(local, in_specs=(heads, heads, heads, PartitionSpec(*spec("batch"), None)), out_specs=heads,
                         check_vma=False)(q_BTNH, k_BTKH, v_BTKH, doc_BT)


def _segments(doc_T):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    return splash_attention_kernel.SegmentIds(q=doc_T, kv=doc_T)


def _splash_kernel(n_heads: int, T: int, window: int | None):
    # Imported here: Pallas takes a second to import, and only TPU programs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    one = splash_attention_mask.CausalMask((T, T))
    if window is not None:
        one = splash_attention_mask.LocalMask((T, T), (window - 1, 0), 0)
    block = next(b for b in (512, 256, 128) if T % b == 0)
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
