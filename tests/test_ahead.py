"""Groups in processes of their own: what they compute, who waits for whom, how they stop and go on. Real processes, gloo."""

import contextlib
import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import runs

from jaxllm.errors import RunError
from jaxllm.parallel import exchange

LATE = ["--train.sync=diloco", "--train.groups=2", "--mesh.data=2", "--mesh.fsdp=2"]


def start_all(config: pathlib.Path, *words, pauses=(0.0, 0.0)) -> list[subprocess.Popen]:
    """Starts two processes of two devices; each pauses before its steps and writes when they began, in times-I.json."""
    with socket.create_server(("", 0)) as server:
        where = f"localhost:{server.getsockname()[1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
                        "JAX_COMPILATION_CACHE_DIR": str(runs.ROOT / ".jax_cache"), "PYTHONPATH": str(runs.ROOT)}
    return [subprocess.Popen(
        [sys.executable, str(runs.ROOT / "tests/slow_process.py"), str(pause), str(config.parent / f"times-{i}.json"), "pretrain",
         str(config), *LATE, *words, f"--processes.coordinator={where}", "--processes.count=2", f"--processes.index={i}",
         "--processes.timeout=60"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        for i, pause in enumerate(pauses)]


def finish_all(processes, code: int = 0) -> list[str]:
    told = [runs.finish(p, timeout=300) for p in processes]
    for found, text in told:
        assert found == code, text
    return [text for _, text in told]


def held_out(folder: pathlib.Path) -> list[float]:
    return [x["eval_loss"] for x in runs.lines(folder / "metrics.jsonl") if "eval_loss" in x]


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ["--train.inner_steps=3", "--train.staleness=2"],
    ["--train.inner_steps=5", "--train.fragments=2", "--train.overlap=2", "--train.mixing=0.5", "--model.n_layers=2"],
])
def test_groups_in_processes_compute_what_one_program_does_and_resume_to_the_bit(tmp_path, words):
    config = runs.config(tmp_path, checkpoint={"every": 8})
    one, straight, stopped = (tmp_path / name for name in ("one", "straight", "stopped"))
    code, text = runs.finish(runs.start("pretrain", config, *LATE, *words, f"--run.dir={one}", devices=4), timeout=300)
    assert code == 0, text
    told = finish_all(start_all(config, *words, f"--run.dir={straight}"))
    assert "losses of steps are those of process 0's groups" in told[0] and "none can be ahead" not in told[0]
    np.testing.assert_allclose(held_out(straight), held_out(one), rtol=1e-5)
    processes = start_all(config, *words, f"--run.dir={stopped}", pauses=(0.5, 0.5))  # the stop is agreed with a meeting's outcome: 2 rounds
    runs.wait_for(lambda: (stopped / "metrics.jsonl").exists() and len(runs.lines(stopped / "metrics.jsonl")) > 2, timeout=200)
    os.kill(processes[1].pid, signal.SIGTERM)
    finish_all(processes, code=75)
    assert max(x["step"] for x in runs.lines(stopped / "metrics.jsonl")) < 24
    finish_all(start_all(config, *words, f"--run.dir={stopped}"))
    assert runs.digest(stopped) == runs.digest(straight)


@pytest.mark.slow
def test_a_slow_group_holds_up_the_other_only_by_the_bound(tmp_path):
    """Group 1's steps take three times as long. A round is two steps; of 24 steps those after compiling are looked at."""
    took, ahead = {}, {}
    for k in (0, 1, 8):
        folder = tmp_path / str(k)
        folder.mkdir()
        config = runs.config(folder, train={"inner_steps": 2, "eval_every": 0}, checkpoint={"every": 100}, log={"every": 8})
        finish_all(start_all(config, f"--train.staleness={k}", pauses=(0.15, 0.45)))
        fast, slow = (json.loads((folder / f"times-{i}.json").read_text()) for i in (0, 1))
        took[k] = [(times[16] - times[4]) / 12 for times in (fast, slow)]  # whole rounds: waiting falls on each second step
        # rounds that the fast one has done more than the slow one, when each of its rounds begins
        ahead[k] = max(t // 2 - sum(s < fast[t] for s in slow) // 2 for t in range(2, 24, 2))
    assert took[0][0] > 0.85 * took[0][1]  # both wait at each meeting
    assert took[8][0] < 0.5 * took[8][1]
    assert ahead[1] <= 1 < 4 <= ahead[8] <= 8


# ---------------------------------------------------------------- the exchange itself


def joined(n: int) -> list[exchange.Exchange]:
    servers = [exchange.listen() for _ in range(n)]
    where = [("localhost", server.getsockname()[1]) for server in servers]
    found: dict[int, exchange.Exchange] = {}

    def one(i):
        found[i] = exchange.Exchange(exchange.connect(servers[i], i, where, 20), [f"process {i}" for i in range(n)])

    threads = [threading.Thread(target=one, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[i] for i in range(n)]


def leave(one: exchange.Exchange) -> None:
    for peer in filter(None, one.peers):
        with contextlib.suppress(OSError):  # the other one left before
            peer.shutdown(socket.SHUT_RDWR)
        peer.close()


def test_means_are_the_same_everywhere_whoever_comes_first_and_send_what_the_formula_says():
    n, size = 3, 30_000
    rng = np.random.default_rng(0)
    given = {step: [rng.normal(size=size).astype(np.float32) for _ in range(n)] for step in (1, 2)}
    want = {step: ((a + b) + c) / np.float32(n) for step, (a, b, c) in given.items()}
    for order in itertools.permutations(range(n)):
        all_of_them = joined(n)
        for i in order:
            for step in (2, 1):
                all_of_them[i].submit((step, 0), given[step][i], note=10 * step + i)
        for one in all_of_them:
            for step in (1, 2):
                mean, note = one.result((step, 0))
                assert (mean == want[step]).all() and note == 10 * step + n - 1
        for one in all_of_them:
            runs.wait_for(lambda one=one: one.sent_bytes == 2 * 4 * size * 2 * (n - 1) / n)
            leave(one)


def test_a_process_that_left_is_named():
    first, second = joined(2)
    first.submit((4, 0), np.zeros(8, np.float32))
    leave(second)
    with pytest.raises(RunError, match="process 1 left, and its part of the meeting after step 4 will not come"):
        first.result((4, 0))
    leave(first)
