"""Preference and prompt files: forms, what is refused and what is left out, the order, the split, the arrays."""

import gzip
import json

import numpy as np
import pytest

from jaxllm import config
from jaxllm.data import preference, prompts
from jaxllm.data.preference_config import PreferenceData, PreferenceSource, PromptData, PromptSource
from jaxllm.data.preference_rows import as_messages
from jaxllm.data.shuffle import EndlessOrder
from jaxllm.errors import UserError

PAD, END = 0, 1


def encode(prompt, answer):
    said = "".join(f"{m['role'][0]}{m['content']}" for m in as_messages(prompt))
    return [2, *map(ord, said)], [*map(ord, answer), END]


def decode(ids) -> str:
    return "".join(map(chr, ids))


def write(path, *rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(path, weight=1.0, objective=None, **settings):
    settings = {"seq_len": 64, "validation": 0.0} | settings
    cfg = PreferenceData(sources={"s": PreferenceSource(path=str(path), weight=weight, objective=objective)}, **settings)
    return preference.read(cfg, encode, PAD)


RANKED = {"prompt": "q", "answers": ["good", "bad", "worse"], "rank": [1, 2, 2]}
PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize("row", [
    PAIR,
    {"prompt": "q", "answers": ["bad", "good"], "rank": [2.5, -1]},
    {"prompt": [user("q")], "chosen": "good", "rejected": "bad"},
    {"prompt": "q", "chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
    {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
    {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), {"role": "assistant", "content": "bad", "more": 1}]},
    {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
])
def test_every_form_of_a_pair_says_the_same(tmp_path, row):
    found = read(write(tmp_path / "p.jsonl", row))
    [batch] = preference.PreferenceRows(found.train, 1).batches()
    said = {}
    for k in range(2):
        prompt, length = batch["prompt_BK"][0, k], batch["length_BK"][0, k]
        ids = batch["token_BKT"][0, k]
        assert ids[0] == 2 and decode(ids[1:prompt]) == "uq" and ids[length - 1] == END and (ids[length:] == PAD).all()
        said[decode(ids[prompt : length - 1])] = batch["rank_BK"][0, k]
    assert said == {"good": 0, "bad": 1} and found.counts["s"]["pairs"] == 1


def test_a_system_message_and_earlier_turns_are_part_of_the_prompt(tmp_path):
    before = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c")]
    row = {"prompt": "c", "chosen": [*before, assistant("x")], "rejected": [*before, assistant("y")]}
    assert decode(read(write(tmp_path / "p.jsonl", row)).train.of[0].prompt[1:]) == "ssuaabuc"
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    found = read(write(tmp_path / "t.jsonl", {"chosen": text + "x", "rejected": text + "y"}))
    assert decode(found.train.of[0].prompt[1:]) == "uaabuc"


def test_arrays_of_a_batch(tmp_path):
    path = write(tmp_path / "p.jsonl.gz", RANKED, "", {**PAIR, "margin": 0.75, "objective": "harmless"},
                 {"prompt": "q", "answers": ["by hand"], "demonstration": True})
    found = read(path, seq_len=12, objectives=["helpful", "harmless"])
    rows = preference.PreferenceRows(found.train, 4)
    [batch] = rows.batches()
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        "token_BKT": ((4, 3, 12), "int32"), "length_BK": ((4, 3), "int32"), "prompt_BK": ((4, 3), "int32"), "rank_BK": ((4, 3), "int32"),
        "present_BK": ((4, 3), "bool"), "objective_B": ((4,), "int32"), "margin_B": ((4,), "float32")}
    assert batch["present_BK"].tolist() == [[True] * 3, [True, True, False], [False] * 3, [False] * 3]
    assert batch["rank_BK"][:2].tolist() == [[0, 1, 1], [0, 1, 0]]
    assert batch["length_BK"].tolist() == [[8, 7, 9], [8, 7, 1], [1] * 3, [1] * 3]
    assert batch["objective_B"].tolist() == [0, 1, 0, 0] and batch["margin_B"].tolist() == [0, 0.75, 0, 0]
    assert decode(batch["token_BKT"][0, 2, 3:8]) == "worse" and not batch["token_BKT"][1, 2].any()
    assert len(found.demonstrations) == 1 and decode(found.demonstrations.of[0].answers[0][:-1]) == "by hand"
    assert found.counts["s"]["pairs"] == 3 and "1 demonstrations" in found.describe()  # 2 pairs of three with a tie, and 1
    parts = [next(preference.PreferenceRows(found.train, 4, share=p, shares=2).batches())["length_BK"] for p in range(2)]
    assert np.array_equal(np.concatenate(parts), batch["length_BK"])


def test_a_source_has_an_objective_of_its_own(tmp_path):
    path = write(tmp_path / "p.jsonl", PAIR, PAIR | {"objective": "helpful"})
    found = read(path, objective="harmless", objectives=["helpful", "harmless"])
    assert [g.objective for g in found.train.of] == [1, 0]


# ---------------------------------------------------------------- what is refused, and what is left out


@pytest.mark.parametrize(("row", "says"), [
    ('{"prompt": "q"', "not a JSON object"),
    ("[1]", "should be a JSON object, found list"),
    ('{"prompt": "q", "answers": ["\\ud800", "b"], "rank": [1, 2]}', "half of a surrogate pair"),
    ({"prompt": "q", "answer": ["a", "b"], "rank": [1, 2]}, "did you mean 'answers' by 'answer'"),
    ({"answers": ["a", "b"], "rank": [1, 2]}, 'no "prompt"'),
    ({"chosen": "a", "rejected": "b"}, 'no "prompt", and chosen is no transcript'),
    ({"prompt": "q", "chosen": "a"}, "no 'rejected'"),
    ({"prompt": "q", "answers": ["a", "b"]}, 'no "rank": should be a list of 2 numbers'),
    ({"prompt": "q", "answers": ["a", "b"], "rank": [1]}, "rank has 1 numbers for 2 answers"),
    ({"prompt": "q", "answers": ["a", "b"], "rank": [1, None]}, "should be a list of numbers"),
    ({"prompt": "q", "answers": ["a", "b"], "rank": [True, 2]}, "should be a list of numbers"),
    ('{"prompt": "q", "answers": ["a", "b"], "rank": [1, NaN]}', "should be a list of numbers"),
    ({"prompt": "q", "answers": ["a"], "rank": [1]}, "1 answer: should be two or more"),
    ({"prompt": "q", "answers": ["a", 3], "rank": [1, 2]}, "should be a list of texts"),
    ({"prompt": " ", "chosen": "a", "rejected": "b"}, "prompt is empty"),
    ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "each message should be"),
    ({"prompt": "q", "chosen": [user("q")], "rejected": [user("q")]}, "last message is by 'user'"),
    ({"prompt": "z", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}, "do not begin with the prompt"),
    (PAIR | {"objective": "helpfull"}, "objective 'helpfull' is unknown; did you mean 'helpful'"),
    (PAIR | {"margin": -1}, "margin=-1: should be a number, 0 or more"),
    (RANKED | {"margin": 1}, "margin=1: is of two answers, found 3"),
    (PAIR | {"demonstration": "yes"}, "demonstration='yes': should be true or false"),
    (PAIR | {"chosen": "bad"}, "equal answers have different ranks"),
    (PAIR | {"chosen": "\n"}, "an answer is empty; data.unusable=drop"),
    ({"chosen": [user("p"), assistant("a")], "rejected": [user("q"), assistant("b")]}, "answer different prompts"),
])
def test_a_wrong_line_is_told_with_its_place(tmp_path, row, says):
    path = write(tmp_path / "p.jsonl", PAIR, "", row)
    with pytest.raises(UserError) as told:
        read(path, objectives=["helpful"])
    assert f"{path}:3: " in str(told.value) and says in str(told.value) and "\n" not in str(told.value)


