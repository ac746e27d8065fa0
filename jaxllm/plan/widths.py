"""The same model at another width: what grows with it and what stays. No jax here."""

import dataclasses

import numpy as np

from jaxllm.model.config import ModelConfig, MuPConfig


def at_width(model: ModelConfig, width: int, *, head_dim: int | None = None, base: int | None = None) -> ModelConfig:
    """Returns the model of another width, with heads of the same width: more of them, a head of keys for as many queries as
    before, a feed-forward in the same proportion. `base`: with muP from that width on; None: in the standard parametrisation.

    Raises ValueError when heads do not divide the width.
    """
    head_dim = head_dim or model.head_dim
    if width % head_dim:
        raise ValueError(f"d_model={width}: heads of {head_dim} do not divide it")
    heads, group = width // head_dim, model.n_heads // model.kv_heads
    widened = {name: None if value is None else max(round(value * width / model.d_model), 1)
               for name, value in (("d_ff", model.d_ff), ("moe", model.moe.d_ff))}
    return dataclasses.replace(
        model, d_model=width, n_heads=heads, n_kv_heads=max(heads // group, 1) if heads % group == 0 else 1,
        d_ff=widened["d_ff"], moe=dataclasses.replace(model.moe, d_ff=widened["moe"]), mup=MuPConfig(base_width=base))


def slope(widths, values) -> float:
    """Returns the exponent s of values ~ width^s, by least squares on logarithms."""
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])
