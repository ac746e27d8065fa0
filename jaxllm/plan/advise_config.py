"""Settings of `jaxllm plan advise`: what is needed, what is at hand, what must not happen. No jax here."""

from dataclasses import dataclass, field
from typing import Literal

SKILLS = ("prompting", "serving", "finetuning", "pretraining")
MOST = 1e18  # requests or tokens a month: more than the world's, so a slip of the exponent


@dataclass(frozen=True, kw_only=True)
class Volume:
    requests: float = 0.0  # requests a month
    input_tokens: float = 0.0  # tokens read a month: prompts, documents, examples
    output_tokens: float = 0.0  # tokens written a month, those of hidden reasoning included
    cached: float = 0.0  # share of the input that repeats from request to request, which APIs bill lower
    growth: float = 0.0  # of the volume, a month: 0.05 is 5 % more each month
    peak: float = 3.0  # the busiest hour's load over the average one's; bought machines are sized for it

    def __post_init__(self):
        if not 0 <= self.cached <= 1:
            raise ValueError(f"volume.cached={self.cached:g}: is a share: should be from 0 to 1")
        if not -1 < self.growth <= 1:
            raise ValueError(f"volume.growth={self.growth:g}: a share of the volume a month: should be above -1 and at most 1")
        if not self.peak >= 1:
            raise ValueError(f"volume.peak={self.peak:g}: the busiest hour is not below the average one: should be 1 or more")


@dataclass(frozen=True, kw_only=True)
class Latency:
    first_token_s: float | None = None  # seconds until the first token of an answer, at most; null: any
    tokens_per_s: float | None = None  # tokens a second that one reader gets, at least; null: any

    def __post_init__(self):
        for name in ("first_token_s", "tokens_per_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"latency.{name}={value:g}: should be above 0, or null")


@dataclass(frozen=True, kw_only=True)
class Data:
    # public, internal, confidential (business secrets) or regulated (health, finance, children)
    sensitivity: Literal["public", "internal", "confidential", "regulated"] = "internal"
    # where the text may be processed: anywhere, us, eu, or only on machines of your own
    residency: Literal["anywhere", "us", "eu", "on_premises"] = "anywhere"
    agreement: bool = False  # a data-processing agreement (in US health care a BAA) with an API's provider is signed or can be
    known_training_data: bool = False  # only models whose training text is published will do
    languages: tuple[str, ...] = ("en",)  # languages of the text, two letters each
    domain_tokens: float = 0.0  # tokens of your own text of the field at hand
    examples: int = 0  # pairs of input and right answer at hand

    def __post_init__(self):
        if not self.languages:
            raise ValueError("data.languages=[]: should name at least one language, e.g. [en]")
        if odd := [name for name in self.languages if len(name) != 2 or not name.isalpha() or not name.islower()]:
            raise ValueError(f"data.languages: {odd[0]!r}: should be a code of two lower-case letters, e.g. en")
        for name in ("domain_tokens", "examples"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"data.{name}={getattr(self, name):g}: should be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Quality:
    as_good_as: str | None = None  # a model of the prices file whose scores are the bar
    scores: dict[str, float] = field(default_factory=dict)  # the bar, task by task, per cent: quality.scores.mmlu=75
    task: Literal["general", "narrow"] = "general"  # narrow: one kind of input and answer, which fine-tuning can learn
    domain: Literal["general", "specialist"] = "general"  # specialist: words and facts that are rare in public text

    def __post_init__(self):
        for name, value in self.scores.items():
            if not 0 < value < 100:
                raise ValueError(f"quality.scores.{name}={value:g}: is per cent: should be between 0 and 100")


@dataclass(frozen=True, kw_only=True)
class Team:
    engineers: float = 2.0  # people who can work on it at a time
    skill: Literal["prompting", "serving", "finetuning", "pretraining"] = "serving"  # the most that they have done before
    usd_per_month: float | None = None  # what one costs a month, all in; null: from the prices file

    def __post_init__(self):
        if not self.engineers > 0:
            raise ValueError(f"team.engineers={self.engineers:g}: should be above 0")
        if self.usd_per_month is not None and not self.usd_per_month >= 0:
            raise ValueError(f"team.usd_per_month={self.usd_per_month:g}: should be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    chip: str = "H100 SXM"  # a chip of jaxllm/chips.yaml with a price in the prices file, for serving and training
    how: Literal["rent", "buy"] = "rent"  # rent by the hour, or buy whole servers for the horizon
    replicas: int = 1  # copies of the model that always run; 2: one may fail
    weight_bytes: float = 2.0  # bytes of a served weight: 2 bfloat16, 1 int8
    training_chips: int = 64  # rented for a training run at a time, at most
    granted_chips: int = 0  # chips of this kind that you are given for training, free of charge
    granted_months: float = 0.0  # and for how long

    def __post_init__(self):
        for name in ("replicas", "training_chips"):
            if getattr(self, name) < 1:
                raise ValueError(f"hardware.{name}={getattr(self, name)}: should be 1 or more")
        if not 0.25 <= self.weight_bytes <= 4:
            raise ValueError(f"hardware.weight_bytes={self.weight_bytes:g}: should be from 0.25 to 4")
        if self.granted_chips < 0 or self.granted_months < 0 or bool(self.granted_chips) != bool(self.granted_months):
            raise ValueError(f"hardware.granted_chips={self.granted_chips} for granted_months={self.granted_months:g}: "
                             "should both be above 0, or both 0")


@dataclass(frozen=True, kw_only=True)
class Budget:
    total_usd: float | None = None  # for the whole horizon, engineering included; null: no limit
    training_flops: float | None = None  # for all training together; null: what is granted, or what total_usd buys

    def __post_init__(self):
        for name in ("total_usd", "training_flops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"budget.{name}={value:g}: should be above 0, or null")


@dataclass(frozen=True, kw_only=True)
class Time:
    months: int = 36  # in use: the horizon over which cost is compared
    first_use_months: float | None = None  # from now, at most; null: no deadline

    def __post_init__(self):
        if not 1 <= self.months <= 120:
            raise ValueError(f"time.months={self.months}: should be from 1 to 120")
        if self.first_use_months is not None and not self.first_use_months > 0:
            raise ValueError(f"time.first_use_months={self.first_use_months:g}: should be above 0, or null")


@dataclass(frozen=True, kw_only=True)
class AdviseVerb:
    title: str = "API, open model or own model"  # what the page is called
    page: str = "advice.html"  # where the page goes
    prices: str | None = None  # a file of your own prices and models, laid over the ones that come with jaxllm
    volume: Volume = field(default_factory=Volume)
    latency: Latency = field(default_factory=Latency)
    data: Data = field(default_factory=Data)
    quality: Quality = field(default_factory=Quality)
    team: Team = field(default_factory=Team)
    hardware: Hardware = field(default_factory=Hardware)
    budget: Budget = field(default_factory=Budget)
    time: Time = field(default_factory=Time)

    def __post_init__(self):
        for name in ("requests", "input_tokens", "output_tokens"):
            if not 0 < getattr(self.volume, name) <= MOST:
                raise ValueError(f"volume.{name}={getattr(self.volume, name):g}: should be above 0, and at most {MOST:.0e}")
        if self.data.residency == "on_premises" and self.hardware.how == "rent":
            raise ValueError("data.residency=on_premises with hardware.how=rent: rented chips are not on your premises: "
                             "should be hardware.how=buy, or residency eu or us")
