"""The compiled parts of a run of `jaxllm dpo`, over whole weights or adapters beside frozen ones.

B pair, K = 2 answers of a pair.
"""

import dataclasses
from functools import partial

import jax
import numpy as np

from jaxllm.align import dpo, supervised
from jaxllm.align.dpo_config import DPOVerb
from jaxllm.align.dpo_loss import Reading, formula, logps, loss, with_baseline
from jaxllm.align.sft_loss import whole
from jaxllm.align.start import load_weights
from jaxllm.data.pairs import ARRAYS, Pairs
from jaxllm.data.preference import PreferenceRows
from jaxllm.model.heads import LanguageModel
from jaxllm.model.lora import adapters
from jaxllm.partition import replicated, row_sharding
from jaxllm.train.flops import parameter_count, training_flops_per_token
from jaxllm.train.optim import make_optimizer
from jaxllm.train.state import check_experts, placed_shapes, starting_from, structure


class DPOProgram:
    """`steps` is what the loop runs; nothing is compiled yet, and of whole weights nothing is loaded before a first step."""

    def __init__(self, cfg: DPOVerb, mesh, dtype, steps: int):
        check_experts(cfg.model, mesh)
        self.mesh, self.lora, self.frozen, self.rows = mesh, cfg.lora, None, cfg.train.batch_size // cfg.train.micro_batches
        self.graph, trained = structure(LanguageModel, cfg.model, mesh, remat=cfg.train.remat)
        load = partial(_base_weights, cfg, mesh)
        if cfg.lora.rank:
            self.frozen = load()
            make = partial(adapters, cfg=cfg.lora, key=jax.random.key(cfg.run.seed))
            trained = placed_shapes(lambda: make(self.frozen), mesh)
            load = partial(jax.jit(make, out_shardings=jax.tree.map(lambda a: a.sharding, trained)), self.frozen)
        reading = Reading(self.graph, dtype, cfg.train.loss_chunk, cfg.lora)
        optimizer = make_optimizer(cfg.optim, steps, cfg.model)
        trained_loss = partial(loss, reading._replace(moe=cfg.model.moe if cfg.model.moe.experts else None), formula(cfg))
        made = supervised.program(self.graph, trained, trained_loss, optimizer, mesh, cfg.train, seed=cfg.run.seed,
                                  frozen=self.frozen, held_out=partial(loss, reading, formula(cfg)),
                                  bias_rate=cfg.model.moe.bias_rate)
        # the weights that a run starts from are read when it starts, and go when its state is made
        self.steps = dataclasses.replace(made, init=lambda: starting_from(made, load(), optimizer, cfg.run.seed).init())
        self.kto = cfg.loss == "kto"
        if self.kto:
            baseline = jax.jit(partial(with_baseline, reading, cfg.train.micro_batches))
            self.steps = dataclasses.replace(self.steps, train_step=lambda state, batch: made.train_step(
                state, baseline(state.params, self.frozen, batch)))
            self.other_logps = jax.jit(lambda params, frozen, *arrays: logps(reading, params, frozen, *arrays)[0],
                                       out_shardings=replicated(mesh))

    def whole(self, params):
        """Returns a model's weights of what is trained."""
        return jax.jit(partial(whole, self.lora))(params, self.frozen) if self.lora.rank else params

    def evaluate(self, held_out: Pairs, rows: int, params) -> dict:
        """Returns the loss and the implicit rewards over held-out pairs; {} without any."""
        total: dict[str, np.ndarray] = {}
        given = PreferenceRows(held_out, self.rows, rows)
        baseline = self._baseline(given, params) if self.kto and len(held_out) else None
        for batch in given.batches():
            if baseline is not None:
                batch = {name: x for name, x in batch.items() if "other" not in name}
                batch["baseline_B"] = np.full(self.rows, baseline, np.float32)
            summed, (n, told) = self.steps.eval_step(params, jax.device_put(batch, row_sharding(self.mesh)))
            for name, pair in {"loss": (summed, n), **told}.items():
                total[name] = total.get(name, np.zeros(2)) + [float(x) for x in pair]
        return {f"eval_{name}": float(s / max(count, 1.0)) for name, (s, count) in total.items()}

    def _baseline(self, given: PreferenceRows, params) -> float:
        """Returns KTO's reference point of all held-out pairs: one number, however they are cut into batches."""
        found = []
        for batch in given.batches():
            arrays = jax.device_put(tuple(batch[f"other_{name}"] for name in ARRAYS), row_sharding(self.mesh))
            logp_BK = np.asarray(self.other_logps(params, self.frozen, *arrays))
            real_BK = np.repeat(batch["real_B"][:, None], 2, axis=1)
            found.append((logp_BK.ravel(), batch["ref_other_BK"].ravel(), real_BK.ravel()))
        return float(dpo.kto_baseline(*map(np.concatenate, zip(*found, strict=True))))

    def flops_per_token(self, cfg: DPOVerb) -> float:
        """Returns the model FLOPs of a token of a pair: adapters need no gradient of the frozen matrices, a third of the
        work; KTO's answers to other prompts are read without any, another third."""
        thirds = (2 if self.lora.rank else 3) + (1 if self.kto else 0)
        return training_flops_per_token(cfg.model, cfg.data.seq_len) * thirds / 3

    def describe(self, cfg: DPOVerb, n_train: int, n_validation: int) -> list[str]:
        """Returns what is to be said when a run starts."""
        trained = sum(leaf.size for leaf in jax.tree.leaves(self.steps.abstract.params))
        total = sum(parameter_count(cfg.model).values())
        adapter = f"adapters of rank {cfg.lora.rank}, {trained / 1e6:.3f} M parameters, beside " if cfg.lora.rank else ""
        sizes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1) or "one device"
        return [f"loss: {cfg.loss}; model: {adapter}{total / 1e6:.2f} M parameters of {cfg.base.run}",
                f"mesh: {sizes} ({self.mesh.size} {self.mesh.devices.flat[0].device_kind})",
                f"pairs: {n_train:,} to train on, {n_validation:,} held out ({cfg.pairs})"]


def _base_weights(cfg: DPOVerb, mesh):
    return load_weights(cfg.base, mesh)[1]
