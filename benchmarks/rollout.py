"""Rollouts on a CPU: the sampler of RLHF, our engine of single texts, and Hugging Face `generate` (which TRL samples with).

    python benchmarks/rollout.py --prompts=32 --n=8 --new=32 --sides=sampler,engine,theirs

Each side has a process of its own and they run in turn, on the same weights: 1.06 M parameters, 4 layers of width 128, a
vocabulary of 32. `theirs` needs torch and transformers, in the Python that --python names. Prompts have 7 tokens. With
--ends a response ends at an end token, else all have the same length. Prints tokens written a second by best and median,
and by processor time, which other work on the machine changes less (for torch, with --threads=1).
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

L, D, N, F, V, LONGEST, EOS, PAD = 4, 128, 4, 512, 32, 128, 2, 0
H = D // N


def prompts(args) -> list[list[int]]:
    return np.random.default_rng(0).integers(3, V, (args.prompts, 7)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32, help="different prompts")
    parser.add_argument("--n", type=int, default=8, help="responses to each")
    parser.add_argument("--new", type=int, default=32, help="most tokens of a response")
    parser.add_argument("--ends", action="store_true", help="responses end at the end token")
    parser.add_argument("--rows", type=int, help="the sampler's rows; default: all at once")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side, in turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's threads")
    parser.add_argument("--sides", default="sampler,engine", help="of sampler, engine and theirs, with commas")
    parser.add_argument("--python", default=sys.executable, help="the Python that has torch and transformers")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve({"sampler": sampler, "engine": engine, "theirs": theirs}[args.side](args))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.weights = str(pathlib.Path(folder) / "weights.npz")
        np.savez(args.weights, **weights())
        sides = {name: Side(name, args) for name in args.sides.split(",")}
        runs = {name: [] for name in sides}
        for i in range(args.rounds + 1):
            for name, side in sides.items():
                found = side.ask(i)
                if i:  # the first compiles and warms up
                    runs[name].append(found)
        for side in sides.values():
            side.close()
    rates = {name: [tokens / seconds for tokens, seconds, _ in found] for name, found in runs.items()}
    for name, found in rates.items():
        print(f"{name:8s} best {max(found):9.0f}  median {statistics.median(found):9.0f} tok/s  "
              f"{max(tokens / busy for tokens, _, busy in runs[name]):.0f} a second of processor time  "
              f"{np.mean([tokens for tokens, *_ in runs[name]]):.0f} tokens a run")
    for name in list(rates)[1:]:
        ratio = statistics.median(a / b for a, b in zip(rates["sampler"], rates[name], strict=True))
        print(f"sampler against {name}: best {max(rates['sampler']) / max(rates[name]):.2f}, median {ratio:.2f}; "
              f"load {os.getloadavg()[0]:.1f}")


class Side:
    """A process that writes a rollout when asked, with a seed."""

    def __init__(self, name: str, args):
        values = ("weights", "prompts", "n", "new", "threads") + (("rows",) if args.rows else ())
        command = [args.python if name == "theirs" else sys.executable, __file__, f"--side={name}",
                   *(f"--{key}={getattr(args, key)}" for key in values), *(["--ends"] if args.ends else [])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, seed: int) -> tuple[int, float, float]:
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()
        while (line := self.process.stdout.readline()) and not line.startswith("["):
            pass
        if not line:
            sys.exit(f"a side ended with code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(write) -> None:
    for line in sys.stdin:
        began, busy = time.perf_counter(), time.process_time()
        tokens = int(write(int(line)))
        print(json.dumps([tokens, time.perf_counter() - began, time.process_time() - busy]), flush=True)


def weights() -> dict[str, np.ndarray]:
    """Returns the weights by our names."""
    rng = np.random.default_rng(0)

    def normal(*shape, fan_in):
        return rng.standard_normal(shape, dtype=np.float32) * fan_in**-0.5

    return {
        "embed": normal(V, D, fan_in=1), "out": normal(D, V, fan_in=D), "qkv": normal(L, D, N, 3, H, fan_in=D),
        "proj": normal(L, N, H, D, fan_in=D), "gate": normal(L, D, F, fan_in=D),
        "up": normal(L, D, F, fan_in=D), "down": normal(L, F, D, fan_in=F),
    }


def model(args):
    """Returns (graph, parameters, settings, mesh)."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxllm.mesh import MeshConfig
    from jaxllm.model.config import ModelConfig
    from jaxllm.model.formulation import for_platform
    from jaxllm.model.heads import LanguageModel
    from jaxllm.partition import make_mesh

    cfg = ModelConfig(d_model=D, n_layers=L, n_heads=N, d_ff=F, vocab_size=V, max_seq_len=LONGEST)
    model = LanguageModel(cfg, for_platform("cpu"), rngs=nnx.Rngs(0))
    w = {k: jnp.asarray(v) for k, v in np.load(args.weights).items()}
    blocks = model.trunk.blocks_L
    for param, name in ((model.trunk.embed_VD, "embed"), (model.out_DV, "out"), (blocks.attn.qkv_DKGH, "qkv"),
                        (blocks.attn.out_NHD, "proj"), (blocks.mlp.gate_DF, "gate"), (blocks.mlp.up_DF, "up"),
                        (blocks.mlp.down_FD, "down")):
        assert param[...].shape == w[name].shape, name
        param[...] = w[name]
    return *nnx.split(model), cfg, make_mesh(MeshConfig(), jax.devices()[:1])


