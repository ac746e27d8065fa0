"""How a verb of alignment starts: from another run's model, tokenizer and template."""

import dataclasses
import hashlib
import pathlib
import sys

import jax

from jaxllm.align.config import BaseConfig
from jaxllm.errors import UserError
from jaxllm.model.heads import ScoreModel
from jaxllm.partition import make_mesh
from jaxllm.train.checkpoint import Checkpoints, load_model, read_params
from jaxllm.train.config import ModelOfRun
from jaxllm.train.run_folder import last_checkpoint, read_model, read_yaml
from jaxllm.train.state import structure


def found_base(base: BaseConfig, key: str = "base") -> ModelOfRun:
    """Returns what the run that is started from says of its model; raises UserError where there is none."""
    if not base.run:
        raise UserError(f"{key}.run is not set: give the run folder to start from, e.g. --{key}.run=runs/demo")
    found = read_model(pathlib.Path(base.run))
    if found.verb == "reward":
        raise UserError(f"{key}.run={base.run}: holds a reward model; should be the run of a language model")
    if not last_checkpoint(pathlib.Path(base.run)):
        raise UserError(f"{key}.run={base.run}: has no checkpoint yet; run its command again until it is finished")
    return found


def resolved(cfg, found: ModelOfRun):
    """Returns a verb's settings with what they take from their base: the model, its tokenizer and template, and of which
    checkpoint it is, so that the base may be trained on meanwhile.

    Once the run has begun its own tokenizer is used, so that the base may go.
    """
    own = pathlib.Path(cfg.run.dir) / "tokenizer.model"
    given = cfg.data.tokenizer or _tokenizer_of(pathlib.Path(cfg.base.run), found)
    if given != "bytes" and not pathlib.Path(given).exists() and own.exists() and not cfg.run.overwrite:
        print(f"! {given} is gone; the run's own copy is used: {own}", file=sys.stderr)
        given = str(own)
    data = dataclasses.replace(cfg.data, tokenizer=given)
    if hasattr(data, "template"):
        data = dataclasses.replace(data, template=data.template or found.template or "plain")
    if data.seq_len > found.model.max_seq_len:
        raise UserError(f"data.seq_len={data.seq_len} is longer than the base model's max_seq_len={found.model.max_seq_len}")
    return dataclasses.replace(cfg, model=found.model, data=data, base=at_step(cfg, "base"))


def at_step(cfg, key: str) -> BaseConfig:
    """Returns a run that a verb reads weights of, with its step: where none is given, that of the verb's first start."""
    named, folder = getattr(cfg, key), pathlib.Path(cfg.run.dir)
    if named.step is not None or not named.run:
        return named
    if not cfg.run.overwrite and last_checkpoint(folder):
        return dataclasses.replace(named, step=(read_yaml(folder).get(key) or {}).get("step"))
    return dataclasses.replace(named, step=last_checkpoint(pathlib.Path(named.run)) or None)


def _tokenizer_of(folder: pathlib.Path, found: ModelOfRun) -> str:
    own = folder / "tokenizer.model"
    return str(own) if own.exists() else found.tokenizer


def sample_prompts(cfg, chat) -> list[list[int]]:
    """Returns the ids of the sample prompts; raises UserError for one that leaves no room."""
    prompts = []
    for i, text in enumerate(cfg.train.sample_prompts if cfg.train.sample_every else [], 1):
        prompts.append(chat.prompt_ids([{"role": "user", "content": text}], f"train.sample_prompts: prompt {i}"))
        if len(prompts[-1]) >= cfg.model.max_seq_len:
            raise UserError(f"train.sample_prompts: prompt {i} has {len(prompts[-1])} tokens in template {chat.name}; "
                            f"should be fewer than the base model's max_seq_len={cfg.model.max_seq_len}")
    return prompts


def mesh_of(cfg):
    """Returns the mesh of a verb of alignment; raises UserError for axes that its steps do not use."""
    mesh = make_mesh(cfg.mesh)
    for axis in ("stage", "context"):
        if mesh.shape[axis] > 1:
            raise UserError(f"mesh.{axis}={mesh.shape[axis]}: alignment uses data, fsdp, expert and tensor; set mesh.{axis}=1")
    return mesh


def load_weights(base: BaseConfig, mesh):
    """Returns (graph, parameters) of a base's language model, placed on the mesh; adapters are added to their weights."""
    _, graph, params, _ = load_model(base.run, base.step, mesh)
    return graph, params


def weights_digest(base: BaseConfig) -> str:
    """Returns a digest of a run's weights, those below an adapter included, out of the checksums in its checkpoint."""
    folder = pathlib.Path(base.run)
    found, step = read_model(folder), base.step or last_checkpoint(folder)
    with Checkpoints(folder) as checkpoints:
        arrays = checkpoints.arrays(step)
    said = {name: told for name, told in arrays.items() if name.startswith("params.")}
    if found.lora.rank:
        said |= {"lora": repr(found.lora), "base": weights_digest(BaseConfig(run=found.base, step=found.base_step))}
    return hashlib.blake2b(repr(sorted(said.items())).encode(), digest_size=12).hexdigest()


def load_scores(run: str, mesh, step: int | None = None):
    """Returns (ModelOfRun, graph, parameters, objectives) of a reward model's run; raises UserError for another verb's."""
    folder = pathlib.Path(run)
    found = read_model(folder)
    if found.verb != "reward":
        raise UserError(f"{run}: holds a run of jaxllm {found.verb}; should be a reward model's (jaxllm reward)")
    objectives = read_yaml(folder)["data"]["objectives"]
    graph, abstract = structure(ScoreModel, found.model, mesh, n_scores=len(objectives))
    params, _ = read_params(folder, abstract, step)
    return found, graph, params, objectives


def with_trunk(score_params, params):
    """Returns the parameters of a score model whose trunk is a language model's."""
    score_params = jax.tree.map(lambda x: x, score_params)
    score_params["trunk"] = params["trunk"]
    return score_params
