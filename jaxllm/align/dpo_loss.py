"""What `jaxllm dpo` minimises: the formulas of dpo.py on what a language model says of a batch of pairs.

B pair, K = 2 answers of a pair (the better one first), X = B K sequence, T position, D width, M micro-batch.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.align import dpo
from jaxllm.align.dpo_config import DPOVerb
from jaxllm.align.sft_loss import whole
from jaxllm.align.supervised import of_routers
from jaxllm.model.config import LoRAConfig, MoEConfig
from jaxllm.model.heads import cast
from jaxllm.train.loss import token_logps
from jaxllm.train.step import routers_loss, split


class Reading(NamedTuple):
    """How answers are read: the policy and its reference alike."""

    graph: nnx.GraphDef
    dtype: Any  # compute type
    chunk: int  # positions whose logits are held at once
    lora: LoRAConfig = LoRAConfig()  # rank 0: `params` are whole weights
    moe: MoEConfig | None = None  # of a model with sparse layers, where it is trained: their losses count


def logps(reading: Reading, params, frozen, token_BKT, length_BK, prompt_BK):
    """Returns (log-probability of each answer, summed over its tokens; its number of tokens), float32 [B, K].

    All sequences, a prompt and an answer with padding behind, go through the model at once.
    """
    return _logps_and_routed(reading, params, frozen, token_BKT, length_BK, prompt_BK)[:2]


def _logps_and_routed(reading: Reading, params, frozen, token_BKT, length_BK, prompt_BK):
    B, K, T = token_BKT.shape
    token_XT, length_X1, prompt_X1 = token_BKT.reshape(B * K, T), length_BK.reshape(-1, 1), prompt_BK.reshape(-1, 1)
    model = nnx.merge(reading.graph, cast(whole(reading.lora, params, frozen), reading.dtype))
    at_1T = jnp.arange(T - 1, dtype=jnp.int32)[None]
    real_XT = at_1T < length_X1
    x_XTD, routed_L = model.hidden_and_routed(token_XT[:, :-1], jnp.where(real_XT, at_1T, 0), real_XT.astype(jnp.int32))
    logp_XT = token_logps(x_XTD, model.head_DV(), token_XT[:, 1:], chunk=reading.chunk)
    # what position t predicts is token t + 1
    logp_X, n_X = dpo.answer_logps(logp_XT, (at_1T + 1 >= prompt_X1) & (at_1T + 1 < length_X1))
    return logp_X.reshape(B, K), n_X.reshape(B, K), routed_L


def loss(reading: Reading, of_pairs, params, frozen, batch, key):
    """Returns (Σ loss, (pairs, told)) of a batch of data/pairs.py; `of_pairs` is what `formula` returns.

    Of sparse layers no expert drops tokens, as none does for the reference, and the routers' losses count once a pair.
    """
    arrays = batch["token_BKT"], batch["length_BK"], batch["prompt_BK"]
    logp_BK, n_BK, routed_L = _logps_and_routed(reading, params, frozen, *arrays)
    loss_B, chosen_B, rejected_B = of_pairs(logp_BK, n_BK, batch)
    real_B = batch["real_B"]
    total, count = dpo.over_pairs(loss_B, real_B)
    told = dpo.preference_metrics(chosen_B, rejected_B, real_B)
    told |= {"chosen_logp": dpo.over_pairs(logp_BK[:, 0], real_B), "rejected_logp": dpo.over_pairs(logp_BK[:, 1], real_B)}
    if "baseline_B" in batch:
        told["kl"] = dpo.over_pairs(batch["baseline_B"], real_B)
    if reading.moe is not None:
        told |= of_routers(routed_L)
    return total + count * routers_loss(reading.moe, routed_L), (count, told)


def formula(cfg: DPOVerb):
    """Returns the loss that the settings name, (logp_BK, n_BK, batch) -> (loss_B, reward of the better answer, the other's)."""
    if cfg.loss == "dpo":
        of = partial(dpo.dpo, beta=cfg.dpo.beta, label_smoothing=cfg.dpo.label_smoothing)
        return partial(_with_margin, _referred, of, cfg.margin)
    if cfg.loss == "ipo":
        return partial(_referred, partial(dpo.ipo, tau=cfg.ipo.tau))
    if cfg.loss == "kto":
        return partial(_kto, partial(dpo.kto, beta=cfg.kto.beta, desirable_weight=cfg.kto.desirable_weight,
                                     undesirable_weight=cfg.kto.undesirable_weight))
    if cfg.loss == "orpo":
        return partial(_alone, partial(dpo.orpo, weight=cfg.orpo.weight))
    return partial(_with_margin, _alone, partial(dpo.simpo, beta=cfg.simpo.beta, gamma=cfg.simpo.gamma), cfg.margin)


def _with_margin(read, of, scale: float, logp_BK, n_BK, batch):
    return read(partial(of, margin_B=scale * batch["margin_B"]), logp_BK, n_BK, batch)


def _referred(of, logp_BK, n_BK, batch):
    ref_BK = batch["ref_logp_BK"]
    return of(logp_BK[:, 0], logp_BK[:, 1], ref_BK[:, 0], ref_BK[:, 1])


def _alone(of, logp_BK, n_BK, batch):
    return of(logp_BK[:, 0], logp_BK[:, 1], n_BK[:, 0], n_BK[:, 1])


def _kto(of, logp_BK, n_BK, batch):
    """A pair's loss is the mean of its two answers'."""
    ref_BK, baseline_B = batch["ref_logp_BK"], batch["baseline_B"]
    good_B, good_reward_B = of(logp_BK[:, 0], ref_BK[:, 0], jnp.ones_like(baseline_B), baseline_B)
    bad_B, bad_reward_B = of(logp_BK[:, 1], ref_BK[:, 1], jnp.zeros_like(baseline_B), baseline_B)
    return (good_B + bad_B) / 2, good_reward_B, bad_reward_B


def with_baseline(reading: Reading, micro_batches: int, params, frozen, batch):
    """Returns a batch with KTO's reference point, baseline_B, in place of the answers to other prompts that it is made of.

    One number for the whole batch, before it is cut into micro-batches: those are only read one after the other here.
    """
    batch = dict(batch)
    other = {name: batch.pop(f"other_{name}") for name in ("token_BKT", "length_BK", "prompt_BK")}
    ref_BK = batch.pop("ref_other_BK")
    parts = jax.tree.map(partial(split, micro_batches), other | {"ref_BK": ref_BK, "real_B": batch["real_B"]})
    logp_MBK = jax.lax.map(lambda part: logps(reading, params, frozen, *(part[name] for name in other))[0], parts)
    real_MBK = jnp.broadcast_to(parts["real_B"][..., None], logp_MBK.shape)
    baseline = dpo.kto_baseline(logp_MBK.reshape(-1), parts["ref_BK"].reshape(-1), real_MBK.reshape(-1))
    return batch | {"baseline_B": jnp.broadcast_to(baseline, batch["real_B"].shape)}
