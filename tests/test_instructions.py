"""Instruction files and tasks: what each row becomes, what is held out, and what each mistake says."""

import collections
import json
import re

import pytest

from jaxllm.data import rationale
from jaxllm.data.draws import draw, permutation, pick
from jaxllm.data.instruction_config import InstructionData, InstructionSource
from jaxllm.data.instructions import Conversations, read_instructions, read_source
from jaxllm.errors import UserError


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_task(path, rows, templates, **more):
    path.write_text(json.dumps({"rows": rows, "templates": templates} | more), encoding="utf-8")
    return str(path)


def source(path, **settings) -> InstructionSource:
    return InstructionSource(path=str(path), **settings)


def task(tmp_path, rows, templates, *, task=None, **settings):
    [member] = read_source("a", source(write_task(tmp_path / "t.json", rows, templates, **(task or {})), **settings))
    return member


def texts(example) -> tuple[str, str]:
    return example.messages[-2]["content"], example.messages[-1]["content"]


SUMS = [{"question": f"{a}+{b}?", "answer": str(a + b), "rationale": f"{a} and {b}."} for a in range(6) for b in range(6)]
ASK = [{"input": "Q: {question}", "target": "{answer}"}]

# ---------------------------------------------------------------- choices by chance


def test_draws_are_spread_evenly_and_depend_on_every_part_of_their_key():
    drawn = [draw("a", i, "b") for i in range(4000)]
    assert abs(sum(drawn) / 4000 - 0.5) < 0.02 and 0 <= min(drawn) and max(drawn) < 1
    assert len({draw("a", 1), draw("a", 2), draw("b", 1), draw("a1")}) == 4
    counts = collections.Counter(pick("abc", i) for i in range(3000))
    assert all(abs(n - 1000) < 110 for n in counts.values())  # four standard deviations


def test_a_permutation_holds_each_once_and_every_place_alike():
    orders = [permutation(8, "x", i) for i in range(2000)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    for place in range(8):
        counts = collections.Counter(int(order[place]) for order in orders)
        assert all(abs(counts[i] - 250) < 60 for i in range(8))


def test_choices_stay_the_same_for_ever():
    """If you did not mean to change what a run of instruction tuning reads, this is a bug."""
    assert permutation(8, "rows", 0, "a", 0).tolist() == GOLDEN_ORDER
    assert [int(draw("a", i) * 100) for i in range(8)] == GOLDEN_DRAWS


GOLDEN_ORDER = [7, 6, 3, 4, 2, 1, 5, 0]
GOLDEN_DRAWS = [49, 80, 81, 86, 99, 35, 65, 77]

# ---------------------------------------------------------------- reading


def test_each_form_of_a_line(tmp_path):
    forms = [
        ({"prompt": "p", "response": "r"}, "p", "r"), ({"instruction": "i", "output": "o"}, "i", "o"),
        ({"instruction": "i", "input": "x", "output": "o"}, "i\n\nx", "o"), ({"instruction": "i", "input": "", "output": "o"}, "i", "o"),
        ({"question": "q", "answer": 7}, "q", "7"), ({"prompt": "p", "completion": "c"}, "p", "c"),
    ]
    for row, prompt, response in forms:
        [member] = read_source("a", source(write_lines(tmp_path / "a.jsonl", [row])))
        assert texts(member.example(0, 0, 0)) == (prompt, response)
    [member] = read_source("a", source(write_lines(tmp_path / "a.jsonl", [{"system": "s", "prompt": "p", "response": "r"}])))
    assert [m["role"] for m in member.example(0, 0, 0).messages] == ["system", "user", "assistant"]


def test_conversations_are_taken_as_they_stand(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}, {"role": "user", "content": "c"}]
    answer = {"role": "assistant", "content": "d"}
    rows = [{"messages": [*messages, answer]}, {"prompt": messages, "response": "d"}]
    [member] = read_source("a", source(write_lines(tmp_path / "a.jsonl", rows)))
    assert isinstance(member, Conversations) and len(member.rows) == 2
    for i in range(2):
        assert [(m["content"], m.get("weight", 1)) for m in member.example(i, 0, 0).messages] == [("a", 1), ("b", 0), ("c", 1), ("d", 1)]


