"""`jaxllm sft CONFIG`: teaches a base model to follow instructions, from examples of answers."""

import contextlib
import dataclasses
import pathlib
import shutil
import sys
from functools import partial

from jaxllm import config
from jaxllm.align.sft_config import SFTConfig
from jaxllm.errors import UserError, stopping_at_once
from jaxllm.parallel.processes import is_first, start, together
from jaxllm.train.config import ModelOfRun
from jaxllm.train.run_folder import begin, changes_of, claimed, last_checkpoint, read_model

MAY_CHANGE = ("train.epochs", "pretraining.cache", "pretraining.workers", "answers.")


def main(cfg: SFTConfig) -> dict:
    """Tunes, or goes on tuning, a model on instructions; returns the run's last numbers."""
    if not cfg.data.sources:
        raise UserError("data.sources is empty: give at least one, e.g. --data.sources.chat.path=chat.jsonl")
    folder = pathlib.Path(cfg.run.dir).expanduser()
    cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, dir=str(folder)))
    with stopping_at_once():
        place = start(cfg.processes)
        with claimed(folder) if place is None or place.index == 0 else contextlib.nullcontext():
            return _run(cfg, folder)


def _run(cfg: SFTConfig, folder: pathlib.Path) -> dict:
    from jaxllm.platform import start_jax

    start_jax()
    from jaxllm.align.start import mesh_of, resolved, sample_prompts
    from jaxllm.data.chat import template_file
    from jaxllm.data.instruction_input import InstructionInput, InstructionValidation, prepare
    from jaxllm.data.tokenizer import load_tokenizer
    from jaxllm.partition import row_share
    from jaxllm.report.read import last_line
    from jaxllm.train.session import finish, session

    writes = is_first()
    cfg = resolved(cfg, _base(cfg, folder))
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    _check_tokenizer(cfg, tokenizer)
    changes = changes_of(cfg, config.to_dict(cfg), verb="sft", may_change=MAY_CHANGE)
    mesh = mesh_of(cfg)
    data = dataclasses.replace(cfg.data, template=template_file(cfg.data.template, folder))
    prepared = prepare(data, tokenizer, log=lambda text: print(text, file=sys.stderr, flush=True) if writes else None)
    share = row_share(mesh)
    mix = _pretraining(cfg, tokenizer, writes)
    rows = InstructionInput(prepared, cfg.data, cfg.train.batch_size, cfg.run.seed, *share, pretraining=mix,
                            pretraining_share=cfg.pretraining.share)
    steps = cfg.train.steps or rows.n_steps(cfg.train.epochs or 1)
    if not cfg.run.overwrite and (done := last_checkpoint(folder)) >= steps:
        print(f"{folder}: finished: step {done} of {steps}; raise train.epochs or train.steps to go on", file=sys.stderr)
        return {"run": str(folder), "step": done, "finished": True}
    held_out = InstructionValidation(prepared, cfg.data, cfg.train.batch_size, cfg.train.eval_rows, *share)
    chat = prepared.encoder.chat_of(None)
    prompts = sample_prompts(cfg, chat)
    asked = _questions(cfg, prepared)
    program, weights = _program(cfg, mesh, steps, begun=last_checkpoint(folder) > 0 and not cfg.run.overwrite)
    together("settings are checked")  # before the folder changes
    if writes:
        begin(cfg, config.to_dict(cfg), verb="sft")
        _keep_template(cfg.data.template, folder)
    together("the run begins")

    def made(checkpoints, log, start):
        run = _make_run(cfg, program, weights, rows, held_out, checkpoints, log, tokenizer, chat, prompts, asked, steps)
        _say_what_runs(cfg, program, rows, run, asked, start)
        return run

    seconds = session(cfg, program, rows.made_of, made, changes=changes, steps=steps, writes=writes)
    answered = {k: v for k, v in last_line(folder, "eval_right").items() if k.endswith("right")} if writes else {}
    return finish(folder, steps, seconds, writes) | answered


