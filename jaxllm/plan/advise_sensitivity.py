"""What would change the answer: figures moved one at a time until another way is best, and rules lifted one at a time."""

import dataclasses
import math
from collections.abc import Callable

from jaxllm.plan.advise_config import AdviseVerb
from jaxllm.plan.advise_options import Option, count, tokens_a_month
from jaxllm.plan.prices import Api, ChipPrice, Figure, Prices

FACTORS = [10 ** (k / 4) for k in range(1, 9)]  # up to a hundred times, both ways
Best = Callable[[AdviseVerb, Prices], Option | None]


@dataclasses.dataclass(frozen=True)
class Turn:
    """A figure and the least change of it, down or up, at which another way is best."""

    what: str
    factor: float | None  # times the figure; None: none within a hundred times
    now: str  # the figure as it is
    then: str  # what it would be
    best: str  # the way that is best then
    half_usd: float  # cost of today's best way with half the figure, and with twice
    twice_usd: float


@dataclasses.dataclass(frozen=True)
class Lifted:
    """One rule changed, and the best way then."""

    what: str
    best: str
    usd: float | None
    changes: bool


def turns(cfg: AdviseVerb, prices: Prices, answer: Option, best: Best,
          same: Callable[[AdviseVerb, Prices, Option], float]) -> list[Turn]:
    """Returns for each figure how far it is from changing the answer; `same` prices today's best way under changed figures."""
    out = []
    for what, written, now, moved in _figures(cfg, prices, answer):
        found = None
        for direction in (1, -1):
            if at := _turn(lambda f, moved=moved: best(*moved(f)), answer, direction):
                found = min(found or at, at, key=lambda a: abs(math.log(a[0])))
        half, twice = (same(*moved(f), answer) for f in (0.5, 2.0))
        factor, other = found or (None, None)
        out.append(Turn(what, factor, written(now), written(now * factor) if factor else "",
                        other.name if other else "none is left" if factor else "", half, twice))
    return out


def _turn(best_at: Callable[[float], Option | None], answer: Option, direction: int) -> tuple[float, Option | None] | None:
    """Returns the factor nearest to 1 at which another approach is best, and which, halved down to a thousandth."""
    inside = 1.0
    for factor in FACTORS:
        outside = factor**direction
        if not _is(best_at(outside), answer):
            while abs(math.log(outside / inside)) > 1e-3:
                middle = math.sqrt(inside * outside)
                inside, outside = (middle, outside) if _is(best_at(middle), answer) else (inside, middle)
            return outside, best_at(outside)
        inside = outside
    return None


def _is(option: Option | None, answer: Option) -> bool:
    return option is not None and option.approach == answer.approach


def _figures(cfg: AdviseVerb, prices: Prices, answer: Option):
    """Yields (what, how it is written, its value now, the settings and prices with it times f)."""
    v = cfg.volume
    yield ("tokens a month", count, tokens_a_month(cfg), lambda f: (dataclasses.replace(cfg, volume=dataclasses.replace(
        v, requests=v.requests * f, input_tokens=v.input_tokens * f, output_tokens=v.output_tokens * f)), prices))
    yield "all API prices", "{:.0%}".format, 1.0, lambda f: (cfg, _with_apis(prices, f))
    yield "all chip prices", "{:.0%}".format, 1.0, lambda f: (cfg, _with_chips(prices, f))
    month = prices.engineer_month(cfg.team.usd_per_month)
    yield ("what a person costs a month", "{:,.0f} USD".format, month, lambda f: (dataclasses.replace(
        cfg, team=dataclasses.replace(cfg.team, usd_per_month=month * f)), prices))
    months = cfg.time.months
    yield ("months in use", "{:.0f}".format, months, lambda f: (dataclasses.replace(
        cfg, time=dataclasses.replace(cfg.time, months=min(max(round(months * f), 1), 120))), prices))
    share = prices.assumptions["serving_share"]
    yield ("share of the roofline that serving reaches", "{:.3g}".format, share.value, lambda f: (cfg, dataclasses.replace(
        prices, assumptions=prices.assumptions | {"serving_share": _times(share, f)})))


def _times(figure: Figure | None, f: float) -> Figure | None:
    return figure and dataclasses.replace(figure, value=figure.value * f)


def _with_apis(prices: Prices, f: float) -> Prices:
    def moved(api: Api) -> Api:
        return dataclasses.replace(api, input=_times(api.input, f), output=_times(api.output, f), cached=_times(api.cached, f))

    return dataclasses.replace(prices, apis={name: moved(api) for name, api in prices.apis.items()})


def _with_chips(prices: Prices, f: float) -> Prices:
    def moved(chip: ChipPrice) -> ChipPrice:
        return dataclasses.replace(chip, usd_per_hour=_times(chip.usd_per_hour, f), buy_usd=_times(chip.buy_usd, f))

    return dataclasses.replace(prices, chips={name: moved(chip) for name, chip in prices.chips.items()})


def lifted(cfg: AdviseVerb, prices: Prices, answer: Option | None, bar: dict[str, float], best: Best) -> list[Lifted]:
    """Returns the best way with each rule of the settings dropped, and with the bar moved by 5 points."""
    out = []
    for what, changed in _rules(cfg, bar):
        option = best(changed, prices)
        usd = option and option.total(tokens_a_month(changed), changed.time.months)
        out.append(Lifted(what, option.name if option else "none is left", usd,
                          (option and option.name) != (answer and answer.name)))
    return out


def _rules(cfg: AdviseVerb, bar: dict[str, float]):
    def put(group: str, **values):
        return dataclasses.replace(cfg, **{group: dataclasses.replace(getattr(cfg, group), **values)})

    if cfg.data.residency != "anywhere":
        yield f"the text may be processed anywhere (now: {cfg.data.residency})", put("data", residency="anywhere")
    if cfg.data.sensitivity in ("confidential", "regulated") and not cfg.data.agreement:
        yield "an agreement with an API's provider is signed", put("data", agreement=True)
        if cfg.data.residency != "anywhere":
            yield "both of these", put("data", residency="anywhere", agreement=True)
    if cfg.data.known_training_data:
        yield "the training text need not be published", put("data", known_training_data=False)
    if cfg.latency.first_token_s or cfg.latency.tokens_per_s:
        yield "no limit on latency", put("latency", first_token_s=None, tokens_per_s=None)
    if cfg.budget.total_usd is not None:
        yield "no limit on money", put("budget", total_usd=None)
    if cfg.time.first_use_months is not None:
        yield "no deadline", put("time", first_use_months=None)
    if cfg.team.skill != "pretraining":
        yield "people who have done it all before", put("team", skill="pretraining")
    for points in (5, -5) if bar else ():
        scores = {task: min(max(value + points, 1.0), 99.0) for task, value in bar.items()}
        what = f"the quality bar {abs(points)} points {'higher' if points > 0 else 'lower'}"
        yield what, put("quality", as_good_as=None, scores=scores)
    if bar:
        yield "no quality bar", put("quality", as_good_as=None, scores={})
