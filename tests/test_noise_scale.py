"""The gradient noise scale of a known noise comes back, costs nothing when off, and goes on after a stop."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import toy
import yaml

from jaxllm.cli import main
from jaxllm.config import load
from jaxllm.errors import UserError
from jaxllm.plan.batch import law_of
from jaxllm.plan.batch_config import BatchVerb
from jaxllm.plan.batch_law import adam_at, batch_for_steps, rate_by_noise, steps_and_examples
from jaxllm.report.read import read_run
from jaxllm.train.config import TrainConfig
from jaxllm.train.noise_scale import NoiseState, averaged_noise, estimates, scale_of
from jaxllm.train.step import Objective, loss_sum, split


def test_the_noise_of_a_gaussian_gradient_comes_back():
    """Gradients of examples are G + N(0, Σ): |G|² = 4, tr(Σ) = 4 · 9 · 100, a noise scale of 900 examples."""
    rng, D, parts, rows = np.random.default_rng(0), 100, 4, 64
    G_D = np.full(D, 0.2)
    tx = averaged_noise(400)
    state, seen = tx.init(None), []
    for _ in range(2000):
        example_BD = G_D + 6 * rng.normal(size=(rows, D))
        small = np.mean(np.sum(example_BD.reshape(parts, -1, D).mean(1) ** 2, -1))
        seen.append(estimates(small, np.sum(example_BD.mean(0) ** 2), parts, rows))
        _, state = tx.update({}, state, noise=seen[-1])
    trace, square = np.mean(seen, axis=0)
    np.testing.assert_allclose([trace, square], [3600, 4], rtol=0.1)  # without bias
    np.testing.assert_allclose(float(scale_of(state)), 900, rtol=0.35)
    ratios = [t / s for t, s in seen]
    assert abs(np.mean(ratios) / 900 - 1) > 0.5  # and of single steps the ratio says nothing


def test_without_a_positive_square_there_is_no_scale():
    assert np.isnan(scale_of(NoiseState(jnp.float32(1), jnp.float32(-1))))


def test_a_step_measures_what_the_micro_batches_own_gradients_are():
    batch, parts = toy.batch(), 4
    plain, measured = (toy.program(micro_batches=parts, noise_scale=n) for n in (0, 10))
    want, _ = toy.run(plain, [batch])
    got, _ = toy.run(measured, [batch])
    assert toy.worst(got.params, want.params)[0] < 1e-6  # the same step, but for the order of sums
    assert jax.tree.structure(want.opt_state) == jax.tree.structure(got.opt_state[1:])  # off, nothing is kept

    objective = Objective(plain.graph, jnp.float32, 10, 0.0, 0.0, 0.0)
    mean_grad = jax.jit(jax.grad(lambda params, rows: jnp.divide(*loss_sum(objective, params, rows))))
    params = plain.init().params

    def square(rows):
        return sum(np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(mean_grad(params, rows)))

    small = np.mean([square(jax.tree.map(lambda x: split(parts, x)[i], batch)) for i in range(parts)])  # noqa: B023
    want = np.array(estimates(small, square(batch), parts, batch["token_BT"].size))
    noise = got.opt_state[0]
    np.testing.assert_allclose([10 * noise.trace, 10 * noise.square], want, rtol=1e-4)


@pytest.mark.parametrize(("change", "said"), [
    ({"noise_scale": 10}, "train.micro_batches=1"), ({"noise_scale": -1}, "noise_scale=-1"),
    ({"noise_scale": 10, "micro_batches": 2, "sync": "local_sgd", "groups": 2}, "train.sync=local_sgd")])
def test_where_micro_batches_tell_nothing_it_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(steps=1, **change)


def test_a_pipeline_refuses_it():
    with pytest.raises(UserError, match=r"train.noise_scale=5 with mesh\.stage=2"):
        toy.program(devices=2, stage=2, micro_batches=4, noise_scale=5)


# ---------------------------------------------------------------- laws


def test_laws_of_the_batch_are_the_papers():
    for batch in (10.0, 300.0, 5e4):
        steps, examples = steps_and_examples(batch, 300.0)
        assert (steps - 1) * (examples - 1) == pytest.approx(1)
        assert batch_for_steps(steps, 300.0) == pytest.approx(batch)
    assert steps_and_examples(300.0, 300.0) == (2, 2)
    best = 0.7  # lr_max
    at = {B: best / (1 + 300 / B) for B in (10, 1000)}
    assert rate_by_noise(at[10], 10, 1000, 300) == pytest.approx(at[1000])
    assert adam_at(1e-3, 0.9, 0.95, 1e-8, 4.0) == pytest.approx({"lr": 2e-3, "b1": 0.6, "b2": 0.8, "eps": 5e-9})
    assert adam_at(1e-3, 0.9, 0.95, 1e-8, 12.0) is None  # the mean of gradients would be the last one alone
    with pytest.raises(ValueError, match="above 1"):
        batch_for_steps(1.0, 300.0)


def folder_with(tmp_path, scales, **settings):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": i + 1, "tokens": 512 * i, "loss": 1.0, "noise_scale": x}) + "\n"
                                                    for i, x in enumerate(scales)))
    tree = {"train": {"batch_size": 8}, "data": {"seq_len": 64}, "optim": {"name": "adamw", "lr": 1e-3, "b1": 0.9, "b2": 0.95, "eps": 1e-8}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree | settings))
    return str(tmp_path)


def test_plan_batch_takes_the_latest_scales(tmp_path, capsys):
    run = folder_with(tmp_path, [100.0] * 30 + [2048.0] * 10)
    found = law_of(BatchVerb(run=run), read_run(run))
    assert (found["noise_scale"], found["batch"], found["first"]) == (2048, 512, 100)
    row = next(r for r in found["batches"] if r["tokens"] == 2048)
    assert (row["steps"], row["examples"], row["sequences"], row["adam"]["lr"]) == (2, 2, 32, 2e-3)
    assert main(["plan", "batch", run]) == 0
    assert "32.0 sequences of 64" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "scales", "said"), [
    ([], [1.0] * 3, "3 lines with noise_scale, needs 5"), (["--last=0"], [1.0] * 9, "last=0"), (["--batches=[0]"], [1.0] * 9, "batches=\\[0\\]")])
def test_plan_batch_refuses(words, scales, said, tmp_path, capsys):
    assert main(["plan", "batch", folder_with(tmp_path, scales), *words]) == 2
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_its_averages(tmp_path):
    def numbers(name, *stops):
        folder = tmp_path / name
        folder.mkdir()
        path = runs.config(folder, train={"steps": 12, "batch_size": 16, "micro_batches": 2, "noise_scale": 5, "eval_every": 0, "sample_every": 0})
        for steps in (*stops, 12):
            assert main(["pretrain", str(path), f"--train.steps={steps}"]) == 0
        return runs.lines(folder / "run" / "metrics.jsonl", "step", "loss", "noise_scale")

    whole = numbers("whole")
    assert whole == numbers("stopped", 7)
    assert sum("noise_scale" in line for line in whole) >= 6
    assert load(TrainConfig, None, ["steps=1"]).noise_scale == 0
