"""RLHF on "noisy addition with a chain of thought": sample efficiency, final accuracy, distance from the reference, speed.

    python benchmarks/nac.py --task=PATH/nac_task.py --algorithm=ppo,grpo --seeds=3 [--json=FILE]

The task file tells the model's size, demonstrations, the reward and its oracles: a perfect fit to the demonstrations scores P0
when sampled, and a policy of score r is at least frontier_kl(r) nats a response away from it. Settings are those of the
benchmark as published with the task; `--beta` sets the KL penalty, and the optimum of the penalised objective is told beside
(--lam=1 --iterations=100 to reach it: the critic is too poor for lambda 0.95, docs/LOG.md).
"""

import argparse
import importlib.util
import json
import math
import pathlib
import tempfile
import time

import jax
import numpy as np

from jaxllm.align.algorithms import algorithm
from jaxllm.align.rewards import Scored
from jaxllm.align.rl_program import build as build_rl
from jaxllm.align.rlhf import Loop, train
from jaxllm.align.rlhf_config import KLConfig, PPOConfig, RLDataConfig, RLHFConfig, RLTrainConfig, RolloutConfig
from jaxllm.align.update import Models, Reading
from jaxllm.data.preference_config import PromptData
from jaxllm.data.prompts import Prompt
from jaxllm.generate.config import SampleConfig
from jaxllm.generate.continuous import Sampler
from jaxllm.mesh import MeshConfig
from jaxllm.model.config import ModelConfig
from jaxllm.model.heads import ScoreModel
from jaxllm.partition import batch_sharding, make_mesh
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.config import CheckpointConfig, OptimConfig, RunConfig, TrainConfig
from jaxllm.train.log import RunLog
from jaxllm.train.optim import make_optimizer
from jaxllm.train.state import build, structure

SFT_STEPS, T = 1000, 30


def load_task(path: str):
    found = importlib.util.spec_from_file_location("nac_task", path)
    task = importlib.util.module_from_spec(found)
    found.loader.exec_module(task)
    return task


def model_of(task) -> ModelConfig:
    m = task.MODEL
    return ModelConfig(d_model=m["d_model"], n_layers=m["layers"], n_heads=m["heads"], n_kv_heads=m["kv_heads"], d_ff=m["d_ff"],
                       vocab_size=task.VOCAB, max_seq_len=m["max_len"], rope_theta=m["rope_theta"], norm_eps=m["norm_eps"])


def rows_of(task, pairs) -> dict[str, np.ndarray]:
    """Returns demonstrations as rows, the loss on the response alone."""
    token_BS = np.full((len(pairs), T + 1), task.PAD, np.int32)
    weight_BT, real_BT = np.zeros((len(pairs), T), np.float32), np.zeros((len(pairs), T), bool)
    for i, (prompt, response) in enumerate(pairs):
        ids = prompt + response
        token_BS[i, : len(ids)] = ids
        weight_BT[i, len(prompt) - 1 : len(ids) - 1], real_BT[i, : len(ids)] = 1, True
    pos_BT = np.where(real_BT, np.arange(T)[None], 0).astype(np.int32)
    return {"token_BT": token_BS[:, :-1], "target_BT": token_BS[:, 1:], "pos_BT": pos_BT, "doc_BT": real_BT.astype(np.int32),
            "weight_BT": weight_BT}


def sft(task, mesh, seed: int):
    """Returns (graph, parameters, held-out loss in nats a token, seconds)."""
    optim = OptimConfig(lr=3e-3, warmup=50, schedule="cosine", final=0.1, weight_decay=0.0)
    cfg = TrainConfig(steps=SFT_STEPS, batch_size=64)
    program = build(model_of(task), cfg, make_optimizer(optim, SFT_STEPS), mesh, seed=seed)
    place, began = batch_sharding(mesh), time.perf_counter()
    with jax.set_mesh(mesh):
        state = program.init()
        for step in range(SFT_STEPS):
            state, _ = program.train_step(state, jax.device_put(rows_of(task, task.sft_batch(step, seed)), place))
        jax.block_until_ready(state.params)
        took, total, count = time.perf_counter() - began, 0.0, 0.0
        for i in range(40):  # fresh demonstrations
            loss, n = program.eval_step(state.params, jax.device_put(rows_of(task, task.sft_batch(10**6 + i, seed)), place))
            total, count = total + float(loss), count + float(n)
    return program.graph, state.params, total / count, took


