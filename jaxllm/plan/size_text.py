"""The findings of `jaxllm plan size` as text, at most 110 columns."""

import math
import textwrap

from jaxllm.plan import laws
from jaxllm.plan.budget import DAY
from jaxllm.plan.size_config import SizeVerb

COLUMNS = 110
TABLE_LAWS = ("approach_1", "approach_2", "table_a3", "epoch")  # of the table by size: the paper's own columns, and the default


def whole(cfg: SizeVerb, found: dict) -> str:
    parts = [head(cfg, found), plan(found), training(cfg, found), serving(cfg, found), judged(cfg, found), spread(cfg, found),
             table(found), reported(found)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def head(cfg: SizeVerb, found: dict) -> list[str]:
    unit = {"flops": "{} FLOPs", "chip_hours": "{} chip-hours", "usd": "{} USD", "days": "{} days", "tokens": "{} tokens",
            "parameters": "{} parameters", "latency_ms": "{} ms a token"}
    shown = ", ".join(unit[k].format(flops(v) if k == "flops" else count(v) if v >= 1e5 else f"{v:,g}")
                      for k, v in found["given"].items())
    chips = f", {cfg.hardware.chips:,} x {cfg.hardware.chip}" if cfg.hardware.chips else f", {cfg.hardware.chip}"
    return [f"given: {shown}{chips} at {cfg.hardware.mfu:.0%} MFU; law: {found['law']['name']}",
            *wrapped(found["law"]["source"], "       ")]


def plan(found: dict) -> list[str]:
    p = found["plan"]
    m = p["model"]
    lines = ["the plan:",
             f"  parameters {count(p['parameters']):>12}   {p['chose_parameters']}",
             f"  tokens     {count(p['tokens']):>12}   {p['chose_tokens']}; {p['tokens_a_parameter']:.3g} a parameter"]
    if p["epochs"] > 1.0005:
        late = ": beyond some 16 little is gained" if p["epochs"] > 16 else " (Muennighoff et al. 2023)"
        lines.append(f"  epochs     {p['epochs']:>12.2f}   worth {count(p['effective_tokens'])} fresh tokens{late}")
    elif p["epochs"] < 0.9995:
        lines.append(f"  epochs     {p['epochs']:>12.2f}   part of the data stays unused: all of it takes "
                     f"{1 / p['epochs']:,.3g} times the budget")
    more = p["flops"] / p["six_n_d"] - 1
    lines += [f"  FLOPs      {flops(p['flops']):>12}   by the formula of MFU: {more:+.0%} against 6 N D (attention, embedding)",
              f"  loss       {p['loss']:>12.3f}   by {p['loss_law']}, nats a token of its own text",
              f"  model      {m['n_layers']} layers, width {m['d_model']:,}, {m['n_heads']} heads on {m['n_kv_heads']} of keys "
              f"and values, feed-forward {m['d_ff']:,}{', tied head' if m['tied'] else ''}",
              f"             {p['true_parameters']:,} parameters, {p['true_parameters'] / p['parameters'] - 1:+.1%}; "
              f"vocabulary {m['vocab_size']:,}, rows of {m['max_seq_len']:,}"]
    told = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "tied")
    flags = " ".join(f"--model.{k}={str(m[k]).lower()}" for k in told)
    return [*lines, *wrapped(flags, "             ")]


