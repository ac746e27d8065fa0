"""`jaxllm plan fit` of runs with experts: the joint law of size, tokens and number of experts (moe_law.py)."""

import numpy as np

from jaxllm.errors import UserError
from jaxllm.plan.fit_config import FitVerb
from jaxllm.plan.laws import FLOPS_A_TOKEN
from jaxllm.plan.moe_fit import LEAST_COUNTS, LEAST_RUNS, fit
from jaxllm.plan.moe_law import NAMES
from jaxllm.plan.points import Points
from jaxllm.plan.size_text import count, flops, wrapped


def main(cfg: FitVerb, points: Points) -> dict:
    """Prints the law of the runs and its prediction; returns what `--json` writes."""
    for name in ("page", "picture", "law_file"):
        if getattr(cfg, name) is not None:
            raise UserError(f"{name}={getattr(cfg, name)}: is for runs without experts; --json=FILE holds the constants")
    found = findings(cfg, points)
    print("\n".join(text(found)))
    return found


def findings(cfg: FitVerb, points: Points) -> dict:
    """Returns the constants, their intervals and the prediction; raises UserError for too few runs."""
    n, d, y = points.columns()
    x = np.array([run.experts for run in points.runs])
    counts = np.unique(x)
    if len(n) < LEAST_RUNS or len(counts) < LEAST_COUNTS or min(len(np.unique(v)) for v in (n, d)) < 3:
        raise UserError(f"too few runs with experts to fit: {len(n)} of {len(counts)} numbers of experts "
                        f"({', '.join(f'{c:g}' for c in counts)}); needed are {LEAST_RUNS} runs of {LEAST_COUNTS} numbers of "
                        "experts (dense counts as 1), 3 sizes and 3 amounts of tokens at least")
    whole = fit(n, d, x, y, bootstraps=cfg.bootstraps, seed=cfg.seed)
    t, law = cfg.target, whole.law
    experts = t.experts or float(counts[-1])
    most = float((FLOPS_A_TOKEN * n * d).max())
    if t.parameters is not None:
        size, tokens = t.parameters, t.tokens or float(law.at(experts).tokens_for(t.parameters))
    else:
        size, tokens = map(float, law.at(experts).optimal(t.flops or 10 * most))
    loss_S = whole.losses(size, tokens, experts)
    noise_S = np.random.default_rng(cfg.seed).choice(whole.residual_N, len(loss_S))
    tails = [(1 - cfg.level) / 2, (1 + cfg.level) / 2]

    def interval(values):
        return [float(v) for v in np.quantile(values, tails)]

    return {
        "runs": len(n), "excluded": [list(one) for one in points.excluded], "loss": points.loss, "level": cfg.level,
        "bootstraps": cfg.bootstraps, "experts": [float(c) for c in counts],
        "law": {name: getattr(law, name) for name in NAMES},
        "intervals": {name: interval(column) for name, column in zip(NAMES, whole.sample_SP.T, strict=True)},
        "residual_rms": float(np.sqrt(np.mean(whole.residual_N**2))),
        "exponent": {f"{c:g}": float(law.at(c).exponent) for c in counts},
        "prediction": {"parameters": size, "tokens": tokens, "experts": experts, "flops": FLOPS_A_TOKEN * size * tokens,
                       "loss": float(law.loss(size, tokens, experts)), "law_interval": interval(loss_S),
                       "run_interval": interval(loss_S * np.exp(noise_S)),
                       "dense_equal": equal if np.isfinite(equal := law.dense_equal(size, tokens, experts)) else None,
                       "times_the_most_compute": FLOPS_A_TOKEN * size * tokens / most},
    }


def text(found: dict) -> list[str]:
    v, i, p, level = found["law"], found["intervals"], found["prediction"], found["level"]
    lines = [f"{found['runs']} runs with {', '.join(f'{c:g}' for c in found['experts'])} experts; loss: {found['loss']}"]
    for name, why in found["excluded"]:
        lines += wrapped(f"left out: {name}: {why}", "  ")
    lines += ["", "L = E + A X^delta / N^(alpha + gamma ln X) + B X^omega / D^(beta + zeta ln X)",
              "with N the parameters that a token meets and X the number of experts;",
              f"{level:.0%} intervals of {found['bootstraps']:,} bootstrap samples:"]
    lines += [f"  {name:<6}{v[name]:>12.5g}   {i[name][0]:.5g} to {i[name][1]:.5g}" for name in v]
    grows = ", ".join(f"{experts} experts {a:.3f}" for experts, a in found["exponent"].items())
    lines += [f"  residuals {found['residual_rms']:.2%}", "", f"the best active size grows as C^a: {grows}", "",
              f"prediction for {count(p['parameters'])} active parameters, {p['experts']:g} experts x {count(p['tokens'])} "
              f"tokens, {flops(p['flops'])} FLOPs:",
              f"  loss {p['loss']:.4f}; {level:.0%}: the law {p['law_interval'][0]:.4f} to {p['law_interval'][1]:.4f}, "
              f"one run {p['run_interval'][0]:.4f} to {p['run_interval'][1]:.4f}",
              f"  a dense model is as good from {count(p['dense_equal'])} parameters on" if p["dense_equal"]
              else "  no dense model is as good after so many tokens"]
    if p["times_the_most_compute"] > 30:
        lines.append(f"  ! {p['times_the_most_compute']:,.0f} times the compute of the largest run")
    return lines