def test_rows_of_a_task_beside_it_are_no_source_of_their_own(tmp_path):
    write_lines(tmp_path / "rows.jsonl", SUMS)
    (tmp_path / "rows.tsv").write_text("".join(f"{r['question']}\t{r['answer']}\n" for r in SUMS), encoding="utf-8")
    write_task(tmp_path / "one.json", "rows.jsonl", ASK)
    write_task(tmp_path / "two.json", "rows.tsv", ASK, columns=["question", "answer"])
    write_lines(tmp_path / "three.jsonl", [{"prompt": "p", "response": "r"}])
    members = read_source("a", source(tmp_path))
    assert [member.name for member in members] == ["a/one", "a/three", "a/two"]
    assert [len(member.rows) for member in members] == [36, 1, 36]
    assert [r.fields["answer"] for r in members[0].rows] == [r.fields["answer"] for r in members[2].rows]


def test_at_most_so_many_examples_and_the_same_ones_each_time(tmp_path):
    write_task(tmp_path / "t.json", SUMS, ASK)
    few, more, same = ([r.where for r in read_source("a", source(tmp_path, max_examples=n))[0].rows] for n in (5, 9, 5))
    assert len(few) == 5 and few == same and set(few) < set(more) and len(more) == 9


# ---------------------------------------------------------------- tasks


def test_every_template_is_drawn_and_the_draw_depends_on_row_and_time(tmp_path):
    templates = [{"input": f"{n}: {{question}}", "target": "{answer}"} for n in "abc"]
    member = task(tmp_path, SUMS, templates, rationale=0)
    drawn = [[texts(member.example(i, time, 0))[0][0] for i in range(36)] for time in range(3)]
    assert all(set(one) == set("abc") for one in drawn) and drawn[0] != drawn[1] != drawn[2]
    assert drawn[0] == [texts(member.example(i, 0, 0))[0][0] for i in range(36)]
    assert drawn[0] != [texts(member.example(i, 0, 1))[0][0] for i in range(36)]
    assert not member.fixed and task(tmp_path, SUMS, ASK, rationale=0).fixed and not task(tmp_path, SUMS, ASK).fixed


def test_braces_and_fields(tmp_path):
    row = {"a": "{b}", "b": 2.5, "answer": "x"}
    member = task(tmp_path, [row], [{"input": "{{a}} {a} {{{b}}} { c }", "target": "{answer}"}])
    assert texts(member.example(0, 0, 0)) == ("{a} {b} {2.5} { c }", "x")


def test_options_are_listed_and_answers_named(tmp_path):
    rows = [{"q": "?", "options": ["no", "yes"], "answer": "yes"}, {"q": "?", "options": ["no", "yes"], "answer": 1}]
    templates = [{"input": "{q}\n{options}", "target": "{answer}"}]
    letters = [{"input": "{q}\n{options}", "target": "{letter}", "options": "letters"}]
    for i in range(2):
        assert texts(task(tmp_path, rows, templates).example(i, 0, 0)) == ("?\nOPTIONS:\n- no\n- yes", "yes")
        assert texts(task(tmp_path, rows, letters).example(i, 0, 0)) == ("?\n(A) no\n(B) yes", "(B)")


def test_exemplars_come_before_the_input_and_never_hold_it(tmp_path):
    twice = [*SUMS, *[dict(row, note="again") for row in SUMS]]  # each asks what another asks, too
    member = task(tmp_path, twice, ASK, few_shot=1.0, shots=3, rationale=0)
    numbers = set()
    for time in range(5):
        for i, row in enumerate(twice):
            example = member.example(i, time, 0)
            *exemplars, last = example.messages[0]["content"].split("\n\n")
            assert last == f"Q: {row['question']}" and len(exemplars) == example.shots == len(set(exemplars))
            asked = [one.split("\n")[0] for one in exemplars]
            assert last not in asked
            assert all(one == f"Q: {q}\n{eval(q[:-1])}" for one in exemplars for q in [re.match(r"Q: (.*)", one)[1]])
            numbers.add(example.shots)
            assert member.example(i, time, 0, most_shots=1).shots == 1
    assert numbers == {1, 2, 3}


def test_exemplars_of_few_rows(tmp_path):
    member = task(tmp_path, SUMS[:3], ASK, few_shot=1.0, shots=8, rationale=0)
    assert {member.example(i, time, 0).shots for i in range(3) for time in range(20)} == {1, 2}
    assert task(tmp_path, SUMS[:1], ASK, few_shot=1.0).example(0, 0, 0).shots == 0


def test_exemplars_of_many_rows_are_different_ones(tmp_path):
    rows = [{"question": str(i), "answer": "x"} for i in range(1000)]
    member = task(tmp_path, rows, ASK, few_shot=1.0, shots=4)
    drawn = collections.Counter(member.example(i, 0, 0).shots for i in range(200))
    assert set(drawn) == {1, 2, 3, 4} and min(drawn.values()) > 25


