"""`jaxllm plan compile CONFIG --topology=v5e-256`: what a step would hold, send and compute on TPUs that are not there."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from jaxllm import config
from jaxllm.errors import RunError, UserError
from jaxllm.mesh import degrees
from jaxllm.plan.compile_config import CompileVerb
from jaxllm.plan.topology import Topology, find
from jaxllm.train.flops import forward_flops_per_token, training_flops_per_token


def main(cfg: CompileVerb) -> dict:
    """Compiles the training step of a config for a TPU topology and prints what one device would hold and do."""
    from jaxllm.plan import changes, front, report_text
    from jaxllm.plan.picture import check_picture, draw

    topology = find(cfg.topology, cfg.slices)
    cfg = with_vocabulary(cfg)
    check_mesh(cfg, topology)
    if cfg.picture:
        check_picture(cfg.picture)
    where = libtpu()
    if cfg.search:
        rows = front.search(cfg, topology, lambda one: compile_in_child(one, topology, where), say)
        print(report_text.pareto(rows, topology))
        if cfg.picture:
            draw(rows, topology, cfg.picture)
        return {"topology": topology.name, "slices": topology.slices, "search": rows}
    say(f"compiling {describe(cfg)} for {topology.name}")
    found = compile_in_child(cfg, topology, where)
    if not found["fits"] and cfg.fit:
        found["changes"] = changes.single_changes(cfg, topology, found, lambda one: compile_in_child(one, topology, where), say)
    print(report_text.whole(cfg, topology, found))
    return found


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def describe(cfg: CompileVerb) -> str:
    degrees_of = {name: size for name, size in config.flatten(dataclasses.asdict(cfg.mesh)).items() if size != 1}
    mesh = " x ".join(f"{axis} {size}" for axis, size in degrees_of.items()) or "one device"
    host = "" if cfg.train.offload == "none" else f" with {cfg.train.offload} on the host"
    return (f"mesh {mesh}, remat {cfg.train.remat}{host}, micro-batches {cfg.train.micro_batches}, "
            f"loss chunk {cfg.train.loss_chunk}")


def check_mesh(cfg: CompileVerb, topology: Topology) -> None:
    try:
        degrees(cfg.mesh, topology.devices)
    except UserError as e:
        slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
        raise UserError(f"{e} in {slices}{topology.name}") from None


def with_vocabulary(cfg: CompileVerb) -> CompileVerb:
    """Returns the settings with the size of the vocabulary, which may be the tokenizer's to tell."""
    if cfg.model.vocab_size is not None:
        return cfg
    path = pathlib.Path(cfg.data.tokenizer).expanduser()
    if cfg.data.tokenizer != "bytes" and not path.exists():
        raise UserError(f"model.vocab_size is not set and the tokenizer {path} is not there: give --model.vocab_size=N")
    from jaxllm.data.tokenizer import load_tokenizer

    size = load_tokenizer(str(cfg.data.tokenizer)).vocab_size
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=size))


def libtpu() -> str | None:
    """Returns the folder to add to the path for the TPU compiler, None where it is installed; raises UserError without."""
    found = importlib.util.find_spec("libtpu")
    if found is not None and found.origin:  # a folder of that name has none
        return None
    beside = pathlib.Path(sys.prefix) / "libtpu"  # where `launch/local.sh test` puts it
    if (beside / "libtpu").is_dir():
        return str(beside)
    named = [re.split(r"[; ]", r)[0] for r in importlib.metadata.requires("jax") or [] if r.startswith("libtpu")]
    wanted = named[0] if named else "libtpu"
    # Beside the environment, not in it: where jax finds libtpu it looks for a TPU at every start.
    raise UserError(f"the TPU compiler is missing; install it (no TPU needed): {sys.executable} -m pip install --no-deps "
                    f"--target {beside} '{wanted}'")


def compile_in_child(cfg: CompileVerb, topology: Topology, where: str | None) -> dict:
    """Returns what `step.measure` found, with what follows from it; raises UserError or RunError in one line."""
    root = str(pathlib.Path(__file__).parents[2])
    paths = [root, *([where] if where else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": topology.accelerator_type, "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    with tempfile.TemporaryDirectory() as folder:
        settings, result = pathlib.Path(folder) / "settings.yaml", pathlib.Path(folder) / "result.json"
        settings.write_text(config.to_yaml(config.to_dict(cfg)), encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", "jaxllm.plan.step", str(settings), str(result)], env=env, check=False,
                              capture_output=True, text=True)
        if done.returncode or not result.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            told = [line for line in lines if re.match(r"\S*(Error|Exception)\b|F\d{4} ", line)] or lines[-1:]
            raise RunError(f"the compiler gave up on {describe(cfg)} (exit {done.returncode}): {' '.join(told)[:600]}")
        found = json.loads(result.read_text(encoding="utf-8"))
    if "mistake" in found:
        raise UserError(found["mistake"])
    return found | {"topology": topology.name, "slices": topology.slices, "offload": cfg.train.offload,
                    "copies": "Involuntary full rematerialization" in done.stderr} | times(cfg, topology, found)


def times(cfg: CompileVerb, topology: Topology, found: dict) -> dict:
    """Returns whether it fits, and the seconds of a step by each way of counting."""
    chip, tokens = topology.chip, cfg.train.batch_size * cfg.data.seq_len / topology.devices
    peak = chip.peak_flops("float32" if cfg.train.precision == "float32" else "bfloat16")
    flops = training_flops_per_token(cfg.model, cfg.data.seq_len) * tokens
    out = {"memory_bytes": chip.memory_bytes, "roofline_s": flops / peak}
    if "refused" in found:
        return out | {"fits": False}
    kernels = 3 * forward_flops_per_token(cfg.model, cfg.data.seq_len)["scores"] * tokens / peak if found["kernels"] else 0.0
    compute = found["cycles"] / topology.clock_hz
    links = sum(row["seconds"] for row in found["collectives"])
    # each byte goes there and comes back once a step, over a link that chips of a host do not share
    moved = 2 * (found["memory"]["host_arguments"] + found["memory"]["host_temporaries"])
    host = moved / (topology.generation.pcie_gb_per_s * 1e9)
    return out | {"fits": found["memory"]["peak"] <= chip.memory_bytes, "compute_s": compute, "kernels_s": kernels,
                  "links_s": links, "host_s": host,
                  "step_s": [max(compute + kernels, links, host), compute + kernels + links + host]}
