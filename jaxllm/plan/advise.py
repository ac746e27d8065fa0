"""`jaxllm plan advise CONFIG`: API, open model or own model: cost, what rules it out, what would change the answer."""

import dataclasses
import itertools
import pathlib

from jaxllm.errors import UserError
from jaxllm.plan.advise_config import AdviseVerb
from jaxllm.plan.advise_options import Option, api_option, chip_and_price, open_option, scratch_option, tokens_a_month
from jaxllm.plan.advise_rules import bar_of, judged_api, judged_open, judged_scratch, training_that_reached
from jaxllm.plan.advise_sensitivity import Lifted, Turn, lifted, turns
from jaxllm.plan.breakeven import Crossing, crossings, months_to_cross
from jaxllm.plan.prices import APPROACHES, Prices, read_prices

LOW, HIGH = 1e-4, 1e4  # of the volume asked for: where break-even is looked for


@dataclasses.dataclass(frozen=True)
class Advice:
    """The answer: one option for each approach, the allowed ones first, cheapest first."""

    options: list[Option]
    all: list[Option]
    crossings: dict[tuple[str, str], list[Crossing]]  # by approach and approach
    months: dict[tuple[str, str], list[Crossing]]  # the same in months of use, at the volume of the settings
    turns: list[Turn]
    lifted: list[Lifted]

    @property
    def best(self) -> Option | None:
        return self.options[0] if not self.options[0].why_not else None


def main(cfg: AdviseVerb) -> dict:
    """Writes the page, prints the advice and returns it; raises UserError, after that, where nothing is left."""
    from jaxllm.plan.advise_page import page
    from jaxllm.plan.advise_text import text
    from jaxllm.report.page import write

    prices = read_prices(cfg.prices)
    advice = advise(cfg, prices)
    write(page(cfg, prices, advice), pathlib.Path(cfg.page))
    print(text(cfg, prices, advice))
    print(f"\n{cfg.page}")
    if advice.best is None:
        near = advice.options[0]
        raise UserError(f"no way is left; the nearest is {near.name}, which fails by: {'; '.join(near.why_not)}")
    return as_json(cfg, advice)


def advise(cfg: AdviseVerb, prices: Prices) -> Advice:
    """Returns the whole advice; reads nothing and writes nothing."""
    every, tokens, months = weigh(cfg, prices), tokens_a_month(cfg), cfg.time.months
    shown = one_each(every, cfg)
    lines = {(a.approach, b.approach): crossings(lambda v, a=a: a.total(v, months), lambda v, b=b: b.total(v, months),
                                                 tokens * LOW, tokens * HIGH) for a, b in itertools.combinations(shown, 2)}
    answer = shown[0] if not shown[0].why_not else None
    moved = turns(cfg, prices, answer, best, price_of_same) if answer else []
    up_to = {o.approach: o.cumulated(tokens, months) for o in shown}
    in_time = {pair: months_to_cross(up_to[pair[0]], up_to[pair[1]]) for pair in lines}
    return Advice(shown, every, lines, in_time, moved, lifted(cfg, prices, answer, bar_of(cfg, prices), best))


def weigh(cfg: AdviseVerb, prices: Prices) -> list[Option]:
    """Returns every approach with every model, judged."""
    chip_and_price(cfg, prices)
    out = [judged_api(api_option(name, api, cfg, prices), api, cfg, prices) for name, api in prices.apis.items()]
    for approach in ("prompted", "lora", "full", "continued"):
        out += [judged_open(open_option(approach, name, model, cfg, prices), model, cfg, prices)
                for name, model in prices.models.items()]
    flops, shown_by = training_that_reached(bar_of(cfg, prices), cfg, prices)
    out.append(judged_scratch(scratch_option(flops, cfg, prices), flops, shown_by, cfg, prices))
    return out


def one_each(every: list[Option], cfg: AdviseVerb) -> list[Option]:
    """Returns each approach's cheapest allowed option, or its nearest miss; allowed ones first, cheapest first.

    Of options that cost the same (a replica runs anyway) the one with the better scores.
    """
    def rank(o: Option):
        return len(o.why_not), round(o.total(tokens_a_month(cfg), cfg.time.months), 2), -sum(o.scores.values()), len(o.unknown)

    kinds = [[o for o in every if o.approach == approach] for approach in APPROACHES]
    return sorted((min(kind, key=rank) for kind in kinds if kind), key=lambda o: (bool(o.why_not), *rank(o)))


def best(cfg: AdviseVerb, prices: Prices) -> Option | None:
    """Returns the cheapest option that nothing rules out."""
    first = one_each(weigh(cfg, prices), cfg)[0]
    return None if first.why_not else first


def price_of_same(cfg: AdviseVerb, prices: Prices, answer: Option) -> float:
    """Returns what the answer's approach with its model costs under other settings and prices."""
    same = [o for o in weigh(cfg, prices) if o.approach == answer.approach]
    option = next(o for o in same if o.model == answer.model or o.approach == "scratch")
    return option.total(tokens_a_month(cfg), cfg.time.months)


def as_json(cfg: AdviseVerb, advice: Advice) -> dict:
    tokens, months = tokens_a_month(cfg), cfg.time.months
    return {
        "best": advice.best.name, "page": cfg.page, "tokens_a_month": tokens, "months": months,
        "options": [{"approach": o.approach, "model": o.model, "usd": o.total(tokens, months), "parts": o.parts(tokens, months),
                     "usd_by_month": o.cumulated(tokens, months).tolist(), "ready_months": o.ready_months,
                     "ruled_out": list(o.why_not), "not_known": list(o.unknown), "training_flops": o.flops}
                    for o in advice.options],
        "break_even": [{"between": list(pair), "tokens_a_month": c.at, "cheaper_below": pair[0] if c.first_below else pair[1],
                        "jump": c.jump} for pair, found in advice.crossings.items() for c in found],
        "break_even_months": [{"between": list(pair), "month": c.at, "cheaper_before": pair[0] if c.first_below else pair[1]}
                              for pair, found in advice.months.items() for c in found],
        "would_change": [dataclasses.asdict(t) for t in advice.turns],
        "rules_lifted": [dataclasses.asdict(r) for r in advice.lifted],
    }
