"""Self-consistency: votes over sampled answers, in evaluations of RLHF and of instruction tuning."""

import itertools
import json
import types

import numpy as np
import pytest
import runs
import toy

from jaxllm import cli, config
from jaxllm.align import rlhf
from jaxllm.align.questions import Questions
from jaxllm.align.rewards import Scored
from jaxllm.align.rewards_config import RewardRule
from jaxllm.align.rlhf_config import RLDataConfig, RLHFConfig, RLTrainConfig, RolloutConfig
from jaxllm.align.rules import Sample, exact, vote
from jaxllm.align.self_consistency import answer_rule, shares_right
from jaxllm.align.sft_config import AnswersConfig
from jaxllm.data.chat import load_chat
from jaxllm.data.config import DataConfig
from jaxllm.data.instruction_config import InstructionData, InstructionSource
from jaxllm.data.instruction_input import prepare
from jaxllm.data.preference_config import PromptData
from jaxllm.data.prompts import Prompt
from jaxllm.data.tokenizer import ByteTokenizer
from jaxllm.errors import UserError
from jaxllm.generate.rollout_arrays import Writing
from jaxllm.mesh import MeshConfig
from jaxllm.model.config import ModelConfig
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.config import CheckpointConfig, PretrainConfig, RunConfig, TrainConfig
from jaxllm.train.run_folder import begin

TOKENIZER = ByteTokenizer()
FINAL = RewardRule(kind="exact", extract="final")


def said(text: str, answer="7", ended: bool = True) -> Sample:
    return Sample("", text, [], ended, {"answer": answer})


# ---------------------------------------------------------------- votes


@pytest.mark.parametrize("compare", ["auto", "number", "text", "verbatim"])
def test_two_answers_have_one_vote_where_one_counts_as_the_other(compare):
    rule = RewardRule(kind="exact", compare=compare)
    texts = ["7", "7.0", "$7", "7 %", " 7.", "Yes.", "yes", "YES", "1,000", "1000", "1/2", "0.5", "no"]
    for a, b in itertools.product(texts, repeat=2):
        votes = vote(rule, said(a)), vote(rule, said(b))
        assert (votes[0] is not None and votes[0] == votes[1]) == (exact(rule, said(a, answer=b)) == 1.0), (a, b)


def test_shares_are_those_counted_by_hand():
    three = "I add. The answer is 7."
    samples = [said(x) for x in (
        "The answer is 8.", three, "So the answer is 7.0", "no idea",  # two of four say 7: right
        "The answer is 3.", "The answer is 3", three, "The answer is 5.",  # 3 wins
        "The answer is 8.", three, three, "The answer is 8.",  # as many: the first one counts
        "?", "!", "hm", "so")]  # nobody votes
    score_B = np.array([0, 1, 0, 2, 0, 0, 5, 0, 0, 0, 1, 0, 1, 0, 0, 0], float)
    assert shares_right(FINAL, samples, 4, score_B) == {
        "right": 5 / 16, "majority_right": 1 / 4, "any_right": 3 / 4, "best_right": 2 / 4}
    assert shares_right(FINAL, samples, 1) == {"right": 5 / 16}


def test_a_response_that_must_end_has_no_vote_without_its_end():
    rule = RewardRule(kind="exact", extract="final", must_end=True)
    samples = [said("The answer is 8.", ended=False), said("The answer is 8.", ended=False), said("The answer is 7.")]
    assert shares_right(rule, samples, 3)["majority_right"] == 1.0
    assert shares_right(FINAL, samples, 3)["majority_right"] == 0.0


def test_votes_are_counted_by_the_first_exact_reward():
    pattern = RewardRule(kind="exact", extract="regex", pattern="a")
    short = RewardRule(kind="length", limit=2)
    assert answer_rule({"short": short, "pattern": pattern, "right": FINAL}) is FINAL
    assert answer_rule({"short": short}, FINAL) is FINAL and answer_rule({"short": short, "pattern": pattern}) is None


# ---------------------------------------------------------------- RLHF


class Says:
    """A sampler whose sample k of a prompt is the k-th of its answers, greedy the last one."""

    def __init__(self, answers):
        self.answers = answers

    def load(self, params):
        pass

    def sample(self, prompts, *, n, cfg, prompt_slots, response_slots, **rest):
        out = Writing(prompts, n, prompt_slots=prompt_slots, response_slots=response_slots, pad_id=0)
        for i, k in itertools.product(range(len(prompts)), range(n)):
            ids = TOKENIZER.encode(self.answers[i][k if cfg.temperature else -1])
            out.add(np.array([i * n + k]), np.int32([ids]), np.zeros((1, len(ids))), np.array([len(ids)]), np.array([False]))
        return out.rollout()


