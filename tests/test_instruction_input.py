"""Batches of instruction data: packing, mixtures, and an order that is a function of (seed, step) alone."""

import collections
import dataclasses
import itertools
import json
import random
import shutil

import numpy as np
import pytest

from jaxllm.data.instruction_config import InstructionData, InstructionSource
from jaxllm.data.instruction_input import InstructionInput, InstructionValidation, PretrainingRows, prepare
from jaxllm.data.instruction_mixture import epoch_order, examples_of_members
from jaxllm.data.instruction_packing import empty_batch, first_fit
from jaxllm.data.packing import n_rows
from jaxllm.data.store import Store
from jaxllm.data.tokenizer import ByteTokenizer
from jaxllm.errors import UserError

BYTES = ByteTokenizer()
SEQ = 64


@pytest.fixture
def sources(tmp_path):
    """Three files: pairs, conversations of several turns, and a task that is drawn anew each time."""
    pick = random.Random(0)
    pairs = [{"prompt": f"p{i}", "response": "r" * pick.randrange(1, 20)} for i in range(90)]
    talks = [{"messages": [m for turn in range(pick.randrange(1, 4)) for m in (
        {"role": "user", "content": f"c{i} {turn}"}, {"role": "assistant", "content": "x" * pick.randrange(1, 6)})]} for i in range(40)]
    rows = [{"a": i, "b": "b" * pick.randrange(1, 9)} for i in range(30)]
    templates = [{"input": "t {a}", "target": "{b}"}, {"input": "task {a}, tell", "target": "{b}{b}"}]
    for name, lines in (("pairs", pairs), ("talks", talks)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "task.json").write_text(json.dumps({"rows": rows, "templates": templates}))
    return {name: InstructionSource(path=str(next(tmp_path.glob(f"{name}.*"))), few_shot=0.3) for name in ("pairs", "talks", "task")}


def made(sources, batch_size=4, seed=0, share=0, shares=1, **settings):
    settings = {"seq_len": SEQ, "template": "own", "validation": 0.1} | settings
    cfg = InstructionData(sources=sources, **settings)
    return InstructionInput(prepare(cfg, BYTES, log=lambda text: None), cfg, batch_size, seed, share, shares)


def documents(batch) -> list[tuple]:
    """Returns what the model is given of each document of a batch: tokens, targets, weights, positions."""
    out = []
    for b, doc_T in enumerate(batch["doc_BT"]):
        for doc in range(1, doc_T.max() + 1):
            here = np.flatnonzero(doc_T == doc)
            assert (np.diff(here) == 1).all()
            out.append(tuple(tuple(batch[name][b, here].tolist()) for name in ("token_BT", "target_BT", "weight_BT", "pos_BT")))
    return out


def first(iterator, n):
    return list(itertools.islice(iterator, n))


def epoch_batches(data: InstructionInput, epoch=0):
    rows = data.epoch(epoch)
    start = data.firsts[epoch]
    return data.batch(range(start, start + rows.n_rows))


# ---------------------------------------------------------------- packing


