"""A reward model in use: tokens in, scores out; and the scale that makes demonstrations score 0.

Axes: B sequence, T position, O objective.
"""

import json
import pathlib
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.align.start import load_scores
from jaxllm.errors import UserError, nearest
from jaxllm.generate.engine import power_of_two
from jaxllm.model.heads import cast
from jaxllm.partition import batch_parts, replicated, row_sharding
from jaxllm.train.run_folder import tokenizer_of, write_atomically
from jaxllm.train.state import compute_dtype

SCALE = "score_scale.json"  # {"mean": [O], "std": [O]} of the raw scores of demonstrations, by objective
ROWS = 64  # sequences scored at once, at most


def last_scores(graph, dtype, params, token_BT, length_B):
    """Returns score_BO, float32: what a score model gives at the last token of each row; padding is behind it."""
    return last_scores_and_routed(graph, dtype, params, token_BT, length_B)[0]


def last_scores_and_routed(graph, dtype, params, token_BT, length_B):
    """Returns (`last_scores`, what the routers of sparse layers did, or None)."""
    model = nnx.merge(graph, cast(params, dtype))
    at_T = jnp.arange(token_BT.shape[1], dtype=jnp.int32)[None]
    real_BT = at_T < length_B[:, None]
    score_BTO, routed_L = model.scores_and_routed(token_BT, jnp.where(real_BT, at_T, 0), real_BT.astype(jnp.int32))
    last_BT = at_T == length_B[:, None] - 1  # a masked sum, not a gather: positions may be split
    return jnp.sum(jnp.where(last_BT[..., None], score_BTO, 0.0), axis=1), routed_L


class RewardModel:
    """The model of a run of `jaxllm reward`, as a reward of token sequences (rewards.Scorer)."""

    def __init__(self, run: str, mesh, tokenizer, *, step: int | None = None, weights: dict[str, float] | None = None,
                 key: str = "rewards.NAME"):
        """`weights`: of its objectives, by name, in the score; none: 1 each. Raises UserError for another tokenizer."""
        cfg, graph, params, objectives = load_scores(run, mesh, step)
        if (theirs := tokenizer_of(pathlib.Path(run)).hash) != tokenizer.hash:
            raise UserError(f"{key}.run={run}: its tokenizer ({theirs}) is not the policy's ({tokenizer.hash}); train both "
                            "from runs with the same tokenizer")
        for name in weights or {}:
            if name not in objectives:
                raise UserError(f"{key}.objectives.{name}: the model has {', '.join(objectives)}; {nearest(name, objectives)}")
        self.mesh, self.cfg, self.graph, self.pad_id, self.objectives = mesh, cfg, graph, tokenizer.pad_id, objectives
        weights = weights or dict.fromkeys(objectives, 1.0)
        self.weight_O = np.array([weights.get(name, 0.0) for name in objectives], np.float32)
        self.params = scaled(params, read_scale(run, len(objectives)))
        dtype = compute_dtype(cfg.precision, mesh.devices.flat[0].platform)
        self._scores = jax.jit(partial(last_scores, graph, dtype), out_shardings=replicated(mesh))

    def __call__(self, sequences: list[list[int]]) -> Sequence[float]:
        """Returns the weighted score of each sequence, a prompt and its response cut at the end token."""
        return (self.by_objective(sequences) @ self.weight_O).tolist()

    def by_objective(self, sequences: list[list[int]]) -> np.ndarray:
        """Returns score_BO of the sequences; raises UserError where one is longer than the model takes."""
        longest = max(map(len, sequences), default=0)
        if longest > self.cfg.model.max_seq_len:
            raise UserError(f"a prompt and its response have {longest} tokens, more than the reward model's "
                            f"max_seq_len={self.cfg.model.max_seq_len}")
        T, parts = min(power_of_two(longest, 32), self.cfg.model.max_seq_len), batch_parts(self.mesh)
        B = -(-min(power_of_two(len(sequences)), ROWS) // parts) * parts
        found = []
        with jax.set_mesh(self.mesh):
            for at in range(0, len(sequences), B):
                part = sequences[at : at + B]
                token_BT, length_B = np.full((B, T), self.pad_id, np.int32), np.ones(B, np.int32)
                for i, ids in enumerate(part):
                    token_BT[i, : len(ids)], length_B[i] = ids, max(len(ids), 1)
                inputs = jax.device_put((token_BT, length_B), row_sharding(self.mesh))
                found.append(np.asarray(self._scores(self.params, *inputs))[: len(part)])
        return np.concatenate(found) if found else np.zeros((0, len(self.objectives)), np.float32)


def scaled(params, scale: dict):
    """Returns the parameters of a score model whose scores are (raw - mean) / std."""
    mean_O, std_O = (jnp.asarray(scale[name], jnp.float32) for name in ("mean", "std"))
    head, bias = params["score_DO"], params["bias_O"]
    params = jax.tree.map(lambda x: x, params)
    params["score_DO"], params["bias_O"] = head.replace(head[...] / std_O[None]), bias.replace((bias[...] - mean_O) / std_O)
    return params


def write_scale(run: pathlib.Path, score_BO: np.ndarray, *, unit_variance: bool) -> dict:
    """Notes the scale at which these raw scores have mean 0 (and variance 1 if asked) in a run's folder; returns it."""
    mean_O, std_O = score_BO.mean(axis=0, dtype=np.float64), score_BO.std(axis=0, dtype=np.float64)
    std_O = np.where(std_O > 0, std_O, 1.0) if unit_variance else np.ones_like(std_O)
    scale = {"mean": mean_O.tolist(), "std": std_O.tolist(), "answers": len(score_BO)}
    write_atomically(run / SCALE, json.dumps(scale) + "\n")
    return scale


def read_scale(run: str, n: int) -> dict:
    """Returns a reward run's scale; raises UserError where it has not finished."""
    try:
        return json.loads((pathlib.Path(run) / SCALE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{run}: the reward model is not finished (no {SCALE}); run its command again") from None