def _base(cfg: SFTConfig, folder: pathlib.Path) -> ModelOfRun:
    """Returns what is known of the base's model: from its run, or once whole weights are tuned, from the run's own folder."""
    from jaxllm.align.start import found_base

    own = not cfg.run.overwrite and not cfg.lora.rank and last_checkpoint(folder)
    return read_model(folder) if own and cfg.base.run and not pathlib.Path(cfg.base.run).exists() else found_base(cfg.base)


def _questions(cfg: SFTConfig, prepared):
    """Returns the held-out questions that are asked at evaluations, or None."""
    from jaxllm.align.questions import Questions

    return Questions(prepared, cfg.answers, cfg.model.max_seq_len, cfg.run.seed) if cfg.answers.questions else None


def _keep_template(template: str, folder: pathlib.Path) -> None:
    """Copies a template that is a file, and the settings beside it, into the run folder, which is then whole without it."""
    from jaxllm.data.chat import template_file

    if template.endswith((".jinja", ".json")):
        path = pathlib.Path(template_file(template, folder))
        for one in {path, path.with_name("tokenizer_config.json")}:
            if one.is_file() and one.parent.resolve() != folder.resolve():
                shutil.copy(one, folder / one.name)


def _check_tokenizer(cfg: SFTConfig, tokenizer) -> None:
    """Raises UserError for a tokenizer whose ids mean something else to the base model."""
    from jaxllm.train.run_folder import tokenizer_of

    if pathlib.Path(cfg.base.run).exists() and tokenizer.hash != tokenizer_of(pathlib.Path(cfg.base.run)).hash:
        raise UserError(f"data.tokenizer={cfg.data.tokenizer}: is not the tokenizer of base.run={cfg.base.run}; leave it out")


def _pretraining(cfg: SFTConfig, tokenizer, writes: bool):
    """Returns the rows of pretraining that are mixed in, or None."""
    if not cfg.pretraining.share:
        return None
    from jaxllm.data.config import DataConfig
    from jaxllm.data.instruction_input import PretrainingRows
    from jaxllm.data.tokenize import prepare

    mix = cfg.pretraining
    data = DataConfig(sources=mix.sources, tokenizer=cfg.data.tokenizer, seq_len=cfg.data.seq_len, validation=0,
                      cache=mix.cache, workers=mix.workers)
    stores = prepare(data, tokenizer, log=lambda text: print(text, file=sys.stderr, flush=True) if writes else None)
    text, weights = [one.train for one in stores.sources], [one.weight for one in stores.sources]
    return PretrainingRows(text, weights, cfg.data.seq_len, cfg.run.seed, stores.pad_id)


