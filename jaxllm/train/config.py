"""Settings of training: the run, its length, the optimizer, checkpoints, logs. No jax here."""

from dataclasses import dataclass, field
from typing import Literal

from jaxllm.data.config import DataConfig
from jaxllm.generate.config import SampleConfig
from jaxllm.mesh import MeshConfig
from jaxllm.model.config import LoRAConfig, ModelConfig
from jaxllm.model.remat import named
from jaxllm.parallel.config import ProcessesConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    dir: str = "runs/run"  # everything the run writes
    seed: int = 0  # of the weights, the order of rows, dropout and samples
    overwrite: bool = False  # delete what is in `dir` and start anew

    def __post_init__(self):
        if self.seed < 0 or not self.dir:
            raise ValueError(f"run.seed={self.seed}, run.dir={self.dir!r}: should be 0 or more, and a folder")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int | None = None  # optimizer steps; this or `tokens`
    tokens: int | None = None  # length in tokens instead of steps
    # stop after this step, evaluated and saved, on the schedule of all of `steps`; a later one, or null, goes on from there
    stop_at: int | None = None
    batch_size: int = 32  # sequences a step, over all devices
    micro_batches: int = 1  # parts a batch is computed in, one after the other: less memory, the same step
    # when the places of mesh.data come together: at each step; or each trains alone for `inner_steps`, then parameters are
    # averaged (local_sgd), or moved by an outer Nesterov step (diloco)
    sync: Literal["every_step", "local_sgd", "diloco"] = "every_step"
    inner_steps: int = 30  # local_sgd, diloco: steps between two meetings
    outer_lr: float = 0.7  # diloco: learning rate of the outer step
    # diloco: Nesterov momentum of the outer step. Chosen on runs of 6 and 30 meetings from scratch (docs/parallel.md); the
    # paper has 0.9, for more meetings and from a trained model
    outer_momentum: float = 0.5
    groups: int = 1  # local_sgd, diloco: groups that train alone, as many as mesh.data (times mesh.dcn.data) has places
    staleness: int = 0  # local_sgd, diloco: rounds a group may be ahead of the others; what came of a meeting is merged so late
    fragments: int = 1  # local_sgd, diloco: parts of the layers, in turn, that meet at steps of their own (Streaming DiLoCo)
    overlap: int = 0  # local_sgd, diloco: steps after a meeting until what came of it is merged (Streaming DiLoCo's tau)
    # with overlap: share of its own parameters that a group keeps in a merge (Streaming DiLoCo's alpha); null: it keeps all of
    # its progress since the meeting
    mixing: float | None = None
    # with mesh.stage > 1: the order in which stages work on the micro-batches (`jaxllm plan schedule` draws it)
    pipeline: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    virtual_stages: int = 1  # interleaved: pieces of the model that each stage holds
    # with mesh.stage > 1: embedding, head and their optimizer state are split over the stages, and gathered once a step
    split_embedding: bool = False
    # auto: bfloat16 compute with float32 weights on TPU and GPU, float32 on CPU (measured faster there)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # what the backward pass computes again instead of keeping: nothing (none), all but matmul results (dots), all of a layer
    # (full), or all but the named tensors, joined by +: qkv, attention (what the TPU's attention kernel gave), gate, up, or
    # mlp (gate+up)
    remat: str = "none"
    # what is kept in the host's memory (TPU, GPU): of each layer its input and what `remat` names, the optimizer's moments,
    # or both. Slower; for a model that does not fit even with remat full (`jaxllm plan compile` tells)
    offload: Literal["none", "activations", "optimizer", "both"] = "none"
    xla: Literal["tuned", "plain"] = "tuned"  # compiler options: those that chips.yaml holds for the chip, or none
    # attention of a sequence that mesh.context splits: keys and values of all devices brought to each, or passed around
    context_attention: Literal["gather", "ring"] = "gather"
    loss_chunk: int = 128  # positions of a sequence whose logits are held at once
    z_loss: float = 0.0  # weight of the squared log-normaliser, which keeps logits small (PaLM: 1e-4)
    label_smoothing: float = 0.0  # share of the target's probability spread over the vocabulary
    # steps that the gradient noise scale, the tokens beyond which a larger batch brings little, is averaged over; it is taken
    # from the micro-batches and logged as noise_scale, for `jaxllm plan batch`. 0: not measured
    noise_scale: int = 0
    eval_every: int = 200  # steps between evaluations on held-out rows; 0: never
    eval_rows: int = 64  # held-out rows an evaluation uses, the same ones each time; 0: all
    sample_every: int = 500  # steps between samples; 0: never
    sample_prompts: list[str] = field(default_factory=lambda: [""])  # what samples continue
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(max_tokens=64))

    def __post_init__(self):
        for name in ("steps", "tokens", "stop_at", "batch_size", "micro_batches", "virtual_stages", "loss_chunk", "inner_steps",
                     "groups"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}: should be at least 1")
        if self.outer_lr <= 0 or not 0 <= self.outer_momentum < 1:
            raise ValueError(f"train.outer_lr={self.outer_lr}, train.outer_momentum={self.outer_momentum}: should be above 0, "
                             "and in [0, 1)")
        if (self.sync != "every_step") != (self.groups > 1):
            raise ValueError(f"train.sync={self.sync} with train.groups={self.groups}: local_sgd and diloco need 2 groups or "
                             "more, every_step has 1")
        self._check_meetings()
        for name in ("z_loss", "eval_every", "eval_rows", "sample_every", "noise_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name}={getattr(self, name)}: should be 0 or more")
        if self.batch_size % self.micro_batches:
            raise ValueError(f"train.batch_size={self.batch_size} is not divisible by train.micro_batches={self.micro_batches}")
        if self.noise_scale and (self.micro_batches < 2 or self.sync != "every_step"):
            raise ValueError(f"train.noise_scale={self.noise_scale} with train.micro_batches={self.micro_batches}, train.sync="
                             f"{self.sync}: needs 2 micro-batches or more, whose gradients are compared, and every_step")
        try:
            named(self.remat)
        except ValueError as e:
            raise ValueError(f"train.remat={self.remat}: {e}") from None
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"train.label_smoothing={self.label_smoothing}: should be in [0, 1)")

    def _check_meetings(self):
        """Raises ValueError when groups could not meet as the settings say."""
        for name, off in (("staleness", 0), ("fragments", 1), ("overlap", 0), ("mixing", None)):
            value = getattr(self, name)
            if self.sync == "every_step" and value != off:
                raise ValueError(f"train.{name}={value} with train.sync=every_step: is for local_sgd and diloco")
        most = self.inner_steps
        if self.staleness < 0 or not 1 <= self.fragments <= most or not 0 <= self.overlap < most:
            raise ValueError(f"train.staleness={self.staleness}, train.fragments={self.fragments}, train.overlap="
                             f"{self.overlap}: should be 0 or more, 1 to {most} (train.inner_steps), and 0 to {most - 1}")
        if self.staleness and self.overlap:
            raise ValueError(f"train.staleness={self.staleness} with train.overlap={self.overlap}: what came of a meeting is "
                             "merged whole rounds later, or some steps later; give one")
        if self.mixing is not None and not (0 <= self.mixing <= 1 and self.overlap):
            raise ValueError(f"train.mixing={self.mixing} with train.overlap={self.overlap}: should be in [0, 1], and needs "
                             "overlap above 0")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: Literal["adamw", "sgd", "adafactor", "lion", "muon"] = "adamw"  # the update rule; muon: adamw outside of blocks
    lr: float = 3e-4  # peak learning rate
    b1: float = 0.9  # decay of the gradient's mean (adamw, lion), or momentum (sgd, muon)
    b2: float = 0.95  # decay of the squared gradient's mean (adamw), or of the momentum (lion)
    eps: float = 1e-8  # adamw: added to the root of the squared gradient's mean
    weight_decay: float = 0.1  # decoupled, times the learning rate; not on norms, biases and embeddings
    decay_embeddings: bool = False  # decay the embedding too
    zero1: bool = False  # split the optimizer's state over mesh.data too, though parameters are whole there (ZeRO-1)
    clip: float = 1.0  # largest global norm of the gradient; 0: no clipping
    # how the rate goes after the warm-up; plateau: falls by `factor` when the loss has not fallen for `patience` steps
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt", "step", "exponential", "plateau"] = "cosine"
    warmup: int = 0  # steps over which the rate rises to the peak in a line
    warmup_from: float = 0.0  # where it begins to rise, as a share of the peak
    final: float = 0.1  # linear, cosine, wsd: the rate at the end, as a share of the peak; plateau: the least share
    decay_share: float = 0.2  # wsd: share of all steps that the final decay takes
    step_every: int = 1000  # step: steps between drops; exponential: steps over which the rate falls by `factor`
    factor: float = 0.5  # step, exponential, plateau: what the rate is multiplied with
    patience: int = 200  # plateau: steps without a better loss before a drop
    threshold: float = 1e-3  # plateau: a loss is better when lower by this share

    def __post_init__(self):
        for name, ok, should in (
            ("lr", self.lr > 0, "above 0"), ("eps", self.eps > 0, "above 0"),
            ("b1", 0 <= self.b1 < 1, "in [0, 1)"), ("b2", 0 <= self.b2 < 1, "in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"), ("clip", self.clip >= 0, "0 or more"),
            ("warmup", self.warmup >= 0, "0 or more"),
            ("warmup_from", 0 <= self.warmup_from <= 1, "in [0, 1]"), ("final", 0 <= self.final <= 1, "in [0, 1]"),
            ("decay_share", 0 < self.decay_share <= 1, "in (0, 1]"), ("step_every", self.step_every >= 1, "at least 1"),
            ("factor", 0 < self.factor <= 1, "in (0, 1]"), ("patience", self.patience >= 1, "at least 1"),
        ):
            if not ok:
                raise ValueError(f"optim.{name}={getattr(self, name)}: should be {should}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 500  # steps between checkpoints; the last step is always saved
    keep: int = 2  # newest checkpoints kept
    keep_every: int | None = None  # besides, one each this many steps is kept for good

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoint.every={self.every}, checkpoint.keep={self.keep}: should be at least 1")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError(f"checkpoint.keep_every={self.keep_every}: should be at least 1, or null")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every: int = 10  # steps between lines of metrics.jsonl and of the progress display
    tensorboard: bool = True  # write event files too

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"log.every={self.every}: should be at least 1")


