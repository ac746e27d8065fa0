"""What answers the policy: checked answers, tools and their failures, the calculator, and tasks with a known truth."""

import contextlib
import json
import random
import time
from fractions import Fraction

import pytest

from jaxllm import config
from jaxllm.align import gsm8k
from jaxllm.align.arithmetic import Arithmetic, ArithmeticConfig
from jaxllm.align.calculator import DEEPEST, CalculatorError, calculate
from jaxllm.align.environments import EnvironmentFailure, Environments
from jaxllm.align.environments_config import EnvironmentConfig
from jaxllm.align.rewards_config import RewardRule
from jaxllm.align.rules import RULES, Sample
from jaxllm.errors import UserError

# ---------------------------------------------------------------- the calculator

VALUES = {
    "1+2": "3", "2 + 3 * 4": "14", "(2+3)*4": "20", "10-2-3": "5", "100/10/5": "2", "7/2": "3.5", "1/3": "0.3333333333", "-3": "-3", "--3": "3",
    "-2^2": "-4", "2^-1": "0.5", "2**10": "1024", "2^3^2": "512", "(-2)^3": "-8", "17 % 5": "2", "-17 % 5": "3", "1,234*2": "2468", ".5+.25": "0.75",
    "6 × 7": "42", "84 ÷ 2": "42", "5 − 8": "-3", "((((1))))": "1", "0.1+0.2": "0.3", "0^0": "1", "2/3*3": "2", "12:4": "3", "1" * 150: "1" * 150,
}


@pytest.mark.parametrize("text", VALUES, ids=lambda t: t[:20])
def test_values(text):
    assert calculate(text) == VALUES[text]


NO_VALUE = {
    "": "ends early", "1+": "ends early", "1 2": "unexpected '2'", "1/0": "division by zero", "1%0": "division by zero", "0^-1": "division by zero",
    "(1": "not closed", "1)": "unexpected ')'", ")": "unexpected ')'", "*2": "unexpected '*'", "2^0.5": "no whole number",
    # names, and whatever a Python expression could do
    "x": "unexpected 'x'", "__import__('os')": "unexpected '_'", "abs(1)": "unexpected 'a'", "1e5": "unexpected 'e'", "1;2": "unexpected ';'", "1==1": "unexpected '='",
    "[1]": "unexpected '['", "'a'*9": "unexpected \"'\"", "1<2": "unexpected '<'", "0x10": "unexpected 'x'", "1_0": "unexpected '_'", "1j": "unexpected 'j'", "٣": "unexpected",
    # bombs
    "9**9**9": "too large", "9^9^9^9": "too large", "2^999999999999": "too large", "(1/3)^99999": "too large", "2^-99999": "too large", "10^(10^3)": "too large",
    "*".join(["9" * 20] * 9): "too large", "9" * 160: "too large", "9" * 201: "longer than", "(" * 100 + "1" + ")" * 99: "inside each other", "-" * 190 + "1": "inside each other",
    "2^" * 90 + "2": "inside each other", "1" + "+1" * 5000: "longer than",
}


@pytest.mark.parametrize("text", NO_VALUE, ids=lambda t: repr(t[:20]))
def test_no_values(text):
    began = time.perf_counter()
    with pytest.raises(CalculatorError) as e:
        calculate(text)
    assert NO_VALUE[text] in str(e.value) and time.perf_counter() - began < 0.1


def test_one_to_any_power_and_large_powers_within_the_bound():
    assert calculate("1^512") == "1" and calculate("2^255") == str(2**255)


def test_it_computes_as_python_does():
    """Random expressions of a grammar that both have, in exact fractions."""
    draws = random.Random(0)

    def expression(depth: int) -> str:
        if depth == 0 or draws.random() < 0.3:
            return str(draws.randrange(100))
        kind = draws.choice("+-*/%()n")
        if kind in "()":
            return f"({expression(depth - 1)})"
        if kind == "n":
            return f"-{expression(depth - 1)}"
        return f"{expression(depth - 1)}{kind}{expression(depth - 1)}"

    compared = 0
    for _ in range(2000):
        text = expression(4)
        try:
            want = eval("".join(f"Fraction({t})" if t.isdigit() else t for t in _split(text)), {"Fraction": Fraction})
        except ZeroDivisionError:
            with pytest.raises(CalculatorError, match="division by zero"):
                calculate(text)
            continue
        assert calculate(text) == (str(want.numerator) if want.denominator == 1 else f"{float(want):.10g}"), text
        compared += 1
    assert compared > 1500


