"""What to change: single changes when a step does not fit, and whole searches. Every answer was compiled, none is guessed."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

from jaxllm.errors import RunError, UserError
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
    for remat in REMATS[REMATS.index(cfg.train.remat) + 1 :]:
        if remat in ("qkv", "full", "dots"):
            yield "remat", f"--train.remat={remat}", with_changes(cfg, train={"remat": remat})
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


def divides(cfg: CompileVerb, sizes: dict[str, int]) -> bool:
    """Returns whether a mesh of these degrees inside each slice divides the model's sizes and the batch."""
    m, rows = cfg.model, cfg.train.batch_size // cfg.train.micro_batches
    split = [(m.d_model, sizes["fsdp"] * cfg.mesh.dcn.fsdp)]
    split += [(rows, sizes["data"] * sizes["fsdp"] * sizes["expert"] * cfg.slices)]
    split += [(size, sizes["tensor"]) for size in (m.kv_heads, m.ff_width, m.vocab_size)]
    return all(size % parts == 0 for size, parts in split)


def search(cfg: CompileVerb, topology: Topology, compile_one: Callable, say: Callable) -> list[dict]:
    """Returns a row for each way that was compiled, `best` where none is better in both peak memory and step time."""
    rows = []
    for mesh, remat, micro in ways(cfg, topology)[: cfg.tries]:
        one = with_changes(cfg, mesh=mesh, train={"remat": remat, "micro_batches": micro})
        named = " ".join(f"{a}={n}" for a, n in mesh.items() if n > 1) or "one device"
        say(f"trying {named}, remat {remat}, {micro} micro-batches")
        rows.append({"mesh": named, "remat": remat, "micro_batches": micro} | outcome(one, compile_one))
    return mark_best(rows)


def ways(cfg: CompileVerb, topology: Topology) -> list[tuple[dict[str, int], str, int]]:
    """Returns every mesh of the devices with each remat and number of micro-batches that divides, likeliest first."""
    out, in_slice = [], topology.devices // topology.slices
    whole = with_changes(cfg, train={"micro_batches": 1})
    for tensor, data in itertools.product((1, 4, 8, 2), (1, 4)):
        mesh = {"data": data, "fsdp": in_slice // tensor // data, "tensor": tensor}
        if math.prod(mesh.values()) != in_slice or not divides(whole, mesh):
            continue
        parts = data * mesh["fsdp"] * topology.slices
        out += [(mesh, remat, micro) for micro in (1, 2, 4) for remat in ("full", "qkv", "none")
                if cfg.train.batch_size % micro == 0 and (cfg.train.batch_size // micro) % parts == 0]
    # Few micro-batches and little recomputing cost least time; full remat shows first whether a mesh fits at all.
    return sorted({tuple(w[0].items()) + w[1:]: w for w in out}.values(), key=lambda w: (w[2], w[0]["tensor"], w[0]["data"]))


def mark_best(rows: list[dict]) -> list[dict]:
    """Returns the rows by step time, each with `best`: it fits, and no other row that fits is better in one and as good in
    the other."""
    fitting = [r for r in rows if r["fits"]]

    def beaten(r):
        return any(o["peak_gb"] <= r["peak_gb"] and o["step_s"] <= r["step_s"]
                   and (o["peak_gb"], o["step_s"]) != (r["peak_gb"], r["step_s"]) for o in fitting)

    return sorted(({**r, "best": r["fits"] and not beaten(r)} for r in rows), key=lambda r: r["step_s"] or math.inf)
