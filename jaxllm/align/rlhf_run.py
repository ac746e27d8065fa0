"""`jaxllm rlhf CONFIG`: from settings to a finished run. The loop is in rlhf.py."""

import contextlib
import dataclasses
import pathlib
import sys
from functools import partial

from jaxllm import config
from jaxllm.align.rlhf_config import RLHFConfig
from jaxllm.errors import UserError, stopping_at_once
from jaxllm.train.run_folder import begin, changes_of, claimed, last_checkpoint

MAY_CHANGE = ("train.iterations", "train.eval_prompts", "train.eval_samples", "prompts.sources.", "rollout.rows", "rollout.gap",
              "ptx.eval_rows", "tax.", "base.run")
SHOWN = 4  # prompts whose responses are shown


def main(cfg: RLHFConfig) -> dict:
    """Aligns, or goes on aligning, a language model; returns the run's last numbers."""
    folder = pathlib.Path(cfg.run.dir).expanduser()
    cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, dir=str(folder)))
    with stopping_at_once(), claimed(folder):
        return _run(cfg, folder)


def _run(cfg: RLHFConfig, folder: pathlib.Path) -> dict:
    from jaxllm.align.start import found_base, resolved
    from jaxllm.data.tokenizer import load_tokenizer

    if not cfg.rewards and cfg.environment.kind == "none":
        raise UserError("rewards: none given; should be at least one, e.g. --rewards.right.kind=exact, or an environment")
    cfg = resolved(cfg, found_base(cfg.base))
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    changes = changes_of(cfg, config.to_dict(cfg), verb="rlhf", may_change=MAY_CHANGE)
    steps = cfg.train.iterations
    if not cfg.run.overwrite and (done := last_checkpoint(folder)) >= steps:
        print(f"{folder}: finished: iteration {done} of {steps}; raise train.iterations to go on", file=sys.stderr)
        return {"run": str(folder), "step": done, "finished": True}

    from jaxllm.platform import start_jax

    start_jax()
    return align(cfg, folder, tokenizer, changes)


def align(cfg: RLHFConfig, folder: pathlib.Path, tokenizer, changes: list[str]) -> dict:
    """Wires a run's parts together and takes it to its end."""
    import time

    import jax

    from jaxllm.align.few_shot import Task
    from jaxllm.align.rewards import Rewards
    from jaxllm.align.rlhf import Loop, train
    from jaxllm.align.start import load_weights, mesh_of
    from jaxllm.data import prompts as prompt_data
    from jaxllm.data.chat import load_chat
    from jaxllm.generate.continuous import Sampler
    from jaxllm.model.heads import LanguageModel
    from jaxllm.train.checkpoint import Checkpoints
    from jaxllm.train.log import RunLog
    from jaxllm.train.session import finish, note_start, restore_or_init
    from jaxllm.train.state import structure

    mesh, chat = mesh_of(cfg), load_chat(cfg.data.template, tokenizer)
    check_rows(cfg, mesh)
    prompts = prompt_data.read(cfg.prompts, lambda prompt: chat.prompt_ids(as_messages(prompt)))
    rows = prompt_data.PromptInput(prompts, cfg.rollout.prompts, cfg.run.seed)
    graph, reference = load_weights(cfg.base, mesh)
    if cfg.train.remat != "none":
        graph = structure(LanguageModel, cfg.model, mesh, remat=cfg.train.remat)[0]
    models = {name: reward_model(rule, mesh, tokenizer, name) for name, rule in cfg.rewards.items() if rule.kind == "model"}
    text = Text(cfg, tokenizer, mesh, graph) if cfg.ptx.sources else None
    tasks = tuple(Task(name, task, tokenizer, cfg.model.max_seq_len) for name, task in cfg.tax.items())
    begin(cfg, config.to_dict(cfg), verb="rlhf")

    with jax.set_mesh(mesh):
        program = program_of(cfg, mesh, graph, reference, tokenizer, text)
        sampler = Sampler(graph, cfg.model, mesh, eos_id=chat.end_id, pad_id=tokenizer.pad_id, vocab_size=tokenizer.vocab_size,
                          precision=cfg.train.precision)
        with Checkpoints(folder, cfg.checkpoint) as checkpoints, \
                Rewards(cfg.rewards, models=models, output=folder / "rewards") as rewards, \
                playing(cfg, folder, tokenizer, chat) as player:
            made_of = prompts.made_of
            state, at, incidents = restore_or_init(program, checkpoints, made_of)
            position = checkpoints.position(at) if at else {}
            rewards.errors |= position.get("errors", {})
            if player is not None:
                player.errors = position.get("episode_errors", 0)
            with RunLog(folder, steps=cfg.train.iterations, start=at, tensorboard=cfg.log.tensorboard) as log:
                note_start(log, at, incidents, changes)
                loop = Loop(
                    cfg=cfg, program=program, sampler=sampler, reference=reference, prompts=rows.batch, log=log,
                    held_out=prompts.validation, shown=(prompts.validation or prompts.train)[:SHOWN],
                    decode=tokenizer.decode, score=rewards, made_of=made_of, checkpoints=checkpoints,
                    text=text.batches if text and cfg.ptx.coef else None,
                    text_loss=text.held_out_loss if text and cfg.ptx.eval_rows else None, tokens=position.get("tokens", 0),
                    errors=rewards.errors, player=player, tasks=tasks)
                for line in said(cfg, prompts, reference, mesh, at) + [task.describe() for task in tasks]:
                    log.say(line)
                began = time.perf_counter()
                train(loop, state, at)
                log.say("")
    return finish(folder, cfg.train.iterations, time.perf_counter() - began, True) | tax(folder)