def _split(text: str) -> list[str]:
    import re

    return re.findall(r"\d+|\D", text)


def test_no_text_takes_long_or_breaks_it():
    draws = random.Random(1)
    began = time.perf_counter()
    for _ in range(3000):
        text = "".join(draws.choice("0123456789+-*/%^(). ,e_") for _ in range(draws.randrange(60)))
        with contextlib.suppress(CalculatorError):
            calculate(text)
    assert time.perf_counter() - began < 5


def test_depth_has_room_for_what_people_write():
    assert calculate("(" * (DEEPEST - 1) + "7" + ")" * (DEEPEST - 1)) == "7"


# ---------------------------------------------------------------- arithmetic


def test_rows_are_a_function_of_seed_and_index():
    one, again, other = (Arithmetic(ArithmeticConfig(noise=0.35, seed=seed)) for seed in (1, 1, 2))
    for make in ("prompt", "demonstration", "preference"):
        rows = [getattr(one, make)(i) for i in range(50)]
        assert rows == [getattr(again, make)(i) for i in reversed(range(50))][::-1]
        assert sum(a == b for a, b in zip(rows, [getattr(other, make)(i) for i in range(50)], strict=True)) < 5
        assert len({row["prompt"] for row in rows}) > 40
    assert one.demonstration(3) == {"prompt": "11+15=", "response": "1+5+0=6,1+1+0=2;26", "answer": "26"}  # the same on every machine


def test_demonstrations_without_noise_are_right_to_the_letter():
    task = Arithmetic(ArithmeticConfig(digits=3))
    for i in range(300):
        row = task.demonstration(i)
        a, b = map(int, row["prompt"].rstrip("=").split("+"))
        chain, _, answer = row["response"].partition(";")
        carried = 0
        for place, step in enumerate(chain.split(",")):
            x, y = a // 10**place % 10, b // 10**place % 10
            assert step == f"{x}+{y}+{carried}={x + y + carried}"
            carried = (x + y + carried) // 10
        assert place == 2 and answer == str(a + b) == row["answer"]


