"""Settings of `jaxllm reward`. No jax here."""

from dataclasses import dataclass, field

from jaxllm.align.config import BaseConfig, TuneConfig
from jaxllm.data.preference_config import PreferenceData
from jaxllm.mesh import MeshConfig
from jaxllm.model.config import ModelConfig
from jaxllm.train.config import CheckpointConfig, LogConfig, OptimConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class RewardVerb:
    run: RunConfig = field(default_factory=RunConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    model: ModelConfig = field(default_factory=ModelConfig)  # taken from the base run
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: PreferenceData = field(default_factory=PreferenceData)
    # without steps or epochs, one pass over the comparisons: more of them overfit (Ouyang et al. 2022)
    train: TuneConfig = field(default_factory=TuneConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5, weight_decay=0.0))
    unit_variance: bool = False  # scores are also divided by their deviation over the demonstrations
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
