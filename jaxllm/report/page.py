"""`jaxllm report RUN…`: one HTML file of curves, samples, incidents and settings, which loads nothing from anywhere."""

import contextlib
import html
import pathlib
import time

import yaml

from jaxllm import __version__
from jaxllm.errors import UserError
from jaxllm.report.config import ReportVerb
from jaxllm.report.read import Run, number, read_runs
from jaxllm.report.style import CSS
from jaxllm.report.summary import before_after, costs, duration, moment, shown_change, summary

INFORM = ("resumed", "config_changed", "stopped", "as_the_law_says", "caught_up")  # incidents that are no trouble
MAX_SAMPLED_STEPS, MAX_SAMPLE, MAX_INCIDENTS = 40, 4000, 200


def main(cfg: ReportVerb) -> dict:
    """Writes the page of `cfg.runs`; returns where it is and the runs' summaries."""
    output = pathlib.Path(cfg.output) if cfg.output else pathlib.Path(cfg.runs[0]) / "report.html"
    runs = read_runs(cfg.runs)
    write(render(runs), output)
    size = output.stat().st_size
    print(f"{output} ({size / 1e6:.2f} MB)")
    return {"page": str(output), "bytes": size, "runs": [summary(run) for run in runs]}


def write_page(runs, output) -> pathlib.Path:
    """Writes one page about the run folders `runs`; returns its path. Raises UserError for a folder that is no run."""
    write(render(read_runs(runs)), pathlib.Path(output))
    return pathlib.Path(output)


def write(text: str, output: pathlib.Path) -> None:
    """Writes the page whole or not at all; raises UserError where it cannot be written."""
    part = output.with_name(output.name + ".part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(text.encode("utf-8", "replace"))  # a sample may hold half of a surrogate pair
        part.replace(output)
    except OSError as e:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"{output}: the page cannot be written: {e.strerror}") from None


def render(runs: list[Run]) -> str:
    """Returns the page's HTML."""
    sums = [summary(run) for run in runs]
    numbered = number_incidents(runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(r.name for r in runs)}"
    body = [f"<h1>{esc(title)}</h1>", subtitle(runs, sums), facts(sums[0]) if len(runs) == 1 else comparison(runs, sums),
            tax(runs), curves(runs, numbered), incidents(runs, numbered), samples(runs), settings(runs),
            f"<footer>jaxllm {__version__}, {moment(time.time())}</footer>"]
    return document(title, body)


