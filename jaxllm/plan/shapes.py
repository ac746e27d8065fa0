"""From a number of parameters to an architecture: widths that are multiples of 128, a true count within 2 %.

Every depth and width is weighed at once: the feed-forward is as wide as the count asks for, and what deviates least from
the proportions of published models wins: width over depth 64 (GPT-2's 124 M) to 128 (from 5 B: Llama's 7 B, 13 B, 405 B),
and a feed-forward of 8/3 the width (Shazeer 2020: as many weights as an ungated one of 4).
"""

# W widths, L depths: every pair is weighed.
import math

import numpy as np

from jaxllm.errors import UserError
from jaxllm.model.config import ModelConfig
from jaxllm.train.flops import parameter_count

UNIT = 128  # the side of a TPU's matrix units
WITHIN = 0.02
WIDTHS = np.arange(UNIT, 65536 + 1, UNIT)
DEPTHS = np.arange(1, 257)
FEED_FORWARD = (1.5, 5.0)  # widths of it that are thought of, over the model's


def heads(width: int) -> tuple[int, int]:
    """Returns (query heads, kv heads): heads of 128, of 64 in models under 1,024 wide; from 16 heads on, at most 8 kv heads."""
    n = width // (128 if width >= 1024 else 64)
    return n, max(k for k in range(1, 9) if n % k == 0) if n >= 16 else n


def smallest(vocab_size: int) -> float:
    """Returns the least parameters that `architecture` makes a model of."""
    return float(sum(parameter_count(_config(UNIT, 1, 2 * UNIT, vocab_size, tied=True, seq_len=1024)).values()))


def architecture(parameters: float, vocab_size: int, *, seq_len: int = 2048, tied: bool | None = None) -> ModelConfig:
    """Returns the settings of a model of so many parameters, embeddings included, to 2 %.

    `tied` None: the head is the embedding's transpose where two tables would hold over a fifth of the parameters. Raises
    UserError where no such model exists.
    """
    kv_W = np.array([heads(int(w))[1] / heads(int(w))[0] for w in WIDTHS])
    best = None
    for one in ((True, False) if tied is None else (tied,)):
        table_W = vocab_size * WIDTHS * (1 if one else 2)
        attention_W = WIDTHS**2 * (2 + 2 * kv_W)
        beside_W1, layer_W1 = (table_W + WIDTHS)[:, None], (attention_W + 2 * WIDTHS)[:, None]  # outside layers; of one, no ff
        ff_WL = np.round(((parameters - beside_W1) / DEPTHS[None] - layer_W1) / (3 * WIDTHS[:, None]) / UNIT) * UNIT
        ff_WL = np.maximum(ff_WL, UNIT)
        count_WL = beside_W1 + DEPTHS[None] * (layer_W1 + 3 * WIDTHS[:, None] * ff_WL)
        ratio_WL, off_WL = ff_WL / WIDTHS[:, None], np.abs(count_WL / parameters - 1)
        aspect_WL = np.log(WIDTHS[:, None] / DEPTHS[None] / _aspect(parameters))
        allowed_WL = (off_WL < WITHIN) & (ratio_WL > FEED_FORWARD[0]) & (ratio_WL < FEED_FORWARD[1])
        # A percent off the count weighs as much as 10 % off the proportions. Wide models should have 8 kv heads.
        uneven_W = 0.1 * (WIDTHS % np.where(WIDTHS < 4096, 512, 1024) != 0)
        cost_WL = aspect_WL**2 + (2 * np.log(ratio_WL * 3 / 8)) ** 2 + (10 * off_WL) ** 2 + uneven_W[:, None]
        if tied is None:
            cost_WL = cost_WL + np.where(one == (2 * vocab_size * WIDTHS > 0.2 * parameters), 0, 4)[:, None]
        cost_WL = np.where(allowed_WL, cost_WL, math.inf)
        w, depth = np.unravel_index(int(np.argmin(cost_WL)), cost_WL.shape)
        if np.isfinite(cost_WL[w, depth]) and (best is None or cost_WL[w, depth] < best[0]):
            best = cost_WL[w, depth], int(WIDTHS[w]), int(DEPTHS[depth]), int(ff_WL[w, depth]), one
    if best is None:
        raise UserError(f"parameters={parameters:.4g}: no model with widths of multiples of {UNIT} and "
                        f"vocab_size={vocab_size:,} comes within {WITHIN:.0%}; there are some from "
                        f"{smallest(vocab_size):,.0f} to 1e13")
    _, width, depth, ff, one = best
    return _config(width, depth, ff, vocab_size, tied=one, seq_len=seq_len)


def _aspect(parameters: float) -> float:
    """Returns the width over depth that models of this size have: 64 at 124 M, 128 from 5 B on, in log-log between."""
    return float(np.exp(np.interp(math.log(parameters), np.log([1e6, 124e6, 5e9]), np.log([32, 64, 128]))))


def _config(width: int, depth: int, ff: int, vocab_size: int, *, tied: bool, seq_len: int) -> ModelConfig:
    n, kv = heads(width)
    return ModelConfig(d_model=width, n_layers=depth, n_heads=n, n_kv_heads=kv, d_ff=ff, vocab_size=vocab_size,
                       max_seq_len=seq_len, tied=tied)
