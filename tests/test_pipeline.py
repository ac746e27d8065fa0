"""Every pipeline schedule computes what one device computes, on the stage axis alone and beside the other axes."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import PartitionSpec

from jaxllm.errors import UserError
from jaxllm.mesh import AXES, MeshConfig
from jaxllm.parallel.pipeline import Parts, _spread, pipeline_value_and_grad
from jaxllm.parallel.schedule import make
from jaxllm.parallel.table import lower
from jaxllm.partition import batch_sharding, make_mesh
from jaxllm.train.config import OptimConfig, TrainConfig
from jaxllm.train.stages import pipelined, schedule_of
from jaxllm.train.step import Objective, accumulated

MODEL = dataclasses.replace(toy.MODEL, n_layers=8)
M = 8
MESHES = {"stage4 tensor2": {"stage": 4, "tensor": 2}, "stage4 data2": {"stage": 4, "data": 2}, "stage8": {"stage": 8},
          "stage2 fsdp2 tensor2": {"stage": 2, "fsdp": 2, "tensor": 2}, "stage2 context2 data2": {"stage": 2, "context": 2, "data": 2}}
MORE = {"stage2 data2 tensor2": {"stage": 2, "data": 2, "tensor": 2}, "stage4 fsdp2": {"stage": 4, "fsdp": 2},
        "stage4 context2": {"stage": 4, "context": 2}}  # with 1F1B alone
SCHEDULES = {"gpipe": {}, "1f1b": {}, "interleaved": {"virtual_stages": 2}, "zero_bubble": {}}
QUICK = {("stage4 tensor2", "1f1b"), ("stage4 data2", "zero_bubble"), ("stage8", "gpipe")}
CASES = [pytest.param(mesh, name, id=f"{mesh} {name}", marks=[] if (mesh, name) in QUICK else [pytest.mark.slow])
         for mesh in MESHES for name in SCHEDULES if (mesh, name) != ("stage8", "interleaved")]  # 16 pieces of 8 layers
CASES += [pytest.param(mesh, "1f1b", id=f"{mesh} 1f1b", marks=pytest.mark.slow) for mesh in MORE]
# Far below the gradient's norm: clips at every step. Plain SGD: Adam would undo a factor on a stage's gradients.
CLIP = OptimConfig(name="sgd", lr=0.3, schedule="constant", clip=0.1)


def program(model=MODEL, name="1f1b", micro_batches=M, **mesh):
    if mesh.get("fsdp", 1) > 1 and mesh.get("tensor", 1) > 1 and jax.__version_info__ < (0, 10):
        pytest.skip("jax before 0.10: stage with fsdp and tensor is refused")
    devices = int(np.prod([size for axis, size in mesh.items() if axis in AXES]))
    return toy.program(model, devices=devices, optim=CLIP, micro_batches=micro_batches, pipeline=name, **SCHEDULES[name] | mesh)


def loss_and_grads(prog, batch, model=MODEL, name="1f1b", micro_batches=M):
    """Returns loss, targets and gradients, with z-loss and smoothing, and with dropout on where the model has it."""
    objective = Objective(prog.graph, np.dtype(np.float32), 10, 1e-3, 0.1, model.dropout)
    train = TrainConfig(steps=1, micro_batches=micro_batches, pipeline=name, **SCHEDULES[name])
    fun = partial(accumulated, objective, micro_batches)
    if prog.mesh.shape["stage"] > 1:
        fun = pipelined(objective, schedule_of(model, train, prog.mesh), prog.mesh, prog.abstract.params)
    key = jax.random.key(3) if model.dropout else None
    with jax.set_mesh(prog.mesh):
        params, placed = prog.init().params, jax.device_put(batch, batch_sharding(prog.mesh))
        (loss, (n, _)), grads = jax.jit(lambda p, b: fun(p, b, key))(params, placed)
    return float(loss), float(n), jax.device_get(grads)


def clipped(prog, batches):
    """Returns the losses and the gradients' norms of a step on each batch, every one of which the clipping must have cut."""
    with jax.set_mesh(prog.mesh):
        state, found = prog.init(), []
        for one in batches:
            state, metrics = prog.train_step(state, jax.device_put(one, batch_sharding(prog.mesh)))
            found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    assert min(norm for _, norm in found) > 2 * CLIP.clip
    return found


