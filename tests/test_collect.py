"""Comparing answers: what is read and sampled, what is written and when, what it says, and the page in a real browser."""

import contextlib
import http.client
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import browser
import numpy as np
import pytest
import runs

from jaxllm import cli
from jaxllm.align.collect.appended import Appended
from jaxllm.align.collect.config import CollectVerb
from jaxllm.align.collect.items import ReadyItems, digest, read_prompts
from jaxllm.align.collect.labels import Labels, as_line
from jaxllm.align.collect.results import results, told
from jaxllm.align.collect.sampling import SampledItems
from jaxllm.align.collect.serve import Collect
from jaxllm.data import preference
from jaxllm.data.preference_config import PreferenceData, PreferenceSource
from jaxllm.data.preference_rows import as_messages
from jaxllm.data.review.local import make_server
from jaxllm.errors import RunError, UserError

ROOT = pathlib.Path(__file__).parents[1]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(path, n, k=2):
    return write(path, *[{"prompt": f"p{i}", "answers": [f"a{i}-{j}" + "x" * j for j in range(k)]} for i in range(n)])


def collect(tmp_path, n=6, k=2, **settings) -> Collect:
    cfg = CollectVerb(answers=str(pairs(tmp_path / "ready.jsonl", n, k)), output=str(tmp_path / "out.jsonl"), **settings)
    return Collect(ReadyItems(cfg.answers, cfg.items, cfg.seed), Labels(tmp_path / "out.jsonl"), cfg)


def compare(app: Collect, annotator: str, n: int, best: int | None = None, **more) -> dict:
    """Compares what is at place n of an annotator's order; `best` is a number of the output's answers, None a tie."""
    shown = app.item(n, annotator)
    rank = [1 if best in (None, i) else 2 for i in shown["shown"]]
    return app.put({"n": n, "id": shown["id"], "annotator": annotator, "shown": shown["shown"], "rank": rank} | more)


def read_back(path, **settings):
    cfg = PreferenceData(sources={"s": PreferenceSource(path=str(path))}, validation=0.0, seq_len=64, **settings)
    return preference.read(cfg, lambda p, a: ([2, *map(ord, as_messages(p)[-1]["content"])], [*map(ord, a), 1]), 0)


# ---------------------------------------------------------------- what is compared


def test_ready_answers_are_read_in_every_form(tmp_path):
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write(tmp_path / "r.jsonl", {"prompt": "q", "answers": ["a", "b", "a"]}, {"prompt": "q", "answers": ["a", " "]},
                 {"prompt": "q", "chosen": "x", "rejected": "y"}, {"chosen": said, "rejected": [said[0], said[1] | {"content": "b"}]},
                 {"prompt": "q", "answers": ["a", "b"], "rank": [1, 2], "annotator": "old"})
    items = ReadyItems(str(path), 0, 0)
    assert [one.answers for one in items.of] == [("a", "b"), ("x", "y"), ("a", "b")] and items.n_same == 1  # the last is the first again
    assert items.of[2].prompt == said[:1]


@pytest.mark.parametrize(("row", "says"), [
    ({"prompt": "q", "answers": ["a"]}, "r.jsonl:2: 1 answer: should be two or more to compare"),
    ({"prompt": "q", "answers": []}, "r.jsonl:2: 0 answers: should be two or more"),
    ({"prompt": "q", "answers": list("abcdefghij")}, "r.jsonl:2: 10 answers: should be at most 9"),
    ({"prompt": "q", "answers": "ab"}, 'r.jsonl:2: should be {"prompt": ..., "answers"'),
    ({"answers": ["a", "b"]}, 'r.jsonl:2: no "prompt"'),
    ({"prompt": "q", "chosen": "a"}, "r.jsonl:2: no 'rejected'"),
])
def test_wrong_ready_answers_are_told(tmp_path, row, says):
    path = write(tmp_path / "r.jsonl", {"prompt": "q", "answers": ["a", "b"]}, row)
    with pytest.raises(UserError, match=re.escape(says)):
        ReadyItems(str(path), 0, 0)


def test_a_draw_of_items_is_the_same_each_time(tmp_path):
    path = str(pairs(tmp_path / "r.jsonl", 50))
    assert ReadyItems(path, 10, 1).keys == ReadyItems(path, 10, 1).keys != ReadyItems(path, 10, 2).keys
    assert len(set(ReadyItems(path, 10, 1).keys)) == 10 and set(ReadyItems(path, 10, 1).keys) < set(ReadyItems(path, 0, 1).keys)


