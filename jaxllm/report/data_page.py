"""The page and the card of a folder that `jaxllm data` wrote: where the documents went, and what each rule took."""

import itertools

from jaxllm import __version__
from jaxllm.report.page import document, esc

IN_MANIFEST_ONLY = {"examples_a", "examples_b", "baseline", "typical", "documents_used"}
FIRST = 20  # rules that are shown at once
CSS = """
th.n { text-align: right; }
.bars { display: grid; grid-template-columns: minmax(110px, 190px) 1fr minmax(120px, auto); gap: 8px 12px; align-items: center;
  font-size: 14px; padding: 9px 16px; }
.bar { display: contents; }
.bar i { display: block; height: 14px; border-radius: 3px; background: var(--run-0); min-width: 1px; }
.bar span:last-child { text-align: right; font-variant-numeric: tabular-nums; color: var(--muted); font-size: 13px; }
.bar.out i { background: var(--run-2); }
.two { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 22px; }
.two .text, .sample .text { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; max-height: 320px; overflow: auto;
  border-top: 0; padding-top: 0; }
.sample .text { margin-bottom: 14px; }
.pairs + .pairs { margin-top: 12px; }
@media (max-width: 720px) { .two { grid-template-columns: minmax(0, 1fr); } .bars { grid-template-columns: 92px 1fr auto; } }
"""


def page(manifest: dict, samples: list[dict], pairs: list[dict], seconds: dict[str, float]) -> str:
    """Returns the HTML of report.html."""
    t = manifest["totals"]
    body = [
        "<h1>Cleaned text</h1>",
        f'<p class="quiet">{esc(", ".join(manifest["sources"]))}</p>', facts(t, manifest), funnels(manifest["sources"]),
        removals(manifest["rules"], t["inputs"]), lengths(manifest["lengths"]), languages(manifest["languages"]),
        tallies(manifest["counts"]), decided(manifest["decided"]), before_after(pairs), removed_text(samples),
        processor(seconds), f"<footer>jaxllm {__version__}; output {esc(manifest['output_sha256'][:16])}</footer>",
    ]
    return document("Cleaned text", body, CSS)


def facts(t: dict, manifest: dict) -> str:
    share = t["kept"] / max(t["inputs"], 1)
    cells = [(f"{t['inputs']:,}", "documents in"), (f"{t['kept']:,}", f"kept ({share:.1%})"), (f"{t['removed']:,}", "removed"),
             (f"{t['documents']:,}", "written, copies included"), (size(t["bytes"]), "of text"),
             (f"{len({(r['stage'], r['rule']) for r in manifest['rules']}):,}", "rules that removed something")]
    shown = "".join(f'<div class="card"><b>{esc(a)}</b><span>{esc(b)}</span></div>' for a, b in cells)
    return f'<div class="facts">{shown}</div>'


def funnels(sources: dict) -> str:
    """Documents and bytes that came out of each stage, a source at a time."""
    out = ["<h2>From stage to stage</h2>"]
    for name, source in sources.items():
        rows, most = [], max(source["inputs"], 1)
        written = source["documents"], source["bytes"]
        for stage, (documents, n_bytes) in [("in", (source["inputs"], None)), *source["funnel"].items(), ("written", written)]:
            said = f"{documents:,}" + (f" · {size(n_bytes)}" if n_bytes is not None else "")
            rows.append(bar(stage, min(documents / most, 1), said, "out" if stage == "written" else ""))
        out.append(f'<h3>{esc(name)}</h3>{bars(rows)}')
    return "\n".join(out)


def bars(rows: list[str]) -> str:
    """One grid holds all bars of a card: they begin and end at the same place however long the figures beside them are."""
    return f'<div class="card bars">{"".join(rows)}</div>'


def bar(label: str, share: float, said: str, kind: str = "") -> str:
    drawn = f'<i style="width:{100 * share:.2f}%"></i>' if share else ""
    return f'<div class="bar {kind}"><span>{esc(label)}</span><span>{drawn}</span><span>{esc(said)}</span></div>'


