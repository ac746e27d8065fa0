"""Greedy decoding against Hugging Face `generate` on the same weights, each in its own process, run in turn.

    python benchmarks/decode.py --batch=1,16 --new=128

needs torch and transformers beside jaxllm. Prompts have 16 to 64 tokens, the model is that of cpu_train.py. Prints tokens
per second of both, by best and by median, the ratio, and how many of the tokens are the same.
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

L, D, N, F, V, LONGEST = 6, 384, 6, 1024, 8192, 1024
H = D // N


def prompts(batch: int) -> list[list[int]]:
    rng = np.random.default_rng(batch)
    lengths = np.linspace(16, 64, batch).astype(int) if batch > 1 else [48]
    return [rng.integers(16, V, n).tolist() for n in lengths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1,16", help="batch sizes, with commas")
    parser.add_argument("--new", type=int, default=128, help="tokens written for each prompt")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side, in turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's threads")
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve({"ours": ours, "theirs": theirs}[args.side](args), args)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.weights = str(pathlib.Path(folder) / "weights.npz")
        np.savez(args.weights, **weights())
        sides = {side: Side(side, args) for side in ("ours", "theirs")}
        for batch in map(int, args.batch.split(",")):
            compare(sides, batch, args)
        for side in sides.values():
            side.close()


def compare(sides: dict, batch: int, args) -> None:
    first = {name: side.ask(batch) for name, side in sides.items()}  # compiles and warms up
    seconds = {name: [] for name in sides}
    load = os.getloadavg()[0]
    for _ in range(args.rounds):
        for name, side in sides.items():
            seconds[name].append(side.ask(batch)["seconds"])
    for name, all_runs in seconds.items():
        rate = batch * args.new / np.array(all_runs)
        print(f"batch {batch:3d}  {name:7s} best {rate.max():8.1f}  median {np.median(rate):8.1f} tok/s")
    ratio = min(seconds["theirs"]) / min(seconds["ours"]), statistics.median(
        t / o for t, o in zip(seconds["theirs"], seconds["ours"], strict=True))
    same = np.mean(np.array(first["ours"]["tokens"]) == np.array(first["theirs"]["tokens"]))
    print(f"batch {batch:3d}  ratio   best {ratio[0]:8.2f}  median {ratio[1]:8.2f}        {same:.1%} of tokens the same, "
          f"load {load:.1f}", flush=True)


class Side:
    """A process that decodes when asked."""

    def __init__(self, name: str, args):
        self.process = subprocess.Popen(
            [sys.executable, __file__, f"--side={name}", f"--weights={args.weights}", f"--new={args.new}",
             f"--threads={args.threads}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, batch: int) -> dict:
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        while (line := self.process.stdout.readline()) and not line.startswith("{"):
            pass
        if not line:
            sys.exit(f"a side ended with code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(write, args) -> None:
    for line in sys.stdin:
        batch = prompts(int(line))
        began = time.perf_counter()
        tokens = write(batch)
        seconds = time.perf_counter() - began
        assert all(len(row) == args.new for row in tokens)
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


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


def ours(args):
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxllm.data.tokenizer import ByteTokenizer
    from jaxllm.generate.config import SampleConfig
    from jaxllm.generate.engine import Engine
    from jaxllm.mesh import MeshConfig
    from jaxllm.model.config import ModelConfig
    from jaxllm.model.formulation import for_platform
    from jaxllm.model.heads import LanguageModel
    from jaxllm.partition import make_mesh

    class Ids(ByteTokenizer):
        """All ids are tokens and none ends the text."""

        vocab_size, eos_id = V, -1

        def decode(self, ids, *, final=True):
            return ""

    cfg = ModelConfig(d_model=D, n_layers=L, n_heads=N, d_ff=F, vocab_size=V, max_seq_len=LONGEST)
    model = LanguageModel(cfg, for_platform("cpu"), rngs=nnx.Rngs(0))
    w = {k: jnp.asarray(v) for k, v in np.load(args.weights).items()}
    blocks = model.trunk.blocks_L
    for param, name in ((model.trunk.embed_VD, "embed"), (model.out_DV, "out"), (blocks.attn.qkv_DKGH, "qkv"),
                        (blocks.attn.out_NHD, "proj"), (blocks.mlp.gate_DF, "gate"), (blocks.mlp.up_DF, "up"),
                        (blocks.mlp.down_FD, "down")):
        assert param[...].shape == w[name].shape, name
        param[...] = w[name]
    engine = Engine(*nnx.split(model), cfg, Ids(), make_mesh(MeshConfig(), jax.devices()[:1]))
    how = SampleConfig(max_tokens=args.new, temperature=0.0)
    return lambda batch: [one.tokens for one in engine.generate(batch, how)]


def theirs(args):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(args.threads)
    cfg = LlamaConfig(vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N,
                      max_position_embeddings=LONGEST, rms_norm_eps=1e-6, tie_word_embeddings=False,
                      eos_token_id=None, bos_token_id=None, pad_token_id=0)
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

    def write(batch):
        T = max(map(len, batch))
        tokens = torch.tensor([[0] * (T - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in batch])
        with torch.inference_mode():
            out = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=args.new, use_cache=True)
        return out[:, T:].tolist()

    return write


if __name__ == "__main__":
    main()
