"""What meeting rarely costs: held-out bits per byte after the same tokens, synchronous against local SGD and DiLoCo.

    python benchmarks/sync_quality.py --text=runs/demo-text/kjv.jsonl --steps=300

A byte model of 0.5 M parameters on 4 emulated devices, 4 groups of 8 rows, AdamW. Prints the last held-out figure of each
run and its distance to synchronous training. Besides, one group's share of the batch is trained alone: what groups have to
beat. `--only=diloco` runs those whose name holds the word, beside synchronous training.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
RUNS = {
    "every step": [],
    "local_sgd, 10": ["--train.sync=local_sgd", "--train.inner_steps=10"],
    "local_sgd, 50": ["--train.sync=local_sgd", "--train.inner_steps=50"],
    "local_sgd, 10, staleness 1": ["--train.sync=local_sgd", "--train.inner_steps=10", "--train.staleness=1"],
    "diloco, 10": ["--train.sync=diloco", "--train.inner_steps=10"],
    "diloco, 50": ["--train.sync=diloco", "--train.inner_steps=50"],
    "diloco, 10, outer_momentum 0.9": ["--train.sync=diloco", "--train.inner_steps=10", "--train.outer_momentum=0.9"],
    "diloco, 10, staleness 1": ["--train.sync=diloco", "--train.inner_steps=10", "--train.staleness=1"],
    "diloco, 10, streaming": ["--train.sync=diloco", "--train.inner_steps=10", "--train.fragments=2", "--train.overlap=2"],
    "diloco, 10, streaming, mixing 0.5": ["--train.sync=diloco", "--train.inner_steps=10", "--train.fragments=2",
                                          "--train.overlap=2", "--train.mixing=0.5"],
}
MODEL = ["--model.d_model=128", "--model.n_layers=2", "--model.n_heads=4", "--model.max_seq_len=256", "--data.seq_len=256"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="real text: a file that jaxllm reads")
    parser.add_argument("--steps", type=int, default=300, help="a multiple of 50")
    parser.add_argument("--only", default="", help="a word in the names of the runs to do")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, words in RUNS.items():
            if args.only not in name and words:
                continue
            found[name] = bits_per_byte(pathlib.Path(folder) / name.replace(", ", "-").replace(" ", "-"), args, words, groups=4)
            print(f"{name:<34} {found[name]:.4f} bits per byte, {found[name] / found['every step'] - 1:+.1%}", flush=True)
        alone = bits_per_byte(pathlib.Path(folder) / "alone", args, [], rows=8)
        print(f"{'one group':<34} {alone:.4f} bits per byte, {alone / found['every step'] - 1:+.1%} (a quarter of the tokens)")


def bits_per_byte(folder: pathlib.Path, args, words: list[str], rows: int = 32, groups: int = 1) -> float:
    """Returns the held-out figure at the end of a run."""
    if words:
        words = [*words, f"--train.groups={groups}"]
    command = [sys.executable, "-m", "jaxllm", "pretrain", str(ROOT / "configs/pretrain/tiny.yaml"), f"--run.dir={folder}",
               f"--data.sources.text.path={args.text}", "--data.tokenizer=bytes", *MODEL, f"--train.steps={args.steps}",
               f"--train.batch_size={rows}", "--train.eval_every=1000000", "--train.eval_rows=128", "--train.sample_every=0",
               "--optim.lr=2e-3", "--optim.warmup=50", "--log.tensorboard=false", f"--json={folder}.json", *words]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu",
                        "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(pathlib.Path(f"{folder}.json").read_text(encoding="utf-8"))["eval_bits_per_byte"]


if __name__ == "__main__":
    main()
