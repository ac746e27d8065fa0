"""The page of `jaxllm plan size`: the plan in a few figures, what the laws say as curves, and all of the text."""

import numpy as np

from jaxllm import __version__
from jaxllm.plan import kaplan, laws, repeat, size_text
from jaxllm.plan.curves import Curve, Plot, figure
from jaxllm.plan.size_config import SizeVerb
from jaxllm.plan.size_text import count, flops
from jaxllm.report.page import document, esc
from jaxllm.report.plots import COLORS


def page(cfg: SizeVerb, found: dict) -> str:
    """Returns the page's HTML."""
    p, t, d = found["plan"], found["training"], found["decoding"]
    usd = f"{t['usd']:,.0f} USD" if t["usd"] is not None else f"{t['chip_hours']:,.0f} h"
    a, b = found["spread"][0], found["spread"][-1]
    facts = [(count(p["parameters"]), "parameters"), (count(p["tokens"]), f"tokens, {p['tokens_a_parameter']:.3g} a parameter"),
             (flops(p["flops"]), "FLOPs of training"), (usd, f"{t['chip_hours']:,.0f} hours of {t['chip']}"),
             (f"{p['loss']:.3f}", f"loss by {p['loss_law']}"), (f"{d['seconds'] * 1000:.3g} ms", "a token at least, served"),
             (f"{count(a['parameters'])} to {count(b['parameters'])}", "by the laws, this compute on fresh text")]
    cells = "".join(f'<div class="card"><b>{esc(v)}</b><span>{esc(name)}</span></div>' for v, name in facts)
    plots = "".join(figure(plot) for plot in plots_of(cfg, found))
    text = size_text.whole(cfg, found)
    body = ["<h1>Size of a model</h1>", f'<p class="quiet">{esc(text.splitlines()[0])}</p>',
            f'<div class="facts">{cells}</div>',
            "<h2>What the laws say</h2>", f'<div class="plots">{plots}</div>',
            "<h2>The whole plan</h2>", f'<div class="card pad scroll"><pre>{esc(text)}</pre></div>',
            "<h2>Sources</h2>", '<div class="card pad">' + "".join(f"<p>{esc(r['name'])}: {esc(r['source'])}</p>"
                                                                  for r in found["spread"]) + "</div>",
            f"<footer>jaxllm {__version__}</footer>"]
    return document("Size of a model", body)


def plots_of(cfg: SizeVerb, found: dict) -> list[Plot]:
    p = found["plan"]
    n, d = p["parameters"], p["tokens"]
    c = laws.FLOPS_A_TOKEN * n * d
    size_S = n * np.geomspace(1 / 20, 20, 120)
    token_S = c / laws.FLOPS_A_TOKEN / size_S
    # a law has one look in all plots: six colours, then the same ones dashed
    every = [*laws.LAWS.values(), kaplan.KAPLAN]
    looks = {law.name: {"color": i % COLORS, "dashed": i >= COLORS} for i, law in enumerate(every)}
    curves = [Curve(law.name, size_S, _above(repeat.loss_of(law, size_S, token_S, cfg.tokens)), **looks[law.name])
              for law in laws.LAWS.values() if isinstance(law, laws.Parametric)]
    flops_C = c * np.geomspace(1e-3, 1e3, 60)
    frontier = [Curve(law.name, flops_C, law.optimal(flops_C)[0], **looks[law.name])
                for law in every]
    plots = [Plot("Loss over sizes of this compute", "parameters", "loss above its least",
                  [*curves, Curve("the plan", [n], [0.0], points=True)],
                  note="Each law's curve from its own lowest point up: how much another size costs."),
             Plot("Best size by compute", "FLOPs", "parameters",
                  [*frontier, Curve("the plan", [c], [n], points=True)], log_y=True)]
    if cfg.tokens is not None:
        epochs_E = np.geomspace(1, max(2 * p["epochs"], 20), 60)
        worth_E = repeat.effective_tokens(epochs_E * cfg.tokens, cfg.tokens) / cfg.tokens
        plots.append(Plot("What repeating is worth", "epochs", "epochs of fresh text", [
            Curve("fresh text", epochs_E, epochs_E, 1, dashed=True), Curve("repeated", epochs_E, worth_E, 0)], log_y=True))
    return plots


def _above(loss_S: np.ndarray) -> np.ndarray:
    """Returns how far the losses are above the least; NaN beyond 0.5, which would flatten the rest."""
    above_S = loss_S - loss_S.min()
    return np.where(above_S < 0.5, above_S, np.nan)