class Said:
    """A model that gives prepared answers, and counts how often it is asked for which prompts."""

    step = 7

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def __call__(self, prompts):
        self.asked += prompts
        return [self.answers(p) for p in prompts]


def two(prompt):
    return (f"yes {prompt}", f"no {prompt}")


def sampled(tmp_path, answers=two, n=20, **settings):
    prompts = read_prompts(str(write(tmp_path / "p.jsonl", *[{"prompt": f"p{i % n}"} for i in range(n + 3)])), 0, 0)
    cfg = CollectVerb(run="runs/x", prompts="p.jsonl", **settings)
    said = Said(answers)
    return SampledItems(prompts, cfg, tmp_path / "out.answers.jsonl", said), said


def test_answers_are_sampled_once_and_kept(tmp_path):
    items, said = sampled(tmp_path)
    assert items.item(5).answers == two("p5") and said.asked[0] == "p5" and len(said.asked) == 8  # and some ahead
    items.sample_all()
    assert sorted(said.asked) == sorted(f"p{i}" for i in range(20))  # each prompt once, though three are there twice
    later, other = sampled(tmp_path)
    later.sample_all()
    assert not other.asked and [later.known(i) for i in range(20)] == [items.known(i) for i in range(20)]
    three = CollectVerb(run="runs/x", prompts="p.jsonl", n=3)
    with pytest.raises(UserError, match=r"answers\.jsonl:1: these answers were sampled with n=2, now 3; another --output"):
        SampledItems(later.prompts, three, tmp_path / "out.answers.jsonl", said)


def test_prompts_without_two_different_answers_are_left_out_and_counted(tmp_path):
    items, _ = sampled(tmp_path, lambda p: ("same",) if p in ("p3", "p4") else two(p))
    app = Collect(items, Labels(tmp_path / "out.jsonl"), CollectVerb(run="x", prompts="p.jsonl", output=str(tmp_path / "out.jsonl"), on_demand=True))
    seen = 0
    while (n := app.state("ada")["next"]) is not None:
        compare(app, "ada", n, 0)
        seen += 1
    assert seen == 18 and items.n_same == 2
    left_out = app.order("ada").index(items.keys.index(digest("p3")))
    assert app.item(left_out, "ada") == {"n": left_out, "left_out": True}


