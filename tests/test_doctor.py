"""The doctor: what it sees of a machine, what it says when something is missing or broken, and its self-test."""

import importlib.metadata
import json
import os
import pathlib
import shutil
from collections import namedtuple

import jax
import pytest
from packaging.requirements import Requirement

from jaxllm import cli, doctor, installed, self_test
from jaxllm.errors import RunError
from jaxllm.report.config import DoctorVerb
from jaxllm.train.checkpoint import Checkpoints

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def quick(monkeypatch):
    """The doctor's settings for a look without the self-test; its devices are the test's."""
    monkeypatch.setattr("jaxllm.platform.start_jax", lambda: None)  # conftest has set jax up
    return DoctorVerb(self_test=False)


def test_what_is_here_is_well(quick, capsys):
    result = doctor.main(quick)
    assert result["ok"] and not [item for item in result["items"] if item["state"] == "fail"]
    names = [item["name"] for item in result["items"]]
    assert {"python", "jax", "jaxlib", "flax", "optax", "grain", "jaxllm needs", "memory", "cache", "cpu"} <= {*names}
    said = capsys.readouterr().out
    assert all(name in said for name in names) and "8 x cpu" in said


def test_old_python():
    assert doctor.python((3, 10, 4)).state == "fail" and "venv" in doctor.python((3, 10, 4)).mend
    assert doctor.python((3, 11, 0)).state == "ok"


@pytest.mark.parametrize(("have", "state", "mend"), [
    (None, "fail", "-m pip install 'flax>=0.11.2'"), ("0.10.0", "fail", "-m pip install 'flax>=0.11.2'"), ("0.11.2", "ok", "")])
def test_a_package_missing_or_too_old_names_the_command(monkeypatch, have, state, mend):
    monkeypatch.setattr(installed, "version", lambda name: have)
    item = doctor.package(Requirement("flax>=0.11.2"))
    assert item.state == state and item.mend.endswith(mend)


def test_jaxlib_of_another_release_than_jax(monkeypatch):
    monkeypatch.setattr(installed, "version", lambda name: {"jax": "0.10.2", "jaxlib": "0.9.0"}[name])
    item = doctor.package(Requirement("jaxlib<=0.10.2,>=0.10.1"), "this jax")
    assert item.state == "fail" and item.mend.endswith("pip install jax==0.10.2 jaxlib==0.10.2")


def test_a_failure_is_exit_code_1_and_the_json_is_written(quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, "python", lambda: doctor.Item("software", "python", "fail", "2.7", "make a new environment"))
    with pytest.raises(RunError, match=r"^doctor: python does not work"):
        doctor.main(quick)
    assert "FAIL  python" in capsys.readouterr().out
    assert cli.main(["doctor", "--self_test=false", f"--json={tmp_path / 'd.json'}"]) == 1
    result = json.loads((tmp_path / "d.json").read_text())
    assert result["ok"] is False and result["items"][0]["mend"] == "make a new environment"