def test_a_share_has_no_exemplars(tmp_path):
    member = task(tmp_path, SUMS, ASK, few_shot=0.25)
    shots = [member.example(i, time, 0).shots for i in range(36) for time in range(40)]
    assert abs(sum(n > 0 for n in shots) / len(shots) - 0.25) < 0.05


def test_a_share_reasons_before_it_answers(tmp_path):
    rows = [*SUMS, *[{k: row[k] for k in ("question", "answer")} for row in SUMS[:5]]]
    member = task(tmp_path, rows, ASK, rationale=0.3, few_shot=0.5)
    n = 0
    for time in range(40):
        for i, row in enumerate(rows):
            ask, target = texts(member.example(i, time, 0))
            *exemplars, ask = ask.split("\n\n")
            if "rationale" not in row or target == row["answer"]:
                assert (ask, target) == (f"Q: {row['question']}", row["answer"])
                assert not any("think" in one for one in exemplars)
            else:
                n += 1
                assert ask == f"Q: {row['question']}\nLet's think step by step."
                assert target == f"{row['rationale']} The answer is {row['answer']}."
                assert rationale.final_answer(target) == row["answer"]
                assert all(rationale.TRIGGER in one and "The answer is" in one for one in exemplars)
    assert abs(n / (40 * 36) - 0.3) < 0.05


def test_a_template_says_how_reasoning_is_asked_for(tmp_path):
    own = [ASK[0] | {"rationale_input": "Why? {question}", "rationale_target": "{rationale} So {answer}"}]
    assert texts(task(tmp_path, SUMS, own, rationale=1).example(7, 0, 0)) == ("Why? 1+1?", "1 and 1. So 2")


def test_a_response_is_cut_into_rationale_and_answer(tmp_path):
    path = write_lines(tmp_path / "g.jsonl", [{"question": "q", "answer": "2*3=6\n#### 6"}])
    [member] = read_source("g", source(path, answer_separator="####", rationale=1))
    assert texts(member.example(0, 0, 0)) == ("q\nLet's think step by step.", "2*3=6 The answer is 6.")
    [member] = read_source("g", source(path, answer_separator="####", rationale=0))
    assert texts(member.example(0, 0, 0)) == ("q", "6")


def test_a_share_is_asked_the_other_way_round(tmp_path):
    inverted = [{"input": "Ask for {answer}", "target": "{question}"}]
    member = task(tmp_path, SUMS, ASK, task={"inverted": inverted}, invert=0.4, rationale=0)
    examples = [texts(member.example(i, time, 0)) for i in range(36) for time in range(40)]
    turned = [e for e in examples if e[0].startswith("Ask for ")]
    assert abs(len(turned) / len(examples) - 0.4) < 0.05 and ("Ask for 2", "1+1?") in turned


def test_a_question_to_measure_with(tmp_path):
    member = task(tmp_path, SUMS, [*ASK, {"input": "{question}", "target": "= {answer}"}], task={"system": "Add."})
    example = member.question(7)
    assert [m["content"] for m in example.messages] == ["Add.", "Q: 1+1?", "2"] and example.shots == 0
    example = member.question(7, template=1, shots=2, reasons=True)
    assert example.messages[1]["content"].count(rationale.TRIGGER) == 3
    assert example.messages[2]["content"] == "1 and 1. The answer is = 2."


# ---------------------------------------------------------------- what is held out


def write_tasks(tmp_path):
    for name, cluster in (("nli1", "nli"), ("nli2", "nli"), ("sum", "math")):
        rows = [dict(row, question=f"{name} {row['question']}") for row in SUMS]
        write_task(tmp_path / f"{name}.json", rows, ASK, cluster=cluster)


def test_held_out_clusters_are_never_trained_on(tmp_path):
    write_tasks(tmp_path)
    more = write_lines(tmp_path.parent / "more.jsonl", [{"prompt": f"more {i}", "response": "r"} for i in range(50)])
    sources = {"flan": source(tmp_path, few_shot=0.5), "more": source(more, cluster="nli"), "kept": source(more)}
    found = read_instructions(InstructionData(sources=sources, hold_out=["nli"], validation=0.2))
    assert [m.name for m in found.unseen] == ["flan/nli1", "flan/nli2", "more"] and sum(len(m.rows) for m in found.unseen) == 122
    assert [m.name for m in found.train] == ["flan/sum", "kept"]
    for member in [*found.train, *found.validation]:
        for i in range(len(member.rows)):
            assert "nli" not in json.dumps(member.example(i, 0, 0).messages)


