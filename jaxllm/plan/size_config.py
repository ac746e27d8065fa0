"""Settings of `jaxllm plan size`. No jax here."""

from dataclasses import dataclass, field
from typing import Literal

from jaxllm.model.remat import named

LAW_NAMES = ("epoch", "approach_1", "approach_2", "approach_3", "approach_3_rounded", "table_a3", "data_constrained", "twenty")


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """The chips that train."""

    chip: str = "TPU v5e"  # a name of jaxllm/chips.yaml, in any case
    chips: int | None = None  # how many; null: as many as `days` asks for, else chip-hours alone are told
    # assumed model FLOP utilisation: the share of the chips' peak that the model's own FLOPs reach; the plan prints
    # published ones beside it
    mfu: float = 0.4
    usd_per_hour: float | None = None  # of one chip; null: the dated figure of jaxllm/plan/prices.yaml
    watts: float | None = None  # of one chip; null: that of rental.yaml, where one is published
    pue: float = 1.1  # energy of the whole data centre over that of the chips
    hours_between_failures: float | None = None  # of one chip; null: that of rental.yaml (Llama 3 on H100)
    save_seconds: float = 60.0  # that a checkpoint stops training for
    restart_seconds: float = 600.0  # from a failure until training goes on
    rows: int = 1  # sequences that a chip holds at once, for the estimate of its memory

    def __post_init__(self):
        if not 0 < self.mfu <= 1:
            raise ValueError(f"hardware.mfu={self.mfu:g}: should be above 0 and at most 1")
        for name in ("chips", "usd_per_hour", "watts", "hours_between_failures", "rows"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"hardware.{name}={getattr(self, name):g}: should be above 0")
        if self.pue < 1:
            raise ValueError(f"hardware.pue={self.pue:g}: should be at least 1")
        for name in ("save_seconds", "restart_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"hardware.{name}={getattr(self, name):g}: should be at least 0")


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """Where and how much the model will answer."""

    # tokens that it reads and writes over its life; above 0: tells the size that costs least over its whole life
    tokens: float = 0.0
    chip: str | None = None  # chip that decodes; null: hardware.chip
    chips: int = 1  # over how many the model is split
    batch: int = 1  # rows decoded together
    context: int = 2048  # positions in the cache of each row
    weight_bytes: float = 2.0  # bytes of a weight: 2 for bfloat16, 1 for int8
    cache_bytes: float = 2.0  # bytes of a value in the cache

    def __post_init__(self):
        for name in ("chips", "batch", "context", "weight_bytes", "cache_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"serving.{name}={getattr(self, name):g}: should be above 0")
        if self.tokens < 0:
            raise ValueError(f"serving.tokens={self.tokens:g}: should be at least 0")


@dataclass(frozen=True, kw_only=True)
class ShapeConfig:
    """What an architecture is made of."""

    vocab_size: int = 32_000  # rows of the embedding
    seq_len: int = 2048  # tokens of a training row
    tied: bool | None = None  # the head is the embedding's transpose; null: where two tables would be a fifth of the parameters
    remat: str = "full"  # what the backward pass computes again, as train.remat of a run

    def __post_init__(self):
        for name in ("vocab_size", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"shape.{name}={getattr(self, name)}: should be at least 1")
        try:
            named(self.remat)
        except ValueError as e:
            raise ValueError(f"shape.remat={self.remat}: {e}") from None


@dataclass(frozen=True, kw_only=True)
class SizeVerb:
    """Any two of budget, data, size, latency and deadline, or one of the first four: the rest follows."""

    flops: float | None = None  # budget: FLOPs of training
    chip_hours: float | None = None  # budget: hours of hardware.chip
    usd: float | None = None  # budget: money, at hardware.usd_per_hour
    days: float | None = None  # deadline; with hardware.chips a budget, without: how many chips it takes
    tokens: float | None = None  # data: different tokens that are there to train on
    parameters: float | None = None  # size: of the model that is thought of, embeddings included
    latency_ms: float | None = None  # most milliseconds a token when serving, which bounds the size
    law: Literal[LAW_NAMES] = "epoch"  # the scaling law that decides; all are shown
    # a law of your own runs, as `jaxllm plan fit --law_file=FILE` writes it; decides instead of `law`
    law_file: str | None = None
    page: str | None = None  # file to write an HTML page with plots into
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    shape: ShapeConfig = field(default_factory=ShapeConfig)

    def __post_init__(self):
        for name in ("flops", "chip_hours", "usd", "days", "tokens", "parameters", "latency_ms"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name):g}: should be above 0")
