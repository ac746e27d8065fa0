"""Settings of `jaxllm plan fit`. No jax here."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """The run whose loss is to be told before it is made: parameters and tokens, or flops alone for the best of both."""

    parameters: float | None = None  # its size
    tokens: float | None = None  # its training tokens; null: as many as are best for the size
    experts: float | None = None  # of a sparse layer, where the runs have some: 1 is dense; null: the most of the runs
    flops: float | None = None  # or its compute, 6 N D, from which the best size and tokens follow

    def __post_init__(self):
        for name in ("parameters", "tokens", "flops", "experts"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"target.{name}={getattr(self, name):g}: should be above 0")
        if self.flops is not None and (self.parameters is not None or self.tokens is not None):
            raise ValueError("target.flops: give it alone, or target.parameters with target.tokens")
        if self.tokens is not None and self.parameters is None:
            raise ValueError("target.tokens: needs target.parameters too")


@dataclass(frozen=True, kw_only=True)
class FitVerb:
    runs: tuple[str, ...] = ()  # run folders, a folder of them, or one CSV (the words after the verb)
    loss: Literal["auto", "eval", "train"] = "auto"  # of run folders: held-out, or training; auto: held-out where all have it
    bootstraps: int = 4000  # samples that the intervals come from
    level: float = 0.95  # share of the samples inside an interval
    # a run whose loss is more than this share above what the others' law says, and 8 times what is usual, is left out by
    # name; null: all count
    stands_out: float | None = 0.06
    seed: int = 0  # of the samples
    law_file: str | None = None  # file to write the law into, for `jaxllm plan size --law_file=FILE`
    page: str | None = None  # file to write an HTML page with plots into
    picture: str | None = None  # file to draw the plots into, .svg, .png or .pdf
    target: TargetConfig = field(default_factory=TargetConfig)

    def __post_init__(self):
        if self.bootstraps < 100:
            raise ValueError(f"bootstraps={self.bootstraps}: should be at least 100, or the intervals are noise")
        if not 0 < self.level < 1:
            raise ValueError(f"level={self.level:g}: should be above 0 and below 1")
        if self.stands_out is not None and self.stands_out <= 0:
            raise ValueError(f"stands_out={self.stands_out:g}: should be above 0, or null")
