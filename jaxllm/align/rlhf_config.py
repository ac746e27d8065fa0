"""Settings of `jaxllm rlhf`. No jax here."""

from dataclasses import dataclass, field
from typing import Literal

from jaxllm.align.config import BaseConfig
from jaxllm.align.environments_config import EnvironmentConfig
from jaxllm.align.rewards_config import RewardRule, check_rewards
from jaxllm.data.config import Source
from jaxllm.data.preference_config import PromptData
from jaxllm.mesh import MeshConfig
from jaxllm.model.config import ModelConfig
from jaxllm.train.config import CheckpointConfig, LogConfig, OptimConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class RLDataConfig:
    tokenizer: str | None = None  # null: the base run's
    template: str | None = None  # how messages become text; null: what the base run was taught with
    seq_len: int = 512  # tokens of a prompt and its response together, at most; rows of pretraining text have as many


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    prompts: int = 64  # prompts an iteration
    samples: int = 1  # responses to each prompt; the algorithms that compare responses of a prompt need 2 or more
    response_len: int = 64  # most tokens of a response
    temperature: float = 1.0  # of sampling, and of every log-probability that training compares with it
    top_k: int = 0  # sample from this many likeliest tokens; 0: from all
    top_p: float = 1.0  # sample from the likeliest tokens whose probabilities sum to this
    rows: int | None = None  # responses that are decoded at once, a finished one replaced by the next prompt; null: all
    no_end_penalty: float = 0.0  # taken from the score of a response that has no end token
    # largest mean difference, in nats a token, between the sampler's and the trainer's log-probabilities; above it the run
    # stops
    gap: float = 0.05
    stale: Literal[0, 1] = 0  # 1: responses are sampled with the weights of one iteration before, while those are still updated
    stale_cap: float = 2.0  # with stale: most that a token's importance weight may be

    def __post_init__(self):
        for name in ("prompts", "samples", "response_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name}={getattr(self, name)}: should be at least 1")
        for name, ok, should in (("temperature", self.temperature > 0, "above 0"), ("top_k", self.top_k >= 0, "0 or more"),
                                 ("top_p", 0 < self.top_p <= 1, "in (0, 1]"), ("gap", self.gap > 0, "above 0"),
                                 ("rows", self.rows is None or self.rows >= 1, "at least 1, or null"),
                                 ("stale_cap", self.stale_cap >= 1, "at least 1")):
            if not ok:
                raise ValueError(f"rollout.{name}={getattr(self, name)}: should be {should}")


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """The penalty for leaving the reference, which is the model that the run starts from."""

    coef: float = 0.05  # beta; with `adaptive`, its first value
    # how the KL of a token is estimated; null: k1 where it is taken from the reward (ppo, reinforce_pp), k3 where it is added
    # to the loss
    estimator: Literal["k1", "k2", "k3"] | None = None
    controller: Literal["fixed", "adaptive"] = "fixed"  # adaptive: the coefficient follows `target`
    target: float = 6.0  # adaptive: nats a response
    horizon: float = 10_000.0  # adaptive: responses over which the coefficient changes by about a fifth

    def __post_init__(self):
        if self.coef < 0 or self.target <= 0 or self.horizon <= 0:
            raise ValueError(f"kl.coef={self.coef}, kl.target={self.target}, kl.horizon={self.horizon}: should be 0 or more, "
                             "and above 0")


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    gamma: float = 1.0  # discount of rewards from one token to the next
    lam: float = 0.95  # GAE's lambda
    clip_low: float = 0.2  # the ratio of new to old probability counts down to 1 - this
    clip_high: float = 0.2  # and up to 1 + this; above clip_low: "clip-higher"
    dual_clip: float | None = None  # largest ratio that counts where the advantage is below 0; null: none
    value_clip: float | None = 0.2  # how far a value may move from that at sampling; null: any
    value_coef: float = 1.0  # weight of the value loss
    entropy_coef: float = 0.0  # weight of the entropy bonus
    whiten_rewards: bool = False  # divide token rewards by their deviation over the batch; their mean stays
    whiten_advantages: bool = True  # advantages with mean 0 and variance 1 over the batch
    # once a minibatch is so far from the old policy (nats a token), the iteration's rest is left out; null: never
    target_kl: float | None = None
    # where the critic starts: the run of a reward model; null: the policy, with a head of zeros
    critic: str | None = None
    critic_head: Literal["keep", "zero"] = "keep"  # zero: of a reward model's run, all but the head
    critic_lr: float | None = None  # peak learning rate of the critic; null: optim.lr

    def __post_init__(self):
        for name, ok, should in (
            ("gamma", 0 <= self.gamma <= 1, "in [0, 1]"), ("lam", 0 <= self.lam <= 1, "in [0, 1]"),
            ("clip_low", 0 < self.clip_low < 1, "in (0, 1)"), ("clip_high", self.clip_high > 0, "above 0"),
            ("dual_clip", self.dual_clip is None or self.dual_clip > 1, "above 1, or null"),
            ("value_clip", self.value_clip is None or self.value_clip > 0, "above 0, or null"),
            ("value_coef", self.value_coef > 0, "above 0"), ("entropy_coef", self.entropy_coef >= 0, "0 or more"),
            ("target_kl", self.target_kl is None or self.target_kl > 0, "above 0, or null"),
            ("critic_lr", self.critic_lr is None or self.critic_lr > 0, "above 0, or null"),
        ):
            if not ok:
                raise ValueError(f"ppo.{name}={getattr(self, name)}: should be {should}")


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """The algorithms without a critic: grpo, dr_grpo, dapo, gspo, rloo, reinforce_pp, expert_iteration."""

    clip_low: float | None = None  # null: the algorithm's paper's (0.2; gspo 3e-4)
    clip_high: float | None = None  # null: the algorithm's paper's (0.2; dapo 0.28; gspo 4e-4)
    overlong: int = 0  # dapo: the last so many tokens before response_len cost up to 1 of the score; 0: none
    # dapo: prompts whose responses all score the same are replaced by more prompts, up to so many times `rollout.prompts`
    refills: int = 3

    def __post_init__(self):
        for name in ("clip_low", "clip_high"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"group.{name}={getattr(self, name)}: should be above 0, or null")
        if self.overlong < 0 or self.refills < 0:
            raise ValueError(f"group.overlong={self.overlong}, group.refills={self.refills}: should be 0 or more")