def test_what_cannot_be_learned_from_is_left_out_and_counted(tmp_path):
    path = write(tmp_path / "p.jsonl", PAIR, PAIR | {"chosen": "bad"}, PAIR | {"rejected": ""},
                 {"prompt": "q", "answers": ["a", "", "b", "b"], "rank": [1, 2, 3, 3]},
                 {"prompt": "q", "answers": ["a", "b"], "rank": [1, 1]},
                 {"chosen": [user("p"), assistant("a")], "rejected": [user("q"), assistant("b")]})
    found = read(path, unusable="drop")
    assert len(found.train) == 2 and [len(g.answers) for g in found.train.of] == [2, 2]
    n = found.counts["s"]
    assert {kind: n.get(kind, 0) for kind in preference.DROPPED} == {
        "tied": 1, "too long": 0, "empty answers": 2, "repeated answers": 1, "equal": 1, "other prompt": 1, "short": 1}
    assert "left out: 1 tied, 2 empty answers" in found.describe()


def test_a_file_of_ties_alone_is_told(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "q", "answers": ["a", "b"], "rank": [1, 1]})
    with pytest.raises(UserError, match=r"no group of ranked answers is left to train on.*1 tied"):
        read(path)
    with pytest.raises(UserError, match=r"no such file or folder; did you mean .*p\.jsonl"):
        read(tmp_path / "p.json")