def test_json_on_standard_output_is_json_alone(quick, capsys):
    assert cli.main(["doctor", "--self_test=false", "--json=-"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]


def test_requirements_are_those_of_setup_py_and_of_the_installed_package(monkeypatch, tmp_path):
    from_checkout = {need.name: str(need.specifier) for need in installed.core()}
    assert {"jax", "flax", "optax", "orbax-checkpoint", "grain"} <= from_checkout.keys()
    assert "pyarrow" in {need.name for need in installed.extras()["parquet"]}
    metadata = tmp_path / "jaxllm-9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: jaxllm\nVersion: 9.9\nProvides-Extra: parquet\nProvides-Extra: test\n"
                        "Requires-Dist: jax>=0.7.2\nRequires-Dist: numpy>=2.0; python_version > '3'\n"
                        "Requires-Dist: old; python_version < '3'\n"
                        "Requires-Dist: pyarrow>=15; extra == 'parquet'\nRequires-Dist: pytest; extra == 'test'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(installed, "SETUP", tmp_path / "none")
    installed._declared.cache_clear()
    try:
        assert [need.name for need in installed.core()] == ["jax", "numpy"]
        assert {name: [need.name for need in needs] for name, needs in installed.extras().items()} == {"parquet": ["pyarrow"]}
    finally:
        installed._declared.cache_clear()


def test_closure_is_what_jaxllm_pulls_in():
    names = {dist.metadata["Name"] for dist in installed.closure()}
    assert {"jax", "jaxlib", "numpy", "ml_dtypes", "flax"} <= names  # ml_dtypes comes with jax
    assert not {"pytest", "ruff"} & names
    assert names <= {dist.metadata["Name"] for dist in installed.everything()}


def test_size_is_that_of_the_files():
    dist = importlib.metadata.distribution("optax")
    on_disk = sum(pathlib.Path(f.locate()).stat().st_size for f in dist.files if pathlib.Path(f.locate()).exists())
    assert installed.size(dist) == pytest.approx(on_disk, rel=0.02) and on_disk > 100_000


def fake(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


PCI = "sys/bus/pci/devices/0000:00:0"


@pytest.mark.parametrize(("files", "found"), [
    ({f"{PCI}4.0/vendor": "0x1ae0\n", f"{PCI}4.0/class": "0x120000\n"}, {"tpu": "PCI device 0000:00:04.0"}),
    ({f"{PCI}4.0/vendor": "0x1ae0\n", f"{PCI}4.0/class": "0x020000\n"}, {}),  # Google's network card
    ({f"{PCI}5.0/vendor": "0x10de\n", f"{PCI}5.0/class": "0x030200\n"}, {"gpu": "PCI device 0000:00:05.0"}),
    ({f"{PCI}5.0/vendor": "0x10de\n", f"{PCI}5.0/class": "0x040300\n"}, {}),  # a graphics card's sound
    ({"dev/accel0": "", "dev/accel1": ""}, {"tpu": "/dev/accel0"}),
    ({"dev/vfio/0": "", "dev/vfio/vfio": ""}, {"tpu": "/dev/vfio/0"}),
    ({"dev/vfio/vfio": ""}, {}),
    ({"dev/nvidia0": "", "dev/nvidiactl": ""}, {"gpu": "/dev/nvidia0"}),
    ({}, {}),
])
def test_accelerators_are_seen_without_jax(tmp_path, files, found):
    assert doctor.accelerators(fake(tmp_path, files)) == found


@pytest.mark.parametrize(("there", "platforms", "asked", "libtpu", "mend"), [
    ({"tpu": "/dev/accel0"}, {"cpu"}, "", None, "-U 'jax[tpu]'"),
    ({"tpu": "/dev/accel0"}, {"cpu"}, "", "0.0.17", "sudo dmesg | tail; reboot the TPU VM if it stays so"),
    ({"tpu": "/dev/accel0"}, {"cpu"}, "cpu", None, "unset JAX_PLATFORMS"),
    ({"gpu": "/dev/nvidia0"}, {"cpu"}, "", None, "sudo modprobe nvidia; nvidia-smi"),
    ({"gpu": "/dev/nvidia0"}, {"gpu"}, "", None, None),
    ({"tpu": "/dev/accel0"}, {"tpu"}, "", None, None),
])
def test_an_unused_accelerator_names_the_command(monkeypatch, there, platforms, asked, libtpu, mend):
    monkeypatch.setenv("JAX_PLATFORMS", asked)
    monkeypatch.setattr(installed, "version", lambda name: libtpu)
    found = list(doctor.unseen(there, platforms))
    assert [item.state for item in found] == ([] if mend is None else ["note"])
    assert not found or found[0].mend.endswith(mend)


def test_a_gpu_with_a_driver_needs_cuda_s_jax(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(pathlib.Path, "exists", lambda self: str(self) == "/proc/driver/nvidia/version")
    [item] = doctor.unseen({"gpu": "/dev/nvidia0"}, {"cpu"})
    assert item.mend.endswith("-U 'jax[cuda12]'")


def test_a_tpu_in_use_names_the_process(monkeypatch, tmp_path):
    for pid, target in ((7, "/dev/accel0"), (8, "/tmp/other"), (9, "/tmp/libtpu_lockfile"), (os.getpid(), "/dev/vfio/0")):
        (tmp_path / str(pid) / "fd").mkdir(parents=True)
        (tmp_path / str(pid) / "fd" / "3").symlink_to(target)
    assert doctor.holders(tmp_path) == [7, 9]
    error = "The TPU is already in use by process with pid 7. Not attempting to load libtpu.so in this process."
    monkeypatch.setattr(doctor, "holders", lambda: [7])
    assert doctor.mend_start(error, {"tpu": "/dev/accel0"}).endswith("kill 7")
    monkeypatch.setattr(doctor, "holders", lambda: [])
    assert doctor.mend_start(error, {"tpu": "/dev/accel0"}).endswith("rm /tmp/libtpu_lockfile")


def test_jax_that_does_not_start_is_a_failure_with_its_command(quick, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)

    def broken():
        raise RuntimeError("jaxlib version 0.9.0 is newer than and incompatible with jax version 0.8.0.\nmore")

    monkeypatch.setattr("jaxllm.platform.start_jax", broken)
    [item] = doctor.devices()
    assert item.state == "fail" and "RuntimeError: jaxlib version 0.9.0" in item.said and "more" not in item.said
    assert item.mend.endswith("-U jax jaxlib")


@pytest.mark.parametrize(("free_gb", "state"), [(0.2, "fail"), (5, "note"), (50, "ok")])
def test_disk_that_runs_out(monkeypatch, tmp_path, free_gb, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1e12, 0, free_gb * 1e9))
    item = doctor.disk("cache", tmp_path / "not" / "there" / "yet")
    assert item.state == state and f"{free_gb:.1f} GB free in {tmp_path}/not/there/yet" in item.said
    assert (item.mend == "") == (state == "ok")


def test_folder_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    item = doctor.disk("cache", tmp_path)
    assert item.state == "fail" and "cannot be written" in item.said and item.mend.startswith("chown")


@pytest.mark.slow
def test_self_test_passes_on_every_device():
    found = list(self_test.self_test())
    assert [(name, state) for name, state, *_ in found] == [
        ("model and mesh", "ok"), ("3 training steps", "ok"), ("checkpoint", "ok"), ("generation", "ok")], found
    assert "on 8 cpu" in found[0][2] and "bit for bit" in found[2][2]


@pytest.mark.slow
def test_self_test_sees_a_step_that_does_not_learn(monkeypatch):
    made = {}
    self_test.make(made)
    step = made["program"].train_step
    made["program"] = namedtuple("P", "train_step")(lambda state, batch: (state, {"loss": 5.0}))
    assert self_test.attempt(self_test.train, made)[0] == "fail"
    made["program"] = namedtuple("P", "train_step")(step)
    assert self_test.attempt(self_test.train, made)[0] == "ok"


@pytest.mark.slow
def test_self_test_sees_a_checkpoint_that_comes_back_other_than_it_was(monkeypatch, tmp_path):
    restore, made = Checkpoints.restore, {}
    self_test.make(made)

    def other(checkpoints, abstract):
        return jax.tree.map(lambda x: x + 1, restore(checkpoints, abstract)[0]), {}

    monkeypatch.setattr(Checkpoints, "restore", other)
    state, said = self_test.attempt(lambda made: self_test.checkpoint(made, tmp_path), made)
    assert state == "fail" and "differs from what was saved" in said


@pytest.mark.parametrize(("have", "state"), [(None, "note"), ("14.0", "note"), ("15.0", "ok")])
def test_an_optional_part_is_there_or_names_the_command(monkeypatch, have, state):
    optional = {"parquet": [Requirement("pyarrow>=15")], "tpu": [Requirement("jax[tpu]")]}
    monkeypatch.setattr(installed, "extras", lambda: optional)
    monkeypatch.setattr(installed, "version", lambda name: have)
    [item] = doctor.extras()
    assert (item.name, item.state) == ("parquet", state)
    assert item.mend.endswith("pip install 'pyarrow>=15'") == (state == "note")
