"""One start of a run: its newest checkpoint or a new state, its logs, its steps, and the page at the end."""

import pathlib
import sys
import time

import jax

from jaxllm.errors import Stopped, UserError
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.log import RunLog
from jaxllm.train.loop import train


def session(cfg, program, made_of, make_run, *, changes: list[str], steps: int, writes: bool) -> float:
    """Takes a run from where its folder stands to its last step; returns the seconds that took.

    `cfg` holds run, train, log and checkpoint; `made_of` is what the rows are made of; `make_run(checkpoints, log, start)`
    returns the loop's Run.
    """
    folder = pathlib.Path(cfg.run.dir)
    with jax.set_mesh(program.mesh), Checkpoints(folder, cfg.checkpoint) as checkpoints:
        state, start, incidents = restore_or_init(program, checkpoints, made_of)
        with RunLog(folder, steps=steps, start=start, tensorboard=cfg.log.tensorboard, writes=writes) as log:
            note_start(log, start, incidents, changes)
            run = make_run(checkpoints, log, start)
            began = time.perf_counter()
            try:
                train(run, cfg.train, cfg.log, cfg.checkpoint.every, state, start)
            except Stopped as e:
                if not cfg.run.overwrite:
                    raise
                # the same command would delete what was just saved
                raise Stopped(f"{e}, but without run.overwrite=true, which would delete it") from None
            log.say("")
    return time.perf_counter() - began


def note_start(log: RunLog, start: int, incidents, changes: list[str]) -> None:
    """Logs what `restore_or_init` met, and which settings of a run that goes on have changed."""
    for step, kind, message in incidents:
        log.incident(step, kind, message)
    if changes and start:
        log.incident(start, "config_changed", f"settings changed since the last start: {'; '.join(changes)}")


def restore_or_init(program, checkpoints, made_of):
    """Returns (state, its step, incidents to log): the newest good checkpoint, or a new state.

    Row i is a function of i, the seed and the text, so text other than `made_of` makes the order another: an incident.
    """
    incidents = []

    def damaged(step, why):
        incidents.append((step, "damaged_checkpoint", f"checkpoint {checkpoints.folder / str(step)} is damaged ({why}); "
                                                      "trying the one before it"))

    if not checkpoints.steps():
        return program.init(), 0, incidents
    restored = checkpoints.restore(program.abstract, damaged=damaged)
    if restored is None:
        tried = "; ".join(message for *_, message in incidents)
        raise UserError(f"{checkpoints.folder}: no checkpoint can be read: {tried}. --run.overwrite=true starts anew")
    state, position = restored
    checkpoints.set_aside(after=position["step"])
    incidents.append((position["step"], "resumed", f"goes on from step {position['step']}"))
    if position["made_of"] != made_of:
        before = position["made_of"]
        others = [name for name in sorted(before.keys() | made_of.keys()) if before.get(name) != made_of.get(name)]
        incidents.append((position["step"], "data_changed",
                          f"text or weight changed since the checkpoint: data.sources {', '.join(others)}; rows from step "
                          f"{position['step'] + 1} on are others than they would have been"))
    return state, position["step"], incidents


def finish(folder: pathlib.Path, steps: int, seconds: float, writes: bool) -> dict:
    page = folder / "report.html"
    if not writes:
        return {"run": str(folder), "step": steps, "finished": True, "report": str(page)}
    from jaxllm.report.page import write_page
    from jaxllm.report.read import last_line

    write_page([folder], page)
    train, held_out = last_line(folder, "loss"), last_line(folder, "eval_loss")
    print(f"finished: step {steps} in {seconds:.0f} s; curves and samples: {page}", file=sys.stderr)
    told = ("tokens", "loss", "eval_loss", "eval_perplexity", "eval_bits_per_byte")
    return {"run": str(folder), "step": steps, "finished": True, "report": str(page)} | {
        k: v for k, v in {**train, **held_out}.items() if k in told}