def test_evaluations_of_rlhf_tell_what_n_samples_are_worth():
    cfg = RLHFConfig(train=RLTrainConfig(eval_samples=3, eval_prompts=2), rollout=RolloutConfig(response_len=8, prompts=2),
                     prompts=PromptData(prompt_len=4), data=RLDataConfig(seq_len=12), rewards={"right": RewardRule(kind="exact")})

    def score(samples):  # of the wrong ones the longest is liked best
        return Scored(np.array([len(s.response) for s in samples], np.float32), {}, [])

    prompts = [Prompt("a", [1, 30], {"answer": "7"}), Prompt("b", [1, 31], {"answer": "9"})]
    loop = types.SimpleNamespace(cfg=cfg, sampler=Says([["7", "88", "7"], ["9", "5", "5"]]), held_out=prompts, player=None, score=score,
                                 decode=TOKENIZER.decode, text_loss=None, tasks=())
    found = rlhf.evaluate(loop, types.SimpleNamespace(params=None, opt_state={}))
    assert found["eval_right"] == pytest.approx(3 / 6) and found["eval_majority_right"] == 1 / 2 and found["eval_any_right"] == 1.0
    assert found["eval_best_right"] == 1 / 2 and found["eval_best_score"] == (2 + 1) / 2 and found["eval_greedy_right"] == 1 / 2
    assert found["eval_score"] == pytest.approx((1 + 2 + 1 + 1 + 1 + 1) / 6)
    loop.cfg = RLHFConfig(train=RLTrainConfig(eval_prompts=2), rollout=cfg.rollout, prompts=cfg.prompts, data=cfg.data, rewards=cfg.rewards)
    assert rlhf.evaluate(loop, types.SimpleNamespace(params=None, opt_state={})).keys() == {
        "eval_greedy", "eval_greedy_ended", "eval_score", "eval_score_ended"}


# ---------------------------------------------------------------- instruction tuning


def sums(folder, n=60):
    path = folder / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+1?", "response": f"One more. The answer is {i + 1}."}) + "\n" for i in range(n)))
    return path


def questions(folder, **settings):
    data = InstructionData(sources={"a": InstructionSource(path=str(sums(folder)))}, seq_len=64, template="own", validation=0.3)
    return Questions(prepare(data, TOKENIZER), AnswersConfig(**{"questions": 5, "samples": 4} | settings), 64, 0)


def test_held_out_examples_are_asked_and_their_answers_found(tmp_path):
    asked = questions(tmp_path, questions=1000)
    chat = load_chat("own", TOKENIZER)
    for ids, end_id, row in asked.prompts:
        assert ids == chat.prompt_ids([{"role": "user", "content": f"{int(row['answer']) - 1}+1?"}]) and end_id == chat.end_id
    assert 5 < len(asked.prompts) < 40 and len(questions(tmp_path).prompts) == 5
    with pytest.raises(UserError, match=r"answers\.questions=5: none of 5 held-out examples can be asked: .* answers\.extract=gsm8k finds"):
        questions(tmp_path, extract="gsm8k")


def test_samples_of_a_question_differ_and_are_counted_together(tmp_path):
    """An engine that is right with every second of its seeds, and greedy always."""
    asked, seen = questions(tmp_path), []

    class Right:
        def generate(self, prompts, how, seeds):
            seen.extend((how.temperature, tuple(ids), seed) for ids, seed in zip(prompts, seeds, strict=True))
            out = []
            for ids, seed in zip(prompts, seeds, strict=True):
                number = int(TOKENIZER.decode(ids).partition("+")[0])
                wrong = how.temperature and seed % 2
                out.append(types.SimpleNamespace(text=f"The answer is {'many' if wrong else number + 1}.", tokens=[], finish="eos"))
            return out

    found = asked.shares(lambda end_id: Right())
    drawn = [seed for temperature, _, seed in seen if temperature]
    assert len(set(drawn)) == len(drawn) == 20 and len(seen) == 25
    good = np.array([seed % 2 == 0 for seed in drawn]).reshape(5, 4)
    votes = [g.sum() > 2 or (g.sum() == 2 and g[0]) for g in good]
    assert found == {"eval_greedy_right": 1.0, "eval_right": good.mean(), "eval_majority_right": np.mean(votes),
                     "eval_any_right": good.any(axis=1).mean()}
    assert questions(tmp_path, samples=1).shares(lambda end_id: Right()).keys() == {"eval_greedy_right", "eval_right"}


@pytest.mark.slow
def test_a_run_of_sft_asks_as_it_goes(tmp_path, capsys):
    base, model = tmp_path / "base", ModelConfig(d_model=16, n_layers=1, n_heads=2, d_ff=32, vocab_size=272, max_seq_len=64)
    base.mkdir()
    program = toy.program(model)
    with Checkpoints(base, CheckpointConfig()) as checkpoints:
        checkpoints.save(2, program.init(), {"step": 2, "made_of": {}})
    made = PretrainConfig(run=RunConfig(dir=str(base)), model=model, train=TrainConfig(steps=2), mesh=MeshConfig(data=1),
                          data=DataConfig(seq_len=32))
    begin(made, config.to_dict(made))
    (tmp_path / "sft.json").write_text(json.dumps({  # JSON is YAML
        "run": {"dir": str(tmp_path / "run")}, "base": {"run": str(base)},
        "data": {"sources": {"sums": {"path": str(sums(tmp_path))}}, "template": "own", "seq_len": 64, "validation": 0.3},
        "train": {"steps": 4, "batch_size": 8, "eval_every": 2}, "answers": {"questions": 3, "samples": 2, "max_tokens": 6},
        "log": {"tensorboard": False}}))
    assert cli.main(["sft", str(tmp_path / "sft.json"), f"--json={tmp_path / 'out.json'}"]) == 0
    lines = [line for line in runs.lines(tmp_path / "run/metrics.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert all({"eval_right", "eval_greedy_right", "eval_majority_right", "eval_any_right"} <= line.keys() for line in lines)
    assert json.loads((tmp_path / "out.json").read_text())["eval_majority_right"] == lines[-1]["eval_majority_right"]
    assert "questions: 3 are asked at evaluations, 2 samples of each" in capsys.readouterr().err
