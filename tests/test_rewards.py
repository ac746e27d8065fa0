"""What scores a response: each rule on tables of cases, and everything that a user's code may do wrong."""

import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxllm import config
from jaxllm.align import guarded, rewards
from jaxllm.align.rewards import Rewards, combine
from jaxllm.align.rewards_config import RewardRule, check_rewards
from jaxllm.align.rules import RULES, Failed, Sample, blocks, number
from jaxllm.errors import RunError, UserError


def sample(response: str = "", *, tokens: int = 0, ended: bool = True, prompt: str = "2 + 2 = ", **row) -> Sample:
    return Sample(prompt, response, list(range(tokens)), ended, row, [7, 8])


def score(rule: RewardRule, one: Sample):
    return RULES[rule.kind](rule, one)


# ---------------------------------------------------------------- rules

NUMBERS = {
    "72": 72, " 72. ": 72, "+7": 7, "-7": -7, "\u22127": -7, "1,234": 1234, "1,234,567.50": 1234567.5, "0.5": 0.5, ".5": 0.5, "5.": 5,
    "1e3": 1000, "-3/4": -0.75, "1 / 4": 0.25, "$12": 12, "-$12.50": -12.5, "50 %": 50, "007": 7,
    "": None, ".": None, "-": None, "1,23": None, "12,3456": None, "1 2": None, "seven": None, "1/0": None, "1e9999": None, "nan": None,
    "inf": None, "1/2/3": None, "0x10": None, "9" * 100_000: None, "\u0667": None, "1_000": None,
}


@pytest.mark.parametrize("text", NUMBERS, ids=lambda t: repr(t[:20]))
def test_numbers(text):
    found = number(text)
    assert found == NUMBERS[text] and (found is None) == (NUMBERS[text] is None)


EXACT = [  # settings, response, the row's answer, whether it holds
    ({}, "85", "85", True), ({}, " 85.0 ", 85, True), ({}, "1,000", "1000", True), ({}, "85", "86", False), ({}, "", "85", False),
    ({}, "Paris.", "paris", True), ({}, " New   York ", "new york", True), ({}, "London", "Paris", False),
    ({}, "7", [5, 7], True), ({}, "8", [5, 7], False), ({}, "85", 85.0, True), ({}, "0.1", 0.1, True),
    ({"compare": "number"}, "a", "a", False), ({"compare": "number"}, "3/6", "0.5", True),
    ({"compare": "text"}, "7.0", "7", False), ({"compare": "text"}, "Yes!", "yes", True),
    ({"compare": "verbatim"}, "85 ", "85", False), ({"compare": "verbatim"}, "85", "85", True), ({"compare": "verbatim"}, "085", 85, False),
    ({"extract": "separator"}, "7+8+0=15,4+3+1=8;85", "85", True), ({"extract": "separator"}, "1;2;85", "85", True),
    ({"extract": "separator"}, "85;1", "85", False), ({"extract": "separator"}, "85", "85", False),
    ({"extract": "separator", "separator": "answer is"}, "So the answer is 85.", "85", True),
    ({"extract": "gsm8k"}, "6*7=42\n#### 42", "6*7=<<6*7=42>>42\n#### 42", True), ({"extract": "gsm8k"}, "#### 1,042\nmore", "#### 1042", True),
    ({"extract": "gsm8k"}, "#### 1 #### 2", "2", True), ({"extract": "gsm8k"}, "42", "42", False), ({"extract": "gsm8k"}, "####", "", False),
    ({"extract": "final"}, "2 + 2 is 4, so the answer is 4.", "4", True), ({"extract": "final"}, "4", "4", False), ({"extract": "final"}, "The answer is Paris. Or so.", "paris", True),
    ({"extract": "last_number"}, "from 3 to $1,200 in all", 1200, True), ({"extract": "last_number"}, "none", "none", False),
    ({"extract": "regex", "pattern": r"\d+"}, "first 1 then 85", "85", True),
    ({"extract": "regex", "pattern": r"\((\w)\)"}, "(A) no, (B)", "B", True), ({"extract": "regex", "pattern": r"\((\w)\)"}, "B", "B", False),
    ({"extract": "regex", "pattern": r"(x)|y"}, "y", "x", False),
    ({"answer_key": "target"}, "85", "85", Failed),
]


