"""Training steps on a CPU: jaxllm against torch (eager and compiled) and Hugging Face, each in its own process, run in turn.

    python benchmarks/cpu_train.py --rounds=6 --steps=3

needs torch and transformers beside jaxllm. A step is forward, next-token loss, backward, clipping to norm 1 and AdamW, in
float32, on 8 rows of 512 tokens of a 6-layer Llama of width 384. Prints tokens per second, by best and by median step, the
ratios to jaxllm, and the share of the machine's best matmul rate that the model's arithmetic reaches.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

L, D, N, F, V, B, T = 6, 384, 6, 1024, 8192, 8, 512
H = D // N
LR, BETAS, DECAY = 3e-4, (0.9, 0.95), 0.1
# 6 a matmul weight and token; the scores and the weighted values of attention count the positions that a query may see
FLOPS = 6 * B * T * (L * (4 * D * D + 3 * D * F) + D * V) + 3 * L * B * 4 * T * T * D // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="turns of each side")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a turn")
    parser.add_argument("--sides", default=",".join(SIDES), help="which to run, with commas; the first is the baseline")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve(*SIDES[args.side]())
        return
    sides = {name: Side(name) for name in args.sides.split(",")}
    seconds = {name: [] for name in sides}
    peaks = {name: side.ask(1)["rate"] for name, side in sides.items()}  # compiles and warms up
    losses, load = {}, os.getloadavg()[0]
    for _ in range(args.rounds):
        for name, side in sides.items():
            answer = side.ask(args.steps)
            seconds[name] += answer["seconds"]
            losses[name], peaks[name] = answer["losses"][-1], max(peaks[name], answer["rate"])
    peak, first = max(peaks.values()), seconds[next(iter(sides))]
    for name, all_steps in seconds.items():
        best, median = min(all_steps), statistics.median(all_steps)
        print(f"{name:15s} best {B * T / best:6.0f}  median {B * T / median:6.0f} tok/s   time over {next(iter(sides))}'s: "
              f"best {best / min(first):5.2f}  median {median / statistics.median(first):5.2f}   "
              f"{FLOPS / best / peak:4.0%} of peak   loss {losses[name]:.3f}")
    print("best matmul, GFLOP/s: " + ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in peaks.items())
          + f"; a step has {FLOPS / 1e9:.0f} GFLOP; load before {load:.1f}, after {os.getloadavg()[0]:.1f}")
    for side in sides.values():
        side.close()


class Side:
    """A process that trains when asked, so that thread pools and allocators do not meet."""

    def __init__(self, name: str):
        self.name = name
        self.process = subprocess.Popen([sys.executable, __file__, f"--side={name}"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)

    def ask(self, steps: int) -> dict:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        while (line := self.process.stdout.readline()) and not line.startswith("{"):
            pass
        if not line:
            sys.exit(f"{self.name} ended with code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(step, matmul) -> None:
    """Answers each line, a number of steps, with their seconds and losses and the best rate of a large matmul."""

    def timed(what):
        began = time.perf_counter()
        return what(), time.perf_counter() - began

    for line in sys.stdin:
        step()  # not timed: while a process waits for its turn, the system may take its caches and idle pages
        losses, seconds = zip(*(timed(step) for _ in range(int(line))), strict=True)
        rate = max(2 * 2048**3 / timed(matmul)[1] for _ in range(8))
        print(json.dumps({"seconds": seconds, "losses": losses, "rate": rate}), flush=True)


def ours():
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    from jaxllm.platform import use_huge_pages

    use_huge_pages()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxllm.mesh import MeshConfig
    from jaxllm.model.config import ModelConfig
    from jaxllm.partition import make_mesh
    from jaxllm.train.config import OptimConfig, TrainConfig
    from jaxllm.train.optim import make_optimizer
    from jaxllm.train.state import build

    model = ModelConfig(d_model=D, n_layers=L, n_heads=N, d_ff=F, vocab_size=V, max_seq_len=T)
    optim = OptimConfig(lr=LR, b1=BETAS[0], b2=BETAS[1], weight_decay=DECAY, clip=1.0, schedule="constant")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    token_BT = np.random.default_rng(0).integers(0, V, (B, T + 1), dtype=np.int32)
    everywhere = np.ones((B, T), np.int32)
    batch = {"token_BT": token_BT[:, :-1], "target_BT": token_BT[:, 1:], "weight_BT": everywhere.astype(np.float32),
             "pos_BT": np.arange(T, dtype=np.int32)[None] * everywhere, "doc_BT": everywhere}
    square = jnp.ones((2048, 2048))
    multiply = jax.jit(jnp.dot)
    with jax.set_mesh(mesh):
        program = build(model, TrainConfig(batch_size=B), make_optimizer(optim, 1000), mesh)
        state = program.init()

    def step():
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = program.train_step(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step, lambda: multiply(square, square).block_until_ready()


def torch_step(model, loss):
    """Returns a training step of `model`, and the matmul, on all cores."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)
    square = torch.ones(2048, 2048)

    def step():
        total = loss()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total.item()

    return step, lambda: square.matmul(square)