def settings(task, args, seed: int, folder: str) -> RLHFConfig:
    ppo = args.algorithm == "ppo"
    n = (256, 1) if ppo else (32, 8)
    iterations = args.iterations or (40 if ppo else 60)
    beta = 0.05 if args.beta is None else args.beta
    return RLHFConfig(
        run=RunConfig(dir=folder, seed=seed), algorithm=args.algorithm, data=RLDataConfig(tokenizer="nac", seq_len=64),
        prompts=PromptData(prompt_len=task.PROMPT_LEN),
        rollout=RolloutConfig(prompts=n[0], samples=n[1], response_len=task.MAX_NEW), kl=KLConfig(coef=beta),
        ppo=PPOConfig(value_coef=0.1, lam=args.lam),
        train=RLTrainConfig(iterations=iterations, epochs=2 if ppo else 1, minibatches=4 if ppo else 1, eval_every=0,
                            sample_every=0),
        optim=OptimConfig(lr=args.lr or (3e-4 if ppo else 1e-3), eps=1e-5, b2=0.999, weight_decay=0.0,
                          schedule=args.schedule, final=0.0, clip=1.0),
        checkpoint=CheckpointConfig(every=10**6))


def run(task, mesh, graph, reference, args, seed: int, folder: str) -> dict:
    cfg = settings(task, args, seed, folder)
    reading = Reading(np.dtype(np.float32), task.PROMPT_LEN, task.VOCAB, 1.0, 128)
    n_updates = cfg.train.iterations * cfg.train.epochs * cfg.train.minibatches
    start, optimizers = {"policy": reference}, {"policy": make_optimizer(cfg.optim, n_updates)}
    critic_graph = None
    if args.algorithm == "ppo":
        critic_graph, abstract = structure(ScoreModel, model_of(task), mesh)
        start["critic"] = jax.tree.map(lambda a: jax.numpy.zeros(a.shape, a.dtype), abstract)  # a head of zeros
        start["critic"]["trunk"] = reference["trunk"]
        optimizers["critic"] = make_optimizer(cfg.optim, n_updates)
    program = build_rl(cfg, Models(graph, critic_graph), start, reading, algorithm(cfg), optimizers, mesh)
    sampler = Sampler(graph, model_of(task), mesh, eos_id=task.EOS, pad_id=task.PAD, vocab_size=task.VOCAB)
    stream = [Prompt(f"{a}+{b}=", task.prompt_ids(a, b), {"a": a, "b": b}) for a, b in task.rl_prompts(seed)]

    def score(samples):
        return Scored(np.array([task.reward(s.row["a"], s.row["b"], s.tokens) for s in samples], np.float32), {}, [])

    n = cfg.rollout.prompts
    if cfg.train.iterations * n > len(stream):
        raise SystemExit(f"--iterations={cfg.train.iterations}: the task has prompts for {len(stream) // n}")
    with jax.set_mesh(mesh), Checkpoints(folder, cfg.checkpoint) as checkpoints, \
            RunLog(pathlib.Path(folder), steps=cfg.train.iterations, start=0, tensorboard=False) as log:
        loop = Loop(cfg=cfg, program=program, sampler=sampler, reference=reference, prompts=lambda i: stream[i * n : i * n + n],
                    held_out=[], shown=[], decode=task.decode, score=score, made_of={}, checkpoints=checkpoints, log=log)
        state = train(loop, program.init(), 0)
        lines = [json.loads(line) for line in pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()]
        found = held_out(task, sampler, program, state.params, reference, graph, reading, mesh)
    reached = {}
    for bar in (0.8, 0.9):
        mean = [np.mean([x["score"] for x in lines[max(i - 2, 0) : i + 1]]) for i in range(len(lines))]
        reached[f"tokens_to_{bar}"] = next((x["tokens"] for x, m in zip(lines, mean, strict=True) if m >= bar), None)
    later = lines[min(5, len(lines) - 1):]
    return found | reached | {
        "tokens": lines[-1]["tokens"], "iteration_s": float(np.median([x["step_s"] for x in later])),
        "first_iteration_s": lines[0]["step_s"],
        "rollout_tokens_per_s": float(np.median([x["rollout_tokens_per_s"] for x in later])),
        "update_tokens_per_s": float(np.median([x["response_tokens"] * n * cfg.rollout.samples * cfg.train.epochs
                                                / x["update_s"]
                                                for x in later])),
        "gap": max(x["sampler_gap"] for x in lines)}


