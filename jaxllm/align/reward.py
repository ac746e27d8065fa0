"""`jaxllm reward CONFIG`: a model that scores answers, from ranked ones (Ouyang et al. 2022).

A base run's trunk with a head of one number for each objective, read at an answer's last token. All K answers of a prompt are
in one batch element. At the end the scores' scale is set so that demonstrations score 0, and the report tells how far they can
be trusted.

Axes: B prompt, K answer, T position, O objective.
"""

import dataclasses
import pathlib
import sys
from functools import partial

from jaxllm import config
from jaxllm.align.reward_config import RewardVerb
from jaxllm.errors import stopping_at_once
from jaxllm.train.run_folder import begin, changes_of, claimed, last_checkpoint

MAY_CHANGE = ("train.epochs", "data.sources.", "base.run")


def main(cfg: RewardVerb) -> dict:
    """Trains, or goes on training, a reward model; returns the run's last numbers."""
    folder = pathlib.Path(cfg.run.dir).expanduser()
    cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, dir=str(folder)))
    with stopping_at_once(), claimed(folder):
        return _run(cfg, folder)


def _run(cfg: RewardVerb, folder: pathlib.Path) -> dict:
    from jaxllm.align.start import found_base, resolved
    from jaxllm.data import preference
    from jaxllm.data.chat import load_chat
    from jaxllm.data.tokenizer import load_tokenizer

    cfg = resolved(cfg, found_base(cfg.base))
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    chat = load_chat(cfg.data.template, tokenizer)
    data = preference.read(cfg.data, partial(encoded, chat), tokenizer.pad_id)
    rows = preference.PreferenceInput(data, cfg.train.batch_size, cfg.run.seed)
    steps = cfg.train.steps or rows.steps(cfg.train.epochs or 1.0)
    changes = changes_of(cfg, config.to_dict(cfg), verb="reward", may_change=MAY_CHANGE)
    if not cfg.run.overwrite and (done := last_checkpoint(folder)) >= steps and (folder / "reward.json").exists():
        print(f"{folder}: finished: step {done} of {steps}; raise train.steps to go on", file=sys.stderr)
        return {"run": str(folder), "step": done, "finished": True}

    from jaxllm.platform import start_jax

    start_jax()
    return train(cfg, folder, data, rows, tokenizer, steps, changes)


def encoded(chat, prompt, answer: str) -> tuple[list[int], list[int]]:
    """Returns (the prompt's ids up to where the answer begins, the answer's with its end token)."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ids = chat.prompt_ids(messages)
    whole, weights = chat.encode([*messages, {"role": "assistant", "content": answer}])
    end = max(i for i, weight in enumerate(weights) if weight) + 1
    return ids, whole[len(ids) : end]


def train(cfg: RewardVerb, folder: pathlib.Path, data, rows, tokenizer, steps: int, changes: list[str]) -> dict:
    import jax

    from jaxllm.align.reward_report import report
    from jaxllm.align.start import load_weights, mesh_of, with_trunk
    from jaxllm.align.supervised import program
    from jaxllm.model.heads import ScoreModel
    from jaxllm.train.checkpoint import read_params
    from jaxllm.train.flops import training_flops_per_token
    from jaxllm.train.loop import Run
    from jaxllm.train.optim import make_optimizer
    from jaxllm.train.session import finish, session
    from jaxllm.train.state import compute_dtype, structure

    mesh = mesh_of(cfg)
    dtype, moe = compute_dtype(cfg.train.precision, mesh.devices.flat[0].platform), cfg.model.moe
    graph, abstract = structure(ScoreModel, cfg.model, mesh, remat=cfg.train.remat, n_scores=len(cfg.data.objectives))
    with jax.set_mesh(mesh):
        params = start_params(cfg, abstract, partial(with_trunk, params=load_weights(cfg.base, mesh)[1]))
        prog = program(graph, params, partial(loss, graph, dtype, moe=moe if moe.experts else None),
                       make_optimizer(cfg.optim, steps, cfg.model), mesh, cfg.train, seed=cfg.run.seed, bias_rate=moe.bias_rate,
                       held_out=partial(loss, graph, dtype))
    begin(cfg, config.to_dict(cfg), verb="reward")

    def made(checkpoints, log, start):
        log.say(data.describe())
        log.say(f"run: steps {start + 1} to {steps}, {cfg.train.batch_size} prompts a step")
        return Run(program=prog, batches=rows.batches, made_of=data.made_of, checkpoints=checkpoints, log=log, steps=steps,
                   evaluate=partial(evaluate, prog, data, cfg), sample=lambda params, step: [],
                   tokens_per_step=cfg.train.batch_size * data.train.n_answers * cfg.data.seq_len,
                   flops_per_token=training_flops_per_token(cfg.model, cfg.data.seq_len), peak_flops=None)

    seconds = session(cfg, prog, data.made_of, made, changes=changes, steps=steps, writes=True)
    with jax.set_mesh(mesh):
        found = report(cfg, folder, graph, dtype, read_params(folder, abstract)[0], data, mesh)
    return finish(folder, steps, seconds, True) | found


def start_params(cfg: RewardVerb, abstract, with_base):
    """Returns the weights before the first step: the base's trunk, a new head."""
    import jax
    from flax import nnx

    from jaxllm.model.formulation import REFERENCE
    from jaxllm.model.heads import ScoreModel

    def make(seed):
        rngs = nnx.Rngs(jax.random.key(seed))
        return nnx.state(ScoreModel(cfg.model, REFERENCE, len(cfg.data.objectives), rngs=rngs), nnx.Param)

    placed = jax.tree.map(lambda a: a.sharding, abstract)
    return with_base(jax.jit(make, out_shardings=placed)(cfg.run.seed))