def removals(rules: list[dict], inputs: int) -> str:
    if not rules:
        return "<h2>Removed</h2><p>Nothing.</p>"
    sources = sorted({r["source"] for r in rules})
    by_rule: dict[str, dict[str, int]] = {}
    for r in rules:
        by_rule.setdefault(f"{r['stage']} {r['rule']}", {})[r["source"]] = r["documents"]
    by_rule = dict(sorted(by_rule.items(), key=lambda item: -sum(item[1].values())))
    rows = [(rule, sum(n.values()), f"{sum(n.values()) / max(inputs, 1):.2%}",
             *((n.get(s, 0) for s in sources) if len(sources) > 1 else ())) for rule, n in by_rule.items()]
    head = ("rule", "documents", "of all", *(sources if len(sources) > 1 else ()))
    shown = f'<h2>Removed, by rule</h2><div class="card pad scroll">{table(head, rows[:FIRST])}</div>'
    return shown + (folded(f"{len(rows) - FIRST} rules more", table(head, rows[FIRST:])) if rows[FIRST:] else "")


def table(head, rows) -> str:
    """Returns a table; numbers stand right, the first column is set as code."""
    def kind(i: int, v) -> str:
        return "key" if i == 0 else "n" if isinstance(v, (int, float)) or str(v).endswith("%") else ""

    rows = [list(row) for row in rows]
    lines = "".join("<tr>" + "".join(f'<td class="{kind(i, v)}">{esc(said(v))}</td>' for i, v in enumerate(row)) + "</tr>"
                    for row in rows)
    first = rows[0] if rows else head
    named = "".join(f'<th class="{kind(i, v)}">{esc(name)}</th>' for i, (name, v) in enumerate(zip(head, first, strict=False)))
    return f"<table>{f'<tr>{named}</tr>' if head else ''}{lines}</table>"


