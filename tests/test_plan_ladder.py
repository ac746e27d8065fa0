"""`jaxllm plan ladder`: the largest run never takes part in its own prediction, and a ladder goes on wherever it was stopped."""

import json
import re

import numpy as np
import pytest
import runs
import yaml

from jaxllm import config
from jaxllm.cli import main
from jaxllm.errors import RunError, Stopped, UserError
from jaxllm.plan import ladder, parametric
from jaxllm.plan.ladder_config import LadderVerb
from jaxllm.plan.ladder_runs import Rung, model_of, short, state
from jaxllm.plan.ladder_time import Clock
from jaxllm.train import pretrain, run_folder

LAW = parametric.Parametric("made", "", E=1.2, A=8.0, B=60.0, alpha=0.3, beta=0.4)
SIZES = {f"w{w}": {"d_model": w, "d_ff": 2 * w} for w in (8, 16, 32, 64)}


def settings(folder, **keys):
    tree = {
        "dir": str(folder / "ladder"), "sizes": SIZES, "tokens": [1024, 2048, 4096, 8192], "bootstraps": 100,
        "model": {"n_layers": 1, "n_heads": 2, "max_seq_len": 32}, "mesh": {"data": 1},
        "data": {"sources": {"words": {"path": str(runs.corpus(folder))}}, "seq_len": 32, "validation": 0.1, "workers": 1,
                 "cache": str(folder / "cache")},
        "train": {"batch_size": 8}, "optim": {"lr": 0.01}, "log": {"every": 1},
    }
    for name, value in keys.items():
        tree[name] = tree[name] | value if name in ("data", "train", "optim", "model") else value
    path = folder / "ladder.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture
