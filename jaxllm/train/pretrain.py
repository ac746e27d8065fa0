"""`jaxllm pretrain CONFIG`: from settings to a finished run."""

import contextlib
import dataclasses
import math
import pathlib
import sys

from jaxllm import config
from jaxllm.errors import Stopped, UserError, stopping_at_once
from jaxllm.parallel.processes import Place, is_first, start, together
from jaxllm.report.law import Watch, WatchedLaw, read_law, replayed
from jaxllm.report.read import read_lines
from jaxllm.train.config import PretrainConfig
from jaxllm.train.run_folder import begin, changes_of, claimed, last_checkpoint


def main(cfg: PretrainConfig) -> dict:
    """Trains, or goes on training, a language model; returns the run's last numbers."""
    if not cfg.data.sources:
        raise UserError("data.sources is empty: give at least one, e.g. --data.sources.books.path=books/")
    cfg = _with_paths(cfg)
    folder = pathlib.Path(cfg.run.dir)
    with stopping_at_once():
        place = start(cfg.processes)
        with claimed(folder) if place is None or place.index == 0 else contextlib.nullcontext():
            return _run(cfg, folder, place)


def _with_paths(cfg: PretrainConfig) -> PretrainConfig:
    """Returns the settings with "~" written out, and with the run's own tokenizer where the one it was given is gone."""
    folder, tokenizer = pathlib.Path(cfg.run.dir).expanduser(), cfg.data.tokenizer
    if tokenizer != "bytes":
        own, given = folder / "tokenizer.model", pathlib.Path(tokenizer).expanduser()
        if not given.exists() and own.exists() and not cfg.run.overwrite:
            print(f"! {given} is gone; the run's own copy is used: {own}", file=sys.stderr)
            given = own
        tokenizer = str(given)
    return dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, dir=str(folder)),
                               data=dataclasses.replace(cfg.data, tokenizer=tokenizer))


def _run(cfg: PretrainConfig, folder: pathlib.Path, place: Place | None) -> dict:
    from jaxllm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(cfg.data.tokenizer)
    cfg = resolve(cfg, tokenizer)
    law = read_law(cfg.log.law) if cfg.log.law is not None else None
    changes = changes_of(cfg, config.to_dict(cfg))
    steps = n_steps(cfg)
    if not cfg.run.overwrite and (done := last_checkpoint(folder)) >= steps:
        print(f"{folder}: finished: step {done} of {steps}; raise train.steps to go on", file=sys.stderr)
        return {"run": str(folder), "step": done, "finished": True}
    if not cfg.run.overwrite and done >= (cfg.train.stop_at or steps):
        raise Stopped(f"{folder}: is at step {done} of {steps}, train.stop_at={cfg.train.stop_at}: raise it to go on")

    from jaxllm.platform import start_jax

    start_jax()
    from jaxllm.data.loader import TrainingInput, ValidationInput, prepare
    from jaxllm.parallel.context import check_length
    from jaxllm.partition import make_mesh, row_share
    from jaxllm.train.session import finish, session

    writes, mesh = is_first(), make_mesh(cfg.mesh)
    check_length(cfg.data.seq_len, mesh)
    program = _program(cfg, mesh, steps, place)
    stores = prepare(cfg.data, tokenizer, log=lambda text: print(text, file=sys.stderr, flush=True) if writes else None)
    share = row_share(mesh)
    rows = TrainingInput(stores, cfg.data, cfg.train.batch_size, cfg.run.seed, *share)
    held_out = ValidationInput(stores, cfg.data, cfg.train.batch_size, cfg.train.eval_rows, *share)
    together("settings are checked")  # before the folder changes
    if writes:
        begin(cfg, config.to_dict(cfg))
    together("the run begins")

    def made(checkpoints, log, start):
        watch = law and watch_of(cfg, law, steps)
        if watch and start:
            replayed(watch, read_lines(folder / "metrics.jsonl")[0])  # what was logged before the run was stopped
        run = make_run(cfg, program, rows, held_out, checkpoints, log, tokenizer, steps, watch)
        _say_what_runs(cfg, program, rows, run, start)
        return run

    seconds = session(cfg, program, rows.made_of, made, changes=changes, steps=steps, writes=writes)
    return finish(folder, steps, seconds, writes)


def _program(cfg: PretrainConfig, mesh, steps: int, place: Place | None):
    """Returns the compiled steps; with groups that may be ahead of each other, those of this process's own."""
    from jaxllm.train.ahead import ahead, may_be_ahead
    from jaxllm.train.optim import make_optimizer
    from jaxllm.train.state import build, check_groups

    check_groups(cfg.train, mesh)
    train_cfg = dataclasses.replace(cfg.train, steps=steps)
    optimizer = make_optimizer(cfg.optim, steps, cfg.model, noise_steps=cfg.train.noise_scale)
    program = build(cfg.model, train_cfg, optimizer, mesh, seed=cfg.run.seed)
    if may_be_ahead(train_cfg, mesh):
        return ahead(program, cfg.model, train_cfg, optimizer, place, cfg.processes.timeout)
    return program


def resolve(cfg: PretrainConfig, tokenizer) -> PretrainConfig:
    """Fills in the vocabulary; raises UserError when the model's is smaller than the tokenizer's, or its longest sequence
    shorter than a sample prompt."""
    size = cfg.model.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise UserError(f"model.vocab_size={size} is smaller than the {tokenizer.vocab_size} tokens of {cfg.data.tokenizer}; "
                        f"set it to {tokenizer.vocab_size} or more, or leave it out")
    for i, prompt in enumerate(cfg.train.sample_prompts if cfg.train.sample_every else []):
        n = 1 + len(tokenizer.encode(prompt))  # <bos> first
        if n >= cfg.model.max_seq_len:
            raise UserError(f"train.sample_prompts: prompt {i + 1} has {n} tokens, <bos> included; should be fewer than "
                            f"model.max_seq_len={cfg.model.max_seq_len}")
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=size))


