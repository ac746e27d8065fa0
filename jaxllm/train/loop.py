"""The loop of a run: feed, step, log, evaluate, sample, save; stop cleanly when asked to.

A step is dispatched before the metrics of the one before it are read, so the device does not wait for the host. What a
step writes comes in one order (metrics, evaluation, samples, checkpoint), and a checkpoint is only taken of a step whose
numbers were read and found finite: what is logged up to a checkpoint is then part of it.
"""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from jaxllm.errors import RunError, Stopped
from jaxllm.parallel.processes import highest
from jaxllm.partition import batch_sharding, row_sharding
from jaxllm.report.law import Watch, what_to_look_at
from jaxllm.report.read import read_lines
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.config import LogConfig, TrainConfig
from jaxllm.train.log import RunLog, memory
from jaxllm.train.optim import finite_leaves
from jaxllm.train.stability import leaf_names, not_finite
from jaxllm.train.state import Program, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Everything one run is made of."""

    program: Program
    batches: Callable[[int], Iterator[dict]]  # step -> the batches from that step on
    made_of: dict  # what the rows are made of, which with the step is the data position
    evaluate: Callable[[object], dict]  # params -> metrics, or {} with nothing held out
    sample: Callable[[object, int], list[tuple[str, str]]]  # params, step -> prompts and their continuations
    checkpoints: Checkpoints
    log: RunLog
    steps: int
    tokens_per_step: int
    flops_per_token: float
    peak_flops: float | None  # of all devices together; None: unknown chip
    watch: Watch | None = None  # compares the losses with a scaling law
    stop_at: int | None = None  # the step to stop after, as if asked to; the schedule is that of all `steps`


class StopRequest:
    """Notes SIGTERM and SIGINT instead of dying of them; a second one kills as usual."""

    def __init__(self):
        self.name = None

    def __enter__(self):
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception):
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def agreed(self, step: int, every: int, ask=None) -> str | None:
        """Returns the signal's name when it is time to stop. Several processes must stop after the same step: they ask each
        other every so many steps, or by `ask`, which makes nobody wait."""
        if ask is not None:
            number = ask(signal.Signals[self.name].value if self.name else 0)
            return signal.Signals(number).name if number else None
        if jax.process_count() == 1 or step % every:
            return self.name if jax.process_count() == 1 else None
        number = highest(signal.Signals[self.name].value if self.name else 0)
        return signal.Signals(number).name if number else None

    def _note(self, number, frame):
        self.name = signal.Signals(number).name
        signal.signal(number, self.before[number])


class Clock:
    """Time of a step between two log lines, without evaluation, sampling, saving, and the first step, which compiles."""

    def __init__(self):
        self.began = self.since = time.perf_counter()
        self.steps, self.aside, self.compiled = 0, 0.0, False
        self.all_steps, self.all_aside = 0, 0.0

    def step_done(self) -> None:
        self.all_steps += 1
        if self.compiled:
            self.steps += 1
        else:
            self.compiled, self.since, self.aside = True, time.perf_counter(), 0.0

    def seconds_per_step(self) -> float:
        """Returns the mean since the last call, and starts anew; of the first step alone, all its time."""
        now = time.perf_counter()
        mean = (now - self.since - self.aside) / self.steps if self.steps else now - self.began
        self.since, self.steps, self.aside = now, 0, 0.0
        return mean

    def was_aside(self, seconds: float) -> None:
        self.aside += seconds
        self.all_aside += seconds

    def seconds_left(self, steps: int, seconds_per_step: float) -> float:
        """Returns the time of so many more steps, with their share of evaluation, samples and saving as it was so far."""
        return steps * (seconds_per_step + self.all_aside / max(self.all_steps, 1))


def train(run: Run, train_cfg: TrainConfig, log_cfg: LogConfig, checkpoint_every: int, state: TrainState,
          start: int) -> TrainState:
    """Takes a run from step `start` to its end; returns the last state. Raises Stopped or RunError."""
    names, mesh = leaf_names(run.program.abstract.params), run.program.mesh
    batches, clock, pending = run.batches(start), Clock(), None
    with StopRequest() as stop:
        batch = _put(next(batches), mesh)
        for step in range(start + 1, run.steps + 1):
            state, metrics = run.program.train_step(state, batch)
            if pending is not None:
                _read(run, pending, names, log_cfg.every, clock)
            pending = step, metrics
            if step < run.steps:
                batch = _put(next(batches), mesh)  # while the step runs
            # read once: a signal that comes while this step is saved is the next step's
            stopping = stop.agreed(step, log_cfg.every, run.program.agreed)
            finished, here = step == run.steps, step == run.stop_at
            due = {"eval": _due(step, train_cfg.eval_every, finished or here),
                   "sample": _due(step, train_cfg.sample_every, finished),
                   "save": finished or here or stopping is not None or step % checkpoint_every == 0}
            if any(due.values()):
                _read(run, pending, names, log_cfg.every, clock)
                pending = None
                _aside(run, due, step, run.program.whole(state), clock)
            if stopping is not None and step < run.steps:
                run.checkpoints.wait()
                run.log.incident(step, "stopped", f"stopped by {stopping} after step {step}; run the same command to go on")
                raise Stopped(f"stopped after step {step}, saved; run the same command to go on")
            if here and not finished:
                run.checkpoints.wait()
                raise Stopped(f"stopped after step {step} of {run.steps} (train.stop_at), saved; raise train.stop_at to go on")
    run.checkpoints.wait()
    return run.program.whole(state)


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)


def _put(batch: dict, mesh) -> dict:
    """Returns this process's rows as part of the global batch on the devices."""
    place = {2: batch_sharding(mesh)}
    return {name: jax.make_array_from_process_local_data(place.get(x.ndim, row_sharding(mesh)), x) for name, x in batch.items()}


