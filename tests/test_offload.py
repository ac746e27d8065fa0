"""Moments and activations in the host's memory: the same step, the same checkpoint, and one line where it cannot be."""

import jax
import pytest
import toy

from jaxllm import cli, config
from jaxllm.data.config import DataConfig
from jaxllm.errors import UserError
from jaxllm.mesh import MeshConfig
from jaxllm.partition import make_mesh
from jaxllm.train import checkpoint, offload, run_folder
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.config import CheckpointConfig, OptimConfig, PretrainConfig, RunConfig, TrainConfig

CAN_RUN = pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="jax 0.7 on a CPU has no placement in the host's memory")


@pytest.fixture
def on_a_cpu(monkeypatch):
    """A CPU's device memory is the host's, and users are told so; yet jax has both kinds there, so that the program can run."""
    monkeypatch.setattr(offload, "PLATFORMS", ("cpu",))


def three_steps(**train):
    prog = toy.program(devices=4, data=2, fsdp=2, **train)
    return toy.run(prog, [toy.batch(seed=i) for i in range(3)])


@pytest.fixture(scope="module")
def plain():
    return three_steps(remat="qkv", micro_batches=2)


@CAN_RUN
@pytest.mark.parametrize("where", [*(pytest.param(one, marks=pytest.mark.slow) for one in ("activations", "optimizer")), "both"])
def test_three_steps_are_those_without_offload(where, plain, on_a_cpu):
    expected, losses = plain
    state, found = three_steps(offload=where, remat="qkv", micro_batches=2)
    assert found == pytest.approx(losses, rel=1e-6)
    assert toy.worst(state.params, expected.params)[0] < 1e-5
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
    assert kinds == {"device" if where == "activations" else "pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}


@CAN_RUN
def test_moments_of_other_shapes_than_the_parameters_go_there_too(on_a_cpu):
    optim = OptimConfig(name="adafactor", lr=1e-3, schedule="constant")
    _, losses = toy.run(toy.program(optim=optim), [toy.batch()] * 3)
    state, found = toy.run(toy.program(optim=optim, offload="optimizer"), [toy.batch()] * 3)
    assert found == pytest.approx(losses, rel=1e-6)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {"pinned_host"}


@CAN_RUN
@pytest.mark.parametrize(("saved", "restored"), [
    ("optimizer", "none"), *(pytest.param(*two, marks=pytest.mark.slow) for two in (("none", "optimizer"), ("optimizer", "optimizer")))])
def test_a_checkpoint_does_not_depend_on_where_moments_live(saved, restored, on_a_cpu, tmp_path):
    first, after = toy.program(devices=4, fsdp=4, offload=saved), toy.program(devices=4, fsdp=4, offload=restored)
    batches = [toy.batch(seed=i) for i in range(4)]
    state, _ = toy.run(first, batches[:2])
    with jax.set_mesh(first.mesh), Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(2, state, {"step": 2})
        checkpoints.wait()
        read, _ = checkpoints.restore(after.abstract)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(read.opt_state) if leaf.ndim}
    assert kinds == {"pinned_host" if restored == "optimizer" else "device"}
    _, expected = toy.run(first, batches[2:], state)
    _, losses = toy.run(after, batches[2:], read)
    assert losses == pytest.approx(expected, rel=1e-6)


def test_a_run_that_offloaded_is_read_on_any_machine(tmp_path):
    prog = toy.program()
    with jax.set_mesh(prog.mesh), Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        state = prog.init()
        checkpoints.save(3, state, {"step": 3})
    cfg = PretrainConfig(model=toy.MODEL, data=DataConfig(seq_len=toy.T), train=TrainConfig(steps=10, offload="both", remat="full"),
                         run=RunConfig(dir=str(tmp_path)))
    run_folder.begin(cfg, config.to_dict(cfg))
    _, _, params, step = checkpoint.load_model(tmp_path, mesh=prog.mesh)
    assert step == 3 and toy.worst(params, state.params)[0] == 0


@CAN_RUN
def test_what_is_kept_of_a_layer_is_offloaded(on_a_cpu):
    """The traced step sends the layer's input and its qkv to the host, and nothing when nothing is to be offloaded."""
    def sent(**train):
        prog = toy.program(remat="qkv", **train)
        with jax.set_mesh(prog.mesh):
            return str(prog.train_step.trace(prog.abstract, toy.batch()).jaxpr).count("<host>")

    assert sent(offload="activations") >= 4  # two layers, two tensors each
    assert sent(offload="none") == 0


@pytest.mark.parametrize(("train", "mesh", "said"), [
    ({"offload": "activations", "remat": "dots"}, {}, "should be a remat that names what it keeps: full, mlp, qkv_attention"),
    ({"offload": "both", "remat": "full"}, {"stage": 2}, "cannot be combined with mesh.stage=2"),
    ({"offload": "optimizer", "sync": "local_sgd", "groups": 2}, {"data": 2}, "cannot be combined with train.sync=local_sgd"),
])
def test_what_cannot_be_offloaded_is_said(train, mesh, said, on_a_cpu):
    with pytest.raises(UserError, match=said):
        devices = jax.devices()[: max(mesh.values(), default=1)]
        offload.check_offload(TrainConfig(steps=30, **train), make_mesh(MeshConfig(**({"data": 1} | mesh)), devices))


def test_a_cpu_says_that_it_has_no_host_beside_it(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a few words\n" * 200)
    assert cli.main(["pretrain", "configs/pretrain/tiny.yaml", f"--data.sources.text.path={tmp_path}/text.txt", f"--run.dir={tmp_path}/run",
                     "--train.offload=optimizer"]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert "train.offload=optimizer: a cpu has no memory of its own beside the host's; leave it out" in err[-1]
    assert not (tmp_path / "run/config.yaml").exists()
