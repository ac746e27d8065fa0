"""Curves as inline SVG. Matplotlib lays them out; colours and fonts are left to the page, so light and dark both work.

Colours are drawn as stand-ins that `to_svg` turns into the page's CSS variables.
"""

import dataclasses
import html
import io
import itertools
import math
import re

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from jaxllm.report.read import Run, Series, number
from jaxllm.report.summary import task_of

WIDTH, HEIGHT = 460, 230  # of the SVG's own coordinates; the page scales it
BUCKETS = 250  # a curve keeps the least and the greatest value of each
COLORS = 6  # then they repeat, dashed
INK, MUTED, GRID, ALARM = "#a1b2d0", "#a1b2d1", "#a1b2d2", "#a1b2d3"
STYLE = {"svg.fonttype": "none", "font.size": 11, "axes.linewidth": 0.8, "path.simplify": False, "axes.unicode_minus": True}


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot: its title, its unit and the curves in it, drawn solid, dashed, ... in this order."""

    title: str
    unit: str
    keys: tuple[str, ...]
    note: str = ""  # what the strokes mean, where that is not plain
    log: bool = False
    smooth: bool = False
    percent: bool = False
    zero: bool = False  # the axis begins at 0, so that noise does not look like change


LAW = "dashed: what the law says of a run that ends there"
PANELS = (
    Panel("Training loss", "nats a token", ("loss", "law_loss"), note=LAW, smooth=True),
    Panel("Held-out loss", "nats a token", ("eval_loss", "law_loss"), note=LAW),
    Panel("Above the law", "% of its loss, median of a window", ("law_excess", "law_limit"),
          note="dashed: what is too much", percent=True),
    Panel("Held-out bits per byte", "bits", ("eval_bits_per_byte",)),
    Panel("Score", "reward a response", ("score", "eval_score", "eval_greedy"),
          note="solid: responses of training; dashed: held-out prompts; dotted: the same, greedy"),
    Panel("KL to the reference", "nats a response", ("kl",), zero=True),
    Panel("KL coefficient", "", ("kl_coef",), zero=True),
    Panel("Entropy", "nats a token", ("entropy",), zero=True),
    Panel("Clipped", "% of tokens", ("clip_fraction", "value_clip_fraction"), note="solid: ratios; dashed: values",
          percent=True, zero=True),
    Panel("Value loss", "log scale", ("value_loss",), log=True),
    Panel("Explained variance", "of returns", ("explained_variance",)),
    Panel("Response length", "tokens", ("response_tokens",), zero=True),
    Panel("End token", "% of responses", ("ended",), percent=True, zero=True),
    Panel("Sampler against trainer", "nats a token, log scale", ("sampler_gap",), log=True),
    Panel("Text held out of pretraining", "nats a token", ("eval_text_loss",)),
    Panel("Right answers", "% of held-out questions", ("eval_right", "eval_majority_right", "eval_best_right"),
          note="solid: one sample; dashed: what most samples say; dotted: the best by reward", percent=True),
    Panel("Accuracy", "% of pairs", ("accuracy", "eval_accuracy"), note="solid: training; dashed: held out", percent=True),
    Panel("Margin", "chosen less rejected reward", ("margin", "eval_margin"), note="solid: training; dashed: held out"),
    Panel("Implicit reward", "", ("chosen_reward", "rejected_reward"), note="solid: chosen answers; dashed: rejected ones"),
    Panel("Log-probability of answers", "nats an answer", ("chosen_logp", "rejected_logp"),
          note="solid: chosen answers; dashed: rejected ones"),
    Panel("Expert load", "tokens of the fullest expert, times the mean", ("expert_load",), zero=True),
    Panel("Learning rate", "", ("lr",), zero=True),
    Panel("Gradient norm", "log scale", ("grad_norm",), log=True, smooth=True),
    Panel("Gradient noise scale", "tokens, log scale", ("noise_scale",), log=True),
    Panel("Throughput", "tokens a second", ("tokens_per_s",), smooth=True, zero=True),
    Panel("Model FLOP/s", "TFLOP/s", ("model_tflops_per_s",), smooth=True, zero=True),
    Panel("Model FLOP utilisation", "% of the chips' peak", ("mfu",), smooth=True, percent=True, zero=True),
    Panel("Peak memory", "GB", ("host_gb", "device_gb"), note="solid: host process; dashed: fullest device", zero=True),
)


LOSS_UNITS = {"dpo": "a pair", "reward": "nats a prompt", "rlhf": "of the policy"}  # of verbs whose loss is not of tokens


def unit_of(panel: Panel, runs: list[Run]) -> str:
    """Returns what a panel's numbers are counted in: losses of the verbs of alignment are other things than nats a token."""
    if panel.keys[0] not in ("loss", "eval_loss"):
        return panel.unit
    shown = [run for run in runs if len(run.series(panel.keys[0]).value)]
    return ", ".join(dict.fromkeys(LOSS_UNITS.get(run.setting("verb"), panel.unit) for run in shown))


