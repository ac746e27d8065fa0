"""Compiles the training step of a config for a TPU topology on a machine without a TPU, and prints what a device would hold.

    python benchmarks/tpu_compile.py configs/pretrain/1b-v5e-16.yaml v5e:4x4
    python benchmarks/tpu_compile.py configs/pretrain/demo.yaml v5e:2x2 --mesh.fsdp=4

Needs libtpu in the version that jax names: `pip install "jax[tpu]"`, or only libtpu on PYTHONPATH.
"""

import dataclasses
import json
import os
import sys
import time

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost",
                  TPU_WORKER_ID="0")

import jax
import numpy as np
from jax.experimental import topologies

from jaxllm import config
from jaxllm.partition import batch_sharding, make_mesh
from jaxllm.train.config import PretrainConfig
from jaxllm.train.optim import make_optimizer
from jaxllm.train.pretrain import n_steps
from jaxllm.train.state import build

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter")
TOPOLOGIES = {"v5e:2x2": "v5litepod-4", "v5e:2x4": "v5litepod-8", "v5e:4x4": "v5litepod-16"}


def compile_step(cfg: PretrainConfig, topology: str):
    """Returns (compiled step, seconds, parameters) of the very step that training runs, for a topology's devices."""
    model = dataclasses.replace(cfg.model, vocab_size=cfg.model.vocab_size or 4096)  # the demo's comes from its tokenizer
    os.environ["TPU_ACCELERATOR_TYPE"] = TOPOLOGIES[topology]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(cfg.mesh, devices)
    program = build(model, cfg.train, make_optimizer(cfg.optim, n_steps(cfg)), mesh)
    rows = batch_sharding(mesh)
    kinds = {"token_BT": np.int32, "target_BT": np.int32, "pos_BT": np.int32, "doc_BT": np.int32, "weight_BT": np.float32}
    shape = cfg.train.batch_size, cfg.data.seq_len
    batch = {k: jax.ShapeDtypeStruct(shape, kind, sharding=rows) for k, kind in kinds.items()}
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = program.train_step.lower(program.abstract, batch).compile()
    return compiled, time.perf_counter() - began, sum(leaf.size for leaf in jax.tree.leaves(program.abstract.params))


def report(compiled, seconds, parameters) -> dict:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    peak = arguments + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "parameters": parameters, "compile_s": round(seconds, 1), "peak_gb": round(peak / 1e9, 3),
        "arguments_gb": round(arguments / 1e9, 3), "temporaries_gb": round(temporaries / 1e9, 3),
        "splash_calls": text.count('custom_call_target="tpu_custom_call"'),
        "collectives": {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in COLLECTIVES},
    }


def main(argv):
    path, topology, *overrides = argv
    if topology not in TOPOLOGIES:
        sys.exit(f"topology {topology!r}: should be one of {', '.join(TOPOLOGIES)}")
    cfg = config.load(PretrainConfig, path, [word.removeprefix("--") for word in overrides])
    print(json.dumps({"config": path, "topology": topology, **report(*compile_step(cfg, topology))}))


if __name__ == "__main__":
    main(sys.argv[1:])