def test_a_row_by_hand(tmp_path):
    lines = [{"prompt": "a", "response": "bc"}, {"prompt": "d", "response": "e"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = made({"a": InstructionSource(path=str(tmp_path / "a.jsonl"))}, seq_len=16, template="plain", validation=0)
    batch = epoch_batches(data)
    a, b, c, d, e, nl = (BYTES.encode(ch)[0] for ch in "abcde\n")
    bos, eos, pad = BYTES.bos_id, BYTES.eos_id, BYTES.pad_id
    long = [bos, a, nl, b, c], [a, nl, b, c, eos], [0, 0, 1, 1, 1]
    short = [bos, d, nl, e], [d, nl, e, eos], [0, 0, 1, 1]
    one, two = (long, short) if batch["token_BT"][0, 1] == a else (short, long)
    n, m = len(one[0]), len(two[0])
    rest = 16 - n - m
    assert batch["token_BT"].tolist() == [one[0] + two[0] + [pad] * rest]
    assert batch["target_BT"].tolist() == [one[1] + two[1] + [pad] * rest]
    assert batch["weight_BT"].tolist() == [one[2] + two[2] + [0] * rest]
    assert batch["pos_BT"].tolist() == [[*range(n), *range(m)] + [0] * rest]
    assert batch["doc_BT"].tolist() == [[1] * n + [2] * m + [0] * rest]
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "token_BT": "int32", "target_BT": "int32", "weight_BT": "float32", "pos_BT": "int32", "doc_BT": "int32"}


def test_packed_is_unpacked_in_what_the_model_sees(sources):
    for epoch in range(2):
        packed, alone = (epoch_batches(made(sources, pack=pack), epoch) for pack in (True, False))
        assert alone["doc_BT"].max() == 1 < packed["doc_BT"].max() and len(alone["doc_BT"]) > 1.5 * len(packed["doc_BT"])
        assert collections.Counter(documents(packed)) == collections.Counter(documents(alone))
        for batch in (packed, alone):
            assert (batch["weight_BT"][batch["doc_BT"] == 0] == 0).all()
            for tokens, targets, weights, positions in documents(batch):
                assert tokens[1:] == targets[:-1] and positions == tuple(range(len(tokens)))
                assert weights[-1] == 1 and targets[-1] == BYTES.special_id("<|end|>")  # nothing behind the last learned token


def test_first_fit_by_hand():
    row_N, start_N, rows = first_fit([5, 6, 4, 3, 9, 1], 10, window=2)
    #  row 0: 5 4 1   row 1: 6 3   row 2: 9, which closes row 0, so that the last one goes into row 1
    assert row_N.tolist() == [0, 1, 0, 1, 2, 1] and start_N.tolist() == [0, 0, 5, 6, 0, 9] and rows == 3
    assert first_fit([5, 6, 4, 3, 9, 1], 10, window=3)[0].tolist() == [0, 1, 0, 1, 2, 0]
    assert first_fit([5, 6, 4, 3, 9, 1], 10, window=1)[0].tolist() == [0, 1, 1, 2, 3, 3]
    assert first_fit([], 10, window=2)[2] == 0


@pytest.mark.parametrize("window", [1, 3, 64])
def test_first_fit_against_plain_lists(window):
    pick = random.Random(window)
    sizes = [pick.randrange(1, 33) for _ in range(700)]
    row_N, start_N, rows = first_fit(sizes, 32, window)
    open_rows, n, wanted = [], 0, []  # [row, filled], oldest first
    for size in sizes:
        row = next((r for r in open_rows if r[1] + size <= 32), None)
        if row is None:
            row, n = [n, 0], n + 1
            open_rows = [*open_rows, row][-window:]
        wanted.append((row[0], row[1]))
        row[1] += size
    assert list(zip(row_N.tolist(), start_N.tolist(), strict=True)) == wanted and rows == n


# ---------------------------------------------------------------- order


def test_each_epoch_holds_each_example_once_in_another_order(sources):
    data = made(sources, pack=False)
    n = data.epoch(0).n_rows
    orders = []
    for epoch in range(3):
        order = list(zip(*epoch_order(epoch, [m.name for m in data.members], data.sizes, data.counts, 0), strict=True))
        assert sorted((m, i) for m, i, _ in order) == [(m, i) for m, size in enumerate(data.sizes) for i in range(size)]
        assert {time for *_, time in order} == {epoch} and len(order) == n
        orders.append([(m, i) for m, i, _ in order])
    assert orders[0] != orders[1] != orders[2]
    members = [m for m, _ in orders[0]]
    assert sum(a != b for a, b in itertools.pairwise(members)) > len(members) / 4  # mixed, not one after the other


@pytest.mark.parametrize("pack, n", [(True, 60), (False, 100)])
def test_going_on_from_a_step_is_starting_there(sources, pack, n):
    whole = first(made(sources, pack=pack).batches(), n)
    assert made(sources, pack=pack).epoch_of((n - 1) * 4) >= 2  # over several epochs
    for step in (0, 1, 17, 44):
        data = made(sources, pack=pack)
        for wanted, got in zip(whole[step:], first(data.batches(step), n - step), strict=True):
            assert all((wanted[name] == got[name]).all() for name in wanted)
    other = first(made(sources, pack=pack, seed=1).batches(), n)
    assert any((a["token_BT"] != b["token_BT"]).any() for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("shares", [2, 4])
def test_the_order_does_not_depend_on_the_number_of_processes(sources, shares):
    whole = first(made(sources).batches(3), 20)
    parts = [first(made(sources, share=share, shares=shares).batches(3), 20) for share in range(shares)]
    for step, wanted in enumerate(whole):
        for name, array in wanted.items():
            assert (np.concatenate([part[step][name] for part in parts]) == array).all()


def test_the_order_does_not_depend_on_where_the_files_are(sources, tmp_path):
    moved = {}
    for name, source in sources.items():
        (tmp_path / "moved").mkdir(exist_ok=True)
        moved[name] = dataclasses.replace(source, path=shutil.copy(source.path, tmp_path / "moved"))
    there, here = made(moved), made(sources)
    assert there.made_of == here.made_of
    for a, b in zip(first(there.batches(), 30), first(here.batches(), 30), strict=True):
        assert (a["token_BT"] == b["token_BT"]).all()


def test_steps_of_epochs(sources):
    data = made(sources, batch_size=3)
    for epochs in (1, 2, 3):
        rows = data.epoch_of(10**3) and data.firsts[epochs]
        assert data.n_steps(epochs) == -(-rows // 3)
    half = data.n_steps(1.5)
    assert data.n_steps(1) < half < data.n_steps(2) and half == -(-(data.firsts[1] + -(-data.epoch(1).n_rows // 2)) // 3)
    read = collections.Counter(d for batch in first(data.batches(), data.n_steps(1)) for d in documents(batch))
    assert not collections.Counter(documents(epoch_batches(made(sources)))) - read


def test_what_the_rows_depend_on_is_told(sources, tmp_path):
    base = made(sources).made_of
    assert json.loads(json.dumps(base)) == base == made(sources).made_of
    assert made(sources, seq_len=32).made_of["rows"] != base["rows"]
    for change in ({"few_shot": 0.5}, {"template": "plain"}, {"weight": 2.0}):
        changed = made(sources | {"task": dataclasses.replace(sources["task"], **change)}).made_of
        assert [name for name in base if changed[name] != base[name]] == ["task"]
    with open(sources["pairs"].path, "a") as file:
        file.write('{"prompt": "new", "response": "r"}\n')
    assert [name for name, value in made(sources).made_of.items() if value != base[name]] == ["pairs"]


# ---------------------------------------------------------------- mixtures


def test_examples_of_an_epoch():
    def count(sizes, weights=None, mix="proportional", cap=3000):
        return examples_of_members(sizes, weights or [1.0] * len(sizes), mix=mix, cap=cap)

    assert count([50_000, 3_000, 400]) == [3000, 3000, 400]  # Raffel et al. 2020: min(examples, K)
    assert count([50_000, 3_000, 400], cap=1000) == [1000, 1000, 400]
    assert count([50_000, 400], [1, 3]) == [3000, 1200]
    assert count([50_000, 400], [0.5, 0.001]) == [1500, 1]
    assert count([50_000]) == [50_000]  # no mixture, no cap
    assert count([50_000, 1_000], [1, 3], mix="weights") == [1000, 3000]
    assert count([50_000, 1_000, 1_000], [1, 1, 1], mix="weights", cap=10**9) == [17333, 17333, 17333]


def test_a_capped_member_goes_on_in_the_next_epoch_and_a_small_one_begins_again():
    size_M, count_M = [10, 4], [4, 6]
    seen = [[], []]
    for epoch in range(10):
        order = epoch_order(epoch, ["a", "b"], size_M, count_M, 0)
        members = order[0].tolist()
        assert (members.count(0), members.count(1)) == (4, 6)
        for m, i, time in zip(*(a.tolist() for a in order), strict=True):
            seen[m].append((time, i))
    for m, times in ((0, 4), (1, 15)):  # 40 of 10 rows, 60 of 4
        assert sorted(seen[m]) == [(time, i) for time in range(times) for i in range(size_M[m])]


def test_the_cap_in_a_run(sources):
    data = made(sources, cap=20, validation=0)
    assert data.counts == [20, 20, 20]
    assert "pairs: 90 examples, 20 an epoch, 33.3% of all" in data.describe()


# ---------------------------------------------------------------- too long


def test_what_is_too_long_is_dropped_or_truncated_and_counted(tmp_path):
    lines = [{"prompt": "p", "response": "r" * n} for n in (10, 28, 29, 60)] + [{"prompt": "p" * 40, "response": "r"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"a": InstructionSource(path=str(tmp_path / "a.jsonl"))}
    # <bos> <|user|> p <|end|> <|assistant|> r… <|end|>: 6 tokens more than the response, one of them only a target
    drop = made(source, seq_len=33, validation=0, pack=False)
    assert sorted(len(d[0]) for d in documents(epoch_batches(drop))) == [15, 33]
    assert drop.losses() == ["! data: a: longer than data.seq_len=33: 3 dropped"]
    cut = made(source, seq_len=33, validation=0, pack=False, too_long="truncate")
    assert sorted(len(d[0]) for d in documents(epoch_batches(cut))) == [15, 33, 33, 33]
    assert cut.losses() == ["! data: a: longer than data.seq_len=33: 1 dropped, 2 truncated"]
    with pytest.raises(UserError, match=r"data.seq_len=4: every one of 5 examples is longer and was dropped; raise it, or set data.too_long"):
        made(source, seq_len=4, validation=0)


def test_a_long_prompt_loses_exemplars_first(sources):
    data = made({"task": dataclasses.replace(sources["task"], few_shot=1.0, shots=8)}, validation=0)
    texts = [BYTES.decode(d[0]) for d in documents(epoch_batches(data))]
    assert len(texts) == 30 and len({text.count("\n\n") for text in texts}) >= 3
    assert data.lost["task"].shortened > 5 and data.lost["task"].dropped == 0


# ---------------------------------------------------------------- validation


def test_validation_rows_are_the_same_each_time_and_shared_out(sources):
    cfg = InstructionData(sources=sources, seq_len=SEQ, template="own", validation=0.2)
    prepared = prepare(cfg, BYTES, log=lambda text: None)
    whole = InstructionValidation(prepared, cfg, 4, 0)
    batches = list(whole.batches())
    again = list(whole.batches())
    assert all((a[name] == b[name]).all() for a, b in zip(batches, again, strict=True) for name in a)
    halves = [list(InstructionValidation(prepared, cfg, 4, 0, share, 2).batches()) for share in range(2)]
    for n, batch in enumerate(batches):
        assert all((np.concatenate([half[n][name] for half in halves]) == batch[name]).all() for name in batch)
    seen = [d for batch in batches for d in documents(batch)]
    assert len(seen) == sum(len(m.rows) for m in prepared.instructions.validation) > 10
    learned = [t for _, targets, weights, _ in seen for t, w in zip(targets, weights, strict=True) if w]
    assert whole.n_bytes == len(BYTES.decode(learned).encode()) == InstructionValidation(prepared, cfg, 4, 0, 1, 2).n_bytes
    some = InstructionValidation(prepared, cfg, 4, 3)
    assert len(list(some.batches())) == 1 and sum(b["doc_BT"].any(1).sum() for b in some.batches()) == 3
    trained = {d for step in first(made(sources, validation=0.2).batches(), 60) for d in documents(step)}
    assert not trained & set(seen)


def test_no_validation(sources):
    cfg = InstructionData(sources=sources, seq_len=SEQ, validation=0)
    assert list(InstructionValidation(prepare(cfg, BYTES), cfg, 4, 0).batches()) == []


# ---------------------------------------------------------------- pretraining rows


def store(n_documents, seed) -> Store:
    pick = random.Random(seed)
    texts = [[BYTES.bos_id, *[200 + seed] * pick.randrange(1, 50), BYTES.eos_id] for _ in range(n_documents)]
    return Store(np.concatenate(texts).astype(np.uint16), np.cumsum([len(t) for t in texts]), np.array([len(t) - 2 for t in texts]))


def rows_of_text(stores, weights, n, seed=0) -> list[bytes]:
    """Returns the first n rows of pretraining that are drawn."""
    rows = PretrainingRows(stores, weights, SEQ, seed, BYTES.pad_id)
    batch = empty_batch(n, SEQ, BYTES.pad_id)
    for k in range(n):
        rows.fill(batch, k, k)
    assert (batch["weight_BT"] == (batch["target_BT"] != BYTES.bos_id) * (batch["target_BT"] != BYTES.pad_id)).all()
    assert (batch["doc_BT"].max(1) > 1).any()
    return [row.tobytes() for row in batch["token_BT"]]


def test_rows_of_text_come_by_weight_and_each_equally_often():
    stores = [store(20, 0), store(9, 1)]
    sizes = [n_rows(len(s.tokens), SEQ) for s in stores]
    drawn = rows_of_text(stores, [3.0, 1.0], 2000)
    own = [set(rows_of_text([s], [1.0], n)) for s, n in zip(stores, sizes, strict=True)]
    assert [len(rows) for rows in own] == sizes  # each once before any comes again
    of_first = [row for row in drawn if row in own[0]]
    assert len(of_first) == 1500 and sum(row in own[1] for row in drawn) == 500
    counts = collections.Counter(of_first)
    assert max(counts.values()) - min(counts.values()) <= 1 and len(counts) == sizes[0]
    assert abs(sum(row in own[0] for row in drawn[:200]) - 150) < 25 and drawn != rows_of_text(stores, [3.0, 1.0], 2000, seed=1)


def test_a_share_of_the_rows_is_of_pretraining(sources):
    cfg = InstructionData(sources=sources, seq_len=SEQ, template="own")
    prepared = prepare(cfg, BYTES, log=lambda text: None)

    def mixed(share):
        rows = PretrainingRows([store(20, 0)], [1.0], SEQ, 0, BYTES.pad_id)
        return InstructionInput(prepared, cfg, 5, 0, pretraining=rows, pretraining_share=share)

    data, n = mixed(0.1), 60
    batches = first(data.batches(), n)
    wanted = rows_of_text([store(20, 0)], [1.0], n // 2)
    of_text = [(step, b) for step, batch in enumerate(batches) for b in range(5) if batch["token_BT"][b].tobytes() in wanted]
    assert [batches[step]["token_BT"][b].tobytes() for step, b in of_text] == wanted  # 5 n rows, a tenth of them, in order
    assert len({step for step, _ in of_text}) == n // 2  # evenly spread
    rest = [d for step, batch in enumerate(batches) for b in range(5) if (step, b) not in of_text
            for d in documents({name: array[b : b + 1] for name, array in batch.items()})]
    alone = [d for batch in first(InstructionInput(prepared, cfg, 9, 0).batches(), n // 2) for d in documents(batch)]
    assert rest == alone  # none lost, the order kept
    for a, b in zip(batches[40:], first(mixed(0.1).batches(40), n - 40), strict=True):
        assert (a["token_BT"] == b["token_BT"]).all()
    assert data.n_steps(1) == -(-round(np.ceil(data.firsts[1] / 0.9)) // 5)
    assert "10.0% of the rows are of pretraining" in data.describe()


# ---------------------------------------------------------------- what is said


def test_what_is_trained_on_is_told(sources, tmp_path):
    rows = [{"q": str(i), "a": "x"} for i in range(30)]
    (tmp_path / "held.json").write_text(json.dumps({"rows": rows, "cluster": "c", "templates": [{"input": "{q}", "target": "{a}"}]}))
    data = made(sources | {"held": InstructionSource(path=str(tmp_path / "held.json"))}, validation=0, hold_out=["c"])
    told = data.describe(100).split("\n")
    assert told[0].startswith("data: an epoch: 160 examples, ") and " rows that are 9" in told[0] and "epochs in 100 steps" in told[0]
    assert told[1:] == ["data: pairs: 90 examples, 90 an epoch, 56.2% of all", "data: talks: 40 examples, 40 an epoch, 25.0% of all",
                        "data: task: 30 examples, 30 an epoch, 18.8% of all", "data: held out: held (c)",
                        *data.losses()]


def test_mistakes_are_told_before_anything_is_encoded(sources):
    with pytest.raises(UserError, match=r"template chatml: tokenizer bytes has no token '<\|im_start\|>'"):
        made(sources | {"task": dataclasses.replace(sources["task"], template="chatml")})
    with pytest.raises(UserError, match=r"train\.batch_size=4 is not divisible by the 3 processes"):
        made(sources, shares=3)
