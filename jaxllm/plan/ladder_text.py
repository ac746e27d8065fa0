"""What `jaxllm plan ladder` says, at most 110 columns."""

from jaxllm.plan import fit_text
from jaxllm.plan.ladder_config import LadderVerb
from jaxllm.plan.ladder_runs import Rung
from jaxllm.plan.size_text import count, flops, wrapped
from jaxllm.report.summary import duration


def plan(cfg: LadderVerb, rungs: list[Rung], states: dict[str, str], seconds: float) -> list[str]:
    """Returns the sizes, the token counts, and what all of it takes."""
    sizes = {rung.size: rung for rung in rungs}
    batch = rungs[0].cfg.train.batch_size * rungs[0].cfg.data.seq_len
    lines = [f"ladder: {len(sizes)} sizes x {len(cfg.tokens)} token counts = {len(rungs)} runs in {cfg.dir}/runs; steps of "
             f"{batch:,} tokens",
             f"  {'size':<10}{'parameters':>11}{'embeddings':>12}  {'shape':<34}{'learning rate':>14}"]
    for name, rung in sizes.items():
        m = rung.cfg.model
        tables = m.vocab_size * m.d_model * (1 if m.tied else 2)
        shape = f"{m.n_layers} layers, width {m.d_model}, ff {m.ff_width}"
        lines.append(f"  {name:<10}{count(rung.parameters):>11}{tables / rung.parameters:>12.0%}  {shape:<34}"
                     f"{rung.cfg.optim.lr:>14.3g}")
    amounts = ", ".join(count(rung.tokens) for rung in rungs if rung.size == rungs[0].size)
    lines += wrapped(f"tokens: {amounts}", "    ", first="  ")
    done = sum(state in ("finished", "diverged") for state in states.values())
    left = f"; {done} of them are done" if done else ""
    lines.append(f"  {flops(sum(rung.flops for rung in rungs))} FLOPs in all, the largest run {flops(rungs[-1].flops)}; about "
                 f"{duration(seconds)} to go{left}")
    lines.append("  parameters count embeddings and head, as Hoffmann et al. 2022 do (Kaplan et al. 2020 leave them out)")
    return lines


def whole(cfg: LadderVerb, rungs: list[Rung], found: dict) -> str:
    parts = [table(rungs, found["losses"]), fit_text.head(found), fit_text.law(found), fit_text.exponents(found),
             fit_text.prediction(found), verdict(cfg, found)]
    return "\n\n".join("\n".join(part) for part in parts)


def table(rungs: list[Rung], losses: dict[str, float]) -> list[str]:
    """Returns the held-out losses, a row a size, a column a token count."""
    sizes = list(dict.fromkeys(rung.size for rung in rungs))
    tokens = sorted({rung.tokens for rung in rungs})
    by = {(rung.size, rung.tokens): losses.get(rung.name) for rung in rungs}
    lines = ["held-out loss by size and tokens:", f"  {'':<10}" + "".join(f"{count(t):>10}" for t in tokens)]
    for size in sizes:
        cells = "".join(f"{'-' if by[size, t] is None else format(by[size, t], '.4f'):>10}" for t in tokens)
        lines.append(f"  {size:<10}{cells}")
    return lines


def verdict(cfg: LadderVerb, found: dict) -> list[str]:
    """Returns how the largest run, which no fit has seen, came out against what was told of it."""
    p, far, end = found["prediction"], found["farther"], found["largest"]
    lines = [f"the largest run, left out of the fit: {count(p['parameters'])} parameters x {count(p['tokens'])} tokens",
             f"  predicted from the {found['runs']} other runs: {interval(p, found['level'])}"]
    if isinstance(far, dict):
        lines.append(f"  predicted from the {far['runs']} runs smaller in both: {interval(far, found['level'])}, "
                     f"{far['times_the_most_compute']:.3g} times their largest compute")
    else:
        lines += wrapped(f"no prediction from the runs that are smaller in both: {far}", "    ", first="  ")
    told = ", ".join(f"{name} at step {step}" for name, step in found["alarms"].items()) or "none"
    lines += wrapped(f"runs that log.law with this law would have said to fall behind: {told}", "    ", first="  ")
    if isinstance(end, str):
        return [*lines, *wrapped(end, "    ", first="  ")]
    inside = "inside" if end["in_interval"] else "outside of"
    said = "within" if end["within"] else "NOT within"
    lines.append(f"  measured {end['loss']:.4f}: the prediction is {end['off']:+.2%} off, {said} {cfg.within:.1%}; the run is "
                 f"{inside} the interval")
    if "farther_off" in end:
        said = "within" if end["farther_within"] else "NOT within"
        lines.append(f"  that from smaller runs alone is {end['farther_off']:+.2%} off, {said} {cfg.within:.1%}")
    return lines


def interval(told: dict, level: float) -> str:
    low, high = told["run_interval"]
    return f"{told['loss']:.4f} ({level:.0%}: {low:.4f} to {high:.4f})"
