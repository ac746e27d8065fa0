"""API, open model or own model: cost lines that cross where they should, rules that rule out, figures with their sources."""

import dataclasses
import json
import pathlib
import re
import time

import browser
import numpy as np
import pytest
import yaml

from jaxllm import cli, config
from jaxllm.errors import UserError
from jaxllm.hardware import find
from jaxllm.plan import costs
from jaxllm.plan.advise import advise, best, one_each, weigh
from jaxllm.plan.advise_config import AdviseVerb
from jaxllm.plan.advise_options import Bought, Cheapest, Rented, budget_flops, tokens_a_month
from jaxllm.plan.advise_page import page
from jaxllm.plan.advise_rules import LEAST_SCRATCH, bar_of, training_that_reached
from jaxllm.plan.advise_text import text
from jaxllm.plan.breakeven import crossings, months_to_cross
from jaxllm.plan.costs import Size
from jaxllm.plan.prices import OWN, read_prices

ROOT = pathlib.Path(__file__).parents[1]
SCENARIOS = {name: str(ROOT / f"configs/plan/advise-{name}.yaml") for name in ("hospital", "startup", "lab")}
FEW = ["volume.requests=1e5", "volume.input_tokens=2e8", "volume.output_tokens=4e7"]


def settings(*words: str) -> AdviseVerb:
    return config.load(AdviseVerb, None, [*FEW, *words])


def scenario(name: str, *words: str) -> AdviseVerb:
    return config.load(AdviseVerb, SCENARIOS[name], words)


@pytest.fixture(scope="module")
def prices():
    return read_prices()


@pytest.fixture(scope="module")
def told(prices):
    """Each scenario with its whole advice."""
    return {name: (cfg := scenario(name), advise(cfg, prices)) for name in SCENARIOS}


def of(every, approach: str, model: str | None = None):
    return next(o for o in every if o.approach == approach and model in (None, o.model))


# ---------------------------------------------------------------- break-even


@pytest.mark.parametrize(("first", "second", "at"), [
    (lambda v: 100 + 2 * v, lambda v: 1e4 + 0.5 * v, 6600.0), (lambda v: 3 * v, lambda v: max(1e6, v), 1e6 / 3),
    (lambda v: 1e-3 * v, lambda v: 7e5 + 1e-9 * v, 7e5 / (1e-3 - 1e-9)),
])
def test_lines_cross_where_algebra_says(first, second, at):
    (found,) = crossings(first, second, 1.0, 1e12)
    assert found.at == pytest.approx(at, rel=1e-6) and found.first_below and not found.jump
    (turned,) = crossings(second, first, 1.0, 1e12)
    assert turned.at == pytest.approx(at, rel=1e-6) and not turned.first_below


def test_lines_that_cross_twice_or_not_or_jump():
    bent = [c.at for c in crossings(lambda v: 10 + v, lambda v: max(20.0, 2 * v - 80), 1.0, 1e6)]
    assert bent == pytest.approx([10, 90], rel=1e-6)
    assert crossings(lambda v: v, lambda v: 2 * v, 1.0, 1e6) == [] == crossings(lambda v: v, lambda v: v, 1.0, 1e6)
    (step,) = crossings(lambda v: 5.0, lambda v: 3.0 if v < 777 else 9.0, 1.0, 1e6)
    assert step.jump and step.at == pytest.approx(777, rel=1e-6) and not step.first_below


@pytest.mark.parametrize("name", SCENARIOS)
def test_break_even_is_where_the_cost_lines_cross(told, name):
    cfg, advice = told[name]
    by_approach, months = {o.approach: o for o in advice.options}, cfg.time.months
    meet = 0
    for (a, b), found in advice.crossings.items():
        for c in found:
            one, other = by_approach[a], by_approach[b]
            gap = [one.total(c.at * f, months) - other.total(c.at * f, months) for f in (1 - 1e-4, 1 + 1e-4)]
            assert np.sign(gap[0]) == -np.sign(gap[1]) == (-1 if c.first_below else 1)
            if not c.jump:
                meet += 1
                assert one.total(c.at, months) == pytest.approx(other.total(c.at, months), rel=1e-6)
    assert meet >= 3


