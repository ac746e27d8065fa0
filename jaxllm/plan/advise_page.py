"""The advice as one HTML page that loads nothing from anywhere: ranking, plots, break-even, words, sources."""

import yaml

from jaxllm import __version__
from jaxllm.config import to_dict
from jaxllm.plan.advise import Advice
from jaxllm.plan.advise_config import AdviseVerb
from jaxllm.plan.advise_options import NAMES, Option, PerToken, count, per_request, tokens_a_month, usd
from jaxllm.plan.advise_rules import bar_of
from jaxllm.plan.advise_sources import sources
from jaxllm.plan.advise_text import answer, crossed, in_time, milestones, tried_times
from jaxllm.plan.advise_words import WORDS
from jaxllm.plan.prices import APPROACHES, Prices
from jaxllm.report.page import document, dot, esc

PARTS = {"engineering": "people until first use", "upkeep": "people in use", "training": "training", "examples": "examples",
         "machines": "machines bought", "serving": "serving"}
PLACES = {"anywhere": "anywhere", "us": "in the US", "eu": "in the EU", "on_premises": "on your own machines"}
CSS = """
.lead { font-size: 16.5px; margin: 14px 0 0; max-width: 84ch; }
ul { margin: 0; padding-left: 17px; } li { margin: 2px 0; }
tr.best td { background: var(--tint); } tr.best td:first-child { box-shadow: -8px 0 0 var(--tint); }
tr.best td:last-child { box-shadow: 8px 0 0 var(--tint); }
.shares { display: grid; grid-template-columns: minmax(120px, 330px) 1fr minmax(90px, auto); gap: 9px 14px; align-items: center;
  padding: 12px 16px; font-size: 14px; }
.share { display: flex; height: 16px; border-radius: 3px; overflow: hidden; background: var(--grid); }
.share i { display: block; height: 100%; }
.shares span:nth-child(3n) { text-align: right; font-variant-numeric: tabular-nums; }
.three { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 6px 26px; padding: 4px 16px 12px;
  font-size: 14px; }
.three h4 { margin: 8px 0 4px; font-size: 13px; }
.tag { font-size: 11.5px; color: var(--muted); border: 1px solid var(--grid); border-radius: 4px; padding: 0 5px;
  white-space: nowrap; }
.source { overflow-wrap: anywhere; color: var(--muted); font-size: 13px; }
.facts b { font-size: 19px; white-space: nowrap; }
.gap { margin-top: 12px; }
details .card.pad { border-width: 1px 0 0; border-radius: 0; }
@media (max-width: 720px) {
  .three { grid-template-columns: minmax(0, 1fr); }
  .shares { grid-template-columns: 1fr auto; gap: 4px 10px; }
  .shares .share { grid-column: 1 / -1; order: 0; margin-bottom: 8px; }
  .shares span:nth-child(3n) { grid-column: 1 / -1; text-align: left; margin-bottom: 10px; color: var(--muted); }
  .shares span { grid-column: 1 / -1; }
  .ranking tr:first-child { display: none; } .ranking tr { display: block; border-top: 1px solid var(--grid); padding: 8px 0; }
  .ranking td { display: block; border: 0; padding: 1px 0; text-align: left; }
  tr.best td:first-child, tr.best td:last-child { box-shadow: none; }
  .ranking td.n::before { content: attr(title) ": "; color: var(--muted); } }
"""


def page(cfg: AdviseVerb, prices: Prices, advice: Advice) -> str:
    """Returns the HTML."""
    note = (f"jaxllm {__version__}, plan advise, prices of {prices.date}. Money is before tax and discounts. "
            "A plan, not an offer: ask for prices before you sign, and measure quality on text of your own.")
    body = [f"<h1>{esc(cfg.title)}</h1>", subtitle(cfg, prices), f'<p class="lead">{esc(answer(cfg, advice))}</p>',
            facts(cfg, advice), ranking(cfg, advice), plots(cfg, advice), spent(cfg, advice), break_even(cfg, advice),
            changing(advice), words(advice), tried(cfg, advice), sources(cfg, prices, advice.options), settings(cfg),
            f"<footer>{esc(note)}</footer>"]
    return document(cfg.title, body, CSS)