@pytest.mark.parametrize(("settings", "response", "answer", "holds"), EXACT)
def test_exact_answers(settings, response, answer, holds):
    found = score(RewardRule(kind="exact", **settings), sample(response, answer=answer))
    assert isinstance(found, Failed) if holds is Failed else found == float(holds)


def test_a_row_without_an_answer_is_no_wrong_answer():
    for row in ({}, {"answer": None}, {"answer": []}, {"answer": {"a": 1}}, {"answer": [1, None]}):
        assert "'answer'" in score(RewardRule(kind="exact"), sample("None", **row))


REGEX = [("abc", {}, "xabcx", True), ("abc", {"full": True}, "xabcx", False), ("a.c", {"full": True}, "abc", True),
         ("(?i)ABC", {}, "abc", True), (r"^\d+$", {}, "12a", False), ("", {}, "", True)]


@pytest.mark.parametrize(("pattern", "settings", "response", "holds"), REGEX)
def test_patterns(pattern, settings, response, holds):
    assert score(RewardRule(kind="regex", pattern=pattern, **settings), sample(response)) == float(holds)


LENGTH = [
    ({"limit": 10}, [(0, 1), (10, 1), (11, 0)]), ({"limit": 10, "soft": 4}, [(10, 1), (11, 0.75), (13, 0.25), (14, 0), (99, 0)]),
    ({"target": 10}, [(9, 0), (10, 1), (11, 0)]), ({"target": 10, "soft": 5}, [(4, 0), (5, 0), (6, 0.2), (10, 1), (12, 0.6), (15, 0)]),
    ({"target": 10, "limit": 10, "soft": 5}, [(8, 0.6), (12, 0.6)]), ({"limit": 0}, [(0, 1), (1, 0)]),
]


@pytest.mark.parametrize(("settings", "cases"), LENGTH)
def test_lengths(settings, cases):
    rule = RewardRule(kind="length", **settings)
    assert [score(rule, sample(tokens=n)) for n, _ in cases] == pytest.approx([s for _, s in cases])


def test_length_counts_what_it_says():
    one = sample("three short words", tokens=9)
    assert [score(RewardRule(kind="length", target=n, unit=unit), one) for unit, n in
            (("tokens", 9), ("characters", 17), ("words", 3))] == [1, 1, 1]


FORM = [
    ({"format": "json"}, [('{"a": 1}', 1), (" [1, 2] ", 1), ("{}", 1), ("{'a': 1}", 0), ('{"a": 1} and', 0), ("", 0), ("[NaN]", 0),
                          ("[" * 100_000, 0), ("[" + "9" * 5000 + "]", 1), ("3", 0)]),
    ({"format": "json", "keys": ("a", "b")}, [('{"a": 1, "b": 0}', 1), ('{"a": 1}', 0), ('["a", "b"]', 0)]),
    ({"format": "tags", "tags": ("x", "y")}, [("<x>1</x> text <y></y>", 1), ("<y></y><x></x>", 1), ("<x>1</x>", 0), ("</x><x><y></y>", 0),
                                              ("<x></x><y></y><x></x>", 0), ("<x><y></x></y>", 1)]),
    ({}, [("<think>a</think><answer>b</answer>", 1), (" <think>\n</think>\n <answer></answer>\n", 1), ("<answer>b</answer><think>a</think>", 0),
          ("<think>a</think><answer>b</answer>.", 0), ("Hm <think>a</think><answer>b</answer>", 0), ("<think>a<answer>b</answer></think>", 0),
          ("<think><think>a</think><answer>b</answer>", 0), ("<think>a</think>b<answer>b</answer>", 0), ("", 0)]),
]


@pytest.mark.parametrize(("settings", "cases"), FORM)
def test_formats(settings, cases):
    rule = RewardRule(kind="format", **settings)
    assert [(text, score(rule, sample(text))) for text, _ in cases] == cases


def test_blocks_give_their_contents():
    assert blocks("<a>1</a> <b>2</b>", ("a", "b")) == ["1", "2"]


def test_right_and_wrong_have_the_scores_asked_for():
    rule = RewardRule(kind="exact", score=2.0, otherwise=-0.5, must_end=True)
    assert score(rule, sample("4", answer=4)) == 2.0
    assert score(rule, sample("4", answer=4, ended=False)) == -0.5