def loss(graph, dtype, params, frozen, batch, key, *, moe=None):
    """Returns (Σ Bradley-Terry loss, (prompts, {"accuracy": (pairs in order, pairs)})), over all objectives.

    With `moe`, as in pretraining: the balance losses of sparse layers are added, and what their routers did is told.
    """
    import jax.numpy as jnp

    from jaxllm.align.bradley_terry import pair_accuracy, preference_loss
    from jaxllm.align.supervised import of_routers
    from jaxllm.train.step import routers_loss

    score_BKO, routed_L = scores_and_routed(graph, dtype, params, batch)
    ranks = batch["rank_BK"], batch["present_BK"], batch["objective_B"]
    total_O, n_O = preference_loss(score_BKO, *ranks, margin_B=batch["margin_B"])
    right_O, pairs_O = pair_accuracy(score_BKO, *ranks)
    n, told = jnp.sum(n_O), {"accuracy": (jnp.sum(right_O), jnp.sum(pairs_O))}
    return jnp.sum(total_O) + n * routers_loss(moe, routed_L), (n, told | (of_routers(routed_L) if moe else {}))


def scores(graph, dtype, params, batch):
    """Returns score_BKO of a batch of preference.Groups."""
    return scores_and_routed(graph, dtype, params, batch)[0]


def scores_and_routed(graph, dtype, params, batch):
    """Returns (score_BKO, what the routers of sparse layers did, or None)."""
    from jaxllm.align.reward_model import last_scores_and_routed

    B, K, T = batch["token_BKT"].shape
    token_XT, length_X = batch["token_BKT"].reshape(B * K, T), batch["length_BK"].reshape(B * K)
    score_XO, routed_L = last_scores_and_routed(graph, dtype, params, token_XT, length_X)
    return score_XO.reshape(B, K, -1), routed_L


def evaluate(prog, data, cfg: RewardVerb, params) -> dict:
    """Returns loss and accuracy over the held-out prompts; {} without any."""
    import jax
    import numpy as np

    from jaxllm.data.preference import PreferenceRows
    from jaxllm.partition import row_sharding

    total = np.zeros(4)
    for batch in PreferenceRows(data.validation, cfg.train.batch_size, cfg.train.eval_rows).batches():
        sums, (n, told) = prog.eval_step(params, jax.device_put(batch, row_sharding(prog.mesh)))
        total += [float(x) for x in (sums, n, *told["accuracy"])]
    if not total[1]:
        return {}
    mean = total[0] / total[1]
    return {"eval_loss": mean, "eval_perplexity": float(np.exp(mean)), "eval_accuracy": total[2] / max(total[3], 1.0)}
