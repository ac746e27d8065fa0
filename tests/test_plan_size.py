"""`jaxllm plan size`: any two settings give the rest, what was given is spent, and what is impossible is said in one line."""

import itertools
import json
import re
import typing

import pytest

from jaxllm import config
from jaxllm.cli import VERBS, main
from jaxllm.errors import UserError
from jaxllm.plan import laws, size, size_config, size_page, size_text
from jaxllm.plan.curves import figure
from jaxllm.plan.size_config import SizeVerb
from jaxllm.train.flops import training_flops_per_token


def plan(*overrides):
    return size.plan(config.load(SizeVerb, None, overrides))


GIVEN = {"budget": ["flops=1e21"], "hours": ["chip_hours=5000"], "money": ["usd=5000"], "data": ["tokens=20e9"],
         "size": ["parameters=1e9"], "latency": ["latency_ms=5", "serving.chips=4"], "deadline": ["days=10"]}
PAIRS = list(itertools.combinations(GIVEN, 2))


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_any_two_give_the_rest(pair):
    found = plan(*GIVEN[pair[0]], *GIVEN[pair[1]])
    p, t = found["plan"], found["training"]
    assert p["true_parameters"] == pytest.approx(p["parameters"], rel=0.02)
    assert p["flops"] == pytest.approx(p["tokens"] * t["flops_a_token"])
    assert t["chip_hours"] == pytest.approx(p["flops"] / (197e12 * 0.4 * 3600)) and t["usd"] == pytest.approx(1.2 * t["chip_hours"])
    assert found["decoding"]["seconds"] > 0 and len(found["spread"]) == len(laws.LAWS)
    spent = {"budget": p["flops"] / 1e21, "hours": t["chip_hours"] / 5000, "money": t["usd"] / 5000}
    asked = [spent[name] for name in pair if name in spent]
    if asked:  # the budget that binds is spent to the last; no other is exceeded
        assert max(asked) == pytest.approx(1)
    if "size" in pair:
        assert p["parameters"] == 1e9
    if "data" in pair and not asked:
        assert p["tokens"] == 20e9
    if "latency" in pair:
        assert found["decoding"]["seconds"] <= 0.005 and found["latency_cap"] >= p["parameters"]
    if "deadline" in pair:
        assert t["days"] <= 10 + 1e-9 and t["chip_hours"] / ((t["chips"] - 1) * 24 or 1) > 10  # one chip fewer is too late


def test_a_latency_bounds_the_size_and_the_budget_goes_into_tokens():
    free, bound = plan("flops=1e23"), plan("flops=1e23", "latency_ms=5", "serving.chips=4")
    assert bound["plan"]["parameters"] == bound["latency_cap"] < free["plan"]["parameters"]
    assert bound["plan"]["tokens"] > free["plan"]["tokens"] and bound["plan"]["loss"] > free["plan"]["loss"]
    assert bound["decoding"]["seconds"] == pytest.approx(0.005, rel=0.03) and bound["decoding"]["seconds"] <= 0.005


def test_a_deadline_with_chips_is_a_budget():
    found = plan("days=30", "hardware.chips=256")
    assert found["plan"]["flops"] == pytest.approx(30 * 86400 * 256 * 197e12 * 0.4)
    assert found["training"]["days"] == pytest.approx(30) and found["training"]["slice"] == "v5e-256"
    assert found["training"]["failures"]["wall"] > 30 * 86400


def test_a_run_that_fails_faster_than_it_saves_is_never_done():
    hopeless = ["days=30", "hardware.chips=100000", "hardware.hours_between_failures=10"]
    cfg = config.load(SizeVerb, None, hopeless)
    found = size.plan(cfg)
    json.dumps(found, allow_nan=False)
    assert found["training"]["failures"]["wall"] is None and "with failures never done" in size_text.whole(cfg, found)


