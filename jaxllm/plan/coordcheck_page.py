"""The page of `jaxllm plan coordcheck`: changes against the width in both parametrisations, and all of the text."""

from jaxllm import __version__
from jaxllm.plan.curves import Curve, Plot, figure
from jaxllm.report.page import document, esc


def page(found: dict, plots: list[Plot], text: str) -> str:
    """Returns the page's HTML."""
    facts = [(f"{s:+.3f}", f"slope of the {kind}, muP") for kind, s in found["slopes"]["muP"].items()]
    facts.append((f"{max(found['slopes']['standard'].values()):+.3f}", "the standard parametrisation's largest"))
    cells = "".join(f'<div class="card"><b>{esc(v)}</b><span>{esc(name)}</span></div>' for v, name in facts)
    body = ["<h1>Coordinate check</h1>", f'<p class="quiet">{esc(text.splitlines()[-1])}</p>',
            f'<div class="facts">{cells}</div>', "<h2>Curves</h2>", f'<div class="plots">{"".join(map(figure, plots))}</div>',
            "<h2>All of it</h2>", f'<div class="card pad scroll"><pre>{esc(text)}</pre></div>',
            f"<footer>jaxllm {__version__}</footer>"]
    return document("Coordinate check", body)


def plots_of(found: dict) -> list[Plot]:
    """Returns a plot for each parametrisation, of the changes after the last update."""
    names = {"muP": "Maximal update parametrisation", "standard": "Standard parametrisation"}
    plots = []
    for way, title in names.items():
        curves = []
        for i, (kind, steps_W) in enumerate(found["changes"][way].items()):
            last = [steps[-1] for steps in steps_W]
            curves += [Curve(f"{kind} {found['slopes'][way][kind]:+.2f}", found["widths"], last, i),
                       Curve("", found["widths"], last, i, points=True)]
        plots.append(Plot(title, "width", f"mean |change| after {found['updates']} updates", curves, log_y=True,
                          note="Beside each name: its slope on these axes."))
    return plots
