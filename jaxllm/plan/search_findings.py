"""What a study's trials say, as the tuning playbook asks: which ranges to widen, to fix and to narrow, and what is noise."""

import math

import numpy as np

from jaxllm.plan.search_next import Rules, ranking
from jaxllm.plan.search_space import Dimension

EDGE = 0.05  # of a range: a best value so near to its end says that better ones may lie beyond
BUCKETS = 4
ENOUGH = 12  # trials from which a narrower range is proposed
NARROW = 0.6  # of the range: the best trials lie in less of it


def findings(rules: Rules, jobs: list[dict], metric: str) -> dict:
    """Returns everything that the report tells, as plain numbers and words."""
    search = [job for job in jobs if "repeat_of" not in job]
    ranked = ranking(rules, jobs)
    full = [job for job in ranked if job["rung"] == len(rules.shares) - 1] or ranked
    failed = [job for job in search if job["state"] == "infeasible"]
    trials = len({job["trial"] for job in search})
    seeds = noise(rules, jobs, ranked)
    found = {
        "metric": metric, "goal": "min" if rules.minimise else "max", "trials": trials,
        "seconds": sum(job.get("seconds", 0.0) for job in jobs),
        "ranking": [{key: job[key] for key in ("trial", "rung", "step", "of", "metric", "params", "by")} for job in ranked],
        "infeasible": {"share": len(failed) / max(trials, 1), "kinds": counted(job["kind"] for job in failed),
                       "trials": [{key: job[key] for key in ("trial", "step", "kind", "why", "params")} for job in failed],
                       "where": [said for dim in rules.space.dimensions if (said := where_infeasible(dim, search))]},
        "boundary": [said for dim in rules.space.dimensions if full and (said := at_boundary(dim, full))],
        "matters": {dim.key: spread(rules, dim, full) for dim in rules.space.dimensions},
        "narrow": {dim.key: said for dim in rules.space.dimensions if (said := narrower(dim, full))},
        "seeds": seeds, "halving": rungs(rules, search),
    }
    found["next"] = next_steps(found, len(full))
    return found


def counted(kinds) -> dict[str, int]:
    out: dict[str, int] = {}
    for kind in kinds:
        out[kind] = out.get(kind, 0) + 1
    return out


def at_boundary(dim: Dimension, full: list[dict]) -> dict | None:
    """Returns which end of its range the best trial's value lies at, within a twentieth of it in the range's own scale."""
    value = full[0]["params"].get(dim.key)
    if dim.kind == "choice" or value is None:
        return None
    place = dim.place(value)
    end = "low" if place <= EDGE else "high" if place >= 1 - EDGE else None
    if end is None:
        return None
    places = [dim.place(job["params"][dim.key]) for job in full[:3] if dim.key in job["params"]]
    near = [place for place in places if abs(place - (end == "high")) <= 0.2]
    return {"key": dim.key, "end": end, "value": value, "range": [dim.low, dim.high], "of_three": len(near)}


def where_infeasible(dim: Dimension, search: list[dict]) -> dict | None:
    """Returns from which value of a setting on, up or down, every trial was infeasible; None for fewer than two."""
    last = {job["trial"]: job for job in search if dim.key in job["params"]}
    if dim.kind == "choice" or not last:
        return None
    ordered = sorted((dim.place(value := job["params"][dim.key]), job["state"] == "infeasible", value) for job in last.values())
    best = None
    for side, run in (("above", ordered[::-1]), ("below", ordered)):
        n = next((i for i, (_, bad, _) in enumerate(run) if not bad), len(run))
        if 2 <= n < len(run) and (best is None or n > best["trials"]):
            best = {"key": dim.key, "side": side, "value": run[n - 1][2], "trials": n}
    return best


def spread(rules: Rules, dim: Dimension, full: list[dict]) -> list[dict]:
    """Returns the best loss of each part of a setting's range, or of each option, that has trials."""
    groups: dict = {}
    for job in full:
        if dim.key in job["params"]:
            value = job["params"][dim.key]
            part = value if dim.kind == "choice" else int(min(max(dim.place(value) * BUCKETS, 0), BUCKETS - 1))
            groups.setdefault(part, []).append(job)
    parts = dim.options if dim.kind == "choice" else range(BUCKETS)
    return [{"part": part if dim.kind == "choice" else [end(dim, part), end(dim, part + 1)], "trials": len(groups[part]),
             "best": min(groups[part], key=rules.loss)["metric"]} for part in parts if part in groups]


def end(dim: Dimension, part: int) -> float:
    """Returns where a part of the range begins."""
    return dim.value(part / BUCKETS)