def torch_tokens():
    import torch

    return torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(0))


def torch_eager():
    import torch

    torch.manual_seed(0)
    model, token_BT = torch_model(), torch_tokens()
    x_BT, target_BT = token_BT[:, :-1].contiguous(), token_BT[:, 1:].contiguous()
    return torch_step(model, lambda: model(x_BT, target_BT))


def torch_compiled():
    import torch

    torch.manual_seed(0)
    model, token_BT = torch_model(), torch_tokens()
    x_BT, target_BT = token_BT[:, :-1].contiguous(), token_BT[:, 1:].contiguous()
    compiled = torch.compile(model)
    return torch_step(model, lambda: compiled(x_BT, target_BT))


def hugging_face():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N, num_key_value_heads=N,
        max_position_embeddings=T, rms_norm_eps=1e-6, tie_word_embeddings=False, use_cache=False,
        attn_implementation="sdpa"))
    token_BT = torch_tokens()[:, :-1].contiguous()
    return torch_step(model, lambda: model(input_ids=token_BT, labels=token_BT).loss)


def torch_model():
    """Returns the same model by hand: fused projections, scaled_dot_product_attention, cross_entropy."""
    import torch
    from torch import nn

    def linear(n_in, n_out):
        return nn.Linear(n_in, n_out, bias=False)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn_norm, self.mlp_norm = nn.RMSNorm(D, eps=1e-6), nn.RMSNorm(D, eps=1e-6)
            self.qkv, self.out, self.gate_up, self.down = linear(D, 3 * D), linear(D, D), linear(D, 2 * F), linear(F, D)

        def forward(self, x_BTD, cos_TH, sin_TH):
            def rotate(x_BNTH):
                a, b = x_BNTH.chunk(2, -1)
                return torch.cat([a * cos_TH - b * sin_TH, b * cos_TH + a * sin_TH], -1)

            q, k, v = self.qkv(self.attn_norm(x_BTD)).view(B, T, 3, N, H).permute(2, 0, 3, 1, 4).unbind(0)
            o_BNTH = nn.functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x_BTD = x_BTD + self.out(o_BNTH.transpose(1, 2).reshape(B, T, D))
            gate, up = self.gate_up(self.mlp_norm(x_BTD)).chunk(2, -1)
            return x_BTD + self.down(nn.functional.silu(gate) * up)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head, self.norm = nn.Embedding(V, D), linear(D, V), nn.RMSNorm(D, eps=1e-6)
            self.blocks = nn.ModuleList(Block() for _ in range(L))
            angle_TH = torch.arange(T)[:, None] * 10_000.0 ** -(torch.arange(H // 2) / (H // 2))
            self.register_buffer("cos_TH", angle_TH.cos())
            self.register_buffer("sin_TH", angle_TH.sin())
            for weight in self.parameters():
                if weight.ndim == 2:
                    nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

        def forward(self, token_BT, target_BT):
            x_BTD = self.embed(token_BT)
            for block in self.blocks:
                x_BTD = block(x_BTD, self.cos_TH, self.sin_TH)
            return nn.functional.cross_entropy(self.head(self.norm(x_BTD)).view(-1, V), target_BT.reshape(-1))

    return Model()


SIDES = {"jaxllm": ours, "torch compiled": torch_compiled, "torch eager": torch_eager, "hugging face": hugging_face}

if __name__ == "__main__":
    main()
