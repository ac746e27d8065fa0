"""The ways to get a model and what each costs: an API, an open model as it is or trained further, one of your own."""

import dataclasses
import math

import numpy as np

from jaxllm.errors import UserError, nearest
from jaxllm.hardware import Chip, find
from jaxllm.plan import costs
from jaxllm.plan.advise_config import SKILLS, AdviseVerb
from jaxllm.plan.costs import CHIPS, HOURS, SECONDS, Serving, Size
from jaxllm.plan.prices import Api, ChipPrice, OpenModel, Prices
from jaxllm.plan.roofline import peak

NAMES = {"api": "API", "prompted": "open model, prompted", "lora": "open model, LoRA", "full": "open model, full fine-tuning",
         "continued": "open model, continued pretraining", "scratch": "own model from scratch"}
NEEDS = {"api": "prompting", "prompted": "serving", "lora": "finetuning", "full": "finetuning", "continued": "pretraining",
         "scratch": "pretraining"}


@dataclasses.dataclass(frozen=True)
class PerToken:
    """Billed by the token."""

    usd: float  # of one token of the mix

    def cost(self, tokens_k: np.ndarray) -> tuple[float, np.ndarray]:
        """Returns (USD before the first month, USD of each month) for the tokens of each month k."""
        return 0.0, self.usd * tokens_k


@dataclasses.dataclass(frozen=True)
class Rented:
    """Replicas by the hour: those that always run, and more as the volume asks for."""

    usd_per_hour: float  # of one replica
    replica_tokens: float  # that one replica does in a month, at the load it is kept at
    least: int

    def cost(self, tokens_k: np.ndarray) -> tuple[float, np.ndarray]:
        return 0.0, self.usd_per_hour * HOURS * np.maximum(self.least, tokens_k / self.replica_tokens)


@dataclasses.dataclass(frozen=True)
class Bought:
    """Whole servers, bought once for the busiest hour of the busiest month, and their place and power."""

    server_usd: float
    server_chips: int
    chips: int  # of one replica
    month_usd: float  # of one server: place and power
    replica_tokens: float  # that one replica can do in a month of busiest hours
    least: int
    training_chips: int  # that training needs at least

    def servers(self, tokens: float) -> int:
        replicas = max(self.least, math.ceil(tokens / self.replica_tokens - 1e-12))
        return math.ceil(max(replicas * self.chips, self.training_chips) / self.server_chips)

    def cost(self, tokens_k: np.ndarray) -> tuple[float, np.ndarray]:
        n = self.servers(float(tokens_k.max()))
        return n * self.server_usd, np.full(len(tokens_k), n * self.month_usd)


@dataclasses.dataclass(frozen=True)
class Cheapest:
    """Replicas of several sizes, of which the volume decides the one that costs least."""

    ways: tuple[Rented, ...] | tuple[Bought, ...]

    def cost(self, tokens_k: np.ndarray) -> tuple[float, np.ndarray]:
        return min((way.cost(tokens_k) for way in self.ways), key=lambda found: found[0] + found[1].sum())


@dataclasses.dataclass(frozen=True)
class Option:
    """One way with one model. Months are months in use; what comes before first use is paid before the first of them."""

    approach: str
    model: str
    engineering_usd: float  # before first use
    training_usd: float
    examples_usd: float
    upkeep_usd: float  # people, a month
    serving: PerToken | Cheapest
    growth: float
    ready_months: float  # until first use
    why_not: tuple[str, ...] = ()  # what rules it out
    unknown: tuple[str, ...] = ()  # what the figures do not tell
    scores: dict[str, float] = dataclasses.field(default_factory=dict)  # as they count for this need
    size: Size | None = None
    replica: Serving | None = None  # the one that is cheapest at the volume of the settings
    flops: float = 0.0  # of all training
    training_months: float = 0.0

    @property
    def name(self) -> str:
        return f"{NAMES[self.approach]}: {self.model}"

    def parts(self, tokens: float, months: int) -> dict[str, float]:
        """Returns USD over the months by what they are paid for; `tokens` are those of the first month."""
        upfront, month_k = self.serving.cost(tokens * (1 + self.growth) ** np.arange(months))
        return {"engineering": self.engineering_usd, "upkeep": self.upkeep_usd * months, "training": self.training_usd,
                "examples": self.examples_usd, "machines": upfront, "serving": float(month_k.sum())}

    def total(self, tokens: float, months: int) -> float:
        return sum(self.parts(tokens, months).values())

    def cumulated(self, tokens: float, months: int) -> np.ndarray:
        """Returns USD up to the end of month 0 (first use), 1, ..., `months`."""
        upfront, month_k = self.serving.cost(tokens * (1 + self.growth) ** np.arange(months))
        before = self.engineering_usd + self.training_usd + self.examples_usd + upfront
        return before + np.concatenate([[0.0], np.cumsum(month_k + self.upkeep_usd)])


