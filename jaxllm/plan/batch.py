"""`jaxllm plan batch RUN`: how large a batch pays, by the gradient noise that a run measured, and its learning rate."""

import math

import numpy as np

from jaxllm.errors import UserError
from jaxllm.plan.batch_config import BatchVerb
from jaxllm.plan.batch_law import adam_at, rate_by_noise, steps_and_examples
from jaxllm.plan.size_text import count, wrapped
from jaxllm.report.read import Run, read_run

LEAST_LINES = 5  # logged noise scales, below which their median is luck


def main(cfg: BatchVerb) -> dict:
    """Prints the noise scale, the critical batch and the table of batches; returns the same as a dict."""
    run = read_run(cfg.run)
    found = law_of(cfg, run)
    print(told(found))
    return found


def law_of(cfg: BatchVerb, run: Run) -> dict:
    """Returns the noise scale in tokens and, for each batch, what it costs and its learning rate; raises UserError for a run
    that did not measure it."""
    series = run.series("noise_scale")
    value_S = series.value[np.isfinite(series.value) & (series.value > 0)]
    if len(value_S) < LEAST_LINES:
        raise UserError(f"{cfg.run}: has {len(value_S)} lines with noise_scale, needs {LEAST_LINES}: train with "
                        "--train.noise_scale=100 and --train.micro_batches of 2 or more")
    latest_S = value_S[-max(math.ceil(cfg.last * len(value_S)), LEAST_LINES):]
    noise = float(np.median(latest_S))
    names = ("train.batch_size", "data.seq_len", "optim.lr", "optim.b1", "optim.b2", "optim.eps", "optim.name")
    rows, length, lr, b1, b2, eps, name = (run.setting(key) for key in names)
    if rows is None or length is None or lr is None:
        raise UserError(f"{cfg.run}/config.yaml: holds no train.batch_size, data.seq_len or optim.lr; should be what a run "
                        "wrote")
    own = rows * length
    batches = sorted(cfg.batches) or [own * 4**i for i in range(-2, 5) if own * 4**i >= length]
    found = {"run": cfg.run, "noise_scale": noise, "quartiles": [float(q) for q in np.quantile(latest_S, [0.25, 0.75])],
             "first": float(np.median(value_S[:LEAST_LINES])), "lines": len(latest_S), "batch": own, "seq_len": length,
             "lr": lr, "optimizer": name, "batches": []}
    for tokens in batches:
        steps, examples = steps_and_examples(tokens, noise)
        found["batches"].append({
            "tokens": tokens, "sequences": tokens / length, "steps": steps, "examples": examples,
            "adam": adam_at(lr, b1, b2, eps, tokens / own), "lr_by_noise": rate_by_noise(lr, own, tokens, noise)})
    return found


def told(found: dict) -> str:
    """Returns the findings as text."""
    noise, length, (low, high) = found["noise_scale"], found["seq_len"], found["quartiles"]
    head = (f"gradient noise scale: {count(noise)} tokens, {noise / length:,.1f} sequences of {length:,} (median of the last "
            f"{found['lines']} lines; half of them from {count(low)} to {count(high)}; at the start {count(found['first'])})")
    critical = ("critical batch: about the same. Well below it twice the batch takes half the steps, well above it nearly as "
                f"many as before. This run's batch, {count(found['batch'])} tokens, is {found['batch'] / noise:.2g} of it.")
    lines = [*wrapped(head, ""), *wrapped(critical, ""), "",
             "to the same loss, as multiples of the fewest steps (endless batches) and of the fewest tokens (tiny ones):",
             f"  {'tokens':>9}{'sequences':>11}{'steps':>9}{'tokens':>9}   {'Adam: lr':>10}{'b1':>9}{'b2':>9}{'eps':>10}"
             f"   {'SGD: lr':>9}"]
    for row in found["batches"]:
        a, mark = row["adam"], "  <- this run" if row["tokens"] == found["batch"] else ""
        adam = f"{'-':>10}{'-':>9}{'-':>9}{'-':>10}"
        if a is not None:
            adam = f"{a['lr']:>10.2e}{a['b1']:>9.4g}{a['b2']:>9.4g}{a['eps']:>10.1e}"
        cost = f"{row['sequences']:>11,.4g}{row['steps']:>9.3g}{row['examples']:>9.3g}"
        lines.append(f"  {count(row['tokens']):>9}{cost}   {adam}   {row['lr_by_noise']:>9.2e}{mark}")
    rules = ("Adam by the square-root rule (Malladi et al. 2022), which holds below the critical batch and while b1 and b2 "
             "keep a past (-: they would not); above it raise the rate no further. SGD by lr_max / (1 + noise scale / batch) "
             "(McCandlish et al. 2018). The noise scale is the simple one, which takes the loss to curve alike in all "
             "directions: right to a factor of a few.")
    return "\n".join([*lines, "", *wrapped(rules, "")])