@dataclass(frozen=True, kw_only=True)
class PtxConfig:
    """Pretraining gradients mixed into the policy's (Ouyang et al. 2022, PPO-ptx), and what the alignment tax is measured
    on."""

    coef: float = 0.0  # weight of the pretraining loss, a mean over its tokens (InstructGPT: 27.8); 0: none
    examples: float = 8.0  # pretraining rows for each response of a minibatch
    sources: dict[str, Source] = field(default_factory=dict)  # text, as data.sources of pretraining
    validation: float = 0.01  # share of documents held out
    eval_rows: int = 64  # held-out rows on which the language model's loss is measured, before, during and after

    def __post_init__(self):
        if self.coef < 0 or self.examples <= 0 or self.eval_rows < 0:
            raise ValueError(f"ptx.coef={self.coef}, ptx.examples={self.examples}, ptx.eval_rows={self.eval_rows}: should be 0 "
                             "or more, above 0, and 0 or more")
        if self.coef and not self.sources:
            raise ValueError(f"ptx.coef={self.coef}: needs text: give at least one of ptx.sources, e.g. ptx.sources.books.path")


@dataclass(frozen=True, kw_only=True)
class TaxTask:
    """Questions that are asked as of a base model, before, during and after: what alignment costs (Ouyang et al. 2022)."""

    path: str  # JSON lines of {"question" or "prompt", "answer"}, with "choices" where there are some (docs/rlhf.md)
    shots: list[int] = field(default_factory=lambda: [0, 1, 4])  # exemplars before each question; all are of the first rows
    limit: int = 200  # most questions asked, spread evenly over the file; 0: all
    answer_len: int = 16  # most tokens of an answer that is written

    def __post_init__(self):
        if not self.shots or min(self.shots) < 0 or len(set(self.shots)) < len(self.shots):
            raise ValueError(f"tax.NAME.shots={self.shots}: should be one number of exemplars or more, 0 or above, each once")
        if self.limit < 0 or self.answer_len < 1:
            raise ValueError(f"tax.NAME.limit={self.limit}, tax.NAME.answer_len={self.answer_len}: should be 0 or more, and at "
                             "least 1")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    clip: float | None = None  # scores are cut to this many on both sides; null: not
    normalise: bool = False  # less the running mean, over the running deviation of all scores so far

    def __post_init__(self):
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"score.clip={self.clip}: should be above 0, or null")


