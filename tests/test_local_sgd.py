"""Groups that train alone and meet every few steps."""

import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import runs
import toy

from jaxllm import cli
from jaxllm.mesh import DcnConfig, MeshConfig
from jaxllm.parallel.meetings import bytes_per_token
from jaxllm.partition import batch_sharding, make_mesh
from jaxllm.plan.collectives import groups
from jaxllm.train.config import OptimConfig, TrainConfig
from jaxllm.train.optim import make_optimizer
from jaxllm.train.state import build, fragments_of

SGD = OptimConfig(name="sgd", lr=0.1, b1=0.0, clip=0, weight_decay=0, schedule="constant")


def whole_batches(n: int) -> list[dict]:
    """Batches in which every group has the same number of targets."""
    return [toy.batch(seed=i) | {"weight_BT": np.ones((toy.ROWS, toy.T), np.float32)} for i in range(n)]


def program(sync="local_sgd", inner_steps=1, optim=SGD, **more):
    return toy.program(**{"devices": 4, "data": 4, "groups": 4, "sync": sync, "inner_steps": inner_steps, "optim": optim} | more)


@pytest.mark.parametrize("mesh", [{}, *(pytest.param({"devices": 8, axis: 2}, marks=pytest.mark.slow) for axis in ("tensor", "fsdp"))])
def test_meeting_after_every_step_of_sgd_is_synchronous_training(mesh):
    batches = whole_batches(4)
    state, losses = toy.run(program(**mesh), batches)
    want, want_losses = toy.run(toy.program(optim=SGD), batches)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    assert toy.worst(state.params, want.params)[0] < 1e-5


def test_between_meetings_each_group_is_a_run_of_its_own():
    batches, prog = whole_batches(2), program(inner_steps=5)
    with jax.set_mesh(prog.mesh):
        first = prog.init()
    state, _ = toy.run(prog, batches)
    assert toy.worst(state.params, first.params)[0] == 0  # they have not met
    rows = toy.ROWS // 4
    for g in range(4):
        own = [{k: v[g * rows : (g + 1) * rows] for k, v in batch.items()} for batch in batches]
        alone, _ = toy.run(toy.program(optim=SGD, batch_size=rows), own)
        theirs = jax.tree.map(lambda x, g=g: np.asarray(x)[g], state.opt_state.params_G)
        assert toy.worst(theirs, alone.params)[0] < 1e-5


def test_the_outer_step_is_nesterovs():
    """Three meetings against the formula, from the groups' own parameters (Douillard et al. 2023, algorithm 1)."""
    prog = program("diloco", inner_steps=1, outer_lr=0.7, outer_momentum=0.9)
    with jax.set_mesh(prog.mesh):
        state = prog.init()
        shared, velocity = toy.leaves(state.params), 0.0
        name = "trunk.embed_VD"
        for batch in whole_batches(3):
            # what the groups come to is that of plain averaging from here: a synchronous step
            plain, _ = toy.run(toy.program(optim=SGD), [batch], _one(shared, state))
            gradient = shared[name] - toy.leaves(plain.params)[name]
            velocity = 0.9 * velocity + gradient
            want = shared[name] - 0.7 * (gradient + 0.9 * velocity)
            state, _ = prog.train_step(state, jax.device_put(batch, batch_sharding(prog.mesh)))
            shared = toy.leaves(state.params)
            np.testing.assert_allclose(shared[name], want, rtol=1e-4, atol=1e-6)


def _one(shared, state):
    """Returns a one-device state with these parameters."""
    prog = toy.program(optim=SGD)
    with jax.set_mesh(prog.mesh):
        one = prog.init()
    leaves = [shared[name] for name in toy.leaves(one.params)]
    params = jax.device_put(jax.tree.unflatten(jax.tree.structure(one.params), leaves), jax.devices()[0])
    return type(one)(one.step, params, one.opt_state, one.rng)


@pytest.mark.parametrize(("fragments", "overlap"), [(1, 0), (2, 3)])
def test_groups_talk_only_when_they_meet(fragments, overlap):
    """Between meetings nothing crosses groups; a meeting sends every parameter of its fragment once, as the formula says."""
    prog = program("diloco", inner_steps=10, fragments=fragments, steps=None, overlap=overlap)
    with jax.set_mesh(prog.mesh):
        batch = jax.device_put(whole_batches(1)[0], batch_sharding(prog.mesh))
        text = prog.train_step.lower(prog.abstract, batch).compile().as_text()
    n_params = sum(x.size for x in jax.tree.leaves(prog.abstract.params))
    sizes = fragments_of(TrainConfig(sync="diloco", groups=4, fragments=fragments), prog.abstract.params)[1]
    assert sum(sizes) == n_params
    outside, inside = 0, []
    for computation in re.split(r"\n\n", text):
        sent = sum(np.prod([int(d) for d in dims.split(",") if d], dtype=int)
                   for line in computation.splitlines() if re.search(r" all-(reduce|gather)(-start)?\(", line)
                   for dims in re.findall(r"f32\[([\d,]*)\]", line.split(" all-")[0]))
        if "ENTRY" in computation:
            outside += sent
        elif sent:
            inside.append(sent)
    assert outside == 0
    assert sorted(inside) == sorted(sizes)
    assert bytes_per_token(n_params, 4, 100, 10) == pytest.approx(4 * n_params * 1.5 / 1000)


