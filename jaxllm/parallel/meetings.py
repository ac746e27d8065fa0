"""When groups that train alone meet, and over which parameters. Pure Python: times are numbers of inner steps done."""

from collections.abc import Iterator
from typing import NamedTuple


class Meetings(NamedTuple):
    """Fragment p is contributed at offset p H / P of every `inner_steps` H, and what came of it is merged `delay` steps later.

    One fragment without delay is DiLoCo; several, with a delay below H, are Streaming DiLoCo (Douillard et al. 2025); a delay
    of k H is bounded staleness: a group goes on for k rounds without what the others did (Ho et al. 2013).
    """

    inner_steps: int
    fragments: int
    delay: int
    end: int | None  # the run's last step, when all that is under way is merged; None: unknown

    @property
    def slots(self) -> int:
        """The most contributions of one fragment that are under way at once."""
        return -(-self.delay // self.inner_steps)

    def offset(self, p: int) -> int:
        return p * self.inner_steps // self.fragments

    def by_remainder(self) -> list[int]:
        """Returns, for every remainder of a step by `inner_steps`, 1 + the fragment contributed then, or 0."""
        table = [0] * self.inner_steps
        for p in range(self.fragments):
            table[self.offset(p)] = 1 + p
        return table

    def contributed(self, step: int) -> int | None:
        """Returns the fragment that is contributed after so many steps, if there is one."""
        here = self.by_remainder()[step % self.inner_steps] if step > 0 else 0
        return here - 1 if here else None

    def merged(self, step: int) -> int | None:
        """Returns the fragment whose contribution of `delay` steps ago is merged after so many steps."""
        return self.contributed(step - self.delay)

    def under_way(self, p: int, step: int) -> list[int]:
        """Returns the steps whose contribution of fragment p waits to be merged when `step` steps are done, oldest first."""
        return [s for s in range(max(step - self.delay + 1, 1), step + 1) if self.contributed(s) == p] if self.delay else []

    def ends_in_time(self) -> bool:
        """Returns whether the last step merges all there is without being told."""
        return self.end is None or (self.delay == 0 and self.fragments == 1 and self.end % self.inner_steps == 0)


class Fragments(NamedTuple):
    """Which part of each parameter is in which fragment: layer l of stacked layers in l mod P, any other array in one."""

    n: int
    whole: tuple[int | None, ...]  # for every leaf: the fragment that has all of it; None: its layers are dealt out

    def take(self, p: int, leaves: list) -> list:
        """Returns fragment p of a tree's leaves."""
        if self.n == 1:
            return list(leaves)
        return [x if q == p else x[p :: self.n] for x, q in zip(leaves, self.whole, strict=True) if q in (p, None)]

    def put(self, p: int, leaves: list, part: list) -> list:
        """Returns the leaves with fragment p replaced."""
        if self.n == 1:
            return list(part)
        news: Iterator = iter(part)
        return [x if q not in (p, None) else next(news) if q == p else x.at[p :: self.n].set(next(news))
                for x, q in zip(leaves, self.whole, strict=True)]


def cut(n: int, leaves: list[tuple[tuple[int, ...], bool]]) -> tuple[Fragments, list[int]]:
    """Returns n fragments of parameters given as (shape, whether layers are stacked in front), and their sizes.

    Layers are dealt out in turn, as in the paper's strided pattern; what is no layer goes, largest first, where least is.
    """
    sizes, whole = [0] * n, [None] * len(leaves)
    flat = [_size(shape) for shape, _ in leaves]
    for (shape, stacked), size in zip(leaves, flat, strict=True):
        if stacked:
            for p in range(n):
                sizes[p] += size // shape[0] * len(range(p, shape[0], n))
    for i in sorted((i for i, (_, stacked) in enumerate(leaves) if not stacked), key=lambda i: -flat[i]):
        whole[i] = sizes.index(min(sizes))
        sizes[whole[i]] += flat[i]
    return Fragments(n, tuple(whole)), sizes


def _size(shape: tuple[int, ...]) -> int:
    n = 1
    for d in shape:
        n *= d
    return n


def bytes_per_token(n_params: int, n_groups: int, tokens: int, inner_steps: int) -> float:
    """Returns the bytes that each group sends for a token of the whole batch, in float32.

    An all-reduce sends 2 (G - 1) / G of an array (Patarasu and Yuan 2009), once every `inner_steps` steps.
    """
    return bytes_of_meeting(n_params, n_groups) / (tokens * inner_steps)


def bytes_of_meeting(n_params: int, n_groups: int) -> float:
    """Returns the bytes that each group sends when it meets the others over so many parameters, in float32."""
    return 4 * n_params * 2 * (n_groups - 1) / n_groups
