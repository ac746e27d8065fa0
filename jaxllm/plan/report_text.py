"""The plan's findings as text."""

from jaxllm.plan.compile_config import CompileVerb
from jaxllm.plan.topology import Topology


def whole(cfg: CompileVerb, topology: Topology, found: dict) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1) or "one device"
    slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
    lines = [
        f"{found['parameters'] / 1e9:.3f} B parameters on {slices}{topology.name} ({topology.devices} {topology.chip.name}): "
        f"mesh {mesh}, {cfg.train.batch_size} x {cfg.data.seq_len} tokens a step, remat {cfg.train.remat}, "
        f"{cfg.train.micro_batches} micro-batches, loss chunk {cfg.train.loss_chunk}; compiled in {found['compile_s']:.0f} s",
        "", *memory(found),
    ]
    if "refused" in found:
        return "\n".join(lines + changes(found))
    return "\n".join([*lines, *changes(found), "", *collectives(found), "", *time(topology, found)])


def memory(found: dict) -> list[str]:
    has, lines = found["memory_bytes"], ["memory of one device, GB:"]
    offload = found["offload"]
    where = {"optimizer": "optimizer, on the host" if offload in ("optimizer", "both") else "optimizer"}
    lines += [f"  {where.get(name, name):<34}{size / 1e9:9.3f}" for name, size in found["held"].items()]
    if "refused" in found:
        refused = found["refused"]
        needs = f"{(refused['needs'] or 0) / 1e9:9.3f}  of {has / 1e9:.2f}: DOES NOT FIT"
        lines.append(f"  {'the compiler refuses: it needs':<34}{needs}")
        return lines + [f"    {one['bytes'] / 1e9:8.3f}  {one['from']}" for one in refused["largest"]]
    kept = found["activations"] if offload in ("none", "optimizer") else None  # on the host they are told apart below
    if kept is not None:
        lines.append(f"  {'activations kept for the backward':<34}{kept / 1e9:9.3f}")
    m = found["memory"]
    named = found["held"]["gradients"] + found["held"]["logits"] + (kept or 0)
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    lines += [f"  {'other buffers, gaps included':<34}{max(m['temporaries'] - named, 0) / 1e9:9.3f}",
              *([f"  {'alive at once, at most':<34}{m['alive'] / 1e9:9.3f}"] if m.get("alive") and offload == "none" else []),
              f"  {'peak':<34}{m['peak'] / 1e9:9.3f}  of {has / 1e9:.2f}: {verdict}"]
    if offload == "none":
        return lines
    return [*lines, f"  {'host memory, for one device':<34}{(m['host_arguments'] + m['host_temporaries']) / 1e9:9.3f}  moments "
                    f"{m['host_arguments'] / 1e9:.3f}, activations {m['host_temporaries'] / 1e9:.3f}"]


def changes(found: dict) -> list[str]:
    if "changes" not in found:
        return []
    lines = ["", "one change at a time, tried:"]
    for row in found["changes"]:
        need = "refused" if row["peak_gb"] is None else f"{row['peak_gb']:.2f} GB"
        step = f", {row['step_s']:.2f} s a step" if row["step_s"] else ""
        why = f"  ({row['why']})" if row["why"] else ""
        lines.append(f"  {row['change']:<40} {need:>12}  {'FITS' if row['fits'] else 'does not fit'}{step}{why}")
    if not any(row["fits"] for row in found["changes"]):
        lines.append("  none of them is enough alone; --search tries them together")
    return lines


def collectives(found: dict) -> list[str]:
    lines = ["collectives of a step:", f"  {'axis':<24}{'kind':<20}{'in program':>11}{'runs':>7}{'GB sent':>10}{'link s':>9}"]
    lines += [f"  {r['axis']:<24}{r['kind']:<20}{r['in_program']:>11}{r['times']:>7}{r['sent_gb']:>10.3f}{r['seconds']:>9.4f}"
              for r in found["collectives"]]
    each = ", ".join(f"{n} {name}" for name, n in found["per_layer"].items())
    note = ["  (a sum over several directions of the network counts once for each)"] if "reduce-scatter" in each else []
    return [*lines, f"  a layer, forward and backward: {each or 'none'}", *note]


def time(topology: Topology, found: dict) -> list[str]:
    parts = ", ".join(f"{name} {n / topology.clock_hz:.3f}" for name, n in found["cycles_by_part"].items())
    lines = [
        "seconds of a step:",
        f"  {found['compute_s']:.3f}  compute: {found['cycles'] / 1e6:,.0f} M cycles that XLA estimates, at "
        f"{topology.generation.clock_ghz:g} GHz ({parts})",
        f"  {found['kernels_s']:.3f}  attention kernels, {found['kernels']} runs without an estimate: their FLOPs at the peak",
        f"  {found['links_s']:.3f}  collectives, on their links with nothing else going on",
        *([f"  {found['host_s']:.3f}  to the host's memory and back, one after the other, at "
           f"{topology.generation.pcie_gb_per_s:g} GB/s"] if found["host_s"] else []),
        f"  {found['roofline_s']:.3f}  roofline: model FLOPs at the chip's peak",
        f"  {found['step_s'][0]:.3f} to {found['step_s'][1]:.3f}  a step, transfers hidden wholly to not at all: "
        f"MFU {found['roofline_s'] / found['step_s'][0]:.0%} to {found['roofline_s'] / found['step_s'][1]:.0%}",
    ]
    if found["unread_loops"]:
        lines.append(f"  ! {found['unread_loops']} loops whose rounds could not be read are counted once")
    if found["copies"]:
        lines.append("  ! the partitioner copies an array whole to place it anew (Involuntary full rematerialization)")
    return lines


def pareto(rows: list[dict], topology: Topology) -> str:
    lines = [f"{len(rows)} ways compiled for {topology.name}; * = none is better in both memory and time",
             f"  {'':2}{'mesh':<28}{'remat':<15}{'micro':>6}  {'offload':<10}{'peak GB':>9}{'step s':>9}"]
    for r in rows:
        peak = "-" if r["peak_gb"] is None else f"{r['peak_gb']:.2f}"
        step = "-" if r["step_s"] is None else f"{r['step_s']:.3f}"
        note = "" if r["fits"] else "  " + (r["why"] or "does not fit")
        way = f"{'* ' if r['best'] else '  '}{r['mesh']:<28}{r['remat']:<15}{r['micro_batches']:>6}  {r['offload']:<10}"
        lines.append(f"  {way}{peak:>9}{step:>9}{note}")
    if not any(r["fits"] for r in rows):
        lines.append("  none fits; a larger slice is needed, or more --tries")
    return "\n".join(lines)
