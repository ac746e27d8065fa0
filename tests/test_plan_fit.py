"""`jaxllm plan fit`: known laws are found again, every start agrees, and runs that cannot count are named."""

import csv
import functools
import json
import time

import numpy as np
import pytest
from test_report import make_run, write_lines

from jaxllm import config
from jaxllm.cli import main
from jaxllm.errors import UserError
from jaxllm.plan import fit, frontier, moe_fit, parametric, points
from jaxllm.plan.fit_config import FitVerb
from jaxllm.plan.law_file import read_law
from jaxllm.plan.laws import EPOCH, HOFFMANN
from jaxllm.plan.moe_law import NAMES, MoELaw
from jaxllm.report.read import read_run

SIZES = np.geomspace(3e7, 1e10, 16)
STARTS = parametric.grid()[::90]


def noisy(law, n, d, seed, noise=0.01):
    return law.loss(n, d) * np.exp(noise * np.random.default_rng(seed).standard_normal(np.shape(n)))


@functools.cache
def iso(law, seed, noise=0.01):
    """Returns sizes, tokens and losses of nine budgets with sixteen sizes each, around the best ones."""
    c = np.repeat(np.geomspace(6e18, 3e21, 9), 16)
    n = np.concatenate([np.geomspace(k / 6, k * 6, 16) for k in law.optimal(np.unique(c))[0]])
    return n, c / 6 / n, noisy(law, n, c / 6 / n, seed, noise)


@functools.cache
def ladder(law, seed, noise=0.01):
    """Returns curves of sixteen sizes, each at 200 amounts of tokens from 2 to 400 a parameter."""
    return [(n, d := np.geomspace(2 * n, 400 * n, 200), noisy(law, np.full(200, n), d, 100 * seed + i, noise))
            for i, n in enumerate(SIZES)]


def grid_of(law, seed):
    """Returns sizes, tokens and losses of sixteen sizes by twenty amounts of tokens."""
    n, d = (x.ravel() for x in np.meshgrid(SIZES, np.geomspace(3e8, 3e12, 20)))
    return n, d, noisy(law, n, d, seed)


def quick(n, d, y, **settings):
    return parametric.fit(n, d, y, bootstraps=0, starts=STARTS, **settings)


@pytest.mark.parametrize("law", [EPOCH, HOFFMANN], ids=lambda law: law.name)
def test_three_approaches_find_both_exponents_within_2_hundredths(law):
    """From losses with 1 % of noise; b = 1 - a."""
    for seed in range(3):
        n, d, y = iso(law, seed)
        one = frontier.envelope(ladder(law, seed), samples=2).law.exponent
        two = frontier.isoflop(n, 6 * n * d, y, samples=2).law.exponent
        three = quick(n, d, y).law.exponent
        for found in (one, two, three):
            assert found == pytest.approx(law.exponent, abs=0.02)
        both = quick(*grid_of(law, seed)).law
        assert both.alpha == pytest.approx(law.alpha, abs=0.02) and both.beta == pytest.approx(law.beta, abs=0.02)


def test_without_noise_the_constants_themselves_come_back():
    n, d, y = iso(EPOCH, 0, noise=0)
    law = quick(n, d, y).law
    for name, rel in (("E", 1e-4), ("A", 0.01), ("B", 0.01), ("alpha", 1e-3), ("beta", 1e-3)):
        assert getattr(law, name) == pytest.approx(getattr(EPOCH, name), rel=rel)
    assert frontier.isoflop(n, 6 * n * d, y, samples=2).law.exponent == pytest.approx(EPOCH.exponent, abs=0.005)
    assert frontier.envelope(ladder(EPOCH, 0, noise=0), samples=2).law.exponent == pytest.approx(EPOCH.exponent, abs=0.003)


@pytest.mark.slow
def test_all_4500_starts_agree_and_with_4000_bootstraps_take_less_than_a_minute():
    starts = parametric.grid()
    assert len(starts) == len({tuple(s) for s in starts}) == 4500
    n, d, y = iso(EPOCH, 1)
    began = time.process_time()
    found = parametric.fit(n, d, y, bootstraps=4000)
    assert time.process_time() - began < 60  # of one core
    assert len(found.objective_S) == 4500 and found.objective_S.max() - found.objective_S.min() < 1e-6
    assert found.sample_SP.shape == (4000, 5) and np.isfinite(found.sample_SP).all()
    low, high = np.quantile(found.samples().exponent, [0.025, 0.975])
    assert low < EPOCH.exponent < high and high - low < 0.1


