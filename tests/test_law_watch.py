"""A run that is watched by a law: healthy ones are left alone, damaged ones are told, and nothing changes without a law."""

import dataclasses
import json

import numpy as np
import pytest
import runs
from test_report import make_run, page_of, write_lines

from jaxllm.errors import UserError
from jaxllm.plan import points, usual
from jaxllm.plan.laws import Parametric
from jaxllm.report.law import Watch, WatchedLaw, read_law, what_to_look_at
from jaxllm.report.read import read_run, read_runs

SHARES = tuple(np.linspace(0.1, 1, 19))
COSINE = {"schedule": "cosine", "final": 0.1, "decay_share": 0.2}
LAW = WatchedLaw(E=1.2, A=8.0, B=60.0, alpha=0.3, beta=0.4, residual=0.004, tokens=(2e5, 4e6), share=SHARES,
                 usual=tuple(0.12 * (1 - s) for s in SHARES), schedule=COSINE)
N, D, LINES = 1e6, 4e6, 400


def watched(change=lambda share: 0.0, *, law=LAW, schedule=COSINE, noise=0.02, seed=0, lines=LINES):
    """Returns the events of a run whose excess over the law is what healthy ones have, plus `change` of the share done."""
    watch, events = Watch(law, parameters=N, tokens=D, lines=lines, schedule=schedule), []
    rng = np.random.default_rng(seed)
    for i in range(1, lines + 1):
        share = i / lines
        excess = 0.1 * (1 - share) + change(share)
        loss = law.loss(N, share * D) * (1 + excess) * np.exp(noise * rng.standard_normal())
        line = {"tokens": share * D, "loss": loss} | watch.line(share * D, loss)
        if event := watch.event(line):
            events.append((share, *event))
    return events


@pytest.mark.parametrize("law", [LAW, dataclasses.replace(LAW, share=(), usual=(), schedule=None)], ids=["curves", "growth"])
def test_healthy_runs_are_left_alone_and_damaged_ones_are_told_soon(law):
    for seed in range(40):
        assert watched(seed=seed, law=law) == []
    for seed in range(10):
        events = watched(lambda share: 0.15 * (share > 0.5), law=law, seed=seed)
        assert [kind for _, kind, _ in events] == ["falls_behind"]
        assert 0.55 <= events[0][0] < 0.7, "a whole window of lines, and not much later"
        slow = watched(lambda share: max(0.0, share - 0.3) * 0.4, law=law, seed=seed)
        assert slow and slow[0][1] == "falls_behind" and slow[0][0] < 0.8


def test_a_spike_is_no_falling_behind_and_a_run_may_catch_up():
    assert watched(lambda share: 0.8 * (abs(share - 0.5) < 0.005)) == []
    events = watched(lambda share: 0.2 * (0.4 < share < 0.6))
    assert [kind for _, kind, _ in events] == ["falls_behind", "caught_up"] and events[1][0] < 0.75


def test_another_schedule_is_judged_by_growth_alone():
    """A constant rate ends far above the cosine's curves: that is the schedule's doing, not damage."""
    constant = {**COSINE, "schedule": "constant"}
    high = lambda share: 0.1 * share  # noqa: E731
    assert watched(high)[0][1] == "falls_behind" and watched(high, schedule=constant) == []


def test_the_warm_up_and_what_the_law_is_not_of_are_not_judged():
    watch = Watch(LAW, parameters=N, tokens=D, lines=LINES, schedule=COSINE)
    assert watch.line(0.09 * D, 9.0) == {} and watch.line(0.5 * D, float("nan")) == {}
    assert set(watch.line(0.11 * D, 9.0)) == {"law_loss"}
    late = Watch(dataclasses.replace(LAW, tokens=(2e6, 4e6)), parameters=N, tokens=D, lines=LINES, schedule=COSINE)
    assert late.line(0.2 * D, 9.0) == {} and "its runs had 2e+06 to 4e+06 tokens" in \
        Watch(LAW, parameters=N, tokens=1e9, lines=9, schedule=COSINE).describe().replace("2e+05", "2e+06")


