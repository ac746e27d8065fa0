"""Whole runs for the tests: a small corpus, a small config, and the command line in this process or in its own."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import yaml

ROOT = pathlib.Path(__file__).parents[1]
WORDS = "the of and a to in he she it was for on with his her they at be this have from or one had by word but not".split()


def corpus(folder: pathlib.Path, documents: int = 120, seed: int = 0) -> pathlib.Path:
    """Writes JSON lines of sentences with some structure to learn; returns the file."""
    rng = random.Random(seed)
    path = folder / "corpus.jsonl"
    lines = []
    for i in range(documents):
        sentence = " ".join(rng.choices(WORDS, k=rng.randint(5, 90)))
        lines.append(json.dumps({"text": f"{i}: {sentence}."}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def config(folder: pathlib.Path, **groups) -> pathlib.Path:
    """Writes the config of a run of 24 small steps; `groups` are merged over it, key by key."""
    tree = {
        "run": {"dir": str(folder / "run")},
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 32, "max_seq_len": 64},
        "data": {"sources": {"words": {"path": str(corpus(folder))}}, "seq_len": 32, "validation": 0.1, "cache": str(folder / "cache"),
                 "workers": 1},
        "train": {"steps": 24, "batch_size": 8, "eval_every": 8, "eval_rows": 16, "sample_every": 0},
        "optim": {"lr": 0.01, "schedule": "constant"},
        "checkpoint": {"every": 4, "keep": 2},
        "log": {"every": 1, "tensorboard": False},
    }
    for name, keys in groups.items():
        tree[name] = tree.get(name, {}) | keys
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def start(*words, devices: int = 1, prefix: str = "") -> subprocess.Popen:
    """Starts one jaxllm command in its own process and group; `prefix` is shell that runs first (a limit, say)."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jaxllm", *map(str, words)]
    if prefix:
        command = ["sh", "-c", f'{prefix}; exec "$@"', "sh", *command]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: subprocess.Popen, timeout: float = 120) -> tuple[int, str]:
    """Returns (exit code, standard output and error)."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out + err


def kill(process: subprocess.Popen, after: float) -> None:
    """Sends SIGKILL to the whole group after some seconds, unless it has ended."""
    try:
        process.wait(timeout=after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_for(condition, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def lines(path: pathlib.Path, *keys) -> list[dict]:
    """Returns the objects of a JSON-lines file, only some of their keys if any are named."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: one[k] for k in keys if k in one} for one in found] if keys else found


NUMBERS = ("step", "tokens", "loss", "grad_norm", "lr", "eval_loss", "eval_bits_per_byte")  # what does not depend on the clock


def digest(folder: pathlib.Path) -> dict[str, str]:
    """Returns `jaxllm inspect --digest` of a run, from its own process."""
    code, text = finish(start("inspect", folder, "--digest", f"--json={folder}/digest.json"))
    assert code == 0, text
    return json.loads((folder / "digest.json").read_text())["digest"]