def program_of(cfg: RLHFConfig, mesh, graph, reference, tokenizer, text):
    """Returns the run's compiled functions: the policy starts as the reference, beside PPO's critic."""
    from jaxllm.align.algorithms import algorithm
    from jaxllm.align.rl_program import build
    from jaxllm.align.update import Models, Reading
    from jaxllm.train.optim import make_optimizer
    from jaxllm.train.state import compute_dtype

    n_updates = cfg.train.iterations * cfg.train.epochs * cfg.train.minibatches
    start, optimizers, critic_graph = {"policy": reference}, {"policy": make_optimizer(cfg.optim, n_updates, cfg.model)}, None
    if cfg.algorithm == "ppo":
        critic_graph, start["critic"] = critic_of(cfg, mesh, reference, tokenizer)
        lr = cfg.ppo.critic_lr or cfg.optim.lr
        optimizers["critic"] = make_optimizer(dataclasses.replace(cfg.optim, lr=lr), n_updates, cfg.model)
    dtype = compute_dtype(cfg.train.precision, mesh.devices.flat[0].platform)
    reading = Reading(dtype, cfg.prompts.prompt_len, tokenizer.vocab_size, cfg.rollout.temperature, cfg.train.loss_chunk,
                      sparse(cfg))
    return build(cfg, Models(graph, critic_graph), start, reading, algorithm(cfg), optimizers, mesh,
                 text_loss=text.loss if text and cfg.ptx.coef else None)


def sparse(cfg: RLHFConfig):
    """Returns the settings of the policy's sparse layers; None without any."""
    return cfg.model.moe if cfg.model.moe.experts else None


def as_messages(prompt) -> list[dict]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def check_rows(cfg: RLHFConfig, mesh) -> None:
    """Raises UserError where the mesh does not divide the rows of a micro-batch."""
    from jaxllm.partition import batch_parts

    n, parts = cfg.rollout.prompts * cfg.rollout.samples, batch_parts(mesh)
    rows = n // cfg.train.minibatches // cfg.train.micro_batches
    if rows % parts:
        raise UserError(f"rollout: {n} responses in train.minibatches={cfg.train.minibatches} x train.micro_batches="
                        f"{cfg.train.micro_batches} parts are {rows} a part, which the mesh's {parts} shards do not divide")


def reward_model(rule, mesh, tokenizer, name: str):
    from jaxllm.align.reward_model import RewardModel

    return RewardModel(rule.run, mesh, tokenizer, step=rule.step, weights=rule.objectives, key=f"rewards.{name}")


def critic_of(cfg: RLHFConfig, mesh, reference, tokenizer):
    """Returns (graph, parameters) of the critic before the first step: a reward model's, or the policy's trunk and a head of
    zeros."""
    import jax
    import jax.numpy as jnp

    from jaxllm.align.reward_model import read_scale, scaled
    from jaxllm.align.start import load_scores, with_trunk
    from jaxllm.model.heads import ScoreModel
    from jaxllm.train.run_folder import tokenizer_of
    from jaxllm.train.state import structure

    if cfg.ppo.critic is None:
        graph, abstract = structure(ScoreModel, cfg.model, mesh, remat=cfg.train.remat)
        zeros = jax.tree.map(lambda a: jax.device_put(jnp.zeros(a.shape, a.dtype), a.sharding), abstract)
        return graph, with_trunk(zeros, reference)
    found, _, params, objectives = load_scores(cfg.ppo.critic, mesh)
    if tokenizer_of(pathlib.Path(cfg.ppo.critic)).hash != tokenizer.hash:
        raise UserError(f"ppo.critic={cfg.ppo.critic}: its tokenizer is not the policy's")
    if found.model.max_seq_len < cfg.data.seq_len:
        raise UserError(f"ppo.critic={cfg.ppo.critic}: its max_seq_len={found.model.max_seq_len} is shorter than data.seq_len="
                        f"{cfg.data.seq_len}")
    params = scaled(params, read_scale(cfg.ppo.critic, len(objectives)))
    head, bias = params["score_DO"], params["bias_O"]
    keep = 1.0 if cfg.ppo.critic_head == "keep" else 0.0
    params["score_DO"] = head.replace(keep * jnp.sum(head[...], axis=1, keepdims=True))  # of several objectives, their sum
    params["bias_O"] = bias.replace(keep * jnp.sum(bias[...], keepdims=True))
    return structure(ScoreModel, found.model, mesh, remat=cfg.train.remat)[0], params