@pytest.fixture(scope="module")
def one_device():
    prog = program()
    batches = [toy.batch(seed=i) for i in range(10)]
    batches[0]["weight_BT"][::2] = 0  # parts with unequal numbers of targets
    return loss_and_grads(prog, batches[0]), clipped(prog, batches), batches


@pytest.mark.parametrize(("mesh", "name"), CASES)
def test_every_schedule_computes_what_one_device_computes(mesh, name, one_device):
    (loss, n, grads), _, batches = one_device
    prog = program(name=name, **(MESHES | MORE)[mesh])
    found, found_n, found_grads = loss_and_grads(prog, batches[0], name=name)
    assert found_n == n
    assert abs(found - loss) / loss < 1e-6
    error, leaf = toy.worst(found_grads, grads)
    assert error < 1e-5, leaf


@pytest.mark.parametrize(("mesh", "name"), CASES)
def test_ten_steps_with_clipping_are_those_of_one_device(mesh, name, one_device):
    _, curve, batches = one_device
    np.testing.assert_allclose(clipped(program(name=name, **(MESHES | MORE)[mesh]), batches), curve, rtol=1e-5)


@pytest.mark.parametrize(("change", "name", "train"), [
    pytest.param({"tied": True, "norm": "layernorm", "n_layers": 2}, "zero_bubble", {"remat": "full"}, id="tied, remat"),
    pytest.param({"dropout": 0.3, "n_layers": 4}, "interleaved", {"fsdp": 2}, id="dropout, fsdp", marks=pytest.mark.slow),
    pytest.param({"window": 5, "activation": "gelu", "n_layers": 2}, "1f1b", {"micro_batches": 1}, id="one micro-batch", marks=pytest.mark.slow),
    pytest.param({"dropout": 0.3, "n_layers": 6}, "zero_bubble", {"micro_batches": 2, "stage": 3}, id="few", marks=pytest.mark.slow),
])
def test_every_kind_of_model_computes_what_one_device_computes(change, name, train):
    model, m = dataclasses.replace(MODEL, **change), train.get("micro_batches", M)
    batch = toy.batch()
    loss, _, grads = loss_and_grads(program(model, micro_batches=m), batch, model, micro_batches=m)
    prog = toy.program(model, **{"devices": train.get("stage", 2) * train.get("fsdp", 1), "stage": 2, "micro_batches": m, "pipeline": name}
                       | SCHEDULES[name] | train)
    found, _, found_grads = loss_and_grads(prog, batch, model, name, m)
    assert abs(found - loss) / loss < 1e-6
    error, leaf = toy.worst(found_grads, grads)
    assert error < 1e-5, leaf


def sums(mesh, schedule, layers=8, width=16):
    """Returns the pipeline's and the plain (loss, gradients) of a small stack whose layers each add to the loss."""
    rng = np.random.default_rng(0)
    shared = {"embed": rng.normal(size=(11, width)), "head": rng.normal(size=(width, 11))}
    shared, blocks = jax.tree.map(np.float32, (shared, {"w": rng.normal(size=(layers, width, width)) / width**0.5}))
    m = schedule.micro_batches
    inputs = {"token": rng.integers(0, 11, (m, 2, 6))}

    def body(blocks, x_BTD, inputs, layered):
        def layer(x_BTD, w):
            y_BTD = jnp.tanh(x_BTD @ w)
            return x_BTD + y_BTD, 0.01 * jnp.sum(y_BTD**2)

        x_BTD, extra_L = jax.lax.scan(layer, x_BTD, blocks["w"])
        return x_BTD, jnp.sum(extra_L), extra_L

    def loss(shared, x_BTD, inputs):
        return jnp.sum(jax.nn.logsumexp(x_BTD @ shared["head"], axis=-1))

    parts = Parts(lambda shared, inputs: shared["embed"][inputs["token"]], body, loss)

    def plain(shared, blocks):
        total, counted_L = 0.0, 0.0
        for i in range(m):
            one = jax.tree.map(lambda a, i=i: a[i], inputs)
            x_BTD, extra, extra_L = body(blocks, parts.embed(shared, one), one, None)
            total, counted_L = total + parts.loss(shared, x_BTD, one) + extra, counted_L + extra_L
        return total, counted_L

    with jax.set_mesh(mesh):
        found_loss, *found = jax.jit(pipeline_value_and_grad(parts, schedule, mesh))(shared, blocks, inputs, None)
    (loss, counted_L), grads = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(shared, blocks)
    return (float(found_loss), found), (float(loss), [*grads, counted_L])


