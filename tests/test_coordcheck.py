"""The coordinate check: what it measures is the model, and it tells muP from what is not."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
import yaml
from flax import nnx

from jaxllm.cli import main
from jaxllm.model.config import ModelConfig, MoEConfig
from jaxllm.model.formulation import PLATFORMS
from jaxllm.model.heads import LanguageModel
from jaxllm.plan import coordinates
from jaxllm.plan.coordinates import KINDS, activations, changes, made_up
from jaxllm.plan.widths import at_width, slope
from jaxllm.train.config import OptimConfig


@pytest.mark.parametrize("model", [toy.MODEL, dataclasses.replace(toy.MODEL, moe=MoEConfig(experts=2, every=2), tied=True)], ids=["dense", "sparse"])
def test_what_is_measured_is_the_model(model):
    made = LanguageModel(model, PLATFORMS["cpu"], rngs=nnx.Rngs(0))
    graph, params = nnx.split(made)
    token_BT = toy.batch(2)["token_BT"]
    pos_BT = jnp.broadcast_to(jnp.arange(token_BT.shape[1]), token_BT.shape)

    @jax.jit
    def both(params):
        whole = nnx.merge(graph, params)
        return activations(graph, params, token_BT, pos_BT), whole.hidden(token_BT, pos_BT, jnp.ones_like(token_BT)) @ whole.head_DV()

    found, logit_BTV = both(params)
    np.testing.assert_allclose(found["logits"][0], logit_BTV, atol=1e-5)
    assert {kind: len(found[kind]) for kind in KINDS} == {"embedding": 1, "attention": 2, "mlp": 2, "residual": 2, "logits": 1}
    np.testing.assert_allclose(found["embedding"][0] + sum(found["attention"]) + sum(found["mlp"]), found["residual"][-1], atol=1e-5)


def test_a_model_is_widened_in_proportion():
    model = ModelConfig(d_model=64, n_heads=4, n_kv_heads=2, d_ff=192, vocab_size=64, moe=MoEConfig(experts=2, d_ff=96))
    wide = at_width(model, 256, base=64)
    assert (wide.n_heads, wide.kv_heads, wide.head_dim, wide.d_ff, wide.moe.d_ff, wide.times_width) == (16, 8, 16, 768, 384, 4)
    assert at_width(model, 64, head_dim=64).kv_heads == 1
    with pytest.raises(ValueError, match="heads of 16 do not divide"):
        at_width(model, 100)


def test_a_slope_is_the_exponent():
    assert slope([64, 128, 512], [3 * w**0.7 for w in (64, 128, 512)]) == pytest.approx(0.7)


def test_the_text_is_made_of_common_and_rare_words_and_the_same_each_time():
    one, two = made_up(32, 2, 50, 3, seed=1), made_up(32, 2, 50, 3, seed=1)
    np.testing.assert_array_equal(one["token_BT"], two["token_BT"])
    np.testing.assert_array_equal(one["token_BT"][..., 1:], one["target_BT"][..., :-1])
    count_V = np.sort(np.bincount(one["token_BT"].ravel(), minlength=32))
    assert count_V[-1] > 3 * count_V.mean() and count_V.sum() == 300


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("coordcheck") / "run.yaml"
    path.write_text(yaml.safe_dump({"model": {"d_model": 64, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}, "train": {"steps": 10}, "data": {"seq_len": 64},
                                    "optim": {"lr": 3e-3, "warmup": 7}}))
    return str(path)


@pytest.mark.slow
def test_mups_changes_do_not_go_with_the_width_and_the_standard_ones_do(config, tmp_path, capsys):
    files = [f"--{kind}={tmp_path}/found.{end}" for kind, end in (("json", "json"), ("page", "html"), ("picture", "svg"))]
    assert main(["plan", "coordcheck", config, "--widths=[128,512]", "--seeds=2", "--layers=1", *files]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["passed"] and all(abs(s) < 0.1 for s in found["slopes"]["muP"].values())
    assert all(found["slopes"]["standard"][kind] > 0.4 for kind in ("attention", "mlp", "residual", "logits"))
    assert np.array(found["changes"]["muP"]["logits"]).shape == (2, 5)
    assert "a learning rate carries over" in capsys.readouterr().out
    assert "Coordinate check" in (tmp_path / "found.html").read_text()


@pytest.mark.slow
def test_a_check_that_fails_says_what_goes_with_the_width(config, capsys):
    words = ["--widths=[32,64]", "--seeds=1", "--head_width=16", "--layers=1", "--updates=2", "--limit=1e-6", "--rows=2", "--length=16"]
    assert main(["plan", "coordcheck", config, *words]) == 1
    assert "slopes beyond 1e-06" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("name", "change"), [("lion", {}), ("muon", {}), ("adamw", {"tied": True})])
def test_other_rules_of_mup_and_a_tied_head_pass_too(name, change):
    model = ModelConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=256, max_seq_len=64, **change)
    batches, widths = made_up(256, 4, 64, 4), (32, 128)
    optim = OptimConfig(name=name, lr=1e-3, schedule="constant")
    last = {base: np.stack([changes(at_width(model, w, base=base), optim, batches, "cpu", range(2)).mean(axis=0)[-1] for w in widths])
            for base in (32, None)}
    for k, kind in enumerate(KINDS):
        assert abs(slope(widths, last[32][:, k])) < 0.15, kind
    assert slope(widths, last[None][:, KINDS.index("residual")]) > 0.3


@pytest.mark.parametrize(("words", "said"), [
    (["--widths=[64]"], "widths=[64]: should be two or more"), (["--widths=[128,64]"], "each above the one before"),
    (["--head_width=24"], "head_width=24: does not divide"), (["--updates=0"], "updates=0"), (["--limit=0"], "limit=0"),
    (["--length=65"], "longer than model.max_seq_len=64"), (["--optim.name=sgd", "--widths=[32,64]"], "optim.name=sgd with model.mup"),
    (["--picture=x.gif"], "picture=x.gif"), (["--page=no/where.html"], "its folder is not there")])
def test_bad_settings_are_the_users_mistake(words, said, config, capsys):
    assert main(["plan", "coordcheck", config, *words]) == 2
    assert said in capsys.readouterr().err


def test_what_does_not_move_has_no_slope(tmp_path, monkeypatch, capsys):
    """A head begins at 0, so after one update nothing below it has moved."""
    (tmp_path / "c.yaml").write_text("model: {max_seq_len: 32}\ndata: {seq_len: 32}\ntrain: {steps: 1}\n")
    still = np.ones((1, 1, len(KINDS)))
    still[..., KINDS.index("mlp")] = 0
    monkeypatch.setattr(coordinates, "changes", lambda *args: still)
    assert main(["plan", "coordcheck", str(tmp_path / "c.yaml"), "--updates=1", "--length=16"]) == 2
    said = capsys.readouterr().err
    assert "the mlp has not changed, so it has no slope" in said and said.count("\n") == 1