def test_validation_is_held_out_by_a_hash_and_never_an_exemplar(tmp_path):
    write_tasks(tmp_path)
    cfg = InstructionData(sources={"flan": source(tmp_path, few_shot=1.0)}, validation=0.3)
    found = read_instructions(cfg)
    for train, held_out in zip(found.train, found.validation, strict=True):
        asks = {row.fields["question"] for row in held_out.rows}
        assert len(train.rows) + len(asks) == 36 and 3 <= len(asks) <= 20
        for member in (train, held_out):
            for i in range(len(member.rows)):
                *exemplars, _ = member.example(i, 0, 0).messages[0]["content"].split("\n\n")
                assert exemplars and not any(ask in one for ask in asks for one in exemplars)
    write_lines(tmp_path / "sum2.jsonl", [{"rationale": r["rationale"], "answer": r["answer"], "question": r["question"]} for r in SUMS])
    again = read_instructions(cfg)
    assert [[r.fields for r in m.rows] for m in again.validation if m.name != "flan/sum2"] == [
        [r.fields for r in m.rows] for m in found.validation]  # whatever else there is


def test_validation_out_of_a_file(tmp_path):
    train = write_lines(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "response": "r"} for i in range(100)])
    path = write_lines(tmp_path / "v.jsonl", [{"prompt": "v", "response": "r"}])
    found = read_instructions(InstructionData(sources={"a": source(train)}, validation=0.5, validation_path=path))
    assert len(found.train[0].rows) == 100 and texts(found.validation[0].example(0, 0, 0)) == ("v", "r")


def test_a_source_of_weight_0_is_not_read(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "response": "r"} for i in range(100)])
    found = read_instructions(InstructionData(sources={"a": source(path), "b": source(tmp_path / "none", weight=0)}))
    assert [m.name for m in found.train] == ["a"]


def test_too_few_to_hold_any_out_is_said(tmp_path):
    path, said = write_lines(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}]), []
    assert read_instructions(InstructionData(sources={"a": source(path)}), said.append).validation == []
    assert said == ["no example was held out: there are few, and data.validation=0.01; nothing to evaluate on"]


# ---------------------------------------------------------------- mistakes

GOOD = {"prompt": "p", "response": "r"}
BAD_LINES = [
    ([], ": holds no examples"),
    ([GOOD, "x"], ":2: should be a JSON object, found str"),
    ([GOOD | {"prompt": "a\ud800"}], ":1: half of a surrogate pair (\\ud800 to \\udfff), which is no character"),
    ([GOOD, {"promt": "p"}], ":2: none of the fields prompt, instruction, question; did you mean 'promt'?"),
    ([GOOD, {"prompt": "p", "text": "x"}], ":2: none of the fields response, output, answer, completion; found: prompt, text"),
    ([GOOD, {"prompt": "p", "response": " "}], ":2: response: should be a text that is not empty, was ' '"),
    ([GOOD, {"prompt": "p", "response": None}], ":2: response: should be a text that is not empty, was None"),
    ([GOOD, GOOD | {"system": 3}], ":2: system: should be text, was 3"),
    ([GOOD, {"messages": []}], ":2: is a conversation, the lines before are prompts and responses; should be of one kind"),
    ([{"messages": [{"role": "user", "content": "a"}]}], ":1: no assistant's answer in 1 messages: there is nothing to learn"),
    ([{"messages": [{"role": "usr", "content": "a"}]}],
     ":1: message 1: role 'usr': should be system, user, assistant, tool; did you mean 'user'?"),
    ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, GOOD],
     ":2: no field 'messages', which the lines before have; found: prompt, response"),
]


@pytest.mark.parametrize("rows, message", BAD_LINES, ids=[m for _, m in BAD_LINES])
def test_mistakes_in_lines_name_file_and_line(tmp_path, rows, message):
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError) as e:
        read_source("a", source(path))
    assert str(e.value) == f"{path}{message}"


def test_lines_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.jsonl"
    for raw, message in ((b'{"prompt": "p", "response": "r"}\n\n{"p', f"{path}:3: not a JSON object"),
                         (b'{"prompt": "p\xff"}', f"{path}:1: byte 0xff at 13 is not UTF-8")):
        path.write_bytes(raw)
        with pytest.raises(UserError, match=re.escape(message)):
            read_source("a", source(path))
    with pytest.raises(UserError, match=r"no '####' \(answer_separator\) between two texts in 'r'"):
        read_source("a", source(write_lines(path, [GOOD]), answer_separator="####"))


