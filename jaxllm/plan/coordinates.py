"""How much the activations of a model change while it is trained: what `jaxllm plan coordcheck` draws against the width.

B row, T position, D width, V vocabulary. S optimizer step.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxllm.model.config import ModelConfig
from jaxllm.model.formulation import for_platform
from jaxllm.model.heads import LanguageModel
from jaxllm.model.transformer import unstack
from jaxllm.train.config import OptimConfig
from jaxllm.train.optim import make_optimizer
from jaxllm.train.step import Objective, loss_sum

KINDS = ("embedding", "attention", "mlp", "residual", "logits")


def activations(graph, params, token_BT, pos_BT, first_DV=0.0) -> dict[str, list[jax.Array]]:
    """Returns the outputs of a language model's parts, by kind: what each layer adds to the stream, and the stream after it.

    Logits are less what a head `first_DV` makes of the same hidden states.
    """
    model = nnx.merge(graph, params)
    trunk, x_BTD = model.trunk, model.trunk.embed(token_BT)
    angles, attend = trunk.angles(pos_BT), trunk.within(jnp.ones_like(token_BT))
    found = {kind: [] for kind in KINDS}
    found["embedding"].append(x_BTD)
    blocks, stacked = nnx.split(trunk.blocks_L)
    for own in unstack(stacked, trunk.n_units):
        unit = nnx.merge(blocks, own)
        for layer in [getattr(unit, f"layer_{i}") for i in range(unit.n)] if hasattr(unit, "n") else [unit]:
            y_BTD, _ = layer.attn(layer.attn_norm(x_BTD), angles, attend, None)
            x_BTD = layer.add(x_BTD, y_BTD)
            h_BTD = layer.mlp(layer.mlp_norm(x_BTD))
            h_BTD = h_BTD[0] if layer.sparse else h_BTD
            x_BTD = layer.add(x_BTD, h_BTD)
            for kind, value in (("attention", y_BTD), ("mlp", h_BTD), ("residual", x_BTD)):
                found[kind].append(value)
    found["logits"].append(trunk.norm(x_BTD) @ (model.head_DV() - first_DV))
    return found


def changes(model: ModelConfig, optim: OptimConfig, batches: dict, platform: str, seeds) -> np.ndarray:
    """Returns the mean |change| of each kind of activation since the start, [seed, step, kind], of models that are trained
    on `batches` (arrays [S, B, T]); it is measured on the first of them, as a mean over layers, positions and width.

    A head of its own begins at 0 (Yang et al. 2022, appendix D.2): what a random one makes of the first changes falls with the
    root of the width in muP too, and would hide what is learnt. So only the logits move in the first step. Of a tied head,
    which cannot, that part is taken off.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(model, for_platform(platform), rngs=nnx.Rngs(0))))
    n_steps = len(batches["token_BT"])
    optimizer = make_optimizer(optim, n_steps, model)
    objective = Objective(graph, jnp.float32, batches["token_BT"].shape[2], z_loss=0.0, label_smoothing=0.0, dropout=0.0,
                          moe=model.moe if model.moe.experts else None)

    @jax.jit
    def run(seed):
        params = nnx.state(LanguageModel(model, for_platform(platform), rngs=nnx.Rngs(jax.random.key(seed))), nnx.Param)
        if not model.tied:
            params["out_DV"] = jax.tree.map(jnp.zeros_like, params["out_DV"])
        look = partial(activations, graph, token_BT=batches["token_BT"][0], pos_BT=batches["pos_BT"][0],
                       first_DV=nnx.merge(graph, params).head_DV())
        before = look(params)

        def step(carry, batch):
            params, state = carry
            (loss, n), grads = jax.value_and_grad(partial(loss_sum, objective), has_aux=True)(params, batch)
            updates, state = optimizer.tx.update(jax.tree.map(lambda g: g / n, grads), state, params, value=loss / n)
            params = optax.apply_updates(params, updates)
            after = look(params)
            moved = jax.tree.map(lambda a, b: jnp.mean(jnp.abs(a - b)), after, before)
            return (params, state), jnp.stack([jnp.mean(jnp.stack(moved[kind])) for kind in KINDS])

        return jax.lax.scan(step, (params, optimizer.tx.init(params)), batches)[1]

    return np.stack([np.asarray(run(seed)) for seed in seeds])


def made_up(words: int, rows: int, length: int, steps: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns batches [S, B, T] of text from a random Markov chain: words are as unlike in number as in real text (Zipf), and
    each has few likely successors. Changes of words that are all alike would be noise, which falls with the width."""
    rng = np.random.default_rng(seed)
    zipf_V = 1 / np.arange(1, words + 1)
    chance_VV = rng.dirichlet(8 * zipf_V / zipf_V.sum(), words).cumsum(axis=1)
    token_SBT = np.zeros((steps, rows, length + 1), np.int32)
    token_SBT[..., 0] = rng.integers(0, words, (steps, rows))
    for t in range(length):
        ahead = chance_VV[token_SBT[..., t]] < rng.random((steps, rows, 1))
        token_SBT[..., t + 1] = np.minimum(ahead.sum(axis=-1), words - 1)
    shape = steps, rows, length
    return {"token_BT": token_SBT[..., :-1], "target_BT": token_SBT[..., 1:], "doc_BT": np.ones(shape, np.int32),
            "pos_BT": np.broadcast_to(np.arange(length, dtype=np.int32), shape), "weight_BT": np.ones(shape, np.float32)}
