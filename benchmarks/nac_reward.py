"""A reward model on "noisy addition": how many compared answers it takes to tell right from wrong sums.

    python benchmarks/nac_reward.py --task=PATH/nac_task.py [--pairs=131072] [--flip=0.1] [--json=FILE]

Starts from the model that was taught with the task's demonstrations, as `jaxllm reward` starts from an SFT run. Of two
sampled demonstrations for a prompt one is right; with probability `--flip` the label is the wrong one. Every pair is read once.
The Bayes limit is 1 - flip against the labels, and 1 against the truth: held-out prompts, labels without flips.
"""

import argparse
import json
import pathlib
import time
from functools import partial

import jax
import numpy as np
from nac import load_task, model_of, sft

from jaxllm.align.reward import loss
from jaxllm.align.start import with_trunk
from jaxllm.align.supervised import program
from jaxllm.mesh import MeshConfig
from jaxllm.model.heads import ScoreModel
from jaxllm.partition import make_mesh, row_sharding
from jaxllm.train.config import OptimConfig, TrainConfig
from jaxllm.train.optim import make_optimizer
from jaxllm.train.state import structure

T = 32


def groups_of(task, pairs) -> dict[str, np.ndarray]:
    """Returns pairs as a batch of groups of two answers, the better one first."""
    token_BKT, length_BK = np.full((len(pairs), 2, T), task.PAD, np.int32), np.zeros((len(pairs), 2), np.int32)
    for i, (prompt, *answers) in enumerate(pairs):
        for k, answer in enumerate(answers):
            ids = prompt + answer
            token_BKT[i, k, : len(ids)], length_BK[i, k] = ids, len(ids)
    B = len(pairs)
    rest = {"objective_B": np.zeros(B, np.int32), "margin_B": np.zeros(B, np.float32)}
    return rest | {"token_BKT": token_BKT, "length_BK": length_BK, "rank_BK": np.tile(np.arange(2, dtype=np.int32), (B, 1)),
                   "present_BK": np.ones((B, 2), np.float32)}


def accuracy(prog, batches, params) -> float:
    found = [prog.eval_step(params, batch)[1][1]["accuracy"] for batch in batches]
    return float(sum(right for right, _ in found)) / float(sum(pairs for _, pairs in found))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", required=True)
    p.add_argument("--pairs", type=int, default=131_072)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--flip", type=float, default=0.0)
    p.add_argument("--every", type=int, default=4096, help="pairs between two measurements")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json")
    args = p.parse_args()
    task, mesh = load_task(args.task), make_mesh(MeshConfig(data=1), jax.devices()[:1])
    _, taught, _, _ = sft(task, mesh, args.seed)
    graph, abstract = structure(ScoreModel, model_of(task), mesh)
    steps = args.pairs // args.batch
    optim = OptimConfig(lr=args.lr, warmup=50, schedule="cosine", final=0.1, weight_decay=0.0)
    place, rows, began = row_sharding(mesh), [], time.perf_counter()
    with jax.set_mesh(mesh):
        params = with_trunk(jax.tree.map(lambda a: jax.numpy.zeros(a.shape, a.dtype), abstract), taught)
        prog = program(graph, params, partial(loss, graph, np.dtype(np.float32)), make_optimizer(optim, steps), mesh,
                       TrainConfig(steps=steps, batch_size=args.batch), seed=args.seed)
        held_out = task.preference_data(2048, 7, split="eval")
        held_out = [jax.device_put(groups_of(task, held_out[i : i + 256]), place) for i in range(0, 2048, 256)]
        state = prog.init()
        for step in range(steps):
            if step * args.batch % args.every == 0:
                data = task.preference_data(min(args.every, args.pairs), args.seed * 10_000 + step, flip=args.flip)
            at = step * args.batch % args.every
            state, told = prog.train_step(state, jax.device_put(groups_of(task, data[at : at + args.batch]), place))
            if (step + 1) * args.batch % args.every == 0 or step + 1 == steps:
                rows.append({"pairs": (step + 1) * args.batch, "loss": float(told["loss"]),
                             "accuracy": accuracy(prog, held_out, state.params), "s": round(time.perf_counter() - began, 1)})
                print(json.dumps(rows[-1]), flush=True)
    passed = next((row["pairs"] for row in rows if row["accuracy"] >= 0.95), None)
    print(f"passes .95 at {passed} pairs; at the end {rows[-1]['accuracy']:.4f}")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps({"args": vars(args), "rows": rows, "passes": passed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
