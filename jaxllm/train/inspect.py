"""`jaxllm inspect RUN`: what a checkpoint holds, how large it is, where its arrays live, and their digests."""

import hashlib
import json
import pathlib

import jax
import numpy as np

from jaxllm.errors import UserError
from jaxllm.partition import leaf_name, spec
from jaxllm.train.checkpoint import Checkpoints, run_mesh, tell_damaged
from jaxllm.train.config import InspectVerb
from jaxllm.train.offload import looked_at
from jaxllm.train.optim import is_variable, make_optimizer
from jaxllm.train.pretrain import n_steps
from jaxllm.train.run_folder import read_config, read_yaml
from jaxllm.train.state import build


def main(cfg: InspectVerb) -> dict:
    """Prints the newest checkpoint, or that of `cfg.step`; returns the same as a dict."""
    folder = pathlib.Path(cfg.run)
    if read_yaml(folder).get("verb", "pretrain") != "pretrain":
        return of_another_verb(folder, cfg)
    run = read_config(folder)
    mesh = run_mesh(run)
    optimizer = make_optimizer(run.optim, n_steps(run), run.model, noise_steps=run.train.noise_scale)
    program = build(run.model, looked_at(run.train), optimizer, mesh)
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(program.abstract, cfg.step, damaged=tell_damaged)
        steps = checkpoints.steps()
    if found is None:
        raise UserError(f"{folder}: no checkpoint that can be read; steps there: {steps or 'none'}")
    state, position = found
    step = int(state.step)
    result = {
        "run": str(folder), "step": step, "steps": n_steps(run), "tokens": step * run.train.batch_size * run.data.seq_len,
        "checkpoints": steps, "parameters": by_part(state.params), "arrays": arrays(state.params),
    }
    if cfg.digest:
        result["digest"] = digests(state, position)
    show(result)
    return result


def of_another_verb(folder: pathlib.Path, cfg: InspectVerb) -> dict:
    """Prints a checkpoint of sft, reward, dpo or rlhf as it lies on disk; returns the same as a dict."""
    with Checkpoints(folder) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise UserError(f"{folder}: no checkpoint that can be read; steps there: none")
        step = steps[-1] if cfg.step is None else cfg.step
        state, position = checkpoints.read_raw(step)
    found = [(leaf_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(state)]
    parameters: dict[str, int] = {}
    for name, x in found:
        parameters[name.split(".")[0]] = parameters.get(name.split(".")[0], 0) + int(x.size)
    result = {"run": str(folder), "step": step, "checkpoints": steps, "numbers": parameters,
              "arrays": [{"name": name, "shape": list(x.shape), "type": str(x.dtype)} for name, x in found]}
    print(f"{folder}: step {step}; checkpoints: {', '.join(map(str, steps))}")
    for part, n in parameters.items():
        print(f"  {part:<12}{n:>16,} numbers")
    for a in result["arrays"]:
        print(f"  {a['name']:<60}  {' x '.join(map(str, a['shape'])):<24}  {a['type']}")
    if cfg.digest:
        result["digest"] = digests(state, position)
        print("\nSHA-256")
        for name, value in result["digest"].items():
            print(f"  {name:<60}  {value}")
    return result


def by_part(params) -> dict[str, int]:
    """Returns the number of parameters of the embedding, of each kind of layer, of the head, and of all."""
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = leaf_name(path)
        kinds = [k for k in name.split("blocks_L.")[-1].split(".") if not k.startswith("layer_")]
        part = kinds[0] if "blocks_L" in name else name.split(".")[-1].split("_")[0]
        counts[part] = counts.get(part, 0) + leaf.size
    return counts | {"all": sum(counts.values())}


def arrays(params) -> list[dict]:
    """Returns name, shape, logical axes and mesh axes of every parameter."""
    out = []
    for path, var in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable):
        axes = ("layers",) * (var.ndim - len(var.axes)) + tuple(var.axes)
        placed = ["+".join(a) if isinstance(a, tuple) else a or "-" for a in spec(*axes)]
        out.append({"name": leaf_name(path), "shape": list(var.shape), "axes": list(axes), "mesh": placed})
    return out


def digests(state, position: dict) -> dict[str, str]:
    """Returns a SHA-256 of every array of a state and of the data position, and one over all of them."""
    found = {leaf_name(path): hashlib.sha256(np.ascontiguousarray(jax.device_get(leaf)).tobytes()).hexdigest()
             for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    found["data position"] = hashlib.sha256(json.dumps(position, sort_keys=True).encode()).hexdigest()
    return found | {"all": hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()}


def show(result: dict) -> None:
    print(f"{result['run']}: step {result['step']} of {result['steps']}, {result['tokens']:,} tokens; "
          f"checkpoints: {', '.join(map(str, result['checkpoints']))}")
    print("\nparameters by part")
    for part, n in result["parameters"].items():
        print(f"  {part:<12}{n:>16,}")
    print("\narray, shape, logical axes, mesh axes")
    width = max(len(a["name"]) for a in result["arrays"])
    for a in result["arrays"]:
        shape = " x ".join(map(str, a["shape"]))
        print(f"  {a['name']:<{width}}  {shape:<24}  {', '.join(a['axes']):<42}  {', '.join(a['mesh'])}")
    if "digest" in result:
        print("\nSHA-256")
        width = max(map(len, result["digest"]))
        for name, value in result["digest"].items():
            print(f"  {name:<{width}}  {value}")