def table(head: list[str], rows: list[str], numbers: tuple[int, ...] = ()) -> str:
    """Returns a card with a table; `rows` are whole <tr>s, `numbers` the columns whose heads stand right."""
    named = "".join(f'<th{" class=n" if i in numbers else ""}>{esc(name)}</th>' for i, name in enumerate(head))
    return f'<div class="card pad scroll"><table><tr>{named}</tr>{"".join(rows)}</table></div>'


def cells(*values, numbers: tuple[int, ...] = ()) -> str:
    return "<tr>" + "".join(f'<td{" class=n" if i in numbers else ""}>{esc(v)}</td>' for i, v in enumerate(values)) + "</tr>"


def items(said, kind: str = "") -> str:
    return f'<ul class="{kind}">{"".join(f"<li>{esc(s)}</li>" for s in said)}</ul>' if said else ""


def named(o: Option) -> str:
    """Returns an option's colour, approach and model, in two lines."""
    return f'{dot(APPROACHES.index(o.approach))}{esc(NAMES[o.approach])}<br><span class="quiet small">{esc(o.model)}</span>'


def subtitle(cfg: AdviseVerb, prices: Prices) -> str:
    read, written = per_request(cfg)
    said = [f"{count(cfg.volume.requests)} requests a month of {read:,.0f} tokens read and {written:,.0f} written",
            f"{cfg.data.sensitivity} text, processed {PLACES[cfg.data.residency]}", f"{cfg.time.months} months in use"]
    if bar := bar_of(cfg, prices):
        said.append("at least " + ", ".join(f"{value:g} in {task}" for task, value in bar.items()))
    return f'<p class="quiet">{esc(" · ".join(said))}</p>'


def facts(cfg: AdviseVerb, advice: Advice) -> str:
    """The answer's numbers, as cards."""
    if advice.best is None:
        return ""
    o, tokens, months = advice.best, tokens_a_month(cfg), cfg.time.months
    total, used = o.total(tokens, months), sum(tokens * (1 + cfg.volume.growth) ** k for k in range(months))
    told = [(usd(total), f"over {months} months"), (usd(total / months), "a month, all in"),
            (f"{total / used * 1e6:,.2f} USD", "a million tokens, all in"), (f"{o.ready_months:.1f} months", "until first use")]
    if o.replica:
        chips = cfg.hardware.replicas * o.replica.chips
        told += [(f"{chips} chips", f"{cfg.hardware.chip}, that always run, {o.replica.chips} a replica"),
                 (f"{o.replica.tokens_per_s:.0f} tokens/s", f"to a reader, {o.replica.batch} at a time and replica")]
    if o.flops:
        told.append((f"{o.flops:.1e}".replace("e+", "e"), "FLOPs of training, trials included"))
    cards = "".join(f'<div class="card"><b>{esc(a)}</b><span>{esc(b)}</span></div>' for a, b in told)
    return f'<div class="facts">{cards}</div>'


def ranking(cfg: AdviseVerb, advice: Advice) -> str:
    """Every approach with its best model: allowed ones by cost, then what is ruled out and why."""
    tokens, months, rows = tokens_a_month(cfg), cfg.time.months, []
    head = ["", f"{months} months", "a month", "months to first use", ""]
    for o in advice.options:
        total, kind = o.total(tokens, months), ' class="best"' if o is advice.best else ""
        verdict = '<b class="alarm">ruled out</b>' if o.why_not else "<b>possible</b>"
        figures = "".join(f'<td class="n" title="{name}">{value}</td>' for name, value in
                          zip(head[1:4], (usd(total), usd(total / months), f"{o.ready_months:.1f}"), strict=True))
        rows.append(f'<tr{kind}><td style="white-space:nowrap">{named(o)}</td>{figures}'
                    f'<td class="small">{verdict}{items(o.why_not)}{items(o.unknown, "quiet")}</td></tr>')
    return f'<h2>The ways, ranked</h2><div class="ranking">{table(head, rows, numbers=(1, 2, 3))}</div>'


