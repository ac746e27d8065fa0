"""Settings of `jaxllm plan schedule`. No jax here."""

from dataclasses import dataclass
from typing import Literal

LARGEST = 100_000  # forwards of a table


@dataclass(frozen=True, kw_only=True)
class ScheduleVerb:
    stages: int = 4  # pipeline stages: mesh.stage of a run
    micro_batches: int = 8  # parts of a batch: train.micro_batches
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"  # the order of work: train.pipeline
    virtual_stages: int = 1  # interleaved: pieces of the model that each stage holds (2 or more): train.virtual_stages
    picture: str | None = None  # file to draw the table into, .svg, .png or .pdf; null: text alone

    def __post_init__(self):
        for name in ("stages", "micro_batches", "virtual_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: should be at least 1")
        if (n := self.stages * self.micro_batches * self.virtual_stages) > LARGEST:
            raise ValueError(f"stages x micro_batches x virtual_stages is {n:,}: should be at most {LARGEST:,}, to be drawn")
