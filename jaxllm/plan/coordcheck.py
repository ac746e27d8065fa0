"""`jaxllm plan coordcheck CONFIG`: do activations change at one speed at every width, as muP promises? The coordinate check.

Yang et al. 2022 (Tensor Programs V), appendix D.1: a few steps at several widths; where the mean |change| of some activation
grows or falls with the width, the learning rate of a small model is wrong for a large one.
"""

import dataclasses
import pathlib
import time

import numpy as np

from jaxllm.errors import RunError, UserError, check_folder, writing
from jaxllm.model.config import ModelConfig
from jaxllm.plan.coordcheck_config import CoordCheckVerb
from jaxllm.plan.curves import save
from jaxllm.plan.picture import check_picture
from jaxllm.plan.widths import at_width, slope
from jaxllm.train.config import OptimConfig

WAYS = {"muP": "muP", "standard": "standard parametrisation"}
GROWS = 0.4  # a slope of the standard parametrisation that cannot be taken for noise


def main(cfg: CoordCheckVerb) -> dict:
    """Prints how changes go with the width, writes what is asked for, and returns what `--json` writes; raises RunError where
    muP's do."""
    check_folder("page", cfg.page)
    if cfg.picture is not None:
        check_picture(cfg.picture)
    from jaxllm.platform import start_jax

    start_jax()
    found = check(cfg)
    text = told(cfg, found)
    print(text)
    if cfg.page is not None or cfg.picture is not None:
        from jaxllm.plan.coordcheck_page import page, plots_of
        from jaxllm.report.page import write

        plots = plots_of(found)
        if cfg.picture is not None:
            with writing(cfg.picture):
                save(plots, cfg.picture)
            print(f"picture: {cfg.picture}")
        if cfg.page is not None:
            write(page(found, plots, text), pathlib.Path(cfg.page))
            print(f"page: {cfg.page}")
    if not found["passed"]:
        raise RunError(verdict(cfg, found), found)
    return found


def check(cfg: CoordCheckVerb) -> dict:
    """Returns the changes at each width and step, and their slopes after the last one, as plain numbers."""
    import jax

    from jaxllm.plan.coordinates import KINDS, changes, made_up

    optim, began = optimizer_of(cfg), time.perf_counter()
    batches = made_up(cfg.vocabulary, cfg.rows, cfg.length, cfg.updates, cfg.run.seed)
    seeds = range(cfg.run.seed, cfg.run.seed + cfg.seeds)
    found = {"widths": cfg.widths, "updates": cfg.updates, "seeds": cfg.seeds, "lr": optim.lr, "optimizer": optim.name, "limit":
             cfg.limit, "changes": {}, "slopes": {}}
    for way in WAYS:
        change_WSK = []
        for width in cfg.widths:
            model = model_at(cfg, width, mup=way == "muP")
            change_WSK.append(changes(model, optim, batches, jax.default_backend(), seeds).mean(axis=0))
        change_WSK = np.stack(change_WSK).astype(float)
        if not np.isfinite(change_WSK).all():
            raise RunError(f"optim.lr={optim.lr:g}: activations are not finite after {cfg.updates} updates; take a smaller one")
        if still := [kind for k, kind in enumerate(KINDS) if not change_WSK[:, -1, k].all()]:
            raise UserError(f"updates={cfg.updates}, optim.lr={optim.lr:g}: at some width the {still[0]} has not changed, so "
                            "it has no slope; a head begins at 0, and what is below it moves from the second update on: take 2 "
                            "or more")
        found["changes"][way] = {kind: change_WSK[:, :, k].tolist() for k, kind in enumerate(KINDS)}
        found["slopes"][way] = {kind: slope(cfg.widths, change_WSK[:, -1, k]) for k, kind in enumerate(KINDS)}
    off = [kind for kind, s in found["slopes"]["muP"].items() if not abs(s) < cfg.limit]
    return found | {"off": off, "passed": not off, "seconds": round(time.perf_counter() - began, 1)}


def optimizer_of(cfg: CoordCheckVerb) -> OptimConfig:
    """Returns the run's optimizer at its peak rate from the first step on."""
    return dataclasses.replace(cfg.optim, schedule="constant", warmup=0)


def model_at(cfg: CoordCheckVerb, width: int, *, mup: bool) -> ModelConfig:
    """Returns the coarse model of one width; with `mup` the smallest of the widths is the base."""
    layers = cfg.layers or cfg.model.n_layers
    if cfg.model.moe.experts and layers % cfg.model.moe.every:
        raise UserError(f"layers={layers} is not divisible by model.moe.every={cfg.model.moe.every}")
    model = dataclasses.replace(cfg.model, n_layers=layers, vocab_size=cfg.vocabulary, dropout=0.0)
    return at_width(model, width, head_dim=cfg.head_width, base=cfg.widths[0] if mup else None)


def told(cfg: CoordCheckVerb, found: dict) -> str:
    """Returns the table and the verdict."""
    lines = [f"mean |change| of activations after {found['updates']} updates at lr {found['lr']:g} ({found['optimizer']}), "
             f"{found['seeds']} seeds", "slope s: change ~ width^s", "",
             f"{'':<12}" + "".join(f"{w:>10,}" for w in found["widths"]) + f"{'slope':>9}"]
    for way, name in WAYS.items():
        lines.append(name)
        for kind, steps_W in found["changes"][way].items():
            cells = "".join(f"{steps[-1]:>10.3g}" for steps in steps_W)
            lines.append(f"  {kind:<10}{cells}{found['slopes'][way][kind]:>+9.3f}")
    return "\n".join([*lines, "", verdict(cfg, found)])


def verdict(cfg: CoordCheckVerb, found: dict) -> str:
    standard = {kind: s for kind, s in found["slopes"]["standard"].items() if s > GROWS}
    grow = ", ".join(f"{kind} {s:+.2f}" for kind, s in standard.items()) or f"nothing faster than width^{GROWS}"
    against = f"in the standard parametrisation grow: {grow}"
    if found["passed"]:
        worst = max(found["slopes"]["muP"].items(), key=lambda one: abs(one[1]))
        return (f"muP: every slope is within {cfg.limit:g} (the largest: {worst[0]} {worst[1]:+.3f}), so a learning rate "
                f"carries over; {against}")
    off = ", ".join(f"{kind} {found['slopes']['muP'][kind]:+.3f}" for kind in found["off"])
    return f"muP: slopes beyond {cfg.limit:g}: {off}; {against}"