def plots(cfg: AdviseVerb, advice: Advice) -> str:
    from jaxllm.plan import advise_plots as drawn  # matplotlib takes half a second to import

    months = cfg.time.months
    shown = [("Cost up to each month of use", "USD, log scale; dashed: ruled out", drawn.by_month(cfg, advice)),
             (f"Cost over {months} months", "USD, against volume; dots: break-even", drawn.by_volume(cfg, advice)),
             (f"A million tokens over {months} months", "USD, all in, against volume", drawn.by_token(cfg, advice))]
    if advice.best:
        shown.append((f"What the answer's {months} months depend on", "half (pale) and twice each; dashed: next way",
                      drawn.tornado(cfg, advice)))
    legend = "".join(f"<span>{dot(APPROACHES.index(o.approach))}{esc(NAMES[o.approach])}</span>" for o in advice.options)
    figures = "".join(f'<figure class="card"><figcaption>{esc(title)} <span>{esc(about)}</span></figcaption>{svg}</figure>'
                      for title, about, svg in shown)
    return f'<h2>Cost</h2><div class="legend">{legend}</div><div class="plots">{figures}</div>{monthly(cfg, advice)}'


def monthly(cfg: AdviseVerb, advice: Advice) -> str:
    """Cost up to some months, the least of what may be taken in bold, and when one way overtakes another."""
    at, rows = milestones(cfg), []
    up_to = {o.approach: o.cumulated(tokens_a_month(cfg), cfg.time.months) for o in advice.options}
    least = [min((up_to[o.approach][k] for o in advice.options if not o.why_not), default=None) for k in at]
    for o in advice.options:
        told = "".join(f'<td class="n">{"<b>" if up_to[o.approach][k] == low else ""}{up_to[o.approach][k]:,.0f}</td>'
                       for k, low in zip(at, least, strict=True))
        kind = ' class="quiet"' if o.why_not else ""
        rows.append(f"<tr{kind}><td>{dot(APPROACHES.index(o.approach))}{esc(o.name)}</td>{told}</tr>")
    shown = table(["USD up to month", *map(str, at)], rows, tuple(range(1, len(at) + 1)))
    said = "".join(f'<p class="small quiet">{esc(line[0].upper() + line[1:])}.</p>' for line in in_time(advice))
    return f'<div class="gap">{shown}</div><div class="gap">{said}</div>'


def spent(cfg: AdviseVerb, advice: Advice) -> str:
    """What each way's money is for, as shares of its own total."""
    rows, used = "", set()
    for o in advice.options:
        parts = o.parts(tokens_a_month(cfg), cfg.time.months)
        total = sum(parts.values()) or 1.0
        bar = "".join(f'<i style="width:{100 * v / total:.2f}%;background:var(--run-{i})" title="{PARTS[name]}: {usd(v)}"></i>'
                      for i, (name, v) in enumerate(parts.items()) if v)
        used |= {name for name, v in parts.items() if v / total > 0.001}
        rows += f'<span>{esc(o.name)}</span><div class="share">{bar}</div><span>{usd(total)}</span>'
    legend = "".join(f"<span>{dot(i)}{esc(said)}</span>" for i, (name, said) in enumerate(PARTS.items()) if name in used)
    return f'<h2>What the money is for</h2><div class="legend">{legend}</div><div class="card shares">{rows}</div>'


