"""The runs of a ladder: the settings of each, in what order they come, and which of them is finished or diverged."""

import dataclasses
import itertools
import math
import pathlib

from jaxllm import config
from jaxllm.errors import UserError
from jaxllm.model.config import ModelConfig
from jaxllm.plan.ladder_config import LadderSize, LadderVerb
from jaxllm.plan.points import unusable
from jaxllm.plan.shapes import architecture
from jaxllm.report.read import is_run, last_line, read_run
from jaxllm.train.config import PretrainConfig, PretrainLogConfig, RunConfig
from jaxllm.train.flops import active_parameter_count, training_flops_per_token
from jaxllm.train.run_folder import NOT_COMPARED, last_checkpoint, read_config

SHAPE = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")
# What two runs of one ladder may differ in, and what changes none of a finished run's numbers.
HARMLESS = (*NOT_COMPARED, "run.dir", "run.overwrite", "data.cache", "data.workers", "data.tokenizer", "checkpoint.", "log.",
            "mesh.", "train.micro_batches", "train.remat", "train.offload", "train.xla", "train.loss_chunk", "train.sample",
            "train.eval_every")


@dataclasses.dataclass(frozen=True)
class Rung:
    """One run of the ladder."""

    size: str
    cfg: PretrainConfig

    @property
    def folder(self) -> pathlib.Path:
        return pathlib.Path(self.cfg.run.dir)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def tokens(self) -> int:
        return self.cfg.train.steps * self.cfg.train.batch_size * self.cfg.data.seq_len

    @property
    def parameters(self) -> int:
        """All that a token meets, embeddings included, as `jaxllm plan fit` counts them."""
        return active_parameter_count(self.cfg.model)

    @property
    def flops_a_token(self) -> float:
        return training_flops_per_token(self.cfg.model, self.cfg.data.seq_len)

    @property
    def flops(self) -> float:
        return self.flops_a_token * self.tokens


def rungs(cfg: LadderVerb, tokenizer: str, vocab_size: int) -> list[Rung]:
    """Returns all runs: by tokens, then by size, so that every size is timed early and the largest run is the last."""
    models = {name: model_of(cfg, name, size, vocab_size) for name, size in cfg.sizes.items()}
    order = sorted(models, key=lambda name: active_parameter_count(models[name]))
    for a, b in itertools.pairwise(order):
        if active_parameter_count(models[a]) == active_parameter_count(models[b]):
            raise UserError(f"sizes.{a} and sizes.{b} have as many parameters: {active_parameter_count(models[a]):,}")
    found = [Rung(name, run_config(cfg, name, models[name], tokens, tokenizer)) for tokens in cfg.tokens for name in order]
    for a, b in itertools.combinations(found, 2):
        if a.name == b.name or (a.size == b.size and a.cfg.train.steps == b.cfg.train.steps):
            raise UserError(f"tokens={list(cfg.tokens)}: two of them are as many steps of {a.cfg.train.batch_size} rows of "
                            f"{a.cfg.data.seq_len} tokens")
    return found


def model_of(cfg: LadderVerb, name: str, size: LadderSize, vocab_size: int) -> ModelConfig:
    vocab_size = cfg.model.vocab_size or vocab_size
    if size.parameters is not None:
        made = architecture(size.parameters, vocab_size, seq_len=cfg.model.max_seq_len, tied=cfg.model.tied)
        own = {key: getattr(made, key) for key in SHAPE}
    else:
        own = {key: value for key in SHAPE if (value := getattr(size, key)) is not None}
    try:
        return dataclasses.replace(cfg.model, vocab_size=vocab_size, **own)
    except ValueError as e:
        raise UserError(f"sizes.{name}: {e}") from None


def run_config(cfg: LadderVerb, name: str, model: ModelConfig, tokens: int, tokenizer: str) -> PretrainConfig:
    """Returns the settings of one run: what `jaxllm pretrain` would be given for it."""
    steps = math.ceil(tokens / (cfg.train.batch_size * cfg.data.seq_len))
    lr = cfg.sizes[name].lr
    if lr is None:
        lr = cfg.optim.lr * ((cfg.lr_width or model.d_model) / model.d_model) ** cfg.lr_power
    folder = pathlib.Path(cfg.dir).expanduser() / "runs" / f"{name}-{short(tokens)}"
    try:
        return PretrainConfig(
            run=RunConfig(dir=str(folder), seed=cfg.seed), model=model, mesh=cfg.mesh,
            data=dataclasses.replace(cfg.data, tokenizer=tokenizer), train=dataclasses.replace(cfg.train, steps=steps),
            optim=dataclasses.replace(cfg.optim, lr=lr, warmup=round(cfg.warmup * steps)), checkpoint=cfg.checkpoint,
            log=PretrainLogConfig(**config.to_dict(cfg.log)))
    except ValueError as e:
        raise UserError(str(e)) from None


def short(tokens: int) -> str:
    """Returns 250k, 4M: tokens as a folder's name has them."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if tokens % unit == 0:
            return f"{tokens // unit}{letter}"
    return str(tokens)


def state(rung: Rung) -> str:
    """Returns "finished", "diverged", "begun" or "new"; raises UserError where its folder holds a run of other settings.

    A run that diverged counts as done only with the settings that it diverged with.
    """
    if not is_run(rung.folder):
        return "new"
    why = unusable(read_run(rung.folder)) or ""
    differ = differences(rung)
    if why.startswith("diverged: stopped"):
        return "new" if differ else "diverged"
    if not last_checkpoint(rung.folder):
        return "begun"
    if differ:
        raise UserError(f"{rung.folder} holds a run with other settings ({'; '.join(differ)}): set them back, or give "
                        "another dir")
    done = last_checkpoint(rung.folder) >= rung.cfg.train.steps and "eval_loss" in last_line(rung.folder, "eval_loss")
    return "finished" if done else "begun"


def differences(rung: Rung) -> list[str]:
    """Returns how the settings that the folder's run was started with differ from this run's, in what its numbers hang on."""
    before, now = (config.flatten(config.to_dict(one)) for one in (read_config(rung.folder), rung.cfg))
    return [f"{k}: {before.get(k)} -> {now.get(k)}" for k in sorted(before.keys() | now.keys())
            if before.get(k) != now.get(k) and not k.startswith(HARMLESS)]