def document(title: str, body: list[str], css: str = "") -> str:
    """Returns a whole page of these parts, which loads nothing from anywhere."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{esc(title)}</title><style>{CSS}{css}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part) + "\n</main></body></html>\n"
    )


def esc(value) -> str:
    """Returns text that is safe in HTML, control characters (which HTML forbids) replaced."""
    text = "".join(c if c >= " " or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return html.escape(text)


# ---------------------------------------------------------------- what the runs reached


def subtitle(runs: list[Run], sums: list[dict]) -> str:
    if len(runs) > 1:
        return ""
    times = [x["time"] for x in runs[0].lines if isinstance(x.get("time"), (int, float))]
    said = [state(sums[0])]
    if times:
        said.append(f"last line {moment(times[-1])}")
    if commit := runs[0].config.get("commit"):
        said.append(f"commit {esc(commit)[:10]}{' with changes' if str(commit).endswith('+changes') else ''}")
    part, calm = against_the_law(runs[0])
    if part:
        said.append(esc(part) if calm else f'<span class="alarm">{esc(part)}</span>')
    said += trouble(runs[0], sums[0])
    return f'<p class="quiet">{" · ".join(said)}</p>'


def against_the_law(run: Run) -> tuple[str, bool]:
    """Returns (how a run that was watched stands to its law, whether that is no trouble); "" where it was not."""
    excess = run.series("law_excess")
    told = [x for x in run.incidents if x.get("kind") in ("falls_behind", "caught_up", "ended_behind", "as_the_law_says")]
    if told and told[-1]["kind"] in ("ended_behind", "as_the_law_says"):
        held_out, law = run.series("eval_loss").value, run.series("law_loss").value
        if len(held_out) and len(law):
            return f"ended {held_out[-1] / law[-1] - 1:+.1%} from its law", told[-1]["kind"] == "as_the_law_says"
    if told and told[-1]["kind"] == "falls_behind":
        return f"behind its law since step {told[-1].get('step')}", False
    return (f"in line with its law, {excess.value[-1]:+.1%} from it", True) if len(excess.value) else ("", True)


def state(s: dict) -> str:
    if "steps" not in s:
        return f"step {s['step']:,}"
    return f"finished: {s['steps']:,} steps" if s["step"] >= s["steps"] else f"step {s['step']:,} of {s['steps']:,}"


def trouble(run: Run, s: dict) -> list[str]:
    """Returns what is wrong with the logs themselves."""
    said = []
    if not run.lines:
        said.append('<span class="alarm">nothing was logged yet</span>')
    if "not_finite" in s:
        said.append(f'<span class="alarm">{s["not_finite"]} logged losses are not finite</span>')
    if run.unread:
        said.append(f"{run.unread} unreadable line{'s' if run.unread > 1 else ''} in the logs passed over")
    return said


ROWS = (  # key, label, how it is written, which end is better
    ("eval_loss", "held-out loss", "{:.4f}".format, min),
    ("best_eval_loss", "best held-out loss", "{:.4f}".format, min),
    ("eval_bits_per_byte", "held-out bits per byte", "{:.4f}".format, min),
    ("eval_perplexity", "held-out perplexity", "{:.2f}".format, min),
    ("loss", "training loss", "{:.4f}".format, None),
    ("tokens", "tokens", lambda v: count(v), None),
    ("wall_s", "wall time", lambda v: duration(v), None),
    ("tokens_per_s", "tokens/s, median", "{:,.0f}".format, max),
    ("mfu", "model FLOP utilisation, median", "{:.1%}".format, max),
    ("model_tflops_per_s", "model FLOP/s, median", lambda v: count(v * 1e12), None),
    ("parameters", "parameters", lambda v: count(v), None),
    ("host_gb", "peak host memory", "{:.2f} GB".format, None),
    ("device_gb", "peak device memory", "{:.2f} GB".format, None),
)


def count(value: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {letter}"
    return f"{value:g}"


def facts(s: dict) -> str:
    """Returns the numbers of one run, as cards."""
    under = {"best_eval_loss": f"at step {s.get('best_eval_loss_step', 0):,}", "loss": "mean of the last lines"}
    cards = [f'<div class="card"><b>{write(s[key])}</b><span>{label}{", " + under[key] if key in under else ""}</span></div>'
             for key, label, write, _ in ROWS if key in s and not (key == "model_tflops_per_s" and "mfu" in s)
             and not (key == "best_eval_loss" and s[key] == s["eval_loss"])]
    return f'<div class="facts">{"".join(cards)}</div>' if cards else ""


def comparison(runs: list[Run], sums: list[dict]) -> str:
    """Returns the numbers of several runs, one column a run, the best of each row in bold."""
    head = "".join(f'<th class="n">{dot(i)}{esc(run.name)}</th>' for i, run in enumerate(runs))
    states = "".join(f'<td class="n">{"<br>".join([state(s), *trouble(run, s)])}</td>'
                     for run, s in zip(runs, sums, strict=True))
    body = f"<tr><td></td>{states}</tr>"
    for key, label, write, better in ROWS:
        known = [s[key] for s in sums if key in s]
        if not known or (key == "best_eval_loss" and all(s.get(key) == s.get("eval_loss") for s in sums)):
            continue
        best = better(known) if better and len(set(known)) > 1 else None
        cells = [f"<b>{write(s[key])}</b>" if key in s and s[key] == best else write(s[key]) if key in s else "" for s in sums]
        body += f"<tr><td>{label}</td>" + "".join(f'<td class="n">{cell}</td>' for cell in cells) + "</tr>"
    return f'<div class="card pad scroll" style="margin-top:18px"><table><tr><th></th>{head}</tr>{body}</table></div>'


def tax(runs: list[Run]) -> str:
    """Returns what alignment did to held-out numbers, before and after: one column a run, with its ptx coefficient."""
    told = [before_after(run.lines) for run in runs]
    shown = [i for i, pairs in enumerate(told) if any(map(costs, pairs))]
    if not shown:
        return ""
    head = "".join(f'<th class="n">{dot(i)}{esc(runs[i].name)}</th>' for i in shown) if len(runs) > 1 else "<th></th>"
    coefs = [next((x["ptx_coef"] for x in reversed(runs[i].lines) if "ptx_coef" in x), None) for i in shown]
    body = "<tr><td>ptx.coef</td>" + "".join(f'<td class="n">{esc("" if c is None else c)}</td>' for c in coefs) + "</tr>"
    names = {name: None for i in shown for name in told[i]}
    for name in sorted(names, key=costs):
        cells = ""
        for i in shown:
            before, after, change = shown_change(name, *map(number, told[i][name])) if name in told[i] else ("", "", "")
            cells += f'<td class="n">{before} → {after} <span class="quiet">{change}</span></td>' if before else "<td></td>"
        body += f"<tr><td>{esc(name.removeprefix('eval_'))}</td>{cells}</tr>"
    about = "Before the first iteration and at the last evaluation; of few-shot tasks, the share answered right."
    return (f'<h2>Alignment tax</h2><p class="quiet small">{about}</p>'
            f'<div class="card pad scroll"><table><tr><th></th>{head}</tr>{body}</table></div>')


def dot(i: int) -> str:
    from jaxllm.report.plots import COLORS

    return f'<span class="dot" style="color:var(--run-{i % COLORS})"></span>'


# ---------------------------------------------------------------- curves and incidents


def number_incidents(runs: list[Run]) -> list[tuple[int, int, dict]]:
    """Returns (number, run, incident) of all incidents, by run and time; the numbers stand in the curves too."""
    flat = [(i, x) for i, run in enumerate(runs)
            for x in sorted(run.incidents, key=lambda x: (number(x.get("step") or 0), number(x.get("time") or 0)))]
    return [(n, i, x) for n, (i, x) in enumerate(flat[-MAX_INCIDENTS:], start=1)]


def curves(runs: list[Run], numbered) -> str:
    """Returns the legend and every plot for which there are numbers."""
    from jaxllm.report import plots  # matplotlib takes half a second to import

    by_tokens = len({round(per) for run in runs if (per := tokens_a_step(run))}) > 1
    marks = [plots.Mark(x["step"], i, str(n) if len(numbered) <= 20 else "", x.get("kind") not in INFORM)
             for n, i, x in numbered if isinstance(x.get("step"), (int, float))]
    span, drawn = plots.span_of(runs, by_tokens=by_tokens), []
    for panel in (*plots.PANELS, *plots.task_panels(runs)):
        if panel.keys == ("model_tflops_per_s",) and any(len(r.series("mfu").value) for r in runs):
            continue
        if svg := plots.draw(panel, runs, marks, span):
            several = all(any(len(run.series(key).value) for run in runs) for key in panel.keys)
            about = "; ".join(part for part in (plots.unit_of(panel, runs), panel.note if several else "") if part)
            drawn.append(f'<figure class="card"><figcaption>{panel.title} <span>{about}</span></figcaption>{svg}</figure>')
    if not drawn:
        return ""
    legend = "".join(f"<span>{dot(i)}{esc(run.name)}</span>" for i, run in enumerate(runs)) if len(runs) > 1 else ""
    said = "Faint: each logged line; solid: mean over a fortieth of the run." if any(len(r.lines) >= 30 for r in runs) else ""
    said += " The runs have steps of different size, so tokens are on the axis." if by_tokens else ""
    said += " Dotted lines: incidents, numbered as below." if marks else ""
    legend = f'<div class="legend">{legend}</div>' if legend else ""
    return (f'<h2>Curves</h2>{legend}<div class="plots">{"".join(drawn)}</div>'
            f'<p class="quiet small" style="margin-top:10px">{said.strip()}</p>')


def tokens_a_step(run: Run) -> float | None:
    for line in run.lines:
        if line["step"] and isinstance(line.get("tokens"), (int, float)):
            return line["tokens"] / line["step"]
    return None


def incidents(runs: list[Run], numbered) -> str:
    if not numbered:
        return ""
    hidden = sum(len(r.incidents) for r in runs) - len(numbered)
    rows = ""
    for n, i, x in numbered:
        when = moment(x["time"]) if isinstance(x.get("time"), (int, float)) else ""
        kind = esc(str(x.get("kind", "")).replace("_", " "))
        which = f'<td style="white-space:nowrap">{dot(i)}{esc(runs[i].name)}</td>' if len(runs) > 1 else ""
        rows += (f'<tr><td class="n quiet">{n}</td>{which}<td class="n">{esc(x.get("step", ""))}</td>'
                 f'<td>{kind if x.get("kind") in INFORM else f"""<b class="alarm">{kind}</b>"""}</td>'
                 f'<td>{esc(x.get("message", ""))}</td><td class="quiet small" style="white-space:nowrap">{when}</td></tr>')
    which = "<th>run</th>" if len(runs) > 1 else ""
    more = f'<p class="quiet small">{hidden} earlier ones are in incidents.jsonl.</p>' if hidden > 0 else ""
    head = f'<tr><th></th>{which}<th class="n">step</th><th>what</th><th></th><th>when</th></tr>'
    return f'<h2>Incidents</h2><div class="card pad scroll"><table>{head}{rows}</table></div>{more}'


# ---------------------------------------------------------------- samples and settings


def samples(runs: list[Run]) -> str:
    """Returns what the model wrote while it learned, newest first, the newest open."""
    out = ""
    for i, run in enumerate(runs):
        if run.samples:
            out += (f"<h3>{dot(i)}{esc(run.name)}</h3>" if len(runs) > 1 else "") + samples_of(run)
    return f"<h2>Samples</h2>{out}" if out else ""


def samples_of(run: Run) -> str:
    by_step: dict = {}
    for sample in run.samples:
        by_step.setdefault(sample.get("step"), []).append(sample)
    steps = list(by_step)[::-1]
    stride = -(-len(steps) // MAX_SAMPLED_STEPS)
    out = ""
    for n, step in enumerate(steps[::stride]):
        texts = "".join(sample_text(s) for s in by_step[step])
        out += (f'<details class="card"{" open" if n == 0 else ""}><summary>step {esc(step)}</summary>'
                f'<div class="pad">{texts}</div></details>')
    if stride > 1:
        out += f'<p class="quiet small">One of every {stride} sampled steps; all are in samples.jsonl.</p>'
    return out


def sample_text(sample: dict) -> str:
    text = sample["text"]
    cut = f'<span class="quiet"> … {len(text) - MAX_SAMPLE:,} more characters</span>' if len(text) > MAX_SAMPLE else ""
    return f'<div class="text"><i>{esc(sample.get("prompt") or "")}</i>{esc(text[:MAX_SAMPLE])}{cut}</div>'


def settings(runs: list[Run]) -> str:
    """Returns what differs between the runs, and each run's resolved settings."""
    flat = [flatten(run.config) for run in runs]
    if not any(flat):
        return ""
    out = differing(runs, flat) if len(runs) > 1 else ""
    for i, run in enumerate(runs):
        if run.config:
            shown = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=110)
            name = f"{dot(i)}{esc(run.name)}: all" if len(runs) > 1 else "All"
            out += (f'<details class="card"><summary>{name} settings, with versions</summary>'
                    f'<div class="pad"><pre>{esc(shown)}</pre></div></details>')
    return f"<h2>Settings</h2>{out}"


def differing(runs: list[Run], flat: list[dict]) -> str:
    keys = {key: None for settings in flat for key in settings}
    odd = [k for k in keys if len({str(f.get(k, "")) for f in flat}) > 1 and k != "run.dir"]
    if not odd:
        return '<p class="quiet">The runs have the same settings.</p>'
    head = "".join(f"<th>{dot(i)}{esc(run.name)}</th>" for i, run in enumerate(runs))
    common = [max(values, key=values.count) for values in ([str(f.get(k, "")) for f in flat] for k in odd)]
    rows = ""
    for k, usual in zip(odd, common, strict=True):
        values = [str(f.get(k, "")) for f in flat]
        mark = [len(runs) == 2 or v != usual for v in values]
        rows += f'<tr><td class="key">{esc(k)}</td>' + "".join(
            f'<td{" class=differs" if m else ""}>{esc(v)}</td>' for v, m in zip(values, mark, strict=True)) + "</tr>"
    return ('<p class="quiet small">Only what differs:</p>'
            f'<div class="card pad scroll"><table><tr><th></th>{head}</tr>{rows}</table></div>')


def flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
