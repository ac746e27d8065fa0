"""The page of `jaxllm plan search`: isolation plots, the best so far, the curves of the best trials, and all of the text."""

import numpy as np

from jaxllm import __version__
from jaxllm.plan import search_text
from jaxllm.plan.curves import Curve, Plot, figure
from jaxllm.plan.search_folder import Folder
from jaxllm.plan.search_next import Rules
from jaxllm.report.page import document, esc
from jaxllm.report.read import number, read_lines

TOP = 5  # trials whose curves are drawn


def page(rules: Rules, folder: Folder, found: dict, jobs: list[dict]) -> str:
    """Returns the page's HTML."""
    best = found["ranking"][0] if found["ranking"] else None
    facts = [(f"{found['trials']}", "trials"), (f"{found['infeasible']['share']:.0%}", "infeasible")]
    if best:
        facts += [(f"{best['metric']:.4f}", f"best {found['metric']} (trial {best['trial']})")]
    if found["seeds"]:
        facts += [(f"{found['seeds']['std']:.4f}", "noise of a seed (standard deviation)")]
    cells = "".join(f'<div class="card"><b>{esc(v)}</b><span>{esc(name)}</span></div>' for v, name in facts)
    steps = "".join(f"<p>{esc(line)}</p>" for line in found["next"]) or "<p>nothing stands out: the study is done</p>"
    body = [f"<h1>Search: {esc(folder.path.name)}</h1>",
            f'<p class="quiet">{esc("; ".join(f"{d.key} {d.describe()}" for d in rules.space.dimensions))}</p>',
            f'<div class="facts">{cells}</div>', "<h2>Next</h2>", f'<div class="card pad">{steps}</div>']
    if best:
        told = esc(search_text.shown(best["params"]))
        body += [f"<h2>Best: trial {best['trial']}</h2>", f'<div class="card pad"><p>{told}</p></div>',
                 "<h2>Isolation plots</h2>", f'<div class="plots">{"".join(map(figure, isolation(rules, found, jobs)))}</div>',
                 "<h2>Trials</h2>", f'<div class="plots">{"".join(map(figure, history(rules, folder, found, jobs)))}</div>']
    body += ["<h2>All of it</h2>", f'<div class="card pad scroll"><pre>{esc(search_text.whole(rules, found))}</pre></div>',
             f"<footer>jaxllm {__version__}</footer>"]
    return document(f"Search: {folder.path.name}", body)


def isolation(rules: Rules, found: dict, jobs: list[dict]) -> list[Plot]:
    """Returns a plot a setting: the metric of every trial against its value, infeasible ones along the bad edge."""
    last: dict[int, dict] = {}
    for job in jobs:
        if "repeat_of" not in job and job["state"] != "running":
            last[job["trial"]] = job
    top = len(rules.shares) - 1
    metrics = np.array([t["metric"] for t in found["ranking"]])
    sign = 1 if rules.minimise else -1
    whole = max(sum(t["rung"] == top for t in found["ranking"]), 1)
    best, middle = sign * metrics[0], float(np.median(sign * metrics[:whole]))
    worst = min(max(sign * metrics), best + 4 * ((middle - best) or 1.0))  # a bad one would hide how the good ones differ
    bad = sign * (worst + 0.08 * (worst - best or 1.0))
    plots = []
    for dim in rules.space.dimensions:
        own = [job for job in last.values() if dim.key in job["params"]]
        if dim.kind == "choice":  # a point of the user's may have none of the options
            own = [job for job in own if dim.holds(job["params"][dim.key])]

        def x_of(jobs, dim=dim):
            values = [job["params"][dim.key] for job in jobs]
            return [float(dim.options.index(v) if dim.kind == "choice" else v) for v in values]

        done = [job for job in own if job["state"] == "done" and job["rung"] == top]
        stopped = [job for job in own if job["state"] == "done" and job["rung"] < top]
        failed = [job for job in own if job["state"] == "infeasible"]

        def y_of(jobs):
            return [sign * min(sign * job["metric"], worst) for job in jobs]

        curves = [Curve("trained to the end", x_of(done), y_of(done), 0, points=True),
                  Curve("stopped early", x_of(stopped), y_of(stopped), 4, points=True, faint=True),
                  Curve("infeasible", x_of(failed), [bad] * len(failed), 1, points=True)]
        parts = found["matters"][dim.key]
        if dim.kind != "choice":
            xs = [x for p in parts for x in p["part"]]
            ys = [sign * min(sign * p["best"], worst) for p in parts for _ in p["part"]]
            curves.append(Curve("best of each quarter", xs, ys, 2, faint=True))
        told = ", ".join(f"{i}: {option}" for i, option in enumerate(dim.options))
        hidden = sum(sign * job["metric"] > worst for job in done + stopped)
        told = "; ".join(filter(None, [told, f"{hidden} worse trials are drawn at the edge" if hidden else ""]))
        curves = [c for c in curves if len(c.x)]
        if curves:
            plots.append(Plot(dim.key, dim.key, found["metric"], curves, log_x=dim.kind in ("log", "log_int"), note=told))
    return plots


def history(rules: Rules, folder: Folder, found: dict, jobs: list[dict]) -> list[Plot]:
    """Returns the best so far over the trials, and the training curves of the best ones."""
    top = len(rules.shares) - 1
    done = [job for job in jobs if job["state"] == "done" and "repeat_of" not in job and job["rung"] == top]
    plots = []
    if done:
        values = [job["metric"] for job in done]
        sofar = (np.minimum if rules.minimise else np.maximum).accumulate(values)
        n = list(range(1, len(done) + 1))
        plots.append(Plot("Best so far", "whole trials", found["metric"], log_x=False, curves=[
            Curve("trials", n, values, 0, points=True, faint=True), Curve("best so far", n, sofar, 0)]))
    for key, title in (("loss", "Training loss of the best"), ("eval_loss", "Held-out loss of the best")):
        curves = []
        for i, row in enumerate(found["ranking"][:TOP]):
            lines, _ = read_lines(folder.run_of(row) / "metrics.jsonl")
            points = [(line["step"], line[key]) for line in lines if key in line and np.isfinite(number(line[key]))]
            if points:
                curves.append(Curve(f"trial {row['trial']}", *zip(*points, strict=True), i))
        if curves:
            plots.append(Plot(title, "step", key, curves, log_x=False))
    return plots
