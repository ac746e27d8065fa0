"""Several processes are one program: they meet, feed their own rows, save together and stop together. Real processes, gloo."""

import os
import pathlib
import signal
import socket
import threading

import numpy as np
import pytest
import runs

from jaxllm.errors import RunError, UserError
from jaxllm.mesh import DcnConfig, MeshConfig
from jaxllm.parallel.config import ProcessesConfig
from jaxllm.parallel.processes import Place, find_place, first_host, meet
from jaxllm.partition import make_mesh


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start_all(n: int, config: pathlib.Path, *words) -> list:
    """Starts the n processes of one run, with 8 devices in all."""
    where = f"localhost:{free_port()}"
    return [runs.start("pretrain", config, *words, f"--processes.coordinator={where}", f"--processes.count={n}",
                       f"--processes.index={i}", "--processes.timeout=60", devices=8 // n) for i in range(n)]


def finish_all(processes: list) -> list[tuple[int, str]]:
    return [runs.finish(p) for p in processes]


def losses(folder: pathlib.Path) -> dict[int, float]:
    return {x["step"]: x["loss"] for x in runs.lines(folder / "metrics.jsonl", "step", "loss") if "loss" in x}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run in one process of 8 devices: (its folder, its config)."""
    folder = tmp_path_factory.mktemp("alone")
    config = runs.config(folder, train={"steps": 12, "sample_every": 12, "sample_prompts": ["the "]}, mesh={"fsdp": 4, "tensor": 2})
    code, text = runs.finish(runs.start("pretrain", config, devices=8))
    assert code == 0, text
    return folder / "run", config


def same(ours: pathlib.Path, theirs: pathlib.Path):
    a, b = losses(ours), losses(theirs)
    assert a.keys() == b.keys() and all(abs(a[s] - b[s]) / b[s] < 1e-5 for s in b)
    a, b = ([x for x in runs.lines(f / "metrics.jsonl", "step", "eval_loss", "eval_bits_per_byte") if "eval_loss" in x] for f in (ours, theirs))
    assert [x["step"] for x in a] == [x["step"] for x in b]
    for x, y in zip(a, b, strict=True):
        assert abs(x["eval_bits_per_byte"] - y["eval_bits_per_byte"]) / y["eval_bits_per_byte"] < 1e-5
    assert runs.lines(ours / "samples.jsonl") == runs.lines(theirs / "samples.jsonl")


@pytest.mark.parametrize(("n", "mesh"), [
    (2, ["--mesh.fsdp=4"]),
    pytest.param(2, ["--mesh.data=1", "--mesh.fsdp=1", "--mesh.tensor=8", "--model.n_heads=8"], marks=pytest.mark.slow),  # both hold all rows
    pytest.param(4, ["--mesh.fsdp=2"], marks=pytest.mark.slow),
])
def test_n_processes_train_as_one(alone, tmp_path, n, mesh):
    folder, config = alone
    if "--model.n_heads=8" in mesh:
        folder = tmp_path / "alone"
        code, text = runs.finish(runs.start("pretrain", config, f"--run.dir={folder}", *mesh, devices=8))
        assert code == 0, text
    together = tmp_path / "run"
    for code, text in finish_all(start_all(n, config, f"--run.dir={together}", *mesh)):
        assert code == 0, text
    same(together, folder)


@pytest.mark.slow
def test_what_n_processes_saved_m_processes_restore(alone, tmp_path):
    folder, config = alone
    run = tmp_path / "run"
    for code, text in finish_all(start_all(2, config, f"--run.dir={run}", "--train.steps=4")):
        assert code == 0, text
    assert runs.digest(run)  # read by one process
    for code, text in finish_all(start_all(4, config, f"--run.dir={run}", "--mesh.fsdp=2", "--train.steps=8")):
        assert code == 0, text
    code, text = runs.finish(runs.start("pretrain", config, f"--run.dir={run}", devices=8))
    assert code == 0, text
    assert "goes on from step 8" in text
    ours, theirs = losses(run), losses(folder)
    assert ours.keys() == theirs.keys() and all(abs(ours[s] - theirs[s]) / theirs[s] < 1e-5 for s in theirs)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(alone, tmp_path):
    _, config = alone
    run = tmp_path / "run"
    processes = start_all(2, config, f"--run.dir={run}", "--train.steps=100000", "--train.sample_every=0", "--checkpoint.every=100000")
    runs.wait_for(lambda: (run / "metrics.jsonl").exists() and len(runs.lines(run / "metrics.jsonl")) > 2)
    os.kill(processes[1].pid, signal.SIGTERM)
    for code, text in finish_all(processes):
        assert code == 75, text
    step = max(losses(run))
    assert (run / "checkpoints" / str(step)).is_dir()


# ---------------------------------------------------------------- meeting


def meet_in_threads(places: list[Place], timeout: float) -> dict[int, str]:
    """Returns what each process was told, "" where all went well; by its number in `places`."""
    told, words = {}, []

    def one(i, place):
        try:
            meet(place, timeout, words.append)
            told[i] = ""
        except (RunError, UserError) as e:
            told[i] = str(e)

    threads = [threading.Thread(target=one, args=(i, place)) for i, place in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return told


def places(*indices: int, count: int, hosts=()) -> list[Place]:
    where = f"localhost:{free_port()}"
    return [Place(where, count, i, "test", hosts) for i in indices]


def test_processes_meet_and_leave_the_port_free():
    all_of_them = places(2, 1, 0, count=3)
    assert meet_in_threads(all_of_them, 20) == {0: "", 1: "", 2: ""}
    socket.create_server(("", int(all_of_them[0].coordinator.split(":")[1]))).close()


def test_the_missing_process_is_named_to_all():
    told = meet_in_threads(places(0, 2, count=4, hosts=("a", "b", "c", "d")), 1)
    for text in told.values():
        assert "of 4 processes (by test) not come within 1 s: process 1 (b), process 3 (d)" in text


def test_a_missing_first_process_is_named():
    told = meet_in_threads(places(1, count=2), 1)
    assert "process 1 of 2 (by test): process 0 was not reached at localhost" in told[0]


def test_two_processes_of_one_number_are_named():
    told = meet_in_threads(places(0, 1, 1, count=3), 5)
    assert any("both say they are process 1" in text for text in told.values())


def test_a_stranger_at_the_port_is_sent_off():
    here = places(0, 1, count=2)
    port = int(here[0].coordinator.split(":")[1])

    def knock():
        for _ in range(40):
            try:
                with socket.create_connection(("localhost", port), timeout=1) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                return
            except OSError:
                threading.Event().wait(0.05)

    stranger = threading.Thread(target=knock)
    stranger.start()
    told = meet_in_threads(here[:1], 2)  # process 1 does not come: the stranger must not have taken its place
    stranger.join()
    assert "process 1" in told[0]


@pytest.mark.parametrize(("env", "place"), [
    ({}, None),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "gpu[003-004,9],x"}, Place("gpu003:8476", 4, 2, "Slurm")),
    ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "a"}, None),
    ({"MASTER_ADDR": "h", "MASTER_PORT": "99", "WORLD_SIZE": "2", "RANK": "1"}, Place("h:99", 2, 1, "torchrun")),
    ({"TPU_WORKER_HOSTNAMES": "h0,h1", "TPU_WORKER_ID": "1"}, Place("h0:8476", 2, 1, "the TPU pod", ("h0", "h1"))),
    ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    ({"JAX_COORDINATOR_ADDRESS": "c:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}, Place("c:1", 3, 2, "jax's environment")),
])
def test_the_launchers_environment_says_who_takes_part(env, place):
    assert find_place(ProcessesConfig(), env) == place


def test_settings_win_over_the_environment():
    env = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "h"}
    assert find_place(ProcessesConfig(count=1), env) is None
    given = ProcessesConfig(coordinator="c:5", count=3, index=1)
    assert find_place(given, env) == Place("c:5", 3, 1, "settings")
    assert first_host("node7") == "node7"


@pytest.mark.parametrize(("keys", "says"), [
    ({"count": 2}, "needs processes.index, and processes.coordinator=HOST:PORT"),
    ({"count": 2, "index": 2, "coordinator": "a:1"}, "should be 0 or more, and below processes.count=2"),
    ({"count": 0}, "should be at least 1"), ({"timeout": 0}, "should be at least 1"),
])
def test_a_mistake_gets_one_line(keys, says):
    with pytest.raises(ValueError, match=says):
        ProcessesConfig(**keys)


def test_a_coordinator_without_a_port_is_told():
    with pytest.raises(UserError, match=r"processes\.coordinator='here': should be HOST:PORT"):
        meet(Place("here", 2, 0, "settings"), 1)


# ---------------------------------------------------------------- slices


def test_the_outer_part_of_an_axis_is_between_slices():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, dcn=DcnConfig(data=2)))
    slices = np.array([d.id for d in mesh.devices.flat]).reshape(2, 4) // 4  # [data, the rest]: devices 0-3 are one slice
    assert (slices == [[0] * 4, [1] * 4]).all()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, dcn=DcnConfig(fsdp=2)))
    assert dict(mesh.shape) == {"stage": 1, "data": 2, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    slices = np.array([d.id for d in mesh.devices.flat]).reshape(2, 2, 2) // 4  # [data, fsdp outer, fsdp inner]
    assert (slices == np.array([0, 1])[None, :, None]).all()


def test_slices_that_do_not_multiply_are_told():
    with pytest.raises(UserError, match=r"in 2 slices needs 12 devices, found 8"):
        make_mesh(MeshConfig(data=1, fsdp=6, dcn=DcnConfig(data=2)))
    with pytest.raises(ValueError, match=r"mesh\.dcn\.data=0: should be a positive number of slices"):
        DcnConfig(data=0)