@dataclass(frozen=True, kw_only=True)
class PretrainLogConfig(LogConfig):
    # a law file of `jaxllm plan ladder` or `plan fit`: each line then shows what it says of this size and so many tokens, and
    # an incident is noted when the run falls behind it; null: nothing is compared
    law: str | None = None


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: PretrainLogConfig = field(default_factory=PretrainLogConfig)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)

    def __post_init__(self):
        if (self.train.steps is None) == (self.train.tokens is None):
            raise ValueError(f"give one of train.steps and train.tokens, found {self.train.steps} and {self.train.tokens}")
        if self.optim.zero1 and self.train.sync != "every_step":
            raise ValueError(f"optim.zero1=true with train.sync={self.train.sync}: each group has moments of its own, which "
                             "cannot be split over mesh.data")
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(f"data.seq_len={self.data.seq_len} is longer than model.max_seq_len={self.model.max_seq_len}")


@dataclass(frozen=True, kw_only=True)
class ModelOfRun:
    """What is needed of a run folder to use its model."""

    verb: str = "pretrain"  # that trained it
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    tokenizer: str = "bytes"
    template: str | None = None  # how it was taught to read messages; null: it was not
    precision: str = "auto"
    lora: LoRAConfig = field(default_factory=LoRAConfig)  # rank 0: the run's checkpoints hold whole weights
    base: str = ""  # with an adapter, the run whose weights it is added to
    base_step: int | None = None  # the checkpoint of that run; null: the newest


@dataclass(frozen=True, kw_only=True)
class InspectVerb:
    run: str = ""  # the run folder (the word after the verb)
    step: int | None = None  # checkpoint to look at; null: the newest
    digest: bool = False  # also a SHA-256 of every array, to compare two runs from outside
