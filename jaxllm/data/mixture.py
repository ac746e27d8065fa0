"""How often each document goes into the output: shares of sources or domains, caps on repeats, factors by quality and domain.

N documents, G groups (sources, or domains). Nothing is drawn at random: a fraction of a copy is settled by a hash of the
document's id, so the same documents come out whatever their order, and what is kept at some rate is kept at any higher.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxllm.errors import UserError, nearest

# Muennighoff et al. 2023, Scaling data-constrained language models, appendix A: the decay of what a repeat is worth, and the
# exponent of the data term of the loss
R_D_STAR, DATA_EXPONENT = 15.387756, 0.3526596
HARMLESS_EPOCHS = 4.0  # "up to 4 epochs of repeated data yields negligible changes to loss" (same paper)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixConfig:
    # how the output is shared among groups. natural: as the text falls; weights: as `weights` says; temperature: size^alpha
    # (Devlin et al. 2019, Conneau et al. 2020); unimax: equal shares as far as max_epochs allows (Chung et al. 2023)
    method: Literal["natural", "weights", "temperature", "unimax"] = "natural"
    by: Literal["source", "domain"] = "source"  # what a group is
    alpha: float = 0.7  # temperature's exponent: 1 as the text falls, 0 equal shares; 0.7 mBERT's, 0.3 XLM-R's
    total: float | None = None  # size of the output, in the unit of the documents' sizes; null: about that of what comes in
    # no document is repeated more often; what goes beyond 4 is worth visibly less than new text
    max_epochs: float = HARMLESS_EPOCHS
    # what gives where a group is too small. total: the other groups take its part; shares: the output gets smaller
    keep: Literal["total", "shares"] = "total"
    quality_edges: tuple[float, ...] = ()  # cut quality into buckets, e.g. [0.3,0.7]: below 0.3, from 0.3 to 0.7, from 0.7
    quality_factors: tuple[float, ...] = ()  # how often a bucket's documents are taken, relative to the others', e.g. [0.5,1,2]
    seed: int = 0  # of the hash that settles fractions of a copy
    # method=weights: share of each group, relative to the others'; not named: 1
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    # how often a domain's documents are taken, relative to the others'; not named: 1
    domains: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        edges = self.quality_edges
        factors = [*self.weights.values(), *self.quality_factors, *self.domains.values()]
        for name, ok, should in (
            ("alpha", 0 <= self.alpha <= 1, "in [0, 1]"),
            ("total", self.total is None or 0 < self.total < math.inf, "above 0, or null"),
            ("max_epochs", 0 < self.max_epochs < math.inf, "above 0"),
            ("quality_edges", all(a < b for a, b in itertools.pairwise(edges)), "rising"),
            ("quality_factors", len(self.quality_factors) == (len(edges) + 1 if edges else 0),
             f"{len(edges) + 1 if edges else 0} numbers, one a bucket between {len(edges)} mix.quality_edges"),
            ("weights", not self.weights or self.method == "weights", "empty unless mix.method=weights"),
        ):
            if not ok:
                raise ValueError(f"mix.{name}={getattr(self, name)}: should be {should}")
        if wrong := [f for f in factors if not 0 <= f < math.inf]:
            raise ValueError(f"mix: a weight or factor is {wrong[0]}: should be 0 or more, and finite")


def decide(ids: Sequence[str], source: Sequence[str], size: Sequence[float], quality: Sequence[float] | None,
           domain: Sequence[str] | None, cfg: MixConfig) -> np.ndarray:
    """Returns copies_N: how many times each document is written (0: not at all).

    `source` and `domain` are names; `size` is bytes or tokens; a quality that is NaN counts as factor 1.
    """
    rate_N = rates(source, size, quality, domain, cfg)
    copies_N = np.floor(rate_N).astype(np.int64)
    fraction_N = rate_N - copies_N
    for i in np.nonzero(fraction_N > 1e-9)[0]:
        copies_N[i] += chance(ids[i], cfg.seed) < fraction_N[i]
    return copies_N


def chance(name: str, seed: int) -> float:
    """Returns a number in [0, 1) that depends on the name and the seed alone."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(8, "little", signed=True))
    return (int.from_bytes(digest.digest(), "little") >> 11) / (1 << 53)