def how(args):
    from jaxllm.generate.config import SampleConfig

    return SampleConfig(max_tokens=args.new, temperature=1.0)


def sampler(args):
    graph, params, cfg, mesh = model(args)
    from jaxllm.generate.continuous import Sampler

    one = Sampler(graph, cfg, mesh, eos_id=EOS if args.ends else -1, pad_id=PAD, vocab_size=V)
    one.load(params)
    B = args.prompts * args.n

    def write(seed):
        rollout = one.sample(prompts(args), n=args.n, cfg=how(args), seeds=np.arange(B, dtype=np.uint32) + seed * B,
                             rows=args.rows, prompt_slots=8, response_slots=args.new)
        return rollout.length_B.sum()

    return write


def engine(args):
    graph, params, cfg, mesh = model(args)
    from jaxllm.data.tokenizer import ByteTokenizer
    from jaxllm.generate.engine import Engine

    class Ids(ByteTokenizer):
        """All ids are tokens."""

        vocab_size, eos_id = V, EOS if args.ends else -1

        def decode(self, ids, *, final=True):
            return ""

    one = Engine(graph, params, cfg, Ids(), mesh)
    B = args.prompts * args.n
    rows = [p for p in prompts(args) for _ in range(args.n)]
    return lambda seed: sum(len(c.tokens) for c in one.generate(rows, how(args), range(seed * B, seed * B + B), logprobs=True))


def theirs(args):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(args.threads)
    cfg = LlamaConfig(vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N,
                      max_position_embeddings=LONGEST, rms_norm_eps=1e-6, tie_word_embeddings=False,
                      eos_token_id=EOS if args.ends else None, bos_token_id=None, pad_token_id=PAD)
    model = LlamaForCausalLM(cfg).eval()
    w = {k: torch.from_numpy(v) for k, v in np.load(args.weights).items()}
    named = {"model.embed_tokens.weight": w["embed"], "lm_head.weight": w["out"].T, "model.norm.weight": torch.ones(D)}
    for i in range(L):
        at = f"model.layers.{i}."
        for j, name in enumerate("qkv"):
            named[f"{at}self_attn.{name}_proj.weight"] = w["qkv"][i, :, :, j].reshape(D, D).T
        named[f"{at}self_attn.o_proj.weight"] = w["proj"][i].reshape(D, D).T
        named[f"{at}mlp.gate_proj.weight"], named[f"{at}mlp.up_proj.weight"] = w["gate"][i].T, w["up"][i].T
        named[f"{at}mlp.down_proj.weight"] = w["down"][i].T
        named[f"{at}input_layernorm.weight"] = named[f"{at}post_attention_layernorm.weight"] = torch.ones(D)
    model.load_state_dict({k: v.contiguous() for k, v in named.items()})
    tokens = torch.tensor(prompts(args)).repeat_interleave(args.n, dim=0)
    mask = torch.ones_like(tokens)

    def write(seed):
        torch.manual_seed(seed)
        with torch.inference_mode():
            out = model.generate(tokens, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                 max_new_tokens=args.new, use_cache=True)[:, tokens.shape[1]:]
        if not args.ends:
            return out.numel()
        ended = (out == EOS).int().cumsum(1) - (out == EOS).int()  # 0 up to the first end token
        return (ended == 0).sum()

    return write


if __name__ == "__main__":
    main()
