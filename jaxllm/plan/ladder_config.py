"""Settings of `jaxllm plan ladder`: the sizes, the token counts, and what all of its runs share. No jax here."""

from dataclasses import dataclass, field

from jaxllm.data.config import LEAST_VOCABULARY, DataConfig
from jaxllm.mesh import MeshConfig
from jaxllm.model.config import ModelConfig
from jaxllm.train.config import CheckpointConfig, LogConfig, OptimConfig, TrainConfig

LEAST_SIZES, LEAST_TOKENS = 3, 3  # a law has five constants: 3 x 3 runs less the largest are 8
AT_THE_END = 1_000_000_000  # steps between evaluations: one, when the run is done


@dataclass(frozen=True, kw_only=True)
class LadderSize:
    """One size: a number of parameters, or a width and what of the shape differs from the group `model`."""

    parameters: float | None = None  # all of them; the shape follows (widths of multiples of 128, from some 0.2 M on)
    d_model: int | None = None  # or the width
    n_layers: int | None = None  # null: model.n_layers
    n_heads: int | None = None  # null: model.n_heads
    n_kv_heads: int | None = None  # null: model.n_kv_heads
    d_ff: int | None = None  # null: model.d_ff
    lr: float | None = None  # peak learning rate; null: by lr_width and lr_power

    def __post_init__(self):
        if (self.parameters is None) == (self.d_model is None):
            raise ValueError(f"sizes: parameters={self.parameters}, d_model={self.d_model}: each size should have one of them")
        if self.parameters is not None and (self.n_layers or self.n_heads or self.n_kv_heads or self.d_ff):
            raise ValueError(f"sizes: parameters={self.parameters:g} with a shape beside it: give d_model instead, or none")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"sizes: lr={self.lr:g}: should be above 0")


@dataclass(frozen=True, kw_only=True)
class LadderVerb:
    dir: str = "runs/ladder"  # the runs (in runs/), the law, the page and the tokenizer
    sizes: dict[str, LadderSize] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)  # training tokens, in ascending order; every size is trained on each
    vocab_size: int | None = None  # pieces of a tokenizer that is trained on the sources, once; null: data.tokenizer
    warmup: float = 0.1  # share of each run's steps over which the learning rate rises
    lr_width: int | None = None  # width to which optim.lr belongs; null: it is every size's
    lr_power: float = 1.0  # a width's rate is optim.lr x (lr_width / width)^lr_power
    within: float = 0.02  # of the largest run's loss: how far off its prediction may be
    bootstraps: int = 4000  # samples that the intervals come from
    level: float = 0.95  # share of the samples inside an interval
    picture: str | None = None  # file to draw the plots into besides the page, .svg, .png or .pdf
    seed: int = 0  # of the weights, the order of rows and the samples
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(eval_every=AT_THE_END, eval_rows=0, sample_every=0))
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(keep=1))
    log: LogConfig = field(default_factory=lambda: LogConfig(tensorboard=False))

    def __post_init__(self):
        n, m = len(self.sizes), len(self.tokens)
        if n < LEAST_SIZES or m < LEAST_TOKENS:
            raise ValueError(f"{n} sizes and {m} token counts: needed are {LEAST_SIZES} sizes and {LEAST_TOKENS} token counts "
                             "at least (sizes.NAME.d_model, tokens); 5 and 4 tell more")
        if any(a >= b for a, b in zip(self.tokens, self.tokens[1:], strict=False)) or self.tokens[0] < 1:
            raise ValueError(f"tokens={self.tokens}: should be above 0 and in ascending order")
        if self.train.steps is not None or self.train.tokens is not None:
            raise ValueError("train.steps, train.tokens: the ladder's `tokens` say how long each run is")
        if self.optim.warmup:
            raise ValueError(f"optim.warmup={self.optim.warmup}: give `warmup`, a share of each run's steps")
        if not self.train.eval_every or not self.data.validation:
            raise ValueError(f"train.eval_every={self.train.eval_every}, data.validation={self.data.validation:g}: should be "
                             "above 0, for the law is fitted to held-out losses")
        if self.vocab_size is not None and self.data.tokenizer != "bytes":
            raise ValueError(f"vocab_size={self.vocab_size} with data.tokenizer={self.data.tokenizer}: give one of them")
        if self.vocab_size is not None and self.vocab_size < LEAST_VOCABULARY:
            raise ValueError(f"vocab_size={self.vocab_size}: should be at least {LEAST_VOCABULARY}")
        for name, ok, should in (
            ("warmup", 0 <= self.warmup < 1, "in [0, 1)"), ("within", self.within > 0, "above 0"),
            ("dir", self.dir, "a folder"),
            ("bootstraps", self.bootstraps >= 100, "at least 100, or the intervals are noise"),
            ("level", 0 < self.level < 1, "above 0 and below 1"), ("seed", self.seed >= 0, "0 or more"),
            ("lr_width", self.lr_width is None or self.lr_width >= 1, "at least 1, or null"),
        ):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)}: should be {should}")
