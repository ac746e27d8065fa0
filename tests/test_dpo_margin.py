"""Margins of preference lines in jaxllm dpo: where they count, and where they are refused."""

import json
import math

import jax
import numpy as np
import pytest

from jaxllm.align import dpo, dpo_run
from jaxllm.align.dpo_config import DPOConfig, DPOVerb, SimPOConfig
from jaxllm.align.dpo_loss import formula
from jaxllm.data import preference
from jaxllm.data.pairs import pairs_of
from jaxllm.data.preference_config import PreferenceData, PreferenceSource
from jaxllm.errors import UserError
from jaxllm.report.page import write_page

B = 5
rng = np.random.default_rng(0)
LOGP_BK, REF_BK = rng.normal(-20, 3, (B, 2)).astype(np.float32), rng.normal(-20, 3, (B, 2)).astype(np.float32)
N_BK, MARGIN_B = np.float32([[3, 4], [5, 2], [1, 1], [7, 6], [2, 9]]), np.float32([0, 0.5, 1, 2, 0])
BATCH = {"ref_logp_BK": REF_BK, "margin_B": MARGIN_B}


def minus_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x))


@pytest.mark.parametrize("margin", [0.0, 1.0, 3.0])
def test_the_margin_is_taken_from_the_difference_of_rewards(margin):
    """Llama 2's margin in DPO (an offset), and beside SimPO's gamma, each pair by hand; rewards stay what they were."""
    cfg = DPOVerb(margin=margin, dpo=DPOConfig(beta=0.2, label_smoothing=0.1), simpo=SimPOConfig(beta=2.0, gamma=0.7))
    found = {"dpo": formula(cfg)(LOGP_BK, N_BK, BATCH), "simpo": formula(DPOVerb(loss="simpo", margin=margin, simpo=cfg.simpo))(LOGP_BK, N_BK, BATCH)}
    for b in range(B):
        ratio = (LOGP_BK - REF_BK)[b].astype(np.float64)
        by = 0.2 * (ratio[0] - ratio[1]) - margin * MARGIN_B[b]
        assert found["dpo"][0][b] == pytest.approx(0.9 * minus_log_sigmoid(by) + 0.1 * minus_log_sigmoid(-by), rel=1e-5)
        mean = (LOGP_BK / N_BK)[b].astype(np.float64)
        assert found["simpo"][0][b] == pytest.approx(minus_log_sigmoid(2 * (mean[0] - mean[1]) - 0.7 - margin * MARGIN_B[b]), rel=1e-5)
    plain = dpo.dpo(LOGP_BK[:, 0], LOGP_BK[:, 1], REF_BK[:, 0], REF_BK[:, 1], beta=0.2, label_smoothing=0.1)
    for ours, theirs in zip(found["dpo"][1:], plain[1:], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_margin_pulls_until_it_is_reached():
    """The gradient of −log σ(x − margin) is larger than without one, and half of its most where x is the margin."""
    def loss(by, margin):
        return dpo.dpo(by, np.float32(0), np.float32(0), np.float32(0), beta=1.0, margin_B=margin)[0]

    assert float(jax.grad(loss)(2.0, 2.0)) == pytest.approx(-0.5) and float(jax.grad(loss)(2.0, 0.0)) > -0.2


def pairs(folder, margin):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row | {"prompt": str(i)} | ({"margin": margin} if i == 1 and margin else {})) + "\n" for i in range(3)))
    data = PreferenceData(sources={"s": PreferenceSource(path=str(path))}, seq_len=8, validation=0)
    return pairs_of(preference.read(data, lambda prompt, answer: ([1], [ord(answer), 2]), 0, log=lambda text: None), "all", with_others=False)


def test_a_line_s_margin_comes_with_its_pair(tmp_path):
    batch = pairs(tmp_path, 1.5).train.gather(np.array([0, 1, -1]), 2)
    assert batch["margin_B"].tolist() == [0.0, 1.5, 0.0]


@pytest.mark.parametrize("loss", ["ipo", "kto", "orpo"])
def test_losses_without_a_margin_refuse_lines_with_one(tmp_path, loss):
    with pytest.raises(UserError) as error:
        dpo_run._check_margins(DPOVerb(loss=loss), pairs(tmp_path, 1.5))
    assert str(error.value) == (f'loss={loss}: has no margin, and 1 of 3 training pairs have a "margin"; --margin=0 leaves it unused, '
                                "loss=dpo or simpo uses it")
    dpo_run._check_margins(DPOVerb(loss=loss, margin=0), pairs(tmp_path, 1.5))
    dpo_run._check_margins(DPOVerb(loss=loss), pairs(tmp_path, None))
    dpo_run._check_margins(DPOVerb(loss="simpo"), pairs(tmp_path, 1.5))


@pytest.mark.parametrize("verb,unit", [("dpo", "a pair"), ("reward", "nats a prompt"), ("rlhf", "of the policy"), ("sft", "nats a token"),
                                       ("pretrain", "nats a token")])
def test_the_page_says_what_a_loss_is_counted_in(tmp_path, verb, unit):
    (tmp_path / "config.yaml").write_text(f"verb: {verb}\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 1.0 / i, "grad_norm": 1.0}) + "\n" for i in (1, 2, 3)))
    text = write_page([tmp_path], tmp_path / "page.html").read_text()
    assert f"Training loss <span>{unit}</span>" in text and "Gradient norm <span>log scale</span>" in text
