"""What is minimised: next-token cross-entropy from the hidden states, the logits of one chunk of positions at a time.

Axes: B batch, T position, C a chunk's positions, D width, V vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxllm.train.vocabulary import on_vocabulary, summed

NEVER = -1e30  # logit of an id that is never drawn; not -inf, whose gradient would be NaN


def next_token_loss(x_BTD, head_DV, target_BT, weight_BT, *, chunk: int, z_loss: float = 0.0, label_smoothing: float = 0.0,
                    phases: tuple = ()):
    """Returns (Σ weight · loss, Σ weight), both float32, of predicting `target_BT` from the last hidden states.

    loss = −(1 − ε) log p[target] − ε · mean of log p over the vocabulary + z_loss · log² Z, with ε = label_smoothing
    (Szegedy et al. 2016) and Z the softmax's normaliser (Chowdhery et al. 2022, PaLM). At most `chunk` positions of
    each row have logits at any time. Under differentiation, the gradients are made while a chunk's logits are at hand,
    so that these are neither kept nor computed again (Hsu et al. 2024, Liger Kernel); without it, no gradient is made.
    On a mesh each device computes its own rows' logits for its own part of the vocabulary; the head is gathered, its
    gradient summed, once a chunk.
    """
    loss = _summed_loss(chunk, z_loss, label_smoothing, phases, x_BTD, head_DV, target_BT, weight_BT)
    return loss, summed(weight_BT)


def token_logps(x_BTD, head_DV, target_BT, *, chunk: int, temperature: float = 1.0, n_tokens: int | None = None):
    """Returns log p[target] as float32 [B, T]; its backward computes the logits again, chunk by chunk.

    p = softmax(logits / temperature) over the first `n_tokens` ids; None: over all.
    """
    return _by_logits(lambda logit_BCV, target_BC: _at(target_BC, logit_BCV) - jax.nn.logsumexp(logit_BCV, axis=-1),
                      chunk, temperature, n_tokens, x_BTD, head_DV, target_BT)


def token_logps_and_entropies(x_BTD, head_DV, target_BT, *, chunk: int, temperature: float = 1.0, n_tokens: int | None = None):
    """Returns (log p[target], -Σ p log p) as `token_logps` does, both float32 [B, T]."""

    def both(logit_BCV, target_BC):
        log_z_BC = jax.nn.logsumexp(logit_BCV, axis=-1)
        p_BCV = jnp.exp(logit_BCV - log_z_BC[..., None])
        mean_BC = jnp.sum(p_BCV * jnp.where(p_BCV > 0, logit_BCV, 0.0), axis=-1)  # ids that are never drawn: 0, not 0 x -inf
        return _at(target_BC, logit_BCV) - log_z_BC, log_z_BC - mean_BC

    return _by_logits(both, chunk, temperature, n_tokens, x_BTD, head_DV, target_BT)


def _by_logits(of_logits, chunk, temperature, n_tokens, x_BTD, head_DV, target_BT):
    @jax.checkpoint
    def visit(carry, x_BCD, target_BC):
        logit_BCV = _logits(x_BCD, head_DV) / temperature
        if n_tokens is not None and n_tokens < head_DV.shape[1]:
            logit_BCV = jnp.where(jnp.arange(head_DV.shape[1])[None, None] < n_tokens, logit_BCV, NEVER)
        return carry, of_logits(logit_BCV, target_BC)

    return _by_chunks(chunk, visit, None, x_BTD, target_BT)[1]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _summed_loss(chunk, z_loss, smoothing, phases, x_BTD, head_DV, target_BT, weight_BT):
    def local(parts, x_BTD, head_DV, target_BT, weight_BT):
        def visit(total, x_BCD, target_BC, weight_BC):
            whole_DV = parts.whole_width(head_DV)
            logit_BCV = _logits(x_BCD, whole_DV)
            max_BC1 = parts.largest(jnp.max(logit_BCV, axis=-1, keepdims=True))
            sum_BC = jnp.sum(jnp.exp(logit_BCV - max_BC1), axis=-1)
            loss_BC, _ = _losses(parts, logit_BCV, max_BC1, sum_BC, target_BC, z_loss, smoothing)
            return total + jnp.sum(loss_BC * weight_BC), None

        arrays = parts.positions(x_BTD), target_BT, weight_BT
        return parts.over_tokens(_by_chunks(parts.share(chunk), visit, jnp.zeros((), jnp.float32), *arrays)[0])

    return on_vocabulary(local, x_BTD, head_DV, (target_BT, weight_BT), ("total",))


def _forward(chunk, z_loss, smoothing, phases, x_BTD, head_DV, target_BT, weight_BT):
    V = head_DV.shape[1]

    def local(parts, x_BTD, head_DV, target_BT, weight_BT):
        def visit(carry, x_BCD, target_BC, weight_BC):
            total, d_head_DV = carry
            whole_DV = parts.whole_width(head_DV)
            logit_BCV = _logits(x_BCD, whole_DV)
            max_BC1 = parts.largest(jnp.max(logit_BCV, axis=-1, keepdims=True))
            exp_BCV = jnp.exp(logit_BCV - max_BC1)
            loss_BC, log_z_BC = _losses(parts, logit_BCV, max_BC1, jnp.sum(exp_BCV, axis=-1), target_BC, z_loss, smoothing)
            # d loss / d logit = p (1 + 2 z_loss log Z) − (1 − ε) [v = target] − ε / V, times the token's weight
            share_BC1 = (weight_BC * (1 + 2 * z_loss * log_z_BC) * jnp.exp(max_BC1[..., 0] - log_z_BC))[..., None]
            wanted_BCV = jnp.where(parts.is_target(target_BC, logit_BCV.shape[-1]), 1 - smoothing, 0.0) + smoothing / V
            d_logit_BCV = (exp_BCV * share_BC1 - wanted_BCV * weight_BC[..., None]).astype(x_BCD.dtype)
            d_x_BCD = jnp.einsum("BCV,DV->BCD", d_logit_BCV, whole_DV)
            d_chunk_DV = jnp.einsum("BCD,BCV->DV", x_BCD, d_logit_BCV, preferred_element_type=jnp.float32)
            d_head_DV += parts.own_width(d_chunk_DV)
            return (total + jnp.sum(loss_BC * weight_BC), d_head_DV), (d_x_BCD, loss_BC)

        start = jnp.zeros((), jnp.float32), jnp.zeros(head_DV.shape, jnp.float32)
        arrays = parts.positions(x_BTD), target_BT, weight_BT
        (total, d_head_DV), (d_x_BTD, loss_BT) = _by_chunks(parts.share(chunk), visit, start, *arrays)
        return parts.over_tokens(total), parts.own_positions(d_x_BTD), parts.over_copies(d_head_DV), loss_BT

    out = on_vocabulary(local, x_BTD, head_DV, (target_BT, weight_BT), ("total", "x", "head", "tokens"), phases)
    total, d_x_BTD, d_head_DV, loss_BT = out
    return total, (d_x_BTD, d_head_DV.astype(head_DV.dtype), loss_BT)


def _backward(chunk, z_loss, smoothing, phases, saved, d_total):
    d_x_BTD, d_head_DV, loss_BT = saved
    return d_x_BTD * d_total.astype(d_x_BTD.dtype), d_head_DV * d_total.astype(d_head_DV.dtype), None, loss_BT * d_total


_summed_loss.defvjp(_forward, _backward)


def _losses(parts, logit_BCV, max_BC1, sum_BC, target_BC, z_loss, smoothing):
    """Returns the losses and log Z, from the logits of a part of the vocabulary and their sum of e^(logit - max)."""
    of_target_BCV = jnp.where(parts.is_target(target_BC, logit_BCV.shape[-1]), logit_BCV, 0.0)
    # A masked sum, not a gather: each device sums its own part of a split vocabulary.
    sums = [sum_BC, jnp.sum(of_target_BCV, axis=-1)] + ([jnp.sum(logit_BCV, axis=-1)] if smoothing else [])
    sum_BC, at_target_BC, *all_BC = parts.over_vocabulary(jnp.stack(sums))
    log_z_BC = max_BC1[..., 0] + jnp.log(sum_BC)
    loss_BC = log_z_BC - (1 - smoothing) * at_target_BC + z_loss * jnp.square(log_z_BC)
    return loss_BC - smoothing / parts.vocabulary * all_BC[0] if smoothing else loss_BC, log_z_BC


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