def lengths(found: dict) -> str:
    """Two histograms of documents' lengths in characters, before and after."""
    bins, out = found["bins"], ["<h2>Lengths</h2>", '<div class="plots">']
    used = [i for i in range(len(bins)) if found["in"][i] or found["out"][i]]
    if not used:
        return ""
    low, high = min(used), max(used) + 1
    for key, title in (("in", "As they came, markup included"), ("out", "What the filters left")):
        counts = found[key][low:high]
        n, most = len(counts), max(*counts, 1)
        width, height = 460, 170
        step = width / n
        bars = "".join(f'<rect x="{i * step + 1:.1f}" y="{height - c / most * height:.1f}" width="{max(step - 2, 1):.1f}" '
                       f'height="{c / most * height:.1f}" fill="var(--run-{0 if key == "in" else 2})"><title>'
                       f'{bins[low + i]:,} characters or more: {c:,}</title></rect>' for i, c in enumerate(counts))
        every = max(n // 6, 1)
        ticks = "".join(f'<text x="{i * step:.1f}" y="{height + 16}" font-size="11" fill="var(--muted)">'
                        f"{label}</text>" for i in range(0, n, every)
                        if i * step + 8 * len(label := short(bins[low + i])) <= width)  # a digit is narrower than 8
        out.append(f'<figure class="card"><figcaption>{title}<span>documents by characters</span></figcaption>'
                   f'<svg viewBox="0 -4 {width} {height + 28}">{bars}{ticks}</svg></figure>')
    return "\n".join([*out, "</div>"])


def languages(found: dict) -> str:
    if not found or list(found) == ["unknown"]:
        return ""
    rows = sorted(found.items(), key=lambda row: -row[1])[:20]
    most = rows[0][1]
    return "<h2>Languages of what the filters left</h2>" + bars([bar(name, n / most, f"{n:,}") for name, n in rows])


def tallies(counts: dict) -> str:
    """What stages changed or saw, counted: one table a stage, the most frequent first."""
    out = []
    keys = sorted(counts, key=lambda k: (k.split(".")[0], -counts[k]))
    for stage, group in itertools.groupby(keys, key=lambda k: k.split(".")[0]):
        out.append(folded(stage, table((), [(k.partition(".")[2], counts[k]) for k in list(group)[:60]])))
    return "<h2>Changed and counted</h2>" + "".join(out) if out else ""


def folded(title: str, inside: str, kind: str = "", *, open_: bool = False) -> str:
    return (f'<details class="card {kind}"{" open" if open_ else ""}><summary>{esc(title)}</summary>'
            f'<div class="pad scroll">{inside}</div></details>')


def decided(found: dict) -> str:
    """What was decided over all documents: tables as they come."""
    out = []
    for title, rows in found.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            keys = [k for k in dict.fromkeys(k for row in rows for k in row) if k not in IN_MANIFEST_ONLY]
            shown = table([k.replace("_", " ") for k in keys], [[row.get(k) for k in keys] for row in rows[:60]])
            out.append(f'<h3>{esc(title)}</h3><div class="card pad scroll">{shown}</div>')
        elif isinstance(rows, dict) and rows:
            out.append(f'<h3>{esc(title)}</h3><div class="card pad scroll">{table((), rows.items())}</div>')
    return "<h2>Decided over all documents</h2>" + "".join(out) if out else ""


def before_after(pairs: list[dict]) -> str:
    if not pairs:
        return ""
    out = ["<h2>Before and after</h2>",
           '<p class="quiet">Personal data is masked on both sides, as the settings of privacy say.</p>']
    for i, one in enumerate(pairs):
        texts = "".join(f'<div class="text">{esc(one[side])}</div>' for side in ("before", "after"))
        out.append(folded(f"{one['source']}: {one['id']}", f'<div class="two">{texts}</div>', "pairs", open_=i == 0))
    return "\n".join(out)


def removed_text(samples: list[dict]) -> str:
    if not samples:
        return ""
    out = ["<h2>What each rule removed</h2>"]
    for (stage, rule), group in itertools.groupby(samples, key=lambda one: (one["stage"], one["rule"])):
        shown = list(group)[:4]
        texts = "".join(f'<p class="small quiet">{esc(one["id"])}{value(one)}</p>'
                        f'<div class="text">{esc(one["text"][:1500])}</div>' for one in shown)
        out.append(folded(f"{stage} {rule}", texts, "sample"))
    return "\n".join(out)


def value(one: dict) -> str:
    found = "" if one.get("value") is None else f": {said(one['value'])}"
    return esc(found + (f", a duplicate of {one['duplicate_of']}" if one.get("duplicate_of") else ""))


def processor(seconds: dict[str, float]) -> str:
    if not seconds:
        return ""
    most = max(*seconds.values(), 1e-9)
    return "<h2>Processor time, by stage</h2>" + bars([bar(stage, s / most, f"{s:,.1f} s") for stage, s in seconds.items()])


def said(v) -> str:
    if v is None:
        return ""
    if isinstance(v, list):
        return ", ".join(map(str, v))
    if isinstance(v, float):
        return f"{v:,.0f}" if abs(v) >= 1000 else f"{v:,.4g}"
    return f"{v:,}" if isinstance(v, int) and not isinstance(v, bool) else str(v)


def size(n: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= factor:
            return f"{n / factor:,.1f} {unit}"
    return f"{n:,.0f} bytes"


def short(n: int) -> str:
    return f"{n / 1e6:g}M" if n >= 1e6 else f"{n / 1e3:.3g}k" if n >= 1000 else str(n)


def card(manifest: dict) -> str:
    """Returns card.md: what the text is, where it comes from and what was done to it (after Gebru et al. 2018)."""
    t, settings = manifest["totals"], manifest["plan"]["settings"]
    spoken = sorted(manifest["languages"].items(), key=lambda row: -row[1])
    lines = [
        "# Data card", "", f"{t['documents']:,} documents, {size(t['bytes'])} of text, made by jaxllm {__version__} from "
        f"{t['inputs']:,} documents, of which {t['removed']:,} were removed.", "",
        "## Sources", "", "| source | path | in | written | text |", "| --- | --- | --- | --- | --- |",
        *(f"| {name} | `{settings['sources'][name]['path']}` | {s['inputs']:,} | {s['documents']:,} | {size(s['bytes'])} |"
          for name, s in manifest["sources"].items()),
        "", "## Languages", "", ", ".join(f"{name} {n:,}" for name, n in spoken[:20]) or "not told",
        "", "## Removed", "", "| rule | source | documents |", "| --- | --- | --- |",
        *(f"| {r['stage']} {r['rule']} | {r['source']} | {r['documents']:,} |" for r in manifest["rules"]),
        "", "## Changed", "", "| what | times |", "| --- | --- |",
        *(f"| {k} | {n:,.10g} |" for k, n in manifest["counts"].items()), "", "## To fill in by hand", "",
        "Licences and rights; who is in the text and who is not; known gaps; uses it is not fit for.", "",
        "## Reproduce", "", f"Settings, versions and hashes: manifest.json (output {manifest['output_sha256'][:16]}).", ""]
    return "\n".join(lines)
