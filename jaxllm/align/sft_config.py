"""Settings of `jaxllm sft`. No jax here."""

from dataclasses import dataclass, field
from typing import Literal

from jaxllm.align.config import BaseConfig, TuneConfig
from jaxllm.data.config import Source
from jaxllm.data.instruction_config import InstructionData
from jaxllm.mesh import MeshConfig
from jaxllm.model.config import LoRAConfig, ModelConfig
from jaxllm.parallel.config import ProcessesConfig
from jaxllm.train.config import CheckpointConfig, LogConfig, OptimConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class SFTTrain(TuneConfig):
    """How long instruction tuning takes; with neither steps nor epochs, one epoch."""

    noise: float = 0.0  # uniform noise on embeddings while training, times sqrt(tokens of the example x width); 0: none; try 5

    def __post_init__(self):
        super().__post_init__()
        if self.noise < 0:
            raise ValueError(f"train.noise={self.noise}: should be 0 or more")


@dataclass(frozen=True, kw_only=True)
class PretrainingMix:
    """Text mixed in as in pretraining, so that what was learned there is not lost."""

    share: float = 0.0  # of all rows; 0: none; 0.1 is a usual choice
    sources: dict[str, Source] = field(default_factory=dict)  # as data.sources of `jaxllm pretrain`
    cache: str = "~/.cache/jaxllm"  # tokenised text is kept here
    workers: int = 0  # processes that tokenise; 0: one a core

    def __post_init__(self):
        if not 0 <= self.share < 1:
            raise ValueError(f"pretraining.share={self.share}: should be in [0, 1)")
        if self.share and not self.sources:
            raise ValueError(f"pretraining.share={self.share}: needs pretraining.sources")


@dataclass(frozen=True, kw_only=True)
class AnswersConfig:
    """Held-out questions that the model answers at each evaluation: the share that it gets right, and what votes add to it
    (self-consistency, Wang et al. 2022)."""

    questions: int = 0  # how many are asked, the same ones each time, spread evenly over the held-out examples; 0: none
    samples: int = 1  # responses to each, besides the greedy one; 2 or more: also the majority's answer
    # where the answer stands in a response and in the held-out one: all of it, behind the last "The answer is", behind the
    # last "####", or the last number
    extract: Literal["whole", "final", "gsm8k", "last_number"] = "final"
    max_tokens: int = 256  # longest response
    temperature: float = 0.7  # of the samples

    def __post_init__(self):
        for name, ok, should in (("questions", self.questions >= 0, "0 or more"), ("samples", self.samples >= 1, "at least 1"),
                                 ("max_tokens", self.max_tokens >= 1, "at least 1"),
                                 ("temperature", self.temperature > 0, "above 0; a greedy response is made besides")):
            if not ok:
                raise ValueError(f"answers.{name}={getattr(self, name)}: should be {should}")


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    run: RunConfig = field(default_factory=RunConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    model: ModelConfig = field(default_factory=ModelConfig)  # of the base run: what is given here is not used
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: InstructionData = field(default_factory=InstructionData)
    pretraining: PretrainingMix = field(default_factory=PretrainingMix)
    train: SFTTrain = field(default_factory=SFTTrain)
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4))
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