def test_noise_makes_as_many_wrong_as_it_says():
    """Of n demonstrations, the right ones are binomial with (1 - noise)^digits: four standard deviations."""
    task, n = Arithmetic(ArithmeticConfig(digits=3, noise=0.2)), 4000
    rule = RewardRule(kind="exact", extract="separator", compare="verbatim")
    rows = [task.demonstration(i) for i in range(n)]
    right = sum(RULES["exact"](rule, Sample(row["prompt"], row["response"], [], True, row)) for row in rows)
    p = task.share_right()
    assert p == pytest.approx(0.512) and abs(right - n * p) < 4 * (n * p * (1 - p)) ** 0.5
    for row in rows[:300]:  # what follows builds on what is written
        steps = [step.split("=") for step in row["response"].partition(";")[0].split(",")]
        sums, carries = [int(s) for _, s in steps], [int(left.rsplit("+", 1)[1]) for left, _ in steps]
        assert carries == [0, *(s // 10 for s in sums[:-1])]
        assert all(abs(s - sum(map(int, left.split("+")))) <= 1 for s, (left, _) in zip(sums, steps, strict=True))


def test_the_splits_share_no_pair():
    task = Arithmetic(ArithmeticConfig(digits=1, held_out=0.2))
    rows = {split: {task.prompt(i, split)["prompt"] for i in range(600)} for split in ("train", "evaluation")}
    assert not rows["train"] & rows["evaluation"] and len(rows["train"] | rows["evaluation"]) == 100
    other = Arithmetic(ArithmeticConfig(digits=1, held_out=0.2, seed=7))
    assert not {other.demonstration(i)["prompt"] for i in range(600)} & rows["evaluation"]
    with pytest.raises(ValueError, match="holds no pair"):
        Arithmetic(ArithmeticConfig(held_out=0.0)).prompt(0, "evaluation")


def test_preferences_have_a_known_truth():
    task = Arithmetic(ArithmeticConfig(noise=0.35))
    rows = [task.preference(i, flip=0.2) for i in range(1000)]
    for row in rows:
        rights = [row[key].rpartition(";")[2] == row["answer"] for key in ("chosen", "rejected")]
        assert rights == [not row["flipped"], row["flipped"]]
    assert abs(sum(row["flipped"] for row in rows) - 200) < 4 * (1000 * 0.2 * 0.8) ** 0.5
    with pytest.raises(ValueError, match="noise=0"):
        Arithmetic(ArithmeticConfig()).preference(0)


def test_a_direct_prompt_stands_where_the_chain_ends():
    task = Arithmetic(ArithmeticConfig(noise=0.3))
    for i in range(20):
        row, direct = task.demonstration(i), task.demonstration(i, direct=True)
        assert direct["prompt"] == row["prompt"] + ";" and row["response"].endswith(";" + direct["response"])
        assert task.prompt(i, direct=True)["prompt"] == task.prompt(i)["prompt"] + ";"


@pytest.mark.parametrize("settings", [{"digits": 0}, {"noise": 1.5}, {"held_out": 1.0}])
def test_wrong_settings_of_arithmetic(settings):
    with pytest.raises(ValueError, match=f"arithmetic.{next(iter(settings))}="):
        ArithmeticConfig(**settings)


# ---------------------------------------------------------------- GSM8K's format


def test_the_format_is_read(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "How many?", "answer": "Half of 48 is 48/2=<<48/2=24>>24.\n#### 1,024"}) + "\n")
    (row,) = gsm8k.read_gsm8k(str(path))
    assert row == {"prompt": "How many?", "answer": "1,024", "rationale": "Half of 48 is 48/2=<<48/2=24>>24."}
    assert gsm8k.without_notes(row["rationale"]) == "Half of 48 is 48/2=24."
    assert gsm8k.with_calls(row["rationale"]) == "Half of 48 is 48/2=<calc>48/2</calc><result>24</result>24."


@pytest.mark.parametrize(("line", "message"), [
    ('{"question": "a"}', ':1: should have "question" and "answer" as text; found question'), ('{"question": "a", "answer": 3}', "as text; found answer, question"),
    ('{"question": "a", "answer": "3"}', ':1: "answer" has no "#### n"'), ("[]", ":1: should be a JSON object")])