def break_even(cfg: AdviseVerb, advice: Advice) -> str:
    """Pairs that cross, with where; the others folded."""
    told = [(found, cells(NAMES[a], NAMES[b], crossed(a, b, found, advice, cfg))) for (a, b), found in advice.crossings.items()]
    meet, never = [row for found, row in told if found], [row for found, row in told if not found]
    head = ["between", "and", "tokens a month"]
    said = (f"Tokens in the first month at which both cost the same over {cfg.time.months} months, with the same mix of tokens "
            f"read and written; here {count(tokens_a_month(cfg))}. What is ruled out is compared as if it were not.")
    shown = table(head, meet) if meet else "<p>No two of them cross.</p>"
    folded = (f'<details class="card"><summary>{len(never)} pairs that never cross</summary>'
              f'<div class="pad scroll">{table(head, never)}</div></details>' if never else "")
    return f'<h2>Break-even</h2><p class="quiet small">{esc(said)}</p>{shown}{folded}'


def changing(advice: Advice) -> str:
    """Sensitivity: figures and rules."""
    stays, numbers, out = "the answer stays", (1, 2, 3), "<h2>What would change the answer</h2>"
    if advice.turns:
        rows = [cells(t.what, t.now, t.then or "–", f"{t.factor:.3g}" if t.factor else "–", t.best or stays, numbers=numbers)
                for t in advice.turns]
        out += ('<p class="quiet small">One figure at a time, up to a hundred times both ways, until another way is best.</p>'
                + table(["figure", "now", "would be", "times", "then best"], rows, numbers))
    if advice.lifted:
        rows = [cells(r.what, *((r.best, "" if r.usd is None else usd(r.usd)) if r.changes else (stays, "")), numbers=(2,))
                for r in advice.lifted]
        out += '<p class="quiet small gap">One rule at a time.</p>' + table(["if", "then best", "cost"], rows, (2,))
    return out


def words(advice: Advice) -> str:
    out = "<h2>For, against, risks</h2>"
    for o in advice.options:
        said = WORDS[o.approach]
        columns = "".join(f"<div><h4>{title}</h4>{items(lines)}</div>" for title, lines in
                          (("Advantages", said.for_it), ("Disadvantages", said.against), ("Risks", said.risks)))
        out += (f'<details class="card"{" open" if o is advice.options[0] else ""}><summary>{dot(APPROACHES.index(o.approach))}'
                f'{esc(o.name)}</summary><div class="pad three">{columns}</div></details>')
    return out


def tried(cfg: AdviseVerb, advice: Advice) -> str:
    """Every model with every approach, folded."""
    tokens, months = tokens_a_month(cfg), cfg.time.months
    order = sorted(advice.all, key=lambda o: (bool(o.why_not), APPROACHES.index(o.approach), o.total(tokens, months)))
    rows = [cells(o.name, usd(o.total(tokens, months)), machine(o), "; ".join(o.why_not) or "possible", numbers=(1,))
            for o in order]
    shown = table(["", f"{months} months", "one replica", ""], rows, (1,))
    summary = f'<details class="card"><summary>{tried_times(advice)}</summary>'
    return f"<h2>All that was tried</h2>{summary}{shown}</details>"


def machine(o: Option) -> str:
    if isinstance(o.serving, PerToken):
        return f"{o.serving.usd * 1e6:.3g} USD a million tokens"
    if o.replica is None:
        return ""
    chips = f"{o.replica.chips} chip{'s' if o.replica.chips > 1 else ''}"
    return f"{chips}, batch {o.replica.batch}, {o.replica.tokens_per_s:.0f} tokens/s"


def settings(cfg: AdviseVerb) -> str:
    plain = to_dict(cfg)
    plain["data"]["languages"] = list(plain["data"]["languages"])
    shown = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110)
    return ('<h2>Settings</h2><details class="card"><summary>All settings</summary><div class="pad">'
            f"<pre>{esc(shown)}</pre></div></details>")