def held_out(task, sampler, program, params, reference, graph, reading, mesh, repeats: int = 2) -> dict:
    """Returns score, greedy score, end-token share and KL to the reference over the evaluation prompts."""
    prompts = [task.prompt_ids(a, b) for a, b in task.pairs()[0]]
    sampler.load(params)
    common = dict(n=1, prompt_slots=task.PROMPT_LEN, response_slots=task.MAX_NEW)

    def scores(rollout):
        return np.mean([task.reward(a, b, rollout.response(i)) for i, (a, b) in enumerate(task.pairs()[0])])

    greedy = sampler.sample(prompts, cfg=SampleConfig(max_tokens=task.MAX_NEW, temperature=0.0), seeds=np.zeros(1000), **common)
    found, kls, ended = [], [], []
    for i in range(repeats):
        rollout = sampler.sample(prompts, cfg=SampleConfig(max_tokens=task.MAX_NEW, temperature=1.0),
                                 seeds=np.arange(1000) + 10_000 * (i + 1), **common)
        found.append(scores(rollout))
        ended.append(rollout.ended_B.mean())
        sampler.load(reference)
        kls.append(np.mean(np.sum((rollout.logp_BR - sampler.score(rollout)) * rollout.action_BR, axis=1)))
        sampler.load(params)
    r, kl = float(np.mean(found)), float(np.mean(kls))
    least = task.frontier_kl(min(max(r, task.P0), 1.0))
    return {"score": r, "greedy": float(scores(greedy)), "kl": kl, "kl_over_frontier": kl / least if least > 1e-3 else None,
            "ended": float(np.mean(ended))}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", required=True)
    p.add_argument("--algorithm", default="ppo,grpo", help="one or more, each from the same SFT model")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--first", type=int, default=0, help="the first seed")
    p.add_argument("--iterations", type=int)
    p.add_argument("--beta", type=float)
    p.add_argument("--lam", type=float, default=0.95, help="GAE's lambda; 1: advantages that no critic can bias")
    p.add_argument("--lr", type=float)
    p.add_argument("--schedule", default="linear", help="of the learning rate: linear (to 0), or constant")
    p.add_argument("--json")
    args = p.parse_args()
    task, mesh, results = load_task(args.task), make_mesh(MeshConfig(data=1), jax.devices()[:1]), []
    floor = task.entropy_floor()
    for seed in range(args.first, args.first + args.seeds):
        graph, reference, loss, took = sft(task, mesh, seed)
        for name in args.algorithm.split(","):
            with tempfile.TemporaryDirectory() as folder:
                one = argparse.Namespace(**vars(args) | {"algorithm": name})
                found = run(task, mesh, graph, reference, one, seed, folder)
            optimum = None
            if args.beta:  # of E[score] - beta KL: the reference's odds of a right answer times e^(1 / beta)
                gain = task.P0 * math.exp(1 / args.beta)
                optimum = gain / (gain + 1 - task.P0)
            results.append({"algorithm": name, "seed": seed, "sft_over_floor": loss / (floor[0] / floor[1]), "sft_s": took,
                            **found, "optimum": optimum})
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in results[-1].items()}), flush=True)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps({"args": vars(args), "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
