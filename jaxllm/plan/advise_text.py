"""The advice as text: the answer, the ranking, break-even and what would change it."""

import textwrap

from jaxllm.plan.advise import Advice
from jaxllm.plan.advise_config import AdviseVerb
from jaxllm.plan.advise_options import NAMES, count, tokens_a_month, usd
from jaxllm.plan.advise_words import WORDS
from jaxllm.plan.breakeven import Crossing
from jaxllm.plan.prices import Prices


def text(cfg: AdviseVerb, prices: Prices, advice: Advice) -> str:
    tokens, months = tokens_a_month(cfg), cfg.time.months
    lines = [f"{cfg.title}: {count(tokens)} tokens a month, {months} months in use; prices of {prices.date}", "",
             *textwrap.wrap(answer(cfg, advice), 128), "",
             f"  {'':<54}{f'USD, {months} months':>16}{'a month':>12}{'first use':>16}"]
    for o in advice.options:
        total, mark = o.total(tokens, months), "x " if o.why_not else "  "
        lines.append(f"{mark}{o.name:<54}{total:>16,.0f}{total / months:>12,.0f}{o.ready_months:>9.1f} months")
    lines += ["", "ruled out (x):" if any(o.why_not for o in advice.options) else "nothing is ruled out"]
    lines += [line for o in advice.options if o.why_not for line in wrapped(f"{o.name}: {'; '.join(o.why_not)}")]
    if told := [line for o in advice.options if o.unknown for line in wrapped(f"{o.name}: {'; '.join(o.unknown)}")]:
        lines += ["", "not known:", *told]
    at = milestones(cfg)
    lines += ["", f"USD up to the end of month {', '.join(map(str, at))}:"]
    lines += [f"  {o.name:<54}" + "".join(f"{o.cumulated(tokens, months)[k]:>11,.0f}" for k in at) for o in advice.options]
    lines += [f"  {line}" for line in in_time(advice)]
    lines += ["", f"break-even, tokens a month over {months} months (here {count(tokens)}):"]
    lines += [line for (a, b), found in advice.crossings.items()
              for line in wrapped(f"{NAMES[a]} | {NAMES[b]}: {crossed(a, b, found, advice, cfg)}")]
    lines += ["", "what would change the answer:", *(f"  {line}" for line in changes(advice))]
    if advice.best:
        words = WORDS[advice.best.approach]
        lines += ["", f"{advice.best.name}: for (+), against (-), risks (!)"]
        lines += [line for sign, said in (("+", words.for_it), ("-", words.against), ("!", words.risks)) for s in said
                  for line in wrapped(f"{sign} {s}")]
    return "\n".join(lines)


def milestones(cfg: AdviseVerb) -> list[int]:
    """Returns the months at which cost is told, the last of the horizon among them."""
    return [*(k for k in (1, 3, 6, 12, 24, 36) if k < cfg.time.months), cfg.time.months]


def in_time(advice: Advice) -> list[str]:
    """Returns when one way's cost overtakes another's, of those that may be taken."""
    allowed = {o.approach for o in advice.options if not o.why_not}
    return [f"until month {c.at:.1f} {NAMES[a if c.first_below else b]} has cost less than {NAMES[b if c.first_below else a]}"
            for (a, b), found in advice.months.items() if {a, b} <= allowed for c in found]


def wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 126, initial_indent="  ", subsequent_indent="    ")


def answer(cfg: AdviseVerb, advice: Advice) -> str:
    """Returns the answer in a few sentences."""
    tokens, months, first = tokens_a_month(cfg), cfg.time.months, advice.options[0]
    if first.why_not:
        return f"No way is left. The nearest is {first.name}, which fails by: {'; '.join(first.why_not)}."
    total = first.total(tokens, months)
    said = f"{first.name}: {usd(total)} over {months} months, first use after {first.ready_months:.1f} months."
    said = said[0].upper() + said[1:]
    others = [o for o in advice.options[1:] if not o.why_not]
    more = others[0].total(tokens, months) - total if others else 0.0
    said += f" Next: {others[0].name}, {usd(more)} more." if others else " Nothing else is left."
    volume = advice.turns[0]
    if volume.factor is None:
        return said
    edge, beyond = ("up to", "above") if volume.factor > 1 else ("down to", "below")
    return f"{said} It stays so {edge} {volume.then} {volume.what}, {volume.factor:.2g} times as many; {beyond}: {volume.best}."


def changes(advice: Advice) -> list[str]:
    """Returns one line for each figure and rule."""
    lines = []
    for t in advice.turns:
        lines.append(f"{t.what}: {t.now}; at {t.then} ({t.factor:.3g} times as much): {t.best}" if t.factor else
                     f"{t.what}: {t.now}; the answer stays from a hundredth to a hundred times that")
    for r in advice.lifted:
        cost = f", {usd(r.usd)}" if r.usd is not None else ""
        lines.append(f"{r.what}: {r.best}{cost}" if r.changes else f"{r.what}: the answer stays")
    return lines


def crossed(a: str, b: str, found: list[Crossing], advice: Advice, cfg: AdviseVerb) -> str:
    """Returns the break-even volumes of two approaches in words."""
    if not found:
        one, other = (next(o for o in advice.options if o.approach == x) for x in (a, b))
        tokens, months = tokens_a_month(cfg), cfg.time.months
        gap = one.total(tokens, months) - other.total(tokens, months)
        return "the same" if gap == 0 else f"none; {NAMES[a if gap < 0 else b]} is cheaper at every volume"
    below = NAMES[a if found[0].first_below else b]
    if len(found) < 3:
        return ", ".join(f"{count(c.at)}{' (a step of whole servers)' if c.jump else ''}; below it "
                         f"{NAMES[a if c.first_below else b]} is cheaper" for c in found)
    above = NAMES[b if found[-1].first_below else a]
    return (f"{len(found)} times between {count(found[0].at)} and {count(found[-1].at)}, by steps of whole servers; below them "
            f"{below}, above them {above} is cheaper")


def tried_times(advice: Advice) -> str:
    return f"{len(advice.all)} ways and models, {sum(not o.why_not for o in advice.all)} of them possible"