# ---------------------------------------------------------------- settings

WRONG = [
    ({"kind": "regex"}, "pattern=null: should be a regular expression"), ({"kind": "regex", "pattern": "("}, "pattern=(: should be a regular"),
    ({"kind": "exact", "extract": "regex"}, "pattern=null: should be there"), ({"kind": "exact", "separator": "#"}, "separator=#: should be left out, or"),
    ({"kind": "length"}, "target=null: should be a number, or give limit"), ({"kind": "length", "limit": -1}, "limit=-1: should be 0 or more"),
    ({"kind": "length", "limit": 5, "soft": -1}, "soft=-1: should be 0"),
    ({"kind": "python"}, "function=null: should be path/to/file.py:function"), ({"kind": "python", "function": "rewards.py"}, "function=rewards.py: should be path"),
    ({"kind": "python", "function": "a.py:f", "timeout": 0}, "timeout=0"), ({"kind": "python", "function": "a.py:f", "sample_timeout": 70}, "sample_timeout=70: should be above 0 seconds, and at most timeout=60"),
    ({"kind": "model"}, "run=null: should be the run folder"), ({"kind": "exact", "weight": math.inf}, "weight=inf: should be finite"),
    ({"kind": "exact", "on_error": math.nan}, "on_error=nan: should be finite"), ({"kind": "exact", "max_errors": -1}, "max_errors=-1"),
    ({"kind": "format", "tags": ("a", "a")}, "tags=('a', 'a'): should be names that differ"), ({"kind": "format", "tags": ("<a>",)}, "should be names of letters"),
    ({"kind": "format", "tags": ()}, "at least one name"), ({"kind": "format", "keys": ("a",)}, "keys=('a',): should be left out, or format=json"),
    ({"kind": "exact", "timeout": 3.0, "sample_timeout": 2.0}, "timeout=3.0: should be left out, or extract=regex"), ({"kind": "format", "format": "json", "tags": ("a",)}, "should be left out, or format=tags"),
    ({"kind": "exact", "objectives": {"helpful": 1.0}}, "should be left out with kind=exact: it belongs to kind=model"),
    ({"kind": "length", "limit": 5, "pattern": "a"}, "pattern=a: should be left out with kind=length: it belongs to kind=exact|regex"),
    ({"kind": "exact", "function": "a.py:f"}, "function=a.py:f: should be left out with kind=exact: it belongs to kind=python"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=r"^rewards\.right\.") as e:
        check_rewards({"fine": RewardRule(kind="exact"), "right": RewardRule(**settings)})
    assert message in str(e.value)
    with pytest.raises(UserError):
        Rewards({"right": RewardRule(**settings)})


def test_every_kind_has_a_rule_that_passes():
    check_rewards({"a": RewardRule(kind="exact", extract="regex", pattern="a"), "b": RewardRule(kind="regex", pattern="a", full=True),
                   "c": RewardRule(kind="length", limit=4, soft=2, unit="words"), "d": RewardRule(kind="format", format="json", keys=("a",)),
                   "e": RewardRule(kind="python", function="a/b.py:f", dicts=True), "f": RewardRule(kind="model", run="runs/reward", step=3)})


def test_settings_are_read_from_yaml_and_flags(tmp_path):
    import dataclasses

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Verb:
        rewards: dict[str, RewardRule] = dataclasses.field(default_factory=dict)

    path = tmp_path / "c.yaml"
    path.write_text("rewards:\n  right: {kind: exact, extract: separator, compare: verbatim}\n  short: {kind: length, limit: 20}\n")
    cfg = config.load(Verb, str(path), ["--rewards.short.weight=0.5"[2:], "rewards.right.separator=;;"])
    check_rewards(cfg.rewards)
    assert cfg.rewards["right"].separator == ";;" and cfg.rewards["short"].weight == 0.5
    with pytest.raises(UserError, match="kind"):
        config.load(Verb, str(path), ["rewards.short.kind=lenght"])
    with pytest.raises(UserError, match="missing"):
        config.load(Verb, None, ["rewards.new.weight=1"])


# ---------------------------------------------------------------- the sum


def test_rewards_are_weighted_and_summed_in_float32():
    rules = {"right": RewardRule(kind="exact", weight=2.0), "short": RewardRule(kind="length", limit=2, soft=4, weight=-0.5),
             "seen": RewardRule(kind="regex", pattern="4", weight=0.0)}
    with Rewards(rules) as made:
        scored = made([sample("4", tokens=3, answer=4), sample("5", tokens=2, answer=4)])
    assert scored.score_B.dtype == np.float32 and scored.score_B.tolist() == [2 - 0.375, -0.5]
    assert {name: part.tolist() for name, part in scored.part_B.items()} == {"right": [1, 0], "short": [0.75, 1], "seen": [1, 0]}
    assert all(part.dtype == np.float32 for part in scored.part_B.values()) and not scored.incidents


def test_a_sum_of_scores_of_another_number_is_refused():
    with pytest.raises(ValueError, match="'a' has scores of shape"):
        combine({"a": [1.0]}, {"a": 1.0}, 2)
    assert combine({}, {}, 2)[0].tolist() == [0, 0]


def test_a_model_reads_prompt_and_response():
    seen = []

    def model(tokens):
        seen.append(tokens)
        return np.array([0.25, np.nan], np.float32)

    rules = {"liked": RewardRule(kind="model", run="runs/reward", on_error=-1.0)}
    with Rewards(rules, models={"liked": model}) as made:
        scored = made([sample(tokens=2), sample(tokens=1)])
    assert seen == [[[7, 8, 0, 1], [7, 8, 0]]]
    assert scored.score_B.tolist() == [0.25, -1.0] and "nan" in str(scored.incidents[0])
    with pytest.raises(ValueError, match="liked"):
        Rewards(rules)


def test_an_empty_batch_has_no_scores():
    with Rewards({"right": RewardRule(kind="exact"), "seen": RewardRule(kind="regex", pattern="4")}) as made:
        assert made([]).score_B.shape == (0,)


# ---------------------------------------------------------------- a user's code

CODE = '''
import os, sys, threading, time
from dataclasses import dataclass

@dataclass
class Thing:
    x: int

CALLS = []

def length(samples): return [len(s.response) for s in samples]
def of_dicts(samples): return [float(s["row"]["answer"]) + len(s["prompt_tokens"]) for s in samples]
def bad(act):
    def reward(samples):
        CALLS.append(1)
        return [act(s) if s.response == "bad" else 1.0 for s in samples]
    return reward
def boom(s): raise RuntimeError("no\\nluck" + "!" * 10_000)
def sleep(s): time.sleep(3600)
def spin(s):
    while True: pass
def leave(s): sys.exit(3)
def die(s): os._exit(4)
def recurse(s): return recurse(s)
class Odd(Exception):
    def __str__(self): raise ValueError
def odd(s): raise Odd
def interrupt(s): raise KeyboardInterrupt
raises, sleeps, spins, exits, dies, recurses, odds, interrupts = map(bad, (boom, sleep, spin, leave, die, recurse, odd, interrupt))
nan, inf, none, text, flag, huge = (bad(lambda s, v=v: v) for v in (float("nan"), float("-inf"), None, "1.0", True, 10 ** 400))
things = bad(lambda s: Thing(1))
def nothing(samples): return None
def one(samples): return 1.0
def word(samples): return "1" * len(samples)
def fewer(samples): return [1.0] * (len(samples) - 1) if len(samples) > 1 else [1.0]
def always_fewer(samples): return []
def endless(samples):
    while True: yield 1.0
def prints(samples):
    print("x" * 100_000_000); print("to stderr", file=sys.stderr); os.write(1, b"y" * 100_000); os.system("echo z; echo z >&2")
    return [1.0 for s in samples]
def child(samples):
    os.system("sleep 3600 & echo $! > child.txt"); time.sleep(3600)
def threads(samples):
    threading.Thread(target=time.sleep, args=(3600,)).start(); return [1.0 for s in samples]
def numpys(samples):
    import numpy as np
    return np.ones(len(samples), np.float32) * np.float32(0.5)
def arrays(samples):
    import numpy as np
    return [np.array(0.5), np.float64(0.5), np.int32(1), np.ones(2)][: len(samples)]
def jax_here(samples):
    return [float("jax" in sys.modules) + float("numpy" in sys.modules) for s in samples]
def scribbles(samples):
    for fd in range(3, 30):
        try: os.write(fd, b"hello world, this is no answer at all\\n" * 10)
        except OSError: pass
    time.sleep(3600)
def closes(samples):
    os.closerange(3, 30); time.sleep(3600)
def forks(samples):
    os.fork()
    return [1.0 for s in samples]
def counts(samples):
    return [float(len(CALLS)) for s in samples]
'''


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "mine.py"
    path.write_text(CODE)
    return path


def rule(code, name: str, **settings) -> RewardRule:
    return RewardRule(kind="python", function=f"{code}:{name}", **{"timeout": 30.0, "on_error": -1.0} | settings)


SHORT = {"timeout": 3.0, "sample_timeout": 0.8}  # for code that never ends; what ends has to be done within it on a busy machine


BATCH = [sample("fine", answer=1), sample("bad", prompt="a prompt that is too long to be shown as a whole in one line of a log"), sample("fine", answer=3)]
FAILS = {  # function -> what the incident says
    "raises": "RuntimeError: no luck!!!", "sleeps": "took longer than 0.8 s", "spins": "took longer than 0.8 s", "exits": "SystemExit: 3",
    "dies": "ended its process (exit code 4)", "recurses": "RecursionError", "odds": "Odd: (its message cannot be made)",
    "interrupts": "KeyboardInterrupt", "nan": "nan, should be finite", "inf": "-inf, should be finite", "none": "None, should be a number",
    "text": "str, should be a number", "things": "Thing, should be a number", "huge": "OverflowError",
}


@pytest.mark.parametrize("name", FAILS)
def test_a_sample_that_fails_is_named_and_costs_no_other(code, name):
    with Rewards({"mine": rule(code, name, **(SHORT if name in ("sleeps", "spins") else {}))}) as made:
        scored = made(BATCH)
        assert scored.score_B.tolist() == [1, -1, 1]
        (incident,) = scored.incidents
        assert (incident.source, incident.index) == ("rewards.mine", 1) and BATCH[1].prompt.startswith(incident.prompt)
        assert FAILS[name] in incident.reason and "\n" not in str(incident) and len(str(incident)) < 500
        assert made(BATCH[:1]).score_B.tolist() == [1]  # it goes on


def test_a_place_in_the_users_file_is_named(code):
    with Rewards({"mine": rule(code, "raises")}) as made:
        line = CODE.split("\n").index('def boom(s): raise RuntimeError("no\\nluck" + "!" * 10_000)') + 1
        assert f"(mine.py, line {line})" in made(BATCH).incidents[0].reason


WHOLE = {"nothing": "returned None, should be a list of 1 numbers", "one": "returned float", "word": "returned str", "always_fewer": "returned 0 scores of 1",
         "endless": "returned more than 1 scores of 1"}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_no_list_of_scores_fails_for_all(code, name):
    with Rewards({"mine": rule(code, name)}) as made:
        scored = made(BATCH)
    assert scored.score_B.tolist() == [-1, -1, -1] and [i.index for i in scored.incidents] == [0, 1, 2]
    assert all(WHOLE[name] in i.reason for i in scored.incidents)


def test_scores_of_another_number_are_asked_for_one_by_one(code):
    with Rewards({"mine": rule(code, "fewer")}) as made:
        assert made(BATCH).score_B.tolist() == [1, 1, 1]
    with Rewards({"mine": rule(code, "fewer", retry=False)}) as made:
        scored = made(BATCH)
    assert scored.score_B.tolist() == [-1, -1, -1] and "returned 2 scores of 3 samples (the batch of 3)" in str(scored.incidents[2])


GOOD = {"length": [4, 3, 4], "flag": [1, 1, 1], "numpys": [0.5, 0.5, 0.5], "arrays": [0.5, 0.5, 1], "threads": [1, 1, 1], "jax_here": [0, 0, 0]}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_as_good_as_a_list_of_numbers(code, name):
    with Rewards({"mine": rule(code, name)}) as made:  # numpy is imported in the call
        scored = made(BATCH)
    assert scored.score_B.tolist() == GOOD[name] and not scored.incidents


def test_samples_come_as_dicts_where_asked(code):
    with Rewards({"mine": rule(code, "of_dicts", dicts=True)}) as made:
        assert made([BATCH[0], BATCH[2]]).score_B.tolist() == [3, 5]


def test_an_array_in_place_of_a_number(code):
    with Rewards({"mine": rule(code, "arrays")}) as made:
        scored = made([*BATCH, sample()])
    assert scored.score_B.tolist() == [0.5, 0.5, 1, -1] and "array" in str(scored.incidents[0])


def test_what_is_printed_goes_to_a_file_and_not_beyond_a_megabyte(code, tmp_path, capfd):
    with Rewards({"mine": rule(code, "prints")}, output=tmp_path / "rewards") as made:
        assert made(BATCH).score_B.tolist() == [1, 1, 1]
    assert (tmp_path / "rewards" / "mine.txt").stat().st_size == 1 << 20
    assert capfd.readouterr() == ("", "")


def test_a_process_that_is_started_again_has_forgotten(code):
    """What a function remembers is lost with its process, and only then."""
    with Rewards({"mine": rule(code, "counts")}) as made:
        reward = made._by_name["mine"]
        assert made(BATCH).score_B.tolist() == [0, 0, 0]
        before = reward._code._process.pid
        made(BATCH)
        assert reward._code._process.pid == before
        os.kill(before, signal.SIGKILL)  # as the kernel does where memory ends
        scored = made(BATCH)
        assert not scored.incidents and reward._code._process.pid != before


def test_time_for_a_batch_bounds_the_scoring_one_by_one(code):
    with Rewards({"mine": rule(code, "sleeps", timeout=0.6, sample_timeout=0.4)}) as made:
        scored = made([sample("bad")] * 20)
    reasons = [i.reason for i in scored.incidents]
    assert len(reasons) == 20 and sum("took longer than 0." in reason for reason in reasons) == 2  # 0.4 s, and the 0.2 s that are left
    assert reasons[2:] == ["not tried: those before it took longer than timeout=0.6 s"] * 18


def test_what_the_code_started_ends_with_it(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Rewards({"mine": rule(code, "child", timeout=1.0, sample_timeout=1.0)}) as made:
        made(BATCH[:1])
    pid = int((tmp_path / "child.txt").read_text())
    for _ in range(50):
        if not alive(pid):
            break
        time.sleep(0.1)
    assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_too_many_errors_end_the_run(code):
    with Rewards({"mine": rule(code, "none", max_errors=2)}) as made:
        made(BATCH)
        made(BATCH)
        assert made.errors == {"mine": 2}
        with pytest.raises(RunError, match=r"could not score 3 samples, more than rewards.mine.max_errors=2; the last: .*sample 1") as e:
            made(BATCH)
    assert [one["index"] for one in e.value.result["incidents"]] == [1]


def test_what_is_written_to_the_way_between_the_processes(code):
    for name in ("scribbles", "closes"):
        with Rewards({"mine": rule(code, name)}) as made:
            scored = made([sample()])
        assert scored.score_B.tolist() == [-1] and "its process" in str(scored.incidents[0]), name


def test_a_copy_of_the_process_answers_nothing(code):
    with Rewards({"mine": rule(code, "forks"), "other": rule(code, "length")}) as made:
        for n in (1, 2, 3, 2, 1):
            scored = made(BATCH[:1] * n)
            assert scored.part_B["mine"].tolist() == [1] * n and not scored.incidents


def test_errors_of_an_earlier_part_of_the_run_count(code):
    with Rewards({"mine": rule(code, "none", max_errors=5)}) as made:
        made.errors = {"mine": 5}
        with pytest.raises(RunError, match="could not score 6"):
            made(BATCH)


def test_samples_are_not_tried_when_too_many_failed(code):
    with Rewards({"mine": rule(code, "raises", max_errors=1)}) as made, pytest.raises(RunError, match="not tried: more than max_errors"):
        made([sample("bad")] * 300)


def test_a_pattern_that_takes_for_ever_is_stopped():
    rules = {"slow": RewardRule(kind="regex", pattern=r"(a+)+$", on_error=-1.0, **SHORT),
             "found": RewardRule(kind="exact", extract="regex", pattern=r"a+(b)")}
    with Rewards(rules) as made:
        assert all(isinstance(reward, rewards.UserReward) for reward in made._by_name.values())
        scored = made([sample("aaa", answer="b"), sample("a" * 60 + "!b", answer="b"), sample("aab", answer="b")])
    assert scored.part_B["slow"].tolist() == [1, -1, 0] and scored.part_B["found"].tolist() == [0, 0, 1]
    assert [(i.source, i.index) for i in scored.incidents] == [("rewards.slow", 1)]


LOADS = {
    "missing.py:f": "missing.py:f: no such file; ", "mine.py:lenght": "the file has no such function; did you mean 'length'?",
    "syntax.py:f": "cannot be loaded: SyntaxError", "raises.py:f": "cannot be loaded: ModuleNotFoundError: No module named 'nowhere' (raises.py, line 2)",
    "leaves.py:f": "cannot be loaded: SystemExit: 1", "mine.py:CALLS": "the file has no such function",
}


@pytest.mark.parametrize("function", LOADS)
def test_a_function_that_cannot_be_loaded_is_the_users_mistake(code, function):
    for name, text in (("syntax", "def f(:"), ("raises", "\nimport nowhere"), ("leaves", "import sys; sys.exit(1)")):
        (code.parent / f"{name}.py").write_text(text)
    with pytest.raises(UserError) as e:
        Rewards({"mine": RewardRule(kind="python", function=f"{code.parent}/{function}")})
    assert LOADS[function] in str(e.value) and str(e.value).startswith("rewards.mine: ") and "\n" not in str(e.value)


def test_a_file_may_import_what_stands_beside_it(code):
    (code.parent / "beside.py").write_text("SCORE = 0.75")
    (code.parent / "user.py").write_text("from beside import SCORE\ndef f(samples): return [SCORE for s in samples]")
    with Rewards({"mine": RewardRule(kind="python", function=f"{code.parent}/user.py:f")}) as made:
        assert made(BATCH).score_B.tolist() == [0.75] * 3


@pytest.mark.slow
def test_a_file_that_imports_much_has_its_own_time(code):
    """The process is started again after a sample that takes too long; the others have the time that was theirs."""
    (code.parent / "much.py").write_text("import time\ntime.sleep(1)\ndef f(samples):\n    for s in samples:\n        if s.response == 'bad': time.sleep(3600)\n"
                                         "    return [1.0] * len(samples)")
    with Rewards({"mine": RewardRule(kind="python", function=f"{code.parent}/much.py:f", timeout=1.2, sample_timeout=0.5)}) as made:
        assert made(BATCH).score_B.tolist() == [1, 0, 1]


@pytest.mark.slow
def test_a_killed_run_leaves_no_process(code, tmp_path):
    """Neither one that waits, nor one that is at work: that one has its time, and some seconds."""
    script = tmp_path / "run.py"
    script.write_text(f"""
import time
from jaxllm.align.guarded import Guarded
made = []
for name in ("length", "spins"):
    one = Guarded({{"call": "scores", "rule": {{"kind": "python", "function": "{code}:" + name}}}}, name)
    one.start()
    made.append(one)
    print(one._process.pid, flush=True)
made[1].call([{{"prompt": "", "response": "bad", "tokens": [], "ended": True, "row": {{}}}}], 0.9)
""")
    run = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    pids = [int(run.stdout.readline()) for _ in range(2)]
    time.sleep(0.3)
    run.kill()
    run.wait()
    run.stdout.close()
    time.sleep(0.5)
    assert not alive(pids[0])
    for _ in range(80):
        if not alive(pids[1]):
            break
        time.sleep(0.1)
    assert not alive(pids[1])


def test_ctrl_c_while_waiting_ends_the_process(code, monkeypatch):
    one = guarded.Guarded({"call": "scores", "rule": {"kind": "python", "function": f"{code}:sleeps"}}, "mine")
    one.start()
    process = one._process
    channel = one._channel

    def poll(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(channel), "poll", lambda self, seconds: poll(seconds))
    with pytest.raises(KeyboardInterrupt):
        one.call([], 5.0)
    assert process.returncode is not None and one._process is None


def test_scores_do_not_depend_on_the_process(code):
    """The same rule gives the same in this process and in its own."""
    rules = {"seen": RewardRule(kind="regex", pattern="fi")}
    with Rewards(rules) as made:
        assert made(BATCH).score_B.tolist() == [RULES["regex"](rules["seen"], s) for s in BATCH] == [1, 0, 1]
    assert rewards.Sample is Sample