def test_the_end_is_judged_against_what_the_law_is_of():
    watch = Watch(LAW, parameters=N, tokens=D, lines=LINES, schedule=COSINE)
    law_loss, off, behind = watch.end(LAW.loss(N, D) * 1.015)
    assert law_loss == LAW.loss(N, D) and off == pytest.approx(0.015) and not behind
    assert watch.end(LAW.loss(N, D) * 1.03)[2] and not watch.end(LAW.loss(N, D) * 0.9)[2]
    rough = Watch(dataclasses.replace(LAW, residual=0.02), parameters=N, tokens=D, lines=LINES, schedule=COSINE)
    assert not rough.end(LAW.loss(N, D) * 1.05)[2], "three residuals of a law that fits badly"


def test_what_to_look_at_tells_of_the_runs_own_lines():
    lines = [{"loss": 3 - i / 100 + (2 if i in (40, 60) else 0), "grad_norm": 1.0 if i < 90 else 5.0, "lr": 1e-3} for i in range(100)]
    said = what_to_look_at(lines)
    assert "learning rate (0.001 now)" in said and "5 times its median" in said and "loss spikes (2 so far)" in said
    assert "duplicates" in said and "batch size" in said and "precision" in said and what_to_look_at([]) == ""


def law_file(path, *, tokens, **change):
    held = {"E": 1.0, "A": 5.0, "B": 20.0, "alpha": 0.3, "beta": 0.3, "residual_rms": 0.01, "range": {"tokens": tokens}}
    path.write_text(json.dumps(held | change))
    return path


@pytest.mark.parametrize(("text", "said"), [
    (None, "cannot be read: No such file"), ("[]", "should be what"), ("{}", "should be what"), ("no", "should be what"),
    ('{"E": 1, "A": -5, "B": 20, "alpha": 0.3, "beta": 0.3}', "should be above 0"),
    ('{"E": 1, "A": 5, "B": 20, "alpha": 0.3, "beta": 0.3, "range": {"tokens": "x"}}', "should be what"),
])
def test_a_law_file_that_is_none_in_one_line(tmp_path, text, said):
    if text is not None:
        (tmp_path / "law.json").write_text(text)
    with pytest.raises(UserError, match=said) as e:
        read_law(tmp_path / "law.json")
    assert str(e.value).startswith("log.law=") and "\n" not in str(e.value)


def test_the_usual_excess_is_that_of_the_longer_runs_of_one_schedule(tmp_path):
    law = Parametric("toy", "", E=1.5, A=60.0, B=400.0, alpha=0.3, beta=0.35)
    folders = []
    for n, d in ((1e6, 2e7), (2e6, 2e7), (1e6, 8e7), (2e6, 8e7)):
        run = make_run(tmp_path / f"n{n:.0e}-d{d:.0e}", 400, evals=1)
        lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
        for x in lines:
            share = x["step"] / 400
            x["tokens"] = share * d
            high = 0.2 * (1 - share) if d > 5e7 else 0.9
            x |= {key: float(law.loss(n, share * d)) * (1 + high * ("eval_loss" not in x)) for key in ("loss", "eval_loss") if key in x}
        write_lines(run / "metrics.jsonl", lines)
        (run / "config.yaml").write_text(f"train: {{steps: 400}}\nparameters: {n:.0f}\noptim: {{schedule: cosine, final: 0.1, decay_share: 0.2}}\n")
        folders.append(run)
    found = usual.usual(points.of_runs(read_runs(folders)), law)
    assert found["schedule"] == COSINE
    assert np.allclose(np.interp([0.2, 0.5, 0.8], found["share"], found["usual"]), [0.16, 0.1, 0.04], atol=0.012)
    (folders[0] / "config.yaml").write_text("train: {steps: 400}\nparameters: 1000000\noptim: {schedule: wsd}\n")
    assert usual.usual(points.of_runs(read_runs(folders)), law) is None


# ---------------------------------------------------------------- real runs


