"""What a run writes while it goes: metrics.jsonl, incidents.jsonl, samples.jsonl, TensorBoard, the progress display."""

import contextlib
import json
import pathlib
import resource
import sys
import time

import jax

from jaxllm.errors import RunError, UserError, writing
from jaxllm.train.run_folder import drop_lines_after


class RunLog:
    """Appends to the run folder's logs and shows progress. Lines are flushed at once, so a kill loses none.

    `writes` False: does nothing, as in every process of a run but the first.
    """

    def __init__(self, folder: pathlib.Path, *, steps: int, start: int, tensorboard: bool, writes: bool = True):
        self.folder, self.steps, self.board, self.writes = folder, steps, None, writes
        if not writes:
            return
        self.terminal = sys.stderr.isatty()
        with writing(folder):
            for name in ("metrics.jsonl", "samples.jsonl"):
                drop_lines_after(folder / name, start or -1)  # what begins anew evaluates before its first step again
            if tensorboard:
                from jaxllm.train.tensorboard import Board

                self.board = Board(folder / "tensorboard", start)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.board is not None:
            with contextlib.suppress(OSError):  # what it could not write was told when it could not
                self.board.close()

    def say(self, text: str) -> None:
        """Prints a line above the progress line."""
        if not self.writes:
            return
        with contextlib.suppress(BrokenPipeError):  # `2>&1 | head` ends the display, not the run
            print(f"\r\033[K{text}" if self.terminal else text, file=sys.stderr, flush=True)

    def metrics(self, line: dict) -> None:
        self._append("metrics.jsonl", line)
        if self.board is not None:
            with writing(self.folder / "tensorboard"):
                self.board.scalars(line["step"], {k: v for k, v in line.items() if k not in ("step", "time")})

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._append("samples.jsonl", {"step": step, "prompt": prompt, "text": text})
        shown = " ".join(f"{prompt}{text}".split())
        self.say(f"  sample at step {step}: {shown[:160]}")
        if self.board is not None:
            with writing(self.folder / "tensorboard"):
                self.board.text(step, "sample", f"{prompt}{text}")

    def incident(self, step: int, kind: str, message: str) -> None:
        self.say(f"! {message}")
        with contextlib.suppress(RunError, UserError):  # an incident is often told while the run ends for another reason
            self._append("incidents.jsonl", {"time": time.time(), "step": step, "kind": kind, "message": message})

    def progress(self, line: dict, seconds_left: float) -> None:
        parts = [f"step {line['step']}/{self.steps}", f"loss {line['loss']:.4f}", f"lr {line['lr']:.2e}",
                 f"{line['tokens_per_s']:,.0f} tok/s"]
        if "law_loss" in line:
            parts.insert(2, f"law {line['law_loss']:.4f}" + (f" ({line['law_excess']:+.1%})" if "law_excess" in line else ""))
        if "model_tflops_per_s" in line:
            parts.append(f"{line['model_tflops_per_s']:.3g} TFLOP/s")
        if "mfu" in line:
            parts.append(f"MFU {line['mfu']:.1%}")
        parts.append(f"ETA {clock(seconds_left)}")
        self.show("  ".join(parts))

    def show(self, text: str) -> None:
        """Shows how far the run is: on a terminal in place of what it said before."""
        if not self.writes:
            return
        with contextlib.suppress(BrokenPipeError):
            if self.terminal:
                print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
            else:
                print(text, file=sys.stderr, flush=True)

    def _append(self, name: str, line: dict) -> None:
        if not self.writes:
            return
        with writing(self.folder / name), open(self.folder / name, "a", encoding="utf-8") as f:
            f.write(json.dumps(line, ensure_ascii=False) + "\n")


def memory() -> dict[str, float]:
    """Returns peak memory in GB of this process and, where the back end tells, of its fullest device."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    stats = [d.memory_stats() or {} for d in jax.local_devices()]
    device = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return {"host_gb": round(peak / 1e9, 3)} | ({"device_gb": round(max(device) / 1e9, 3)} if device else {})


def clock(seconds: float) -> str:
    s = int(max(seconds, 0))
    return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}" if s >= 3600 else f"{s // 60}:{s % 60:02d}"