def test_starts_from_every_corner_agree():
    starts = parametric.grid()
    n, d, y = iso(HOFFMANN, 2)
    found = parametric.fit(n, d, y, bootstraps=0, starts=starts[::37])
    assert found.objective_S.max() - found.objective_S.min() < 1e-6


def test_objective_is_the_paper_s_in_its_own_variables():
    n, d, y = iso(EPOCH, 0)
    found = quick(n, d, y)
    v = found.law
    terms = np.stack([np.log(v.A) - v.alpha * np.log(n), np.log(v.B) - v.beta * np.log(d), np.full(len(n), np.log(v.E))])
    r = np.abs(np.logaddexp.reduce(terms) - np.log(y))
    assert found.objective == pytest.approx(np.where(r < 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)).sum(), rel=1e-9)
    # and no neighbour is lower
    for name in ("E", "A", "B", "alpha", "beta"):
        for factor in (0.999, 1.001):
            other = {**vars(v), name: getattr(v, name) * factor}
            r = np.abs(np.log(other["E"] + other["A"] * n**-other["alpha"] + other["B"] * d**-other["beta"]) - np.log(y))
            assert np.where(r < 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)).sum() > found.objective


def test_intervals_hold_what_is_true_about_as_often_as_they_say():
    inside = []
    for seed in range(8):
        n, d, y = iso(EPOCH, seed)
        found = parametric.fit(n, d, y, bootstraps=125, starts=STARTS[::5], seed=seed)
        loss_S = found.samples().loss(70e9, 1.4e12)
        low, high = np.quantile(loss_S, [0.05, 0.95])
        inside.append(low < EPOCH.loss(70e9, 1.4e12) < high)
    assert 6 <= sum(inside)  # 7.2 of 8 by the level of 90 %


def test_a_best_size_at_the_edge_is_no_best_size():
    few = [c for c in ladder(EPOCH, 0) if c[0] < 1e8]
    with pytest.raises(frontier.TooFew, match=r"needs 4 sizes|beside them"):
        frontier.envelope(few, samples=2)
    n, d, y = iso(EPOCH, 0)
    assert len(frontier.group(6 * n * d)) == 9
    with pytest.raises(frontier.TooFew, match="needs 3 budgets"):
        frontier.isoflop(n[:32], 6 * n[:32] * d[:32], y[:32], samples=2)
    c = np.repeat(np.geomspace(1e19, 1e21, 5), 6)
    small = np.concatenate([np.geomspace(k / 40, k / 10, 6) for k in EPOCH.optimal(np.unique(c))[0]])  # far from the best
    with pytest.raises(frontier.TooFew, match="5 more have no lowest point near their sizes"):
        frontier.isoflop(small, c, EPOCH.loss(small, c / 6 / small), samples=2)


# ---------------------------------------------------------------- the verb


@pytest.fixture
def few_starts(monkeypatch):
    """All 4,500 starts are the slow test's; here every 50th, in the verb too."""
    few = parametric.grid()[::50]
    monkeypatch.setattr(parametric, "grid", lambda: few)


def write_csv(path, n, d, y, header=("parameters", "tokens", "loss"), names=None):
    with path.open("w", newline="") as f:
        out = csv.writer(f)
        out.writerow([*(["name"] if names else []), *header])
        out.writerows([*([names[i]] if names else []), *row] for i, row in enumerate(zip(n, d, y, strict=True)))
    return str(path)


def run(*words, **settings):
    cfg = config.load(FitVerb, None, [f"{k}={v}" for k, v in ({"bootstraps": 100} | settings).items()])
    return fit.fit(cfg, points.read(words, cfg.loss))[0]


