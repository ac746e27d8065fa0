"""The report page: whole, safe, honest about what it could not read, and small."""

import html
import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.report import page, plots
from jaxllm.report.config import ReportVerb
from jaxllm.report.page import write_page
from jaxllm.report.read import by_step, last_line, read_run
from jaxllm.report.summary import summary


def make_run(folder, steps=60, *, batch=8, lr=1e-3, evals=3, samples=(("Once", " upon a time"),), incidents=(), loss=None):
    """Writes a run folder of `steps` steps; `loss` gives the loss of a step."""
    folder.mkdir(parents=True)
    config = f"train: {{steps: {steps}, batch_size: {batch}}}\noptim: {{lr: {lr}}}\ncommit: abc+changes\nparameters: 1234\n"
    (folder / "config.yaml").write_text(f"run: {{dir: {folder}}}\n{config}")
    lines = []
    for step in range(1, steps + 1):
        now = {"step": step, "tokens": step * batch * 10, "time": 1e9 + step * 2.0}
        lines.append(now | {"loss": loss(step) if loss else 5 - step / steps, "grad_norm": 1.0 + step % 7, "lr": lr,
                            "step_s": 2.0, "tokens_per_s": 1000.0 + step, "model_tflops_per_s": 0.5, "host_gb": 1.5})
        if evals and step % (steps // evals) == 0:
            lines.append(now | {"eval_loss": 5.2 - step / steps, "eval_perplexity": 99.0,
                                "eval_bits_per_byte": 2 - step / steps})
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "samples.jsonl", [{"step": 10 * (i + 1), "prompt": p, "text": t} for i, (p, t) in enumerate(samples)])
    write_lines(folder / "incidents.jsonl", incidents)
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def page_of(*runs, output=None):
    return write_page(list(runs), output or runs[0] / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run, and the text of its page."""
    run = make_run(tmp_path_factory.mktemp("runs") / "plain")
    return run, page_of(run)


def curve(text, name):
    """Returns the points of the path of a curve, in the SVG's coordinates."""
    path = re.search(rf'data-curve="{name}"[^>]*><path d="([^"]*)"', text)
    return np.array([[float(v) for v in pair] for pair in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path[1])])


def test_page_loads_nothing_and_runs_nothing(plain):
    text = plain[1]
    assert not re.search(r"<(script|link|img|iframe|object|embed|base|use[^>]*href=\"[^#])", text)
    assert not re.search(r"(src|href)=(?![\"']?#)", text) and "@import" not in text
    assert "http:" not in text and "https:" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "default-src 'none'" in text