def tokens_a_month(cfg: AdviseVerb) -> float:
    return cfg.volume.input_tokens + cfg.volume.output_tokens


def per_request(cfg: AdviseVerb) -> tuple[float, float]:
    """Returns a request's tokens read and written."""
    return cfg.volume.input_tokens / cfg.volume.requests, cfg.volume.output_tokens / cfg.volume.requests


def chip_and_price(cfg: AdviseVerb, prices: Prices) -> tuple[Chip, ChipPrice]:
    """Returns the chip of the settings; raises UserError where it or the price that is needed is not known."""
    chip = find(cfg.hardware.chip)
    if chip.name not in prices.chips:
        raise UserError(f"hardware.chip={chip.name}: has no price in the prices file; {nearest(chip.name, prices.chips)}")
    price = prices.chips[chip.name]
    needed = ("usd_per_hour",) if cfg.hardware.how == "rent" else ("buy_usd", "server_chips", "kw")
    if lacking := [name for name in needed if getattr(price, name) is None]:
        able = [n for n, p in prices.chips.items() if all(getattr(p, f) is not None for f in needed)]
        raise UserError(f"hardware.how={cfg.hardware.how}: chips.{chip.name}.{lacking[0]} is missing in the prices file; "
                        f"chips that have it: {', '.join(able) or 'none'}")
    return chip, price


def api_option(name: str, api: Api, cfg: AdviseVerb, prices: Prices) -> Option:
    v = cfg.volume
    cached = api.cached.value if api.cached else api.input.value
    usd = (v.input_tokens * ((1 - v.cached) * api.input.value + v.cached * cached) + v.output_tokens * api.output.value) / 1e6
    if cfg.data.residency in ("us", "eu") and api.regional_surcharge:
        usd *= 1 + api.regional_surcharge.value
    return _with_people("api", name, PerToken(usd / tokens_a_month(cfg)), cfg, prices)


def open_option(approach: str, name: str, model: OpenModel, cfg: AdviseVerb, prices: Prices) -> Option:
    """Returns this model trained as `approach` says, served by replicas of the cheapest size."""
    size, a = Size.of(model), prices.assumed
    runs = prices.approaches[approach].runs.value
    examples = cfg.data.examples + examples_to_make(approach, cfg, prices)
    tokens = examples * a("tokens_per_example") * a("epochs") if approach != "prompted" else 0.0
    flops = costs.training_flops(size.active, tokens, frozen=approach == "lora")
    if approach == "continued":
        flops += costs.training_flops(size.active, cfg.data.domain_tokens * a("repeats") * (1 + a("replay")))
    bytes_each = a("lora_bytes") if approach == "lora" else a("train_bytes")
    return _served(approach, name, size, flops * runs, bytes_each, cfg, prices)


def scratch_option(flops: float, cfg: AdviseVerb, prices: Prices) -> Option:
    """Returns the compute-optimal model of `flops` training FLOPs."""
    parameters, _ = costs.compute_optimal(flops, prices.assumed("tokens_per_parameter"))
    name = f"{parameters / 1e9:.2g} B parameters"
    runs = prices.approaches["scratch"].runs.value
    return _served("scratch", name, Size.dense(parameters), flops * runs, prices.assumed("train_bytes"), cfg, prices)


def budget_flops(cfg: AdviseVerb, prices: Prices) -> float:
    """Returns the FLOPs that training may take: as set, granted, or bought with the whole budget; infinite without a limit."""
    if cfg.budget.training_flops is not None:
        return cfg.budget.training_flops
    chip, price = chip_and_price(cfg, prices)
    rate = peak(chip) * prices.assumed("mfu")
    granted = cfg.hardware.granted_chips * rate * cfg.hardware.granted_months * SECONDS
    if granted and cfg.budget.total_usd is None:
        return granted
    if cfg.budget.total_usd is None:
        return math.inf
    if cfg.hardware.how == "buy":
        servers = cfg.budget.total_usd // (price.buy_usd.value * price.server_chips.value)
        return granted + servers * price.server_chips.value * rate * cfg.time.months * SECONDS
    return granted + cfg.budget.total_usd / (price.usd_per_hour.value or 1e-12) * 3600 * rate


