"""Compiles a training step for a TPU topology on a machine without a TPU, and prints what each device would hold.

    python benchmarks/tpu_compile.py --model=1.1b      # 16 layers, width 2048, on 16 v5e chips with fsdp=16
    python benchmarks/tpu_compile.py --model=demo      # the demo's model on one v5e host (4 chips)

Needs libtpu in the version that jax names: `pip install "jax[tpu]"`, or only libtpu on PYTHONPATH.
"""

import argparse
import json
import os
import time

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost",
                  TPU_WORKER_ID="0")

import jax
import numpy as np
from jax.experimental import topologies

from jaxllm import config
from jaxllm.mesh import MeshConfig
from jaxllm.model.config import ModelConfig
from jaxllm.partition import batch_sharding, make_mesh
from jaxllm.train.config import OptimConfig, PretrainConfig, TrainConfig
from jaxllm.train.optim import make_optimizer
from jaxllm.train.state import build

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter")
TOPOLOGIES = {"v5e:2x2": "v5litepod-4", "v5e:4x4": "v5litepod-16"}


def one_billion():
    """The 1.1 B model that MaxText was measured on: 3.38 GB a device."""
    model = ModelConfig(d_model=2048, n_layers=16, n_heads=16, d_ff=7168, vocab_size=32000, max_seq_len=2048)
    train = TrainConfig(steps=100, batch_size=64, remat="full", loss_chunk=256)
    return model, train, 2048, MeshConfig(data=1, fsdp=16), "v5e:4x4"


def demo():
    cfg = config.load(PretrainConfig, "configs/pretrain/demo.yaml", ["model.vocab_size=4096"])
    return cfg.model, cfg.train, cfg.data.seq_len, MeshConfig(data=1, fsdp=4), "v5e:2x2"


def compile_step(model, train, seq_len, mesh_cfg, topology):
    """Returns (compiled step, seconds, parameters) of the very step that training runs, for a topology's devices."""
    os.environ["TPU_ACCELERATOR_TYPE"] = TOPOLOGIES[topology]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(mesh_cfg, devices)
    program = build(model, train, make_optimizer(OptimConfig(), 100), mesh)
    rows = batch_sharding(mesh)
    kinds = {"token_BT": np.int32, "target_BT": np.int32, "pos_BT": np.int32, "doc_BT": np.int32, "weight_BT": np.float32}
    batch = {k: jax.ShapeDtypeStruct((train.batch_size, seq_len), kind, sharding=rows) for k, kind in kinds.items()}
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["demo", "1.1b"], default="demo")
    name = parser.parse_args().model
    model, train, seq_len, mesh_cfg, topology = {"demo": demo, "1.1b": one_billion}[name]()
    print(json.dumps({"model": name, "topology": topology, **report(*compile_step(model, train, seq_len, mesh_cfg, topology))}))


if __name__ == "__main__":
    main()
