"""Batches of ranked answers out of preference files. NumPy only.

B group of a batch (a prompt and its answers), K answer of a group (padded), T position (prompt, then answer, then padding).
The forms of a line are in preference_rows.py. The order is a function of the seed and the step alone, as in loader.py.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator

import numpy as np

from jaxllm.data.json_rows import json_rows
from jaxllm.data.preference_config import PreferenceData
from jaxllm.data.preference_rows import Group, Prompt, Unusable, group_of, split_key
from jaxllm.data.shuffle import EndlessOrder
from jaxllm.data.tokenize import is_held_out
from jaxllm.errors import UserError

COUNTED = ("groups", "pairs", "held out", "demonstrations", "longest", "truncated")
# why lines and answers are left out; "equal": answers with different ranks, "short": fewer than two answers are left
DROPPED = ("tied", "too long", "empty answers", "repeated answers", "equal", "other prompt", "short")
Encode = Callable[[Prompt, str], tuple[list[int], list[int]]]  # (prompt, answer) -> (the prompt's ids, the answer's)


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class TokenGroup:
    """A group whose text is tokens; every answer has the same prompt before it."""

    prompt: np.ndarray  # int32, a fifth of a list's memory
    answers: list[np.ndarray]
    rank: list[int]
    objective: int
    margin: float


class Groups:
    """Tokenised groups of several sources, those of a source side by side."""

    def __init__(self, seq_len: int, pad_id: int):
        self.seq_len, self.pad_id, self.sizes, self.digests, self.of = seq_len, pad_id, [], [], []

    def add_source(self, groups: list[TokenGroup]) -> None:
        said = hashlib.blake2b(digest_size=12)
        for g in groups:
            said.update(repr((g.rank, g.objective, g.margin)).encode())
            for ids in (g.prompt, *g.answers):
                said.update(len(ids).to_bytes(4, "little") + ids.astype("<i4").tobytes())
        self.of += groups
        self.sizes.append(len(groups))
        self.digests.append(said.hexdigest())

    def __len__(self) -> int:
        return len(self.of)

    @property
    def n_answers(self) -> int:
        """Most answers of a group, K of every batch."""
        return max((len(g.answers) for g in self.of), default=0)

    def gather(self, row_B: np.ndarray, n_answers: int) -> dict[str, np.ndarray]:
        """Returns the batch of these groups; -1: a group of padding, without any answer.

        token_BKT; length_BK, prompt and answer together, and prompt_BK, where the answer begins; rank_BK, 0 the best;
        present_BK; objective_B, a place in data.objectives; margin_B, 0 where none was told. An answer that is not present
        has length 1, so that its last token is there to be read.
        """
        B, K = len(row_B), n_answers
        token_BKT = np.full((B, K, self.seq_len), self.pad_id, np.int32)
        length_BK, prompt_BK = np.ones((B, K), np.int32), np.zeros((B, K), np.int32)
        rank_BK, present_BK = np.zeros((B, K), np.int32), np.zeros((B, K), bool)
        objective_B, margin_B = np.zeros(B, np.int32), np.zeros(B, np.float32)
        for b, row in enumerate(row_B):
            if row < 0:
                continue
            group = self.of[row]
            n = len(group.prompt)
            objective_B[b], margin_B[b] = group.objective, group.margin
            for k, answer in enumerate(group.answers):
                token_BKT[b, k, :n], token_BKT[b, k, n : n + len(answer)] = group.prompt, answer
                length_BK[b, k], prompt_BK[b, k], rank_BK[b, k], present_BK[b, k] = n + len(answer), n, group.rank[k], True
        return {"token_BKT": token_BKT, "length_BK": length_BK, "prompt_BK": prompt_BK, "rank_BK": rank_BK,
                "present_BK": present_BK, "objective_B": objective_B, "margin_B": margin_B}


@dataclasses.dataclass(frozen=True)
class Preferences:
    """What preference files hold. Demonstrations are groups of K = 1 or more answers without ranks, all for training."""

    train: Groups
    validation: Groups
    demonstrations: Groups
    counts: dict[str, dict[str, int]]  # source -> what it held and what was left out
    weights: list[float]  # of the sources, in their order

    @property
    def made_of(self) -> dict[str, list]:
        """Returns, of each source, a digest of its training groups and its weight: with the seed, what step s depends on."""
        told = zip(self.counts, self.train.digests, self.weights, strict=True)
        return {name: [digest, weight] for name, digest, weight in told}

    def describe(self) -> str:
        """Returns a line a source."""
        lines = []
        for name, n in self.counts.items():
            dropped = ", ".join(f"{n[kind]:,} {kind}" for kind in DROPPED if n[kind])
            lines.append(f"data: {name}: {n['groups']:,} groups, {n['pairs']:,} pairs, {n['held out']:,} groups held out"
                         + (f", {n['demonstrations']:,} demonstrations" if n["demonstrations"] else "")
                         + f"; longest {n['longest']:,} tokens" + (f"; left out: {dropped}" if dropped else "")
                         + (f"; {n['truncated']:,} prompts truncated" if n["truncated"] else ""))
        return "\n".join(lines)


def read(cfg: PreferenceData, encode: Encode, pad_id: int, log: Callable[[str], None] = to_stderr) -> Preferences:
    """Returns the groups of all sources, tokenised. Raises UserError, with file and line, for what is no preference.

    `encode` gives the ids of a prompt, up to where the answer begins, and of the answer with its end token. `log` gets a line
    every few seconds where that takes long.
    """
    if not cfg.sources:
        raise UserError("data.sources: none given; should be e.g. --data.sources.NAME.path=preferences.jsonl")
    train, validation, demonstrations = (Groups(cfg.seq_len, pad_id) for _ in range(3))
    counts = {}
    for name, source in cfg.sources.items():
        n = counts[name] = dict.fromkeys((*COUNTED, *DROPPED), 0)
        default = cfg.objectives.index(source.objective) if source.objective else 0
        of_split = {id(split): [] for split in (train, validation, demonstrations)}
        for where, row in json_rows(source.path, f"data.sources.{name}.path", log):
            group = _usable(row, where, cfg, default, n)
            tokens = group and _tokens(group, where, cfg, encode, n)
            if tokens is None:
                continue
            held_out = is_held_out(split_key(group.prompt), cfg.validation)
            if group.demonstration:
                n["demonstrations"] += 1
                of_split[id(demonstrations)].append(tokens)
            else:
                n["held out" if held_out else "groups"] += 1
                n["pairs"] += 0 if held_out else sum(a < b for a in group.rank for b in group.rank)
                of_split[id(validation if held_out else train)].append(tokens)
        for split in (train, validation, demonstrations):
            split.add_source(of_split[id(split)])
    found = Preferences(train, validation, demonstrations, counts, [source.weight for source in cfg.sources.values()])
    if not len(train):
        raise UserError(f"data.sources: no group of ranked answers is left to train on\n{found.describe()}".replace("\n", "; "))
    return found


def _usable(row: dict, where: str, cfg: PreferenceData, default: int, n: dict[str, int]) -> Group | None:
    """Returns a line's group, or None where it is left out, and counts it."""
    try:
        return group_of(row, where, cfg.objectives, default, lenient=cfg.unusable == "drop", counts=n)
    except Unusable as e:
        if e.kind not in ("tied", "short") and cfg.unusable == "error":
            raise UserError(f"{where}: {e}; data.unusable=drop leaves such lines out") from None
        n[e.kind] += 1
        return None


