"""Curves and points of a plan as inline SVG, in the style of the report's plots; axes may be logarithmic."""

import dataclasses
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from jaxllm.report.page import esc
from jaxllm.report.plots import COLORS, GRID, HEIGHT, INK, MUTED, STYLE, WIDTH, log_ticks, run_color, short, to_svg


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points in one colour: joined, alone, or a band between `y` and `top`."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int | None = None  # of the page's six; null: ink
    points: bool = False  # dots, not a line
    dashed: bool = False
    top: Sequence[float] | None = None
    faint: bool = False

    @property
    def drawn(self) -> str:
        return INK if self.color is None else run_color(self.color)


@dataclasses.dataclass(frozen=True)
class Plot:
    """One picture with its axes."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log_x: bool = True
    log_y: bool = False
    note: str = ""


def figure(plot: Plot) -> str:
    """Returns a card of the page: the title, the axes' names, the picture and what its colours mean."""
    shown = [c for c in plot.curves if c.label]
    keys = "".join(f'<span><span class="{"dash" if c.dashed else "dot"}" style="color: {_css(c)}"></span>{esc(c.label)}</span>'
                   for c in shown)
    note = f'<p class="small quiet">{esc(plot.note)}</p>' if plot.note else ""
    return (f'<figure class="card"><figcaption>{esc(plot.title)}<span>{esc(plot.y)} against {esc(plot.x)}</span></figcaption>'
            f'{svg(plot)}<div class="legend">{keys}</div>{note}</figure>')


def svg(plot: Plot) -> str:
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": plot.title}):
        drawn = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72, facecolor="none")
        axes = drawn.add_axes((0.105, 0.145, 0.865, 0.8), facecolor="none")
        for curve in plot.curves:
            _draw(axes, curve)
        _dress(axes, plot)
        return to_svg(drawn)


def save(plots: Sequence[Plot], path: str) -> None:
    """Writes the plots side by side as one picture, .svg, .png or .pdf."""
    colors = ["#2f62d9", "#d9730d", "#0f8a5f", "#9a3fc4", "#0b8aa8", "#c2346f"]
    plain = {run_color(i): colors[i] for i in range(COLORS)} | {INK: "#1c2024"}
    columns = min(len(plots), 2)
    rows = -(-len(plots) // columns)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxllm"}):
        drawn = Figure(figsize=(5.6 * columns, 3.8 * rows), layout="constrained")
        for i, plot in enumerate(plots):
            axes = drawn.add_subplot(rows, columns, i + 1)
            for curve in plot.curves:
                _draw(axes, curve, plain)
            axes.set(xlabel=plot.x, ylabel=plot.y, title=plot.title)
            axes.set_xscale("log" if plot.log_x else "linear")
            axes.set_yscale("log" if plot.log_y else "linear")
            axes.spines[["top", "right"]].set_visible(False)
            if any(curve.label for curve in plot.curves):
                axes.legend(frameon=False, fontsize=8)
        drawn.savefig(path, dpi=150, metadata={"Date": None} if path.endswith(".svg") else None)


def _draw(axes, curve: Curve, colors: dict[str, str] | None = None) -> None:
    x, y, color = np.asarray(curve.x, float), np.asarray(curve.y, float), (colors or {}).get(curve.drawn, curve.drawn)
    label = curve.label or None
    if curve.top is not None:
        axes.fill_between(x, y, np.asarray(curve.top, float), color=color, alpha=0.18, linewidth=0, label=label)
    elif curve.points:
        axes.plot(x, y, "o", color=color, markersize=3.5, alpha=0.5 if curve.faint else 1, label=label)
    else:
        axes.plot(x, y, color=color, linewidth=1 if curve.faint else 1.7, alpha=0.45 if curve.faint else 1, label=label,
                  dashes=(4, 2.5) if curve.dashed else (None, None))


def _dress(axes, plot: Plot) -> None:
    """Gives the axes their limits, ticks and grid."""
    x = np.concatenate([np.asarray(c.x, float) for c in plot.curves])
    y = np.concatenate([np.asarray(v, float) for c in plot.curves for v in (c.y, c.top) if v is not None])
    for axis, values, log, limit in ((axes.xaxis, x, plot.log_x, axes.set_xlim), (axes.yaxis, y, plot.log_y, axes.set_ylim)):
        values = values[np.isfinite(values) & ((values > 0) | (not log))]
        low, high = float(values.min()), float(values.max())
        if log:
            axis.axes.set(**{f"{axis.axis_name}scale": "log"})
            room = (high / low) ** 0.04 if high > low else 2
            low, high = low / room, high * room
            axis.set_ticks(log_ticks(low, high))
            axis.set_minor_locator(NullLocator())
        else:
            room = (high - low) * 0.05 or abs(high) * 0.1 or 1
            low, high = low - room, high + room
            axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        limit(low, high)
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0e}".replace("e+", "e") if abs(v) >= 1e15 else short(v)))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(length=0, pad=6, labelcolor=MUTED, labelsize=10.5)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def _css(curve: Curve) -> str:
    return "var(--ink)" if curve.color is None else f"var(--run-{curve.color % COLORS})"