ROW = {"q": "?", "options": ["a", "b"], "answer": "a"}
BAD_TASKS = [
    ({"templates": [], "rows": [ROW]}, "{t}: templates: should be a list with at least one"),
    ({"templates": 3, "rows": [ROW]}, "{t}: templates: should be a list, was int"),
    ({"templates": ASK, "rows": []}, "{t}: rows: should be a list with at least one"),
    ({"templates": ASK}, "{t}: rows: should be a list, or the path of a .jsonl or .tsv file, was None"),
    ({"templates": ASK, "rows": "r.tsv"}, "{t}: columns: should be a list of names for the columns of r.tsv, was None"),
    ({"templates": ASK, "rows": ["x"]}, "{t}: row 1: should be an object, was 'x'"),
    ({"rows": [ROW]}, "{t}: should hold a task, an object with \"templates\" and \"rows\"; examples go in .jsonl files"),
    ({"templates": ASK, "rows": [ROW], "invertd": []},
     "{t}: unknown key 'invertd': should be one of name, cluster, rows, columns, templates, inverted, system, between, separator; "
     "did you mean 'inverted'?"),
    ({"templates": ASK, "rows": [ROW], "cluster": 3}, "{t}: cluster: should be text, was 3"),
    ({"templates": ["x"], "rows": [ROW]}, "{t}: templates 1: should be {{\"input\", \"target\"}}, was str"),
    ({"templates": [{"input": "a", "taget": "b"}], "rows": [ROW]},
     "{t}: templates 1: unknown key 'taget': should be one of input, target, rationale_input, rationale_target, options; "
     "did you mean 'target'?"),
    ({"templates": [{"input": "a"}], "rows": [ROW]}, "{t}: templates 1: target: should be a text, was None"),
    ({"templates": [ASK[0] | {"options": "letter"}], "rows": [ROW]}, "{t}: templates 1: options='letter': should be dashes or letters"),
    ({"templates": [{"input": "{qu}", "target": "{answer}"}], "rows": [ROW]},
     "{t}: row 1: no field 'qu', which templates 1 of {t} has; did you mean 'q'?"),
    ({"templates": [{"input": "{q}", "target": "{answer}"}], "inverted": [{"input": "{x}", "target": "{q}"}], "rows": [ROW]},
     "{t}: row 1: no field 'x', which inverted 1 of {t} has; found: answer, letter, options, q"),
    ({"templates": [{"input": "{q}", "target": "{answer}"}], "rows": [ROW | {"q": []}]},
     "{t}: row 1: q: should be text or a number for templates 1 of {t}, was list"),
    ({"templates": [{"input": "{q}", "target": "{answer}"}], "rows": [ROW, ROW | {"answer": "c"}]},
     "{t}: row 2: answer 'c': should be one of the options ['a', 'b'], or its index from 0"),
    ({"templates": [{"input": "{q}", "target": "{letter}"}], "rows": [ROW | {"answer": 2}]},
     "{t}: row 1: answer 2: should be one of the options ['a', 'b'], or its index from 0"),
    ({"templates": [{"input": "{options}", "target": "{answer}"}], "rows": [ROW | {"options": "ab"}]},
     "{t}: row 1: options: should be a list of 2 to 26 texts, was 'ab'"),
]


@pytest.mark.parametrize("file, message", BAD_TASKS, ids=[m for _, m in BAD_TASKS])
def test_mistakes_in_tasks_name_the_template_or_the_row(tmp_path, file, message):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(file))
    with pytest.raises(UserError) as e:
        read_source("a", source(path))
    assert str(e.value) == message.format(t=path)


