"""Addition with a chain of thought: prompts whose answer is known, demonstrations, and pairs with a known better one.

    prompt           47+38=
    demonstration    7+8+0=15,4+3+1=8;85      digit by digit from the right: the digits, what is carried, their sum; the answer
    direct prompt    47+38=;                  as if the chain were written already; its demonstration is the answer

A row is a function of the settings, the split and an index: nothing is drawn in order. The two splits share no pair of numbers.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "evaluation"]


@dataclass(frozen=True, kw_only=True)
class ArithmeticConfig:
    digits: int = 2  # most digits of a number that is added
    noise: float = 0.0  # chance that a demonstration has a digit's sum wrong by one; what follows builds on what is written
    held_out: float = 0.1  # share of all pairs of numbers that are for evaluation
    seed: int = 0  # of everything but which pairs are held out

    def __post_init__(self):
        for name, ok, should in (
            ("digits", 1 <= self.digits <= 18, "1 to 18"), ("noise", 0 <= self.noise <= 1, "in [0, 1]"),
            ("held_out", 0 <= self.held_out < 1, "in [0, 1)"),
        ):
            if not ok:
                raise ValueError(f"arithmetic.{name}={getattr(self, name)}: should be {should}")


class Arithmetic:
    """The task. Rows are dicts that JSON can hold: "prompt", "answer" (the true one), and more by method."""

    def __init__(self, cfg: ArithmeticConfig):
        self.cfg = cfg

    def prompt(self, index: int, split: Split = "train", *, direct: bool = False) -> dict:
        """Returns {"prompt", "answer"}."""
        a, b = self._pair(self._draws("prompt", split, index), split)
        return {"prompt": f"{a}+{b}={';' if direct else ''}", "answer": str(a + b)}

    def demonstration(self, index: int, split: Split = "train", *, direct: bool = False) -> dict:
        """Returns {"prompt", "response", "answer"}; with `noise`, the response may be wrong. A direct one has no chain."""
        draws = self._draws("demonstration", split, index)
        a, b = self._pair(draws, split)
        written = self._chain(a, b, draws)
        return {"prompt": f"{a}+{b}={';' if direct else ''}", "response": written.rpartition(";")[2] if direct else written,
                "answer": str(a + b)}

    def preference(self, index: int, split: Split = "train", *, flip: float = 0.0) -> dict:
        """Returns {"prompt", "chosen", "rejected", "answer", "flipped"}: two demonstrations of which one is right.

        With the chance `flip` they are swapped, as people err. Raises ValueError without noise, as all would be right.
        """
        if not 0 < self.cfg.noise < 1:
            raise ValueError(f"arithmetic.noise={self.cfg.noise}: should be in (0, 1) for pairs of a right and a wrong answer")
        draws = self._draws("preference", split, index)
        while True:
            a, b = self._pair(draws, split)
            pair = sorted((self._chain(a, b, draws) for _ in range(2)), key=lambda written: not self.is_right(a, b, written))
            if self.is_right(a, b, pair[0]) and not self.is_right(a, b, pair[1]):
                break
        flipped = draws.random() < flip
        chosen, rejected = reversed(pair) if flipped else pair
        return {"prompt": f"{a}+{b}=", "chosen": chosen, "rejected": rejected, "answer": str(a + b), "flipped": flipped}

    def is_right(self, a: int, b: int, response: str) -> bool:
        """Returns whether the answer behind the last ";" is the sum: what `kind: exact, extract: separator` looks at."""
        return ";" in response and response.rpartition(";")[2] == str(a + b)

    def share_right(self) -> float:
        """Returns how often a demonstration is right: exactly those are in which no sum is wrong, as the first wrong one
        makes its own digit of the answer wrong and no later one touches that."""
        return (1 - self.cfg.noise) ** self.cfg.digits

    def _draws(self, what: str, split: Split, index: int) -> random.Random:
        return random.Random(f"{self.cfg.seed}/{what}/{split}/{self.cfg.digits}/{index}")  # hashed: alike in every process

    def _pair(self, draws: random.Random, split: Split) -> tuple[int, int]:
        for _ in range(100_000):
            a, b = draws.randrange(10**self.cfg.digits), draws.randrange(10**self.cfg.digits)
            share = int.from_bytes(hashlib.blake2b(f"{a}+{b}".encode(), digest_size=7).digest(), "big") / 2.0**56
            if (share < self.cfg.held_out) == (split == "evaluation"):
                return a, b
        raise ValueError(f"arithmetic.held_out={self.cfg.held_out}: holds no pair of numbers of {self.cfg.digits} digits out")

    def _chain(self, a: int, b: int, draws: random.Random) -> str:
        steps, carried, answer = [], 0, 0
        for place in range(self.cfg.digits):
            x, y = a // 10**place % 10, b // 10**place % 10
            total = x + y + carried
            if draws.random() < self.cfg.noise:
                error = draws.choice((-1, 1))
                total += error if 0 <= total + error <= 19 else -error
            steps.append(f"{x}+{y}+{carried}={total}")
            last = place == self.cfg.digits - 1
            answer += (total if last else total % 10) * 10**place
            carried = total // 10
        return f"{','.join(steps)};{answer}"
