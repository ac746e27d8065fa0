"""Pipeline tables: every operation once and after what it needs, and the bubbles and live activations of the formulas."""

import json
from fractions import Fraction

import pytest

from jaxllm.cli import main
from jaxllm.errors import UserError
from jaxllm.parallel.schedule import BACKWARD, FORWARD, INPUT, KINDS, WEIGHT, make, too_few
from jaxllm.parallel.table import lower

SHAPES = [(name, p, m, v) for name in KINDS for p in (2, 3, 4, 8) for m in (1, 2, 3, 4, 5, 8, 16, 24, 32)
          for v in ((2, 3, 4) if name == "interleaved" else (1,)) if name != "interleaved" or m % p == 0]


@pytest.fixture(scope="module")
def tables():
    return {shape: make(*shape) for shape in SHAPES}


def test_idle_ticks_and_live_activations_are_the_formulas_exactly(tables):
    for (name, p, m, v), table in tables.items():
        live = table.live()
        if name in ("gpipe", "1f1b"):
            assert table.idle() == Fraction(p - 1, m + p - 1)
        if name == "interleaved":
            assert table.idle() == Fraction(p - 1, v * m + p - 1)
            assert live == [min(2 * (p - 1 - s) + (v - 1) * p + 1, m * v) for s in range(p)]
        if name == "zero_bubble" and m >= p:  # ZB-H1: (p-1)(F + I - W) on every stage, the live activations of 1F1B's fullest
            assert table.idle() == Fraction(p - 1, 3 * m + p - 1)
            assert all([row[s] for row in table.rows].count(None) == p - 1 for s in range(p))
        if name in ("1f1b", "zero_bubble"):
            assert max(live) == min(p, m)  # not m
        if name == "gpipe":
            assert live == [m] * p
        assert table.idle() == KINDS[name].idle(p, m, v)
        assert live == KINDS[name].live(p, m, v)


def test_every_operation_stands_once_and_after_what_it_needs(tables):
    for (name, p, m, v), table in tables.items():
        when = table.when()
        parts = (FORWARD, INPUT, WEIGHT) if name == "zero_bubble" else (FORWARD, BACKWARD)
        assert when.keys() == {(kind, i, piece) for kind in parts for i in range(m) for piece in range(p * v)}
        assert sum(op is not None for row in table.rows for op in row) == len(when)
        for (kind, i, piece), t in when.items():
            if kind == FORWARD:
                needs = [(FORWARD, i, piece - 1)] if piece else []
            elif kind == WEIGHT:
                needs = [(INPUT, i, piece)]
            else:
                needs = [(FORWARD, i, piece)] + [(kind, i, piece + 1)] * (piece < p * v - 1)
            assert all(when[n] < t for n in needs), (name, p, m, v, kind, i, piece)


def test_nothing_is_written_over_what_still_waits(tables):
    """Plays the columns: whatever an operation reads is what its neighbour sent for it."""
    for shape, schedule in tables.items():
        table, p = lower(schedule), schedule.stages
        last = p * schedule.virtual_stages - 1
        xs, gs, ws = [[{} for _ in range(p)] for _ in range(3)]
        sent = [(None, None)] * p
        for t, row in enumerate(schedule.rows):
            cells = [{k: int(c[t, s]) for k, c in table.columns.items()} for s in range(p)]
            for s, cell in enumerate(cells):
                xs[s][cell["x_arrives"]], gs[s][cell["g_arrives"]] = sent[s - 1][0], sent[(s + 1) % p][1]
            sent = []
            for s, (op, cell) in enumerate(zip(row, cells, strict=True)):
                y = dx = None
                if op is not None:
                    v = schedule.virtual(s, op)
                    assert (cell["first"], cell["last"], cell["micro"], cell["chunk"]) == (v == 0, v == last, op.micro, op.chunk)
                    if op.kind == FORWARD:
                        y = "x", v + 1, op.micro
                    if v > 0 and cell["op"] and op.kind != WEIGHT:
                        assert xs[s][cell["x"]] == ("x", v, op.micro), (shape, t, s)
                    if op.kind in (BACKWARD, INPUT) and v < last:
                        assert gs[s][cell["g"]] == ("g", v, op.micro), (shape, t, s)
                    if op.kind in (BACKWARD, INPUT):
                        dx = "g", v - 1, op.micro
                    if op.kind == INPUT:
                        assert cell["w"] < table.w_slots
                        ws[s][cell["w"]] = v, op.micro
                    if op.kind == WEIGHT:
                        assert ws[s][cell["w"]] == (v, op.micro), (shape, t, s)
                sent.append((y, dx))


@pytest.mark.parametrize("m", [8, 16, 32])
def test_slots_are_p_for_1f1b_and_m_for_gpipe(m):
    assert lower(make("gpipe", 4, m)).x_slots == m
    assert lower(make("1f1b", 4, m)).x_slots == 4
    assert (lower(make("zero_bubble", 4, m)).x_slots, lower(make("zero_bubble", 4, m)).w_slots) == (4, 4)
    assert lower(make("1f1b", 4, m)).w_slots == 0
    assert lower(make("interleaved", 4, m, 2)).x_slots < 12


@pytest.mark.parametrize(("shape", "says"), [
    (("1f1", 4, 8), "should be one of gpipe, 1f1b, interleaved, zero_bubble; did you mean '1f1b'"),
    (("interleaved", 4, 6, 2), "micro_batches=6 is not a multiple of the 4 stages"),
    (("interleaved", 4, 8, 1), "needs virtual_stages of 2 or more"), (("gpipe", 4, 8, 2), "virtual_stages=2"),
    (("gpipe", 1, 8), "at least 2 stages, found 1"),
])
def test_a_table_that_cannot_be_is_one_line(shape, says):
    with pytest.raises(UserError, match=says) as error:
        make(*shape)
    assert "\n" not in str(error.value)


def test_too_few_micro_batches_are_told_with_the_bubble():
    assert too_few(make("1f1b", 4, 4)) is None
    assert too_few(make("1f1b", 8, 2)) == ("2 micro-batches are few for 8 stages: 78% of the ticks are idle; "
                                           "32 would leave 18%")


@pytest.mark.parametrize("words", [["--schedule=1f1b"], ["--schedule=interleaved", "--virtual_stages=2"],
                                   ["--schedule=zero_bubble", "--stages=3", "--micro_batches=2"]], ids=lambda w: w[0][11:])
def test_the_verb_draws_and_tells(words, tmp_path, capsys):
    assert main(["plan", "schedule", *words, f"--picture={tmp_path}/a.svg", f"--json={tmp_path}/a.json"]) == 0
    told, text = json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out
    assert told["idle_share"] == told["idle_of_formula"]
    assert told["live"] == told["live_of_formula"]
    assert f"idle: {told['idle_share']:.2%}" in text
    assert text.count("stage 0 ") >= 1
    shown = [cell for line in text.splitlines() if line.startswith("stage ") for cell in line.split()[2:]]
    assert sorted(c for c in shown if c != ".") == sorted(c for row in told["table"] for c in row if c)
    assert (tmp_path / "a.svg").read_text().count("<path") > told["stages"] * told["ticks"]


@pytest.mark.parametrize(("words", "says"), [
    (["--schedule=1fb1"], "should be gpipe|1f1b|interleaved|zero_bubble"), (["--picture=a.gif"], "should end in .svg"),
    (["--stages=0"], "should be at least 1"), (["table.yaml"], "unexpected 'table.yaml'"),
])
def test_the_verb_answers_mistakes_in_one_line(words, says, capsys):
    assert main(["plan", "schedule", *words]) == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1
