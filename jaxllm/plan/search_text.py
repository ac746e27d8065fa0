"""A study's findings in words and tables."""

from jaxllm.plan.search_next import Rules
from jaxllm.plan.search_space import Space
from jaxllm.report.summary import duration

SHOWN = 10  # trials in the table


def value(x) -> str:
    return f"{x:.4g}" if isinstance(x, float) else str(x)


def shown(params: dict) -> str:
    return ", ".join(f"{key}={value(v)}" for key, v in params.items()) or "base as it is"


def whole(rules: Rules, found: dict) -> str:
    """Returns the whole report as text."""
    parts = [best(rules.space, found), halving(found), infeasible(found), isolation(found), seeds(found), next_steps(found)]
    return "\n\n".join(part for part in parts if part)


def best(space: Space, found: dict) -> str:
    """Returns the table of the best trials."""
    lower = "lower" if found["goal"] == "min" else "higher"
    head = f"{found['trials']} trials in {duration(found['seconds'])} of training; {found['metric']}, {lower} is better"
    if not found["ranking"]:
        return head
    keys = [dim.key for dim in space.dimensions]
    rows = [["trial", found["metric"], "step", *keys, "by"]]
    rows += [[str(t["trial"]), f"{t['metric']:.4f}", str(t["step"]), *(value(t["params"].get(k, "-")) for k in keys), t["by"]]
             for t in found["ranking"][:SHOWN]]
    more = len(found["ranking"]) - SHOWN
    return head + "\n" + table(rows) + (f"\n  and {more} more" if more > 0 else "")


def table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  " + "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def halving(found: dict) -> str:
    """Returns what successive halving stopped, and where."""
    lines = []
    for rung in found["halving"]:
        step = f"step {rung['step']}" if rung["step"] is not None else f"{rung['share']:.0%} of the training"
        if rung is found["halving"][-1]:
            lines.append(f"  to {step}, the end: {rung['came']} trials came, {rung['infeasible']} infeasible")
        else:
            stopped = f": {', '.join(map(str, rung['stopped']))}" if rung["stopped"] else ""
            lines.append(f"  to {step}: {rung['came']} came, {rung['infeasible']} infeasible, {rung['went_on']} went on, "
                         f"{len(rung['stopped'])} stopped{stopped}")
    return "successive halving\n" + "\n".join(lines) if lines else ""


def infeasible(found: dict) -> str:
    told, n = found["infeasible"], found["trials"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in told["kinds"].items())
    lines = [f"infeasible: {len(told['trials'])} of {n} ({told['share']:.0%})" + (f": {kinds}" if kinds else "")]
    lines += [f"  trial {t['trial']} ({t['kind']}): {t['why']}  [{shown(t['params'])}]" for t in told["trials"][:SHOWN]]
    return "\n".join(lines)


def isolation(found: dict) -> str:
    """Returns the best of each part of each setting's range."""
    lines = []
    for key, parts in found["matters"].items():
        names = [" to ".join(map(value, p["part"])) if isinstance(p["part"], list) else value(p["part"]) for p in parts]
        cells = [f"{name}: {p['best']:.4f} ({p['trials']})" for name, p in zip(names, parts, strict=True)]
        lines.append(f"  {key}: {'; '.join(cells)}")
    return f"best {found['metric']} of each part of a range (trials in it)\n" + "\n".join(lines) if found["ranking"] else ""


def seeds(found: dict) -> str:
    """Returns the noise of a seed beside the gains."""
    if (s := found["seeds"]) is None:
        return ""
    lines = [f"noise of a seed: standard deviation {s['std']:.4f} ({s['degrees']} degrees of freedom)"]
    lines += [f"  trial {trial}: {t['first']:.4f} when chosen, {t['mean']:.4f} on average of {len(t['repeats'])} other seeds"
              for trial, t in s["trials"].items()]
    for g in s["gains"]:
        errors = "no seed changed it" if g["noises"] is None else f"{g['noises']:.1f} standard errors"
        lines.append(f"  trial {s['best']} over {g['over']} (trial {g['trial']}): {g['gain']:+.4f}, {errors}")
    return "\n".join(lines)


def next_steps(found: dict) -> str:
    return "next\n" + "\n".join(f"  {line}" for line in found["next"] or ["nothing stands out: the study is done"])
