"""Counts what a chip sends in a step as a mesh axis grows and its work stays the same, from programs compiled for TPUs.

    python benchmarks/weak_scaling.py [--picture=docs/pictures/weak-scaling.svg] [--jobs=2]

No TPU is needed, but the TPU compiler is (`jaxllm plan compile` says how to install it). The model has two layers, so that a
program compiles in a minute; its width is such that 256 parts of it are whole tiles. One row of 1024 positions a chip, or for
each four with `tensor`.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).parents[1]
CHIPS = (8, 64, 256)
MESHES = {  # name -> degrees on n chips
    "data": lambda n: {"data": n, "fsdp": 1, "tensor": 1},
    "fsdp": lambda n: {"data": 1, "fsdp": n, "tensor": 1},
    "fsdp x tensor 4": lambda n: {"data": 1, "fsdp": n // 4, "tensor": 4},
}
MODEL = {"d_model": 4096, "n_layers": 2, "n_heads": 32, "d_ff": 8192, "vocab_size": 4096, "max_seq_len": 1024}


def measured(name: str, chips: int) -> dict:
    """Returns what a chip sends in a step of this mesh, by axis and kind."""
    mesh = MESHES[name](chips)
    with tempfile.TemporaryDirectory() as folder:
        settings, result = pathlib.Path(folder) / "small.yaml", pathlib.Path(folder) / "found.json"
        settings.write_text(json.dumps({"model": MODEL, "mesh": mesh, "data": {"seq_len": 1024},
                                        "train": {"steps": 10, "batch_size": mesh["data"] * mesh["fsdp"], "remat": "full"}}))
        subprocess.run([sys.executable, "-m", "jaxllm", "plan", "compile", str(settings), f"--topology=v5e-{chips}",
                        f"--json={result}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found = json.loads(result.read_text(encoding="utf-8"))
    return {"mesh": name, "chips": chips, "rows": found["collectives"]}


def totals(one: dict) -> tuple[int, float]:
    return sum(r["times"] for r in one["rows"]), 1e3 * sum(r["sent_gb"] for r in one["rows"])


def table(found: list[dict]) -> str:
    lines = ["| mesh | chips | collectives a step | MB a chip sends | by axis and kind: runs, MB |", "|" + " --- |" * 5]
    for one in found:
        times, sent = totals(one)
        each = "; ".join(f"{r['axis']} {r['kind']} {r['times']}, {1e3 * r['sent_gb']:.1f}"
                         for r in sorted(one["rows"], key=lambda r: -r["sent_gb"]) if r["sent_gb"] > 1e-5)
        lines.append(f"| {one['mesh']} | {one['chips']} | {times} | {sent:.1f} | {each} |")
    return "\n".join(lines)


def draw(found: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, sides = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for name in MESHES:
        own = [one for one in found if one["mesh"] == name]
        for side, values in zip(sides, zip(*map(totals, own), strict=True), strict=True):
            side.plot([one["chips"] for one in own], values, marker="o", label=name)
    for side, title in zip(sides, ("collectives a step", "MB that a chip sends in a step"), strict=True):
        side.set(xscale="log", xticks=CHIPS, xlabel="chips (each with the same work)", title=title)
        side.set_xticks(CHIPS, map(str, CHIPS))
        side.minorticks_off()
        side.set_ylim(bottom=0)
        side.grid(alpha=0.3)
    sides[0].legend(loc="lower right", bbox_to_anchor=(1, 0.15))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def main(argv: list[str]) -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--picture", help="file to draw into: .svg, .png or .pdf")
    words.add_argument("--jobs", type=int, default=1, help="programs compiled at a time")
    chosen = words.parse_args(argv)
    with ThreadPoolExecutor(chosen.jobs) as pool:
        found = list(pool.map(lambda way: measured(*way), [(name, chips) for name in MESHES for chips in CHIPS]))
    print(table(found))
    if chosen.picture:
        draw(found, chosen.picture)


if __name__ == "__main__":
    main(sys.argv[1:])