STROKES = ("solid", "dashed", "dotted")


def task_panels(runs: list[Run]) -> list[Panel]:
    """Returns a panel for each few-shot task of the runs, a curve for each number of exemplars; three at most, to be told
    apart."""
    shots: dict[str, dict[int, str]] = {}
    for key in {key for run in runs for line in run.lines for key in line}:
        if found := task_of(key):
            shots.setdefault(found[0], {})[found[1]] = key
    panels = []
    for task, keys in sorted(shots.items()):
        chosen = sorted(keys)[:2] + sorted(keys)[2:][-1:]
        note = "; ".join(f"{stroke}: {k} exemplar{'s' * (k != 1)}" for stroke, k in zip(STROKES, chosen, strict=False))
        panels.append(Panel(f"Task {html.escape(task)}", "% right", tuple(keys[k] for k in chosen), note=note, percent=True))
    return panels


@dataclasses.dataclass(frozen=True)
class Mark:
    """An incident in the curves: a vertical line with the number it has in the list."""

    step: float
    run: int
    label: str
    alarm: bool


@dataclasses.dataclass(frozen=True)
class Span:
    """The horizontal axis that all plots of a page share."""

    by_tokens: bool
    first: float
    last: float

    @property
    def unit(self) -> str:
        return "tokens" if self.by_tokens else "step"


def span_of(runs: list[Run], *, by_tokens: bool) -> Span:
    ends = [x.get("tokens") if by_tokens else x["step"] for run in runs for x in (run.lines[:1] + run.lines[-1:])]
    ends = [float(e) for e in ends if isinstance(e, (int, float))]
    return Span(by_tokens, min(ends, default=0.0), max(ends, default=1.0))


def draw(panel: Panel, runs: list[Run], marks: list[Mark], span: Span) -> str | None:
    """Returns one plot as SVG; None when no run has its curves."""
    curves = [(i, j, run.series(key)) for i, run in enumerate(runs) for j, key in enumerate(panel.keys)]
    curves = [(i, j, scaled(s, panel)) for i, j, s in curves if len(s.value)]
    if not any(np.isfinite(s.value).any() for _, j, s in curves if j == 0 or panel.note != LAW):
        return None
    # The salt makes the ids of a plot's clipping paths its own, and the same each time.
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": panel.title}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72, facecolor="none")
        axes = figure.add_axes((0.105, 0.145, 0.875, 0.785), facecolor="none")
        log = panel.log or (spread(curves) > 30 and not panel.zero)
        for i, j, series in curves:
            draw_curve(axes, series, i, j, panel, log, span)
        for x, label, alarm in gathered(marks, runs, span):
            draw_mark(axes, x, label, alarm)
        dress(axes, panel, curves, log, span)
        return to_svg(figure)


