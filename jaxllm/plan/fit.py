"""`jaxllm plan fit`: scaling laws of one's own runs, by all three approaches of Hoffmann et al. 2022, with intervals."""

import itertools
import json
import pathlib
import time

import numpy as np

from jaxllm.errors import UserError, check_folder, writing
from jaxllm.plan import fit_moe, fit_text, frontier, parametric
from jaxllm.plan.curves import save
from jaxllm.plan.fit_config import FitVerb
from jaxllm.plan.law_file import contents
from jaxllm.plan.laws import FLOPS_A_TOKEN
from jaxllm.plan.picture import check_picture
from jaxllm.plan.points import Points, read
from jaxllm.plan.usual import usual
from jaxllm.train.run_folder import write_atomically

LEAST_RUNS, LEAST_SIZES, LEAST_TOKENS = 8, 3, 3  # five constants, and something to judge them by
WIDE = 0.3  # an interval of the exponent that tells nothing: between Kaplan's 0.73 and Chinchilla's 0.46 are 0.27
FLAT = 1e-6  # an exponent below it says that the losses do not fall
USUAL = 8  # times the median residual that a run may be off before it stands out


def main(cfg: FitVerb) -> dict:
    """Prints the laws of the runs, writes what is asked for, and returns what `--json` writes."""
    check_folder("page", cfg.page)
    check_folder("law_file", cfg.law_file)
    if cfg.picture is not None:
        check_picture(cfg.picture)
    points = read(cfg.runs, cfg.loss)
    if any(run.experts > 1 for run in points.runs):
        return fit_moe.main(cfg, points)
    found, drawn = fit(cfg, points)
    print(fit_text.whole(cfg, found))
    if cfg.law_file is not None:
        with writing(cfg.law_file):
            write_atomically(pathlib.Path(cfg.law_file), json.dumps(contents(found), indent=1) + "\n")
        print(f"\nlaw: {cfg.law_file} (jaxllm plan size --law_file={cfg.law_file} ...)")
    if cfg.page is not None or cfg.picture is not None:
        from jaxllm.plan import fit_page
        from jaxllm.report.page import write

        plots = fit_page.plots_of(cfg, found, drawn)
        if cfg.picture is not None:
            with writing(cfg.picture):
                save(plots, cfg.picture)
            print(f"picture: {cfg.picture}")
        if cfg.page is not None:
            write(fit_page.page(cfg, found, plots), pathlib.Path(cfg.page))
            print(f"page: {cfg.page}")
    return found


def fit(cfg: FitVerb, points: Points) -> tuple[dict, dict]:
    """Returns (everything that was found as plain numbers, what the plots need); raises UserError for too few runs."""
    began = time.perf_counter()
    check_enough(points)
    points = without_outliers(cfg, points)
    n, d, y = points.columns()
    whole = parametric.fit(n, d, y, bootstraps=cfg.bootstraps, seed=cfg.seed)
    if min(whole.law.alpha, whole.law.beta) < FLAT:
        raise UserError(f"the losses do not fall with size and tokens (alpha={whole.law.alpha:.2g}, beta={whole.law.beta:.2g}: "
                        "should be above 0), so they tell no law; compare runs of one text, one tokenizer and one schedule")
    approaches, why_not = {}, {}
    for name, make in (("approach_1", lambda: frontier.envelope(curves_of(points), seed=cfg.seed)),
                       ("approach_2", lambda: frontier.isoflop(n, FLOPS_A_TOKEN * n * d, y, seed=cfg.seed))):
        try:
            approaches[name] = make()
        except frontier.TooFew as e:
            why_not[name] = str(e)
    samples = whole.samples()
    law = whole.law
    constants = ("E", "A", "B", "alpha", "beta")
    found = {
        "runs": len(n), "excluded": [list(one) for one in points.excluded], "loss": points.loss,
        "range": {"parameters": [float(n.min()), float(n.max())], "tokens": [float(d.min()), float(d.max())],
                  "flops": [float((FLOPS_A_TOKEN * n * d).min()), float((FLOPS_A_TOKEN * n * d).max())]},
        "law": {name: getattr(law, name) for name in constants},
        "intervals": {name: interval(cfg, getattr(samples, name)) for name in constants},
        "exponent": {"approach_3": law.exponent} | {name: best.law.exponent for name, best in approaches.items()},
        "exponent_intervals": {"approach_3": interval(cfg, samples.exponent)}
        | {name: interval(cfg, best.exponent_S) for name, best in approaches.items()},
        "why_not": why_not, "residual_rms": float(np.sqrt(np.mean(whole.residual_N**2))),
        "worst": worst(points, whole.residual_N), "objective": whole.objective, "starts": len(whole.objective_S),
        "starts_at_best": int(np.sum(whole.objective_S - whole.objective < 1e-6)), "bootstraps": cfg.bootstraps,
        "level": cfg.level, "prediction": predict(cfg, points, whole, approaches),
    }
    found["watch"] = usual(points, law)
    found["doubts"] = doubts(found, float(y.min()))
    found["seconds"] = time.perf_counter() - began
    return found, {"points": points, "law": law, "samples": samples, "approaches": approaches}


def doubts(found: dict, least_loss: float) -> list[str]:
    """Returns what the runs do not tell, where the samples disagree too much for a reader to go by the constants."""
    said, (low, high) = [], found["exponent_intervals"]["approach_3"]
    if found["intervals"]["E"][0] < 0.02 * least_loss:
        said.append("the runs do not tell E, which losses end at: larger models and more tokens would; a prediction far away "
                    "is not to be trusted")
    if high - low > WIDE:
        said.append(f"the runs do not tell how the best size grows (a from {low:.2f} to {high:.2f}): they need to be farther "
                    "apart in size and in tokens, or less noisy")
    return said