def _program(cfg: SFTConfig, mesh, steps: int, *, begun: bool):
    """Returns (the compiled steps, a function from what is trained to a model's weights)."""
    import jax

    from jaxllm.align import supervised
    from jaxllm.align.sft_loss import held_out_loss, sft_loss, whole
    from jaxllm.align.start import load_weights
    from jaxllm.model.heads import LanguageModel
    from jaxllm.model.lora import adapters
    from jaxllm.partition import replicated
    from jaxllm.train.optim import make_optimizer
    from jaxllm.train.state import check_experts, compute_dtype, placed_shapes, structure
    from jaxllm.train.step import Objective

    check_experts(cfg.model, mesh)
    graph, shapes = structure(LanguageModel, cfg.model, mesh, remat=cfg.train.remat)
    params, frozen = shapes, None  # a run that goes on has its weights in its own checkpoint
    if cfg.lora.rank or not begun:
        _, params = load_weights(cfg.base, mesh)
    if cfg.lora.rank:
        frozen, make = params, partial(adapters, cfg=cfg.lora, key=jax.random.key(cfg.run.seed))
        places = jax.tree.map(lambda a: a.sharding, placed_shapes(lambda: make(frozen), mesh))
        with jax.set_mesh(mesh):
            params = jax.jit(make, out_shardings=places)(frozen)
    dtype = compute_dtype(cfg.train.precision, mesh.devices.flat[0].platform)
    objective = Objective(graph, dtype, cfg.train.loss_chunk, 0.0, 0.0, cfg.model.dropout,
                          cfg.model.moe if cfg.model.moe.experts else None)
    loss = partial(sft_loss, objective, cfg.train.noise, cfg.lora)
    optimizer = make_optimizer(cfg.optim, steps, cfg.model)
    program = supervised.program(graph, params, loss, optimizer, mesh, cfg.train, seed=cfg.run.seed, frozen=frozen,
                                 keyed=bool(cfg.train.noise or cfg.model.dropout),
                                 bias_rate=cfg.model.moe.bias_rate)
    evaluate = jax.jit(partial(held_out_loss, objective, cfg.lora), out_shardings=replicated(mesh))
    program = dataclasses.replace(program, eval_step=lambda params, batch: evaluate(params, frozen, batch))
    of_adapters = jax.jit(partial(whole, cfg.lora))
    return program, lambda params: of_adapters(params, frozen) if cfg.lora.rank else params


def _make_run(cfg, program, weights, rows, held_out, checkpoints, log, tokenizer, chat, prompts, asked, steps):
    """Returns the run's parts, wired together."""
    from jaxllm.generate.engine import Engine
    from jaxllm.hardware import chip
    from jaxllm.train.flops import training_flops_per_token
    from jaxllm.train.loop import Run, evaluate
    from jaxllm.train.state import compute_dtype

    def engine_with(params, end_id):
        return Engine(program.graph, weights(params), cfg.model, tokenizer, program.mesh, end_id=end_id)

    def measured(params):
        found = evaluate(program, held_out, params)
        return found | (asked.shares(partial(engine_with, params)) if asked and found else {})

    def sample(params, step):
        made = engine_with(params, chat.end_id).generate(prompts, cfg.train.sample)
        return [(prompt, one.text) for prompt, one in zip(cfg.train.sample_prompts, made, strict=True)]

    device = program.mesh.devices.flat[0]
    known = chip(device.device_kind)
    peak = known.peak_flops(compute_dtype(cfg.train.precision, device.platform).name) if known else None
    of_all = training_flops_per_token(cfg.model, cfg.data.seq_len)
    return Run(
        program=program, batches=rows.batches, made_of=rows.made_of, checkpoints=checkpoints, log=log, steps=steps,
        evaluate=measured, sample=sample,
        tokens_per_step=cfg.train.batch_size * cfg.data.seq_len,
        # adapters need no gradient of the frozen matrices: a third of the work
        flops_per_token=of_all * 2 / 3 if cfg.lora.rank else of_all,
        peak_flops=peak * program.mesh.size if peak else None,
    )


def _say_what_runs(cfg: SFTConfig, program, rows, run, asked, start: int) -> None:
    import jax

    from jaxllm.train.flops import parameter_count

    trained = sum(leaf.size for leaf in jax.tree.leaves(program.abstract.params))
    total = sum(parameter_count(cfg.model).values())
    adapter = f"adapters of rank {cfg.lora.rank}: {trained / 1e6:.3f} M parameters are trained beside " if cfg.lora.rank else ""
    devices = program.mesh.devices
    mesh = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items() if size > 1) or "one device"
    for line in (
        f"model: {adapter}{total / 1e6:.2f} M parameters of {cfg.base.run}, template {cfg.data.template}",
        f"mesh: {mesh} ({devices.size} {devices.flat[0].device_kind})",
        f"run: steps {start + 1} to {run.steps}, {cfg.train.batch_size} rows of {cfg.data.seq_len} tokens a step",
        rows.describe(run.steps), *([asked.describe()] if asked else []),
        "compiling the step",
    ):
        run.log.say(line)
