"""The page of `jaxllm plan ladder`: losses over tokens by size with the law, the largest run, and the fit's own plots."""

import numpy as np

from jaxllm import __version__
from jaxllm.plan import fit_page, ladder_text
from jaxllm.plan.curves import Curve, Plot, figure
from jaxllm.plan.fit_config import FitVerb
from jaxllm.plan.ladder_config import LadderVerb
from jaxllm.plan.ladder_runs import Rung
from jaxllm.plan.size_text import count
from jaxllm.report.page import document, esc


def page(cfg: LadderVerb, rungs: list[Rung], found: dict, drawn: dict) -> str:
    """Returns the page's HTML."""
    p, end = found["prediction"], found["largest"]
    facts = [(f"{found['runs']:,}", "runs fitted"), (f"{p['loss']:.4f}", "predicted for the largest run"),
             (f"{p['run_interval'][0]:.3f} to {p['run_interval'][1]:.3f}", f"its {found['level']:.0%} interval")]
    if isinstance(end, dict):
        facts += [(f"{end['loss']:.4f}", "measured"), (f"{end['off']:+.2%}", f"off; the bound is {cfg.within:.1%}")]
        if "farther_off" in end:
            facts.append((f"{end['farther_off']:+.2%}", "off, from runs smaller in both alone"))
    cells = "".join(f'<div class="card"><b>{esc(v)}</b><span>{esc(name)}</span></div>' for v, name in facts)
    body = ["<h1>A ladder of runs, and its largest one</h1>", f'<p class="quiet">{esc(cfg.dir)}</p>',
            f'<div class="facts">{cells}</div>', "<h2>Curves</h2>",
            f'<div class="plots">{"".join(map(figure, plots_of(cfg, rungs, found, drawn)))}</div>', "<h2>All of it</h2>",
            f'<div class="card pad scroll"><pre>{esc(ladder_text.whole(cfg, rungs, found))}</pre></div>',
            f"<footer>jaxllm {__version__}</footer>"]
    return document("A ladder of runs", body)


def plots_of(cfg: LadderVerb, rungs: list[Rung], found: dict, drawn: dict) -> list[Plot]:
    """Returns the ladder's plot first, then those of the fit."""
    law, samples, p, end = drawn["law"], drawn["samples"], found["prediction"], found["largest"]
    fitted = {run.name for run in drawn["points"].runs}
    d_D = np.geomspace(min(r.tokens for r in rungs), max(r.tokens for r in rungs), 40)
    tail = (1 - cfg.level) / 2
    low, high = np.quantile([samples.loss(p["parameters"], d) for d in d_D], [tail, 1 - tail], axis=1)
    curves = [Curve(f"the largest size, {cfg.level:.0%} of the samples", d_D, low, 5, top=high)]
    for i, size in enumerate(dict.fromkeys(rung.size for rung in rungs)):
        own = [r for r in rungs if r.size == size]
        used = [r for r in own if r.name in fitted]
        curves += [Curve(count(own[0].parameters), d_D, law.loss(own[0].parameters, d_D), i % 6),
                   Curve("", [r.tokens for r in used], [found["losses"][r.name] for r in used], i % 6, points=True)]
    curves.append(Curve("predicted", [p["tokens"]] * 2, p["run_interval"], dashed=True))
    if isinstance(end, dict):
        curves.append(Curve("measured", [p["tokens"]], [end["loss"]], points=True))
    own = Plot("The ladder", "tokens", "held-out loss", curves,
               note="Points: runs that were fitted. Lines: the law. Dashed: the interval told for the largest run.")
    verb = FitVerb(bootstraps=cfg.bootstraps, level=cfg.level)
    return [own, *fit_page.plots_of(verb, found, drawn)[1:]]
