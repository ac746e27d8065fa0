"""How far every mesh is from one device: loss, worst gradient leaf, ten-step curve; relative, float32, 8 emulated devices.

    python benchmarks/mesh_errors.py            # a Markdown table
    python benchmarks/mesh_errors.py context    # the meshes whose names hold a word

The model is the tests' toy (tests/toy.py) with 8 layers for pipelines and 8 experts, top 2, dropless, for `expert`.
"""

import dataclasses
import pathlib
import sys
from functools import partial

ROOT = pathlib.Path(__file__).parents[1]
TRIPLES = ("data fsdp tensor", "stage fsdp tensor", "stage data tensor", "fsdp expert tensor", "fsdp context tensor")
PAIRS = ("data fsdp", "data tensor", "data context", "fsdp tensor", "fsdp context", "context tensor", "stage data",
         "stage fsdp", "stage tensor", "stage context", "data expert", "fsdp expert", "expert tensor", "expert context",
         "stage expert")
ALONE = ("data", "fsdp", "tensor", "context", "stage", "expert")


def meshes():
    """Yields (name, degrees, pipeline's schedule or None)."""
    for axis in ALONE:
        size = 2 if axis == "tensor" else 4 if axis == "context" else 8
        yield f"{axis} {size}", {axis: size}, "1f1b" if axis == "stage" else None
    yield "context 4, ring", {"context": 4, "context_attention": "ring"}, None
    for schedule in ("gpipe", "interleaved", "zero_bubble"):
        yield f"stage 4, {schedule}", {"stage": 4}, schedule
    for names in (*PAIRS, *TRIPLES):
        axes = names.split()
        sizes = dict(zip(axes, (2, 2, 2) if len(axes) == 3 else (4, 2), strict=True))
        yield " x ".join(f"{a} {n}" for a, n in sizes.items()), sizes, "1f1b" if "stage" in axes else None


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import conftest  # noqa: F401  (eight devices)
    import jax
    import numpy as np
    import toy

    from jaxllm.model.config import MoEConfig
    from jaxllm.partition import batch_sharding
    from jaxllm.train.config import TrainConfig
    from jaxllm.train.stages import pipelined, schedule_of
    from jaxllm.train.step import Objective, accumulated

    batches, done = [toy.batch(seed=i) for i in range(10)], {}

    def measure(model, m, mesh, schedule):
        virtual = 2 if schedule == "interleaved" else 1
        settings = {"micro_batches": m} | ({"pipeline": schedule, "virtual_stages": virtual} if schedule else {})
        devices = int(np.prod([n for n in mesh.values() if isinstance(n, int)]))
        prog = toy.program(model, devices=devices, **settings, **mesh)
        objective = Objective(prog.graph, np.dtype(np.float32), 10, 0.0, 0.0, 0.0, model.moe if model.moe.experts else None)
        fun = partial(accumulated, objective, m)
        if schedule:
            train = TrainConfig(steps=1, micro_batches=m, pipeline=schedule, virtual_stages=virtual)
            fun = pipelined(objective, schedule_of(model, train, prog.mesh), prog.mesh, prog.abstract.params)
        with jax.set_mesh(prog.mesh):
            placed = jax.device_put(batches[0], batch_sharding(prog.mesh))
            (loss, _), grads = jax.jit(lambda p, b: fun(p, b, None))(prog.init().params, placed)
        return float(loss), jax.device_get(grads), np.array(toy.run(prog, batches)[1])

    print("| mesh | loss | worst gradient leaf | ten-step curve |\n| --- | --- | --- | --- |")
    for name, mesh, schedule in meshes():
        if len(sys.argv) > 1 and not any(word in name for word in sys.argv[1:]):
            continue
        model = dataclasses.replace(toy.MODEL, n_layers=8 if schedule else 2,
                                    moe=MoEConfig(experts=8, d_ff=32) if "expert" in mesh else MoEConfig())
        m = 8 if schedule else 1
        if (model, m) not in done:
            done[model, m] = measure(model, m, {}, None)
        loss, grads, curve = done[model, m]
        found = measure(model, m, mesh, schedule)
        error, leaf = toy.worst(found[1], grads)
        far = np.max(np.abs(found[2] - curve) / curve)
        print(f"| {name} | {abs(found[0] - loss) / loss:.1e} | {error:.1e} ({leaf}) | {far:.1e} |", flush=True)


if __name__ == "__main__":
    main()
