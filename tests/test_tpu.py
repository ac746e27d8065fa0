"""The very step that trains here compiles for TPUs, with the splash kernel, in the memory of the chip."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import runs

BESIDE = pathlib.Path(sys.prefix) / "libtpu"  # where launch/local.sh puts it


def compile_for_tpu(*words: str) -> dict:
    import importlib.util

    if not BESIDE.is_dir() and importlib.util.find_spec("libtpu") is None and "LIBTPU" not in os.environ:
        pytest.skip("no libtpu; launch/local.sh test installs it, or: pip install 'jax[tpu]'")
    where = os.pathsep.join([str(runs.ROOT), os.environ.get("LIBTPU", str(BESIDE))])
    done = subprocess.run([sys.executable, "benchmarks/tpu_compile.py", *words], capture_output=True, text=True,
                          check=False, cwd=runs.ROOT, timeout=600, env=os.environ | {"PYTHONPATH": where, "XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Involuntary full rematerialization" not in done.stderr
    print(done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_demo_compiles_for_one_tpu_host():
    found = compile_for_tpu("configs/pretrain/demo.yaml", "v5e:2x2", "--mesh.fsdp=4", "--mesh.data=1")
    assert found["splash_calls"] >= 3  # forward, and the two kernels of the backward
    assert found["peak_gb"] < 1


@pytest.mark.slow
def test_a_billion_parameters_compile_for_sixteen_chips():
    found = compile_for_tpu("configs/pretrain/1b-v5e-16.yaml", "v5e:4x4")
    assert found["splash_calls"] >= 3
    assert found["peak_gb"] < 16  # a v5e's memory
    assert found["arguments_gb"] == pytest.approx(12 * found["parameters"] / 16 / 1e9, rel=0.05)  # split in sixteen


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [["gpipe"], ["1f1b"], ["interleaved", "--train.virtual_stages=2"], ["zero_bubble"]], ids=lambda s: s[0])
def test_every_pipeline_schedule_compiles_for_tpu_with_the_splash_kernel(schedule, tmp_path):
    (tmp_path / "toy.yaml").write_text(
        "model: {d_model: 256, n_layers: 4, n_heads: 4, n_kv_heads: 2, vocab_size: 512, max_seq_len: 256}\n"
        "data: {seq_len: 256}\ntrain: {steps: 10, batch_size: 16, micro_batches: 4}\nmesh: {stage: 2, fsdp: 2, data: 1}\n")
    name, *more = schedule
    found = compile_for_tpu(str(tmp_path / "toy.yaml"), "v5e:2x2", f"--train.pipeline={name}", *more)
    assert found["splash_calls"] >= 4  # the forward's kernel, and the backward's, which begins with the forward's again
    assert found["peak_gb"] < 0.1