@pytest.mark.parametrize(("name", "v"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1)])
@pytest.mark.parametrize("m", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_what_layers_add_to_the_loss_and_count_is_summed_over_stages(name, v, m):
    mesh = make_mesh(MeshConfig(stage=4, data=1), jax.devices()[:4])
    (found, found_grads), (loss, grads) = sums(mesh, make(name, 4, m, v))
    assert abs(found - loss) / loss < 1e-6
    error, leaf = toy.worst(found_grads, grads)
    assert error < 1e-5, leaf


def temporaries(name, m):
    prog = toy.program(dataclasses.replace(MODEL, dropout=0.0), devices=4, stage=4, micro_batches=m, pipeline=name, batch_size=m * 16,
                       loss_chunk=24)
    with jax.set_mesh(prog.mesh):
        compiled = prog.train_step.lower(prog.abstract, toy.batch(m * 16)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_1f1b_needs_less_memory_than_gpipe_by_what_the_tables_say():
    tables = [lower(make(name, 4, 16)) for name in ("gpipe", "1f1b")]
    slots = [table.x_slots + table.g_slots for table in tables]
    predicted = (slots[0] - slots[1]) * 16 * toy.T * MODEL.d_model * 4
    assert temporaries("gpipe", 16) - temporaries("1f1b", 16) == pytest.approx(predicted, rel=0.1)


def conditionals(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "cond":
            yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda a: hasattr(a, "eqns") or hasattr(a, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from conditionals(getattr(inner, "jaxpr", inner))


def test_what_waits_for_the_weight_part_is_handed_out_by_the_slot():
    """XLA for TPU copies the whole of an array that a branch changes in part."""
    prog = program(name="zero_bubble", stage=4)
    with jax.set_mesh(prog.mesh):
        found = list(conditionals(jax.make_jaxpr(prog.train_step)(prog.abstract, toy.batch()).jaxpr))
    slots, n = lower(make("zero_bubble", 4, M)).w_slots, MODEL.n_layers // 4
    shapes = [v.aval.shape for eqn in found for v in eqn.outvars]
    assert any(shape[:1] == (n,) and toy.T in shape for shape in shapes)  # the slot
    assert not any(shape[:2] == (slots, n) for shape in shapes)


def test_what_devices_would_hold_alike_waits_split_over_them():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, data=1), jax.devices()[:4])
    with jax.set_mesh(mesh):
        assert _spread(PartitionSpec("fsdp", None, None), (2, 6, 5)) == PartitionSpec("fsdp", "tensor", None)
        assert _spread(PartitionSpec("fsdp", None, "tensor"), (2, 6, 6)) == PartitionSpec("fsdp", None, "tensor")
        assert _spread(PartitionSpec("fsdp"), (2, 5, 3)) == PartitionSpec("fsdp", None, None)


@pytest.mark.parametrize(("mesh", "name"), [
    ({"stage": 4, "data": 2}, "1f1b"), pytest.param({"stage": 2, "data": 2, "tensor": 2}, "1f1b", marks=pytest.mark.slow),
    pytest.param({"stage": 2, "fsdp": 2, "tensor": 2}, "zero_bubble", marks=pytest.mark.slow)], ids=str)
def test_only_the_stages_pass_things_on(mesh, name):
    """A permutation inside of a branch would wait for stages that take another branch."""
    prog = program(name=name, **mesh)
    with jax.set_mesh(prog.mesh):
        text = prog.train_step.lower(prog.abstract, toy.batch()).compile().as_text()
    assert len(re.findall(r" collective-permute(?:-start)?\(", text)) == 2
    assert not re.findall(r" all-to-all(?:-start)?\(", text)
    assert len(re.findall(r" conditional\(", text)) >= 1


def test_evaluation_and_weights_are_those_of_one_device():
    one, four = program(), program(stage=4, data=2)
    found, states = [], []
    for prog in (one, four):
        with jax.set_mesh(prog.mesh):
            states.append(prog.init())
            found.append(prog.eval_step(states[-1].params, jax.device_put(toy.batch(), batch_sharding(prog.mesh))))
    assert toy.worst(states[0], states[1])[0] == 0
    assert abs(float(found[0][0]) - float(found[1][0])) / float(found[0][0]) < 1e-6
    assert states[1].params["trunk"]["blocks_L"]["mlp"]["down_FD"][...].addressable_shards[0].data.shape[0] == 2  # of 8 layers


def test_samples_are_those_of_one_device():
    from jaxllm.data.tokenizer import ByteTokenizer
    from jaxllm.generate.config import SampleConfig
    from jaxllm.generate.engine import Engine

    model, texts = dataclasses.replace(MODEL, n_layers=2, vocab_size=ByteTokenizer().vocab_size), []
    for mesh in ({}, {"stage": 2, "tensor": 2}):
        prog = program(model, **mesh)
        with jax.set_mesh(prog.mesh):
            params = prog.init().params
        engine = Engine(prog.graph, params, model, ByteTokenizer(), prog.mesh)
        texts.append([one.text for one in engine.generate(["ab", "hello"], SampleConfig(max_tokens=8))])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("mesh", ["stage4 data2", pytest.param("stage2 fsdp2 tensor2", marks=pytest.mark.slow)])
def test_an_embedding_that_is_split_over_the_stages_gives_the_same_steps(mesh, one_device):
    _, curve, batches = one_device
    whole, split = (program(**MESHES[mesh], split_embedding=own) for own in (False, True))
    np.testing.assert_allclose(clipped(split, batches), curve, rtol=1e-5)

    def held(prog):  # bytes of parameters and moments on a device
        return sum(int(np.prod(a.sharding.shard_shape(a.shape))) * a.dtype.itemsize for a in jax.tree.leaves(prog.abstract))

    sizes = MESHES[mesh]
    ends = 2 * 2 * 4 * MODEL.vocab_size * MODEL.d_model // (sizes.get("fsdp", 1) * sizes.get("tensor", 1))  # each with its momentum
    assert held(whole) - held(split) == ends - ends // sizes["stage"]


@pytest.mark.parametrize(("settings", "says"), [
    ({"stage": 3}, "model.n_layers=8: mesh.stage=3 does not divide it; nearest: 9"),
    ({"stage": 4, "pipeline": "interleaved", "virtual_stages": 4}, "mesh.stage=4 x train.virtual_stages=4 does not divide it"),
    ({"stage": 4, "pipeline": "interleaved", "virtual_stages": 2, "micro_batches": 2}, "micro_batches=2 is not a multiple of the 4"),
    ({"stage": 1, "split_embedding": True}, "train.split_embedding=true needs mesh.stage of 2 or more"),
    ({"stage": 4, "virtual_stages": 2}, "schedule '1f1b' has 1 a stage"), ({"stage": 4, "pipeline": "pipe"}, "did you mean 'gpipe'"),
])
def test_what_a_pipeline_cannot_do_is_said_before_compiling(settings, says):
    with pytest.raises(UserError, match=re.escape(says)) as error:
        toy.program(MODEL, **{"devices": settings["stage"], "micro_batches": M} | settings)
    assert "\n" not in str(error.value)
