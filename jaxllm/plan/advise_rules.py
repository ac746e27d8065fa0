"""What rules an option out, each with by how much it fails; and what the figures leave open."""

import dataclasses
import math

from jaxllm.errors import UserError, nearest
from jaxllm.plan import costs
from jaxllm.plan.advise_config import AdviseVerb
from jaxllm.plan.advise_options import Option, budget_flops, chip_and_price, count, per_request, tokens_a_month
from jaxllm.plan.prices import Api, OpenModel, Prices, Trained

LEAST_SCRATCH = 1e20  # FLOPs below which no model from scratch is worth its while: a compute-optimal one has 0.9 B parameters
TRAINED = ("lora", "full", "continued", "scratch")


def bar_of(cfg: AdviseVerb, prices: Prices) -> dict[str, float]:
    """Returns the quality bar, task by task; raises UserError for a name that no figure is known of."""
    bar = {}
    if name := cfg.quality.as_good_as:
        models = prices.apis | prices.models | prices.trained
        if name not in models:
            raise UserError(f"quality.as_good_as={name!r}: is not in the prices file; {nearest(name, models)}")
        bar = {task: f.value for task, f in models[name].scores.items()}
        if not bar:
            raise UserError(f"quality.as_good_as={name!r}: the prices file has no score of it")
    for task in cfg.quality.scores:
        if task not in prices.tasks:
            raise UserError(f"quality.scores.{task}: no model of the prices file has a score; {nearest(task, prices.tasks)}")
    return bar | cfg.quality.scores


def shift(approach: str, cfg: AdviseVerb, prices: Prices) -> float:
    """Returns how far a published score is off for this need: down on specialist text, up on a task that is learned."""
    learned = approach in ("continued", "scratch") and cfg.data.domain_tokens >= prices.assumed("domain_floor")
    gap = prices.assumed("specialist_gap") if cfg.quality.domain == "specialist" and not learned else 0.0
    return (prices.assumed("tuning_gain") if cfg.quality.task == "narrow" and approach in TRAINED else 0.0) - gap


def judged_api(option: Option, api: Api, cfg: AdviseVerb, prices: Prices) -> Option:
    d, no, open_ = cfg.data, [], []
    if d.residency == "on_premises":
        no.append("data.residency=on_premises: the text would leave your premises")
    elif d.residency != "anywhere" and d.residency not in api.regions:
        where = f"in {', '.join(api.regions)} only" if api.regions else "in no region that the prices file names"
        no.append(f"data.residency={d.residency}: offered {where}")
    if d.sensitivity in ("confidential", "regulated") and not d.agreement:
        no.append(f"data.sensitivity={d.sensitivity} without data.agreement: the provider may not process the text")
    if d.known_training_data:
        no.append("data.known_training_data: its training text is not published")
    no += _context(api.context.value, cfg)
    want, have = cfg.latency, (api.first_token_s, api.tokens_per_s)
    if want.first_token_s and have[0] and have[0].value > want.first_token_s:
        no.append(_late(have[0].value, want.first_token_s))
    if want.tokens_per_s and have[1] and have[1].value < want.tokens_per_s:
        no.append(_slow(have[1].value, want.tokens_per_s, ""))
    if (want.first_token_s and not have[0]) or (want.tokens_per_s and not have[1]):
        open_.append("its speed is not in the prices file: measure it")
    if others := [name for name in d.languages if name != "en"]:
        open_.append(f"its quality in {', '.join(others)} is not in the prices file: measure it")
    return _common(option, api.scores, no, open_, cfg, prices)


def judged_open(option: Option, model: OpenModel, cfg: AdviseVerb, prices: Prices) -> Option:
    d, no, open_ = cfg.data, [], []
    if d.known_training_data and not model.data_published:
        no.append("data.known_training_data: its training text is not published")
    floor = prices.assumed("domain_floor")
    if option.approach == "continued" and d.domain_tokens < floor:
        no.append(f"data.domain_tokens={d.domain_tokens:.3g}: continued pretraining asks for {count(floor)}: "
                  f"{count(floor - d.domain_tokens)} short")
    missing = [name for name in d.languages if name not in model.languages]
    if missing and option.approach != "continued":
        no.append(f"data.languages: its card does not name {', '.join(missing)}")
    elif missing:
        open_.append(f"continued pretraining is to teach it {', '.join(missing)}: measure it")
    no += _context(model.context.value, cfg)
    if model.licence.endswith("Community"):
        open_.append(f"its licence ({model.licence}) has conditions: let somebody read it")
    return _common(option, model.scores, no + _machine(option, cfg, prices), open_, cfg, prices)