def training(cfg: SizeVerb, found: dict) -> list[str]:
    t = found["training"]
    usd = f"{t['usd']:,.0f} USD at {t['usd_per_hour']:g} an hour" if t["usd"] is not None \
        else "no price is held: hardware.usd_per_hour"
    kwh = f"{t['kwh']:,.0f} kWh at {t['watts']:g} W a chip, PUE {cfg.hardware.pue:g}" if t["kwh"] is not None \
        else "power of this chip is not published: hardware.watts"
    again = t["recomputed_a_token"] / t["flops_a_token"]
    lines = ["training:", f"  {t['chip_hours']:,.0f} hours of {t['chip']}: {usd}", f"  energy: {kwh}"]
    if t["usd"] is not None and t["usd_source"] != "given":
        lines[1:2] = [lines[1], *wrapped(f"price: {t['usd_source']}", "    ")]
    if again:
        lines.append(f"  remat {cfg.shape.remat} computes up to {again:.0%} again: MFU stays below {1 / (1 + again):.0%}")
    if t["chips"] is None:
        on = ", ".join(f"{days(t['chip_hours'] / n / 24)} on {n:,}" for n in (8, 64, 256, 1024))
        lines.append(f"  {on} (hardware.chips or days tells more)")
    else:
        f = t["failures"]
        room = f" (the smallest slice: {t['slice']})" if t["slice"] else ""
        wall = "never done" if f["wall"] is None else days(f["wall"] / DAY)
        restarts = "" if f["restarts"] is None else f"{f['restarts']:,.1f} restarts; "
        lines += [f"  {days(t['days'])} on {t['chips']:,} chips{room}; with failures {wall}",
                  f"  failures: one in {duration(f['between'])} on average, {restarts}save every "
                  f"{duration(f['daly'])} (Daly; Young {duration(f['young'])}): goodput {f['goodput']:.1%}",
                  f"    one failure in {f['chip_hours']:,.0f} chip-hours: {f['source']}",
                  f"  memory of a device, about: {sum(t['device_bytes'].values()) / 1e9:.2f} of "
                  f"{t['device_memory'] / 1e9:.2f} GB, {cfg.hardware.rows} row{'s' * (cfg.hardware.rows > 1)} each, "
                  f"split over all{'' if t['fits'] else ': DOES NOT FIT'}",
                  *wrapped(", ".join(f"{name} {size / 1e9:.2f}" for name, size in t["device_bytes"].items())
                           + "; jaxllm plan compile tells it exactly", "    ")]
    saved = ", ".join(f"{name} {size_of(n)}" for name, n in t["checkpoint_bytes"].items())
    return [*lines, f"  checkpoints: {saved}"]


def serving(cfg: SizeVerb, found: dict) -> list[str]:
    d, s = found["decoding"], cfg.serving
    rows = "1 row" if s.batch == 1 else f"{s.batch} rows"
    lines = ["serving, by the roofline (no links, no kernel overhead):",
             f"  {d['seconds'] * 1000:,.3g} ms a token at least, {d['tokens_per_s']:,.0f} tokens a second at most: {rows} of "
             f"{s.context:,} positions on {s.chips} {d['chip']}",
             f"  reads {size_of(d['weight_bytes'])} of weights and {size_of(d['cache_bytes'])} of cache a step; bound by "
             f"{d['bound']};",
             f"  holds {d['held_bytes'] / 1e9:,.1f} of {d['memory_bytes'] / 1e9:,.1f} GB"
             f"{'' if d['fits'] else ': DOES NOT FIT'}"]
    if found["latency_cap"] is not None:
        lines.append(f"  up to {count(found['latency_cap'])} parameters meet {cfg.latency_ms:g} ms")
    if "lifetime" in found:
        usual, best = found["lifetime"]["usual"], found["lifetime"]["cheapest"]
        saved = 1 - best["flops"] / usual["flops"]
        lines += [f"  with {count(s.tokens)} tokens served (Sardana et al. 2023) the same loss costs least, serving included,",
                  f"    at {count(best['parameters'])} parameters on {count(best['tokens'])} tokens: {flops(best['flops'])} "
                  f"FLOPs instead of {flops(usual['flops'])}, {saved:.1%} fewer"]
    return lines


