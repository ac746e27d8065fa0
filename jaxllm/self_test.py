"""Ten seconds on real arrays: a tiny model trains, is saved, comes back bit for bit and writes; part of `jaxllm doctor`."""

import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

STEPS, T = 3, 128


def self_test() -> Iterator[tuple[str, str, str, str]]:
    """Yields (what, state, what was seen, what mends it); after a failure, what needs its result is left out."""
    with tempfile.TemporaryDirectory() as folder:
        made: dict = {}
        update = f"{sys.executable} -m pip install -U"
        for name, stage, mend in (
            ("model and mesh", make, f"{update} jax jaxlib flax optax"),
            (f"{STEPS} training steps", train, f"{update} jax jaxlib flax optax"),
            ("checkpoint", lambda made: checkpoint(made, pathlib.Path(folder)), f"{update} orbax-checkpoint"),
            ("generation", generate, f"{update} jax jaxlib flax"),
        ):
            state, said = attempt(stage, made)
            yield name, state, said, mend if state == "fail" else ""
            if state == "fail" and name != "checkpoint":
                return


def attempt(stage: Callable[[dict], str], made: dict) -> tuple[str, str]:
    """Returns (ok or fail, what the stage said and how long it took)."""
    began = time.perf_counter()
    try:
        said = stage(made)
    except Exception as e:  # the user is told of any failure, and the rest still runs
        return "fail", f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:300]}"
    return "ok", f"{said} ({time.perf_counter() - began:.1f} s)"


def make(made: dict) -> str:
    """Makes a tiny model on all devices."""
    import jax

    from jaxllm.data.tokenizer import load_tokenizer
    from jaxllm.mesh import MeshConfig
    from jaxllm.model.config import ModelConfig
    from jaxllm.partition import make_mesh
    from jaxllm.train.config import OptimConfig, TrainConfig
    from jaxllm.train.optim import make_optimizer
    from jaxllm.train.state import build

    mesh, tokenizer = make_mesh(MeshConfig()), load_tokenizer("bytes")
    model = ModelConfig(d_model=128, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=tokenizer.vocab_size, max_seq_len=T)
    train = TrainConfig(steps=STEPS, batch_size=mesh.size)
    program = build(model, train, make_optimizer(OptimConfig(lr=1e-2, schedule="constant"), STEPS, model), mesh)
    with jax.set_mesh(mesh):
        state = jax.block_until_ready(program.init())
    made |= {"mesh": mesh, "tokenizer": tokenizer, "model": model, "program": program, "state": state}
    n = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return f"{n:,} parameters on {mesh.size} {mesh.devices.flat[0].device_kind}"


def train(made: dict) -> str:
    """Takes three steps on one batch; the loss has to fall."""
    import jax
    import numpy as np

    rows = made["mesh"].size
    token_T = np.frombuffer((b"In the beginning was the word. " * 5)[: T + 1], np.uint8).astype(np.int32)
    batch = {
        "token_BT": np.tile(token_T[:-1], (rows, 1)), "target_BT": np.tile(token_T[1:], (rows, 1)),
        "weight_BT": np.ones((rows, T), np.float32), "pos_BT": np.tile(np.arange(T, dtype=np.int32), (rows, 1)),
        "doc_BT": np.ones((rows, T), np.int32),
    }
    losses = []
    with jax.set_mesh(made["mesh"]):
        for _ in range(STEPS):
            made["state"], metrics = made["program"].train_step(made["state"], batch)
            losses.append(float(metrics["loss"]))
    shown = " -> ".join(f"{loss:.3f}" for loss in losses)
    if not (np.isfinite(losses).all() and losses[-1] < losses[0]):
        raise ValueError(f"the loss does not fall: {shown}")
    return f"loss {shown}"


def checkpoint(made: dict, folder: pathlib.Path) -> str:
    """Saves the state and reads it back; every array has to be the same, bit for bit."""
    import jax
    import numpy as np

    from jaxllm.train.checkpoint import Checkpoints
    from jaxllm.train.config import CheckpointConfig

    program, state = made["program"], made["state"]
    with jax.set_mesh(made["mesh"]), Checkpoints(folder, CheckpointConfig()) as checkpoints:
        checkpoints.save(STEPS, state, {"step": STEPS})
        checkpoints.wait()
        restored = checkpoints.restore(program.abstract)
    if restored is None:
        raise ValueError("what was saved cannot be read")
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(restored[0]), strict=True)
    if not all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in leaves):
        raise ValueError("what was read differs from what was saved")
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return f"saved and restored bit for bit, {size / 1e6:.1f} MB"


def generate(made: dict) -> str:
    """Continues a prompt by eight tokens."""
    from jaxllm.generate.config import SampleConfig
    from jaxllm.generate.engine import Engine

    engine = Engine(made["program"].graph, made["state"].params, made["model"], made["tokenizer"], made["mesh"])
    written = engine.generate(["In the"], SampleConfig(max_tokens=8, temperature=0.0))[0]
    if not written.tokens:
        raise ValueError("no token was written")
    return f"{len(written.tokens)} tokens"