def _read(run: Run, pending, names: list[str], every: int, clock: Clock) -> None:
    """Waits for a step's metrics; stops the run if they are not finite; logs them if it is their turn."""
    step, metrics = pending
    metrics = {k: np.asarray(v) for k, v in run.program.read(metrics).items()}
    if why := not_finite(names, metrics):
        run.checkpoints.wait()
        good = run.checkpoints.steps()
        after = f"last good checkpoint: {run.checkpoints.folder / str(good[-1])}" if good else "no checkpoint was taken yet"
        message = f"step {step}: {why}; {after}"
        run.log.incident(step, "not_finite", message)
        raise RunError(message)
    clock.step_done()
    if step % every and step != run.steps:
        return
    seconds = clock.seconds_per_step()
    rate = run.tokens_per_step / seconds
    line = {
        "step": step, "tokens": step * run.tokens_per_step, "time": round(time.time(), 3), "loss": float(metrics["loss"]),
        "grad_norm": float(metrics["grad_norm"]), "lr": float(metrics["lr"]), "tokens_per_s": round(rate, 1),
        "step_s": round(seconds, 5), "model_tflops_per_s": float(f"{rate * run.flops_per_token / 1e12:.4g}"),
    }
    left_out = {*line, "targets"} | ({"noise_scale"} if np.isnan(metrics.get("noise_scale", 0.0)) else set())
    line |= {k: round(float(v), 5) for k, v in metrics.items() if v.ndim == 0 and k not in left_out}
    if run.peak_flops is not None:
        line["mfu"] = round(rate * run.flops_per_token / run.peak_flops, 4)
    line |= memory()
    if run.watch is not None:
        line |= run.watch.line(line["tokens"], line["loss"])
    run.log.metrics(line)
    run.log.progress(line, clock.seconds_left(run.steps - step, seconds))
    if run.watch is not None and (event := run.watch.event(line)):
        kind, said = event
        advice = f"; {what_to_look_at(read_lines(run.log.folder / 'metrics.jsonl')[0])}" if kind == "falls_behind" else ""
        run.log.incident(step, kind, f"step {step}: {said}{advice}")


def _aside(run: Run, due: dict, step: int, state: TrainState, clock: Clock) -> None:
    """Evaluates, samples and saves, as is due; its time does not count as training's."""
    began = time.perf_counter()
    if due["eval"] and (found := run.evaluate(state.params)):
        line = {"step": step, "tokens": step * run.tokens_per_step, "time": round(time.time(), 3), **found}
        run.log.metrics(line)
        bits = f", {found['eval_bits_per_byte']:.4f} bits per byte" if "eval_bits_per_byte" in found else ""
        told = f", perplexity {found['eval_perplexity']:.2f}{bits}" if "eval_perplexity" in found else ""
        told += f", accuracy {found['eval_accuracy']:.3f}" if "eval_accuracy" in found else ""
        told += "".join(f", {k[5:].replace('_', ' ')} {v:.3f}" for k, v in found.items() if k.endswith("right"))
        run.log.say(f"  held-out at step {step}: loss {found['eval_loss']:.4f}{told}")
        if run.watch is not None and step == run.steps:
            _judge_the_end(run, step, found["eval_loss"])
    if due["sample"]:
        for prompt, text in run.sample(state.params, step):
            run.log.sample(step, prompt, text)
    if due["save"]:
        _refuse_not_finite(run, step, state)
        run.checkpoints.save(step, state, {"step": step, "made_of": run.made_of})
    clock.was_aside(time.perf_counter() - began)


def _judge_the_end(run: Run, step: int, eval_loss: float) -> None:
    """Says how the finished run stands to the law, which is of runs that ended."""
    law_loss, off, behind = run.watch.end(eval_loss)
    said = f"step {step}: the held-out loss at the end, {eval_loss:.4f}, is {off:+.1%} from the law's {law_loss:.4f}"
    if behind:
        advice = what_to_look_at(read_lines(run.log.folder / "metrics.jsonl")[0])
        run.log.incident(step, "ended_behind", f"{said}; {advice}")
    else:
        run.log.incident(step, "as_the_law_says", said)


_finite = jax.jit(finite_leaves)


def _refuse_not_finite(run: Run, step: int, state: TrainState) -> None:
    """Stops the run when the update of a step left a parameter that is not finite: it must not become a checkpoint."""
    finite = np.asarray(_finite(state.params))
    if not finite.all():
        name = leaf_names(run.program.abstract.params)[int(np.argmin(finite))]
        message = f"step {step}: not finite after its update: parameter {name}; not saved"
        run.log.incident(step, "not_finite", message)
        raise RunError(message)


def evaluate(program: Program, held_out, params) -> dict:
    """Returns loss (nats a token), perplexity and bits per byte over the held-out rows; {} without any."""
    total, n_tokens = 0.0, 0.0
    for batch in held_out.batches():
        loss, n = program.eval_step(params, _put(batch, program.mesh))
        total, n_tokens = total + float(loss), n_tokens + float(n)
    if not n_tokens:
        return {}
    loss = total / n_tokens
    found = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700)), "eval_tokens": int(n_tokens)}
    return found | ({"eval_bits_per_byte": total / math.log(2) / held_out.n_bytes} if held_out.n_bytes else {})