def test_people_at_once_sample_a_prompt_once(tmp_path):
    items, said = sampled(tmp_path)
    threads = [threading.Thread(target=items.item, args=(i % 4,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said.asked) == len(set(said.asked)) == 8


# ---------------------------------------------------------------- what is written


def test_a_comparison_is_the_line_that_the_reward_model_reads(tmp_path):
    app = collect(tmp_path, n=4, objective="helpful")
    compare(app, "ada", 0, best=1, note="clear")
    compare(app, "ada", 1)
    compare(app, "ada", 2, both_bad=True)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in rows] == [[2, 1], [1, 1], [1, 1]] and [row.get("both_bad") for row in rows] == [None, None, True]
    assert {row["objective"] for row in rows} == {"helpful"} and rows[0]["note"] == "clear" and sorted(rows[0]["shown"]) == [0, 1]
    found = read_back(tmp_path / "out.jsonl", objectives=["helpful"])
    assert len(found.train) == 1 and found.counts["s"]["tied"] == 2
    group = found.train.of[0]
    assert "".join(map(chr, group.answers[group.rank.index(0)][:-1])) == rows[0]["answers"][1]


def test_ranks_are_given_for_answers_not_for_places(tmp_path):
    app = collect(tmp_path, n=1, k=3)
    item = app.item(0, "ada")
    for shown in itertools.permutations(range(3)):
        app.put({"n": 0, "id": item["id"], "annotator": "ada", "shown": list(shown), "rank": [1, 2, 3]})
        [row] = app.labels.by.values()
        assert [row["rank"][i] for i in shown] == [1, 2, 3]
        assert app.item(0, "ada")["shown"] == list(shown)  # and so it is shown again
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1  # changed, not added


def test_orders_are_drawn_for_each_annotator_and_stay(tmp_path):
    app = collect(tmp_path, n=200)
    for again in (app, Collect(app.items, app.labels, app.cfg)):
        assert [again.order(e) for e in ("ada", "bob")] == [app.order(e) for e in ("ada", "bob")]
    assert app.order("ada") != app.order("bob") and sorted(app.order("ada")) == list(range(200))
    first = {e: [app.item(app.order(e).index(i), e)["shown"][0] for i in range(200)] for e in ("ada", "bob")}
    assert all(70 <= sum(places) <= 130 for places in first.values())  # 200 coins: four standard deviations are 28
    assert 70 <= sum(a != b for a, b in zip(first["ada"], first["bob"], strict=True)) <= 130


@pytest.mark.parametrize(("overlap", "annotators", "expected"), [(0.0, 2, 1.0), (1.0, 3, 3.0), (0.3, 2, 1.3)])
def test_as_many_items_as_asked_for_are_compared_by_several(tmp_path, overlap, annotators, expected):
    n_items = 200 if 0 < overlap < 1 else 40  # four standard deviations of 200 coins of 0.3 are 0.13
    app = collect(tmp_path, n=n_items, overlap=overlap, annotators=annotators)
    for annotator in ("ada", "bob", "cy", "di"):
        n = app.next_for(annotator, -1)
        while n is not None:
            n = compare(app, annotator, n, 0)["next"]
    assert len(app.labels.by) / n_items == pytest.approx(expected, abs=0.13 * (0 < overlap < 1))
    assert max(len(found) for found in app.labels.by_item().values()) == (1 if overlap == 0 else annotators)


def test_undo_takes_back_ones_own_last_comparison(tmp_path):
    app = collect(tmp_path)
    ids = [app.item(n, "ada")["id"] for n in range(3)]
    for n in range(3):
        compare(app, "ada", n, 0)
        compare(app, "bob", n, 0)
    compare(app, "ada", 0, 1)  # changed: the last one said
    assert [app.undo("ada")["n"] for _ in range(3)] == [0, 2, 1]
    assert not [key for key in Labels(tmp_path / "out.jsonl").by if key[1] == "ada"] and len(app.labels.by) == 3 and ids[0] != ids[1]
    with pytest.raises(UserError, match="nothing of yours to take back"):
        app.undo("ada")


@pytest.mark.parametrize(("wrong", "says"), [
    ({"rank": [1]}, "rank=[1]: should be 2 numbers"), ({"rank": [2, 2]}, "should be 2 numbers from 1"), ({"rank": [1, 3]}, "should be 2 numbers"),
    ({"rank": [True, 2]}, "should be 2 numbers"), ({"rank": [1, 2], "both_bad": True}, "are tied: rank should be 1 of each"), ({"shown": [0, 0]}, "shown=[0, 0]"),
    ({"annotator": "a/b"}, "should be a name"), ({"id": "x"}, "is not at place 0 any more"), ({"n": "0"}, "not at place '0'"), ({"n": -1}, "not at place -1"),
])
def test_what_is_no_comparison_is_refused(tmp_path, wrong, says):
    app = collect(tmp_path)
    item = app.item(0, "ada")
    right = {"n": 0, "id": item["id"], "annotator": "ada", "shown": item["shown"], "rank": [1, 2]}
    with pytest.raises(UserError, match=re.escape(says)):
        app.put(right | wrong)
    assert not (tmp_path / "out.jsonl").read_text()


def test_half_a_line_of_a_kill_is_cut_off(tmp_path):
    app = collect(tmp_path)
    compare(app, "ada", 0, 0)
    whole = (tmp_path / "out.jsonl").read_bytes()
    for cut in (1, 20, len(whole) - 2):
        (tmp_path / "out.jsonl").write_bytes(whole + whole[:cut])
        assert Labels(tmp_path / "out.jsonl").by == app.labels.by and (tmp_path / "out.jsonl").read_bytes() == whole
    (tmp_path / "out.jsonl").write_bytes(whole[:-1])  # whole but for its end
    assert Labels(tmp_path / "out.jsonl").by == app.labels.by and (tmp_path / "out.jsonl").read_bytes() == whole
    (tmp_path / "out.jsonl").write_bytes(whole[:50])
    assert not Labels(tmp_path / "out.jsonl").by


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    app = collect(tmp_path)
    compare(app, "ada", 0, 0)
    whole, before = (tmp_path / "out.jsonl").read_bytes(), dict(app.labels.by)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for act in (lambda: compare(app, "ada", 1, 0), lambda: compare(app, "ada", 0, 1), lambda: app.undo("ada")):
        with pytest.raises(RunError, match="No space left"):
            act()
        assert (tmp_path / "out.jsonl").read_bytes() == whole and app.labels.by == before


def test_comparisons_of_many_threads_are_all_there(tmp_path):
    app = collect(tmp_path, n=15, overlap=1.0, annotators=4)
    threads = [threading.Thread(target=lambda e=e: [compare(app, e, n, 0) for n in range(15)]) for e in ("ada", "bob", "cy", "di")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Labels(tmp_path / "out.jsonl").by) == 60


def test_another_file_is_not_written_to(tmp_path):
    path = write(tmp_path / "out.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"})
    with pytest.raises(UserError, match=r"out\.jsonl:1: is no line of jaxllm rlhf collect"):
        Labels(path)
    write(tmp_path / "x.answers.jsonl", {"prompt": "q", "answers": ["a", "b"]})
    with pytest.raises(UserError, match="is no line of sampled answers"):
        SampledItems(["q"], CollectVerb(run="r", prompts="p"), tmp_path / "x.answers.jsonl", Said(two))