def judged_scratch(option: Option, flops: float, shown_by: str | None, cfg: AdviseVerb, prices: Prices) -> Option:
    """`flops`: of one training; `shown_by`: the published model that reached the bar with them, None: nobody has."""
    no, open_ = [], []
    have, all_runs = budget_flops(cfg, prices), flops * prices.approaches["scratch"].runs.value
    bar = bar_of(cfg, prices)
    if bar and shown_by is None:
        no.append(f"quality: no model of the prices file shows how much training reaches {_told(bar)} with these data")
    if have < LEAST_SCRATCH:
        times = f", {LEAST_SCRATCH / have:.3g} times that" if have else ""
        no.append(f"a training budget of {have:.2g} FLOPs: from scratch asks for {LEAST_SCRATCH:.0e} at least{times}")
    elif have < all_runs:
        shown = f"{shown_by} took {flops:.2g}" if shown_by else f"the least is {flops:.2g}"
        no.append(f"a training budget of {have:.2g} FLOPs: {shown}, with the runs before it {all_runs:.2g}, "
                  f"{all_runs / have:.3g} times the budget")
    _, tokens = costs.compute_optimal(flops, prices.assumed("tokens_per_parameter"))
    public = sum(prices.public_text[name].value for name in cfg.data.languages if name in prices.public_text)
    text = public + cfg.data.domain_tokens * prices.assumed("repeats")
    if text < tokens:
        no.append(f"training text: {count(tokens)} tokens are needed, {count(text)} are at hand or public: "
                  f"{count(tokens - text)} short")
    if unsaid := [name for name in cfg.data.languages if name not in prices.public_text]:
        open_.append(f"how much public text there is in {', '.join(unsaid)} is not in the prices file")
    scores = dict(bar) if shown_by else {}
    judged = _common(dataclasses.replace(option, scores=scores), {}, no + _machine(option, cfg, prices), open_, cfg, prices)
    return dataclasses.replace(judged, scores=scores)


def training_that_reached(bar: dict[str, float], cfg: AdviseVerb, prices: Prices) -> tuple[float, str | None]:
    """Returns (FLOPs, model) of the least training that is known to have reached the bar, as it counts from scratch.

    Without a bar the least that this program calls worthwhile. (1e20, None) where nobody is known to have reached it.
    """
    if not bar:
        return LEAST_SCRATCH, None
    off = shift("scratch", cfg, prices)

    def reached(m: Trained) -> bool:
        return m.flops is not None and all(t in m.scores and m.scores[t].value + off >= v for t, v in bar.items())

    known = [(m.flops, name) for name, m in (prices.models | prices.trained).items() if reached(m)]
    flops, name = min(known, default=(LEAST_SCRATCH, None))
    return max(flops, LEAST_SCRATCH), name


def _common(option: Option, scores, no: list[str], open_: list[str], cfg: AdviseVerb, prices: Prices) -> Option:
    off, counted, bar = shift(option.approach, cfg, prices), {}, bar_of(cfg, prices)
    for task, value in bar.items() if option.approach != "scratch" else ():
        if task not in scores:
            open_.append(f"its score in {task} is not known: measure it")
            continue
        counted[task] = scores[task].value + off
        if counted[task] < value:
            how = "assumed" if scores[task].assumed else "published"
            why = f" ({how} {scores[task].value:g}, {off:+g} for this need)" if off else f" ({how})"
            no.append(f"{task} {counted[task]:g}{why}: {value - counted[task]:.3g} below the bar of {value:g}")
    total, most = option.total(tokens_a_month(cfg), cfg.time.months), cfg.budget.total_usd
    if most is not None and total > most and not any("weights alone" in reason for reason in no):
        no.append(f"budget.total_usd={most:,.0f}: costs {total:,.0f} over {cfg.time.months} months: {total - most:,.0f} more")
    deadline = cfg.time.first_use_months
    if deadline is not None and option.ready_months > deadline:
        no.append(f"time.first_use_months={deadline:g}: ready after {option.ready_months:.1f} months: "
                  f"{option.ready_months - deadline:.1f} too late")
    return dataclasses.replace(option, why_not=tuple(no), unknown=tuple(open_), scores=option.scores or counted)


def _machine(option: Option, cfg: AdviseVerb, prices: Prices) -> list[str]:
    """What memory and the roofline rule out."""
    chip, _ = chip_and_price(cfg, prices)
    most, no = max(costs.CHIPS), []
    if option.replica is None:
        need, have = option.size.parameters * cfg.hardware.weight_bytes, costs.MEMORY * most * costs.memory_bytes(chip)
        return [f"needs {need / 1e9:.0f} GB for its weights alone and room for a request: {most} {chip.name} have "
                f"{have / 1e9:.0f}"]
    r, want = option.replica, cfg.latency
    if want.tokens_per_s and r.tokens_per_s < want.tokens_per_s:
        no.append(_slow(r.tokens_per_s, want.tokens_per_s, f" on {r.chips} {chip.name}, one reader alone"))
    if want.first_token_s and r.first_token_s > want.first_token_s:
        no.append(_late(r.first_token_s, want.first_token_s))
    if option.flops and cfg.hardware.how == "rent":
        bytes_each = prices.assumed("lora_bytes" if option.approach == "lora" else "train_bytes")
        need = costs.chips_to_train(option.size, bytes_each, chip)
        have = max(cfg.hardware.training_chips, cfg.hardware.granted_chips)
        if need > have:
            no.append(f"hardware.training_chips={have}: to train it takes the memory of {need} {chip.name}: {need - have} more")
    return no


def _context(most: float, cfg: AdviseVerb) -> list[str]:
    read, written = per_request(cfg)
    if read + written <= most:
        return []
    return [f"a request of {read:,.0f} + {written:,.0f} tokens: {math.ceil(read + written - most):,} more than its context "
            f"of {most:,.0f}"]


def _slow(have: float, want: float, where: str) -> str:
    return f"latency.tokens_per_s={want:g}: writes {plain(have)} at most{where}: {plain(want - have)} short"


def _late(have: float, want: float) -> str:
    return f"latency.first_token_s={want:g}: {have:.3g} at best: {have - want:.3g} later"


def plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _told(bar: dict[str, float]) -> str:
    return ", ".join(f"{task} {value:g}" for task, value in bar.items())