def train(folder, *flags):
    folder.mkdir(exist_ok=True)
    cfg = runs.config(folder, train={"steps": 60, "eval_every": 60}, log={"every": 1, "tensorboard": False}, checkpoint={"every": 20},
                      optim={"lr": 0.01, "schedule": "cosine", "warmup": 6})
    from jaxllm.cli import main

    assert main(["pretrain", str(cfg), *flags]) == 0
    return folder / "run"


@pytest.mark.slow
def test_a_real_run_that_is_damaged_is_told_and_a_healthy_one_is_not(tmp_path, capsys):
    plain = train(tmp_path / "plain")
    numbers = runs.lines(plain / "metrics.jsonl")
    assert not any(key.startswith("law") for line in numbers for key in line)
    end = next(x["eval_loss"] for x in reversed(numbers) if "eval_loss" in x)
    # a law that has the healthy run end 1 % above it
    law = law_file(tmp_path / "law.json", tokens=[1000, 20000], E=end / 1.01 - 1.0, A=1e-9, B=(60 * 256) ** 0.3, beta=0.3)
    healthy = train(tmp_path / "healthy", f"--log.law={law}")
    seen = runs.lines(healthy / "metrics.jsonl")
    keys = runs.NUMBERS
    assert [{k: x[k] for k in keys if k in x} for x in seen] == [{k: x[k] for k in keys if k in x} for x in numbers]
    assert [x["kind"] for x in runs.lines(healthy / "incidents.jsonl")] == ["as_the_law_says"]
    err = capsys.readouterr()[1]
    assert "law: a loss of " in err and "judged by how its excess grows (no curves of the law's runs)" in err
    assert "+1.0% from the law's" in err and "  law " in err
    text = page_of(healthy)
    assert "ended +1.0% from its law" in text and "what the law says of a run that ends there" in text and "Above the law" in text
    assert "what the law says" not in page_of(plain)
    # the same run, its learning rate raised a hundredfold at a checkpoint
    damaged = train(tmp_path / "damaged", f"--log.law={law}", "--train.steps=20")
    assert train(tmp_path / "damaged", f"--log.law={law}", "--optim.lr=1.0") == damaged
    kinds = [x["kind"] for x in runs.lines(damaged / "incidents.jsonl")]
    assert "falls_behind" in kinds and kinds[-1] == "ended_behind"
    said = next(x["message"] for x in runs.lines(damaged / "incidents.jsonl") if x["kind"] == "falls_behind")
    assert "look at: learning rate (" in said and "gradient norm" in said
    assert 'class="alarm">ended' in page_of(damaged)


@pytest.mark.slow
def test_what_was_seen_before_a_stop_counts_after_it(tmp_path):
    """Stopped and resumed, the same lines are logged as in one go."""
    law = law_file(tmp_path / "law.json", tokens=[1000, 20000])
    whole = train(tmp_path / "whole", f"--log.law={law}")
    (tmp_path / "parts").mkdir()
    process = runs.start("pretrain", tmp_path / "whole" / "config.yaml", f"--run.dir={tmp_path}/parts/run", f"--log.law={law}")
    runs.wait_for(lambda: (tmp_path / "parts/run/checkpoints/20").exists(), timeout=120)
    runs.kill(process, 0.0)
    code, text = runs.finish(runs.start("pretrain", tmp_path / "whole" / "config.yaml", f"--run.dir={tmp_path}/parts/run",
                                        f"--log.law={law}"))
    assert code == 0, text
    keys = ("law_loss", "law_excess", "law_limit")
    one, two = ([[x.get(k) for k in keys] for x in runs.lines(run / "metrics.jsonl") if "law_loss" in x]
                for run in (whole, tmp_path / "parts/run"))
    assert len(one) == len(two) and np.allclose(np.array(one, float), np.array(two, float), atol=2e-3, equal_nan=True)
    assert read_run(whole).series("law_loss").value[-1] == pytest.approx(read_law(law).loss(*size(whole)), abs=1e-5)


def size(folder):
    run = read_run(folder)
    return run.config["parameters"], run.series("loss").tokens[-1]
