"""Shares, caps and copies of the mixture: against published examples, formulas, and themselves in another order."""

import math

import numpy as np
import pytest

from jaxllm import config
from jaxllm.data.mixture import MixConfig, audit, chance, decide, fill, rates, worth
from jaxllm.errors import UserError

RNG = np.random.default_rng(0)
N = 6000
IDS = [f"doc-{i}" for i in range(N)]
SOURCE = np.array(["web"] * 4000 + ["books"] * 1500 + ["wiki"] * 500)
SIZE = RNG.integers(200, 4000, N).astype(float)
QUALITY = RNG.random(N)
DOMAIN = np.array(["law", "news", "code"])[np.arange(N) % 3]
IN = {name: SIZE[SOURCE == name].sum() for name in ("web", "books", "wiki")}


def mixed(**settings):
    cfg = MixConfig(**settings)
    copies = decide(IDS, SOURCE, SIZE, QUALITY, DOMAIN, cfg)
    return copies, {(r["by"], r["name"]): r for r in audit(SOURCE, SIZE, QUALITY, DOMAIN, copies, cfg)}


def exact(cfg) -> dict:
    """Returns each source's size in the output on average, before fractions of a copy are settled."""
    amount = SIZE * rates(SOURCE, SIZE, QUALITY, DOMAIN, cfg)
    return {name: amount[SOURCE == name].sum() for name in IN}


@pytest.mark.parametrize("settings", [{"method": "temperature", "alpha": 0.3, "total": 1e6}, {"method": "unimax", "total": 3e7}])
def test_what_is_written_is_what_was_meant_up_to_chance(settings):
    cfg = MixConfig(**settings)
    rate, copies = rates(SOURCE, SIZE, QUALITY, DOMAIN, cfg), mixed(**settings)[0]
    for name, amount in exact(cfg).items():
        mine = SOURCE == name
        fraction = rate[mine] % 1
        spread = np.sqrt((SIZE[mine] ** 2 * fraction * (1 - fraction)).sum())
        assert abs((copies * SIZE)[mine].sum() - amount) <= 4 * spread + 1
        assert (abs(copies - rate)[mine] < 1).all()


def test_by_default_every_document_is_taken_once():
    copies, rows = mixed()
    assert (copies == 1).all()
    assert all(row["epochs"] == 1 and "warning" not in row for row in rows.values())


def test_unimax_is_the_published_example():
    """The worked example of the `unimax_sampling` package (README), which implements Chung et al. 2023."""
    sizes = np.array([179955884499, 184595788282, 42541080893, 10027573389, 549707867], float)
    amounts = fill(np.ones(5), 4 * sizes, 250_000_000_000)
    np.testing.assert_allclose(amounts, [69230291658.667, 69230291658.667, 69230291658.667, 40110293556, 2198831468], rtol=1e-12)


def test_unimax_gives_equal_shares_to_what_is_large_enough():
    total = sum(IN.values())
    _, rows = mixed(method="unimax", max_epochs=2.0)
    assert rows["source", "wiki"]["epochs"] == pytest.approx(2.0, abs=1e-9)  # too small: all of it, twice
    web, books = rows["source", "web"]["size_out"], rows["source", "books"]["size_out"]
    assert web == pytest.approx(books, rel=0.04) and web == pytest.approx((total - 2 * IN["wiki"]) / 2, rel=0.04)


@pytest.mark.parametrize("alpha", [0, 0.3, 0.7, 1])
def test_temperature_is_size_to_the_alpha(alpha):
    amounts = exact(MixConfig(method="temperature", alpha=alpha, total=1e6))
    powers = {name: size**alpha for name, size in IN.items()}
    _, rows = mixed(method="temperature", alpha=alpha, total=1e6)
    for name in IN:
        assert amounts[name] == pytest.approx(1e6 * powers[name] / sum(powers.values()), rel=1e-9)
        assert rows["source", name]["wanted"] == pytest.approx(powers[name] / sum(powers.values()), rel=1e-9)


def test_weights_are_the_shares_and_zero_leaves_out():
    settings = {"method": "weights", "weights": {"web": 3, "wiki": 0}, "total": 2e6}  # books: 1
    assert exact(MixConfig(**settings)) == pytest.approx({"web": 1.5e6, "books": 0.5e6, "wiki": 0})
    copies, rows = mixed(**settings)
    assert copies[SOURCE == "wiki"].sum() == 0
    assert rows["source", "web"]["share"] == pytest.approx(0.75, abs=0.02)


def test_a_group_too_small_either_gives_its_part_away_or_shrinks_the_whole():
    weights = {"web": 1, "books": 1, "wiki": 2}
    _, rows = mixed(method="weights", weights=weights, max_epochs=1)
    assert rows["source", "wiki"]["epochs"] == 1 and "50.0% wanted" in rows["source", "wiki"]["warning"]
    copies, rows = mixed(method="weights", weights=weights, max_epochs=1, keep="shares")
    assert rows["source", "wiki"]["share"] == pytest.approx(0.5, abs=0.02)
    assert sum(copies * SIZE) == pytest.approx(2 * IN["wiki"], rel=0.05) and copies.max() == 1


