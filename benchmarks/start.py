"""Times from the command to `--help`, and from the command to the first training step with a cold and a warm compile cache.

    python benchmarks/start.py [--rounds=3]

The model is configs/pretrain/d384.yaml; its text must be there (launch/local.sh demo makes it) and tokenised (the first,
uncounted start does that). A step counts when its metrics are on disk.
"""

import argparse
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time


def until_first_step(folder: pathlib.Path, cache: pathlib.Path) -> float:
    """Starts a new run of one step and returns the seconds until its metrics are on disk."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    command = [sys.executable, "-m", "jaxllm", "pretrain", "configs/pretrain/d384.yaml", f"--run.dir={folder}/run",
               "--train.steps=3", "--checkpoint.every=3", "--log.tensorboard=false"]
    metrics, began = folder / "run" / "metrics.jsonl", time.perf_counter()
    with (folder / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}, stdout=log, stderr=log)
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                sys.exit((folder / "log").read_text(encoding="utf-8"))
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        process.wait()
    return seconds


def until_help() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "jaxllm", "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        until_first_step(folder, folder / "cache-0")  # tokenises
        times = {"--help": [until_help() for _ in range(rounds)], "cold": [], "warm": []}
        for i in range(1, rounds + 1):
            times["cold"].append(until_first_step(folder, folder / f"cache-{i}"))
            times["warm"].append(until_first_step(folder, folder / f"cache-{i}"))
    for what, seconds in times.items():
        print(f"{what:<8} median {statistics.median(seconds):6.2f} s   (of {', '.join(f'{s:.2f}' for s in seconds)})")


if __name__ == "__main__":
    main()