def check_enough(points: Points) -> None:
    """Raises UserError that says how many runs are needed, and which would help."""
    n, d, _ = points.columns()
    sizes, amounts = len(np.unique(n)), len(np.unique(np.round(np.log(d), 2))) if len(d) else 0
    if len(n) >= LEAST_RUNS and sizes >= LEAST_SIZES and amounts >= LEAST_TOKENS:
        return
    left_out = f" ({len(points.excluded)} left out: {'; '.join(f'{a}: {b}' for a, b in points.excluded[:3])})" \
        if points.excluded else ""
    raise UserError(f"too few runs to fit: {len(n)} of {sizes} sizes and {amounts} amounts of tokens{left_out}; needed are "
                    f"{LEAST_RUNS} runs of {LEAST_SIZES} sizes and {LEAST_TOKENS} amounts of tokens at least; {missing(n, d)}")


def missing(n: np.ndarray, d: np.ndarray) -> str:
    """Returns which runs would complete a grid of three sizes and three amounts of tokens around what is there."""
    def padded(values, begin: float, least: int) -> list[float]:
        out = sorted({float(f"{x:.2g}") for x in values}) or [begin]
        while len(out) < least:
            out.append(float(f"{2 * out[-1]:.2g}"))
        return out

    have = {(float(f"{a:.2g}"), float(f"{b:.2g}")) for a, b in zip(n, d, strict=True)}
    sizes = padded(n, 10e6, LEAST_SIZES)
    amounts = padded(d, 20 * sizes[0], LEAST_TOKENS)
    wanted = [pair for pair in itertools.product(sizes, amounts) if pair not in have]
    said = ", ".join(f"{fit_text.count(a)} x {fit_text.count(b)}" for a, b in wanted[:LEAST_RUNS])
    return f"add for instance (parameters x tokens): {said}"


def without_outliers(cfg: FitVerb, points: Points) -> Points:
    """Returns the runs without those whose loss stands out above the law of the others, one after the other, named."""
    starts = parametric.grid()[::90]  # some 50 of them are enough to see an outlier
    while cfg.stands_out is not None and len(points.runs) > LEAST_RUNS:
        n, d, y = points.columns()
        residual_N = parametric.fit(n, d, y, bootstraps=0, starts=starts).residual_N
        limit = max(np.log1p(cfg.stands_out), USUAL * float(np.median(np.abs(residual_N))))
        at = int(np.argmax(residual_N))
        if residual_N[at] <= limit:
            break
        over = np.expm1(residual_N[at])
        points = points.without({points.runs[at].name: f"diverged or mismeasured: its loss of {y[at]:.4g} is {over:.1%} above "
                                                       "what the others' law says"})
    check_enough(points)
    return points


def curves_of(points: Points) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """Returns the sizes' curves: the training curves of runs, or of a table the rows of each size (to 5 %).

    Of several runs of a size the longest is taken: a shorter schedule ends lower at equal tokens, and curves of different
    schedules are no one curve.
    """
    out = []
    for same in frontier.group(np.array([run.parameters for run in points.runs])):
        ends = sorted((points.runs[i] for i in same), key=lambda r: r.tokens)
        n = float(np.exp(np.mean(np.log([r.parameters for r in ends]))))
        if len(ends) >= frontier.LEAST_POINTS or ends[-1].curve is None:  # finished runs are better than points on the way
            tokens, losses = np.array([r.tokens for r in ends]), np.array([r.loss for r in ends])
        else:
            tokens, losses = ends[-1].curve
        out.append((n, tokens, losses))
    return out


def interval(cfg: FitVerb, values: np.ndarray) -> list[float]:
    tail = (1 - cfg.level) / 2
    return [float(x) for x in np.quantile(values, [tail, 1 - tail])]


def worst(points: Points, residual_N: np.ndarray) -> list[dict]:
    order = np.argsort(-np.abs(residual_N))[:3]
    return [{"run": points.runs[i].name, "off": float(np.expm1(residual_N[i]))} for i in order]


def predict(cfg: FitVerb, points: Points, whole: parametric.Fit, approaches: dict) -> dict:
    """Returns the loss of the target run with its interval; without a target, of the best run of ten times the most compute.

    The interval of the law is the samples' spread; that of a run adds a residual drawn for each sample.
    """
    law, samples = whole.law, whole.samples()
    n_N, d_N, _ = points.columns()
    most = float((FLOPS_A_TOKEN * n_N * d_N).max())
    t = cfg.target
    flops = t.flops if t.flops is not None else 10 * most
    if t.parameters is not None:
        n, d = t.parameters, t.tokens or float(law.tokens_for(t.parameters))
    else:
        n, d = map(float, law.optimal(flops))
    flops = FLOPS_A_TOKEN * n * d
    loss_S = samples.loss(n, d)
    noise_S = np.random.default_rng(cfg.seed).choice(whole.residual_N, len(loss_S))
    best_S = samples.optimal(flops)[0]
    found = {"parameters": n, "tokens": d, "flops": flops, "loss": float(law.loss(n, d)), "law_interval": interval(cfg, loss_S),
             "run_interval": interval(cfg, loss_S * np.exp(noise_S)), "times_the_most_compute": flops / most,
             "chosen": "given" if t.parameters is not None else "the best of its compute",
             "best": {"approach_3": {"parameters": float(law.optimal(flops)[0]), "interval": interval(cfg, best_S)}}}
    for name, best in approaches.items():
        found["best"][name] = {"parameters": float(best.law.optimal(flops)[0]), "interval": interval(cfg, best.optimal(flops))}
    return found
