"""One step: the same on every mesh, in any number of micro-batches, and with documents packed or apart."""

import dataclasses

import jax
import numpy as np
import pytest
import toy

from jaxllm.errors import UserError
from jaxllm.partition import batch_sharding
from jaxllm.train.config import OptimConfig, TrainConfig
from jaxllm.train.step import Objective, loss_sum

MESHES = {
    "data8": {"data": 8}, "fsdp8": {"fsdp": 8}, "tensor2": {"tensor": 2, "devices": 2},
    "data2 fsdp2 tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
}
MORE = {"context4 ring": {"context": 4, "devices": 4, "context_attention": "ring"}, "fsdp2 context2 tensor2": {"fsdp": 2, "context": 2, "tensor": 2},
        "data2 fsdp4": {"data": 2, "fsdp": 4}, "data4 tensor2": {"data": 4, "tensor": 2},
        "fsdp4 tensor2, 2 parts": {"fsdp": 4, "tensor": 2, "micro_batches": 2},  # the ten steps in parts, too
        "context2": {"context": 2, "devices": 2}, "data2 context4": {"data": 2, "context": 4},
        "fsdp4 context2, 4 parts": {"fsdp": 4, "context": 2, "micro_batches": 4}, "context4 tensor2": {"context": 4, "tensor": 2},
        "fsdp2 context2 tensor2 ring": {"fsdp": 2, "context": 2, "tensor": 2, "context_attention": "ring"}}


def loss_and_grads(prog, batch, model=toy.MODEL, key=None):
    objective = Objective(prog.graph, np.dtype(np.float32), 10, 0.0, 0.0, model.dropout)
    with jax.set_mesh(prog.mesh):
        params = prog.init().params
        placed = jax.device_put(batch, batch_sharding(prog.mesh))
        fun = jax.jit(jax.value_and_grad(lambda p, b: loss_sum(objective, p, b, key), has_aux=True))
        (loss, n), grads = fun(params, placed)
    return float(loss), float(n), jax.device_get(grads)


@pytest.fixture(scope="module")
def one_device():
    prog = toy.program()
    batches = [toy.batch(seed=i) for i in range(10)]
    return loss_and_grads(prog, batches[0]), toy.run(prog, batches)[1], batches


@pytest.mark.parametrize("mesh", [pytest.param(mesh, id=name, marks=[pytest.mark.slow] if name in MORE else [])
                                  for name, mesh in (MESHES | MORE).items()])
def test_every_mesh_computes_what_one_device_computes(mesh, one_device):
    (loss, n, grads), curve, batches = one_device
    prog = toy.program(**{"devices": 8} | mesh)
    sharded_loss, sharded_n, sharded_grads = loss_and_grads(prog, batches[0])
    assert sharded_n == n
    assert abs(sharded_loss - loss) / loss < 1e-6
    error, leaf = toy.worst(sharded_grads, grads)
    assert error < 1e-5, leaf
    np.testing.assert_allclose(toy.run(prog, batches)[1], curve, rtol=1e-5)


def test_parameters_are_really_split():
    prog = toy.program(devices=8, fsdp=4, tensor=2)
    with jax.set_mesh(prog.mesh):
        state = prog.init()
    shards = {name: leaf.addressable_shards[0].data.size / leaf.size for name, leaf in _arrays(state.params).items()}
    assert shards["trunk.blocks_L.attn.qkv_DKGH"] == shards["trunk.blocks_L.mlp.down_FD"] == shards["out_DV"] == 1 / 8
    moments = {name: leaf.addressable_shards[0].data.size / leaf.size for name, leaf in _arrays(state.opt_state).items()}
    assert sum(share == 1 / 8 for share in moments.values()) == 2 * sum(share == 1 / 8 for share in shards.values())


def test_the_mesh_does_not_change_the_initial_weights():
    one, eight = toy.program(), toy.program(devices=8, data=2, fsdp=2, tensor=2)
    states = []
    for prog in (one, eight):
        with jax.set_mesh(prog.mesh):
            states.append(prog.init())
    assert toy.worst(states[0], states[1])[0] == 0


def test_zero1_splits_the_moments_and_changes_no_result(one_device):
    _, curve, batches = one_device
    prog = toy.program(devices=8, data=4, tensor=2, optim=OptimConfig(lr=1e-3, schedule="constant", zero1=True))
    state, losses = toy.run(prog, batches)
    np.testing.assert_allclose(losses, curve, rtol=1e-5)

    def bytes_here(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree) if x.ndim > 1)

    assert bytes_here(state.opt_state) == 2 * bytes_here(state.params) / 4  # two moments, over four replicas


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_make_the_step_of_one_batch(micro_batches):
    batches = [toy.batch(seed=i) for i in range(3)]
    batches[0]["weight_BT"][::2] = 0  # parts with unequal numbers of targets: a mean of means would differ
    state, losses = toy.run(toy.program(optim=OptimConfig(name="sgd", lr=0.1, b1=0.9)), batches)
    other, other_losses = toy.run(toy.program(optim=OptimConfig(name="sgd", lr=0.1, b1=0.9), micro_batches=micro_batches), batches)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-6)
    assert toy.worst(other.params, state.params)[0] < 1e-6


