"""Which examples an epoch holds, and in which order: a function of (seed, epoch) alone. NumPy only.

M member of the mixture (a file or a task), N example of an epoch.

An epoch holds min(examples, cap) of each member, times its weight (examples-proportional mixing with a limit: Raffel et al.
2020, section 3.5.2; Wei et al. 2022 have 3000). A member that gives fewer than it has goes on in the next epoch, one that
gives more begins again, newly shuffled: over time each of its rows is read equally often.
"""

import math

import numpy as np

from jaxllm.data.draws import permutation


def examples_of_members(size_M, weight_M, *, mix: str, cap: int) -> list[int]:
    """Returns how many examples of each member an epoch holds, at least one; the cap is for mixtures of two or more."""
    counted_M = [min(size, cap) if len(size_M) > 1 else size for size in size_M]
    if mix == "weights":  # as many in all, shared out by weight alone
        total = sum(counted_M) / math.fsum(weight_M)
        return [max(1, round(total * weight)) for weight in weight_M]
    return [max(1, round(weight * counted)) for counted, weight in zip(counted_M, weight_M, strict=True)]


def epoch_order(epoch: int, names: list[str], size_M: list[int], count_M: list[int], seed: int):
    """Returns arrays (member_N, row_N, time_N) of an epoch's examples in order; time: how often the row was read before."""
    members, rows, times = [], [], []
    for m, (name, size, count) in enumerate(zip(names, size_M, count_M, strict=True)):
        at_N = np.arange(epoch * count, (epoch + 1) * count)
        for time in range(int(at_N[0] // size), int(at_N[-1] // size) + 1):
            here_N = at_N[at_N // size == time] % size
            rows.append(permutation(size, "rows", seed, name, time)[here_N])
            members.append(np.full(len(here_N), m))
            times.append(np.full(len(here_N), time))
    order_N = permutation(sum(count_M), "epoch", seed, epoch)
    return tuple(np.concatenate(arrays)[order_N] for arrays in (members, rows, times))