def test_a_table_by_other_names_and_a_run_that_diverged(few_starts, tmp_path):
    n, d, y = (x.copy() for x in iso(EPOCH, 0))
    names = [f"run-{i}" for i in range(len(n))]
    y[5], y[77] = y[5] * 1.4, np.nan
    path = write_csv(tmp_path / "runs.csv", n, 6 * n * d, y, ("Model Size", "Training FLOP", "loss"), names)
    found = run(path, **{"target.parameters": 70e9, "target.tokens": 1.4e12})
    assert [name for name, _ in found["excluded"]] == ["run-77", "run-5"] and found["runs"] == len(n) - 2
    assert found["excluded"][0][1] == "diverged: the loss is nan" and "% above what the others' law says" in found["excluded"][1][1]
    p = found["prediction"]
    assert p["loss"] == pytest.approx(EPOCH.loss(70e9, 1.4e12), rel=0.01)
    assert p["run_interval"][0] < p["law_interval"][0] < p["loss"] < p["law_interval"][1] < p["run_interval"][1]
    assert found["starts"] == found["starts_at_best"] == 90
    kept = run(path, stands_out="null")
    assert [name for name, _ in kept["excluded"]] == ["run-77"]


def test_what_the_runs_do_not_tell_is_said(few_starts, tmp_path):
    n, d = (x.ravel() for x in np.meshgrid([5e4, 8e4, 1.6e5], [6e4, 1.2e5, 2.4e5]))  # close together and noisy
    y = np.array([5.5, 5.1, 5.0, 4.4, 4.2, 4.3, 3.9, 3.4, 3.3])
    found = run(write_csv(tmp_path / "few.csv", n, d, y), stands_out="null")
    assert len(found["doubts"]) == 2 and "do not tell E" in found["doubts"][0]
    assert run(write_csv(tmp_path / "many.csv", *grid_of(EPOCH, 0)))["doubts"] == []


def test_losses_that_do_not_fall_are_no_law(few_starts, tmp_path):
    n, d, _ = grid_of(EPOCH, 0)
    for y in (np.full(len(n), 3.0), 2 + 0.1 * np.log(n * d)):
        with pytest.raises(UserError, match=r"the losses do not fall with size and tokens .* so they tell no law"):
            run(write_csv(tmp_path / "flat.csv", n, d, y), stands_out="null")


