"""Few-shot tasks beside RLHF: what is asked, how answers are judged, and the table of what alignment cost."""

import dataclasses
import json
import types
from functools import partial

import jax
import numpy as np
import pytest
import runs
import toy
from flax import nnx

from jaxllm.align.few_shot import Task, item_of, mean_logps
from jaxllm.align.rlhf_config import TaxTask
from jaxllm.data.tokenizer import ByteTokenizer
from jaxllm.errors import UserError
from jaxllm.generate.config import SampleConfig
from jaxllm.generate.continuous import Sampler
from jaxllm.generate.engine import Engine
from jaxllm.report.page import write_page
from jaxllm.report.summary import before_after

MODEL = dataclasses.replace(toy.MODEL, vocab_size=272)
TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def policy():
    """(program, parameters, a sampler with them)."""
    prog = toy.program(MODEL)
    with jax.set_mesh(prog.mesh):
        params = jax.tree.map(lambda x: 4 * x, prog.init().params)  # opinions, as an untrained model has hardly any
    sampler = Sampler(prog.graph, MODEL, prog.mesh, eos_id=TOKENIZER.special_id("<|end|>"), pad_id=TOKENIZER.pad_id,
                      vocab_size=TOKENIZER.vocab_size)
    sampler.load(params)
    return prog, params, sampler


def task(folder, rows, **settings) -> Task:
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Task("quiz", TaxTask(path=str(path), **settings), TOKENIZER, MODEL.max_seq_len)


def literal_logps(policy, ids: list[int]) -> np.ndarray:
    """Returns log p of each token after the first, from one row that begins at position 0, softmax written out."""
    prog, params, _ = policy
    model = nnx.merge(prog.graph, params)
    row = np.int32([ids + [5] * (MODEL.max_seq_len - len(ids))])  # what comes behind is not seen
    x_TD = np.asarray(hidden(prog.graph, params, row))[0, : len(ids) - 1]
    logit_TV = (x_TD @ np.asarray(model.head_DV()))[:, : TOKENIZER.vocab_size].astype(np.float64)
    return logit_TV[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(logit_TV).sum(axis=1))


@partial(jax.jit, static_argnums=0)
def hidden(graph, params, token_BT):
    return nnx.merge(graph, params).hidden(token_BT, np.arange(token_BT.shape[1], dtype=np.int32)[None])


QUIZ = [{"question": f"{i}?", "choices": ["yes", f"certainly not {i % 3}", "no"], "answer": i % 3} for i in range(40)]


def test_exemplars_are_the_first_rows_and_never_asked(tmp_path):
    rows = [*QUIZ, dict(QUIZ[1], answer=0)]  # the last one asks what an exemplar asks
    made = task(tmp_path, rows, shots=[0, 3], limit=0)
    assert [item.text for item in made.exemplars] == [f"Question: {i}?\nAnswer:" for i in range(3)]
    assert [item.text for item in made.items] == [f"Question: {i}?\nAnswer:" for i in range(3, 40)]
    assert made.context(made.items[0], 0) == "Question: 3?\nAnswer:"
    assert made.context(made.items[4], 2) == ("Question: 0?\nAnswer: yes\n\nQuestion: 1?\nAnswer: certainly not 1\n\n"
                                              "Question: 7?\nAnswer:")


def test_rows_that_are_asked_are_spread_over_the_file_and_too_long_ones_counted(tmp_path):
    rows = [*QUIZ[:20], {"question": "x" * 200, "choices": ["a", "b"], "answer": "a"}]
    made = task(tmp_path, rows, shots=[0], limit=5)
    assert [item.text for item in made.items] == [f"Question: {i}?\nAnswer:" for i in range(0, 20, 4)]
    assert made.too_long == 1 and "1 too long" in made.describe() and "chance 33.3%" in made.describe()


def test_where_exemplars_do_not_fit_there_are_fewer(tmp_path):
    made = task(tmp_path, QUIZ, shots=[4], limit=3)
    texts = [made.context(item, 4) for item in made.items]
    # 128 tokens: <bos>, and of 4 exemplars 26 + 38 + 24 + 26 characters, beside a question of some 20 and an answer of 16
    assert all(len(text) + 2 + len(" certainly not 0") - 1 <= MODEL.max_seq_len for text in texts)
    assert all(0 < text.count("Answer:") - 1 < 4 for text in texts)