def test_the_month_at_which_one_way_overtakes_another(told):
    """100 + 7 k and 35 + 20 k meet at month 5; a line that is touched is not crossed."""
    k = np.arange(13.0)
    (found,) = months_to_cross(100 + 7 * k, 35 + 20 * k)
    assert found.at == pytest.approx(5) and not found.first_below
    (found,) = months_to_cross(30 + 20 * k, 100 + 7 * k)
    assert found.at == pytest.approx(70 / 13) and found.first_below
    assert months_to_cross(np.abs(k - 4), 0 * k) == [] == months_to_cross(k, k)
    cfg, advice = told["lab"]
    up_to = {o.approach: o.cumulated(tokens_a_month(cfg), cfg.time.months) for o in advice.options}
    (when,) = advice.months["continued", "prompted"]
    costs_then = [np.interp(when.at, np.arange(13), up_to[a]) for a in ("continued", "prompted")]
    assert costs_then[0] == pytest.approx(costs_then[1], rel=1e-9) and not when.first_below


@pytest.mark.parametrize("how", ["rent", "buy"])
def test_a_line_never_falls_and_is_the_sum_of_its_parts(prices, how):
    cfg = settings(f"hardware.how={how}", "volume.growth=0.03", "data.domain_tokens=2e9")
    for o in one_each(weigh(cfg, prices), cfg):
        totals = [o.total(v, 24) for v in np.geomspace(1e6, 1e13, 60)]
        assert np.all(np.diff(totals) >= -1e-6 * np.array(totals[1:]))
        up_to = o.cumulated(3e8, 24)
        assert len(up_to) == 25 and up_to[-1] == pytest.approx(o.total(3e8, 24)) and np.all(np.diff(up_to) > 0)
        assert sum(o.parts(3e8, 24).values()) == pytest.approx(o.total(3e8, 24))


def test_bills_by_hand(prices):
    """Claude Sonnet 5.5: 2 USD a million in, 0.2 of it cached, 10 out. A rented replica that half the load fills runs the month."""
    cfg = settings("volume.cached=0.25", "team.usd_per_month=0", "time.months=12")
    api = of(weigh(cfg, prices), "api", "Claude Sonnet 5.5")
    month = (200 * (0.75 * 2 + 0.25 * 0.2) + 40 * 10)
    assert api.total(tokens_a_month(cfg), 12) == pytest.approx(12 * month)
    rented = Rented(usd_per_hour=3.0, replica_tokens=1e9, least=1)
    assert rented.cost(np.array([5e8, 2e9]))[1] == pytest.approx([3 * 730, 2 * 3 * 730])
    bought = Bought(server_usd=3e5, server_chips=8, chips=4, month_usd=1e3, replica_tokens=1e9, least=1, training_chips=0)
    assert [bought.servers(v) for v in (1e6, 2e9, 2.1e9, 4.1e9)] == [1, 1, 2, 3]
    assert bought.cost(np.array([1e9, 2.1e9])) == (6e5, pytest.approx([2e3, 2e3]))
    assert Cheapest((rented, dataclasses.replace(rented, usd_per_hour=4.0, replica_tokens=1e10))).cost(np.array([5e9]))[1] == 4 * 730


# ---------------------------------------------------------------- FLOPs and roofline


