"""How long a ladder takes: from the machine's matmul rate at first, then from the speed of the runs that are done."""

import time

import numpy as np

from jaxllm.plan.ladder_runs import Rung
from jaxllm.report.read import read_run

SHARE = 0.4  # of the peak, or of the matmul rate, that a run is expected to reach before one was measured
OVERHEAD = 10.0  # seconds a run takes beside its steps before one was measured: compiling, evaluating, saving


def machine_flops(precision: str) -> float:
    """Returns the FLOP/s that the devices reach: the chip's published peak where it is known, else that of a large matmul."""
    import jax
    import jax.numpy as jnp

    from jaxllm.hardware import chip
    from jaxllm.train.state import compute_dtype

    device = jax.devices()[0]
    known = chip(device.device_kind)
    peak = known.peak_flops(compute_dtype(precision, device.platform).name) if known else None
    if peak:
        return peak * jax.device_count()
    square, multiply = jnp.ones((1024, 1024), jnp.float32), jax.jit(jnp.dot)
    multiply(square, square).block_until_ready()
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        multiply(square, square).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * 1024**3 / min(seconds)


class Clock:
    """The seconds that runs take: each size's measured tokens a second; of sizes without one, a line through the others'."""

    def __init__(self, rungs: list[Rung], flops_per_s: float):
        self.rungs, self.expected = rungs, SHARE * flops_per_s
        self.speed: dict[str, float] = {}  # of a size: seconds a token
        self.beside: list[float] = []  # seconds of each run that was done here beside its steps

    def measure(self, rung: Rung, wall: float | None = None) -> None:
        """Takes a finished run's speed; `wall` is what all of it took, where that was measured."""
        rate = read_run(rung.folder).series("tokens_per_s").value
        rate = rate[np.isfinite(rate) & (rate > 0)]
        if len(rate):
            self.speed[rung.size] = 1 / float(np.median(rate))
            if wall is not None:
                self.beside.append(max(wall - rung.tokens * self.speed[rung.size], 0.0))

    def seconds(self, rung: Rung) -> float:
        overhead = float(np.median(self.beside)) if self.beside else OVERHEAD
        return rung.tokens * self._seconds_a_token(rung) + overhead

    def _seconds_a_token(self, rung: Rung) -> float:
        if rung.size in self.speed:
            return self.speed[rung.size]
        known = {r.size: r.flops_a_token for r in self.rungs if r.size in self.speed}
        if not known:
            return rung.flops_a_token / self.expected
        x, y = np.array(list(known.values())), np.array([self.speed[size] for size in known])
        slope, begin = np.polyfit(x, y, 1) if len(x) > 1 else (y[0] / x[0], 0.0)
        return float(max(begin + slope * rung.flops_a_token, rung.flops_a_token * np.min(y / x)))