def rates(source, size, quality, domain, cfg: MixConfig) -> np.ndarray:
    """Returns rate_N: how often each document should be taken, on average."""
    size_N = np.asarray(size, np.float64)
    if not len(size_N):
        return size_N
    wanted_N = size_N * factors(quality, domain, len(size_N), cfg)
    most_N = size_N * cfg.max_epochs
    if cfg.method == "natural":
        amount_N = fill(wanted_N, most_N, wanted_N.sum() if cfg.total is None else cfg.total)
    else:
        names, group_N = groups(source, domain, cfg)
        room_G = np.bincount(group_N, np.where(wanted_N > 0, most_N, 0), len(names))
        share_G = shares(names, np.bincount(group_N, size_N, len(names)), cfg)
        total = size_N.sum() if cfg.total is None else cfg.total
        if cfg.keep == "shares" and (share_G > 0).any():
            total = min(total, (room_G[share_G > 0] / share_G[share_G > 0]).min())
        amount_G = fill(np.where(room_G > 0, share_G, 0), room_G, total)
        amount_N = np.zeros_like(size_N)
        for g, amount in enumerate(amount_G):
            inside = group_N == g
            amount_N[inside] = fill(wanted_N[inside], most_N[inside], amount)
    return np.divide(amount_N, size_N, out=np.zeros_like(size_N), where=size_N > 0)


def fill(share: np.ndarray, room: np.ndarray, total: float) -> np.ndarray:
    """Returns amounts in proportion to the shares, none above its room, that sum to `total` or else fill every room.

    What a full one cannot take goes to the others in proportion. With equal shares this is UniMax (Chung et al. 2023,
    algorithm 1).
    """
    amount = np.zeros_like(share, np.float64)
    is_open = share > 0
    while is_open.any():
        left = max(total - amount[~is_open].sum(), 0.0)
        amount[is_open] = share[is_open] * (left / share[is_open].sum())
        full = is_open & (amount > room)
        if not full.any():
            break
        amount[full] = room[full]
        is_open &= ~full
    return amount


def factors(quality, domain, n: int, cfg: MixConfig) -> np.ndarray:
    """Returns how often each document is wanted beside others of its group."""
    factor_N = np.ones(n)
    if cfg.quality_edges:
        if quality is None or np.isnan(np.asarray(quality, np.float64)).all():
            raise UserError("mix.quality_edges: the documents have no quality; run a stage that gives one, or leave it out")
        quality_N = np.asarray(quality, np.float64)
        bucket_N = np.digitize(quality_N, cfg.quality_edges)
        factor_N *= np.where(np.isnan(quality_N), 1.0, np.asarray(cfg.quality_factors)[bucket_N])
    if cfg.domains:
        names, index_N = index(domain, "mix.domains")
        check_names("mix.domains", cfg.domains, names)
        factor_N *= np.array([cfg.domains.get(name, 1.0) for name in names])[index_N]
    return factor_N


def groups(source, domain, cfg: MixConfig) -> tuple[list[str], np.ndarray]:
    """Returns the groups' names, sorted, and each document's group."""
    return index(source if cfg.by == "source" else domain, f"mix.by={cfg.by}")


def index(names, key: str) -> tuple[list[str], np.ndarray]:
    if names is None:
        raise UserError(f"{key}: the documents have no domain; should be left out, or `domain` be in their metadata")
    found, index_N = np.unique(np.asarray(names, str), return_inverse=True)
    return found.tolist(), index_N


def check_names(key: str, named, known: Sequence[str]) -> None:
    for name in named:
        if name not in known:
            raise UserError(f"{key}.{name}: no document is of it; {nearest(name, known)}")


