"""The knobs of the architecture. No jax here, so that `--help` and planning stay quick."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sparse layers: a router sends each token to a few of many feed-forwards (docs/moe.md)."""

    experts: int = 0  # experts of a sparse layer; 0: every layer is dense
    top_k: int = 2  # experts that each token goes to
    every: int = 1  # every n-th layer is sparse, from the n-th on; the others are dense
    d_ff: int | None = None  # width of an expert's hidden layer; null: model.d_ff
    shared: int = 0  # experts beside these that every token goes to, computed as one dense feed-forward (DeepSeek-MoE)
    router: Literal["softmax", "sigmoid"] = "softmax"  # what makes an expert's score of its logit
    normalize: bool | None = None  # the weights of a token's experts sum to 1; null: where top_k is above 1
    # in training an expert takes, of each row, this many times its even share of the tokens, the first ones; the rest is
    # dropped. null: none are (dropless). Evaluation and generation never drop
    capacity: float | None = None
    balance_loss: float = 0.0  # weight of the load-balancing loss (Switch: 1e-2)
    z_loss: float = 0.0  # weight of the router's squared log-normaliser (ST-MoE: 1e-3)
    # what a step adds to the selection bias of each expert with less than the mean load, and takes from those with more:
    # balance without a loss (DeepSeek-V3: 1e-3); 0: no biases
    bias_rate: float = 0.0

    def __post_init__(self):
        for name, least in (("experts", 0), ("top_k", 1), ("every", 1), ("shared", 0), ("balance_loss", 0), ("z_loss", 0),
                            ("bias_rate", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"model.moe.{name}={getattr(self, name)}: should be at least {least}")
        if self.d_ff is not None and self.d_ff < 1:
            raise ValueError(f"model.moe.d_ff={self.d_ff}: should be at least 1, or null")
        if self.capacity is not None and self.capacity <= 0:
            raise ValueError(f"model.moe.capacity={self.capacity}: should be above 0, or null for dropless")
        if self.experts and self.top_k > self.experts:
            raise ValueError(f"model.moe.top_k={self.top_k} is more than model.moe.experts={self.experts}")

    @property
    def normalized(self) -> bool:
        return self.top_k > 1 if self.normalize is None else self.normalize


@dataclass(frozen=True, kw_only=True)
class MuPConfig:
    """Maximal update parametrisation: what is best for a small model stays best for a large one (docs/plan-coordcheck.md).

    Yang et al. 2022 (Tensor Programs V) for width, Dey et al. 2025 (CompleteP) for depth.
    """

    base_width: int | None = None  # d_model where the learning rate was chosen; null: the standard parametrisation
    base_depth: int | None = None  # n_layers where it was chosen; null: what depth changes is left as in the standard one
    base_head_dim: int | None = None  # a head's width there; null: as here, wider models having more heads

    def __post_init__(self):
        for name in ("base_width", "base_depth", "base_head_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"model.mup.{name}={getattr(self, name)}: should be at least 1, or null")
        if self.base_width is None and (self.base_depth or self.base_head_dim):
            raise ValueError("model.mup.base_width=null: should be given where base_depth or base_head_dim is")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters on the matrices of every block, beside frozen weights (model/lora.py)."""

    rank: int = 0  # rank of what is added to each matrix; 0: all weights are trained
    alpha: float = 16.0  # what is added is multiplied with alpha / rank
    attention: bool = True  # adapt the query, key, value and output matrices
    mlp: bool = True  # adapt the feed-forward's matrices

    def __post_init__(self):
        if self.rank < 0 or self.alpha <= 0:
            raise ValueError(f"lora.rank={self.rank}, lora.alpha={self.alpha}: should be 0 or more, and above 0")
        if self.rank and not (self.attention or self.mlp):
            raise ValueError("lora.attention=false with lora.mlp=false: leaves nothing to train")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    d_model: int = 256  # width of the residual stream
    n_layers: int = 4  # transformer blocks
    n_heads: int = 4  # query heads; d_model / n_heads is a head's width
    # heads of keys and values, shared by groups of query heads (grouped-query attention); null: n_heads
    n_kv_heads: int | None = None
    # width of the feed-forward's hidden layer; null: 8/3 d_model for gated activations, else 4 d_model, up to a multiple of 64
    d_ff: int | None = None
    vocab_size: int | None = None  # rows of the embedding; null: the tokenizer's
    max_seq_len: int = 1024  # longest sequence the model may be given
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # pre-norm of every block and of the output
    norm_eps: float = 1e-6  # added to the variance
    activation: Literal["swiglu", "geglu", "gelu", "relu2"] = "swiglu"  # feed-forward; the first two are gated
    position: Literal["rope", "none"] = "rope"  # rotary positions, or none at all
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    window: int | None = None  # a position attends to this many latest ones, itself included; null: to all before it
    # fan_in: weights have variance 1/fan_in; normal: standard deviation 0.02 (GPT-2). Both shrink what is added to the
    # residual stream by sqrt(2 n_layers)
    init: Literal["fan_in", "normal"] = "fan_in"
    dropout: float = 0.0  # share of each block's output set to 0 in training
    tied: bool = False  # the output head is the embedding's transpose
    moe: MoEConfig = field(default_factory=MoEConfig)
    mup: MuPConfig = field(default_factory=MuPConfig)

    def __post_init__(self):
        for name in ("d_model", "n_layers", "n_heads", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: should be at least 1")
        for name in ("n_kv_heads", "d_ff", "vocab_size", "window"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: should be at least 1, or null")
        if self.d_model % self.n_heads:
            raise ValueError(f"model.d_model={self.d_model} is not divisible by model.n_heads={self.n_heads}")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"model.n_heads={self.n_heads} is not divisible by model.n_kv_heads={self.kv_heads}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"model.d_model={self.d_model} / model.n_heads={self.n_heads} is {self.head_dim}: rotary "
                             "positions need an even head width")
        for name in ("norm_eps", "rope_theta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"model.{name}={getattr(self, name)}: should be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout}: should be in [0, 1)")
        if self.moe.experts and self.n_layers % self.moe.every:
            raise ValueError(f"model.n_layers={self.n_layers} is not divisible by model.moe.every={self.moe.every}")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def times_width(self) -> float:
        """Times the width that the learning rate was chosen at; 1 in the standard parametrisation."""
        return self.d_model / (self.mup.base_width or self.d_model)

    @property
    def times_depth(self) -> float:
        return self.n_layers / (self.mup.base_depth or self.n_layers)

    @property
    def query_scale(self) -> float:
        """What queries are multiplied with besides 1 / sqrt(head width): scores are then q k / head width, as at the base."""
        return ((self.mup.base_head_dim or self.head_dim) / self.head_dim) ** 0.5

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def layers_a_unit(self) -> int:
        """Layers that one stacked, scanned unit holds: with sparse layers among dense ones, a whole turn of them."""
        return self.moe.every if self.moe.experts else 1

    @property
    def sparse_layers(self) -> int:
        return self.n_layers // self.moe.every if self.moe.experts else 0

    @property
    def expert_width(self) -> int:
        return self.moe.d_ff or self.ff_width

    @property
    def gated(self) -> bool:
        return self.activation in ("swiglu", "geglu")

    @property
    def ff_width(self) -> int:
        return self.d_ff or -(-(8 * self.d_model // 3 if self.gated else 4 * self.d_model) // 64) * 64