def made(monkeypatch):
    """Stands in for training: runs whose losses are LAW's; returns the names of those it made, and what is to go wrong."""
    few = parametric.grid()[::50]
    monkeypatch.setattr(parametric, "grid", lambda: few)
    monkeypatch.setattr("jaxllm.plan.ladder_time.machine_flops", lambda precision: 1e11)
    done, wrong = [], {}

    def train(cfg):
        rung = Rung("", cfg)
        rung.folder.mkdir(parents=True, exist_ok=True)
        run_folder.begin(cfg, config.to_dict(cfg))
        done.append(rung.name)
        steps, a_step = cfg.train.steps, rung.tokens // cfg.train.steps
        what = wrong.get(rung.name)
        if what == "stopped":
            raise Stopped("stopped after step 1, saved; run the same command to go on")
        lines = []
        for step in range(1, steps + 1):
            loss = float(LAW.loss(rung.parameters, step * a_step)) * (what if isinstance(what, float) else 1)
            lines.append({"step": step, "tokens": step * a_step, "loss": loss, "tokens_per_s": 5000.0})
        if what == "diverged":
            (rung.folder / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
            (rung.folder / "incidents.jsonl").write_text(json.dumps({"step": 2, "kind": "not_finite", "message": "nan"}) + "\n")
            raise RunError("step 2: the loss is nan")
        lines.append(lines[-1] | {"eval_loss": loss})
        (rung.folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        (rung.folder / "checkpoints" / str(steps)).mkdir(parents=True)

    monkeypatch.setattr(pretrain, "main", train)
    return done, wrong


def run(path, *flags):
    return ladder.main(config.load(LadderVerb, str(path), list(flags)))


def test_the_largest_run_is_foretold_by_the_others_alone(made, tmp_path, capsys):
    """Its loss is planted 30 % off the law: a fit that had seen it would not be as far off."""
    done, wrong = made
    wrong["w64-8192"] = 1.3
    found = run(settings(tmp_path))
    assert len(done) == 16 and done[-1] == "w64-8192" and done[:4] == ["w8-1024", "w16-1024", "w32-1024", "w64-1024"]
    assert found["runs"] == 15 and found["excluded"] == []
    assert found["largest"]["predicted"] == pytest.approx(found["largest"]["loss"] / 1.3, rel=1e-3)
    assert not found["largest"]["within"] and found["largest"]["off"] == pytest.approx(1 / 1.3 - 1, abs=1e-3)
    assert found["farther"]["runs"] == 9 and found["farther"]["loss"] == pytest.approx(found["largest"]["predicted"], rel=0.01)
    text = capsys.readouterr()[0]
    assert found["alarms"] == {"w64-8192": 18} and "would have said to fall behind: w64-8192 at step 18" in text
    again = run(settings(tmp_path))  # with the largest run there, finished
    assert again["runs"] == 15 and again["largest"]["predicted"] == found["largest"]["predicted"] and len(done) == 16
    assert again["excluded"] == []  # nor was it there and thrown out for standing out
    assert again["farther"]["loss"] == found["farther"]["loss"]
    law = json.loads((tmp_path / "ladder" / "law.json").read_text())
    assert law["runs"] == 15 and law["alpha"] == pytest.approx(LAW.alpha, rel=0.05)
    assert "NOT within 2.0%" in text and max(text.partition("\n\npage: ")[0].splitlines(), key=len)[110:] == ""
    saved = yaml.safe_load((tmp_path / "ladder" / "runs" / "w64-8192" / "config.yaml").read_text())
    assert saved["log"]["law"] == str(tmp_path / "ladder" / "law.json")  # the largest is watched by the law of the others
    assert saved["optim"]["warmup"] == 3 and saved["train"]["steps"] == 32


def test_what_it_writes_is_read_by_plan_fit_and_drawn(made, tmp_path, capsys):
    found = run(settings(tmp_path))
    assert found["largest"]["within"] and found["largest"]["off"] == pytest.approx(0, abs=1e-3) and found["largest"]["in_interval"]
    page = (tmp_path / "ladder" / "ladder.html").read_text()
    assert page.count("<svg") >= 3 and "The ladder" in page and "measured" in page
    told = json.loads((tmp_path / "ladder" / "ladder.json").read_text())
    assert len(told["ladder"]) == 16 and all(one["loss"] for one in told["ladder"])
    assert main(["plan", "ladder", str(settings(tmp_path)), f"--picture={tmp_path / 'ladder.svg'}"]) == 0
    assert "<svg" in (tmp_path / "ladder.svg").read_text()
    capsys.readouterr()
    assert main(["plan", "fit", str(tmp_path / "ladder" / "runs"), "--bootstraps=100", "--json=-"]) == 0
    assert json.loads(capsys.readouterr()[0])["runs"] == 16


def test_it_goes_on_where_it_was_and_repeats_nothing(made, tmp_path):
    done, wrong = made
    path = settings(tmp_path)
    wrong["w32-2048"] = "stopped"
    with pytest.raises(Stopped):
        run(path)
    before = list(done)
    assert before[-1] == "w32-2048" and not (tmp_path / "ladder" / "law.json").exists()
    wrong.clear()
    run(path)
    assert done[len(before)] == "w32-2048" and len(done) == 17 and sorted(set(done)) == sorted(done[: len(before) - 1] + done[len(before):])
    run(path)
    assert len(done) == 17


def test_a_run_that_diverged_is_left_out_by_name_and_tried_again_with_other_settings(made, tmp_path, capsys):
    done, wrong = made
    wrong["w16-4096"] = "diverged"
    found = run(settings(tmp_path))
    assert [name for name, _ in found["excluded"]] == ["w16-4096"] and found["runs"] == 14
    out, err = capsys.readouterr()
    assert "w16-4096: diverged" in " ".join(out.split()) and "ladder: w16-4096 diverged and is left out" in err
    run(settings(tmp_path))
    assert done.count("w16-4096") == 1  # with the same settings it would diverge again
    wrong.clear()
    sizes = SIZES | {"w16": SIZES["w16"] | {"lr": 0.001}}
    with pytest.raises(UserError, match=r"w16-1024 holds a run with other settings \(optim\.lr: 0\.01 -> 0\.001\): set them back"):
        run(settings(tmp_path, sizes=sizes))
    assert state(rung_of(tmp_path, sizes, "w16-4096")) == "new"


def rung_of(tmp_path, sizes, name):
    cfg = config.load(LadderVerb, str(settings(tmp_path, sizes=sizes)))
    return next(r for r in ladder.rungs(cfg, "bytes", 272) if r.name == name)


def test_a_largest_run_that_diverged_is_an_error_that_keeps_what_was_found(made, tmp_path):
    made[1]["w64-8192"] = "diverged"
    with pytest.raises(RunError, match="w64-8192: diverged") as e:
        run(settings(tmp_path))
    assert e.value.result["runs"] == 15 and "diverged" in e.value.result["largest"]
    assert (tmp_path / "ladder" / "ladder.html").exists()


def test_text_that_changed_and_text_that_is_short(made, tmp_path, capsys):
    run(settings(tmp_path))
    assert "! 8,192 tokens repeat the text" not in capsys.readouterr()[1]
    (tmp_path / "more").mkdir()
    other = runs.corpus(tmp_path / "more", documents=20, seed=1)
    with pytest.raises(UserError, match=r"other settings \(data.sources.words.path"):
        run(settings(tmp_path), f"data.sources.words.path={other}")
    path = settings(tmp_path)
    (tmp_path / "corpus.jsonl").write_bytes(other.read_bytes())
    with pytest.raises(UserError, match="its runs are of another text or tokenizer"):
        run(path)
    run(settings(tmp_path), f"data.sources.words.path={other}", f"dir={tmp_path / 'short'}", "tokens=[1024,2048,4096,65536]")
    said = capsys.readouterr()[1]
    assert re.search(r"! 65,536 tokens repeat the text \d+\.\d times: beyond 4 epochs", said)
    assert re.search(r"! \d+ held-out tokens|! [\d,]+ held-out tokens leave the loss uncertain", said)


@pytest.mark.parametrize(("flags", "said"), [
    (["tokens=[1024,2048]"], "4 sizes and 2 token counts: needed are 3 sizes and 3 token counts at least"),
    (["tokens=[2048,1024,4096]"], "in ascending order"), (["tokens=[1024,1030,1100,1200]"], "as many steps"),
    (["train.steps=10"], "the ladder's `tokens` say"), (["optim.warmup=5"], "give `warmup`, a share"),
    (["train.eval_every=0"], "the law is fitted to held-out losses"), (["sizes.w8.lr=-1"], "should be above 0"),
    (["sizes.w8.parameters=1e6"], "each size should have one of them"), (["sizes.w8.n_heads=3"], "sizes.w8: model.d_model=8 is not"),
    (["sizes.w8.d_model=16", "sizes.w8.d_ff=32"], "have as many parameters"), (["token=[1]"], "did you mean 'tokens'"),
    (["sizes.w8.d_modle=16"], "did you mean 'sizes.NAME.d_model'|d_model"), (["vocab_size=300", "data.tokenizer=x.model"], "give one of them"),
    (["data.validation=0.000001"], "no document was held out"), (["dir=/proc/ladder"], "cannot be written"),
    (["data.sources.words.path=nowhere.txt"], "nowhere.txt"), (["within=0"], "within=0.0: should be above 0"),
    (["picture=ladder.gif"], "picture=ladder.gif: should end in .svg"),
])
def test_bad_settings_in_one_line(made, tmp_path, capsys, flags, said):
    assert main(["plan", "ladder", str(settings(tmp_path)), *(f"--{flag}" for flag in flags)]) == 2
    err = capsys.readouterr()[1].strip().splitlines()[-1]
    assert err.startswith("jaxllm: ") and re.search(said, err), err


def test_shapes_of_a_number_of_parameters_and_rates_by_width(tmp_path):
    cfg = config.load(LadderVerb, str(settings(tmp_path, sizes=SIZES | {"m": {"parameters": 1e6}}, lr_width=32, lr_power=0.5)))
    made_of = model_of(cfg, "m", cfg.sizes["m"], 272)
    assert made_of.d_model % 128 == 0 and made_of.max_seq_len == 32
    rates = {r.size: r.cfg.optim.lr for r in ladder.rungs(cfg, "bytes", 272)}
    assert rates["w8"] == pytest.approx(0.02) and rates["w32"] == pytest.approx(0.01) and rates["m"] < 0.01
    assert [short(n) for n in (250_000, 4_000_000, 1024, 3 * 10**9)] == ["250k", "4M", "1024", "3B"]


def test_time_left_follows_the_measured_speed(made, tmp_path):
    run(settings(tmp_path))
    cfg = config.load(LadderVerb, str(settings(tmp_path)))
    plan = ladder.rungs(cfg, "bytes", 272)
    clock = Clock(plan, 1e11)
    assert clock.seconds(plan[-1]) == pytest.approx(10 + plan[-1].flops / 4e10)
    clock.measure(plan[0], wall=plan[0].tokens / 5000 + 3)
    assert clock.seconds(plan[4]) == pytest.approx(plan[4].tokens / 5000 + 3)
    assert clock.seconds(plan[7]) == pytest.approx(plan[7].tokens / 5000 * plan[7].flops_a_token / plan[4].flops_a_token + 3)


@pytest.mark.slow
def test_a_ladder_killed_and_run_again_makes_each_run_once_and_ends(tmp_path):
    """Real runs: four sizes, one of which diverges at once; killed twice, in the third run and in a later one."""
    sizes = {f"w{w}": {"d_model": w, "d_ff": 2 * w} for w in (8, 12, 16)} | {"w4": {"d_model": 4, "d_ff": 8, "lr": 1e30}}
    path = settings(tmp_path, sizes=sizes, tokens=[2048, 4096, 8192], optim={"clip": 0.0})
    folder = tmp_path / "ladder" / "runs"
    stamps = {}
    for name in ("w12-2048", "w16-4096"):
        process = runs.start("plan", "ladder", path)
        runs.wait_for(lambda name=name: (folder / name / "metrics.jsonl").exists(), timeout=240)
        runs.kill(process, 0.0)
        for done in folder.iterdir():
            if (done / "report.html").exists():
                stamps.setdefault(done.name, (done / "metrics.jsonl").stat().st_mtime_ns)
    code, text = runs.finish(runs.start("plan", "ladder", path, f"--json={tmp_path}/out.json"), timeout=400)
    assert code == 0, text
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["runs"] == 8 and {name for name, _ in found["excluded"]} == {"w4-2048", "w4-4096", "w4-8192"}
    assert isinstance(found["largest"], dict) and found["largest"]["run"] == "w16-8192" and np.isfinite(found["largest"]["off"])
    assert "w8-2048" in stamps and all((folder / n / "metrics.jsonl").stat().st_mtime_ns == t for n, t in stamps.items())
    for name in ("w12-2048", "w16-4096"):
        steps = [x["step"] for x in runs.lines(folder / name / "metrics.jsonl") if "loss" in x]
        assert steps == sorted(set(steps)) and steps[-1] == (8 if name == "w12-2048" else 16)
