"""What to change when a step does not fit: single changes. Every answer was compiled, none is guessed."""

import dataclasses
import math
from collections.abc import Callable, Iterator

from jaxllm.errors import RunError, UserError
from jaxllm.model.remat import named
from jaxllm.plan.compile_config import CompileVerb
from jaxllm.plan.topology import Topology

REMATS = ("none", "dots", "mlp", "qkv_attention", "qkv", "attention", "full")  # from the most kept to the least
AXES = ("data", "fsdp", "tensor")


def with_changes(cfg: CompileVerb, **groups) -> CompileVerb:
    """Returns the settings with keys of some groups replaced: with_changes(cfg, train={"remat": "full"})."""
    return dataclasses.replace(cfg, **{g: dataclasses.replace(getattr(cfg, g), **keys) for g, keys in groups.items()})


def single_changes(cfg: CompileVerb, topology: Topology, found: dict, compile_one: Callable, say: Callable) -> list[dict]:
    """Returns a row for each change that was tried alone, likeliest first, until one of each kind fits or `tries` are spent."""
    rows, done = [], set()
    inside = {axis: n // getattr(cfg.mesh.dcn, axis, 1) for axis, n in found["mesh"].items()}  # of a slice
    for kind, change, changed in candidates(cfg, topology, inside):
        if len(rows) >= cfg.tries or kind in done:
            continue
        say(f"trying {change}")
        rows.append({"kind": kind, "change": change} | outcome(changed, compile_one))
        if rows[-1]["fits"]:
            done.add(kind)
    return sorted(rows, key=lambda r: (not r["fits"], r["step_s"] or math.inf))


def outcome(cfg: CompileVerb, compile_one: Callable) -> dict:
    try:
        found = compile_one(cfg)
    except (UserError, RunError) as e:
        return {"fits": False, "peak_gb": None, "step_s": None, "why": str(e)}
    if "refused" in found:
        needs = found["refused"]["needs"]
        return {"fits": False, "peak_gb": needs and needs / 1e9, "step_s": None, "why": "the compiler refuses"}
    return {"fits": found["fits"], "peak_gb": found["memory"]["peak"] / 1e9, "step_s": found["step_s"][1], "why": ""}


def candidates(cfg: CompileVerb, topology: Topology, sizes: dict[str, int]) -> Iterator[tuple[str, str, CompileVerb]]:
    """Yields (kind, what to write, settings) of changes that need less memory, of each kind the mildest first."""
    kept = REMATS.index(cfg.train.remat) if cfg.train.remat in REMATS else REMATS.index("dots")
    for remat in REMATS[kept + 1 :]:
        if remat in ("qkv", "full", "dots"):
            yield "remat", f"--train.remat={remat}", with_changes(cfg, train={"remat": remat})
    for offload in offloads(cfg, sizes):
        yield "offload", f"--train.offload={offload}", with_changes(cfg, train={"offload": offload})
    rows = cfg.train.batch_size // (sizes["data"] * sizes["fsdp"] * sizes["expert"] * topology.slices)
    for n in (2, 4, 8):
        if cfg.train.micro_batches * n <= rows and rows % (cfg.train.micro_batches * n) == 0:
            yield ("micro-batches", f"--train.micro_batches={cfg.train.micro_batches * n}",
                   with_changes(cfg, train={"micro_batches": cfg.train.micro_batches * n}))
    for axis in ("fsdp", "tensor"):
        for donor in ("data", "tensor" if axis == "fsdp" else "fsdp"):
            for n in dict.fromkeys((2, 4, 8, sizes[donor])):
                if n > 1 and sizes[donor] % n == 0:
                    mesh = {axis: sizes[axis] * n, donor: sizes[donor] // n}
                    if divides(cfg, sizes | mesh):
                        words = " ".join(f"--mesh.{a}={k}" for a, k in mesh.items())
                        yield "axis", words, with_changes(cfg, mesh={a: (sizes | mesh)[a] for a in AXES})
    for chunk in (cfg.train.loss_chunk // 2, cfg.train.loss_chunk // 8):
        if chunk >= 16:
            yield "loss chunk", f"--train.loss_chunk={chunk}", with_changes(cfg, train={"loss_chunk": chunk})


def offloads(cfg: CompileVerb, sizes: dict[str, int]) -> list[str]:
    """Returns the values of train.offload that take more to the host than the settings do, as far as they can."""
    if cfg.train.sync != "every_step":
        return []
    more = {"none": ["optimizer", "both"], "optimizer": ["both"], "activations": ["both"], "both": []}[cfg.train.offload]
    return [o for o in more if o == "optimizer" or (named(cfg.train.remat) is not None and sizes.get("stage", 1) == 1)]


def divides(cfg: CompileVerb, sizes: dict[str, int]) -> bool:
    """Returns whether a mesh of these degrees inside each slice divides the model's sizes and the batch."""
    m, rows = cfg.model, cfg.train.batch_size // cfg.train.micro_batches
    split = [(m.d_model, sizes["fsdp"] * cfg.mesh.dcn.fsdp)]
    split += [(rows, sizes["data"] * sizes["fsdp"] * sizes["expert"] * cfg.slices)]
    split += [(size, sizes["tensor"]) for size in (m.kv_heads, m.ff_width, m.vocab_size)]
    return all(size % parts == 0 for size, parts in split)