def _tokens(group: Group, where: str, cfg: PreferenceData, encode: Encode, n: dict[str, int]) -> TokenGroup | None:
    """Returns a group as tokens, its prompt cut as configured, or None where it is too long."""
    try:
        encoded = [encode(group.prompt, answer) for answer in group.answers]
    except (UserError, ValueError) as e:  # what the template refuses
        raise UserError(f"{where}: {e}") from None
    prompt, answers = list(encoded[0][0]), [list(answer) for _, answer in encoded]
    assert all(list(ids) == prompt for ids, _ in encoded), "the template writes a prompt that depends on the answer"
    longest = max(map(len, answers))
    if len(prompt) + longest > cfg.seq_len:
        room = cfg.seq_len - longest
        if cfg.too_long == "drop" or room < 1:
            n["too long"] += 1
            return None
        n["truncated"] += 1
        prompt = shortened(prompt, room)
    n["longest"] = max(n["longest"], len(prompt) + longest)
    prompt, *answers = (np.array(ids, np.int32) for ids in (prompt, *answers))
    return TokenGroup(prompt, answers, group.rank, group.objective, group.margin)


def shortened(ids: list[int], room: int) -> list[int]:
    """Returns a prompt of at most `room` tokens: the first one, which may be <bos>, and the last ones."""
    return ids if len(ids) <= room else [ids[0], *ids[len(ids) - room + 1 :]]


class PreferenceInput:
    """The training batches: groups in an endless order, shuffled anew every epoch. Step s is a function of the seed and s."""

    def __init__(self, preferences: Preferences, batch_size: int, seed: int, share: int = 0, shares: int = 1):
        if batch_size % shares:
            raise UserError(f"train.batch_size={batch_size} is not divisible by the {shares} processes")
        self.groups, self.batch_size = preferences.train, batch_size
        self.n_own, self.begin = batch_size // shares, share * (batch_size // shares)
        self.order = EndlessOrder(self.groups.sizes, preferences.weights, seed)
        if not self.order.epoch_size:
            raise UserError("data.sources: no source has both groups and a weight above 0")

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Yields this process's share of the batch of each step from `start_step` (the number of steps done) on."""
        step, K = start_step, self.groups.n_answers
        while True:
            yield self.groups.gather(self.order.rows(step * self.batch_size + self.begin, self.n_own), K)
            step += 1

    def steps(self, epochs: float) -> int:
        """Returns how many steps read so many epochs; the last one also reads the start of the next epoch."""
        return max(1, -(-round(self.order.epoch_size * epochs) // self.batch_size))


class PreferenceRows:
    """Groups once, in their order: the held-out ones, or the demonstrations; the last batch is filled up with padding."""

    def __init__(self, groups: Groups, batch_size: int, rows: int = 0, share: int = 0, shares: int = 1):
        n = min(rows, len(groups)) if rows else len(groups)
        chosen = np.arange(n) * len(groups) // max(n, 1)  # spread evenly over them
        self.groups, self.batch_size = groups, batch_size
        self.chosen = np.concatenate([chosen, np.full(-n % batch_size, -1)]).reshape(-1, batch_size)
        n_own = batch_size // shares
        self.part = slice(share * n_own, (share + 1) * n_own)

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields this process's share of each batch."""
        K = self.groups.n_answers
        for row_B in self.chosen:
            yield self.groups.gather(row_B[self.part], K)