def test_the_law_decides_and_the_default_is_epoch_s():
    for key in laws.LAWS:
        n = plan("flops=5.76e23", f"law={key}")["plan"]["parameters"]
        assert n == pytest.approx(laws.LAWS[key].optimal(5.76e23)[0])
    assert plan("flops=5.76e23")["law"]["name"] == laws.EPOCH.name
    assert set(typing.get_args(size_config.SizeVerb.__annotations__["law"])) == set(laws.LAWS) == set(size_config.LAW_NAMES)


def test_the_spread_is_always_shown():
    for given in (["flops=5.76e23"], ["parameters=1e9"], ["tokens=1e10"], ["latency_ms=10"]):
        cfg = config.load(SizeVerb, None, given)
        text = size_text.whole(cfg, size.plan(cfg))
        assert "spread: " in text and all(law.name in text for law in laws.LAWS.values()) and "Kaplan et al. 2020" in text
    text = size_text.whole(cfg := config.load(SizeVerb, None, ["flops=5.76e23"]), size.plan(cfg))
    assert "spread: 32.2 B x 93 to 72.2 B x 18 tokens a parameter" in text


def test_text_fits_the_screen():
    given = ["parameters=7e9", "tokens=2e12", "serving.tokens=2e12", "days=30", "hardware.chip=H100 SXM"]
    cfg = config.load(SizeVerb, None, given)
    lines = size_text.whole(cfg, size.plan(cfg)).splitlines()
    assert max(map(len, lines)) <= size_text.COLUMNS


def test_few_tokens_are_repeated_and_more_of_them_is_the_move():
    found = plan("usd=50000", "tokens=20e9")
    assert found["plan"]["epochs"] > 4 and found["plan"]["effective_tokens"] < found["plan"]["tokens"]
    assert found["verdict"]["size"] == "right" and "different tokens" in found["verdict"]["moves"][0]["move"]
    plenty = plan("usd=50000")
    assert plenty["plan"]["parameters"] > found["plan"]["parameters"] and plenty["plan"]["loss"] < found["plan"]["loss"]


def test_says_whether_a_model_is_too_small_or_too_large_and_which_move_helps():
    gpt3 = plan("parameters=175e9", "tokens=300e9")["verdict"]
    assert gpt3["size"] == "too large" and gpt3["laws_agree"] and gpt3["moves"][0]["gain"] > 0
    by_name = {m["move"].split(",")[0]: m["gain"] for m in gpt3["moves"]}
    assert by_name["twice the tokens"] > by_name["twice the size"]
    llama = plan("parameters=7e9", "tokens=2e12")["verdict"]
    by_name = {m["move"].split(",")[0]: m["gain"] for m in llama["moves"]}
    assert llama["size"] == "too small" and by_name["twice the size"] > by_name["twice the tokens"]
    assert plan("flops=1e22")["verdict"]["size"] == "right"


def test_serving_much_means_a_smaller_model_trained_longer():
    found = plan("parameters=13e9", "law=approach_3", "serving.tokens=2e12")["lifetime"]
    assert found["cheapest"]["parameters"] == pytest.approx(7.1e9, rel=0.005)
    assert 1 - found["cheapest"]["flops"] / found["usual"]["flops"] == pytest.approx(0.163, abs=0.0005)


def test_flops_of_the_plan_are_the_trainer_s():
    found = plan("parameters=1e9", "tokens=20e9")
    model = size.architecture(config.load(SizeVerb, None, []), 1e9)
    assert found["plan"]["flops"] == 20e9 * training_flops_per_token(model, 2048)