def test_prompts_that_are_too_long_are_dropped_or_cut(tmp_path):
    path = write(tmp_path / "p.jsonl", PAIR, PAIR | {"prompt": "abcdefghij"}, PAIR | {"chosen": "a" * 30})
    found = read(path, seq_len=12)
    assert len(found.train) == 1 and found.counts["s"]["too long"] == 2
    found = read(path, seq_len=12, too_long="truncate")  # the longest answer has 5 tokens
    assert len(found.train) == 2 and (found.counts["s"]["truncated"], found.counts["s"]["too long"]) == (1, 1)
    assert found.train.of[1].prompt.tolist() == [2, *map(ord, "efghij")] and found.counts["s"]["longest"] == 12
    assert [len(a) for a in found.train.of[1].answers] == [5, 4]  # answers are never cut


@pytest.mark.parametrize(("override", "says"), [
    ("validation=1", "data.validation=1.0: should be in"), ("seq_len=1", "data.seq_len=1: should be at least 2"),
    ("objectives=[a,a]", "one name or more, each once"), ("sources.s.weight=-1", "should be 0 or more"),
    ("sources.s.objective=x", "data.sources.s.objective=x: should be one of preference"), ("too_long=cut", "should be drop|truncate"),
])
def test_a_wrong_setting_is_told(override, says):
    with pytest.raises(UserError) as told:
        config.load(PreferenceData, None, ["sources.s.path=x", override])
    assert says in str(told.value)


# ---------------------------------------------------------------- split and order


def numbered(path, n, **more):
    return write(path, *[{"prompt": f"p{i}", "chosen": "a", "rejected": f"b{j}", **more} for i in range(n) for j in range(2)])


def test_no_prompt_is_on_both_sides(tmp_path):
    found = read(numbered(tmp_path / "p.jsonl", 300), validation=0.2)
    train, held_out = ({decode(g.prompt) for g in groups.of} for groups in (found.train, found.validation))
    assert not train & held_out and len(train | held_out) == 300 and 40 <= len(held_out) <= 80
    as_lists = write(tmp_path / "m.jsonl", *[{"prompt": [{"role": "system", "content": "s"}, user(f" p{i} "), assistant("x"), user("y")],
                                              "chosen": "a", "rejected": "b"} for i in range(300)])
    other = read(as_lists, validation=0.2)
    assert {decode(g.prompt).split()[1] for g in other.validation.of} == {p[2:] for p in held_out}


def lengths(batches, n):
    return [next(batches)["length_BK"].tolist() for _ in range(n)]


def test_the_order_is_a_function_of_seed_and_step_for_any_number_of_processes(tmp_path):
    path = write(tmp_path / "p.jsonl", *[PAIR | {"chosen": "a" * (i + 2)} for i in range(23)])
    found = read(path)
    whole = lengths(preference.PreferenceInput(found, 4, 7).batches(), 13)
    for start in (0, 5, 9):
        parts = [lengths(preference.PreferenceInput(found, 4, 7, p, 2).batches(start), 4) for p in range(2)]
        assert [a + b for a, b in zip(*parts, strict=True)] == whole[start : start + 4]
    assert lengths(preference.PreferenceInput(found, 4, 8).batches(), 13) != whole
    once = [length for step in whole for [length, _] in step][:46]
    assert sorted(once[:23]) == sorted(once[23:]) == [i + 6 for i in range(23)] and once[:23] != once[23:]
    assert preference.PreferenceInput(found, 4, 7).steps(1) == 6 and preference.PreferenceInput(found, 4, 7).steps(2) == 12
    with pytest.raises(UserError, match="batch_size=5 is not divisible by the 2 processes"):
        preference.PreferenceInput(found, 5, 7, 0, 2)


