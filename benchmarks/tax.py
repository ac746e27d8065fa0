"""The alignment tax with and without pretraining gradients (ptx), on a model that is pretrained here in a minute.

    python benchmarks/tax.py --folder=/tmp/tax --coefs=0,1

The text holds questions about the alphabet among random words, so that a model of 0.14 M parameters learns to answer them at
any number of exemplars. GRPO then teaches it to write responses of twelve tokens to prompts of words, a reward that has nothing
to do with the questions. Prints what each run did to the reward, the held-out text and the few-shot tasks.
"""

import argparse
import json
import os
import pathlib
import random
import string
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
WORDS = ("the", "of", "and", "a", "to", "in", "he", "she", "it", "was", "for", "on", "with", "his", "her", "they", "at", "be")
LETTERS = string.ascii_lowercase
QUESTIONS = [pair for i in range(1, 25) for pair in ((f"what follows {LETTERS[i]}?", LETTERS[i + 1]),
                                                     (f"what is before {LETTERS[i]}?", LETTERS[i - 1]))]


def write_data(folder: pathlib.Path) -> None:
    rng, rows = random.Random(0), {"text": [], "quiz": [], "choices": [], "prompts": []}
    for _ in range(3000):
        asked = [f"Question: {question}\nAnswer: {answer}" for question, answer in rng.choices(QUESTIONS, k=rng.randint(1, 4))]
        rows["text"].append({"text": "\n\n".join([*asked, " ".join(rng.choices(WORDS, k=rng.randrange(3, 10)))])})
    for question, answer in QUESTIONS:
        choices = rng.sample([answer, *rng.sample([x for x in LETTERS if x != answer], 3)], 4)
        rows["quiz"].append({"question": question, "answer": answer})
        rows["choices"].append({"question": question, "answer": answer, "choices": choices})
    rows["prompts"] = [{"prompt": " ".join(rng.choices(WORDS, k=3))} for _ in range(200)]
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(folder: pathlib.Path, verb: str, tree: dict) -> dict:
    """Returns what a verb says at its end; its progress goes to a file beside the run."""
    name = pathlib.Path(tree["run"]["dir"]).name
    (folder / f"{name}.yaml").write_text(json.dumps(tree))  # JSON is YAML
    command = [sys.executable, "-m", "jaxllm", verb, str(folder / f"{name}.yaml"), f"--json={folder / name}.json"]
    with (folder / f"{name}.log").open("w") as log:
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log, check=False)
    if done.returncode:
        sys.exit(f"{verb} ended with code {done.returncode}; see {folder / name}.log")
    return json.loads((folder / f"{name}.json").read_text())


def pretrained(folder: pathlib.Path, seed: int) -> None:
    """Writes the data into a new folder, and pretrains on it a model of 0.14 M parameters into `base`."""
    folder.mkdir(parents=True)
    write_data(folder)
    run(folder, "pretrain", {
        "run": {"dir": str(folder / "base"), "seed": seed},
        "model": {"d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 192, "max_seq_len": 256},
        "data": {"sources": {"t": {"path": str(folder / "text.jsonl")}}, "seq_len": 128, "validation": 0.05,
                 "cache": str(folder / "cache"), "workers": 1},
        "train": {"steps": 700, "batch_size": 16, "eval_every": 700, "sample_every": 0},
        "log": {"tensorboard": False, "every": 100}, "optim": {"lr": 3e-3, "schedule": "cosine", "warmup": 50},
        "checkpoint": {"every": 700}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="where data and runs go; a new one")
    parser.add_argument("--coefs", default="0,1", help="values of ptx.coef")
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = pathlib.Path(args.folder)
    sources = {"t": {"path": str(folder / "text.jsonl")}}
    pretrained(folder, args.seed)
    found = {}
    for coef in map(float, args.coefs.split(",")):
        found[coef] = run(folder, "rlhf", {
            "run": {"dir": str(folder / f"ptx-{coef:g}"), "seed": args.seed}, "base": {"run": str(folder / "base")},
            "algorithm": "grpo", "data": {"seq_len": 128}, "kl": {"coef": 0.0},
            "rollout": {"prompts": 16, "samples": 4, "response_len": 16},
            "prompts": {"sources": {"p": {"path": str(folder / "prompts.jsonl")}}, "prompt_len": 24, "validation": 0.2},
            "rewards": {"short": {"kind": "length", "unit": "tokens", "target": 12, "soft": 12}},
            "ptx": {"coef": coef, "examples": 0.5, "eval_rows": 64, "validation": 0.05, "sources": sources},
            "tax": {"quiz": {"path": str(folder / "quiz.jsonl"), "shots": [0, 1, 4], "answer_len": 4},
                    "choices": {"path": str(folder / "choices.jsonl"), "shots": [0, 4]}},
            "train": {"iterations": args.iterations, "eval_every": args.iterations, "eval_prompts": 40, "sample_every": 0},
            "optim": {"lr": args.lr, "schedule": "constant"}, "log": {"tensorboard": False}})["before_after"]
    names = ["eval_score", "eval_text_loss", *(name for name in next(iter(found.values())) if name.endswith("shot"))]
    print("| | before | " + " | ".join(f"ptx.coef {coef:g}" for coef in found) + " |\n|" + " --- |" * (2 + len(found)))
    for name in names:
        after = " | ".join(f"{pairs[name][1]:.3f}" for pairs in found.values())
        print(f"| {name.removeprefix('eval_')} | {next(iter(found.values()))[name][0]:.3f} | {after} |")


if __name__ == "__main__":
    main()
