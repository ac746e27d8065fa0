"""The findings of `jaxllm plan fit` as text, at most 110 columns."""

from jaxllm.plan.fit_config import FitVerb
from jaxllm.plan.laws import LAWS
from jaxllm.plan.size_text import count, flops, wrapped

NAMES = {"approach_1": "approach 1, envelope", "approach_2": "approach 2, IsoFLOP", "approach_3": "approach 3, parametric"}
COMPARED = ("approach_1", "approach_2", "approach_3", "epoch")


def whole(cfg: FitVerb, found: dict) -> str:
    parts = [head(found), law(found), exponents(found), prediction(found)]
    return "\n\n".join("\n".join(part) for part in parts)


def head(found: dict) -> list[str]:
    r = found["range"]
    lines = [f"{found['runs']} runs of {count(r['parameters'][0])} to {count(r['parameters'][1])} parameters, "
             f"{count(r['tokens'][0])} to {count(r['tokens'][1])} tokens, "
             f"{flops(r['flops'][0])} to {flops(r['flops'][1])} FLOPs",
             f"loss: {found['loss']}"]
    if found["excluded"]:
        lines.append(f"left out, {len(found['excluded'])}:")
        for name, why in found["excluded"]:
            lines += wrapped(f"{name}: {why}", "  ")
    return lines


def law(found: dict) -> list[str]:
    v, i = found["law"], found["intervals"]
    lines = ["L(N, D) = E + A / N^alpha + B / D^beta, "
             f"{found['level']:.0%} intervals of {found['bootstraps']:,} bootstrap samples:"]
    lines += [f"  {name:<6}{v[name]:>12.5g}   {i[name][0]:.5g} to {i[name][1]:.5g}" for name in v]
    at_best = "every one" if found["starts_at_best"] == found["starts"] else f"{found['starts_at_best']:,}"
    lines.append(f"  {found['starts']:,} starts, {at_best} within 1e-6 of the best objective; {found['seconds']:.0f} s")
    worst = ", ".join(f"{w['run']} {w['off']:+.1%}" for w in found["worst"])
    lines += wrapped(f"residuals {found['residual_rms']:.2%}; farthest off: {worst}", "    ", first="  ")
    for doubt in found["doubts"]:
        lines += wrapped(f"! {doubt}", "    ", first="  ")
    return lines


def exponents(found: dict) -> list[str]:
    lines = ["the best size grows as C^a, the best tokens as C^b:", f"  {'':<26}{'a':>8}  {'interval':<18}{'b':>6}"]
    for name, label in NAMES.items():
        if name in found["exponent"]:
            a, (low, high) = found["exponent"][name], found["exponent_intervals"][name]
            lines.append(f"  {label:<26}{a:>8.3f}  {f'{low:.3f} to {high:.3f}':<18}{1 - a:>6.3f}")
        else:
            lines += wrapped(f"{label}: {found['why_not'][name]}", "    ", first="  ")
    published = ", ".join(f"{LAWS[key].name} {LAWS[key].exponent:.3f}" for key in COMPARED)
    return [*lines, f"  published: {published}"]


def prediction(found: dict) -> list[str]:
    p, level = found["prediction"], found["level"]
    sizes = [f"{NAMES[name].split(',')[0]} {count(b['parameters'])} ({count(b['interval'][0])} to {count(b['interval'][1])})"
             for name, b in sorted(p["best"].items())]
    lines = [f"prediction for {count(p['parameters'])} parameters x {count(p['tokens'])} tokens ({p['chosen']}), "
             f"{flops(p['flops'])} FLOPs:",
             f"  loss {p['loss']:.4f}; {level:.0%}: the law {p['law_interval'][0]:.4f} to {p['law_interval'][1]:.4f}, "
             f"one run {p['run_interval'][0]:.4f} to {p['run_interval'][1]:.4f}",
             *wrapped("best size for this compute: " + "; ".join(sizes), "    ", first="  ")]
    if p["times_the_most_compute"] > 30:
        lines.append(f"  ! {p['times_the_most_compute']:,.0f} times the compute of the largest run: the interval knows nothing "
                     "of what changes on the way")
    return lines