def test_a_long_last_line_is_found_whole(tmp_path):
    path, rows = tmp_path / "a.jsonl", [{"text": "x" * 200_000}, {"text": "y" * 200_000}]
    for row in rows:
        Appended(path).append(as_line(row))
    path.write_bytes(path.read_bytes() + b'{"text": "' + b"z" * 200_000)
    assert [row for _, row in Appended(path).rows()] == rows


# ---------------------------------------------------------------- what it says


def test_agreement_is_of_pairs_and_both_bad_is_no_tie(tmp_path):
    app = collect(tmp_path, n=3, overlap=1.0)
    place = {e: [app.order(e).index(i) for i in range(3)] for e in ("ada", "bob")}
    for e in ("ada", "bob"):
        compare(app, e, place[e][0], best=1)  # the same answer, wherever it was shown
    compare(app, "ada", place["ada"][1])
    compare(app, "bob", place["bob"][1], both_bad=True)
    compare(app, "ada", place["ada"][2], best=0)
    found = app.results()
    assert (found["agreement"]["documents"], found["agreement"]["same"]) == (2, 1) and found["comparisons"] == 5
    assert found["annotators"] == {"ada": {"decided": 2, "tied": 1, "both bad": 0}, "bob": {"decided": 1, "tied": 0, "both bad": 1}}
    [row] = found["disagreements"]
    assert row["said"] == {"ada": "1 = 2", "bob": "both bad"} and "Cohen's kappa" in told(found)


def test_agreement_of_a_simulation_is_what_was_planted(tmp_path):
    """Annotators who see which answer is better with probability 0.9: they agree in 0.82, beyond chance 0.64."""
    app, rng = collect(tmp_path, n=400, overlap=1.0), np.random.default_rng(0)
    better = rng.integers(0, 2, 400)
    for e in ("ada", "bob"):
        for n, i in enumerate(app.order(e)):
            item = app.items.known(i)
            best = int(better[i] if rng.random() < 0.9 else 1 - better[i])
            app.labels.by[item.id, e] = {"rank": [1 + (best != 0), 1 + (best != 1)], "shown": app.item(n, e)["shown"], "id": item.id,
                                         "annotator": e, "answers": list(item.answers), "prompt": item.prompt}
    found = results(app.items, app.labels, 0.95, 0)
    for e in (found["agreement"]["krippendorff"], found["agreement"]["cohen"][0]["kappa"]):
        assert e.value == pytest.approx(0.64, abs=0.15) and e.low < 0.64 < e.high  # four standard deviations
    assert found["shown_first"].value == pytest.approx(0.5, abs=0.07)  # 800 coins, four standard deviations
    assert found["longer"].value == pytest.approx(0.5, abs=0.1)  # nearer 400, as two say the same of each
    assert found["longer"].high - found["longer"].low > 1.25 * (found["shown_first"].high - found["shown_first"].low)


def test_a_place_that_decides_is_told(tmp_path):
    app = collect(tmp_path, n=30, k=3)
    for n in range(30):
        compare(app, "ada", n, app.item(n, "ada")["shown"][0])
    found = app.results()
    assert found["shown_first"].value == 1 and found["longer"].low < 0.6 < 0.9 and "the answer shown first was preferred in 1.00" in told(found)


# ---------------------------------------------------------------- the verb


