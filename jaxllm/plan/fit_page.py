"""The page of `jaxllm plan fit`: measured against fitted losses, the three approaches, and all of the text."""

import numpy as np

from jaxllm import __version__
from jaxllm.plan import fit_text
from jaxllm.plan.curves import Curve, Plot, figure
from jaxllm.plan.fit_config import FitVerb
from jaxllm.plan.frontier import group
from jaxllm.plan.laws import FLOPS_A_TOKEN
from jaxllm.plan.size_text import count
from jaxllm.report.page import document, esc


def page(cfg: FitVerb, found: dict, plots: list[Plot]) -> str:
    """Returns the page's HTML."""
    p = found["prediction"]
    facts = [(f"{found['runs']:,}", "runs"), (f"{len(found['excluded']):,}", "left out"),
             (f"{found['exponent']['approach_3']:.3f}", "a of approach 3: the best size grows as C^a"),
             (f"{found['residual_rms']:.2%}", "residuals"),
             (f"{p['loss']:.3f}", f"predicted for {count(p['parameters'])} x {count(p['tokens'])} tokens"),
             (f"{p['run_interval'][0]:.3f} to {p['run_interval'][1]:.3f}", f"its {found['level']:.0%} interval")]
    cells = "".join(f'<div class="card"><b>{esc(v)}</b><span>{esc(name)}</span></div>' for v, name in facts)
    body = ["<h1>Scaling law of your runs</h1>", f'<p class="quiet">{esc(found["loss"])}</p>',
            f'<div class="facts">{cells}</div>',
            "<h2>Curves</h2>", f'<div class="plots">{"".join(map(figure, plots))}</div>', "<h2>All of it</h2>",
            f'<div class="card pad scroll"><pre>{esc(fit_text.whole(cfg, found))}</pre></div>',
            f"<footer>jaxllm {__version__}</footer>"]
    return document("Scaling law of your runs", body)


def plots_of(cfg: FitVerb, found: dict, drawn: dict) -> list[Plot]:
    """Returns the plots: losses over tokens by size, and over compute to the target; approaches 1 and 2; best sizes."""
    n, d, y = drawn["points"].columns()
    law, samples, p = drawn["law"], drawn["samples"], found["prediction"]
    groups = group(n)
    several = [own for own in groups if len(own) > 1] or groups
    by_size = []
    for i, at in enumerate(np.unique(np.linspace(0, len(several) - 1, 6).astype(int))):
        own = several[at]
        size, span_D = float(np.median(n[own])), np.geomspace(d.min(), d.max(), 40)
        by_size += [Curve("", d[own], y[own], i, points=True), Curve(count(size), span_D, law.loss(size, span_D), i)]
    flops_C = np.geomspace((FLOPS_A_TOKEN * n * d).min(), max(p["flops"], (FLOPS_A_TOKEN * n * d).max()) * 1.2, 60)
    best_n, best_d = law.optimal(flops_C)
    low, high = np.quantile([samples.loss(a, b) for a, b in zip(best_n, best_d, strict=True)],
                            [(1 - cfg.level) / 2, (1 + cfg.level) / 2], axis=1)
    plots = [
        Plot("Losses by size", "tokens", "loss", by_size, note="Points: runs. Lines: the law. At most six sizes are drawn."),
        Plot("Losses over compute", "FLOPs", "loss", [
            Curve(f"{cfg.level:.0%} of the samples", flops_C, low, 0, top=high),
            Curve("the law's best", flops_C, law.loss(best_n, best_d), 0),
            Curve("runs", FLOPS_A_TOKEN * n * d, y, points=True, faint=True),
            Curve("the target", [p["flops"]], [p["loss"]], 1, points=True)])]
    frontiers = [Curve("approach 3", flops_C, best_n, 0)]
    for i, (name, best) in enumerate(drawn["approaches"].items(), 1):
        label = fit_text.NAMES[name]
        lines = [c for k, (px, py, fx, fy) in enumerate(best.curves)
                 for c in (Curve("", px, py, k % 6, points=True, faint=True), Curve("", fx, fy, k % 6))]
        x = "FLOPs" if name == "approach_1" else "parameters"
        plots.append(Plot(label[0].upper() + label[1:], x, "loss", lines,
                          note="Points: runs. Lines: what the approach makes of them."))
        frontiers += [Curve(label.split(",")[0], flops_C, best.law.optimal(flops_C)[0], i),
                      Curve("", best.flops_B, best.parameters_B, i, points=True)]
    return [*plots, Plot("Best size by compute", "FLOPs", "parameters", frontiers, log_y=True)]