def narrower(dim: Dimension, full: list[dict]) -> list | None:
    """Returns the part of a range that the best quarter of the trials lies in, with a tenth of the range on both sides."""
    if len(full) < ENOUGH:
        return None
    best = [job["params"].get(dim.key) for job in full[: max(len(full) // 4, 4)]]
    best = [value for value in best if dim.holds(value)]
    if len(best) < 3:
        return None
    if dim.kind == "choice":
        return sorted(set(best), key=dim.options.index) if len(set(best)) < len(dim.options) else None
    places = [dim.place(value) for value in best]
    low, high = max(min(places) - 0.1, 0.0), min(max(places) + 0.1, 1.0)
    return [dim.value(low), dim.value(high)] if high - low <= NARROW and dim.value(low) < dim.value(high) else None


def noise(rules: Rules, jobs: list[dict], ranked: list[dict]) -> dict | None:
    """Returns the spread of the best trials over seeds, and the best one's gain in units of it; None without repeats."""
    repeats = [job for job in jobs if "repeat_of" in job and job["state"] == "done"]
    if not repeats or not ranked:
        return None
    groups = {job["trial"]: [job["metric"]] for job in ranked if job["trial"] in {r["repeat_of"] for r in repeats}}
    for job in repeats:
        groups[job["repeat_of"]].append(job["metric"])
    degrees = sum(len(values) - 1 for values in groups.values())
    std = math.sqrt(sum((len(v) - 1) * float(np.var(v, ddof=1)) for v in groups.values()) / degrees)
    # The run that won owes a part of its loss to luck; its repeats do not.
    fresh = {trial: float(np.mean(values[1:])) for trial, values in groups.items()}
    sign = 1 if rules.minimise else -1
    best = min(fresh, key=lambda trial: sign * fresh[trial])
    told = {str(trial): {"first": v[0], "repeats": v[1:], "mean": fresh[trial]} for trial, v in groups.items()}
    out = {"std": std, "degrees": degrees, "trials": told, "best": best, "gains": []}
    full = [job for job in ranked if job["rung"] == len(rules.shares) - 1]
    others = {"the next best": next((job for job in full if job["trial"] != best), None),
              "your first point": next((job for job in full if job["by"] == "you" and job["trial"] != best), None),
              "the middle one of all": full[len(full) // 2] if len(full) > 3 else None}
    for name, job in others.items():
        if job is not None and job["trial"] != best:
            gain = sign * (fresh.get(job["trial"], job["metric"]) - fresh[best])
            n = (len(groups[best]) - 1, max(len(groups.get(job["trial"], [0])) - 1, 1))
            error = std * math.sqrt(1 / n[0] + 1 / n[1])
            out["gains"].append({"over": name, "trial": job["trial"], "gain": gain, "noises": gain / error if error else None})
    return out


def rungs(rules: Rules, search: list[dict]) -> list[dict]:
    """Returns how many trials came to each rung of successive halving, failed there, and went on; [] without it."""
    out = []
    for rung in range(len(rules.shares) if len(rules.shares) > 1 else 0):
        at = [job for job in search if job["rung"] == rung and job["state"] != "running"]
        above = {job["trial"] for job in search if job["rung"] == rung + 1}
        losses = [job["metric"] for job in at if job["state"] == "done"]
        out.append({"rung": rung, "share": rules.shares[rung], "step": at[0]["step"] if at else None, "came": len(at),
                    "infeasible": len(at) - len(losses), "went_on": len(above),
                    "stopped": sorted(job["trial"] for job in at if job["state"] == "done" and job["trial"] not in above)})
    return out


def next_steps(found: dict, full: int) -> list[str]:
    """Returns what to do next, the most pressing first: widen, then keep out of what fails, then fix, then narrow."""
    out = []
    for b in found["boundary"]:
        beyond = "below" if b["end"] == "low" else "above"
        where = "within 5% of" if b["range"][0] <= b["value"] <= b["range"][1] else "beyond"
        out.append(f"widen: the best is {where} the {b['end']} end of the range of {b['key']} ({b['value']:g} of "
                   f"[{b['range'][0]:g}, {b['range'][1]:g}]; {b['of_three']} of the best 3 lie near it): look {beyond} it")
    for w in found["infeasible"]["where"]:
        if w["trials"] >= 0.1 * found["trials"]:
            sign = ">=" if w["side"] == "above" else "<="
            out.append(f"keep out: all {w['trials']} trials with {w['key']} {sign} {w['value']:g} were infeasible: end its "
                       "range there")
    gains = found["seeds"]["gains"] if found["seeds"] else []
    for gain in gains:
        if gain["over"] == "the next best" and gain["noises"] is not None and gain["noises"] < 2:
            out.append(f"noise: the best and the next best (trials {found['seeds']['best']} and {gain['trial']}) differ by "
                       f"{gain['noises']:.1f} standard errors: take whichever is cheaper")
    values = [row["metric"] for row in found["ranking"][:full]]
    whole = abs(float(np.median(values)) - values[0]) if values else 0.0
    bound = max(2 * found["seeds"]["std"] if found["seeds"] else 0.0, 0.1 * whole)
    for key, parts in found["matters"].items():
        best = [part["best"] for part in parts]
        if full >= ENOUGH and len(best) >= 3 and min(p["trials"] for p in parts) >= 2 and max(best) - min(best) <= bound:
            out.append(f"fix: {key} hardly matters here: the best of each part of its range differ by "
                       f"{max(best) - min(best):.4f}")
    for key, part in found["narrow"].items():
        shown = ", ".join(f"{v:g}" if isinstance(v, (int, float)) else str(v) for v in part)
        if key not in {b["key"] for b in found["boundary"]}:
            out.append(f"narrow: the best quarter has {key} in [{shown}]")
    if full < ENOUGH:
        out.append(f"more: {full} whole trials are few to say what to fix or narrow ({ENOUGH} are the least): raise trials and "
                   "go on")
    return out
