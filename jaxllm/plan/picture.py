"""A search as a picture: peak memory against step time, the front that nothing beats as a line."""

import pathlib

from jaxllm.errors import UserError, check_folder
from jaxllm.plan.topology import Topology

KINDS = (".svg", ".png", ".pdf")


def check_picture(path: str) -> None:
    """Raises UserError when a picture could not be written, before anything is compiled."""
    if pathlib.Path(path).suffix not in KINDS:
        raise UserError(f"picture={path}: should end in {', '.join(KINDS)}")
    check_folder("picture", path)


def draw(rows: list[dict], topology: Topology, path: str) -> None:
    """Draws every way that has both figures; the chip's memory is a dashed line where it is near."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shown = [r for r in rows if r["step_s"] is not None]
    front = sorted((r for r in shown if r["best"]), key=lambda r: r["peak_gb"])
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for best, colour, label in ((False, "#9aa5b1", "beaten, or does not fit"), (True, "#1f6f8b", "none is better in both")):
        own = [r for r in shown if r["best"] is best]
        axes.scatter([r["peak_gb"] for r in own], [r["step_s"] for r in own], color=colour, label=label, zorder=3)
    axes.plot([r["peak_gb"] for r in front], [r["step_s"] for r in front], color="#1f6f8b", linewidth=1)
    for r in front:
        host = "" if r["offload"] == "none" else f", {r['offload']} on the host"
        axes.annotate(f"{r['mesh']}\n{r['remat']}, {r['micro_batches']} micro{host}", (r["peak_gb"], r["step_s"]),
                      xytext=(6, 4), textcoords="offset points", fontsize=7)
    memory = topology.chip.memory_bytes / 1e9
    if shown and memory < 3 * max(r["peak_gb"] for r in shown):
        axes.axvline(memory, color="#b03a2e", linestyle="--", linewidth=1, label=f"memory of a {topology.chip.name}")
    axes.set(xlabel="peak memory of one device, GB", ylabel="seconds of a step, nothing hidden",
             title=f"{len(shown)} ways compiled for {topology.name}")
    axes.margins(0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxllm"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.endswith(".svg") else None)