def shares(names: Sequence[str], size_G: np.ndarray, cfg: MixConfig) -> np.ndarray:
    """Returns each group's share of the output as the method wants it, before any cap."""
    if cfg.method == "weights":
        check_names("mix.weights", cfg.weights, names)
        wanted_G = np.array([cfg.weights.get(name, 1.0) for name in names])
    elif cfg.method == "temperature":
        wanted_G = np.where(size_G > 0, size_G, 0.0) ** cfg.alpha * (size_G > 0)
    elif cfg.method == "unimax":
        wanted_G = np.ones(len(names))
    else:
        wanted_G = size_G
    return wanted_G / wanted_G.sum() if wanted_G.sum() else wanted_G


def worth(epochs: float) -> float:
    """Returns how many epochs of new text so many epochs of the same text are worth (Muennighoff et al. 2023, equation 5)."""
    if epochs <= 1:
        return epochs
    return 1 + R_D_STAR * -math.expm1(-(epochs - 1) / R_D_STAR)


# ---------------------------------------------------------------- what came of it


def audit(source, size, quality, domain, copies, cfg: MixConfig) -> list[dict]:
    """Returns a row for each source, domain and quality bucket: what came in, what goes out, against what was wanted.

    `epochs` is size out over size in; `worth` is that in epochs of new text; `warning` is there where something is to be said.
    """
    size_N, copies_N = np.asarray(size, np.float64), np.asarray(copies)
    out_N, rows = size_N * copies_N, []
    split = {"source": index(source, "source")}
    if domain is not None:
        split["domain"] = index(domain, "domain")
    if quality is not None and cfg.quality_edges:
        quality_N = np.asarray(quality, np.float64)
        bucket_N = np.where(np.isnan(quality_N), len(cfg.quality_edges) + 1, np.digitize(quality_N, cfg.quality_edges))
        split["quality"] = (bucket_names(cfg.quality_edges), bucket_N)
    for by, (names, index_N) in split.items():
        size_G, out_G = np.bincount(index_N, size_N, len(names)), np.bincount(index_N, out_N, len(names))
        n_G, written_G = np.bincount(index_N, minlength=len(names)), np.bincount(index_N, copies_N, len(names)).astype(int)
        used_G = np.bincount(index_N, copies_N > 0, len(names)).astype(int)
        wanted_G = shares(names, size_G, cfg) if by == cfg.by and cfg.method != "natural" else [None] * len(names)
        for g in np.nonzero(n_G)[0]:
            used = size_N[(index_N == g) & (copies_N > 0)].sum()
            rows.append(_row(by, names[g], n_G[g], used_G[g], written_G[g], size_G[g], used, out_G[g],
                             out_N.sum(), size_N.sum(), wanted_G[g]))
    return rows


def bucket_names(edges: Sequence[float]) -> list[str]:
    inner = [f"{a:g} to {b:g}" for a, b in itertools.pairwise(edges)]
    return [f"below {edges[0]:g}", *inner, f"from {edges[-1]:g}", "unknown"]


def _row(by, name, n, used, written, size_in, size_used, size_out, total_out, total_in, wanted) -> dict:
    share = size_out / total_out if total_out else 0.0
    epochs = size_out / size_used if size_used else 0.0
    row = {"by": by, "name": name, "documents": int(n), "documents_used": int(used), "documents_written": int(written),
           "size_in": float(size_in), "size_out": float(size_out), "share_in": float(size_in / total_in) if total_in else 0.0,
           "share": float(share), "wanted": None if wanted is None else float(wanted),
           "epochs": float(epochs), "worth": worth(float(epochs))}
    said = []
    if epochs > HARMLESS_EPOCHS * (1 + 1e-9):
        more_loss = (epochs / row["worth"]) ** DATA_EXPONENT - 1
        said.append(f"repeated {epochs:.3g} times, worth {row['worth']:.3g} epochs of new text: the part of the loss that more "
                    f"text lowers is {more_loss:.1%} higher than with new text (Muennighoff et al. 2023)")
    if wanted is not None and abs(share - wanted) > 0.01 + 0.05 * wanted:
        said.append(f"{share:.1%} of the output, {wanted:.1%} wanted")
    return row | ({"warning": f"{by} {name}: " + "; ".join(said)} if said else {})
