"""`jaxllm dpo CONFIG`: aligns a language model with compared answers alone, without sampling (Rafailov et al. 2023 and kin).

The losses are in dpo.py, what they are of in dpo_loss.py, the reference's log-probabilities in reference.py.
"""

import dataclasses
import pathlib
import sys
from functools import partial

from jaxllm import config
from jaxllm.align.dpo_config import WITH_MARGIN, WITH_REFERENCE, DPOVerb
from jaxllm.errors import UserError, stopping_at_once
from jaxllm.train.config import ModelOfRun
from jaxllm.train.run_folder import begin, changes_of, claimed, last_checkpoint, read_model, tokenizer_of

MAY_CHANGE = ("train.epochs", "data.sources.")


def main(cfg: DPOVerb) -> dict:
    """Aligns, or goes on aligning, a language model; returns the run's last numbers."""
    folder = pathlib.Path(cfg.run.dir).expanduser()
    cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, dir=str(folder)))
    with stopping_at_once(), claimed(folder):
        return _run(cfg, folder)


def _run(cfg: DPOVerb, folder: pathlib.Path) -> dict:
    from jaxllm.align.reward import encoded
    from jaxllm.align.start import at_step, resolved, sample_prompts
    from jaxllm.data import pairs, preference
    from jaxllm.data.chat import load_chat
    from jaxllm.data.tokenizer import load_tokenizer

    cfg = resolved(cfg, _base(cfg, folder))
    cfg = dataclasses.replace(cfg, reference=at_step(cfg, "reference"))
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    for key in ("base", "reference"):
        _check_same(cfg, key, tokenizer)
    chat = load_chat(cfg.data.template, tokenizer)
    prompts = sample_prompts(cfg, chat)
    found = preference.read(cfg.data, partial(encoded, chat), tokenizer.pad_id)
    found = pairs.pairs_of(found, cfg.pairs, with_others=cfg.loss == "kto")
    _check_margins(cfg, found)
    rows = preference.PreferenceInput(found, cfg.train.batch_size, cfg.run.seed)
    steps = cfg.train.steps or rows.steps(cfg.train.epochs or 1.0)
    changes = changes_of(cfg, config.to_dict(cfg), verb="dpo", may_change=MAY_CHANGE)
    if not cfg.run.overwrite and (done := last_checkpoint(folder)) >= steps:
        print(f"{folder}: finished: step {done} of {steps}; raise train.epochs or train.steps to go on", file=sys.stderr)
        return {"run": str(folder), "step": done, "finished": True}

    from jaxllm.platform import start_jax

    start_jax()
    return align(cfg, folder, found, rows, tokenizer, chat, prompts, steps, changes)


def _check_margins(cfg: DPOVerb, found) -> None:
    """Raises UserError for pairs with a margin where the loss has no place for one."""
    with_margin = sum(pair.margin > 0 for pair in found.train.of)
    if with_margin and cfg.margin and cfg.loss not in WITH_MARGIN:
        raise UserError(f"loss={cfg.loss}: has no margin, and {with_margin:,} of {len(found.train):,} training pairs have a "
                        f'"margin"; --margin=0 leaves it unused, loss={" or ".join(WITH_MARGIN)} uses it')


def _base(cfg: DPOVerb, folder: pathlib.Path) -> ModelOfRun:
    """Returns what is known of the base's model: from its run, or once whole weights are tuned, from the run's own folder."""
    from jaxllm.align.start import found_base

    own = not cfg.run.overwrite and not cfg.lora.rank and last_checkpoint(folder)
    return read_model(folder) if own and cfg.base.run and not pathlib.Path(cfg.base.run).exists() else found_base(cfg.base)


def _check_same(cfg: DPOVerb, key: str, tokenizer) -> None:
    """Raises UserError where the base or the reference reads other tokens, or the reference is of another size."""
    from jaxllm.align.start import found_base

    run = getattr(cfg, key).run
    if not run or (last_checkpoint(pathlib.Path(cfg.run.dir)) and not pathlib.Path(run).exists()):
        return
    found = found_base(getattr(cfg, key), key)
    theirs = tokenizer_of(pathlib.Path(run))
    if theirs.hash != tokenizer.hash:
        raise UserError(f"{key}.run={run}: its tokenizer ({theirs.hash}) is not that of this run ({tokenizer.hash}, "
                        f"{cfg.data.tokenizer}); log-probabilities can be compared over the same tokens alone")
    ours, other = config.flatten(config.to_dict(cfg.model)), config.flatten(config.to_dict(found.model))
    for name in ours:
        if ours[name] != other[name] and name not in ("dropout", "init"):
            raise UserError(f"{key}.run={run}: its model has {name}={other[name]}, that of base.run={cfg.base.run} has "
                            f"{ours[name]}; should be a run of the same model")


def align(cfg: DPOVerb, folder: pathlib.Path, found, rows, tokenizer, chat, prompts, steps: int, changes: list[str]) -> dict:
    """Wires a run's parts together and takes it to its end."""
    from jaxllm.align.dpo_program import DPOProgram
    from jaxllm.align.reference import with_references
    from jaxllm.align.start import mesh_of
    from jaxllm.generate.engine import Engine
    from jaxllm.hardware import chip
    from jaxllm.report.read import last_line
    from jaxllm.train.loop import Run
    from jaxllm.train.session import finish, session
    from jaxllm.train.state import compute_dtype

    mesh, begun = mesh_of(cfg), last_checkpoint(folder) > 0 and not cfg.run.overwrite
    device = mesh.devices.flat[0]
    dtype = compute_dtype(cfg.train.precision, device.platform)
    program = DPOProgram(cfg, mesh, dtype, steps)
    begin(cfg, config.to_dict(cfg), verb="dpo")
    if cfg.loss in WITH_REFERENCE:
        with_references(found, folder, cfg.reference if cfg.reference.run else cfg.base, mesh, dtype=dtype,
                        chunk=cfg.train.loss_chunk, rows=2 * cfg.train.batch_size // cfg.train.micro_batches, begun=begun)

    def sample(params, step):
        engine = Engine(program.graph, program.whole(params), cfg.model, tokenizer, mesh, precision=cfg.train.precision,
                        end_id=chat.end_id)
        return [(prompt, one.text) for prompt, one in
                zip(cfg.train.sample_prompts, engine.generate(prompts, cfg.train.sample), strict=True)]

    def made(checkpoints, log, start):
        log.say(found.describe())
        for line in program.describe(cfg, len(found.train), len(found.validation)):
            log.say(line)
        log.say(f"run: steps {start + 1} to {steps}, {cfg.train.batch_size} pairs a step; compiling the step")
        known = chip(device.device_kind)
        return Run(program=program.steps, batches=rows.batches, made_of=found.made_of, checkpoints=checkpoints, log=log,
                   steps=steps, evaluate=partial(program.evaluate, found.validation, cfg.train.eval_rows), sample=sample,
                   tokens_per_step=2 * cfg.train.batch_size * cfg.data.seq_len,
                   flops_per_token=program.flops_per_token(cfg),
                   peak_flops=known.peak_flops(dtype.name) * mesh.size if known else None)

    seconds = session(cfg, program.steps, found.made_of, made, changes=changes, steps=steps, writes=True)
    told = ("accuracy", "margin", "chosen_reward", "rejected_reward")
    last = last_line(folder, "accuracy") | last_line(folder, "eval_accuracy")
    return finish(folder, steps, seconds, True) | {k: v for k, v in last.items() if k.removeprefix("eval_") in told}