@pytest.mark.slow
def test_a_run_resumes_between_meetings_and_is_sampled_and_inspected(tmp_path, capsys):
    how = {"sync": "diloco", "groups": 4, "inner_steps": 6, "eval_every": 6}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    config = runs.config(tmp_path, train=how, mesh={"data": 4, "tensor": 2}, checkpoint={"every": 8})
    assert cli.main(["pretrain", str(config), f"--run.dir={straight}"]) == 0
    said = capsys.readouterr().err
    assert "4 groups meet every 6 steps: each sends" in said
    code, text = runs.finish(runs.start("pretrain", config, f"--run.dir={resumed}", "--train.steps=12", devices=8))
    assert code == 0, text
    code, text = runs.finish(runs.start("pretrain", config, f"--run.dir={resumed}", devices=8))
    assert code == 0, text
    a, b = (runs.lines(f / "metrics.jsonl", "step", "loss", "eval_loss") for f in (straight, resumed))
    held_out = [x["eval_loss"] for x in a if "eval_loss" in x]
    assert held_out[-1] < held_out[0]
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=1e-5)
    assert cli.main(["inspect", str(resumed), "--digest"]) == 0
    assert cli.main(["generate", str(resumed), "--prompt=the ", "--sample.max_tokens=4"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"inner_steps": 3, "staleness": 2}, {"inner_steps": 5, "fragments": 2, "overlap": 2}])
def test_a_run_resumes_to_the_bit_while_contributions_are_under_way(tmp_path, how, capsys):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    config = runs.config(tmp_path, train={"sync": "diloco", "groups": 2, **how}, mesh={"data": 2, "fsdp": 4}, model={"n_layers": 2},
                         checkpoint={"every": 7, "keep": 9})
    assert cli.main(["pretrain", str(config), f"--run.dir={straight}"]) == 0
    shutil.copytree(straight, resumed)
    for step in (14, 21, 24):
        shutil.rmtree(resumed / "checkpoints" / str(step))
    assert cli.main(["pretrain", str(config), f"--run.dir={resumed}"]) == 0
    assert "goes on from step 7" in capsys.readouterr().err
    found = []
    for folder in (straight, resumed):
        assert cli.main(["inspect", str(folder), "--digest", f"--json={folder}.json"]) == 0
        found.append(json.loads(pathlib.Path(f"{folder}.json").read_text())["digest"])
    assert found[0] == found[1] and any("sent_G" in name for name in found[0])
    assert runs.lines(straight / "metrics.jsonl", *runs.NUMBERS) == runs.lines(resumed / "metrics.jsonl", *runs.NUMBERS)


@pytest.mark.parametrize(("words", "says"), [
    (["--train.groups=2", "--train.sync=diloco"], "train.groups=2: should be the degree of mesh.data (times mesh.dcn.data), which is 8"),
    (["--train.sync=diloco", "--train.groups=8", "--optim.zero1=true"], "optim.zero1=true with train.sync=diloco"),
    (["--train.sync=local_sgd"], "local_sgd and diloco need 2 groups or more"),
    (["--train.staleness=2"], "train.staleness=2 with train.sync=every_step: is for local_sgd and diloco"),
    (["--train.sync=diloco", "--train.groups=8", "--train.staleness=2", "--train.overlap=1"], "train.staleness=2 with train.overlap=1"),
    (["--train.sync=diloco", "--train.groups=8", "--train.overlap=6"], "train.overlap=6: should be 0 or more, 1 to 6 (train.inner_steps), and 0 to 5"),
    (["--train.sync=diloco", "--train.groups=8", "--train.mixing=0.5"], "train.mixing=0.5 with train.overlap=0: should be in [0, 1], and needs"),
    (["--train.sync=diloco", "--train.groups=8", "--train.fragments=3"], "train.fragments=3: should be at most the number of stacked layers, 1"),
    (["--train.sync=diloco", "--train.groups=2", "--mesh.stage=2", "--mesh.fsdp=2", "--model.n_layers=2", "--train.micro_batches=2"],
     "train.sync=diloco cannot be combined with mesh.stage=2"),
])
def test_what_cannot_be_is_said(tmp_path, words, says, capsys):
    assert cli.main(["pretrain", str(runs.config(tmp_path, train={"inner_steps": 6})), *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_a_slice_that_is_a_group_crosses_to_others_only_in_a_meeting():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, dcn=DcnConfig(data=2)))
    train = TrainConfig(steps=8, batch_size=toy.ROWS, sync="diloco", groups=2, inner_steps=4, overlap=1)
    prog = build(toy.MODEL, train, make_optimizer(OptimConfig(), 8), mesh)
    with jax.set_mesh(mesh):
        batch = jax.device_put(toy.batch(), batch_sharding(mesh))
        text = prog.train_step.lower(prog.abstract, batch).compile().as_text()
    within, between = [], []
    for line in text.splitlines():
        if re.search(r" (all-(reduce|gather|to-all)|reduce-scatter|collective-permute)(-start)?\(", line):
            pairs = re.findall(r"\{(\d+),(\d+)\}", line.partition("source_target_pairs=")[2].partition("}}")[0] + "}")
            members = [tuple(map(int, pair)) for pair in pairs] or [groups(line, 8)]
            crosses = any(len({i // 4 for i in some}) > 1 for some in members)
            (between if crosses else within).append(line)
    assert within  # weights are gathered inside of a slice
    assert between
    assert all("branch_" in line for line in between), [line for line in between if "branch_" not in line][:3]
