"""GRPO on "noisy addition with a chain of thought", ours beside TRL's: rollout and update tokens a second, iterations, start.

    python benchmarks/rlhf_trl.py --task=PATH/nac_task.py --python=VENV/bin/python [--json=FILE]

VENV has torch, transformers 5, trl, accelerate and datasets. The model is that of benchmarks/nac.py (1,057,920 parameters),
taught there by `sft`; TRL gets its weights as a Hugging Face Llama, whose log-probabilities are compared with ours before
anything is timed (and the character tokenizer's ids with the task's). Both sides: 32 prompts x 8 an iteration, the same
prompts in the same order, T = 1 from the whole distribution, at most 32 tokens, the task's reward, one step of Adam on all 256
responses (1e-3 in a line to 0, eps 1e-5, gradients clipped at 1), ratio clip 0.2, beta 0.05 with k3, float32. TRL: no gradient
checkpointing, no logging, no checkpoints, no bar; else its defaults. Ours writes its metrics each iteration and starts with
huge pages for malloc and a compilation cache, as `jaxllm rlhf` does.

Each side has a process of its own. They run in turn, a few iterations a round; a side that waits is stopped after an
optimizer step. What is timed, in one iteration:

- rollout. Ours: weights into the sampler, sampling with the log-probability of each token, arrays, texts. TRL:
  `GRPOTrainer._generate` (prompts' ids, `generate`, texts), which gives no log-probabilities: with one step a batch TRL needs
  none of its own policy.
- reward: scoring the 256 responses. Ours: the loop's `score`. TRL: `GRPOTrainer._calculate_rewards`.
- reference: log-probabilities under the reference, advantages. Ours: the loop's read_s. TRL: what is left of
  `GRPOTrainer._prepare_inputs` without the two above.
- update: forward, backward, clipping, optimizer. Ours: the loop's update_s. TRL: from the end of `_prepare_inputs`, which is
  the first thing in `training_step`, to the callback `on_step_end`, which follows the optimizer's step.

Tokens are those of the responses, end tokens included. An iteration's time is that from one optimizer step's end to the next,
so all between is in it. Start: from starting the process to the end of its first optimizer step, in processes of their own;
"cold" compiles everything, "warm" finds a compilation cache. Weights come from a file on both sides. Memory is the peak of the
process's resident set. Medians; ratios are above 1 where ours is better, with the smallest and largest of the rounds.

Times need a quiet machine: torch's threads wait for each other after every operation, so other work slows TRL far more than
its share. With --threads=1 nothing waits, and the processor time of an iteration is nearly free of what else runs. To give TRL
huge pages as well, start this with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment.
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

SIDES = pathlib.Path(__file__).with_name("rlhf_trl_sides.py")
PARTS = ("rollout", "reward", "reference", "update")
GOALS = {"rollout tokens/s": 3.0, "update tokens/s": 1.5, "seconds an iteration": 2.0}
UNCOUNTED = 5  # first iterations of each side, in which ours compiles a size it has not yet met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True)
    parser.add_argument("--python", default=sys.executable, help="the Python that has TRL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=10, help="of each side in a round")
    parser.add_argument("--starts", type=int, default=3, help="starts of each kind")
    parser.add_argument("--sft-steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="cores of either side")
    parser.add_argument("--json")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    with tempfile.TemporaryDirectory() as args.folder:
        loads = [os.getloadavg()[0]]
        told = {name: Side(name, args).report for name in ("teach", "export")}
        say(f"taught in {told['teach']['sft_s']:.0f} s")
        starts, cache = {"cold": [], "warm": [], "trl": []}, f"{args.folder}/cache-0"
        for i in range(args.starts):
            for kind in starts:
                cache = f"{args.folder}/cache-{i}"
                side = Side("trl" if kind == "trl" else "ours", args, cache)
                starts[kind].append({"seconds": side.started_in, **{k: side.report[k] for k in ("cpu_s", "peak_gb")}})
                side.close()
                say(f"start, {kind}: {side.started_in:.2f} s")
        sides = {name: Side(name, args, cache) for name in ("ours", "trl")}
        runs = {name: [] for name in sides}
        for i in range(args.rounds + 1):
            for name, side in list(sides.items())[:: 1 if i % 2 else -1]:  # first in every other round
                found = side.ask(args.iterations if i else UNCOUNTED - 1)
                if i:
                    runs[name].append(found["iterations"])
            loads.append(os.getloadavg()[0])
            say(f"round {i} of {args.rounds}")
        peaks = {name: side.report["peak_gb"] for name, side in sides.items()}
        for side in sides.values():
            side.close()
    table = compared(runs)
    show(table, starts, peaks, runs, told, loads)
    if args.json:
        found = {"args": vars(args), "told": told, "table": table, "starts": starts, "peak_gb": peaks, "load": loads,
                 "runs": runs}
        pathlib.Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


def say(text: str) -> None:
    print(f"{text}; load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)


class Side:
    """A process that does what it is named for and reports: at once after its first iteration, then whenever it is asked."""

    def __init__(self, name: str, args, cache: str = ""):
        given = {"side": name, "task": args.task, "folder": args.folder, "cache": cache, "sft_steps": args.sft_steps,
                 "seed": args.seed, "threads": args.threads, "iterations": UNCOUNTED + args.rounds * args.iterations}
        command = [args.python if name in ("trl", "export") else sys.executable, str(SIDES), json.dumps(given)]
        env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        self.told = pathlib.Path(args.folder) / f"{name}.log"
        began = time.time()
        with self.told.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                                            env=env)
        self.report = self._read()
        self.started_in = self.report["at"] - began

    def ask(self, iterations: int) -> dict:
        self.process.stdin.write(f"{iterations}\n")
        self.process.stdin.flush()
        self.report = self._read()
        return self.report

    def _read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("report "):
                return json.loads(line.removeprefix("report "))
        sys.exit(f"{self.told.stem} ended with code {self.process.wait()}:\n{self.told.read_text(encoding='utf-8')[-4000:]}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measured(found: list[dict]) -> dict[str, float]:
    """Returns medians over iterations."""
    def of(value):
        return statistics.median(map(value, found))

    return {"rollout tokens/s": of(lambda x: x["tokens"] / x["rollout_s"]),
            "update tokens/s": of(lambda x: x["tokens"] / x["update_s"]),
            "reference and update tokens/s": of(lambda x: x["tokens"] / (x["reference_s"] + x["update_s"])),
            "seconds an iteration": of(lambda x: x["iteration_s"]),
            **{f"  of {part}": of(lambda x, part=part: x[f"{part}_s"]) for part in PARTS},
            "processor seconds an iteration": of(lambda x: x["cpu_s"])}


def compared(runs: dict[str, list]) -> dict[str, dict]:
    """Returns, for each measure, both sides and their ratio: over all iterations, and the least and the most of the rounds."""
    whole = {side: measured([x for found in rounds for x in found]) for side, rounds in runs.items()}
    of_round = [(measured(a), measured(b)) for a, b in zip(runs["ours"], runs["trl"], strict=True)]
    table = {}
    for name, mine in whole["ours"].items():
        power = 1 if "tokens/s" in name else -1
        found = [(a[name] / b[name]) ** power for a, b in of_round]
        table[name] = {"ours": mine, "trl": whole["trl"][name], "ratio": (mine / whole["trl"][name]) ** power,
                       "least": min(found), "most": max(found), "goal": GOALS.get(name)}
    return table


def show(table, starts, peaks, runs, told, loads) -> None:
    print(f"{'':32s}{'ours':>10s}{'TRL':>10s}{'ratio':>8s}   of rounds    goal")
    for name, x in table.items():
        digits = 0 if "tokens/s" in name else 4
        goal = f"{x['goal']:8.1f}" if x["goal"] else ""
        print(f"{name:32s}{x['ours']:10.{digits}f}{x['trl']:10.{digits}f}{x['ratio']:8.2f}{x['least']:8.2f}-{x['most']:.2f}{goal}")
    for kind, found in starts.items():
        if found:
            every = [x["seconds"] for x in found]
            print(f"start, {kind:5s} {statistics.median(every):6.2f} s to the end of the first update "
                  f"({', '.join(f'{x:.2f}' for x in every)}), {statistics.median(x['cpu_s'] for x in found):.1f} s of "
                  f"processor time, {max(x['peak_gb'] for x in found):.2f} GB"
                  + ("" if kind == "trl" else "; goal 20"))
    print("memory: " + ", ".join(f"{side} {peak:.2f} GB" for side, peak in peaks.items()))
    for side, rounds in runs.items():
        every = [x for found in rounds for x in found]
        print(f"{side}: {statistics.mean(x['tokens'] for x in every):.0f} tokens an iteration, "
              f"{statistics.mean(x['ended'] for x in every):.3f} of responses ended, score {every[0]['score']:.3f} to "
              f"{statistics.mean(x['score'] for x in rounds[-1]):.3f} (last round)")
    print(f"taught to {told['teach']['sft_over_floor']:.3f} of the loss's floor; {told['teach']['parameters']} parameters; "
          f"log-probabilities of both sides within {told['export']['logp_gap']:.1e}; load {min(loads):.1f} to {max(loads):.1f}")


if __name__ == "__main__":
    main()
