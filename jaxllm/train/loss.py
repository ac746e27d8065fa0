"""What is minimised: next-token cross-entropy from the hidden states, the logits of one chunk of positions at a time.

Axes: B batch, T position, C a chunk's positions, D width, V vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp


def next_token_loss(x_BTD, head_DV, target_BT, weight_BT, *, chunk: int, z_loss: float = 0.0, label_smoothing: float = 0.0):
    """Returns (Σ weight · loss, Σ weight), both float32, of predicting `target_BT` from the last hidden states.

    loss = −(1 − ε) log p[target] − ε · mean of log p over the vocabulary + z_loss · log² Z, with ε = label_smoothing
    (Szegedy et al. 2016) and Z the softmax's normaliser (Chowdhery et al. 2022, PaLM). At most `chunk` positions of
    each row have logits at any time. Under differentiation, the gradients are made while a chunk's logits are at hand,
    so that these are neither kept nor computed again (Hsu et al. 2024, Liger Kernel); without it, no gradient is made.
    Each chunk adds to the head's gradient, a sum over the devices that split the batch: few chunks are faster there.
    """
    loss = _summed_loss(chunk, z_loss, label_smoothing, x_BTD, head_DV, target_BT, weight_BT)
    return loss, jnp.sum(weight_BT, dtype=jnp.float32)


def token_logps(x_BTD, head_DV, target_BT, *, chunk: int):
    """Returns log p[target] as float32 [B, T]; its backward computes the logits again, chunk by chunk."""

    @jax.checkpoint
    def visit(carry, x_BCD, target_BC):
        logit_BCV = _logits(x_BCD, head_DV)
        return carry, _at(target_BC, logit_BCV) - jax.nn.logsumexp(logit_BCV, axis=-1)

    return _by_chunks(chunk, visit, None, x_BTD, target_BT)[1]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _summed_loss(chunk, z_loss, smoothing, x_BTD, head_DV, target_BT, weight_BT):
    def visit(total, x_BCD, target_BC, weight_BC):
        logit_BCV = _logits(x_BCD, head_DV)
        loss_BC = _losses(logit_BCV, jax.nn.logsumexp(logit_BCV, axis=-1), target_BC, z_loss, smoothing)
        return total + jnp.sum(loss_BC * weight_BC), None

    return _by_chunks(chunk, visit, jnp.zeros((), jnp.float32), x_BTD, target_BT, weight_BT)[0]


def _forward(chunk, z_loss, smoothing, x_BTD, head_DV, target_BT, weight_BT):
    V = head_DV.shape[1]

    def visit(carry, x_BCD, target_BC, weight_BC):
        total, d_head_DV = carry
        logit_BCV = _logits(x_BCD, head_DV)
        max_BC1 = jnp.max(logit_BCV, axis=-1, keepdims=True)
        exp_BCV = jnp.exp(logit_BCV - max_BC1)
        sum_BC1 = jnp.sum(exp_BCV, axis=-1, keepdims=True)
        log_z_BC = (max_BC1 + jnp.log(sum_BC1))[..., 0]
        loss_BC = _losses(logit_BCV, log_z_BC, target_BC, z_loss, smoothing)
        # d loss / d logit = p (1 + 2 z_loss log Z) − (1 − ε) [v = target] − ε / V, times the token's weight
        share_BC1 = (weight_BC * (1 + 2 * z_loss * log_z_BC))[..., None] / sum_BC1
        wanted_BCV = jnp.where(_is_target(target_BC, V), 1 - smoothing, 0.0) + smoothing / V
        d_logit_BCV = (exp_BCV * share_BC1 - wanted_BCV * weight_BC[..., None]).astype(x_BCD.dtype)
        d_x_BCD = jnp.einsum("BCV,DV->BCD", d_logit_BCV, head_DV)
        d_head_DV += jnp.einsum("BCD,BCV->DV", x_BCD, d_logit_BCV, preferred_element_type=jnp.float32)
        return (total + jnp.sum(loss_BC * weight_BC), d_head_DV), (d_x_BCD, loss_BC)

    start = jnp.zeros((), jnp.float32), jnp.zeros(head_DV.shape, jnp.float32)
    (total, d_head_DV), (d_x_BTD, loss_BT) = _by_chunks(chunk, visit, start, x_BTD, target_BT, weight_BT)
    return total, (d_x_BTD, d_head_DV.astype(head_DV.dtype), loss_BT)


def _backward(chunk, z_loss, smoothing, saved, d_total):
    d_x_BTD, d_head_DV, loss_BT = saved
    return d_x_BTD * d_total.astype(d_x_BTD.dtype), d_head_DV * d_total.astype(d_head_DV.dtype), None, loss_BT * d_total


_summed_loss.defvjp(_forward, _backward)


def _losses(logit_BCV, log_z_BC, target_BC, z_loss, smoothing):
    loss_BC = log_z_BC - (1 - smoothing) * _at(target_BC, logit_BCV) + z_loss * jnp.square(log_z_BC)
    return loss_BC - smoothing * jnp.mean(logit_BCV, axis=-1) if smoothing else loss_BC


def _logits(x_BCD, head_DV):
    # float32 out of the matmul: a bfloat16 logit of 20 is off by 0.06
    return jnp.einsum("BCD,DV->BCV", x_BCD, head_DV, preferred_element_type=jnp.float32)


def _is_target(target_BC, V):
    return target_BC[..., None] == jnp.arange(V, dtype=target_BC.dtype)[None, None]


def _at(target_BC, logit_BCV):
    # A masked sum, not a gather: each device sums its own part of a split vocabulary.
    return jnp.sum(jnp.where(_is_target(target_BC, logit_BCV.shape[-1]), logit_BCV, 0.0), axis=-1)


def _by_chunks(chunk, visit, carry, *arrays_BT):
    """Returns the last carry and [B, T, …] outputs of `visit(carry, *arrays_BC) -> (carry, outputs_BC)` over all chunks.

    A chunk takes every n-th position, so that a T that is split over devices stays split in each; the positions that
    n does not divide come last, in a chunk of their own.
    """
    B, T = arrays_BT[0].shape[:2]
    n = -(-T // min(chunk, T))
    C = T // n
    if n == 1:
        return visit(carry, *arrays_BT)

    def cut(a_BT):
        return jnp.moveaxis(a_BT[:, : C * n].reshape(B, C, n, *a_BT.shape[2:]), 2, 0)

    def join(a_nBC):
        return jnp.moveaxis(a_nBC, 0, 2).reshape(B, C * n, *a_nBC.shape[3:])

    carry, outputs = jax.lax.scan(lambda carry, arrays: visit(carry, *arrays), carry, tuple(map(cut, arrays_BT)))
    outputs = jax.tree.map(join, outputs)
    if C * n == T:
        return carry, outputs
    carry, last = visit(carry, *(a_BT[:, C * n :] for a_BT in arrays_BT))
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), outputs, last)
