"""The plots of the advice, as inline SVG in the colours of the page that holds them."""

from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from jaxllm.plan.advise import HIGH, LOW, Advice
from jaxllm.plan.advise_config import AdviseVerb
from jaxllm.plan.advise_options import Option, tokens_a_month
from jaxllm.plan.prices import APPROACHES
from jaxllm.report.plots import GRID, HEIGHT, INK, MUTED, STYLE, WIDTH, log_ticks, run_color, short, to_svg

LEAST = 1e-3  # USD: what a log axis shows of nothing
BRIEF = {"what a person costs a month": "a person's month", "share of the roofline that serving reaches": "roofline share"}


def colour(approach: str) -> str:
    """Returns the stand-in of an approach's colour on the page."""
    return run_color(APPROACHES.index(approach))


def by_month(cfg: AdviseVerb, advice: Advice) -> str:
    """Cost up to each month of use, all that was paid before it included."""
    tokens, months = tokens_a_month(cfg), cfg.time.months
    lines = {o.approach: np.maximum(o.cumulated(tokens, months), LEAST) for o in advice.options}

    def draw(axes):
        for o in advice.options[::-1]:
            axes.plot(np.arange(months + 1), lines[o.approach], **stroke(o), gid=f"raw-month-{o.approach}")
        axes.set_xlim(0, months)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))

    return plot(draw, lines, "month of use", "by_month")


def by_volume(cfg: AdviseVerb, advice: Advice) -> str:
    """Cost over the horizon against the volume, break-even as dots."""
    return against_volume(cfg, advice, lambda o, v: o.total(v, cfg.time.months), "by_volume")


def by_token(cfg: AdviseVerb, advice: Advice) -> str:
    """Cost of a million tokens, all in, against the volume."""
    grown = sum((1 + cfg.volume.growth) ** k for k in range(cfg.time.months))
    return against_volume(cfg, advice, lambda o, v: o.total(v, cfg.time.months) / (v * grown) * 1e6, "by_token")


def against_volume(cfg: AdviseVerb, advice: Advice, cost: Callable[[Option, float], float], name: str) -> str:
    tokens, ways = tokens_a_month(cfg), {o.approach: o for o in advice.options}
    at = [c.at for (a, b), found in advice.crossings.items() for c in found[:1] if not (ways[a].why_not or ways[b].why_not)]
    low, high = min([tokens / 30, *(a / 3 for a in at)]), max([tokens * 30, *(a * 3 for a in at)])
    volumes = np.geomspace(max(low, tokens * LOW), min(high, tokens * HIGH), 241)
    lines = {o.approach: np.maximum([cost(o, v) for v in volumes], LEAST) for o in advice.options}

    def draw(axes):
        for o in advice.options[::-1]:
            axes.plot(volumes, lines[o.approach], **stroke(o), gid=f"raw-volume-{o.approach}")
        for (a, b), found in advice.crossings.items():
            out = ways[a].why_not or ways[b].why_not
            for c in found if len(found) < 3 else ():  # steps of servers would be a cloud of dots
                axes.plot(c.at, max(cost(ways[a], c.at), LEAST), "o", markersize=3.4 if out else 5.6,
                          color=MUTED if out else INK, gid=f"mark-{a}-{b}", zorder=3)
        axes.axvline(tokens, color=MUTED, linewidth=0.9, dashes=(1.5, 2.5))
        axes.text(tokens, 1.015, "here", color=MUTED, fontsize=9, ha="center", va="bottom",
                  transform=axes.get_xaxis_transform())
        axes.set_xscale("log")
        axes.set_xlim(volumes[0], volumes[-1])
        axes.xaxis.set_major_locator(FixedLocator(log_ticks(volumes[0], volumes[-1])))
        axes.xaxis.set_minor_locator(NullLocator())

    return plot(draw, lines, "tokens a month", name)


def tornado(cfg: AdviseVerb, advice: Advice) -> str:
    """The answer's cost with half of each figure and with twice."""
    turns = sorted((t for t in advice.turns if t.half_usd != t.twice_usd), key=lambda t: abs(t.twice_usd - t.half_usd))
    tokens, months = tokens_a_month(cfg), cfg.time.months
    now, ends = advice.best.total(tokens, months), [e for t in turns for e in (t.half_usd, t.twice_usd)]
    ends.append(now)
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "tornado"}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72, facecolor="none")
        axes = figure.add_axes((0.27, 0.19, 0.7, 0.74), facecolor="none")
        for i, t in enumerate(turns):
            for end, alpha in ((t.half_usd, 0.45), (t.twice_usd, 1.0)):
                axes.barh(i, end - now, left=now, height=0.52, color=colour(advice.best.approach), alpha=alpha, linewidth=0)
        axes.axvline(now, color=INK, linewidth=0.9)
        following = next((o for o in advice.options[1:] if not o.why_not), None)
        if following is not None and following.total(tokens, months) < 1.6 * max(ends):
            ends.append(following.total(tokens, months))
            axes.axvline(ends[-1], color=colour(following.approach), linewidth=1.4, dashes=(4, 2.5))
        room = 0.06 * (max(ends) - min(ends)) or 1.0
        axes.set_xlim(min(ends) - room, max(ends) + room)
        axes.set_ylim(-0.7, max(len(turns), 1) - 0.3)
        axes.yaxis.set_major_locator(FixedLocator(range(len(turns))))
        axes.set_yticklabels([BRIEF.get(t.what, t.what) for t in turns])
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
        dressed(axes, "x")
        axes.set_xlabel("USD", color=MUTED, fontsize=10.5, labelpad=4)
        return to_svg(figure)


def plot(draw: Callable, lines: dict[str, np.ndarray], unit: str, salt: str) -> str:
    """Returns a plot with a log axis of USD wide enough for `lines`, which `draw` puts in."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": salt}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72, facecolor="none")
        axes = figure.add_axes((0.105, 0.19, 0.865, 0.74), facecolor="none")
        draw(axes)
        low, high = (float(end(np.concatenate(list(lines.values())))) for end in (np.min, np.max))
        room = (high / low) ** 0.05 if high > low else 2.0
        axes.set_yscale("log")
        axes.set_ylim(low / room, high * room)
        axes.yaxis.set_major_locator(FixedLocator(log_ticks(low / room, high * room)))
        axes.yaxis.set_minor_locator(NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda v, _: short(v).replace("G", "B")))
            axis.set_minor_formatter(NullFormatter())
        dressed(axes, "y")
        axes.set_xlabel(unit, color=MUTED, fontsize=10.5, labelpad=4)
        return to_svg(figure)


def dressed(axes, grid: str) -> None:
    axes.tick_params(length=0, pad=6, labelcolor=MUTED, labelsize=10.5)
    axes.grid(True, axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def stroke(option: Option) -> dict:
    """Returns how an option's line is drawn: solid where it may be taken, dashed where it is ruled out."""
    dashes = (3, 2.2) if option.why_not else (None, None)
    return {"color": colour(option.approach), "linewidth": 1.3 if option.why_not else 2.0, "dashes": dashes}