def judged(cfg: SizeVerb, found: dict) -> list[str]:
    v, asked = found["verdict"], cfg.parameters is not None
    subject = "your model" if asked else "this size"
    if v["size"] == "right":
        said = f"{subject} is about right for its compute: {v['times_the_best']:.2f} times the best size"
    else:
        factor = v["times_the_best"] if v["size"] == "too large" else 1 / v["times_the_best"]
        said = f"{subject} is {v['size']} for its data by a factor of {factor:.2f}"
    doubt = "" if v["laws_agree"] else "; they disagree"
    between = f" (by the laws {v['least']:.2f} to {v['most']:.2f} times the best size{doubt})"
    lines = [*wrapped(said + between, "", first=""), "  which move helps, by the loss:"]
    for m in v["moves"]:
        cost = "no more compute" if abs(m["compute"] - 1) < 1e-3 else f"{m['compute']:.2g} times the compute"
        change = 0.0 if abs(m["gain"]) < 5e-5 else -m["gain"]
        to = f"{count(m['parameters'])} x {count(m['tokens'])}"
        lines.append(f"    {m['loss']:.4f}  {change:+.4f}  {m['move']} ({to}): {cost}")
    if v["size"] == "too small":
        lines.append("  a model that answers much may well be this small: serving.tokens weighs training against serving")
    return lines


def spread(cfg: SizeVerb, found: dict) -> list[str]:
    rows = found["spread"]
    n = rows[0]["parameters"] * rows[0]["tokens"] * laws.FLOPS_A_TOKEN
    lines = [f"what each law makes of {flops(n)} FLOPs (6 N D):",
             f"  {'law':<22}{'parameters':>12}{'tokens':>12}{'a parameter':>13}{'loss':>9}"]
    for r in rows:
        loss = "-" if r["loss"] is None else f"{r['loss']:.3f}"
        mark = "* " if r["law"] == cfg.law and cfg.law_file is None else "  "
        lines.append(f"{mark}{r['name']:<22}{count(r['parameters']):>12}{count(r['tokens']):>12}"
                     f"{r['tokens_a_parameter']:>13.1f}{loss:>9}")
    a, b = rows[0], rows[-1]
    return [*lines, f"  spread: {count(a['parameters'])} x {a['tokens_a_parameter']:.0f} to {count(b['parameters'])} x "
            f"{b['tokens_a_parameter']:.0f} tokens a parameter. Losses of different laws are of different text.",
            f"  Kaplan et al. 2020 would have said {count(found['kaplan_parameters'])}, embeddings not counted"]


def table(found: dict) -> list[str]:
    lines = ["FLOPs and tokens for which a size is the best (tables 3 and A3 of Hoffmann et al. 2022, and Epoch's re-fit;",
             "their own row of 67 B is one of 68 to 70 B by its other columns):",
             "  " + f"{'parameters':<11}" + "".join(f"{laws.LAWS[key].name:>24}" for key in TABLE_LAWS)]
    for row in found["table"]:
        cells = "".join(f"{flops(row[key]['flops']) + ' x ' + count(row[key]['tokens']):>24}" for key in TABLE_LAWS)
        lines.append(f"  {count(row['parameters']):<11}{cells}")
    return lines


def reported(found: dict) -> list[str]:
    rows = found["training"]["reported_mfu"]
    said = "; ".join(f"{r['model']} on {r['chips']} {r['mfu']:.0%}" for r in rows)
    return ["MFU that others reported:", *wrapped(said, "  ")]


# ---------------------------------------------------------------- numbers as words


def count(n: float) -> str:
    """Returns 72.2 B, 1.33 T, 350 M."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= unit * 0.9995:
            digits = max(2 - math.floor(math.log10(n / unit) + 1e-9), 0)
            return f"{n / unit:,.{digits}f} {letter}"
    return f"{n:.0f}"


def flops(n: float) -> str:
    return f"{n:.2e}".replace("e+", "e")


def size_of(n: float) -> str:
    for unit, letter in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if n >= unit:
            return f"{n / unit:.3g} {letter}" if n < 1000 * unit else f"{n / unit:,.0f} {letter}"
    return f"{n / 1e3:.3g} kB"


def days(n: float) -> str:
    return f"{n:,.0f} days" if n >= 100 else f"{n:.3g} days"


def duration(seconds: float) -> str:
    for unit, word in ((DAY, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:,.3g} {word}"
    return f"{seconds:.0f} s"


def wrapped(text: str, indent: str, first: str | None = None) -> list[str]:
    return textwrap.wrap(text, COLUMNS, initial_indent=indent if first is None else first, subsequent_indent=indent or "  ",
                         break_long_words=False, break_on_hyphens=False)