@contextlib.contextmanager
def playing(cfg: RLHFConfig, folder: pathlib.Path, tokenizer, chat):
    """Yields what plays episodes with the run's environment; None where prompts are answered in one turn."""
    from jaxllm.align.environments import Environments
    from jaxllm.align.turns import Player, chat_reply

    if cfg.environment.kind == "none":
        yield None
        return
    with Environments(cfg.environment, folder / "rewards") as environments:
        yield Player(environments, tokenizer, encode=lambda prompt: chat.prompt_ids(as_messages(prompt)),
                     reply=chat_reply(chat))


class Text:
    """Pretraining text beside RLHF: batches for ptx, and the held-out loss whose rise is the alignment tax."""

    def __init__(self, cfg: RLHFConfig, tokenizer, mesh, graph):
        import jax

        from jaxllm.data.config import DataConfig
        from jaxllm.data.loader import TrainingInput, ValidationInput, prepare
        from jaxllm.partition import batch_parts
        from jaxllm.train.state import compute_dtype
        from jaxllm.train.step import Objective, eval_step, loss_and_routed

        data = DataConfig(sources=cfg.ptx.sources, tokenizer=cfg.data.tokenizer, seq_len=cfg.data.seq_len,
                          validation=cfg.ptx.validation)
        stores = prepare(data, tokenizer, log=lambda line: print(line, file=sys.stderr))
        responses = cfg.rollout.prompts * cfg.rollout.samples // cfg.train.minibatches
        parts = batch_parts(mesh) * cfg.train.micro_batches
        self.rows = max(round(responses * cfg.ptx.examples / parts), 1) * parts
        self.input = TrainingInput(stores, data, self.rows, cfg.run.seed)
        n_eval = -(-max(cfg.ptx.eval_rows, 1) // parts) * parts
        self.held_out, self.mesh = ValidationInput(stores, data, n_eval, cfg.ptx.eval_rows), mesh
        dtype = compute_dtype(cfg.train.precision, mesh.devices.flat[0].platform)
        objective = Objective(graph, dtype, cfg.train.loss_chunk, 0.0, 0.0, 0.0, sparse(cfg))

        def loss(params, batch, key):
            total, (count, _) = loss_and_routed(objective, params, batch)
            return total, (count, None)

        self.loss, self.batches = loss, self.input.batches
        self.eval_step = jax.jit(partial(eval_step, objective))

    def held_out_loss(self, params) -> dict:
        """Returns {"eval_text_loss": nats a token}; {} where nothing is held out."""
        from jaxllm.train.loop import evaluate

        found = evaluate(self, self.held_out, params)
        return {"eval_text_loss": found["eval_loss"]} if found else {}


def said(cfg: RLHFConfig, prompts, reference, mesh, at: int) -> list[str]:
    """Returns what is told at the start."""
    import jax

    n = sum(leaf.size for leaf in jax.tree.leaves(reference))
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    return [f"policy: {n / 1e6:.2f} M parameters, from {cfg.base.run}; mesh: {axes}", prompts.describe(),
            f"run: {cfg.algorithm}, iterations {at + 1} to {cfg.train.iterations}, {cfg.rollout.prompts} prompts x "
            f"{cfg.rollout.samples} responses each, {cfg.train.epochs} epochs of {cfg.train.minibatches} minibatches",
            *([] if prompts.validation or not cfg.train.eval_every else
              ["! no prompt is held out (prompts.validation=0): scores are of training prompts alone"])]


def tax(folder: pathlib.Path) -> dict:
    """Prints and returns what the run did to held-out scores and to what pretraining had taught (Ouyang et al. 2022)."""
    from jaxllm.report.read import read_lines
    from jaxllm.report.summary import before_after, costs, shown_change

    told = before_after(lines := read_lines(folder / "metrics.jsonl")[0])
    if not told:
        return {}
    coef = next((line["ptx_coef"] for line in reversed(lines) if "ptx_coef" in line), None)
    of_base = {name: pair for name, pair in told.items() if costs(name)}
    for title, part in (("held-out prompts, before -> after", {k: v for k, v in told.items() if k not in of_base}),
                        (f"alignment tax with ptx.coef={coef:g}" if coef is not None else "", of_base)):
        if part:
            print(title, file=sys.stderr)
        for name, pair in part.items():
            before, after, change = shown_change(name, *pair)
            print(f"  {name.removeprefix('eval_'):<24}{before:>10} -> {after}  ({change})", file=sys.stderr)
    return {"before_after": {k: list(v) for k, v in told.items()}} | ({"ptx_coef": coef} if coef is not None else {})
