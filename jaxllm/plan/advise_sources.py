"""The figures that an advice rests on, each with where and when it was read, as a part of its page."""

import dataclasses

from jaxllm.plan.advise_config import AdviseVerb
from jaxllm.plan.advise_options import NAMES, Option, chip_and_price, count
from jaxllm.plan.prices import Figure, Prices
from jaxllm.report.page import esc


def sources(cfg: AdviseVerb, prices: Prices, shown: list[Option]) -> str:
    """Returns the figures of the shown ways, those that every way uses, and all others."""
    chip, price = chip_and_price(cfg, prices)
    used: dict[str, Figure] = {}
    for o in shown:
        entry = (prices.apis if o.approach == "api" else prices.models).get(o.model)
        used |= figures_of(entry, o.model) if entry else {}
    used |= figures_of(price, chip.name)
    every = {name.replace("_", " "): f for name, f in prices.assumptions.items()}
    every |= {f"{NAMES[name]}, {key}": f for name, a in prices.approaches.items() for key, f in figures_of(a, "").items()}
    rest = {key: f for group in (prices.apis, prices.models, prices.trained, prices.chips) for name, entry in group.items()
            for key, f in figures_of(entry, name).items() if key not in used}
    rest |= {f"public text, {language}": f for language, f in prices.public_text.items()}
    return ("<h2>Figures and sources</h2>" + folded("Of the ways shown", used, open_=True) + folded("Used for every way", every)
            + folded("All others", rest))


def figures_of(entry, name: str) -> dict[str, Figure]:
    """Returns the figures of one entry of the prices file by what they are called on the page."""
    out = {}
    for f in dataclasses.fields(entry):
        value, label = getattr(entry, f.name), f.name.replace("_", " ")
        label = f"{name}, {label}" if name else label
        if isinstance(value, Figure):
            out[label] = value
        elif isinstance(value, dict):
            out |= {f"{label} {key}": figure for key, figure in value.items() if isinstance(figure, Figure)}
    return out


def folded(title: str, figures: dict[str, Figure], *, open_: bool = False) -> str:
    rows = ""
    for name, f in figures.items():
        value = "" if ", regions" in name else f"{f.value:,.6g}" if f.value < 1e6 else count(f.value)
        tag = '<span class="tag">assumption</span> ' if f.assumed else ""
        rows += (f'<tr><td>{esc(name)}</td><td class="n">{value}</td><td class="source">{tag}{esc(f.source)}</td>'
                 f'<td class="n quiet">{f.date}</td></tr>')
    head = '<tr><th></th><th class="n">value</th><th>source</th><th class="n">day</th></tr>'
    return (f'<details class="card"{" open" if open_ else ""}><summary>{esc(title)}: {len(figures)} figures</summary>'
            f'<div class="pad scroll"><table>{head}{rows}</table></div></details>')