def test_a_choice_counts_by_its_mean_log_probability_of_a_token(policy, tmp_path):
    """Against each text alone, without padding: choices of 4, 16 and 3 tokens, of which sums would choose others."""
    made = task(tmp_path, QUIZ, shots=[0, 2], limit=16)
    for k in (0, 2):
        expected, by_sum = [], []
        for item in made.items:
            start = [TOKENIZER.bos_id, *TOKENIZER.encode(made.context(item, k))]
            found = [literal_logps(policy, start + TOKENIZER.encode(f" {choice}"))[len(start) - 1 :] for choice in item.choices]
            expected.append(item.choices[int(np.argmax([x.mean() for x in found]))] == item.answers[0])
            by_sum.append(item.choices[int(np.argmax([x.sum() for x in found]))] == item.answers[0])
        assert made.right(policy[2], k) == expected != by_sum
    scores = made.scores(policy[2])
    assert scores.keys() == {"eval_quiz_0shot", "eval_quiz_2shot"} and scores["eval_quiz_2shot"] == np.mean(expected)


def test_mean_log_probabilities_are_those_of_the_whole_text(policy):
    pairs = [([1, 20, 30], [40, 50, 60]), ([1], [99]), (list(range(1, 40)), [7, 8])] * 12  # more than are read at once
    found = mean_logps(policy[2], pairs, TOKENIZER.pad_id)
    expected = [literal_logps(policy, before + answer)[len(before) - 1 :].mean() for before, answer in pairs[:3]]
    np.testing.assert_allclose(found, expected * 12, atol=2e-5)


def test_an_answer_that_is_written_is_the_likeliest_first_line(policy, tmp_path):
    prog, params, sampler = policy
    prompts = [f"{i} and {i}:" for i in range(6)]
    engine = Engine(prog.graph, params, MODEL, TOKENIZER, prog.mesh)
    how = SampleConfig(max_tokens=5, temperature=0.0, stop=["\n"])
    texts = [one.text.strip() for one in engine.generate(prompts, how)]
    rows = [{"prompt": p, "answer": [text or "none", "other"] if i % 2 else "wrong"}
            for i, (p, text) in enumerate(zip(prompts, texts, strict=True))]
    made = task(tmp_path, rows, shots=[0], answer_len=5)
    assert made.right(sampler, 0) == [bool(i % 2 and text) for i, text in enumerate(texts)]
    assert any(made.right(sampler, 0))


@pytest.mark.slow
def test_on_a_mesh_the_same_is_right(policy, tmp_path):
    """Choices and written answers, on data x fsdp x tensor; batches are rounded up to the shards."""
    prog = toy.program(MODEL, devices=8, data=2, fsdp=2, tensor=2)
    sampler = Sampler(prog.graph, MODEL, prog.mesh, eos_id=TOKENIZER.special_id("<|end|>"), pad_id=TOKENIZER.pad_id,
                      vocab_size=TOKENIZER.vocab_size)
    sampler.load(policy[1])
    pairs = [([1, 20, 30], [40, 50, 60]), ([1], [99])] * 9
    np.testing.assert_allclose(mean_logps(sampler, pairs, TOKENIZER.pad_id), mean_logps(policy[2], pairs, TOKENIZER.pad_id), atol=2e-5)
    choices = task(tmp_path, QUIZ, shots=[1], limit=9)
    assert choices.right(sampler, 1) == choices.right(policy[2], 1)
    written = task(tmp_path, [{"prompt": f"{i} and {i}:", "answer": "x"} for i in range(6)], shots=[0], answer_len=5)
    ids = [[TOKENIZER.bos_id, *TOKENIZER.encode(item.text)] for item in written.items]
    assert written._written(sampler, ids) == written._written(policy[2], ids)


def test_what_is_written_after_the_first_line_does_not_count(tmp_path):
    """As where a token reaches over the line's end: the sampler cannot stop there."""
    made = task(tmp_path, [{"prompt": "2+2=", "answer": 4}, {"prompt": "3+3=", "answer": 6}], shots=[0])

    class Writes:
        def sample(self, prompts, **how):
            return types.SimpleNamespace(response=lambda i: TOKENIZER.encode([" 4\n\n5", "\n6"][i]))

    assert made.right(Writes(), 0) == [True, False]