def n_steps(cfg: PretrainConfig) -> int:
    return cfg.train.steps or math.ceil(cfg.train.tokens / (cfg.train.batch_size * cfg.data.seq_len))


def make_run(cfg, program, rows, held_out, checkpoints, log, tokenizer, steps, watch=None):
    """Returns the run's parts, wired together."""
    from jaxllm.hardware import chip
    from jaxllm.train.flops import training_flops_per_token
    from jaxllm.train.loop import Run, evaluate
    from jaxllm.train.state import compute_dtype

    device = program.mesh.devices.flat[0]
    known = chip(device.device_kind)
    peak = known.peak_flops(compute_dtype(cfg.train.precision, device.platform).name) if known else None
    return Run(
        program=program, batches=rows.batches, made_of=rows.made_of, checkpoints=checkpoints, log=log, steps=steps,
        evaluate=lambda params: evaluate(program, held_out, params),
        sample=lambda params, step: sample(cfg, program, tokenizer, params),
        tokens_per_step=cfg.train.batch_size * cfg.data.seq_len,
        flops_per_token=training_flops_per_token(cfg.model, cfg.data.seq_len),
        peak_flops=peak * program.mesh.size if peak else None, watch=watch, stop_at=cfg.train.stop_at,
    )


def watch_of(cfg: PretrainConfig, law: WatchedLaw, steps: int) -> Watch:
    """Returns what compares a run of these settings with a law."""
    from jaxllm.train.flops import active_parameter_count

    return Watch(law, parameters=active_parameter_count(cfg.model), tokens=steps * cfg.train.batch_size * cfg.data.seq_len,
                 lines=steps // cfg.log.every, schedule=config.to_dict(cfg.optim))


def sample(cfg, program, tokenizer, params) -> list[tuple[str, str]]:
    """Returns (prompt, continuation) of every sample prompt, drawn with the run's settings."""
    from jaxllm.generate.engine import Engine

    engine = Engine(program.graph, params, cfg.model, tokenizer, program.mesh)
    made = engine.generate(cfg.train.sample_prompts, cfg.train.sample)
    return [(prompt, one.text) for prompt, one in zip(cfg.train.sample_prompts, made, strict=True)]


def _say_what_runs(cfg, program, rows, run, start):
    import jax

    from jaxllm.train.flops import active_parameter_count, formula

    n = sum(leaf.size for leaf in jax.tree.leaves(program.abstract.params))
    active = f"{active_parameter_count(cfg.model) / 1e6:.2f} M of them active for a token, " if cfg.model.moe.experts else ""
    devices = program.mesh.devices
    mesh = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items() if size > 1) or "one device"
    for line in (
        f"model: {n / 1e6:.2f} M parameters, {active}{cfg.model.n_layers} layers, width {cfg.model.d_model}",
        f"mesh: {mesh} ({devices.size} {devices.flat[0].device_kind})",
        *_pipeline(cfg, program),
        *_groups(cfg, program),
        f"run: steps {start + 1} to {run.steps}, {run.tokens_per_step:,} tokens a step, "
        f"{run.steps * run.tokens_per_step / 1e6:.2f} M in all",
        f"model FLOPs: {formula(cfg.model, cfg.data.seq_len)}",
        rows.describe(run.steps),
        *([run.watch.describe()] if run.watch else []),
        "compiling the step",
    ):
        run.log.say(line)


def _pipeline(cfg, program):
    """Returns what is to be said of the pipeline, if there is one."""
    from jaxllm.parallel.schedule import too_few
    from jaxllm.train.stages import schedule_of

    schedule = schedule_of(cfg.model, cfg.train, program.mesh)
    if schedule is None:
        return []
    said = [f"pipeline: {schedule.name}, {schedule.stages} stages, {schedule.micro_batches} micro-batches, "
            f"{float(schedule.idle()):.1%} of the ticks idle (`jaxllm plan schedule` draws them)"]
    warning = too_few(schedule)
    return [*said, f"! train.micro_batches: {warning}"] if warning else said


def _groups(cfg, program):
    """Returns what is to be said of groups that train alone, if there are any."""
    import jax

    from jaxllm.parallel.meetings import bytes_of_meeting, bytes_per_token
    from jaxllm.train.state import fragments_of

    train, tokens = cfg.train, cfg.train.batch_size * cfg.data.seq_len
    if train.sync == "every_step":
        return []
    params = program.abstract.params
    n, sizes = sum(leaf.size for leaf in jax.tree.leaves(params)), fragments_of(train, params)[1]
    each = bytes_per_token(n, train.groups, tokens, train.inner_steps)
    parts = f", over {train.fragments} fragments in turn" if train.fragments > 1 else ""
    late = f", merged {train.overlap} steps later" if train.overlap else ""
    late = f", merged {train.staleness} rounds later" if train.staleness else late
    said = [f"sync: {train.sync}, {train.groups} groups meet every {train.inner_steps} steps{parts}{late}: each sends "
            f"{each:,.1f} bytes a token (4 x 2 (G - 1) / G parameters), {each * train.inner_steps:,.1f} if they met at each "
            f"step; at most {bytes_of_meeting(max(sizes), train.groups):,.0f} bytes in one meeting"]
    if jax.process_count() > 1:
        said += ["losses of steps are those of process 0's groups; held-out losses are of what all share"]
        if program.agreed is None and late:
            said += ["! processes hold several groups each, or parts of several: none can be ahead of another"]
    return said