def test_ids_are_unique_and_every_reference_has_its_id(plain):
    ids = re.findall(r'\bid="([^"]*)"', plain[1])
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:url\(#|href=\"#)([^)\"]*)", plain[1])) == set(ids)


def test_text_from_the_run_is_escaped(tmp_path):
    evil = "<script>alert(1)</script> & \"quotes\" </div> \x00\ud800"
    incident = {"time": 1e9, "step": 5, "kind": evil, "message": evil}
    run = make_run(tmp_path / "<b>run", samples=[(evil, evil)], incidents=[incident])
    (run / "config.yaml").write_text(json.dumps({"data": {"tokenizer": "<script>x</script>"}, "commit": "<i>"}))
    text = page_of(run)
    assert "<script" not in text and "<b>run" not in text and "<i>," not in text and "\x00" not in text
    assert text.count(html.escape("<script>alert(1)</script> & \"quotes\" </div> ")) == 4  # prompt, text, kind, message
    assert "&lt;script&gt;x&lt;/script&gt;" in text


def test_every_curve_is_drawn(plain):
    titles = re.findall(r"<figcaption>([^<]*) <span>", plain[1])
    assert titles == ["Training loss", "Held-out loss", "Held-out bits per byte", "Learning rate", "Gradient norm",
                      "Throughput", "Model FLOP/s", "Peak memory"]
    assert plain[1].count('data-curve="raw-0-0"') == len(titles)


def test_curve_shows_the_numbers(plain):
    points = curve(plain[1], "raw-0-0")  # the first plot: training loss, a straight line of 60 points
    assert len(points) == 60
    slopes = np.diff(points[:, 1]) / np.diff(points[:, 0])
    assert np.allclose(slopes, slopes.mean(), rtol=0.02) and slopes.mean() > 0  # SVG's y grows downward


def test_several_runs_share_axes_and_show_what_differs(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=5e-4, loss=lambda step: 3.0)
    text = page_of(a, b, output=tmp_path / "both.html")
    upper, lower = curve(text, "raw-0-0"), curve(text, "raw-1-0")
    assert (upper[:, 1] < lower[:, 1]).all()  # run b's loss of 3 is below all of run a's
    assert np.allclose(upper[:, 0], lower[:, 0])
    differing = re.findall(r'<td class="key">([^<]*)</td>', text)
    assert differing == ["optim.lr"]
    assert '<td class=differs>0.001</td><td class=differs>0.0005</td>' in text


def test_runs_with_steps_of_other_size_are_compared_by_tokens(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", batch=16)
    text = page_of(a, b, output=tmp_path / "both.html")
    assert "tokens are on the axis" in text
    small, large = curve(text, "raw-0-0")[:, 0], curve(text, "raw-1-0")[:, 0]
    assert np.ptp(large) == pytest.approx(2 * np.ptp(small), rel=0.01)


def test_incidents_are_listed_and_marked_where_they_were(tmp_path):
    run = make_run(tmp_path / "run", incidents=[
        {"time": 1e9, "step": 30, "kind": "resumed", "message": "goes on from step 30"},
        {"time": 1e9, "step": 30, "kind": "not_finite", "message": "loss is NaN"}, "not an object", {"kind": "stopped"}])
    text = page_of(run)
    assert "goes on from step 30" in text and '<b class="alarm">not finite</b>' in text
    x = curve(text, "mark-2, 3")[0, 0]  # the two at step 30 share a line
    at_30 = curve(text, "raw-0-0")[29, 0]
    assert x == pytest.approx(at_30, abs=0.05)


@pytest.mark.parametrize(("n", "value"), [(100_000, "spikes"), (1_000, "spikes"), (500, "line")])
def test_thinning_keeps_ends_and_extremes(n, value):
    x, y = np.arange(n), np.sin(np.arange(n) / 50)
    if value == "spikes":
        y[n // 3], y[n // 2] = 50, -50
    thin_x, thin_y = plots.thin(x, y)
    assert len(thin_x) <= 2 * plots.BUCKETS + 2
    assert (thin_y.min(), thin_y.max()) == (y.min(), y.max())
    assert (thin_x[0], thin_x[-1]) == (0, n - 1) and (np.diff(thin_x) > 0).all()
    assert np.array_equal(y[thin_x.astype(int)], thin_y)  # each is a point of the curve, none made up


def test_thinning_breaks_the_line_where_values_are_missing():
    y = np.array([1.0, 2, np.nan, np.inf, 3, 4])
    assert np.array_equal(plots.thin(np.arange(6), y)[1], [1, 2, np.nan, 3, 4], equal_nan=True)


def test_smoothing_keeps_a_line_and_skips_what_is_not_finite():
    line = np.linspace(3, 1, 1000)
    assert np.allclose(plots.smoothed(line), line)  # a one-sided window would bend the ends
    line[500] = np.nan
    assert np.isfinite(plots.smoothed(line)).all()


def test_losses_that_are_not_finite_are_told(tmp_path):
    run = make_run(tmp_path / "run", loss=lambda step: float("nan") if step == 40 else 2.0)
    text = page_of(run)
    assert "1 logged losses are not finite" in text and 'data-curve="not-finite-0-0"' in text


def test_a_line_cut_short_is_passed_over_and_told(tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"step": 61, "tokens": 48')
    assert read_run(run).unread == 1
    assert "1 unreadable line in the logs" in page_of(run)
    assert last_line(run, "loss")["step"] == 60 and last_line(run, "eval_loss")["eval_loss"] == 4.2
    assert last_line(run, "no") == {}


def test_of_two_lines_of_one_step_the_later_counts(tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"step": 60, "tokens": 4800, "time": 1e9 + 500, "loss": 1.25}) + "\n")
    assert read_run(run).series("loss").value[-1] == 1.25 and len(read_run(run).series("loss").value) == 60
    assert len(read_run(run).series("eval_loss").value) == 3  # an evaluation's line of that step stays


@pytest.mark.parametrize(
    "broken", ["no evaluation", "one line", "nothing logged", "no samples", "no config", "bad config", "all NaN"])
def test_half_a_run_still_makes_a_page(tmp_path, broken):
    run = make_run(tmp_path / "run", steps=1 if broken == "one line" else 60, evals=0 if "evaluation" in broken else 1,
                   loss=(lambda step: float("nan")) if broken == "all NaN" else None)
    if broken == "nothing logged":
        (run / "metrics.jsonl").write_text("")
    if broken == "no samples":
        (run / "samples.jsonl").unlink()
    if broken == "no config":
        (run / "config.yaml").unlink()
    if broken == "bad config":
        (run / "config.yaml").write_text("a: [1,\n")
    text = page_of(run)
    assert ("Held-out loss" in text) == (broken not in ("no evaluation", "nothing logged"))
    assert ("Training loss" in text) == (broken not in ("nothing logged", "all NaN"))
    assert ("<h2>Samples</h2>" in text) == (broken != "no samples")
    assert ("<h2>Settings</h2>" in text) == (broken not in ("no config", "bad config"))
    assert ("nothing was logged yet" in text) == (broken == "nothing logged")


def test_samples_newest_first_and_open(tmp_path):
    run = make_run(tmp_path / "run", samples=[("p", f"text {i}") for i in range(100)] + [("p", "long " * 2000)])
    text = page_of(run)
    steps = [int(s) for s in re.findall(r"<summary>step (\d+)", text)]
    assert steps[0] == 1010 and steps == sorted(steps, reverse=True) and len(steps) <= page.MAX_SAMPLED_STEPS
    assert text.count("<details class=\"card\" open>") == 1 and "One of every 3 sampled steps" in text
    assert "6,000 more characters" in text


def test_summary_of_a_run(tmp_path):
    run = make_run(tmp_path / "run", incidents=[{"time": 1e9 + 61.5, "step": 30, "kind": "resumed", "message": ""}])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["time"] += 0 if line["step"] <= 30 else 5000  # stopped for 5000 s after step 30
    write_lines(run / "metrics.jsonl", lines)
    write_lines(run / "incidents.jsonl", [{"time": 1e9 + 5060, "step": 30, "kind": "resumed", "message": ""}])
    s = summary(read_run(run))
    assert (s["step"], s["steps"], s["tokens"]) == (60, 60, 4800)
    assert s["best_eval_loss"] == s["eval_loss"] == 4.2 and s["best_eval_loss_step"] == 60
    assert s["tokens_per_s"] == 1030.5 and s["host_gb"] == 1.5 and "device_gb" not in s and "mfu" not in s
    assert s["parameters"] == 1234
    assert s["wall_s"] == pytest.approx(60 * 2)  # without the pause


def test_errors_name_what_was_meant(tmp_path):
    run = make_run(tmp_path / "first-run")
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (tmp_path / "first-rum", f"first-rum: no such folder; did you mean {run}"),
        (tmp_path / "zzz", f"zzz: no such folder; runs there: {run}"),
        (tmp_path, "not a run folder .*runs in it: .*first-run"),
        (tmp_path / "empty", r"empty: not a run folder \(neither metrics.jsonl nor config.yaml\)$"),
        (run / "metrics.jsonl", f"is a file; give the run's folder: {run}"),
    ):
        with pytest.raises(UserError, match=message):
            page_of(folder, output=tmp_path / "x.html")
    with pytest.raises(UserError, match="given more than once"):
        page_of(run, tmp_path / "empty" / ".." / "first-run")
    with pytest.raises(UserError, match="the page cannot be written: "):
        page_of(run, output=run / "metrics.jsonl" / "x.html")


def test_runs_of_one_name_are_told_apart(tmp_path):
    a, b = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")
    assert "<title>2 runs: a/run, b/run</title>" in page_of(a, b, output=tmp_path / "both.html")


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    before = page_of(run)
    monkeypatch.setattr(page.pathlib.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        page_of(run)
    assert (run / "report.html").read_text() == before and not (run / "report.html.part").exists()


def test_verb_says_where_the_page_is(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    result = page.main(ReportVerb(runs=(str(run),)))
    assert result["page"] == str(run / "report.html") and result["runs"][0]["step"] == 60
    assert str(run / "report.html") in capsys.readouterr().out
    json.dumps(result)


def test_hundred_thousand_lines_stay_small_and_quick(tmp_path):
    run = make_run(tmp_path / "run", steps=100_000, loss=lambda step: 3 + np.sin(step * 7.0))
    began = time.process_time()
    text = page_of(run)
    assert len(text) < 500_000 and time.process_time() - began < 15


def test_report_needs_neither_jax_nor_the_trainer():
    code = ("import sys, jaxllm.report.page, jaxllm.report.plots\n"
            "print([m for m in sys.modules if m.split('.')[0] in ('jax', 'flax') or m.startswith('jaxllm.train')])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    code = "import sys, jaxllm.report.page; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_an_evaluation_of_a_step_does_not_hide_what_the_step_logged():
    lines = [{"step": 2, "score": 0.5}, {"step": 2, "eval_score": 0.7}, {"step": 1, "score": 0.1}, {"step": 1, "score": 0.4}]
    assert by_step(lines) == [{"step": 1, "score": 0.4}, {"step": 2, "score": 0.5}, {"step": 2, "eval_score": 0.7}]
