"""The tasks of benchmarks/instruction_tuning.py, how they are asked and scored, and that no question is in training data."""

import json
import pathlib
import random
import sys

import pytest

from jaxllm.data.instruction_config import InstructionData, InstructionSource
from jaxllm.data.instructions import read_instructions

sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))

from instruction_tuning import asked, check_apart, listed
from instruction_tuning_table import clusters_of, errors_of
from synthetic_tasks import KINDS, SEEN, TASKS, UNSEEN, inputs_of, is_held_out, is_right

BY_NAME = {task.name: task for task in TASKS}


def ints(text):
    return [int(word) for word in text.replace("and", "").split()]


def kind_of(word):
    return next(kind for kind, words in KINDS.items() if word in words)


RULES = {  # whether y is the output of x, said without the makers
    "reverse": lambda x, y: [*reversed(x.split())] == y.split(),
    "ascending": lambda x, y: all(a < b for a, b in zip(ints(y), ints(y)[1:], strict=False)) and set(ints(x)) == set(ints(y)),
    "descending": lambda x, y: all(a > b for a, b in zip(ints(y), ints(y)[1:], strict=False)) and set(ints(x)) == set(ints(y)),
    "find-animal": lambda x, y: [w for w in x.split() if kind_of(w) == "animal"] == [y],
    "find-food": lambda x, y: [w for w in x.split() if kind_of(w) == "food"] == [y],
    "find-colour": lambda x, y: [w for w in x.split() if kind_of(w) == "colour"] == [y],
    "drop-first": lambda x, y: x.endswith(f" {y}") and len(y.split()) == len(x.split()) - 1,
    "drop-last": lambda x, y: x.startswith(f"{y} ") and len(y.split()) == len(x.split()) - 1,
    "double": lambda x, y: y.split()[::2] == x.split() == y.split()[1::2],
    "length": lambda x, y: x.count(" ") + 1 == int(y),
    "occurrences": lambda x, y: x.split().count(x.split()[0]) - 1 == int(y),
    "next-numbers": lambda x, y: [b - a for a, b in zip(ints(x), ints(y), strict=True)] == [1] * len(ints(x)),
    "previous-numbers": lambda x, y: [a - b for a, b in zip(ints(x), ints(y), strict=True)] == [1] * len(ints(x)),
    "next-letters": lambda x, y: all(f"{a}{b}" in "abcdefghijklmnopqrstuvwxyz" for a, b in zip(x.split(), y.split(), strict=True)),
    "contains": lambda x, y: y == ("yes" if x.split().count(x.split()[0]) > 1 else "no"),
    "lacks": lambda x, y: y == ("present" if x.split().count(x.split()[0]) > 1 else "missing"),
    "copy": lambda x, y: x == y,
    "copy-commas": lambda x, y: y.replace(",", "") == x and y.count(",") == x.count(" "),
    "sum": lambda x, y: sum(ints(x)) == int(y),
    "difference": lambda x, y: ints(x)[0] - ints(x)[1] == int(y) >= 0,
    "first-word": lambda x, y: x.startswith(f"{y} "),
    "last-word": lambda x, y: x.endswith(f" {y}"),
    "second-word": lambda x, y: x.split()[1] == y,
    "largest": lambda x, y: int(y) in ints(x) and all(i <= int(y) for i in ints(x)),
    "smallest": lambda x, y: int(y) in ints(x) and all(i >= int(y) for i in ints(x)),
    "opposites": lambda x, y: all(a != b for a, b in zip(x.split(), y.split(), strict=True)) and undone(x, y),
    "plurals": lambda x, y: all(b.startswith(a[:-1]) and b.endswith("s") for a, b in zip(x.split(), y.split(), strict=True)),
    "first-letters": lambda x, y: all(w.startswith(c) and len(c) == 1 for w, c in zip(x.split(), y.split(), strict=True)),
    "last-letters": lambda x, y: all(w.endswith(c) and len(c) == 1 for w, c in zip(x.split(), y.split(), strict=True)),
}
FIXED = {"opposites": {"hot": "cold", "cold": "hot", "left": "right", "foolish": "wise"},
         "plurals": {"city": "cities", "fox": "foxes", "valley": "valleys", "dog": "dogs"}}


def undone(x, y):
    pairs = dict(pair for row in BY_NAME["opposites"].rows(300, held_out=False)
                 for pair in zip(row["x"].split(), row["y"].split(), strict=True))
    return [pairs[pairs[word]] for word in x.split()] == x.split() and [pairs[word] for word in x.split()] == y.split()


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_output_follows_from_its_input_by_the_tasks_rule(task):
    rows = task.rows(40, held_out=True) + task.rows(40, held_out=False)
    wrong = [row for row in rows if not RULES[task.name](row["x"], row["y"])]
    assert not wrong
    said = {x: y for row in task.rows(200, held_out=False) if task.name in FIXED
            for x, y in zip(row["x"].split(), row["y"].split(), strict=True)}
    assert FIXED.get(task.name, {}).items() <= said.items()


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_questions_are_apart_from_what_is_trained_on_and_there_are_enough(task):
    questions, trained = task.rows(200, held_out=True), task.rows(700, held_out=False)
    assert len({row["x"] for row in questions}) == 200 and all(is_held_out(row["x"]) for row in questions)
    assert not any(is_held_out(row["x"]) for row in trained) and len({row["x"] for row in trained}) == 700
    assert len(set(map(json.dumps, task.templates()))) == 8 and all("{x}" in one["input"] for one in task.templates())
    documents = [task.document(random.Random(i)) for i in range(60)]
    assert all(len(inputs_of(text)) == 10 and not any(map(is_held_out, inputs_of(text))) for text in documents)


