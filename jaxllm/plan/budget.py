"""What training a model takes: FLOPs, time, money, energy, memory of a device, bytes of checkpoints.

FLOPs are those of jaxllm/train/flops.py, which the tests compare with the compiled program's own count.
"""

import dataclasses

from jaxllm.errors import UserError
from jaxllm.hardware import Chip
from jaxllm.model.config import ModelConfig
from jaxllm.model.remat import named
from jaxllm.plan import rental
from jaxllm.plan.roofline import peak
from jaxllm.train.flops import forward_flops_per_token, mean_seen, parameter_count

STATE_BYTES = 12  # a parameter: float32 weights and Adam's two moments
HOUR, DAY = 3600.0, 86400.0


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast one chip trains, and what its hour costs."""

    chip: Chip
    mfu: float  # share of the peak that the model's own FLOPs reach
    usd_per_hour: float | None
    watts: float | None

    @property
    def flops_per_hour(self) -> float:
        return peak(self.chip) * self.mfu * HOUR

    def chip_hours(self, flops: float) -> float:
        return flops / self.flops_per_hour

    def usd(self, chip_hours: float) -> float | None:
        return None if self.usd_per_hour is None else chip_hours * self.usd_per_hour

    def kwh(self, chip_hours: float, overhead: float) -> float | None:
        """Returns the energy at the chips' design power; `overhead`: the data centre's total over the chips' (PUE)."""
        return None if self.watts is None else chip_hours * self.watts * overhead / 1000

    def hours_for(self, usd: float) -> float:
        """Returns the chip-hours that money buys; raises UserError where no price is known."""
        if self.usd_per_hour is None:
            raise UserError(f"usd={usd:g}: no price of {self.chip.name!r} is held; give hardware.usd_per_hour")
        return usd / self.usd_per_hour


def rate(chip: Chip, mfu: float, usd_per_hour: float | None = None, watts: float | None = None) -> Rate:
    """Returns a chip's rate, its price and power from prices.yaml and rental.yaml where they are not given."""
    price, power = rental.usd_per_hour(chip.name), rental.watts(chip.name)
    return Rate(chip, mfu, usd_per_hour if usd_per_hour is not None else price and price.value,
                watts if watts is not None else power and power.value)


def flops_per_token(cfg: ModelConfig, seq_len: int, *, causal: bool = True) -> dict[str, float]:
    """Returns the training FLOPs of a token by part, forward and backward; without `causal` every position sees all."""
    parts = {name: 3 * n for name, n in forward_flops_per_token(cfg, seq_len).items()}
    if not causal:
        parts["scores"] *= min(cfg.window or seq_len, seq_len) / mean_seen(seq_len, cfg.window)
    return parts


def recomputed_per_token(cfg: ModelConfig, seq_len: int, remat: str) -> float:
    """Returns the FLOPs a token that the backward pass computes again: the layer's matmuls whose results are not kept.

    At most these: a compiler leaves out what nothing needs again, such as a layer's last matmul.
    """
    part, kept = forward_flops_per_token(cfg, seq_len), named(remat)
    if remat == "none":
        return 0.0
    if remat == "dots":
        return part["scores"]
    D, N, K = cfg.d_model, cfg.n_heads, cfg.kv_heads
    again = part["projections"] + part["scores"] + part["feed-forward"]
    if "qkv" in kept:
        again -= part["projections"] * (N + 2 * K) / (2 * N + 2 * K)
    if "attention" in kept:
        again -= part["scores"]
    dense = (cfg.n_layers - cfg.sparse_layers) * 2 * D * cfg.ff_width
    return again - dense * (("up" in kept) + ("gate" in kept and cfg.gated))


def checkpoint_bytes(parameters: float) -> dict[str, float]:
    """Returns the bytes of what is saved to go on (weights, two moments) and of the weights alone."""
    return {"training state": STATE_BYTES * parameters, "weights, float32": 4 * parameters, "weights, bfloat16": 2 * parameters}


def device_bytes(cfg: ModelConfig, *, devices: int, rows: int, seq_len: int, remat: str = "full",
                 loss_chunk: int = 256) -> dict[str, float]:
    """Returns an estimate of what one device holds in a step, by part, in bytes: weights split over all devices (fsdp).

    `rows` sequences a device. What `jaxllm plan compile` compiles is the truth; this leaves out buffers and gaps.
    """
    n, D, F, V = sum(parameter_count(cfg).values()), cfg.d_model, cfg.ff_width, cfg.vocab_size
    share = cfg.kv_heads / cfg.n_heads
    tokens = rows * seq_len
    layer = 2 * tokens * D  # its input, bfloat16
    kept = {"qkv": 2 * tokens * D * (1 + 2 * share), "attention": 2 * tokens * D, "gate": 2 * tokens * F, "up": 2 * tokens * F}
    whole = 2 * tokens * D + sum(kept.values()) + 2 * tokens * (5 * D + F)  # norms, residuals, the gate's product as well
    if named(remat) is not None:
        layer += sum(kept[name] for name in named(remat))
    else:
        layer = whole if remat == "none" else layer + sum(kept.values()) + 4 * tokens * D
    gathered = (n - V * D * (1 if cfg.tied else 2)) / cfg.n_layers * 2 * 2  # two layers at a time, bfloat16
    return {"weights": 4 * n / devices, "moments": 8 * n / devices, "gradients": 2 * n / devices,
            "activations kept": cfg.n_layers * layer, "one layer at work": float(whole),
            "gathered layers": gathered if devices > 1 else 0.0, "logits": 2.0 * 4 * rows * min(loss_chunk, seq_len) * V}