def test_flops_and_the_roofline_by_hand():
    assert costs.training_flops(7e9, 1e12) == 4.2e22 and costs.training_flops(7e9, 1e9, frozen=True) == 2.8e19
    parameters, tokens = costs.compute_optimal(5.76e23, 20)
    assert (6 * parameters * tokens, tokens / parameters) == (pytest.approx(5.76e23), pytest.approx(20))
    chip, dense = find("TPU v5e"), Size.dense(7e9)
    # 14 GB of weights and 8 caches of 1,000 tokens over 2 chips at half of 819 GB/s
    moved = 14e9 + 8 * 1000 * dense.cache_bytes
    assert costs.step_seconds(dense, chip, 2, 8, 1000, 2, 0.5) == pytest.approx(moved / (2 * 0.5 * 819e9))
    assert costs.step_seconds(dense, chip, 2, 4096, 0, 2, 0.5) == pytest.approx(2 * 7e9 * 4096 / (2 * 0.5 * 197e12))
    sparse = Size(30e9, 3e9, 1e5)
    one, many = (costs.step_seconds(sparse, chip, 1, b, 0, 2, 1.0) for b in (1, 200))
    assert one == pytest.approx(3e9 * 2 / 819e9) and many == pytest.approx(30e9 * 2 / 819e9)
    assert costs.chips_to_train(dense, 16, chip) == 8  # 112 GB in 0.9 of 17.2 GB each


@pytest.mark.parametrize("tokens_per_s", [0, 20, 60])
def test_the_batch_is_the_largest_that_fits_and_is_fast_enough(tokens_per_s):
    size, chip = Size.dense(13e9), find("H100 SXM")
    got = costs.serve(size, chip.name, 1, 2000, 500, 0.0, 2.0, 0.5, tokens_per_s)

    def ok(batch):
        held = size.parameters * 2 + batch * 2500 * size.cache_bytes
        step = costs.step_seconds(size, chip, 1, batch, 2250, 2, 0.5)
        return held <= 0.9 * chip.memory_bytes and step * tokens_per_s <= 1

    assert ok(got.batch) and not ok(got.batch + 1)
    assert got.request_s == pytest.approx(2 * 13e9 * 2000 / (0.5 * chip.bf16_flops) + 500 * got.step_s / got.batch)
    assert costs.serve(Size.dense(70e9), "L4", 2, 2000, 500, 0.0, 2.0, 0.5, 0) is None


# ---------------------------------------------------------------- what rules an option out


def test_a_residency_rule_removes_the_api(prices):
    """On premises no API is left; in a region those that are not offered there; else all that meet the rest."""
    for words, left in (((), set(prices.apis)), (("data.residency=us",), set(prices.apis) - {"Mistral Medium 3.5"}),
                        (("data.residency=on_premises", "hardware.how=buy"), set())):
        every = weigh(settings(*words), prices)
        assert {o.model for o in every if o.approach == "api" and not o.why_not} == left
    assert all("would leave your premises" in o.why_not[0] for o in every if o.approach == "api")
    assert best(settings(), prices).approach == "api"
    assert best(settings("data.residency=on_premises", "hardware.how=buy"), prices).approach == "prompted"


def test_an_agreement_is_needed_for_regulated_text(prices):
    def apis(*words):
        return {o.model for o in weigh(settings(*words), prices) if o.approach == "api" and not o.why_not}

    assert apis("data.sensitivity=regulated") == set() == apis("data.sensitivity=confidential")
    assert apis("data.sensitivity=regulated", "data.agreement=true") == apis("data.sensitivity=public") == set(prices.apis)


