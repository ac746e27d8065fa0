"""The search of `plan compile --search`: meshes x remat x micro-batches x offload, each compiled."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable

from jaxllm import config
from jaxllm.errors import UserError
from jaxllm.plan.changes import divides, outcome, with_changes
from jaxllm.plan.compile_config import CompileVerb
from jaxllm.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Way:
    data: int
    fsdp: int
    tensor: int
    remat: str
    micro_batches: int
    offload: str = "none"

    @property
    def mesh(self) -> dict[str, int]:
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}

    def needs_more_than(self, other: "Way") -> bool:
        """Returns whether it surely holds more than `other`: the same, but for fewer micro-batches or less recomputing.

        Of two remats that keep different tensors neither is known to hold more; `full` keeps least, `none` most.
        """
        kept = self.remat == other.remat or other.remat == "full" or self.remat == "none"
        return self.mesh == other.mesh and self.offload == other.offload and kept and self.micro_batches <= other.micro_batches


def search(cfg: CompileVerb, topology: Topology, compile_one: Callable, say: Callable) -> list[dict]:
    """Returns a row for each way that was compiled, `best` where none is better in both peak memory and step time.

    What surely needs more than something that did not fit is passed over, and costs no try.
    """
    notes, rows, refused, spent = Notes(cfg), [], [], []
    candidates = ways(cfg, topology)
    for way in candidates:
        if len(rows) >= cfg.tries:
            break
        if any(way.needs_more_than(other) for other in refused):
            continue
        settings = {"remat": way.remat, "micro_batches": way.micro_batches, "offload": way.offload}
        one = with_changes(cfg, mesh=way.mesh, train=settings)
        found = notes.of(one)
        if found is None:
            n = min(cfg.tries, len(candidates))
            say(f"{len(rows) + 1} of {n}{left(spent, n - len(rows))}: {named(way)}")
            began = time.perf_counter()
            found = outcome(one, compile_one)
            spent.append(time.perf_counter() - began)
            notes.add(one, found)
        if not found["fits"]:
            refused.append(way)
        rows.append({"mesh": mesh_name(way)} | settings | found)
    return mark_best(rows)


def mesh_name(way: Way) -> str:
    return " ".join(f"{a}={n}" for a, n in way.mesh.items() if n > 1) or "one device"


def named(way: Way) -> str:
    host = "" if way.offload == "none" else f", {way.offload} on the host"
    return f"{mesh_name(way)}, remat {way.remat}, {way.micro_batches} micro-batch{'es' * (way.micro_batches > 1)}{host}"


def left(spent: list[float], n: int) -> str:
    """Returns how long n more will take at most, from the median of what was compiled in this run; nothing at the first."""
    if not spent:
        return ""
    seconds = sorted(spent)[len(spent) // 2] * n
    return f", some {math.ceil(seconds / 60)} min left" if seconds > 90 else f", some {math.ceil(seconds)} s left"


def ways(cfg: CompileVerb, topology: Topology) -> list[Way]:
    """Returns every mesh of the devices with each remat, number of micro-batches and offload that divides, likeliest first.

    Little recomputing and few micro-batches cost least time; `full` comes first of a mesh, as it shows whether anything fits.
    """
    expert, out = cfg.mesh.expert, []
    inside = topology.devices // topology.slices // (cfg.mesh.stage * cfg.mesh.context * expert)
    whole = with_changes(cfg, train={"micro_batches": 1})
    for tensor, data in itertools.product((1, 2, 4, 8), (1, 2, 4)):
        mesh = {"data": data, "fsdp": inside // tensor // data, "tensor": tensor}
        if math.prod(mesh.values()) != inside or not divides(whole, mesh | {"expert": expert}):
            continue
        parts = data * mesh["fsdp"] * expert * topology.slices
        out += [Way(**mesh, remat=remat, micro_batches=micro) for micro in (1, 2, 4) for remat in ("full", "qkv", "none")
                if cfg.train.batch_size % micro == 0 and (cfg.train.batch_size // micro) % parts == 0]
        if cfg.train.sync == "every_step":
            out.append(Way(**mesh, remat="full", micro_batches=1, offload="optimizer" if cfg.mesh.stage > 1 else "both"))

    def likeliest(way: Way):
        apart = math.log2(way.tensor * way.data)  # fsdp alone holds least
        return way.micro_batches + 2 * (way.offload != "none") + apart, apart, way.remat != "full"

    return sorted(out, key=likeliest)


def mark_best(rows: list[dict]) -> list[dict]:
    """Returns the rows by step time, each with `best`: it fits, and no other row that fits is better in one and as good in
    the other."""
    fitting = [r for r in rows if r["fits"]]

    def beaten(r):
        return any(o["peak_gb"] <= r["peak_gb"] and o["step_s"] <= r["step_s"]
                   and (o["peak_gb"], o["step_s"]) != (r["peak_gb"], r["step_s"]) for o in fitting)

    return sorted(({**r, "best": r["fits"] and not beaten(r)} for r in rows), key=lambda r: r["step_s"] or math.inf)


class Notes:
    """What was compiled, a line of JSON each in `results`; without the file nothing is known and nothing is written."""

    def __init__(self, cfg: CompileVerb):
        self.path, self.known, self.cut = cfg.results and pathlib.Path(cfg.results), {}, False
        if not self.path or not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8")
        self.cut = bool(text) and not text.endswith("\n")  # by a kill
        for n, line in enumerate(text.splitlines(), 1):
            try:
                one = json.loads(line)
                self.known[one.pop("of")] = one
            except (ValueError, KeyError, AttributeError, TypeError):
                if not line.startswith('{"of"'):
                    raise UserError(f"{self.path}, line {n}: is no line of a search; give --results another file") from None

    def of(self, cfg: CompileVerb) -> dict | None:
        return self.known.get(key(cfg)) if self.known else None

    def add(self, cfg: CompileVerb, found: dict) -> None:
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" * self.cut + json.dumps({"of": key(cfg)} | found) + "\n")
            self.cut = False


def key(cfg: CompileVerb) -> str:
    """Returns what a result depends on, as a digest: the settings, the source and the compiler."""
    settings = config.to_dict(cfg)
    for name in ("tries", "fit", "search", "results", "picture", "hlo", "run", "checkpoint", "log"):
        settings.pop(name, None)
    return hashlib.sha256(f"{settings}{importlib.metadata.version('jax')}{source()}".encode()).hexdigest()[:16]


@functools.cache
def source() -> str:
    package = pathlib.Path(__file__).parents[1]
    return "".join(path.read_text(encoding="utf-8") for path in sorted([*package.rglob("*.py"), *package.rglob("*.yaml")]))