def test_wrong_command_lines_are_told_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ready, out = pairs(tmp_path / "r.jsonl", 2), tmp_path / "out.jsonl"
    (tmp_path / "folder").mkdir()
    (tmp_path / "unread.jsonl").mkdir()
    for words, says in (
        ([], "give one of --prompts=FILE"), ([f"--answers={ready}", "--prompts=x"], "not both"),
        (["--prompts=x"], "--prompts=FILE needs a run"), ([str(tmp_path), f"--prompts={ready}"], "not a run folder (no config.yaml)"), (["runs/x", f"--answers={ready}"], "--answers=FILE needs no run, found 'runs/x'"),
        ([f"--answers={tmp_path / 'none.jsonl'}", f"--output={out}"], "no such file or folder"),
        ([f"--answers={tmp_path / 'unread.jsonl'}", f"--output={out}"], "the folder is empty"),
        ([f"--answers={ready}", f"--output={tmp_path / 'no' / 'file' / 'out.txt'}"], "should end in .jsonl"),
        ([f"--answers={ready}", f"--output={ready}"], "is where answers come from"),
        ([f"--answers={ready}", f"--output={tmp_path / 'r.jsonl' / 'out.jsonl'}"], "cannot be written"),
        ([f"--answers={ready}", f"--output={out}", "--guidelines=none.txt"], "guidelines=none.txt: cannot be read"),
        ([f"--answers={ready}", f"--output={out}", "--n=1"], "n=1: should be 2 to 9"),
        (["runs/x", "--prompts=p", "--sample.temperature=0"], "sample.temperature=0.0: should be above 0"),
        (["runs/x", "runs/y"], "expected one run folder at most"),
    ):
        assert cli.main(["rlhf", "collect", *words]) == 2, words
        assert says in capsys.readouterr().err, says
    assert ready.read_text().count("\n") == 2 and sorted(p.name for p in tmp_path.iterdir()) == ["folder", "out.jsonl", "out.lock", "r.jsonl", "unread.jsonl"]