@pytest.mark.parametrize("row,message", [
    ({"answer": "a"}, 'no "question" or "prompt" (found: answer)'),
    ({"question": "q", "answer": 2, "choices": ["a", "b"]}, "answer=2: should be one of the choices, or its place"),
    ({"question": "q", "answer": "c", "choices": ["a", "b"]}, "answer='c': should be one of the choices"),
    ({"question": "q", "answer": "a", "choices": ["a"]}, "should be a list of two or more texts"),
    ({"prompt": "q"}, "answer=None: should be a text or a number"),
    ({"prompt": "q", "answer": []}, "answer=[]: should be a text or a number")])
def test_rows_that_are_no_question_are_named(row, message):
    with pytest.raises(UserError, match="f:3: ") as error:
        item_of(row, "f:3")
    assert message in str(error.value)


def test_files_that_leave_nothing_to_ask_are_named(tmp_path):
    with pytest.raises(UserError, match=r"tax.quiz.path=.*: 2 questions, of which the first 4 are exemplars .* leave none to ask"):
        task(tmp_path, QUIZ[:2])
    with pytest.raises(UserError, match="some questions have choices, some have none"):
        task(tmp_path, [*QUIZ[:8], {"question": "q", "answer": "a"}])
    with pytest.raises(ValueError, match=r"shots=\[1, 1\]: should be"):
        TaxTask(path="x", shots=[1, 1])


# ---------------------------------------------------------------- what is told at the end


def test_the_page_compares_runs_with_and_without_ptx(tmp_path):
    for name, coef, after in (("without", 0.0, 0.25), ("with", 27.8, 0.5)):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "tokens": step * 10, "eval_score": 0.1 + step, "eval_text_loss": 3.0 + 0.1 * step,
                 "eval_quiz_0shot": now, "ptx_coef": coef} for step, now in ((0, 0.5), (2, 0.4), (4, after))]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_page([tmp_path / "without", tmp_path / "with"], tmp_path / "page.html").read_text()
    table = text[text.index("Alignment tax") : text.index("<h2>Curves")]
    assert "27.8" in table and "0.5000 → 0.2500" in table and "-0.2500, worse" in table and "0.5000 → 0.5000" in table
    assert "3.0000 → 3.4000" in table and "+0.4000, worse" in table
    assert "+4.0000<" in table  # a score that rises is not worse
    assert "Task quiz" in text


def test_before_is_before_the_first_step():
    lines = [{"step": s, "eval_loss": 1.0} for s in (8, 16)]
    assert before_after(lines) == {} and before_after([{"step": 0, "eval_loss": 2.0}, *lines]) == {"eval_loss": (2.0, 1.0)}


@pytest.mark.slow
def test_a_run_measures_the_tax_before_during_and_after(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    code, text = runs.finish(runs.start("pretrain", runs.config(base)))
    assert code == 0, text
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUIZ))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i} the"}) + "\n" for i in range(20)))
    (tmp_path / "rlhf.json").write_text(json.dumps({  # JSON is YAML
        "run": {"dir": str(tmp_path / "run")}, "base": {"run": str(base / "run")}, "data": {"seq_len": 24}, "algorithm": "grpo",
        "prompts": {"sources": {"some": {"path": str(tmp_path / "prompts.jsonl")}}, "prompt_len": 12, "validation": 0.2},
        "rollout": {"prompts": 4, "samples": 2, "response_len": 8}, "rewards": {"short": {"kind": "length", "limit": 2, "soft": 8}},
        "ptx": {"coef": 0.5, "examples": 1.0, "eval_rows": 4, "sources": {"words": {"path": str(runs.corpus(tmp_path))}}},
        "tax": {"quiz": {"path": str(tmp_path / "quiz.jsonl"), "shots": [0, 1], "limit": 6}},
        "train": {"iterations": 2, "eval_every": 1, "eval_prompts": 4, "sample_every": 0}, "log": {"tensorboard": False}}))
    code, text = runs.finish(runs.start("rlhf", tmp_path / "rlhf.json", f"--json={tmp_path}/out.json"))
    assert code == 0, text
    lines = [line for line in runs.lines(tmp_path / "run/metrics.jsonl") if "eval_quiz_0shot" in line]
    assert [line["step"] for line in lines] == [0, 1, 2] and all(line["ptx_coef"] == 0.5 for line in lines)
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["ptx_coef"] == 0.5 and out["before_after"]["eval_quiz_1shot"] == [lines[0]["eval_quiz_1shot"], lines[-1]["eval_quiz_1shot"]]
    assert "alignment tax with ptx.coef=0.5" in text and "quiz_0shot" in text and "text_loss" in text