@pytest.mark.parametrize("flops", [1e12, 9.9e19])
def test_from_scratch_never_wins_under_1e20_flops(prices, tmp_path, flops):
    """Even where it costs nothing and all else is ruled out; and with enough FLOPs it does win there."""
    own = {"date": prices.date, "approaches": {"scratch": {"setup": 0, "upkeep": 0, "runs": 1}}, "public_text": {"cy": 1e13}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    cheap = read_prices(str(tmp_path / "own.yaml"))
    words = ("data.languages=[cy]", "data.known_training_data=true", "hardware.chip=TPU v5e")
    for extra in ((), ("budget.total_usd=1e9",), ("hardware.granted_chips=256", "hardware.granted_months=12")):
        assert best(settings(*words, *extra, f"budget.training_flops={flops}"), cheap) is None
        assert best(settings(*words, *extra, "budget.training_flops=1e21"), cheap).approach == "scratch"
    scratch = of(weigh(settings(*words, f"budget.training_flops={flops}"), cheap), "scratch")
    assert f"from scratch asks for 1e+20 at least, {1e20 / flops:.3g} times" in scratch.why_not[0]


def test_a_small_budget_in_money_is_too_few_flops(prices):
    """50 USD of H100 hours at 2.9 USD, 40 % of 989.5 TFLOP/s: 2.5e19."""
    cfg = settings("budget.total_usd=50")
    assert budget_flops(cfg, prices) == pytest.approx(50 / 2.9 * 3600 * 0.4 * 989.5e12, rel=1e-6)
    assert "1e+20 at least" in of(weigh(cfg, prices), "scratch").why_not[0]
    granted = settings("hardware.chip=TPU v5e", "hardware.granted_chips=256", "hardware.granted_months=1")
    assert budget_flops(granted, prices) == pytest.approx(256 * 197e12 * 0.4 * 730 * 3600)


def test_the_training_that_reached_a_bar_is_the_least_known(prices):
    for bar, name, flops in ((45, "Qwen2.5 0.5B", 6 * 0.49e9 * 18e12), (60, "DCLM 7B", 6 * 6.9e9 * 2.6e12),
                             (65, "OLMo 2 13B", 6 * 13.7e9 * 5e12)):
        cfg = settings(f"quality.scores.mmlu={bar}")
        assert training_that_reached(bar_of(cfg, prices), cfg, prices) == (pytest.approx(flops), name)
    assert training_that_reached({"mmlu": 99.0}, cfg, prices) == (LEAST_SCRATCH, None)
    assert training_that_reached({}, cfg, prices) == (LEAST_SCRATCH, None)


@pytest.mark.parametrize(("words", "approach", "model", "said"), [
    (["quality.scores.mmlu=80"], "prompted", "Qwen2.5 7B", "mmlu 76.6 (published): 3.4 below the bar of 80"),
    (["quality.scores.mmlu=80", "quality.domain=specialist"], "prompted", "Qwen3 8B", "75.8 (published 81.8, -6 for this need): 4.2 below"),
    (["quality.scores.mmlu=85"], "api", "GPT-6 Luna", "mmlu 82 (assumed): 3 below the bar of 85"),
    (["latency.tokens_per_s=2000"], "prompted", "Llama 3.1 70B", "latency.tokens_per_s=2000: writes 189 at most on 16 H100 SXM, one reader alone: 1,811 short"),
    (["latency.first_token_s=0.5"], "api", "Claude Sonnet 5.5", "latency.first_token_s=0.5: 0.9 at best: 0.4 later"),
    (["latency.tokens_per_s=120"], "api", "Claude Sonnet 5.5", "writes 101 at most: 19 short"),
    (["hardware.chip=L4"], "prompted", "gpt-oss 120B", None),
    (["hardware.chip=TPU v5e"], "full", "Llama 3.1 70B", "training_chips=64: to train it takes the memory of 74 TPU v5e: 10 more"),
    (["volume.input_tokens=4.5e8"], "prompted", "OLMo 2 7B", "a request of 4,500 + 400 tokens: 804 more than its context of 4,096"),
    (["data.languages=[en,de]"], "prompted", "gpt-oss 120B", "its card does not name de"),
    (["data.known_training_data=true"], "lora", "Qwen3 8B", "its training text is not published"),
    (["data.domain_tokens=4e8"], "continued", "Qwen3 8B", "continued pretraining asks for 1 B: 600 M short"),
    (["budget.total_usd=1e5"], "prompted", "Qwen3 8B", "budget.total_usd=100,000: costs 261,744 over 36 months: 161,744 more"),
    (["time.first_use_months=1.5", "team.engineers=1"], "lora", "Qwen3 8B", "ready after 6.0 months: 4.5 too late"),
    (["data.languages=[cy]", "data.domain_tokens=1e9", "quality.scores.mmlu=60"], "scratch", None, "are at hand or public"),
    (["quality.scores.mmlu=86"], "scratch", None, "no model of the prices file shows how much training reaches mmlu 86"),
    (["quality.scores.mmlu=60", "budget.training_flops=1e22"], "scratch", None, "DCLM 7B took 1.1e+23, with the runs before it 1.6e+23, 16.1 times"),
    (["hardware.weight_bytes=4", "hardware.chip=L4"], "prompted", "gpt-oss 120B", "needs 467 GB for its weights alone and room for a request: 16 L4 have 371"),
])
def test_what_fails_is_told_with_by_how_much(prices, words, approach, model, said):
    option = of(weigh(settings(*words), prices), approach, model)
    assert (said is None and not option.why_not) or any(said in reason for reason in option.why_not), option.why_not


def test_without_the_reason_it_is_possible(prices):
    """The options of the test above, with nothing asked for: none of its reasons is there by itself."""
    ruled_out = {o.name: o.why_not for o in weigh(settings("data.domain_tokens=2e9"), prices) if o.why_not}
    assert ruled_out == {}


def test_tuning_lifts_a_small_model_over_the_bar_of_a_narrow_task(prices):
    words = ["quality.scores.mmlu=80", "quality.task=narrow"]
    every = weigh(settings(*words), prices)
    assert of(every, "lora", "Llama 3.1 8B").scores == {"mmlu": pytest.approx(82.3)} and not of(every, "lora", "Llama 3.1 8B").why_not
    assert of(every, "prompted", "Llama 3.1 8B").why_not and of(weigh(settings(words[0]), prices), "lora", "Llama 3.1 8B").why_not


# ---------------------------------------------------------------- the answer, and what would change it


def test_the_three_scenarios_answers(told):
    found = {name: advice.best.name for name, (_, advice) in told.items()}
    assert found == {"hospital": "open model, prompted: gpt-oss 120B", "startup": "API: GPT-6.1 Terra",
                     "lab": "open model, continued pretraining: OLMo 2 13B"}
    ruled_out = {name: {o.approach for o in advice.options if o.why_not} for name, (_, advice) in told.items()}
    assert ruled_out["hospital"] == {"api", "scratch"} == ruled_out["lab"] and "scratch" in ruled_out["startup"]
    assert all(o.why_not for o in told["hospital"][1].all if o.approach == "api")


def test_the_cheapest_allowed_option_is_first(told):
    for cfg, advice in told.values():
        totals = [o.total(tokens_a_month(cfg), cfg.time.months) for o in advice.options if not o.why_not]
        assert totals == sorted(totals) and [bool(o.why_not) for o in advice.options] == sorted(bool(o.why_not) for o in advice.options)
        allowed = [o.total(tokens_a_month(cfg), cfg.time.months) for o in advice.all if not o.why_not]
        assert totals[0] == pytest.approx(min(allowed))


def test_the_answer_turns_where_it_is_said_to(told, prices):
    cfg, advice = told["startup"]
    volume = next(t for t in advice.turns if t.what == "tokens a month")

    def at(f):
        v = cfg.volume
        return best(dataclasses.replace(cfg, volume=dataclasses.replace(v, requests=v.requests * f, input_tokens=v.input_tokens * f,
                                                                        output_tokens=v.output_tokens * f)), prices)

    assert at(volume.factor * 1.01).name == volume.best != advice.best.name == at(volume.factor / 1.01).name
    cost = next(t for t in advice.turns if t.what == "what a person costs a month")
    assert cost.half_usd < advice.best.total(tokens_a_month(cfg), cfg.time.months) < cost.twice_usd


def test_a_rule_that_is_lifted_gives_the_answer_without_it(told, prices):
    cfg, advice = told["hospital"]
    both = next(r for r in advice.lifted if r.what == "both of these")
    without = scenario("hospital", "data.residency=anywhere", "data.agreement=true")
    assert both.changes and both.best == best(without, prices).name
    assert both.usd == pytest.approx(best(without, prices).total(tokens_a_month(without), 36))


# ---------------------------------------------------------------- prices


def test_every_figure_has_a_source_and_a_day(prices):
    tree = yaml.safe_load(OWN.read_text(encoding="utf-8"))
    for name, source in tree["sources"].items():
        assert re.match(r"https?://\S+\.\S", source.get("url", "")) or len(source["assumption"]) > 15, name
        assert source["date"] <= prices.date, name
    text_ = OWN.read_text(encoding="utf-8").split("\napis:")[1]
    assert not [name for name in tree["sources"] if not re.search(rf"\b{name}\b", text_)], "a source that nothing uses"
    for group in (prices.apis, prices.models, prices.trained, prices.chips, prices.approaches):
        assert all(entry for entry in group.values())


OWN_FILE = """date: 2026-12-01
sources: {me: {url: "https://example.com/offer", date: 2026-11-30}}
apis:
  GPT-6.1 Terra: {input: [0.5, me]}
  House: {input: 0.01, output: 0.01, context: 8192, regions: {eu: me}, scores: {ours: [91, me]}}
models:
  Qwen3 8B: {scores: {ours: 88}}
"""


def test_a_file_of_ones_own_is_laid_over_the_prices(tmp_path, prices):
    (tmp_path / "own.yaml").write_text(OWN_FILE)
    own = read_prices(str(tmp_path / "own.yaml"))
    terra = own.apis["GPT-6.1 Terra"]
    assert (terra.input.value, terra.input.source, terra.output) == (0.5, "https://example.com/offer", prices.apis["GPT-6.1 Terra"].output)
    assert own.models["Qwen3 8B"].scores["mmlu"] == prices.models["Qwen3 8B"].scores["mmlu"] and own.tasks == ("mmlu", "ours")
    assert own.models["Qwen3 8B"].scores["ours"].source == str(tmp_path / "own.yaml")
    assert best(settings("quality.scores.ours=90"), own).name == "API: House"


def test_the_example_in_the_docs_is_one(tmp_path):
    example = (ROOT / "docs/plan-advise.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    (tmp_path / "own.yaml").write_text(example)
    own = read_prices(str(tmp_path / "own.yaml"))
    assert own.apis["GPT-6.1 Terra"].input.value == 0.8 and own.approaches["lora"].setup.value == 2 and "letters" in own.tasks


@pytest.mark.parametrize(("change", "said"), [
    (("input: [0.5, me]", "input: [-0.5, me]"), "apis.GPT-6.1 Terra.input=-0.5: should be 0 or more"),
    (("input: [0.5, me]", "input: "), "apis.GPT-6.1 Terra.input has no value"),
    (("input: [0.5, me]", "input: [0.5, mee]"), "unknown source 'mee'; did you mean 'me'?"),
    (("input: [0.5, me]", "inputs: [0.5, me]"), "unknown key 'inputs'; did you mean 'input'?"),
    (("input: [0.5, me]", "input: cheap"), "apis.GPT-6.1 Terra.input='cheap': should be a number"),
    (("output: 0.01, ", ""), "apis.House.output is missing"),
    (("apis:", "apsi:"), "unknown key 'apsi'; did you mean 'apis'?"),
    (("date: 2026-12-01\n", ""), "date=None: should be the day of these prices"),
    (("Qwen3 8B", "My 8B"), "models.My 8B.parameters is missing"),
    (("models:", "chips:\n  H100 SXN: {usd_per_hour: 2}\nmodels:"), "is no chip of jaxllm/chips.yaml; did you mean 'H100 SXM'?"),
    (("date: 2026-12-01", "date: ["), "not valid YAML"),
    (("models:", "assumptions: {mfuu: 0.5}\nmodels:"), "assumptions.mfuu: is not known; did you mean 'mfu'?"),
    (("models:", "assumptions: {mfu: 0}\nmodels:"), "assumptions.mfu=0: should be above 0"),
    (("models:", "approaches: {lroa: {setup: 1}}\nmodels:"), "approaches.lroa.upkeep is missing"),
    (("models:", "approaches: {}\napproaches: {}\nmodels:"), "found 'approaches' twice"),
    (("Qwen3 8B: {", "Qwen3 8B: {languages: 3, "), "models.Qwen3 8B.languages=3: should be a list of codes"),
    (("Qwen3 8B: {", "Qwen3 8B: {licence: 3, "), "models.Qwen3 8B.licence=3: should be text"),
    (("Qwen3 8B: {", "Qwen3 8B: {data_published: 'no', "), "data_published='no': should be true or false"),
    (("Qwen3 8B: {", "Qwen3 8B: {active: 1e12, "), "models.Qwen3 8B.active=1e+12: should be at most its parameters"),
    (("models:", "chips: {H100 SXM: {server_chips: 0.5}}\nmodels:"), "chips.H100 SXM.server_chips=0.5: should be a whole number"),
])
def test_mistakes_in_a_file_of_ones_own(tmp_path, change, said):
    assert change[0] in OWN_FILE
    (tmp_path / "own.yaml").write_text(OWN_FILE.replace(*change))
    with pytest.raises(UserError, match=re.escape(said)) as e:
        read_prices(str(tmp_path / "own.yaml"))
    assert "own.yaml" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(("words", "said"), [
    (["--volume.requests=0"], "volume.requests=0: should be above 0"),
    (["--volume.input_tokens=1e300"], "volume.input_tokens=1e+300: should be above 0, and at most 1e+18"),
    (["--team.usd_per_month=inf"], "team.usd_per_month=inf: should be a finite number"),
    (["--volume.cached=1.5"], "volume.cached=1.5: is a share"),
    (["--quality.as_good_as=GPT-6.1 Tera"], "is not in the prices file; did you mean 'GPT-6.1 Terra'?"),
    (["--quality.scores.mmul=70"], "no model of the prices file has a score; did you mean 'mmlu'?"),
    (["--quality.scores.mmlu=130"], "quality.scores.mmlu=130: is per cent"),
    (["--hardware.chip=H10 SXM"], "unknown chip 'H10 SXM'; did you mean 'H100 SXM'?"),
    (["--hardware.chip=V100 PCIe 16GB"], "has no price in the prices file"),
    (["--hardware.how=buy", "--hardware.chip=L4"], "chips.L4.buy_usd is missing in the prices file; chips that have it: H100 SXM"),
    (["--data.residency=on_premises"], "rented chips are not on your premises"),
    (["--data.residency=mars"], "data.residency='mars'"),
    (["--hardware.granted_chips=256"], "should both be above 0, or both 0"),
    (["--data.languages=[english]"], "should be a code of two lower-case letters"),
    (["--time.months=0"], "time.months=0: should be from 1 to 120"),
    (["--prices=nowhere.yaml"], "prices=nowhere.yaml: no such file"),
    (["--budget.total_usd=20000"], "no way is left; the nearest is API: GPT-6.1 Terra, which fails by: budget.total_usd=20,000: costs 91,467 over 24 months: 71,467 more"),
    (["--data.known_training_data=true", "--latency.tokens_per_s=900"], "which fails by: data.known_training_data"),
])
def test_mistakes_are_one_line_and_exit_2(tmp_path, capsys, words, said):
    assert cli.main(["plan", "advise", SCENARIOS["startup"], f"--page={tmp_path / 'a.html'}", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and err.startswith("jaxllm: ")


def test_a_latency_below_the_roofline_is_told_with_by_how_much(prices):
    """All that is allowed runs on 16 chips at most; the fastest of it is named with what is short."""
    first = one_each(weigh(cfg := scenario("hospital", "latency.tokens_per_s=5000"), prices), cfg)[0]
    fastest = max(costs.serve(Size.of(m), "H100 SXM", 16, 4000, 600, 0.0, 2.0, 0.5, 5000).tokens_per_s for m in prices.models.values())
    (why,) = first.why_not
    assert re.match(r"latency.tokens_per_s=5000: writes [\d.,]+ at most on 16 H100 SXM, one reader alone: [\d,]+ short", why)
    assert float(re.findall(r"writes ([\d.]+)", why)[0]) <= fastest * 1.01 < 5000


# ---------------------------------------------------------------- the page and the text


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_page_holds_what_the_advice_says_and_loads_nothing(told, prices, name):
    cfg, advice = told[name]
    html = page(cfg, prices, advice)
    for o in advice.options:
        assert o.model in html and all(re.sub("'", "&#x27;", reason) in html for reason in o.why_not)
    for source in yaml.safe_load(OWN.read_text(encoding="utf-8"))["sources"].values():
        assert re.sub("'", "&#x27;", source.get("url") or source["assumption"]) in html and str(source["date"]) in html
    assert not re.search(r"<(script|link|img|iframe)|\bsrc=|url\(http|@import", html) and "default-src 'none'" in html
    assert html.count("<svg") == 4 and html == page(cfg, prices, advice)
    pairs = {f"mark-{a}-{b}" for (a, b), found in advice.crossings.items() if 0 < len(found) < 3}
    assert set(re.findall(r'data-curve="(mark-[a-z-]+)"', html)) == pairs


def test_the_text_names_the_answer_what_is_ruled_out_and_break_even(told, prices):
    cfg, advice = told["startup"]
    said = text(cfg, prices, advice)
    assert "API: GPT-6.1 Terra: 91,500 USD over 24 months" in said and "x open model, LoRA" in said
    assert "API | open model, prompted: 1.87 B; below it API is cheaper" in said and "2.0 too late" in said
    assert max(map(len, said.splitlines())) <= 140


def test_the_verb_writes_page_and_json(tmp_path, capsys):
    words = [f"--page={tmp_path / 'deep' / 'a.html'}", f"--json={tmp_path / 'a.json'}"]
    assert cli.main(["plan", "advise", SCENARIOS["startup"], *words]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["best"] == "API: GPT-6.1 Terra" and len(found["options"]) == 6 and len(found["options"][0]["usd_by_month"]) == 25
    assert found["break_even"][0]["tokens_a_month"] == pytest.approx(1.87e9, rel=0.01)
    assert (tmp_path / "deep" / "a.html").stat().st_size < 400_000 and "first use" in capsys.readouterr().out


def test_a_page_is_written_even_when_nothing_is_left(tmp_path, capsys):
    assert cli.main(["plan", "advise", SCENARIOS["startup"], "--budget.total_usd=20000", f"--page={tmp_path / 'a.html'}"]) == 2
    assert "No way is left" in (tmp_path / "a.html").read_text(encoding="utf-8") and "No way is left" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="no chromium or chrome on this machine: the page is not tried")
def test_the_page_fits_a_desk_and_a_phone(told, prices, tmp_path):
    with browser.Browser(tmp_path / "profile") as shown:
        for name, (cfg, advice) in told.items():
            path = tmp_path / f"{name}.html"
            path.write_text(page(cfg, prices, advice), encoding="utf-8")
            for width in (1180, 390):
                shown.resize(width, 900)
                shown.open(path.as_uri())
                time.sleep(0.3)
                shown.wait("document.readyState == 'complete' && document.querySelectorAll('svg').length == 4")
                assert shown.evaluate("document.documentElement.scrollWidth") <= width
        assert shown.console == []