def test_a_question_in_training_data_and_a_list_worded_as_an_instruction_are_found():
    task = BY_NAME["largest"]
    x, y = task.rows(20, held_out=True)[3].values()
    lists = [task.document(random.Random(i)) for i in range(50)]
    check_apart([task], lists, ["1 2 3"], 20)
    with pytest.raises(AssertionError, match="in the data of tuning"):
        check_apart([task], lists, ["1 2 3", x], 20)
    for line in (f"- {x} -> {y}\n", f"- {x} = {y}\n", f"Input: {x}\nOutput: {y}\n", f" {x}\n {y}\n\n", f"Largest numbers\n\n- {x} : {y}\n"):
        with pytest.raises(AssertionError, match="in a list of pretraining"):
            check_apart([task], [*lists, line], ["1 2 3"], 20)
    with pytest.raises(AssertionError, match="worded as an instruction"):
        check_apart([task], [*lists, "Write the largest number\n\n- 1 2 -> 2\n"], ["1 2 3"], 20)


def test_clusters_are_either_tuned_on_or_measured_and_held_out_ones_are_never_trained_on(tmp_path):
    assert {task.cluster for task in TASKS} == {*SEEN, *UNSEEN} and not {*SEEN} & {*UNSEEN}
    for task in TASKS:
        file = {"name": task.name, "cluster": task.cluster, "rows": task.rows(5, held_out=False), "templates": task.templates()}
        (tmp_path / f"{task.name}.json").write_text(json.dumps(file), encoding="utf-8")
    source = InstructionSource(path=str(tmp_path))
    found = read_instructions(InstructionData(sources={"tasks": source}, hold_out=[*UNSEEN, *SEEN[3:]], validation=0))
    assert {member.cluster for member in found.train} == {*SEEN[:3]}
    assert {member.cluster for member in found.unseen} == {*UNSEEN, *SEEN[3:]}


@pytest.mark.parametrize("shots", [0, 1, 4])
def test_both_ways_to_ask_have_the_same_questions_behind_examples_for_training(shots):
    task = BY_NAME["first-letters"]
    rows, trained = task.rows(16, held_out=True), {row["x"]: row["y"] for row in task.rows(200, held_out=False)}
    for (question, answer), (text, y), row in zip(asked(task, 16, shots), listed(task, 16, shots), rows, strict=True):
        assert answer["content"].strip() == y == row["y"]
        *shown, last = question["content"].split("\n\n")
        assert len(shown) == shots and row["x"] in last and all(any(
            x in one and one.endswith(f"\n {trained[x]}") for x in trained) for one in shown)
        title, _, body = text.partition("\n\n")
        *shown, last = body.split("\n")
        assert title in task.titles and last == f"- {row['x']} ->" and len(shown) == shots
        assert all(trained[line.removeprefix("- ").partition(" -> ")[0]] == line.partition(" -> ")[2] for line in shown)
    asks = {ask.lower() for ask in task.asks}
    assert {next(ask for ask in asks if ask in q["content"].lower()) for q, _ in asked(task, 16, 0)} == asks


@pytest.mark.parametrize(("text", "right"), [
    ("dog", True), (" dog\nInput: cat", True), ("\ndog \n", True), ("dog cat", False), ("Dog", False), ("", False), ("cat\ndog", False)])
def test_an_answer_is_its_first_line_and_has_to_match_exactly(text, right):
    assert is_right(text, "dog") is right
    assert is_right(text, " dog") is right  # as templates write targets


def test_the_target_of_every_template_is_right_as_it_is_written():
    for task in TASKS:
        assert all(is_right(answer["content"], answer["content"]) for _, answer in asked(task, 8, 1))


def test_means_are_over_tasks_and_errors_are_those_of_independent_questions():
    tasks = [BY_NAME["largest"], BY_NAME["smallest"], BY_NAME["first-word"]]
    found = {"largest": 0.5, "smallest": 1.0, "first-word": 0.2}
    assert clusters_of(found, tasks) == pytest.approx({"compare": 0.75, "position": 0.2, "all": 1.7 / 3})
    errors = errors_of(found, tasks, 100)  # sqrt(p (1 - p) / n) of each, 0.05, 0 and 0.04
    assert errors == pytest.approx({"compare": 0.025, "position": 0.04, "all": (0.0025 + 0.0016) ** 0.5 / 3})