@pytest.mark.parametrize(("given", "said"), [
    ([], r"nothing to go by: give two \(or one\)"),
    (["days=3"], r"days=3: a deadline alone says nothing of the size; add hardware\.chips"),
    (["flops=1e10"], r"flops asks for 6,384 parameters, fewer than the smallest model .* 3\.23e\+05 times the budget"),
    (["flops=1e21", "latency_ms=0.01"], r"latency_ms=0\.01: below the roofline: .* 4\.27 times that"),
    (["parameters=7e9", "latency_ms=1"], r"below the roofline: 7 B parameters take at least 17\.1 ms .* 17\.1 times that; up to"),
    (["parameters=7e10", "latency_ms=1e6"], r"takes 140\.7 GB on 1 TPU v5e .* which have 17\.2; up to 8\.\d+ B fit"),
    (["usd=5", "hardware.chip=h100"], r"unknown chip 'h100'; did you mean 'H100 SXM'"),
    (["usd=100", "hardware.chip=T4"], r"no price of 'T4' is held; give hardware\.usd_per_hour"),
    (["usd=100", "hardware.usd_per_hour=-2"], r"hardware\.usd_per_hour=-2: should be above 0"),
    (["flops=-1"], r"flops=-1: should be above 0"),
    (["flops=nan"], r"flops=nan: should be above 0"),
    (["flops=inf"], r"flops=inf: should be a finite number"),
    (["usd=100", "hardware.usd_per_hour=nan"], r"hardware\.usd_per_hour=nan: should be a finite number"),
    (["parameters=7e9", "flops=1"], r"flops pays for 2\.\d+e-11 tokens of 7 B parameters, less than a row of 2,048 .* times the budget"),
    (["flops=1e20", "hardware.mfu=1.5"], r"hardware\.mfu=1\.5: should be above 0 and at most 1"),
    (["parameters=1e5"], r"fewer than the smallest model with shape\.vocab_size=32,000 has: 4,260,224"),
    (["parameters=1e16"], r"parameters=1e\+16: no model"),
    (["flops=1e20", "law_file=/nowhere"], r"law_file=/nowhere: cannot be read"),
    (["flops=1e20", "shape.remat=some"], r"shape\.remat=some: 'some' is no tensor"),
    (["flops=1e20", "page=/nowhere/at/all.html"], r"page=/nowhere/at/all\.html: its folder is not there"),
])
def test_what_is_impossible_is_said_in_one_line(given, said):
    with pytest.raises(UserError) as e:
        size.main(config.load(SizeVerb, None, given))
    assert re.search(said, str(e.value)), str(e.value)
    assert "\n" not in str(e.value)


def test_every_law_has_one_look_of_its_own_in_the_plots():
    cfg = config.load(SizeVerb, None, ["flops=1e21", "tokens=1e10"])
    plots = size_page.plots_of(cfg, size.plan(cfg))[:2]
    looks = {(c.label, c.color, c.dashed) for plot in plots for c in plot.curves if not c.points}
    assert len(looks) == len({name for name, *_ in looks}) == len({(color, dashed) for _, color, dashed in looks})
    assert figure(plots[1]).count('class="dash"') == sum(dashed for _, _, dashed in looks)


def test_a_law_of_one_s_own_runs_decides(tmp_path):
    own = {"E": 1.5, "A": 300.0, "B": 900.0, "alpha": 0.33, "beta": 0.31, "more": "is passed over"}
    (tmp_path / "law.json").write_text(json.dumps(own))
    found = plan("flops=1e20", f"law_file={tmp_path / 'law.json'}")
    assert found["law"]["name"] == "your fit" and found["plan"]["loss"] > 1.5
    (tmp_path / "law.json").write_text("{}")
    with pytest.raises(UserError, match="should be what `jaxllm plan fit"):
        plan("flops=1e20", f"law_file={tmp_path / 'law.json'}")


def test_the_command_prints_json_and_a_page(tmp_path, capsys):
    (tmp_path / "lab.yaml").write_text("days: 30\nhardware: {chip: TPU v5e, chips: 256}\ntokens: 20.0e+9\n")
    assert main(["plan", "size", str(tmp_path / "lab.yaml"), f"--page={tmp_path / 'plan.html'}", "--json=-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["plan"]["parameters"] > 1e9 and "which move helps" in err
    page = (tmp_path / "plan.html").read_text()
    assert page.count("<svg") == 3 and "http:" not in re.sub(r"<p>.*?</p>|<pre>.*?</pre>", "", page, flags=re.S)
    assert main(["plan", "size", "--flops=1e20", "--days"]) == 2 and "plan size" in VERBS
