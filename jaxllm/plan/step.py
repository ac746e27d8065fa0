"""Compiles one training step for TPUs that are not there, and says what it holds. Run as a program, in its own process:
jax then has no device but those of the topology, and a compiler that gives up takes nothing with it.

    python -m jaxllm.plan.step SETTINGS.yaml RESULT.json
"""

import json
import math
import pathlib
import re
import sys
import time

from jaxllm import config
from jaxllm.errors import UserError
from jaxllm.plan.compile_config import CompileVerb

GIB = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main(settings: str, result: str) -> None:
    try:
        found = measure(config.load(CompileVerb, settings))
    except UserError as e:
        found = {"mistake": str(e)}
    pathlib.Path(result).write_text(json.dumps(found), encoding="utf-8")


def measure(cfg: CompileVerb) -> dict:
    """Returns the memory, the collectives and the cycles of the very step that training runs, on one device."""
    import jax
    import numpy as np

    from jaxllm.parallel.context import check_length
    from jaxllm.partition import batch_sharding
    from jaxllm.plan.topology import find
    from jaxllm.train.optim import make_optimizer
    from jaxllm.train.pretrain import n_steps
    from jaxllm.train.state import build, check_groups

    topology = find(cfg.topology, cfg.slices)
    mesh = mesh_of(cfg, topology)
    check_length(cfg.data.seq_len, mesh)
    check_groups(cfg.train, mesh)
    optimizer = make_optimizer(cfg.optim, n_steps(cfg), cfg.model, noise_steps=cfg.train.noise_scale)
    program = build(cfg.model, cfg.train, optimizer, mesh)
    rows = batch_sharding(mesh)
    kinds = {"token_BT": np.int32, "target_BT": np.int32, "pos_BT": np.int32, "doc_BT": np.int32, "weight_BT": np.float32}
    shape = cfg.train.batch_size, cfg.data.seq_len
    batch = {k: jax.ShapeDtypeStruct(shape, kind, sharding=rows) for k, kind in kinds.items()}
    began = time.perf_counter()
    out = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(program.abstract.params)), "mesh": dict(mesh.shape)}
    out["held"] = held(cfg, program)
    with jax.set_mesh(mesh):
        lowered = program.train_step.lower(program.abstract, batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            return out | too_large(str(e)) | {"compile_s": round(time.perf_counter() - began, 1)}
    text = compiled.as_text()
    if cfg.hlo:
        pathlib.Path(cfg.hlo).write_text(text, encoding="utf-8")
    out |= {"compile_s": round(time.perf_counter() - began, 1), "memory": memory(compiled)}
    return out | of_text(cfg, text, mesh, topology)


def mesh_of(cfg: CompileVerb, topology):
    """Returns the run's mesh over the topology's devices."""
    from jax.experimental import topologies

    from jaxllm.partition import make_mesh

    several = {"num_slices": topology.slices} if topology.slices > 1 else {}
    megacore = {"chip_config_name": "megacore"} if topology.name.startswith("v4-") else {}  # two cores, one device
    named = {"platform": "tpu", "topology_name": topology.jax_name}
    return make_mesh(cfg.mesh, topologies.get_topology_desc(**named, **megacore, **several).devices)


def memory(compiled) -> dict:
    """Returns XLA's own account, in bytes.

    `alive` is the most that is held at once. `peak` adds up arguments, temporaries and outputs as `memory_analysis` tells
    them: on a TPU its temporaries count what a loop carries twice, so it is an upper bound (docs/plan-compile.md). What is in
    the host's memory counts apart: arguments there are moments, temporaries are what layers keep.
    """
    m = compiled.memory_analysis()
    peak = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return {"peak": peak, "arguments": m.argument_size_in_bytes, "temporaries": m.temp_size_in_bytes,
            "program": m.generated_code_size_in_bytes, "alive": getattr(m, "peak_memory_in_bytes", None),
            "host_arguments": m.host_argument_size_in_bytes, "host_temporaries": m.host_temp_size_in_bytes}


def held(cfg: CompileVerb, program) -> dict:
    """Returns the bytes of what the step holds by name, on one device, from the types and placements."""
    import jax

    from jaxllm.partition import batch_parts
    from jaxllm.train.state import compute_dtype

    def local(tree):
        return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))

    mesh, params = program.mesh.shape, local(program.abstract.params)
    kind = compute_dtype(cfg.train.precision, "tpu").itemsize
    rows = cfg.train.batch_size // cfg.train.micro_batches // batch_parts(program.mesh)
    positions = min(cfg.train.loss_chunk, cfg.data.seq_len) // mesh["context"]
    return {"parameters": params, "optimizer": local(program.abstract.opt_state),
            "gradients": params if cfg.train.micro_batches > 1 else params * kind // 4,
            "logits": rows * positions * cfg.model.vocab_size * 4 // mesh["tensor"]}


def of_text(cfg: CompileVerb, text: str, mesh, topology) -> dict:
    """Returns what the compiled program's text tells: collectives, cycles, activations kept for the backward pass."""
    from jaxllm.plan import collectives, cycles, hlo
    from jaxllm.plan.topology import link_seconds

    module, sizes = hlo.parse(text), dict(mesh.shape)
    places = [(tuple(d.coords), getattr(d, "slice_index", 0) or 0) for d in mesh.devices.flat]
    found = collectives.read(module, sizes, {"data": cfg.mesh.dcn.data, "fsdp": cfg.mesh.dcn.fsdp})

    def seconds(c):
        return link_seconds(topology, c.kind, c.sent, [places[i] for i in c.group])[0]

    count = cycles.count(module)
    return {
        "collectives": collectives.table(found, seconds), "per_layer": collectives.per_layer(found, cfg.model.n_layers),
        "cycles": count.total, "cycles_by_part": count.by_part, "kernels": count.kernels, "unread_loops": count.unread_loops,
        "activations": kept(module, cfg.model.n_layers),
    }


def kept(module, n_layers: int) -> float | None:
    """Returns the bytes of arrays that the loop over the layers writes one slice a layer of, for the backward pass.

    None where there is no such loop.
    """
    from jaxllm.plan.hlo import array_bytes

    loops = [i for c in module.computations.values() for i in c
             if i.opcode == "while" and module.trips(i) == n_layers and "transpose(" not in i.op_name and "jvp" in i.op_name]
    if not loops:
        return None
    stacked = rf"\w+\[{n_layers},[\d,]+\]"
    body = {i.name: i for i in module.computations[loops[0].called["body"]]}
    root = next(i for i in reversed(body.values()) if i.opcode == "tuple")
    own = next(i.name for i in body.values() if i.opcode == "parameter")
    passed = [body[o].shape for o in root.operands if o in body and body[o].opcode == "get-tuple-element"
              and body[o].operands == (own,)]  # as they came
    return sum(sum(array_bytes(a)) for shape in (loops[0].shape,) for a in re.findall(stacked, shape)) - sum(
        sum(array_bytes(a)) for shape in passed for a in re.findall(stacked, shape))


def too_large(message: str) -> dict:
    """Returns what the compiler's refusal tells: how much it would need and which arrays are the largest."""
    def size(*patterns):
        found = next(filter(None, (re.search(pattern, message) for pattern in patterns)), None)
        return float(found[1]) * GIB[found[2]] if found else None

    largest = re.findall(r"Size: ([\d.]+)([KMGT]?)\s+(?:Operator: op_name=\"([^\"]*)\"|Shape)", message)
    return {"refused": {"needs": size(r"Used ([\d.]+)([KMGT]?) of", r"temporaries \(([\d.]+)([KMGT]?)\)"),
                        "has": size(r"of ([\d.]+)([KMGT]?) hbm", r"available HBM \(([\d.]+)([KMGT]?)\)"),
                        "largest": [{"bytes": float(n) * GIB[u], "from": name} for n, u, name in largest[:5]]}}


if __name__ == "__main__":
    main(*sys.argv[1:])