@dataclass(frozen=True, kw_only=True)
class RLTrainConfig:
    iterations: int = 100  # rounds of sampling, scoring and updating
    epochs: int = 1  # passes over an iteration's responses, each in a fresh order
    minibatches: int = 1  # parts of them, an optimizer step each
    micro_batches: int = 1  # parts a minibatch is computed in, one after the other: less memory, the same step
    # auto: bfloat16 compute with float32 weights on TPU and GPU, float32 on CPU (measured faster there)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # what the backward pass computes again instead of keeping (docs/plan-compile.md)
    remat: Literal["none", "dots", "mlp", "qkv_attention", "qkv", "attention", "full"] = "none"
    loss_chunk: int = 128  # positions of a response whose logits are held at once
    ema: float = 0.0  # decay of a running mean of the policy's weights, a step at a time (InstructGPT: 0.992); 0: none is kept
    eval_every: int = 10  # iterations between evaluations on held-out prompts, and before the first; 0: never
    eval_prompts: int = 128  # held-out prompts an evaluation uses, the same ones each time
    # sampled responses to each of them; 2 or more: also the share of right answers of one sample, of the majority of all
    # (self-consistency), of the best by reward, and of any
    eval_samples: int = 1
    sample_every: int = 10  # iterations between samples for people to read; 0: never

    def __post_init__(self):
        for name in ("iterations", "epochs", "minibatches", "micro_batches", "loss_chunk", "eval_prompts", "eval_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}: should be at least 1")
        if not 0 <= self.ema < 1 or self.eval_every < 0 or self.sample_every < 0:
            raise ValueError(f"train.ema={self.ema}, train.eval_every={self.eval_every}, train.sample_every="
                             f"{self.sample_every}: should be in [0, 1), and 0 or more")


ALGORITHMS = ("ppo", "grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp", "expert_iteration")
COMPARING = ("grpo", "dr_grpo", "dapo", "gspo", "rloo", "expert_iteration")  # compare the responses of a prompt with each other


@dataclass(frozen=True, kw_only=True)
class RLHFConfig:
    run: RunConfig = field(default_factory=RunConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    # ppo: with a critic; the others compare responses: of one prompt, or (reinforce_pp) of the whole batch; expert_iteration
    # imitates each prompt's best response
    algorithm: Literal["ppo", "grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp", "expert_iteration"] = "ppo"
    model: ModelConfig = field(default_factory=ModelConfig)  # taken from the base run
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: RLDataConfig = field(default_factory=RLDataConfig)
    prompts: PromptData = field(default_factory=PromptData)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: dict[str, RewardRule] = field(default_factory=dict)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    group: GroupConfig = field(default_factory=GroupConfig)
    ptx: PtxConfig = field(default_factory=PtxConfig)
    tax: dict[str, TaxTask] = field(default_factory=dict)  # few-shot tasks, by name
    train: RLTrainConfig = field(default_factory=RLTrainConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5, eps=1e-5, weight_decay=0.0, schedule="constant"))
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=10))  # counts iterations
    log: LogConfig = field(default_factory=lambda: LogConfig(every=1))

    def __post_init__(self):
        check_rewards(self.rewards)
        n = self.rollout.prompts * self.rollout.samples
        parts = self.train.minibatches * self.train.micro_batches
        if n % parts:
            raise ValueError(f"rollout.prompts={self.rollout.prompts} x rollout.samples={self.rollout.samples} is {n} "
                             f"responses, which train.minibatches={self.train.minibatches} x train.micro_batches="
                             f"{self.train.micro_batches} does not divide")
        if self.algorithm in COMPARING and self.rollout.samples < 2:
            raise ValueError(f"rollout.samples={self.rollout.samples}: algorithm={self.algorithm} compares the responses of a "
                             "prompt, and needs 2 or more of each")
        if self.algorithm == "rloo" and self.train.epochs * self.train.minibatches > 1:
            raise ValueError(f"train.epochs={self.train.epochs}, train.minibatches={self.train.minibatches}: algorithm=rloo "
                             "compares no old with new probabilities, and takes one optimizer step an iteration: set both to 1")
        need = self.prompts.prompt_len + self.rollout.response_len
        if need > self.data.seq_len:
            raise ValueError(f"prompts.prompt_len={self.prompts.prompt_len} + rollout.response_len="
                             f"{self.rollout.response_len} is {need}, more than data.seq_len={self.data.seq_len}")
        if self.group.overlong > self.rollout.response_len:
            raise ValueError(f"group.overlong={self.group.overlong}: should be at most rollout.response_len="
                             f"{self.rollout.response_len}")
