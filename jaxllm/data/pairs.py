"""Pairs of a better and a worse answer, out of groups of ranked ones. NumPy only.

N pair of a split, B pair of a batch, K = 2 answers of a pair (the better one first), T position, as in preference.py.
"""

import dataclasses

import numpy as np

from jaxllm.data.preference import Groups, Preferences, shortened
from jaxllm.errors import UserError

ARRAYS = ("token_BKT", "length_BK", "prompt_BK")


class Pairs(Groups):
    """Tokenised pairs, as groups of two answers; those of a source side by side."""

    def __init__(self, groups: Groups, which: str):
        super().__init__(groups.seq_len, groups.pad_id)
        self.digests = groups.digests
        self.answers = Groups(groups.seq_len, groups.pad_id)  # each answer of a pair once, though it may be in several
        self.others: Groups | None = None  # for each pair: its prompt, and two answers to another prompt
        self.ref_logp_N2 = self.ref_other_N2 = None
        rows, first = [], 0
        for size in groups.sizes:
            before = len(self.of)
            for group in groups.of[first : first + size]:
                places: dict[int, int] = {}
                for pair in ordered(group.rank, which):
                    self.of.append(dataclasses.replace(group, answers=[group.answers[k] for k in pair], rank=[0, 1]))
                    rows.append([self._place(places, group, k) for k in pair])
            self.sizes.append(len(self.of) - before)
            first += size
        self.answer_N2 = np.array(rows, np.int64).reshape(-1, 2)

    @property
    def n_answers(self) -> int:
        return 2

    def _place(self, places: dict[int, int], group, k: int) -> int:
        """Returns where a group's k-th answer stands among the answers, putting it there the first time."""
        if k not in places:
            places[k] = len(self.answers.of)
            self.answers.of.append(dataclasses.replace(group, answers=[group.answers[k]], rank=[0]))
        return places[k]

    def put_beside_others(self, train: "Pairs") -> None:
        """Notes, for each pair, its prompt with both answers of another pair: of the next one with another prompt.

        "Next" among training pairs in their order, cyclic; a prompt that leaves no room is cut. Raises UserError where all
        training pairs have one prompt.
        """
        after = next_with_another_prompt(train)
        self.others = Groups(self.seq_len, self.pad_id)
        for i, pair in enumerate(self.of):
            other = train.of[after[i] if self is train else i % len(train)]  # a held-out prompt is not a training pair's
            prompt = shortened(pair.prompt.tolist(), self.seq_len - max(map(len, other.answers)))
            self.others.of.append(dataclasses.replace(pair, prompt=np.array(prompt, np.int32), answers=other.answers))

    def gather(self, row_B: np.ndarray, n_answers: int) -> dict[str, np.ndarray]:
        """Returns the batch of these pairs; -1: a pair of padding.

        token_BKT, length_BK, prompt_BK and margin_B as of groups; real_B, 0 for padding; where they are known, ref_logp_BK, the
        reference's log-probabilities of the answers, and the same of answers to other prompts (other_...).
        """
        whole = super().gather(row_B, n_answers)
        batch = {name: whole[name] for name in (*ARRAYS, "margin_B")} | {"real_B": (row_B >= 0).astype(np.float32)}
        if self.others is not None:
            whole = self.others.gather(row_B, n_answers)
            batch |= {f"other_{name}": whole[name] for name in ARRAYS}
        for name, known_N2 in (("ref_logp_BK", self.ref_logp_N2), ("ref_other_BK", self.ref_other_N2)):
            if known_N2 is not None:
                batch[name] = np.where(row_B[:, None] >= 0, known_N2[row_B], 0.0).astype(np.float32)
        return batch


def pairs_of(found: Preferences, which: str, *, with_others: bool) -> Preferences:
    """Returns what preference files hold as pairs; `with_others`: each beside answers to another prompt too."""
    train, validation = Pairs(found.train, which), Pairs(found.validation, which)
    if with_others:
        train.put_beside_others(train)
        validation.put_beside_others(train)
    return dataclasses.replace(found, train=train, validation=validation)


def ordered(rank: list[int], which: str) -> list[tuple[int, int]]:
    """Returns (better, worse) of all differently ranked answers, or of the first best and the first worst alone."""
    if which == "best_worst":
        best, worst = min(rank), max(rank)
        return [(rank.index(best), rank.index(worst))] if best < worst else []
    return [(k, j) for k, a in enumerate(rank) for j, b in enumerate(rank) if a < b]


def next_with_another_prompt(pairs: Pairs) -> list[int]:
    """Returns, for each pair, the next one, cyclic, whose prompt is another."""
    n, same = len(pairs), [False] * len(pairs)
    for i in range(n):
        same[i] = np.array_equal(pairs.of[i].prompt, pairs.of[(i + 1) % n].prompt)
    if all(same):
        raise UserError("data.sources: every training pair has the same prompt; loss=kto compares with answers to other "
                        "prompts: give at least two")
    after = [0] * n
    for i in reversed(range(2 * n)):  # twice: the last ones know theirs only once the first ones do
        at, following = i % n, (i + 1) % n
        after[at] = after[following] if same[at] else following
    return after
