"""Model FLOPs of training, counted from the settings: what MFU divides by the chip's peak.

Only the work that the model's mathematics asks for is counted: what is computed again in the backward pass, scores above
the diagonal that a kernel computes and throws away, norms, activations and the optimizer are not. A multiply-add is 2.
"""

from jaxllm.model.config import ModelConfig


def parameter_count(cfg: ModelConfig) -> dict[str, int]:
    """Returns the number of parameters of each part; their sum is the model's."""
    D, N, K, H, F, V, L = _sizes(cfg)
    a_norm = D if cfg.norm == "rmsnorm" else 2 * D
    moe, sparse = cfg.moe, cfg.sparse_layers
    experts = {
        "experts": sparse * (moe.experts + moe.shared) * _matrices(cfg) * D * cfg.expert_width,
        "routers": sparse * (D + (moe.bias_rate > 0)) * moe.experts,
    } if sparse else {}
    return {
        "embedding": V * D,
        "attention": L * (D * (N + 2 * K) * H + N * H * D),
        "feed-forward": (L - sparse) * _matrices(cfg) * D * F,
        **experts,
        "norms": (2 * L + 1) * a_norm,
        "head": 0 if cfg.tied else D * V,
    }


def active_parameter_count(cfg: ModelConfig) -> int:
    """Returns the number of parameters that one token meets: all but those of the experts it does not go to."""
    idle = cfg.sparse_layers * (cfg.moe.experts - cfg.moe.top_k) * _matrices(cfg) * cfg.d_model * cfg.expert_width
    return sum(parameter_count(cfg).values()) - idle


def forward_flops_per_token(cfg: ModelConfig, seq_len: int) -> dict[str, float]:
    """Returns the forward pass's FLOPs for one token of a row of `seq_len`, by part.

    An embedding row is looked up, not multiplied: 0. Scores and their weighted sum are two matmuls of 2 H a head for
    every position that a query sees, which is the mean over the row's queries of min(position + 1, window), as if the row
    held one document. Of a sparse layer, the router and the experts that the token goes to count.
    """
    D, N, K, H, F, V, L = _sizes(cfg)
    moe, sparse = cfg.moe, cfg.sparse_layers
    active = (moe.top_k + moe.shared) * _matrices(cfg) * D * cfg.expert_width + D * moe.experts
    return {
        "projections": L * 2 * (D * (N + 2 * K) * H + N * H * D),
        "scores": L * 2 * 2 * N * H * mean_seen(seq_len, cfg.window),
        "feed-forward": 2 * ((L - sparse) * _matrices(cfg) * D * F + sparse * active),
        "head": 2 * D * V,
    }


def training_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Returns forward and backward FLOPs a token: the backward multiplies by each matmul's two operands, so 3 forwards."""
    return 3 * sum(forward_flops_per_token(cfg, seq_len).values())


def mean_seen(seq_len: int, window: int | None) -> float:
    """Returns how many positions a causal query sees, averaged over a row of `seq_len`; `window`: at most that many."""
    w = min(window or seq_len, seq_len)
    return (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len


def formula(cfg: ModelConfig, seq_len: int) -> str:
    """Returns the count in one line, with this model's numbers."""
    part = forward_flops_per_token(cfg, seq_len)
    multiplied = (part["projections"] + part["feed-forward"] + part["head"]) / 2
    seen = mean_seen(seq_len, cfg.window)
    return (f"6 x {multiplied / 1e6:.2f} M weights that are multiplied + 12 x {cfg.n_layers} layers x {cfg.d_model} width x "
            f"{seen:g} positions seen on average = {training_flops_per_token(cfg, seq_len) / 1e6:.2f} MFLOPs a token, "
            "forward and backward")


def _matrices(cfg: ModelConfig) -> int:
    """Returns how many matrices a feed-forward has."""
    return 3 if cfg.gated else 2


def _sizes(cfg: ModelConfig) -> tuple[int, ...]:
    """Returns D width, N query heads, K kv heads, H head width, F feed-forward, V vocabulary, L layers."""
    if cfg.vocab_size is None:
        raise ValueError("model.vocab_size is not resolved yet")
    return cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.head_dim, cfg.ff_width, cfg.vocab_size, cfg.n_layers