def test_mistakes_in_sources(tmp_path):
    def told(**settings):
        with pytest.raises(UserError) as e:
            read_instructions(InstructionData(**settings))
        return str(e.value)

    write_tasks(tmp_path)
    sources = {"a": source(tmp_path)}
    assert told() == "data.sources: should hold at least one source with a weight above 0"
    assert told(sources=sources, hold_out=["nlu"]) == "data.hold_out: no cluster 'nlu'; did you mean 'nli'?"
    assert told(sources=sources, hold_out=["nli", "math"]) == (
        "data.hold_out=['nli', 'math']: every task is of these clusters; nothing is left to train on")
    assert told(sources=sources, validation=0.999).startswith("data.validation=0.999: holds out every example of a/")
    assert told(sources={"a": source(tmp_path / "sum.jsno")}) == (
        f"data.sources.a.path={tmp_path / 'sum.jsno'}: no such file or folder; did you mean {tmp_path / 'sum.json'}?")
    assert told(sources=sources, validation_path="none.jsonl") == "data.validation_path=none.jsonl: no such file or folder"
    write_task(tmp_path / "again.json", SUMS, ASK, name="sum")
    assert told(sources=sources).startswith(f"{tmp_path / 'sum.json'}: a second task named 'a/sum' in data.sources.a.path=")
    write_task(tmp_path / "again.json", "none.jsonl", ASK)
    assert told(sources=sources).startswith(f"{tmp_path / 'again.json'}: rows={tmp_path / 'none.jsonl'}: no such file or folder")
    (tmp_path / "again.json").write_text("{")
    assert told(sources=sources).startswith(f"{tmp_path / 'again.json'}: not valid JSON: ")
    write_task(tmp_path / "again.json", [{"question": "\ud800"}], ASK)
    assert told(sources=sources).startswith(f"{tmp_path / 'again.json'}: half of a surrogate pair")
    (tmp_path / "r.tsv").write_text("a\tb\tc\n")
    write_task(tmp_path / "again.json", "r.tsv", ASK, columns=["question", "answer"])
    assert told(sources=sources) == f"{tmp_path / 'r.tsv'}:1: 3 columns; should have 2: question, answer"


@pytest.mark.parametrize("make, message", [
    (lambda: InstructionSource(path="p", weight=-1), "weight=-1 of source p: should be 0 or more, and finite"),
    (lambda: InstructionSource(path="p", max_examples=0), "max_examples=0 of source p: should be at least 1, or null"),
    (lambda: InstructionSource(path="p", shots=0), "shots=0 of source p: should be at least 1"),
    (lambda: InstructionSource(path="p", few_shot=2), "few_shot=2 of source p: should be in [0, 1]"),
    (lambda: InstructionSource(path="p", rationale=-1), "rationale=-1 of source p: should be in [0, 1]"),
    (lambda: InstructionSource(path="p", invert=1.5), "invert=1.5 of source p: should be in [0, 1]"),
    (lambda: InstructionData(seq_len=1), "data.seq_len=1: should be at least 2"),
    (lambda: InstructionData(window=0), "data.window=0: should be at least 1"),
    (lambda: InstructionData(cap=0), "data.cap=0: should be at least 1"),
    (lambda: InstructionData(validation=1), "data.validation=1: should be in [0, 1)"),
])
def test_mistakes_in_settings(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# ---------------------------------------------------------------- rationales and answers


@pytest.mark.parametrize("answer", ["7", "-1,250.5", "yes", "a red fox", "3.5", "(B)", "no!"])
def test_a_reasoned_target_gives_its_answer_back(answer):
    for reason in ("Because.", "1 + 2 = 3. The answer is not 4.", "So\n\nit is."):
        assert rationale.final_answer(rationale.reasoned(reason, answer)).rstrip("!") == answer.rstrip("!")


def test_answers_are_found():
    assert rationale.final_answer("The answer is 3. The answer is: 4. Done") == "4"
    assert rationale.final_answer("Answer: (B)\nnext") == "(B)" and rationale.final_answer("I do not know") is None
    assert rationale.final_answer("the answer is ") is None
    assert rationale.last_number("2 apples cost $1,234.50.") == "1234.50" and rationale.last_number("none") is None
    assert rationale.last_number("from 5 to -3") == "-3" and rationale.last_number("12345") == "12345"
    assert rationale.behind("a #### 7\nb", "####") == "7" and rationale.behind("a", "####") is None
    assert rationale.matching("x=1 x=2", r"x=(\d)") == "2" and rationale.matching("ab", "b") == "b" and rationale.matching("", "b") is None
    assert rationale.split_answer("a #### 7", "####") == ("a", "7") and rationale.split_answer("#### 7", "####") is None


@pytest.mark.parametrize("a, b, same", [
    ("7", "7.0", True), ("$1,000", "1000", True), ("7", "8", False), ("Yes.", "yes", True), ("(B)", "b", True), (None, "7", False),
    ("a  red fox", "A red fox", True), ("7 apples", "7", False), ("-3", "3", False),
])
def test_whether_answers_are_the_same(a, b, same):
    assert rationale.same_answer(a, b) is same
    assert a is None or (rationale.normal(a) == rationale.normal(b)) is same
