"""Settings that the verbs of alignment share. No jax here."""

from dataclasses import dataclass, field
from typing import Literal

from jaxllm.generate.config import SampleConfig
from jaxllm.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    run: str = ""  # the run folder whose model training starts from: one of pretrain, sft, dpo or rlhf
    step: int | None = None  # its checkpoint; null: the newest


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """How long a model is tuned, and how a batch is computed."""

    steps: int | None = None  # optimizer steps; this or `epochs`
    epochs: float | None = None  # length in passes over the data instead of steps
    batch_size: int = 32  # rows a step, over all devices: packed rows, groups of ranked answers, or pairs
    micro_batches: int = 1  # parts a batch is computed in, one after the other: less memory, the same step
    # auto: bfloat16 compute with float32 weights on TPU and GPU, float32 on CPU (measured faster there)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # what the backward pass computes again instead of keeping (docs/plan-compile.md)
    remat: Literal["none", "dots", "mlp", "qkv_attention", "qkv", "attention", "full"] = "none"
    loss_chunk: int = 128  # positions of a sequence whose logits are held at once
    eval_every: int = 100  # steps between evaluations on held-out rows; 0: never
    eval_rows: int = 256  # held-out rows an evaluation uses, the same ones each time; 0: all
    sample_every: int = 0  # steps between samples; 0: never
    sample_prompts: list[str] = field(default_factory=list)  # what samples answer
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(max_tokens=64))

    def __post_init__(self):
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"give one of train.steps and train.epochs, found {self.steps} and {self.epochs}")
        for name in ("steps", "batch_size", "micro_batches", "loss_chunk"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}: should be at least 1")
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"train.epochs={self.epochs}: should be above 0")
        for name in ("eval_every", "eval_rows", "sample_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name}={getattr(self, name)}: should be 0 or more")
        if self.batch_size % self.micro_batches:
            raise ValueError(f"train.batch_size={self.batch_size} is not divisible by train.micro_batches={self.micro_batches}")

    def as_train(self, steps: int) -> TrainConfig:
        """Returns the same for the step that pretraining takes."""
        return TrainConfig(steps=steps, batch_size=self.batch_size, micro_batches=self.micro_batches, precision=self.precision,
                           remat=self.remat, loss_chunk=self.loss_chunk)
