"""Tokens to their experts and back, on one device and between the devices of the `expert` axis.

B row, T position, N token of a device, A experts of a token, M a token's choice of one (M = N A of them), E expert,
P devices that share out the experts, L experts of one of them, S slot, D width. A choice that is not to be computed,
because its token is padding or the expert is full, has no slot: it adds 0 to its token.

Each way of dispatch is a numbering of slots. Rows go to slots and come back by two gathers, each the other's derivative,
so that no floating-point row is ever scattered.
"""

from functools import partial

import jax
import jax.numpy as jnp

AXIS = "expert"  # the mesh axis of the exchanges


def by_ragged_dot(x_MD, w_EDF, size_E):
    """Returns y_MF: the first size_E[0] rows times w_EDF[0], the next size_E[1] times w_EDF[1], …, and 0 after the last."""
    real_M1 = (jnp.arange(len(x_MD)) < jnp.sum(size_E))[:, None]  # what comes after the last group is not said to be 0
    return jnp.where(real_M1, jax.lax.ragged_dot(jnp.where(real_M1, x_MD, 0), w_EDF, size_E), 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def to_slots(A: int, x_ND, choice_S, slot_M):
    """Returns x_SD: in each slot the token of its choice; zeros in slots whose choice is M or more."""
    return _rows(x_ND, choice_S // A)


@jax.custom_vjp
def from_slots(y_SD, choice_S, slot_M):
    """Returns y_MD: for each choice what stands in its slot; zeros for slots that are S or more."""
    return _rows(y_SD, slot_M)


def _rows(x_ND, row_S):
    return x_ND.at[row_S].get(mode="fill", fill_value=0)


def _to_slots_backward(A, saved, d_SD):
    d_MD = from_slots(d_SD, *saved)
    return d_MD.reshape(-1, A, d_MD.shape[1]).sum(1), None, None


to_slots.defvjp(lambda A, x, choice, slot: (to_slots(A, x, choice, slot), (choice, slot)), _to_slots_backward)
from_slots.defvjp(lambda y, choice, slot: (from_slots(y, choice, slot), (choice, slot)),
                  lambda saved, d_MD: (to_slots(1, d_MD, *saved), None, None))


def inverse(slot_M, S: int):
    """Returns choice_S: which choice has each slot; M where none has."""
    M = len(slot_M)
    return jnp.full(S, M, jnp.int32).at[slot_M].set(jnp.arange(M, dtype=jnp.int32), mode="drop")


def ranks(expert_M, E: int):
    """Returns (how many before it chose the same expert, for each choice; how many chose each expert). Ids of E or more
    are no expert's."""
    count_E = jnp.bincount(expert_M, length=E).astype(jnp.int32)
    first_E = jnp.cumsum(count_E) - count_E
    order_M = jnp.argsort(expert_M, stable=True)
    place_M = inverse(order_M, len(order_M))
    return place_M - first_E.at[expert_M].get(mode="fill", fill_value=0), count_E


def dropless(x_ND, expert_NA, real_N, E: int, parts: int, compute):
    """Returns y_NAD, every choice computed: `compute(x_MD, size_L)` runs rows that are sorted by expert."""
    A = expert_NA.shape[1]
    expert_M = jnp.where(real_N[:, None], expert_NA, E).reshape(-1)
    rank_M, count_E = ranks(expert_M, E)
    if parts == 1:
        slot_M, S = _start(count_E).at[expert_M].get(mode="fill", fill_value=len(rank_M)) + rank_M, len(rank_M)
        choice_S = inverse(slot_M, S)
        y_SD = compute(to_slots(A, x_ND, choice_S, slot_M), count_E)
    else:
        L = E // parts
        S = len(x_ND) * min(A, L)  # most that one device can be sent by another
        count_PL = count_E.reshape(parts, L)
        before_E = (jnp.cumsum(count_PL, axis=1) - count_PL).reshape(-1)  # on the same device, of its earlier experts
        device_E = jnp.arange(E, dtype=jnp.int32) // L
        slot_M = (device_E * S + before_E).at[expert_M].get(mode="fill", fill_value=parts * S) + rank_M
        choice_S = inverse(slot_M, parts * S)
        y_SD = _dense_exchange(to_slots(A, x_ND, choice_S, slot_M), count_PL, compute)
    return from_slots(y_SD, choice_S, slot_M).reshape(*expert_NA.shape, -1)


def _dense_exchange(x_SD, count_PL, compute):
    """Sends each device its slots, computes what was received, and sends it back."""
    parts, L = count_PL.shape
    swap = partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True)
    x_SD, count_PL = swap(x_SD), swap(count_PL)  # now P are the senders
    S = len(x_SD) // parts
    end_PL = jnp.cumsum(count_PL, axis=1)
    slot_S = jnp.arange(S, dtype=jnp.int32)
    expert_PS = jnp.sum(slot_S[None, :, None] >= end_PL[:, None], axis=2)  # L: an empty slot
    rank_S, count_L = ranks(expert_PS.reshape(-1), L)
    place_S = _start(count_L).at[expert_PS.reshape(-1)].get(mode="fill", fill_value=len(rank_S)) + rank_S
    sorted_S = inverse(place_S, len(place_S))
    y_SD = compute(to_slots(1, x_SD, sorted_S, place_S), count_L)
    return swap(from_slots(y_SD, sorted_S, place_S))


def with_capacity(x_BTD, expert_BTA, real_BT, E: int, parts: int, C: int, compute):
    """Returns (y_BTAD, how many choices were dropped): of each row an expert takes the first C that chose it.

    A row's experts fill up in the order of its positions, so what happens to a token depends neither on later ones nor on
    other rows, nor on how rows are spread over devices and micro-batches. `compute(x_LSD)` runs S slots of each expert.
    """
    B, T, A = expert_BTA.shape
    expert_BM = jnp.where(real_BT[:, :, None], expert_BTA, E).reshape(B, T * A)
    rank_BM, _ = jax.vmap(lambda expert_M: ranks(expert_M, E))(expert_BM)
    kept_BM = (rank_BM < C) & (expert_BM < E)
    row_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
    slot_M = jnp.where(kept_BM, (expert_BM * B + row_B1) * C + rank_BM, E * B * C).reshape(-1)
    choice_S = inverse(slot_M, E * B * C)
    x_ESD = to_slots(A, x_BTD.reshape(B * T, -1), choice_S, slot_M).reshape(E, B * C, -1)
    if parts > 1:
        x_ESD = jax.lax.all_to_all(x_ESD, AXIS, split_axis=0, concat_axis=1, tiled=True)
    y_ESD = compute(x_ESD)
    if parts > 1:
        y_ESD = jax.lax.all_to_all(y_ESD, AXIS, split_axis=1, concat_axis=0, tiled=True)
    y_MD = from_slots(y_ESD.reshape(E * B * C, -1), choice_S, slot_M)
    return y_MD.reshape(B, T, A, -1), jnp.sum((expert_BM < E) & ~kept_BM)


def _start(count_E):
    return jnp.cumsum(count_E) - count_E
