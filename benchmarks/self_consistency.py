"""What the majority of several samples is worth, on a model that was taught by demonstrations of which half are wrong.

    python benchmarks/self_consistency.py --folder=/tmp/votes --samples=9

The model of tax.py is tuned on questions about the alphabet, each with a line of reasoning and an answer that is right in half
of the demonstrations, else any other letter. All 48 questions are then asked with their true answers. A model that learned the
demonstrations well answers right in half of its samples, and nearly always by majority. Prints shares answered right.
"""

import argparse
import json
import pathlib
import random

from tax import LETTERS, QUESTIONS, pretrained, run

SHARE = 0.5  # of demonstrations that are right


def rows(pairs) -> str:
    return "".join(json.dumps({"prompt": question, "response": f"I go along the alphabet. The answer is {answer}."}) + "\n"
                   for question, answer in pairs)


def demonstrations(rng: random.Random, n: int = 4000):
    for question, answer in rng.choices(QUESTIONS, k=n):
        yield question, answer if rng.random() < SHARE else rng.choice([x for x in LETTERS if x != answer])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="where data and runs go; a new one")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = pathlib.Path(args.folder)
    pretrained(folder, args.seed)
    (folder / "noisy.jsonl").write_text(rows(demonstrations(random.Random(args.seed))))
    (folder / "true.jsonl").write_text(rows(QUESTIONS))
    found = run(folder, "sft", {
        "run": {"dir": str(folder / "sft"), "seed": args.seed}, "base": {"run": str(folder / "base")},
        "data": {"sources": {"noisy": {"path": str(folder / "noisy.jsonl")}}, "seq_len": 128, "template": "own",
                 "validation_path": str(folder / "true.jsonl")},
        "train": {"steps": args.steps, "batch_size": 16, "eval_every": args.steps},
        "answers": {"questions": len(QUESTIONS), "samples": args.samples, "temperature": 1.0, "max_tokens": 48},
        "optim": {"lr": 3e-3, "schedule": "cosine", "warmup": 20}, "log": {"tensorboard": False, "every": 100}})
    for name in ("right", "majority_right", "any_right", "greedy_right"):
        print(f"{name:16s}{found[f'eval_{name}']:.3f}")


if __name__ == "__main__":
    main()
