"""A trainer that takes a tenth of a second, for tests of what is around it: its losses are a formula of the settings.

    python fake_trainer.py search ARGS…     `jaxllm plan search ARGS…` with this trainer in place of `jaxllm pretrain`

It reads what the search gives a trial on the command line, writes metrics.jsonl and checkpoints as a run does, and goes on
from its last checkpoint. A learning rate above 0.1 diverges at step 5.
"""

import fcntl
import json
import math
import os
import pathlib
import signal
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 20


def loss_of(settings: dict, step: int) -> float:
    lr, warmup = float(settings.get("optim.lr", 0.01)), int(settings.get("optim.warmup", 0))
    noise = 0.001 * math.sin(1000 * lr + 7 * int(settings.get("run.seed", 0)))
    return 3 + (math.log10(lr) + 2.2) ** 2 + 0.001 * (warmup - 4) ** 2 + noise + 2 / step


def train(words: list[str]) -> int:
    settings = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
    folder = pathlib.Path(settings["run.dir"])
    until = int(settings.get("train.stop_at", STEPS))
    lock = (folder / "run.lock").open("a")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as a run does: two at once would be an error
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    done = max((int(p.name) for p in checkpoints.glob("[0-9]*")), default=0)
    told = os.environ.get("FAKE_STARTS")
    if told:
        with open(told, "a", encoding="utf-8") as f:
            f.write(f"{folder.name} {done} {until}\n")
    if settings.get("optim.b1") == "0.5":
        print("jaxllm: optim.b1=0.5: refused by the fake", file=sys.stderr)
        return 2
    for step in range(done + 1, until + 1):
        time.sleep(float(os.environ.get("FAKE_SLEEP", "0.002")))
        if float(settings.get("optim.lr", 0.01)) > 0.1 and step == 5:
            print("jaxllm: step 5: loss nan, gradient norm nan: not finite: gradient of x; no checkpoint was taken yet", file=sys.stderr)
            return 1
        deaths = folder / f"death-{len(list(folder.glob('death-*')))}"
        if step == 7 and int(deaths.name[6:]) < int(os.environ.get("FAKE_DEATHS", "0")):
            deaths.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, "tokens": step, "eval_loss": loss_of(settings, step)}) + "\n")
        if step % 5 == 0 or step == until:
            (checkpoints / str(step)).mkdir(exist_ok=True)
    return 0 if until == STEPS else 75


def search(words: list[str]) -> int:
    from jaxllm import cli
    from jaxllm.plan import search_trial

    own = search_trial.command
    search_trial.command = lambda *args, **how: [sys.executable, __file__, "train", *own(*args, **how)[5:]]
    return cli.main(["plan", "search", *words])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit({"train": train, "search": search}[sys.argv[1]](sys.argv[2:]))