def test_what_is_not_in_the_format(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(UserError) as e:
        list(gsm8k.read_gsm8k(str(tmp_path / "q.jsonl")))
    assert message in str(e.value)


def test_gsm8k_itself(shared_data):
    """All rows have a number; a model's answer in the same form is right; the calculator agrees with all notes but one, a fraction."""
    rows = list(gsm8k.read_gsm8k(str(shared_data / "gsm8k" / "test.jsonl.gz")))
    assert len(rows) == 1319
    rule = RewardRule(kind="exact", extract="gsm8k", compare="number")
    for row in rows:
        assert RULES["exact"](rule, Sample("", f"{row['rationale']}\n#### {row['answer']}.00", [], True, row)) == 1
        assert RULES["exact"](rule, Sample("", f"{row['rationale']}\n#### {row['answer']}1", [], True, row)) == 0
    notes = [found for row in rows for found in gsm8k.NOTE.findall(row["rationale"])]
    agree = 0
    for left, right in notes:
        with contextlib.suppress(CalculatorError, ValueError):
            agree += abs(float(calculate(left)) - float(right.replace(",", ""))) < 0.01
    assert len(notes) > 4000 and agree >= len(notes) - 1


# ---------------------------------------------------------------- environments


def test_one_turn_is_checked_against_the_row():
    with Environments(EnvironmentConfig(kind="answer", answer=RewardRule(kind="exact", extract="separator", score=2.0))) as made:
        one = made.make()
        assert one.reset({"prompt": "1+1=", "answer": "2"}) == "1+1=" and one.step("1+1+0=2;2") == ("", True, 2.0)
        assert made.make().reset({"prompt": [{"role": "user", "content": "?"}]}) == [{"role": "user", "content": "?"}]
        other = made.make()
        other.reset({"prompt": "1+1="})
        with pytest.raises(EnvironmentFailure, match="'answer'"):
            other.step("2")


def tools(**settings) -> EnvironmentConfig:
    return EnvironmentConfig(kind="tools", **settings)


CALLS = [
    ("<calc>1+2</calc>", "<result>3</result>"), ("So <calc> 2*(3+4) </calc>\n", "<result>14</result>"), ("<calc>1/0</calc>", "<result>error: division by zero</result>"),
    ("<calc>x</calc>", "<result>error: unexpected 'x'</result>"), ("<calc>1</calc><calc>2</calc>", "<result>2</result>"), ("<calc><calc>5</calc>", "<result>5</result>"),
    ("<calc></calc>", "<result>error: it ends early</result>"),
]


@pytest.mark.parametrize(("turn", "says"), CALLS)
def test_the_calculator_answers(turn, says):
    with Environments(tools()) as made:
        one = made.make()
        one.reset({"prompt": "?", "answer": 3})
        assert one.step(turn) == (says, False, None) and one.trouble == []
        assert one.step("3") == ("", True, 1.0)
    assert made.stop == ["</calc>"]


@pytest.mark.parametrize("turn", ["3", "1+2</calc>", "<calc>1+2</calc> is 3", "<calc>1+2", "<sum>1</sum>", "", "<calc>1</calc></calc>"])
def test_what_calls_no_tool_ends_the_episode(turn):
    with Environments(tools()) as made:
        one = made.make()
        one.reset({"prompt": "?", "answer": 3})
        assert one.step(turn) == ("", True, float(turn == "3"))


CODE = '''
import os, time, sys
def upper(text): return text.upper()
def raises(text): raise ValueError("no such thing")
def sleeps(text): time.sleep(3600)
def dies(text): os._exit(1)
def number(text): return 3
def leaves(text): sys.exit(0)
def long(text): print("x" * 10_000_000); return "y" * 10_000_000

class Guess:
    """Says higher or lower; the score counts the turns."""
    def reset(self, row):
        self.row, self.turns = row, 0
        return row["prompt"]
    def step(self, text):
        self.turns += 1
        if text == "sleep": time.sleep(3600)
        if text == "die": os._exit(1)
        if text == "raise": raise ValueError("no such guess")
        if text == "nan": return "", True, float("nan")
        if text == "bad": return None
        if text == "odd": return 3, False, None
        if int(text) == self.row["answer"]: return "", True, 1 / self.turns
        return "higher" if int(text) < self.row["answer"] else "lower", False, None

class Bad:
    def reset(self, row): return 3
class Broken:
    def __init__(self): raise RuntimeError("not today")
'''


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "mine.py"
    path.write_text(CODE)
    return path


TOOLS = {"upper": ("ABC", None), "raises": ("error: ValueError: no such thing (mine.py, line 4)", None), "number": ("error: TypeError: returned int, should be text", None),
         "leaves": ("error: SystemExit: 0 (mine.py, line 8)", None), "sleeps": ("error: no answer", "took longer than 0.8 s"), "dies": ("error: no answer", "ended its process (exit code 1)"),
         "long": ("y" * 50, None)}


@pytest.mark.parametrize("name", TOOLS)
def test_a_users_tool(code, name):
    says, trouble = TOOLS[name]
    with Environments(tools(tools={name: f"{code}:{name}", "calc": "calculator"}, timeout=0.8 if name == "sleeps" else 20.0, max_result=50)) as made:
        one = made.make()
        one.reset({"prompt": "?", "answer": 3})
        assert one.step(f"<{name}>abc</{name}>") == (f"<result>{says[:50]}</result>", False, None)
        assert one.trouble == ([f"tool {name!r}: {trouble}"] if trouble else [])
        assert one.step("<calc>1+2</calc>").text == "<result>3</result>" and one.step("3").score == 1


def test_a_users_environment(code):
    with Environments(EnvironmentConfig(kind="python", function=f"{code}:Guess", timeout=20.0)) as made:
        one, other = made.make(), made.make()
        assert one.reset({"prompt": "a number", "answer": 7}) == "a number"
        other.reset({"prompt": "b", "answer": 1})
        assert one.step("5") == ("higher", False, None) and other.step("5") == ("lower", False, None)
        assert one.step("9") == ("lower", False, None) and one.step("7") == ("", True, pytest.approx(1 / 3))
        assert other.step("1").score == 0.5


FAILS = {"sleep": "took longer than 0.8 s", "die": "ended its process", "raise": "ValueError: no such guess", "nan": "a score that is nan, should be finite",
         "bad": "step returned NoneType, should be (text, done, score)", "odd": "step returned int, should be text first"}


@pytest.mark.parametrize("turn", FAILS)
def test_an_environment_that_fails_costs_no_other_its_place(code, turn):
    """The others' process may be gone: they are played again up to where they were."""
    with Environments(EnvironmentConfig(kind="python", function=f"{code}:Guess", timeout=0.8 if turn == "sleep" else 20.0)) as made:
        one, other = made.make(), made.make()
        one.reset({"prompt": "a", "answer": 7})
        other.reset({"prompt": "b", "answer": 1})
        other.step("5")
        with pytest.raises(EnvironmentFailure) as e:
            one.step(turn)
        assert FAILS[turn] in str(e.value)
        assert other.step("4") == ("lower", False, None) and other.step("1") == ("", True, pytest.approx(1 / 3))


def test_an_environment_that_cannot_begin(code):
    for name, message in (("Bad", "reset returned int, should be text or messages"), ("Broken", "RuntimeError: not today")):
        with Environments(EnvironmentConfig(kind="python", function=f"{code}:{name}")) as made, pytest.raises(EnvironmentFailure) as e:
            made.make().reset({"prompt": "a"})
        assert message in str(e.value)
    with pytest.raises(UserError, match=r"environment.function: .*did you mean 'Guess'"):
        Environments(EnvironmentConfig(kind="python", function=f"{code}:Gues"))
    with pytest.raises(UserError, match=r"environment.tools.x: .*no such file"):
        Environments(tools(tools={"x": "nowhere.py:x"}))


WRONG = [
    ({"kind": "tools", "tools": {}}, "environment.tools={}: should be at least one tool"), ({"kind": "tools", "tools": {"x": "calc"}}, "environment.tools.x=calc: should be calculator, or"),
    ({"kind": "tools", "tools": {"<x>": "calculator"}}, "should be named with letters"), ({"kind": "python"}, "environment.function=null: should be there"),
    ({"kind": "python", "function": "a.py"}, "environment.function=a.py: should be path/to/file.py:Class"), ({"function": "a.py:B"}, "and only then"),
    ({"kind": "answer", "answer": RewardRule(kind="length", limit=3)}, "environment.answer.kind=length: should be exact or format"),
    ({"kind": "answer", "answer": RewardRule(kind="exact", extract="regex", pattern="a")}, "environment.answer.extract=regex: should be without a pattern"),
    ({"kind": "answer", "answer": RewardRule(kind="exact", must_end=True)}, "environment.answer.must_end=True"), ({"kind": "answer", "answer": RewardRule(kind="exact", keys=("a",))}, "environment.answer.keys="),
    ({"kind": "answer", "max_turns": 3}, "environment.max_turns=3: should be left out with kind=answer"), ({"tools": {"x": "calculator"}}, "should be left out with kind=none"),
    ({"kind": "python", "function": "a.py:B", "answer": RewardRule(kind="format")}, "should be left out with kind=python"), ({"kind": "tools", "max_turns": 0}, "environment.max_turns=0: should be at least 1"), ({"kind": "tools", "timeout": 0}, "environment.timeout=0: should be above"), ({"max_errors": -1}, "environment.max_errors=-1"),
    ({"unfinished": float("nan")}, "environment.unfinished=nan"), ({"kind": "tools", "max_result": 0}, "environment.max_result=0"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError) as e:
        EnvironmentConfig(**settings)
    assert message in str(e.value)


def test_settings_come_from_flags_and_have_help():
    import dataclasses

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Verb:
        environment: EnvironmentConfig = dataclasses.field(default_factory=EnvironmentConfig)

    cfg = config.load(Verb, None, ["environment.kind=tools", "environment.tools.upper=a.py:upper", "environment.answer.extract=gsm8k"])
    assert cfg.environment.tools["upper"] == "a.py:upper" and cfg.environment.answer.extract == "gsm8k"
    assert "--environment.answer.extract=whole|separator|gsm8k|final|last_number|regex" in config.help_text(Verb, "usage")