def _served(approach: str, name: str, size: Size, flops: float, bytes_each: float, cfg: AdviseVerb, prices: Prices) -> Option:
    h, (chip, price) = cfg.hardware, chip_and_price(cfg, prices)
    read, written = per_request(cfg)
    replicas = [serving for n in CHIPS if (serving := costs.serve(
        size, chip.name, n, read, written, cfg.volume.cached, h.weight_bytes, prices.assumed("serving_share"),
        cfg.latency.tokens_per_s or 0.0))]
    to_train = costs.chips_to_train(size, bytes_each, chip) if flops else 0
    made = []
    for replica in replicas or [Serving(max(CHIPS), 0, math.inf, math.inf, math.inf)]:
        serving = _machines(replica, to_train, cfg, prices, price)
        usd, months = _training(flops, to_train, serving, cfg, prices, chip, price)
        option = _with_people(approach, name, Cheapest((serving,)), cfg, prices, training_usd=usd, training_months=months)
        made.append(dataclasses.replace(option, size=size, replica=replica if replicas else None, flops=flops))
    fast = [o for o in made if not too_slow(o, cfg)] or made[-1:]
    cheapest = min(fast, key=lambda o: o.total(tokens_a_month(cfg), cfg.time.months))
    return dataclasses.replace(cheapest, serving=Cheapest(tuple(way for o in fast for way in o.serving.ways)))


def too_slow(option: Option, cfg: AdviseVerb) -> bool:
    r, want = option.replica, cfg.latency
    return r is None or r.tokens_per_s < (want.tokens_per_s or 0.0) or r.first_token_s > (want.first_token_s or math.inf)


def _machines(replica: Serving, to_train: int, cfg: AdviseVerb, prices: Prices, price: ChipPrice) -> Rented | Bought:
    h, mix = cfg.hardware, tokens_a_month(cfg) / cfg.volume.requests
    whole = SECONDS / replica.request_s * mix if math.isfinite(replica.request_s) else 1e-9
    if h.how == "rent":
        return Rented(price.usd_per_hour.value * replica.chips, whole * prices.assumed("rented_load"), h.replicas)
    chips = int(price.server_chips.value)
    month = chips * price.kw.value * (prices.assumed("kw_month_usd") + HOURS * prices.assumed("kwh_usd"))
    return Bought(price.buy_usd.value * chips, chips, replica.chips, month, whole / cfg.volume.peak, h.replicas, to_train)


def _training(flops: float, to_train: int, serving, cfg: AdviseVerb, prices: Prices, chip: Chip,
              price: ChipPrice) -> tuple[float, float]:
    """Returns USD and months of all training runs: on chips that are granted, then bought or rented ones."""
    if not flops:
        return 0.0, 0.0
    h, rate = cfg.hardware, peak(chip) * prices.assumed("mfu")
    granted = h.granted_chips * rate * h.granted_months * SECONDS if h.granted_chips >= to_train else 0.0
    rest = max(flops - granted, 0.0)
    months = min(flops, granted) / (max(h.granted_chips, 1) * rate * SECONDS)
    if isinstance(serving, Bought):
        chips = serving.servers(tokens_a_month(cfg)) * serving.server_chips
        return 0.0, months + rest / (chips * rate * SECONDS)
    usd = rest / rate / 3600 * price.usd_per_hour.value
    return usd, months + rest / (max(h.training_chips, to_train) * rate * SECONDS)


def _with_people(approach: str, model: str, serving, cfg: AdviseVerb, prices: Prices, *, training_usd: float = 0.0,
                 training_months: float = 0.0) -> Option:
    known, month = prices.approaches[approach], prices.engineer_month(cfg.team.usd_per_month)
    unskilled = SKILLS.index(cfg.team.skill) < SKILLS.index(NEEDS[approach])
    setup = known.setup.value * (prices.assumed("unskilled") if unskilled else 1.0)
    delivery = prices.assumed("delivery_months") if isinstance(serving, Cheapest) and cfg.hardware.how == "buy" else 0.0
    return Option(approach, model, setup * month, training_usd, examples_to_make(approach, cfg, prices) *
                  prices.assumed("usd_per_example"), known.upkeep.value * month, serving, cfg.volume.growth,
                  max(setup / cfg.team.engineers, delivery) + training_months, training_months=training_months)


def examples_to_make(approach: str, cfg: AdviseVerb, prices: Prices) -> float:
    """Returns how many examples are still to be written, by people who know the field, for this way of training."""
    if approach in ("api", "prompted"):
        return 0.0
    need = prices.assumed("full_examples" if approach == "full" else "lora_examples")
    return max(need - cfg.data.examples, 0.0)


def usd(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.0f} USD"


def count(value: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {letter}"
    return f"{value:.3g}"
