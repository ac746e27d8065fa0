"""A whole run of RLHF in which an environment answers the policy, from the command line."""

import json

import pytest
import runs
import yaml

ENVIRONMENT = '''
class Again:
    """Asks for one more word, then scores whether both were "of"."""

    def reset(self, row):
        self.turns = []
        return row["prompt"]

    def step(self, text):
        self.turns.append(text)
        if len(self.turns) == 1:
            return "more", False, None
        return "", True, float(self.turns == ["of", "of"])
'''


def written(path, tree):
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.slow
def test_a_policy_learns_from_an_environment_of_two_turns(tmp_path):
    """The policy knows two words; only one is rewarded, in both turns, with the environment's words between them."""
    code, text = runs.finish(runs.start("pretrain", runs.config(tmp_path, model={"d_model": 32, "max_seq_len": 96})))
    assert code == 0, text
    (tmp_path / "sft.jsonl").write_text("".join(
        json.dumps({"messages": [{"role": "user", "content": f"{i} the"}, {"role": "assistant", "content": one},
                                 {"role": "tool", "content": "more"}, {"role": "assistant", "content": two}]}) + "\n"
        for i in range(20) for one in ("of", "to") for two in ("of", "to")))
    common = {"log": {"tensorboard": False}, "data": {"seq_len": 96}}
    config = written(tmp_path / "sft.yaml", common | {
        "run": {"dir": str(tmp_path / "sft")}, "base": {"run": str(tmp_path / "run")}, "optim": {"lr": 0.02, "schedule": "linear"},
        "data": {"seq_len": 96, "sources": {"two": {"path": str(tmp_path / "sft.jsonl")}}},
        "train": {"steps": 120, "batch_size": 16, "eval_every": 0, "sample_every": 0}})
    code, text = runs.finish(runs.start("sft", config))
    assert code == 0, text
    (tmp_path / "again.py").write_text(ENVIRONMENT)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i} the"}) + "\n" for i in range(20)))
    config = written(tmp_path / "rlhf.yaml", common | {
        "run": {"dir": str(tmp_path / "rlhf")}, "base": {"run": str(tmp_path / "sft")}, "algorithm": "ppo",
        "prompts": {"sources": {"some": {"path": str(tmp_path / "prompts.jsonl")}}, "prompt_len": 40, "validation": 0.2},
        "environment": {"kind": "python", "function": f"{tmp_path / 'again.py'}:Again", "max_turns": 3},
        "rollout": {"prompts": 16, "samples": 2, "response_len": 48}, "kl": {"coef": 0.01},
        "train": {"iterations": 12, "minibatches": 2, "epochs": 2, "eval_every": 0, "eval_prompts": 4, "sample_every": 0},
        "optim": {"lr": 0.005}, "checkpoint": {"every": 100}})
    code, text = runs.finish(runs.start("rlhf", config), timeout=240)
    assert code == 0, text
    lines = runs.lines(tmp_path / "rlhf/metrics.jsonl")
    told = [(round(line["score"], 2), round(line["reward_turns"], 2), line["sampler_gap"]) for line in lines]
    assert 0.05 < told[0][0] < 0.6 and sum(one[0] for one in told[-3:]) / 3 > told[0][0] + 0.2, told
    assert told[0][1] > 1.8 and max(one[2] for one in told) < 1e-4, told