def test_the_verb_tells_what_comparisons_say_without_a_page(tmp_path, capsys):
    app = collect(tmp_path, n=3, overlap=1.0)
    for e in ("ada", "bob"):
        for n in range(3):
            compare(app, e, n, 0)
    words = ["rlhf", "collect", f"--answers={app.cfg.answers}", f"--output={app.cfg.output}", "--serve=false", f"--json={tmp_path / 'j'}"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "6 comparisons of 3 items (of 3) by 2 annotators" in out and "100% the same" in out
    assert json.loads((tmp_path / "j").read_text())["comparisons"] == 6


def asked(port, method, path, body=None, **headers):
    headers = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        with connection.getresponse() as answer:
            text = answer.read().decode()
    return answer.status, json.loads(text) if answer.headers.get_content_type() == "application/json" else text


COMMAND = [sys.executable, "-m", "jaxllm", "rlhf", "collect"]
HERE = {"text": True, "cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}}


@contextlib.contextmanager
def started(*words, port=0):
    """Yields (the command as it serves, its port); whatever happens, it is ended."""
    process = subprocess.Popen([*COMMAND, *words, f"--port={port}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **HERE)
    with process:
        try:
            yield process, int(re.search(r"http://127.0.0.1:(\d+)/", process.stdout.readline())[1])
        finally:
            process.kill()


def test_a_kill_loses_no_comparison_that_was_answered_and_the_same_command_goes_on(tmp_path):
    words = [f"--answers={pairs(tmp_path / 'r.jsonl', 40)}", f"--output={tmp_path / 'out.jsonl'}", "--overlap=1", "--annotators=9"]
    with started(*words) as (process, port):
        timer, answered = threading.Timer(0.02, process.kill), []
        with contextlib.suppress(OSError, http.client.HTTPException):
            for k in itertools.count():
                if k == 20:
                    timer.start()
                e, n = f"e{k // 40}", k % 40
                item = asked(port, "GET", f"/api/item?n={n}&annotator={e}")[1]
                sent = {"n": n, "id": item["id"], "annotator": e, "shown": item["shown"], "rank": [1, 2]}
                assert asked(port, "POST", "/api/label", sent)[0] == 200
                answered.append((item["id"], e))
        timer.join()
    with started(*words) as (process, port):
        second = subprocess.run([*COMMAND, *words], capture_output=True, check=False, **HERE)
        assert second.returncode == 2 and "another `jaxllm rlhf collect` serves it" in second.stderr
        process.send_signal(signal.SIGTERM)
        out, wrong = process.communicate(timeout=30)
    there = Labels(tmp_path / "out.jsonl").by
    assert len(answered) >= 20 and set(answered) <= there.keys() and len(there) <= len(answered) + 1
    assert process.returncode == 0 and f"{len(there)} comparisons" in out and not wrong


@pytest.mark.slow
def test_a_runs_model_answers_prompts(tmp_path, capsys, monkeypatch):
    assert cli.main(["pretrain", str(runs.config(tmp_path, train={"eval_every": 0}))]) == 0
    prompts = write(tmp_path / "p.jsonl", *[{"prompt": f"the {w}"} for w in ("cat", "dog", "man")], {"prompt": [{"role": "user", "content": "hi"}]})
    words = [str(tmp_path / "run"), f"--prompts={prompts}", f"--output={tmp_path / 'out.jsonl'}", "--sample.max_tokens=8", "--n=3"]
    assert cli.main(["rlhf", "collect", *words, "--port=99999"]) == 2
    assert cli.main(["rlhf", "collect", *words]) == 2 and "a prompt is a list of messages; --template=NAME" in capsys.readouterr().err
    settings = tmp_path / "run" / "config.yaml"  # as of a run of sft
    settings.write_text(settings.read_text().replace("\ndata:\n", "\ndata:\n  template: plain\n"))
    asked_for = []

    def one_visit(app, port, says):
        assert not app.items.answers and "4 items to compare" in says  # nothing is sampled before somebody comes
        with serving(app) as port:
            asked_for.extend(asked(port, "GET", f"/api/item?n={n}&annotator=ada")[1] for n in range(4))

    monkeypatch.setattr("jaxllm.align.collect.verb.serve", one_visit)
    assert cli.main(["rlhf", "collect", *words, "--on_demand"]) == 0
    assert all(len(set(item["answers"])) == 3 for item in asked_for)
    rows = [json.loads(line) for line in (tmp_path / "out.answers.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and {row["made_by"]["template"] for row in rows} == {"plain"} and all(row["made_by"]["step"] for row in rows)


# ---------------------------------------------------------------- the page


@contextlib.contextmanager
def serving(app):
    server = make_server(app, 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:  # a test that fails would wait for the thread for ever
        server.shutdown()
        thread.join()
        server.server_close()


def test_only_this_machines_page_is_answered(tmp_path):
    app = collect(tmp_path)
    item = app.item(0, "ada")
    label = {"n": 0, "id": item["id"], "annotator": "ada", "shown": item["shown"], "rank": [1, 2]}
    with serving(app) as port:
        assert asked(port, "GET", "/api/state", Host=f"evil.example:{port}")[0] == 403
        for path in ("/api/label", "/api/undo"):
            assert asked(port, "POST", path, label, Origin="http://evil.example")[0] == 403
            assert asked(port, "POST", path, label, Content_Type="text/plain")[0] == 404
        assert asked(port, "GET", "/../out.jsonl")[0] == 404 and asked(port, "GET", "/api/item?n=99&annotator=ada")[0] == 404
        assert not app.labels.by
        assert asked(port, "POST", "/api/label", label, Origin=f"http://127.0.0.1:{port}") == (200, {"next": 1})
        assert asked(port, "POST", "/api/label", label | {"rank": "x"})[0] == 400 and asked(port, "GET", "/api/state?annotator=a/b")[0] == 400
        with pytest.raises(UserError, match="--port=0 takes any that is free"):
            make_server(app, port)


def test_the_page_loads_nothing_from_elsewhere():
    page = (ROOT / "jaxllm/align/collect/page.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:,)[^"']|https?://|@import|url\(|innerHTML|outerHTML|insertAdjacent|eval\(""", page)


ATTACK = "<img src=x onerror='document.title=\"owned\"'><script>document.title='owned'</script>"
needs_browser = pytest.mark.skipif(browser.find() is None, reason="no chromium or chrome on this machine: the page is not tried")


@pytest.mark.slow
@needs_browser
def test_comparing_in_a_browser(tmp_path):
    rows = [{"prompt": ATTACK, "answers": [ATTACK + "1", ATTACK + "2"]}, *[{"prompt": f"p{i}", "answers": [f"a{i}", f"b{i}"]} for i in range(7)]]
    cfg = CollectVerb(answers=str(write(tmp_path / "r.jsonl", *rows)), output=str(tmp_path / "out.jsonl"), overlap=1.0, objective="helpful")
    app = Collect(ReadyItems(cfg.answers, 0, 0), Labels(tmp_path / "out.jsonl"), cfg)

    def said(n, e="Ada L."):
        item = app.items.known(app.order(e)[n])
        row = app.labels.by.get((item.id, e))
        return row and ([row["rank"][i] for i in row["shown"]], row.get("both_bad", False), row.get("note", ""))

    with serving(app) as port, browser.Browser(tmp_path / "profile") as page:
        address = f"http://127.0.0.1:{port}/"
        page.open(address)
        page.wait("document.activeElement.id === 'name'")  # type at once
        page.type("Ada L.")
        page.evaluate("document.querySelector('#who form').requestSubmit()")
        page.wait("document.querySelectorAll('.answers .text').length === 2")
        assert "Which answer would you rather" in page.evaluate("document.querySelector('#guide div').innerText")
        # by keys: 2, 1, a tie, both bad; each is saved before the next is shown
        for n, (key, rank, bad) in enumerate((("2", [2, 1], False), ("1", [1, 2], False), ("t", [1, 1], False), ("b", [1, 1], True))):
            page.press(key)
            page.wait(f"item.n === {n + 1} && !busy")
            assert said(n) == (rank, bad, "")
        page.press("3")  # there is no third answer
        # undo: two back, then said otherwise
        for n in (3, 2):
            page.press("u")
            page.wait(f"item.n === {n} && !busy && !item.rank && document.getElementById('said').textContent.startsWith('taken back')")
            assert said(n) is None
        page.press("1")
        page.wait("item.n === 3 && !busy")
        assert said(2) == ([1, 2], False, "")
        # a note: letters in it are no answers
        page.press("n")
        page.wait("document.activeElement.id === 'note'")
        for key in ("b", "u", "t", "1", "Escape"):
            page.press(key)
        page.press("t")
        page.wait("item.n === 4 && !busy")
        assert said(3) == ([1, 1], False, "but1")
        # a press while one is being saved is for nothing that was seen
        page.evaluate("choose(0); choose(1); tie()")
        page.wait("item.n === 5 && !busy")
        assert said(4) == ([1, 2], False, "") and said(5) is None
        # back: what was said is shown; by mouse it is changed
        page.press("ArrowLeft")
        page.wait("item.n === 4 && document.querySelector('[data-answer=\"0\"]').classList.contains('first')")
        page.evaluate("document.querySelector('[data-answer=\"1\"] figcaption').click()")
        page.wait("!busy && document.getElementById('said').textContent === 'saved: 2 is best'")
        assert said(4) == ([2, 1], False, "")
        # loaded anew: goes on where it was, with the answers in the same places
        before = page.evaluate("JSON.stringify([item.n, item.shown])")
        page.open("about:blank")
        page.open(address + "?annotator=Ada%20L.")
        page.wait("document.querySelector('.answers .text') && !busy")
        assert page.evaluate("JSON.stringify([item.n, item.shown])") == before
        assert page.evaluate("document.getElementById('progress').textContent") == "5 of 8 compared by you"
        # text is text: nothing in it runs
        place = app.order("Ada L.").index(0)
        page.evaluate(f"open({place})")
        page.wait(f"item.n === {place} && item.answers[0].startsWith('<img')")
        assert page.evaluate("document.querySelector('#prompt .text').textContent") == ATTACK
        assert page.evaluate("document.querySelector('.answers .text').textContent").startswith(ATTACK)
        assert page.evaluate("document.title") != "owned" and not page.evaluate("document.querySelectorAll('#label img, #label script').length")
        # a second annotator says all, and the results are shown
        page.open(address + "?annotator=grace")
        page.wait("document.querySelector('.text') && annotator === 'grace'")
        for i in range(8):
            page.evaluate(f"document.querySelector('[data-choice=\"{i % 2}\"]').click()")
            page.wait(f"!busy && state.done.filter(Boolean).length === {i + 1}")
        page.wait("!document.getElementById('done').hidden")
        page.press("r")
        page.wait("document.querySelector('#results table')")
        told_there = page.evaluate("document.getElementById('results').innerText")
        assert "Krippendorff's alpha" in told_there and "Cohen's kappa, Ada L. and grace" in told_there and "13 comparisons of 8 items" in told_there
        # a phone: everything within the width, the buttons in sight
        page.resize(400, 800)
        for shown in ("open(0)", "results()"):
            page.evaluate(shown)
            assert page.evaluate("document.documentElement.scrollWidth") <= 400
        page.evaluate("open(0)")
        assert page.evaluate("[...document.querySelectorAll('[data-choice]')].every(b => b.getBoundingClientRect().bottom <= innerHeight)")
        hosts = page.evaluate("[...new Set(performance.getEntriesByType('resource').map(e => new URL(e.name).host))]")
        assert hosts == [f"127.0.0.1:{port}"] and not page.console  # only this server was asked


BREAD = ("You left out the yeast. Stir 7 g of dry yeast (one sachet) into the lukewarm water, wait five minutes, and knead it in with the "
         "flour and the salt. Let the dough rest for an hour in a warm place, until it has doubled, before you bake it.\n\nIf you would "
         "rather not use yeast: 100 g of active sourdough starter does the same, overnight.",
         "Bread is one of the oldest foods. It has been made for at least 14,000 years, and many cultures have a bread of their own. There "
         "are many reasons for which a bread may not rise, and it is always a good idea to look at the recipe again.\n\n- Flour\n- Water\n"
         "- Salt", "Use warmer water.", "Baking powder, one spoon of it, or two.", "I do not know.", "Flour.", "Yeast!", "Try rye.", "Ask a baker.")


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("k", [2, 3, 4, 9])
def test_answers_and_buttons_are_in_sight(tmp_path, k):
    """On a desk and on a phone. JAXLLM_PICTURES=FOLDER keeps pictures of both."""
    row = {"prompt": "My bread does not rise. I used 500 g of flour, 300 ml of water and a spoon of salt. What did I forget?", "answers": BREAD[:k]}
    cfg = CollectVerb(answers=str(write(tmp_path / "r.jsonl", row)), output=str(tmp_path / "preferences.jsonl"), ranking="full")
    app, folder = Collect(ReadyItems(cfg.answers, 0, 0), Labels(tmp_path / "preferences.jsonl"), cfg), os.environ.get("JAXLLM_PICTURES")
    with serving(app) as port, browser.Browser(tmp_path / "profile") as page:
        for name, size, least in (("desk", (1280, 800), 70), ("phone", (400, 800), 60)):
            page.resize(*size)
            page.open("about:blank")
            page.open(f"http://127.0.0.1:{port}/?annotator=Ada")
            page.wait(f"document.querySelectorAll('.answers .text').length === {k}")
            if k == 2:
                page.press("1")
                page.wait("item.rank && !busy")
            heights = page.evaluate("[...document.querySelectorAll('.answers .text')].map(t => t.clientHeight)")
            assert min(heights) >= least and page.evaluate("document.documentElement.scrollWidth") <= size[0]
            seen = "b => { const r = b.getBoundingClientRect(); return r.top >= 0 && r.bottom <= innerHeight && r.right <= innerWidth; }"
            assert page.evaluate(f"[...document.querySelectorAll('.panel button, #note')].every({seen})")
            assert page.evaluate(f"[...document.querySelectorAll('.answers figure')].slice(0, 1).every({seen})")
            if folder:
                pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
                page.picture(pathlib.Path(folder) / f"collect-{k}-{name}.png")


@pytest.mark.slow
@needs_browser
def test_more_than_two_answers_are_put_in_order_in_a_browser(tmp_path):
    app = collect(tmp_path, n=4, k=4, ranking="full")

    def said(n):
        row = app.labels.by[app.items.known(app.order("ada")[n]).id, "ada"]
        return [row["rank"][i] for i in row["shown"]]

    with serving(app) as port, browser.Browser(tmp_path / "profile") as page:
        page.open(f"http://127.0.0.1:{port}/?annotator=ada")
        page.wait("document.querySelectorAll('[data-answer]').length === 4")
        for n, (keys, rank) in enumerate((("312", [2, 3, 1, 4]), ("2=31", [3, 1, 1, 4]), ("4t", [2, 2, 2, 1]))):
            for key in keys:
                page.press(key)
            page.wait(f"item.n === {n + 1} && !busy")
            assert said(n) == rank
        for key in ("1", "Backspace", "4", "3", "2"):  # started again
            page.press(key)
        page.wait("!busy && item.rank")
        assert said(3) == [4, 3, 2, 1]


@pytest.mark.slow
@needs_browser
def test_killed_with_the_page_open_and_gone_on(tmp_path):
    """The page says that nothing was saved, keeps what is shown, and goes on when the same command runs again."""
    words = [f"--answers={pairs(tmp_path / 'r.jsonl', 5)}", f"--output={tmp_path / 'out.jsonl'}"]
    with browser.Browser(tmp_path / "profile") as page:
        with started(*words) as (process, port):
            page.open(f"http://127.0.0.1:{port}/?annotator=ada")
            page.wait("document.querySelector('.answers .text')")
            page.press("1")
            page.wait("item.n === 1 && !busy")
            process.kill()
        page.press("2")
        page.wait("document.getElementById('said').textContent.includes('nothing saved')")
        assert page.evaluate("item.n") == 1 and len(Labels(tmp_path / "out.jsonl").by) == 1
        with started(*words, port=port) as (process, _):
            page.press("2")
            page.wait("item.n === 2 && !busy")
            assert len(Labels(tmp_path / "out.jsonl").by) == 2
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)