@pytest.mark.parametrize("settings", [{}, {"method": "temperature", "alpha": 0.3}])
def test_quality_and_domain_change_rates_by_their_factors(settings):
    cfg = MixConfig(quality_edges=(0.3, 0.7), quality_factors=(0.5, 1.0, 2.0), domains={"law": 1.5}, max_epochs=50, **settings)
    rate = rates(SOURCE, SIZE, QUALITY, DOMAIN, cfg)
    for source in IN:
        mine = (SOURCE == source)
        low, high = rate[mine & (QUALITY < 0.3) & (DOMAIN == "news")], rate[mine & (QUALITY >= 0.7) & (DOMAIN == "news")]
        law = rate[mine & (QUALITY < 0.3) & (DOMAIN == "law")]
        np.testing.assert_allclose(high, 4 * low[0], rtol=1e-9)
        np.testing.assert_allclose(law, 1.5 * low[0], rtol=1e-9)


def test_no_document_goes_beyond_the_cap():
    copies, rows = mixed(quality_edges=(0.9,), quality_factors=(0.0, 1.0), max_epochs=3, total=1e9)
    assert set(copies[QUALITY >= 0.9]) == {3} and copies[QUALITY < 0.9].sum() == 0
    assert rows["quality", "from 0.9"]["epochs"] == 3
    cfg = MixConfig(method="temperature", quality_edges=(0.9,), quality_factors=(1.0, 100.0), max_epochs=2)
    rate = rates(SOURCE, SIZE, QUALITY, DOMAIN, cfg)
    assert rate.max() == pytest.approx(2) and sum(rate * SIZE) == pytest.approx(sum(SIZE))  # the others make up for it


def test_quality_that_is_not_known_counts_once():
    cfg = MixConfig(quality_edges=(0.5,), quality_factors=(0.0, 1.0))
    assert decide(["a", "b", "c"], ["s"] * 3, [1, 1, 1], [math.nan, 0.2, 0.9], None, cfg).tolist() == [1, 0, 1]


def test_copies_depend_on_the_document_not_on_its_place():
    cfg = MixConfig(method="temperature", alpha=0.3, quality_edges=(0.5,), quality_factors=(1.0, 1.7))
    copies = decide(IDS, SOURCE, SIZE, QUALITY, DOMAIN, cfg)
    order = RNG.permutation(N)
    again = decide([IDS[i] for i in order], SOURCE[order], SIZE[order], QUALITY[order], DOMAIN[order], cfg)
    assert (again == copies[order]).all()
    other = decide(IDS, SOURCE, SIZE, QUALITY, DOMAIN, MixConfig(method="temperature", alpha=0.3, seed=1))
    assert (other != copies).any()


def test_a_larger_output_holds_the_smaller():
    small, large = (mixed(total=total)[0] for total in (1e6, 1.5e6))
    assert (large >= small).all() and large.sum() > small.sum()


def test_fractions_are_taken_as_often_as_they_say():
    taken = np.mean([chance(f"x{i}", 7) < 0.3 for i in range(20000)])
    assert abs(taken - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 20000)


def test_repeats_are_worth_what_the_law_says():
    assert worth(0.4) == 0.4 and worth(1) == 1
    assert worth(4) == pytest.approx(1 + 15.387756 * (1 - math.exp(-3 / 15.387756)), rel=1e-12)  # 3.73
    assert worth(1 + 15.387756) == pytest.approx(1 + 15.387756 * (1 - 1 / math.e))  # the paper: 1 - 1/e of new text
    assert worth(1e9) == pytest.approx(1 + 15.387756)


def test_more_than_four_repeats_are_warned_of_with_their_cost():
    settings = {"method": "weights", "weights": {"web": 1, "books": 1, "wiki": 1}}
    assert not any("repeated" in row.get("warning", "") for row in mixed(**settings)[1].values())
    _, rows = mixed(**settings, max_epochs=16)
    assert rows["source", "wiki"]["epochs"] < 4.5  # a third of the whole is about four times wiki
    _, rows = mixed(method="weights", weights={"web": 0.1, "books": 0.1, "wiki": 1}, max_epochs=16)
    row = rows["source", "wiki"]
    assert row["epochs"] > 8 and "worth" in row["warning"] and row["worth"] == worth(row["epochs"])
    assert "repeated" not in rows["source", "web"].get("warning", "")


def test_shares_of_the_audit_sum_to_one():
    _, rows = mixed(method="unimax", quality_edges=(0.5,), quality_factors=(1.0, 2.0))
    for by in ("source", "domain", "quality"):
        mine = [r for r in rows.values() if r["by"] == by]
        assert sum(r["share"] for r in mine) == pytest.approx(1) and sum(r["documents"] for r in mine) == N


def test_nothing_in_nothing_out():
    cfg = MixConfig(method="temperature")
    assert decide([], [], [], None, None, cfg).tolist() == [] and audit([], [], None, None, [], cfg) == []


@pytest.mark.parametrize(("override", "says"), [
    ("alpha=2", "mix.alpha=2.0: should be in [0, 1]"),
    ("max_epochs=0", "mix.max_epochs=0.0: should be above 0"),
    ("quality_edges=[0.5]", "mix.quality_factors=(): should be 2 numbers, one a bucket between 1 mix.quality_edges"),
    ("weights.web=2", "mix.weights={'web': 2.0}: should be empty unless mix.method=weights"),
    ("domains.web=-1", "mix: a weight or factor is -1.0"),
    ("method=uniform", "should be natural|weights|temperature|unimax"),
])
def test_a_mistake_gets_one_line(override, says):
    with pytest.raises(UserError) as error:
        config.load(MixConfig, None, [override])
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("settings", "says"), [
    ({"method": "weights", "weights": {"wikki": 1}}, "mix.weights.wikki: no document is of it; did you mean 'wiki'?"),
    ({"domains": {"sport": 2}}, "mix.domains.sport: no document is of it; found: code, law, news"),
])
def test_an_unknown_name_is_told(settings, says):
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        mixed(**settings)
