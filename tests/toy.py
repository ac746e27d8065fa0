"""The toy model and batch that many tests share."""

import jax
import numpy as np

from jaxllm.mesh import DcnConfig, MeshConfig
from jaxllm.model.config import ModelConfig
from jaxllm.partition import batch_sharding, make_mesh
from jaxllm.train.config import OptimConfig, TrainConfig
from jaxllm.train.optim import make_optimizer
from jaxllm.train.state import build

MODEL = ModelConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=64, vocab_size=64, max_seq_len=128)
ROWS, T = 16, 24


def batch(rows: int = ROWS, T: int = T, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns rows of two documents each, with some targets of weight 0."""
    rng = np.random.default_rng(seed)
    token_BT = rng.integers(0, MODEL.vocab_size, (rows, T + 1)).astype(np.int32)
    second_BT = np.tile(np.arange(T) >= T // 3, (rows, 1))
    return {
        "token_BT": token_BT[:, :-1], "target_BT": token_BT[:, 1:],
        "pos_BT": np.where(second_BT, np.arange(T) - T // 3, np.arange(T)).astype(np.int32),
        "doc_BT": second_BT.astype(np.int32) + 1, "weight_BT": (rng.random((rows, T)) < 0.8).astype(np.float32),
    }


def program(model: ModelConfig = MODEL, *, devices: int = 1, stage: int = 1, data: int = 1, fsdp: int = 1, expert: int = 1,
            context: int = 1, tensor: int = 1, slices: int = 1, steps: int | None = 10, seed: int = 0,
            optim: OptimConfig | None = None, **train):
    """Returns a program on some of the emulated devices; `slices` of them side by side, each with the other degrees."""
    # Out of the cache, collectives in nested branches run in no fixed order on a CPU (jaxllm/platform.py): those are not kept.
    nested = stage > 1 and fsdp * expert * context * tensor > 1
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf") if nested else 0.3)
    mesh = make_mesh(MeshConfig(stage=stage, data=data, fsdp=fsdp, expert=expert, context=context, tensor=tensor,
                                dcn=DcnConfig(data=slices)), jax.devices()[:devices])
    cfg = TrainConfig(steps=steps, **{"batch_size": ROWS, "loss_chunk": 10} | train)
    optimizer = make_optimizer(optim or OptimConfig(lr=1e-3, schedule="constant"), steps or 10, model, noise_steps=cfg.noise_scale)
    return build(model, cfg, optimizer, mesh, seed=seed)


def run(prog, batches, state=None):
    """Returns (state, losses) after one step on each batch."""
    with jax.set_mesh(prog.mesh):
        state = prog.init() if state is None else state
        losses = []
        for one in batches:
            state, metrics = prog.train_step(state, jax.device_put(one, batch_sharding(prog.mesh)))
            losses.append(float(prog.read(metrics)["loss"]))
    return state, losses


def leaves(tree) -> dict[str, np.ndarray]:
    from jaxllm.partition import leaf_name

    return {leaf_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def worst(a, b) -> tuple[float, str]:
    """Returns the largest difference of two trees, relative to the largest entry of each leaf, and the leaf's name."""
    found = (0.0, "")
    left, right = leaves(a), leaves(b)
    assert left.keys() == right.keys()
    for name, x in left.items():
        y = right[name].astype(np.float64)
        error = float(np.abs(x - y).max() / (np.abs(y).max() + 1e-30))
        found = max(found, (error if np.isfinite(error) else np.inf, name))  # a NaN is never the larger one
    return found