def test_the_command_writes_a_law_that_plan_size_reads(few_starts, tmp_path, capsys):
    path = write_csv(tmp_path / "runs.csv", *grid_of(EPOCH, 3))
    law, page, picture = tmp_path / "law.json", tmp_path / "fit.html", tmp_path / "fit.png"
    assert main(["plan", "fit", path, "--bootstraps=100", f"--law_file={law}", f"--page={page}", f"--picture={picture}",
                 "--target.flops=5.76e23", "--json=-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["law"]["alpha"] == read_law(law).alpha and "prediction for" in err
    assert max(map(len, err.split("\nlaw: ")[0].splitlines())) <= 110
    assert page.read_text().count("<svg") == 5 and picture.stat().st_size > 10_000
    assert main(["plan", "size", "--flops=5.76e23", f"--law_file={law}", "--json=-"]) == 0
    size = json.loads(capsys.readouterr()[0])
    assert size["plan"]["parameters"] == pytest.approx(json.loads(out)["prediction"]["parameters"])


def make_ladder(folder, sizes=(1e6, 2e6, 4e6), tokens=(2e7, 4e7, 8e7), *, evals=3):
    law = parametric.Parametric("toy", "", E=1.5, A=60.0, B=400.0, alpha=0.3, beta=0.35)
    for n in sizes:
        for d in tokens:
            run = make_run(folder / f"n{n:.0e}-d{d:.0e}", 60, batch=8, evals=evals)
            lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
            for x in lines:
                x["tokens"] = x["step"] * d / 60
                loss = float(law.loss(n, x["tokens"]))
                x |= {key: loss for key in ("loss", "eval_loss") if key in x}
            write_lines(run / "metrics.jsonl", lines)
            (run / "config.yaml").write_text(f"train: {{steps: 60}}\nparameters: {n:.0f}\n")
    return law


def test_run_folders_and_those_that_cannot_count(few_starts, tmp_path):
    law = make_ladder(tmp_path)
    broken = {"stopped": lambda lines: lines[:40], "nan": lambda lines: [*lines[:-1], lines[-1] | {"loss": float("nan")}],
              "rose": lambda lines: [x | ({"loss": 9.0} if x["step"] > 50 and "loss" in x else {}) for x in lines]}
    for name, change in broken.items():
        make_run(tmp_path / name)
        lines = [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        write_lines(tmp_path / name / "metrics.jsonl", change([x for x in lines if "loss" in x]))
    make_run(tmp_path / "mute")
    (tmp_path / "mute" / "config.yaml").write_text("train: {steps: 60}\n")
    found = run(str(tmp_path))
    why = {name.rsplit("/", 1)[-1]: reason for name, reason in found["excluded"]}
    assert why.keys() == {"stopped", "nan", "rose", "mute"} and found["runs"] == 9 and found["loss"] == "held-out loss"
    assert why["stopped"].startswith("not finished: step ") and why["nan"] == "diverged: the loss is nan at step 60"
    assert why["rose"].startswith("diverged: the loss ended at 9") and why["mute"] == "config.yaml does not say its parameters"
    assert found["prediction"]["loss"] == pytest.approx(law.loss(*(found["prediction"][k] for k in ("parameters", "tokens"))), rel=0.01)


def test_a_run_with_few_noisy_lines_did_not_diverge_and_one_that_rose_through_them_did(tmp_path):
    make_run(tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [x for x in lines if "loss" in x]
    (tmp_path / "run" / "config.yaml").write_text("train: {steps: 60}\nparameters: 1000000\n")
    why = {}
    for rise in (1.0, 2.0):
        for seed in range(20):
            noise = np.exp(0.06 * np.random.default_rng(seed).normal(size=len(lines)))  # as lines of 1,000 tokens have
            change = [x | {"loss": float(5 * x["step"] ** -0.1 * e * (rise if x["step"] > 50 else 1))}
                      for x, e in zip(lines, noise, strict=True)]
            write_lines(tmp_path / "run" / "metrics.jsonl", change)
            why[rise, seed] = points.unusable(read_run(tmp_path / "run"))
    assert all(why[1.0, seed] is None for seed in range(20))
    assert all(why[2.0, seed].startswith("diverged: the loss ended at") for seed in range(20))


def test_training_loss_is_taken_where_no_run_has_a_held_out_one(few_starts, tmp_path):
    make_ladder(tmp_path, evals=0)
    assert run(str(tmp_path))["loss"].startswith("training loss")
    with pytest.raises(UserError, match=r"has no held-out loss \(train\.eval_every\); use --loss=train"):
        run(str(tmp_path), loss="eval")


def test_too_few_runs_are_told_how_many_and_which(few_starts, tmp_path):
    make_ladder(tmp_path, sizes=(1e6, 2e6), tokens=(2e7, 4e7))
    with pytest.raises(UserError) as e:
        run(str(tmp_path))
    assert "too few runs to fit: 4 of 2 sizes and 2 amounts of tokens; needed are 8 runs of 3 sizes and 3 amounts" in str(e.value)
    assert "add for instance (parameters x tokens): " in str(e.value) and "4.00 M x " in str(e.value)
    few = frontier_reasons(tmp_path)
    assert "approach 1" not in few


def frontier_reasons(tmp_path):
    """Returns why the approaches through best sizes say nothing of a ladder that is enough for approach 3 alone."""
    make_ladder(tmp_path / "more")
    found = run(str(tmp_path / "more"))
    assert found["why_not"]["approach_2"].startswith("needs 3 budgets") and "approach_3" in found["exponent"]
    return found["why_not"]


@pytest.mark.parametrize(("table", "said"), [
    ("", "holds no row"), ("a,b\n1,2\n", "has no column 'parameters' \\(or 'N'\\); found: a, b"),
    ("N,loss\n1,2\n", "has no column 'tokens' \\(or 'D'\\), nor 'flops'"),
    ("N,D,loss\n1e6,many,3\n", "line 2: D='many': should be a number"), ("N,D,loss\n-1,5,3\n", "line 2: N=-1: should be above 0"),
    ("N,D,loss\n1e6,1e7,3\n", "too few runs to fit: 1 of 1 sizes"),
    ("N,D,loss\n1e6,1e7,3,05\n", "line 2: has 1 cells more than the line of names; a decimal comma?"),
    ("N,D,loss\n1e6,1e7\n", "1 left out: line 2: no loss is given"),
])
def test_bad_tables_in_one_line(tmp_path, table, said):
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(UserError, match=said):
        run(str(tmp_path / "t.csv"))


def test_bad_settings_in_one_line(tmp_path):
    for words, said in ((["target.tokens=1e9"], "needs target.parameters"), (["bootstraps=3"], "at least 100"),
                        (["target.flops=1e20", "target.parameters=1e9"], "give it alone"), (["level=1.5"], "below 1")):
        with pytest.raises(UserError, match=said):
            config.load(FitVerb, None, words)
    with pytest.raises(UserError, match="holds no run folder"):
        run(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        run(str(tmp_path / "nowhere"))


# ---------------------------------------------------------------- experts

SPARSE = MoELaw(E=1.8, A=480.0, B=2000.0, alpha=0.35, beta=0.36, delta=-0.08, omega=-0.02, gamma=0.004, zeta=0.003)


def sparse_grid(noise=0.0):
    n, d, x = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 5e9, 5), np.geomspace(2e9, 2e11, 4), [1, 2, 8, 32]))
    return n, d, x, SPARSE.loss(n, d, x) * np.exp(noise * np.random.default_rng(0).standard_normal(len(n)))


def test_the_law_of_experts_is_found_again_and_is_the_dense_one_without_experts():
    n, d, x, y = sparse_grid()
    found = moe_fit.fit(n, d, x, y, bootstraps=10)
    for name in NAMES:
        assert getattr(found.law, name) == pytest.approx(getattr(SPARSE, name), rel=1e-4)
    noisy_fit = moe_fit.fit(*sparse_grid(0.003), bootstraps=30)
    low, high = np.quantile(noisy_fit.losses(2e10, 1e12, 32), [0.01, 0.99])
    assert low < SPARSE.loss(2e10, 1e12, 32) < high < 1.02 * low
    dense = parametric.Parametric("", "", *(getattr(SPARSE, name) for name in NAMES[:5]))
    assert SPARSE.loss(1e9, 2e10, 1) == pytest.approx(dense.loss(1e9, 2e10)) == pytest.approx(SPARSE.at(1).loss(1e9, 2e10))
    assert SPARSE.at(8).loss(1e9, 2e10) == pytest.approx(SPARSE.loss(1e9, 2e10, 8))
    assert dense.loss(SPARSE.dense_equal(1e9, 2e10, 8), 2e10) == pytest.approx(SPARSE.loss(1e9, 2e10, 8))
    assert SPARSE.dense_equal(1e9, 2e10, 8) > 1e9


def test_the_command_fits_experts_where_the_runs_have_some(tmp_path, capsys):
    n, d, x, y = sparse_grid(0.003)
    with (tmp_path / "moe.csv").open("w", newline="") as f:
        csv.writer(f).writerows([("active_parameters", "D", "experts", "loss"), *zip(n, d, x, y, strict=True)])
    table = tmp_path / "moe.csv"
    assert main(["plan", "fit", str(table), "--bootstraps=100", "--target.parameters=2e10", "--target.tokens=1e12", "--json=-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["prediction"]["loss"] == pytest.approx(SPARSE.loss(2e10, 1e12, 32), rel=0.01)
    assert "a dense model is as good from" in err and max(map(len, err.splitlines())) <= 110
    assert main(["plan", "fit", str(table), "--law_file=x.json"]) == 2
    table.write_text("\n".join(table.read_text().splitlines()[:9]))
    assert main(["plan", "fit", str(table)]) == 2
    assert "needed are 14 runs of 3 numbers of experts" in capsys.readouterr().err


def test_experts_of_a_run_folder_count_by_what_a_token_meets(tmp_path):
    run = make_run(tmp_path / "sparse")
    (run / "config.yaml").write_text("train: {steps: 60}\nparameters: 1000000\n"
                                     "model: {d_model: 64, n_layers: 2, d_ff: 128, moe: {experts: 8, top_k: 2}}\n")
    (one,) = points.read((str(run),)).runs
    assert one.experts == 8 and one.parameters == 1000000 - 2 * 6 * 3 * 64 * 128
