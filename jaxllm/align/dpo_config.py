"""Settings of `jaxllm dpo`. No jax here."""

import math
from dataclasses import dataclass, field
from typing import Literal

from jaxllm.align.config import BaseConfig, TuneConfig
from jaxllm.data.preference_config import PreferenceData
from jaxllm.mesh import MeshConfig
from jaxllm.model.config import LoRAConfig, ModelConfig
from jaxllm.train.config import CheckpointConfig, LogConfig, OptimConfig, RunConfig

WITH_MARGIN = ("dpo", "simpo")  # losses that have a place for a pair's margin
WITH_REFERENCE = ("dpo", "ipo", "kto")  # losses that compare with what another model says of the answers


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Direct preference optimization (Rafailov et al. 2023)."""

    beta: float = 0.1  # strength of the pull to the reference: the larger, the nearer the policy stays
    label_smoothing: float = 0.0  # chance that a comparison is wrong (cDPO, Mitchell 2023)

    def __post_init__(self):
        if self.beta <= 0 or not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"dpo.beta={self.beta}, dpo.label_smoothing={self.label_smoothing}: should be above 0, and in "
                             "[0, 0.5)")


@dataclass(frozen=True, kw_only=True)
class IPOConfig:
    """Identity preference optimization (Azar et al. 2023)."""

    tau: float = 0.1  # the pair's log-ratios are brought to a difference of 1 / (2 tau) nats

    def __post_init__(self):
        if self.tau <= 0:
            raise ValueError(f"ipo.tau={self.tau}: should be above 0")


@dataclass(frozen=True, kw_only=True)
class KTOConfig:
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024): the better answer of a pair is desirable, the worse one not."""

    beta: float = 0.1  # how soon a gain or a loss saturates; the larger, the nearer the policy stays to the reference
    desirable_weight: float = 1.0  # of the loss of desirable answers
    undesirable_weight: float = 1.0  # of the loss of undesirable answers

    def __post_init__(self):
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if getattr(self, name) <= 0:
                raise ValueError(f"kto.{name}={getattr(self, name)}: should be above 0")


@dataclass(frozen=True, kw_only=True)
class ORPOConfig:
    """Odds ratio preference optimization (Hong et al. 2024): learns the better answer, and its odds against the worse one."""

    weight: float = 0.1  # of the odds ratio's loss, beside the better answer's mean loss per token

    def __post_init__(self):
        if self.weight <= 0:
            raise ValueError(f"orpo.weight={self.weight}: should be above 0")


@dataclass(frozen=True, kw_only=True)
class SimPOConfig:
    """Simple preference optimization (Meng et al. 2024): the reward is the mean log-probability of an answer's tokens."""

    beta: float = 2.0  # what that mean is multiplied with
    gamma: float = 1.0  # by how much the better answer's reward should be larger

    def __post_init__(self):
        if self.beta <= 0 or self.gamma < 0:
            raise ValueError(f"simpo.beta={self.beta}, simpo.gamma={self.gamma}: should be above 0, and 0 or more")


@dataclass(frozen=True, kw_only=True)
class DPOVerb:
    loss: Literal["dpo", "ipo", "kto", "orpo", "simpo"] = "dpo"  # orpo and simpo need no reference
    dpo: DPOConfig = field(default_factory=DPOConfig)
    ipo: IPOConfig = field(default_factory=IPOConfig)
    kto: KTOConfig = field(default_factory=KTOConfig)
    orpo: ORPOConfig = field(default_factory=ORPOConfig)
    simpo: SimPOConfig = field(default_factory=SimPOConfig)
    run: RunConfig = field(default_factory=RunConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    reference: BaseConfig = field(default_factory=BaseConfig)  # another run of the same model; none: the base itself
    model: ModelConfig = field(default_factory=ModelConfig)  # taken from the base run
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: PreferenceData = field(default_factory=PreferenceData)
    # of each group of ranked answers: every two with different ranks, or a best one against a worst one
    pairs: Literal["all", "best_worst"] = "all"
    # dpo, simpo: what a line's "margin" is multiplied with; the better answer's reward should be so much larger. 0: not used
    margin: float = 1.0
    train: TuneConfig = field(default_factory=TuneConfig)
    # rates of full tuning; adapters take ten to a hundred times as much
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-6, weight_decay=0.0))
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        if not 0 <= self.margin < math.inf:
            raise ValueError(f"margin={self.margin}: should be 0 or more, and finite")
        if self.reference.run and self.loss not in WITH_REFERENCE:
            raise ValueError(f"reference.run={self.reference.run} with loss={self.loss}, which has no reference: should be "
                             f"left out, or loss one of {', '.join(WITH_REFERENCE)}")
        if self.reference.step is not None and not self.reference.run:
            raise ValueError(f"reference.step={self.reference.step} without reference.run: give both, or neither")