def test_weights_say_how_often_a_source_is_read_in_an_epoch():
    order = EndlessOrder([10, 20, 7], [0.5, 2, 0], seed=3)
    assert order.epoch_size == 45
    first, second = order.rows(0, 45), order.rows(45, 45)
    for rows in (first, second):
        times = np.bincount(rows, minlength=37)
        assert times[:10].sum() == 5 and times[:10].max() == 1 and (times[10:30] == 2).all() and not times[30:].any()
    assert set(first[first < 10]) != set(second[second < 10])  # which half: drawn anew
    assert np.array_equal(order.rows(30, 40), np.concatenate([first, second])[30:70])  # across the border, and back


def test_the_order_stays_the_same_in_every_version():
    """A run goes on with another version of NumPy in the same order; whoever changes this breaks that."""
    assert EndlessOrder([6, 3], [1, 1.4], seed=0).rows(0, 10).tolist() == [0, 8, 5, 6, 8, 2, 7, 1, 4, 3]


def test_changed_text_changes_what_the_order_is_made_of(tmp_path):
    one, other = (read(write(tmp_path / f"{name}.jsonl", PAIR | {"rejected": name})).made_of for name in ("a", "b"))
    assert one != other and one == read(tmp_path / "a.jsonl").made_of


# ---------------------------------------------------------------- prompts


def encode_prompt(prompt):
    return encode(prompt, "")[0]


def read_prompts(path, **settings):
    cfg = PromptData(sources={"s": PromptSource(path=str(path))}, **settings)
    return prompts.read(cfg, encode_prompt)


def test_prompts_keep_their_rows_and_come_in_an_endless_order(tmp_path):
    path = write(tmp_path / "p.jsonl", *[{"prompt": f"p{i}" if i % 2 else [user(f"p{i}")], "answer": i} for i in range(9)])
    found = read_prompts(path)
    one = prompts.PromptInput(found, 4, seed=1)
    seen = [p.row["answer"] for iteration in range(9) for p in one.batch(iteration)]
    assert [p.row["answer"] for p in prompts.PromptInput(found, 4, seed=1).batch(5)] == seen[20:24]
    assert all(sorted(seen[i * 9 : i * 9 + 9]) == list(range(9)) for i in range(4)) and seen[:9] != seen[9:18]
    first = one.batch(0)[0]
    assert decode(first.tokens[1:]) == f"up{first.row['answer']}" and first.text == ("" if first.row["answer"] % 2 else "user: ") + f"p{first.row['answer']}"


def test_other_prompts_or_answers_change_what_the_order_is_made_of(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "answer": 1})
    before = read_prompts(path).made_of
    assert read_prompts(path).made_of == before and read_prompts(path, prompt_len=9).made_of == before
    for row in ({"prompt": "a", "answer": 2}, {"prompt": "b", "answer": 1}):
        assert read_prompts(write(path, row)).made_of != before


def test_long_work_tells_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jaxllm.data.read.BLOCK", 1000)
    monkeypatch.setattr("jaxllm.data.progress.Progress.show", lambda self, at: self.log(f"{at / self.total:.0%}"))
    for name in "ab":
        numbered(tmp_path / f"{name}.jsonl", 20)
    read(tmp_path / "*.jsonl")
    said = capsys.readouterr().err.split()
    assert len(said) > 3 and said[-1] == "100%" and "50%" in said


def test_long_prompts_are_dropped_or_cut_and_prompts_are_held_out(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "abcdef"}, {"prompt": "a"})
    found = read_prompts(path, prompt_len=4)
    assert [p.row["prompt"] for p in found.train] == ["a"] and "left out: 1 too long" in found.describe()
    found = read_prompts(path, prompt_len=4, too_long="truncate")
    assert found.train[0].tokens == [2, *map(ord, "def")] and found.counts["s"]["truncated"] == 1
    found = read_prompts(numbered(tmp_path / "n.jsonl", 200), validation=0.3)
    held_out = {p.text for p in found.validation}
    assert 40 <= len(held_out) <= 80 and not held_out & {p.text for p in found.train}
    with pytest.raises(UserError, match="no prompt is left to train on"):
        read_prompts(path, prompt_len=1)
    with pytest.raises(UserError, match=r'b.jsonl:1: no "prompt" \(found: question\)'):
        read_prompts(write(tmp_path / "b.jsonl", {"question": "x"}))


def test_prompts_are_padded_on_the_left():
    token_BP, first_B = prompts.left_padded([[5, 6], [7, 8, 9]], 4, PAD)
    assert token_BP.tolist() == [[0, 0, 5, 6], [0, 7, 8, 9]] and first_B.tolist() == [2, 1]