@pytest.mark.parametrize("window", [None, 5])
def test_packed_documents_are_the_same_documents_alone(window):
    model = dataclasses.replace(toy.MODEL, window=window)
    prog, lengths = toy.program(model), (9, 1, 14)
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 64, n + 1).astype(np.int32) for n in lengths]

    def row(docs):
        parts = {"token_BT": [d[:-1] for d in docs], "target_BT": [d[1:] for d in docs],
                 "pos_BT": [np.arange(len(d) - 1) for d in docs], "doc_BT": [np.full(len(d) - 1, i + 1) for i, d in enumerate(docs)],
                 "weight_BT": [np.ones(len(d) - 1) for d in docs]}
        pad = 24 - sum(len(d) - 1 for d in docs)
        kind = {"weight_BT": np.float32}
        return {k: np.concatenate([*v, np.zeros(pad)])[None].astype(kind.get(k, np.int32)) for k, v in parts.items()}

    packed = loss_and_grads(prog, row(documents), model)
    alone = [loss_and_grads(prog, row([d]), model) for d in documents]
    np.testing.assert_allclose(packed[0], sum(a[0] for a in alone), rtol=1e-6)
    summed = jax.tree.map(lambda *g: sum(g), *[a[2] for a in alone])
    error, leaf = toy.worst(packed[2], summed)
    assert error < 1e-6, leaf


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 4}], ids=["positions whole", "in parts"])
def test_dropout_does_not_depend_on_the_mesh_and_is_off_without_a_key(mesh):
    model = dataclasses.replace(toy.MODEL, dropout=0.3)
    one, eight = toy.program(model), toy.program(model, devices=8, **mesh)
    key = jax.random.key(3)
    on, sharded, off = (loss_and_grads(p, toy.batch(), model, k)[0] for p, k in ((one, key), (eight, key), (one, None)))
    assert abs(on - sharded) / on < 1e-6
    assert on != off
    assert off == loss_and_grads(toy.program(), toy.batch())[0]


@pytest.mark.parametrize("remat", ["dots", "mlp", "qkv_attention", "qkv", "full"])
def test_remat_changes_memory_not_results(remat):
    plain, less = toy.program(batch_size=8), toy.program(batch_size=8, remat=remat)
    batch = toy.batch(8, T=128)
    (loss, _, grads), (other, _, other_grads) = loss_and_grads(plain, batch), loss_and_grads(less, batch)
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    assert toy.worst(other_grads, grads)[0] < 1e-5
    flops = []
    for prog in (plain, less):
        with jax.set_mesh(prog.mesh):
            flops.append(prog.train_step.lower(prog.abstract, batch).compile().cost_analysis()["flops"])
    assert flops[1] > flops[0] * (1.15 if remat == "full" else 1)  # something is computed twice


@pytest.mark.parametrize(("remat", "activation", "kept"), [
    ("full", "swiglu", (0, 0)), ("qkv", "swiglu", (1, 0)), ("gate", "swiglu", (0, 1)), ("mlp", "swiglu", (0, 2)),
    ("qkv+up", "swiglu", (1, 1)), ("qkv_attention+mlp", "swiglu", (1, 2)), ("up", "gelu", (0, 1)),
])
def test_remat_keeps_the_tensors_that_it_names(remat, activation, kept):
    model = dataclasses.replace(toy.MODEL, activation=activation)
    prog = toy.program(model, remat=remat)
    objective = Objective(prog.graph, np.dtype(np.float32), 10, 0.0, 0.0, 0.0)
    with jax.set_mesh(prog.mesh):
        backward = jax.eval_shape(lambda params: jax.vjp(lambda p: loss_sum(objective, p, toy.batch())[0], params)[1],
                                  prog.abstract.params)
    shapes = [leaf.shape for leaf in jax.tree.leaves(backward)]
    rows = toy.ROWS, toy.T
    found = [shapes.count((*rows, model.kv_heads, 4, model.head_dim)), shapes.count((*rows, model.ff_width))]
    assert found == [model.n_layers * n for n in kept]


def test_a_remat_that_names_no_tensor_is_told():
    with pytest.raises(ValueError, match=r"train\.remat=qkv\+mpl: 'mpl' is no tensor of a layer; should be none, dots, full, or"):
        TrainConfig(steps=1, remat="qkv+mpl")


def test_a_batch_without_targets_moves_nothing_and_is_finite():
    batch = toy.batch()
    batch["weight_BT"][:] = 0
    prog = toy.program(optim=OptimConfig(weight_decay=0.0))
    with jax.set_mesh(prog.mesh):
        before = jax.device_get(prog.init().params)
    state, losses = toy.run(prog, [batch])
    assert losses == [0.0]
    assert toy.worst(state.params, before)[0] == 0


@pytest.mark.parametrize(("mesh", "says"), [
    ({"devices": 8, "tensor": 8}, "out_NHD: axis 'heads' has size 4, which mesh.tensor=8 does not divide; what does, up to 8: 1, 2, 4$"),
    ({"devices": 8, "data": 8, "batch_size": 12}, "nearest batch_size: 16"),
    ({"devices": 8, "data": 8, "micro_batches": 4}, "4 rows a part"),
    ({"devices": 4, "data": 3}, "needs 3 devices, found 4"),
])
def test_what_a_mesh_cannot_do_is_said_before_compiling(mesh, says):
    with pytest.raises(UserError, match=says):
        toy.program(**mesh)


def _arrays(tree):
    from jaxllm.partition import leaf_name

    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
