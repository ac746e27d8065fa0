"""Says every few seconds how far long work over files has come."""

import time
from collections.abc import Callable


class Progress:
    """Work of `total` bytes; `log` gets a line now and then, and none for work that is short."""

    def __init__(self, what: str, total: int, log: Callable[[str], None], every: float = 5.0):
        self.what, self.total, self.log, self.every = what, max(total, 1), log, every
        self.began = self.said = time.perf_counter()

    def show(self, position: int, more: str = "") -> None:
        now = time.perf_counter()
        if now - self.said < self.every or not position:
            return
        self.said = now
        rate = position / (now - self.began)
        self.log(f"{self.what}, {position / self.total:.0%} of {self.total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, "
                 + (f"{more}, " if more else "") + f"{max(self.total - position, 0) / rate:.0f} s left")