def scaled(series: Series, panel: Panel) -> Series:
    return series._replace(value=series.value * 100) if panel.percent else series


def spread(curves) -> float:
    """Returns greatest over least value of the curves; 0 unless all are positive."""
    finite = np.concatenate([s.value[np.isfinite(s.value)] for *_, s in curves])
    return finite.max() / finite.min() if finite.min() > 0 else 0.0


def draw_curve(axes, series: Series, i: int, j: int, panel: Panel, log: bool, span: Span) -> None:
    x = series.tokens if span.by_tokens else series.step
    y = np.where(series.value > 0, series.value, np.nan) if log else series.value
    color, dash = run_color(i), [(None, None), (4, 2.5), (1.5, 1.5)][(j + i // COLORS) % 3]
    few = len(y) < 30
    faint = panel.smooth and not few
    axes.plot(*thin(x, y), color=color, linewidth=0.8 if faint else 1.6, alpha=0.28 if faint else 1, gid=f"raw-{i}-{j}",
              dashes=dash, marker="o" if few else None, markersize=3.2)
    if faint:
        axes.plot(*thin(x, smoothed(y)), color=color, linewidth=1.6, dashes=dash, gid=f"smooth-{i}-{j}")
    broken = np.flatnonzero(~np.isfinite(series.value))
    if len(broken):
        at = broken[np.linspace(0, len(broken) - 1, min(len(broken), 40)).astype(int)]
        axes.plot(x[at], np.full(len(at), 0.965), "x", color=ALARM, markersize=5, transform=axes.get_xaxis_transform(),
                  gid=f"not-finite-{i}-{j}")


def draw_mark(axes, x: float, label: str, alarm: bool) -> None:
    color = ALARM if alarm else MUTED
    axes.axvline(x, color=color, linewidth=0.9, dashes=(1.5, 2.5), gid=f"mark-{label}")
    axes.text(x, 1.015, label, color=color, fontsize=9, ha="center", va="bottom", transform=axes.get_xaxis_transform())


def gathered(marks: list[Mark], runs: list[Run], span: Span) -> list[tuple[float, str, bool]]:
    """Returns (x, label, alarm) of the vertical lines; incidents too close to tell apart share one."""
    found: list[tuple[float, str, bool]] = []
    placed = [(x_of(mark, runs[mark.run], span), mark) for mark in marks]
    for x, mark in sorted(((x, m) for x, m in placed if x is not None and math.isfinite(x)), key=lambda xm: xm[0]):
        if found and x - found[-1][0] <= 0.03 * (span.last - span.first):
            before, label, alarm = found[-1]
            found[-1] = before, ", ".join(part for part in (label, mark.label) if part), alarm or mark.alarm
        else:
            found.append((x, mark.label, mark.alarm))
    return found


def x_of(mark: Mark, run: Run, span: Span) -> float | None:
    if not span.by_tokens:
        return mark.step
    steps, tokens = np.array([(x["step"], number(x.get("tokens"))) for x in run.lines], float).reshape(-1, 2).T
    known = np.isfinite(tokens)
    return float(np.interp(mark.step, steps[known], tokens[known])) if known.any() else None


def dress(axes, panel: Panel, curves, log: bool, span: Span) -> None:
    """Gives the axes their limits, ticks and grid."""
    finite = np.concatenate([s.value[np.isfinite(s.value) & ((s.value > 0) | (not log))] for *_, s in curves])
    low, high = float(finite.min()), float(finite.max())
    if log:
        axes.set_yscale("log")
        room = (high / low) ** 0.06 if high > low else 2
        axes.set_ylim(low / room, high * room)
        axes.yaxis.set_major_locator(FixedLocator(log_ticks(low / room, high * room)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        low = min(low, 0) if panel.zero else low
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1
        axes.set_ylim(low if panel.zero else low - room, high + room)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
        axis.set_minor_formatter(NullFormatter())
    room = 0.015 * (span.last - span.first) or 0.5
    axes.set_xlim(span.first - room, span.last + room)
    axes.tick_params(length=0, pad=6, labelcolor=MUTED, labelsize=10.5)
    axes.tick_params(axis="x", pad=7)
    axes.grid(True, axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    axes.text(-0.012, 0, span.unit, transform=axes.transAxes + ScaledTranslation(0, -7 / 72, axes.figure.dpi_scale_trans),
              ha="right", va="top", color=MUTED, fontsize=10.5)


def log_ticks(low: float, high: float) -> list[float]:
    """Returns three to seven values inside the range: powers of ten, or 1, 2, 5 times them, or evenly spaced ones."""
    for subs in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
        ticks = [t for t in LogLocator(subs=subs, numticks=99).tick_values(low, high) if low <= t <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 7)]
    return [t for t in MaxNLocator(4).tick_values(low, high) if low <= t <= high]


def smoothed(y: np.ndarray) -> np.ndarray:
    """Returns the mean over a centred window of a fortieth of the curve, values that are not finite left out."""
    half = max(len(y) // 80, 2)
    good = np.isfinite(y)
    total = np.concatenate([[0.0], np.cumsum(np.where(good, y, 0.0))])
    count = np.concatenate([[0], np.cumsum(good)])
    at = np.arange(len(y))
    # The window shrinks towards both ends and stays centred, or the curve would lag behind a steep start.
    reach = np.minimum(half, np.minimum(at, len(y) - 1 - at))
    first, last = at - reach, at + reach + 1
    n = count[last] - count[first]
    return np.where(n > 0, (total[last] - total[first]) / np.maximum(n, 1), np.nan)


def thin(x: np.ndarray, y: np.ndarray, buckets: int = BUCKETS) -> tuple[np.ndarray, np.ndarray]:
    """Returns fewer points that look the same: of each bucket the least and the greatest. NaN where values were missing."""
    good = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    kept = good
    if len(good) > 2 * buckets:
        ends = np.linspace(0, len(good), buckets + 1).astype(int)
        kept = np.unique([good[0], good[-1], *(good[a + f(y[good[a:b]])] for a, b in itertools.pairwise(ends)
                                               for f in (np.argmin, np.argmax))])
    gaps = np.flatnonzero(np.diff(np.cumsum(~np.isfinite(y))[kept])) + 1
    return np.insert(x[kept].astype(float), gaps, np.nan), np.insert(y[kept].astype(float), gaps, np.nan)


def short(value: float) -> str:
    """Returns a number as a few characters: 1.2k, 3M, 3e-4."""
    size = abs(value)
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.4g}{letter}"
    if 0 < size < 1e-2:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def run_color(i: int) -> str:
    return f"#a1b2c{i % COLORS}"


def to_svg(figure: Figure) -> str:
    """Returns a figure as SVG that the page's CSS colours, without names of files, sizes or places on the network."""
    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<svg[^>]*>", f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">', svg, count=1)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'(?:font: |font-size: )([\d.]+)px[^;"]*', r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"-?\d+\.\d{3,}", _rounded, tag[0]), svg)
    for stand_in, variable in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid"), (ALARM, "alarm"),
                               *((run_color(i), f"run-{i}") for i in range(COLORS))):
        svg = svg.replace(stand_in, f"var(--{variable})")
    return _own_ids(svg)


def _rounded(found) -> str:
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")


def _own_ids(svg: str) -> str:
    """Drops ids that nothing refers to (they would be the same in every plot of the page), except the curves' own."""
    used = set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", svg))

    def keep(found):
        if found[1] in used:
            return found[0]
        return f' data-curve="{found[1]}"' if re.match(r"(raw|smooth|mark|not-finite)-", found[1]) else ""

    return re.sub(r"\s+", " ", re.sub(r' id="([^"]*)"', keep, svg)).replace("> <", "><")
