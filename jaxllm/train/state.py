"""The state of a run, born sharded, and where each part of it lives."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.errors import UserError
from jaxllm.hardware import chip
from jaxllm.model.config import ModelConfig
from jaxllm.model.formulation import for_platform
from jaxllm.model.heads import LanguageModel
from jaxllm.parallel import local_sgd
from jaxllm.parallel.context import over_context
from jaxllm.parallel.meetings import Meetings, cut
from jaxllm.partition import RULES, batch_parts, batch_sharding, check_divides, phases, replicated, shardings
from jaxllm.train.config import TrainConfig
from jaxllm.train.offload import check_offload, of_activations, of_optimizer, on_host, through_device
from jaxllm.train.optim import Optimizer, is_variable
from jaxllm.train.stages import pipelined, schedule_of
from jaxllm.train.step import Objective, accumulated, accumulated_with_noise, eval_step, train_step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    step: jax.Array  # int32: optimizer steps done
    params: nnx.State  # float32
    opt_state: optax.OptState
    rng: jax.Array  # uint32 key data of the run's key, never changed: each step folds its number in


@dataclasses.dataclass(frozen=True)
class Program:
    """One model on one mesh: how to make its state, where the state lives, and the compiled steps."""

    mesh: Mesh
    graph: nnx.GraphDef
    init: Any  # () -> TrainState, placed
    abstract: TrainState  # shapes, types and placements
    train_step: Any  # (state, batch) -> (state, metrics); the state is donated
    eval_step: Any  # (params, batch) -> (summed loss, number of tokens)
    read: Any = jax.device_get  # metrics as the step gives them -> those of the whole batch, on the host
    whole: Any = lambda state: state  # what the step returns as state -> TrainState, on all devices
    agreed: Any = None  # a signal's number or 0 -> that of any process, at the same step; None: processes ask each other


def build(model: ModelConfig, train: TrainConfig, optimizer: Optimizer, mesh: Mesh, *, seed: int = 0) -> Program:
    """Returns the program of a model on a mesh. Nothing is allocated or compiled yet.

    Raises UserError when the mesh does not divide a parameter, the batch, or a part of the batch.
    """
    platform = mesh.devices.flat[0].platform
    check_offload(train, mesh)
    form = for_platform(platform, remat=train.remat, offload=of_activations(train), phases=phases(mesh))
    if mesh.shape["context"] > 1:
        form = over_context(form, mesh.shape["context"], train.context_attention)
    dtype = compute_dtype(train.precision, platform)
    check_batch(train, mesh)
    check_experts(model, mesh)
    schedule = schedule_of(model, train, mesh)
    check_noise(train, mesh)

    def init(seed):
        params = nnx.state(LanguageModel(model, form, rngs=nnx.Rngs(jax.random.key(seed))), nnx.Param)
        return begun(params, optimizer, seed)

    graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(model, form, rngs=nnx.Rngs(0))))
    abstract = jax.eval_shape(init, jnp.uint32(0))
    check_divides(abstract.params, mesh, split_embedding=train.split_embedding)
    placed = place(abstract, mesh, zero1=optimizer.zero1, split_embedding=train.split_embedding)
    everywhere, rows = replicated(mesh), batch_sharding(mesh)
    told = everywhere  # where metrics are
    objective = Objective(graph, dtype, train.loss_chunk, train.z_loss, train.label_smoothing, model.dropout,
                          model.moe if model.moe.experts else None)
    loss_and_grads = partial(accumulated_with_noise if train.noise_scale else accumulated, objective, train.micro_batches)
    if schedule is not None:
        loss_and_grads = pipelined(objective, schedule, mesh, abstract.params)
    step = partial(train_step, objective, optimizer, loss_and_grads)
    if train.sync != "every_step":
        init, placed, step = in_groups(train, mesh, abstract.params, init, placed, step)
        abstract = jax.eval_shape(init, jnp.uint32(0))
        told = NamedSharding(mesh, PartitionSpec(local_sgd.AXIS))
    if of_optimizer(train):
        step = through_device(step, placed.opt_state)
        placed = dataclasses.replace(placed, opt_state=on_host(placed.opt_state, abstract.opt_state))
    known = chip(mesh.devices.flat[0].device_kind) if train.xla == "tuned" else None
    step = jax.jit(step, in_shardings=(placed, rows), out_shardings=(placed, told), donate_argnums=0,
                   compiler_options=known.xla if known else None)
    evaluate = jax.jit(partial(eval_step, objective), in_shardings=(placed.params, rows), out_shardings=everywhere)
    return Program(
        mesh=mesh, graph=graph, train_step=step, eval_step=evaluate,
        init=lambda: jax.jit(init, out_shardings=placed)(jnp.uint32(seed)),
        abstract=jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, placed),
        read=jax.device_get if train.sync == "every_step" else local_sgd.read,
    )


def structure(kind, model: ModelConfig, mesh: Mesh, *, remat: str = "none", **made_with):
    """Returns (graph, parameters' shapes, types and placements) of a model that stands on a mesh; `kind`: LanguageModel or
    ScoreModel, `made_with`: what it takes besides the settings."""
    form = for_platform(mesh.devices.flat[0].platform, remat=remat, phases=phases(mesh))

    def make():
        return kind(model, form, **made_with, rngs=nnx.Rngs(0))

    return nnx.graphdef(nnx.eval_shape(make)), placed_shapes(lambda: nnx.state(make(), nnx.Param), mesh)


def placed_shapes(make, mesh: Mesh):
    """Returns shapes, types and placements of the parameters that `make` returns; raises UserError where the mesh does not
    divide one."""
    abstract = jax.eval_shape(make)
    check_divides(abstract, mesh)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings(abstract, mesh))


def begun(params, optimizer: Optimizer, seed) -> TrainState:
    """Returns the state of a run before its first step."""
    rng = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.tx.init(params), rng)


def starting_from(program: Program, params, optimizer: Optimizer, seed: int) -> Program:
    """Returns the program of a run whose weights are `params` before its first step; they stay as they are."""
    placed = jax.tree.map(lambda a: a.sharding, program.abstract)

    def init():
        # copies: a step takes its state's memory for the next one
        return jax.jit(lambda params, seed: begun(jax.tree.map(jnp.copy, params), optimizer, seed),
                       out_shardings=placed)(params, jnp.uint32(seed))

    return dataclasses.replace(program, init=init)


def in_groups(train: TrainConfig, mesh: Mesh, params, init, placed: TrainState, step):
    """Returns (init, placement, step) of groups that train alone between outer steps, from those of one."""
    outer = outer_of(train, params)

    def init_groups(seed):
        one = init(seed)
        return dataclasses.replace(one, opt_state=local_sgd.begin(one.params, one.opt_state, outer, train.groups))

    groups = local_sgd.place(placed.params, placed.opt_state, outer, train.groups, mesh)
    return init_groups, dataclasses.replace(placed, opt_state=groups), partial(local_sgd.group_step, step, outer, mesh)


def outer_of(train: TrainConfig, params) -> local_sgd.Outer:
    """Returns how groups meet over parameters of these shapes."""
    meetings = Meetings(train.inner_steps, train.fragments, train.overlap + train.staleness * train.inner_steps, train.steps)
    diloco = train.sync == "diloco"
    return local_sgd.Outer(meetings, fragments_of(train, params)[0], train.outer_lr if diloco else 1.0,
                           train.outer_momentum if diloco else None, train.mixing)


def fragments_of(train: TrainConfig, params):
    """Returns the fragments that groups meet over one at a time, and the number of parameters in each."""
    variables = jax.tree.leaves(params, is_leaf=is_variable)
    shapes = [(var.shape, var.ndim > len(var.axes)) for var in variables]
    depth = max(shape[0] for shape, stacked in shapes if stacked)
    if train.fragments > depth:
        raise UserError(f"train.fragments={train.fragments}: should be at most the number of stacked layers, {depth}")
    return cut(train.fragments, shapes)


def check_groups(train: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError when groups that train alone are not the places of the `data` axis."""
    if train.sync == "every_step":
        return
    if train.groups != mesh.shape["data"]:
        raise UserError(f"train.groups={train.groups}: should be the degree of mesh.data (times mesh.dcn.data), which is "
                        f"{mesh.shape['data']}; inside a group, use mesh.fsdp and mesh.tensor")
    if mesh.shape["stage"] > 1:
        raise UserError(f"train.sync={train.sync} cannot be combined with mesh.stage={mesh.shape['stage']}")


def place(abstract: TrainState, mesh: Mesh, *, zero1: bool = False, split_embedding: bool = False) -> TrainState:
    """Returns the sharding of every leaf: a moment lives where its parameter lives, all else is everywhere.

    With `zero1` a moment is besides split over the `data` axis (Rajbhandari et al. 2020, ZeRO stage 1); with
    `split_embedding` the vocabulary's weights are over the stages too.
    """
    params, everywhere = shardings(abstract.params, mesh, split_embedding=split_embedding), replicated(mesh)
    leaf_path = jax.tree_util.tree_leaves_with_path
    by_path = {path: (leaf.shape, sharding) for (path, leaf), sharding in
               zip(leaf_path(abstract.params), jax.tree.leaves(params), strict=True)}

    def of_moment(path, leaf):  # its path ends in its parameter's; Adafactor's row and column means have other shapes
        for start in range(len(path)):
            shape, sharding = by_path.get(tuple(path[start:]), (None, None))
            if shape == leaf.shape:
                return split_over_data(sharding, shape) if zero1 else sharding
        return everywhere

    opt_state = jax.tree_util.tree_map_with_path(of_moment, abstract.opt_state)
    return TrainState(everywhere, params, opt_state, everywhere)


def split_over_data(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Returns a placement that splits the largest dimension which divides by it over `data` too; the same where none does."""
    mesh, n = sharding.mesh, sharding.mesh.shape["data"]
    entries = [(e,) if isinstance(e, str) else tuple(e or ()) for e in sharding.spec]
    entries += [()] * (len(shape) - len(entries))
    local = [size // math.prod(mesh.shape[a] for a in e) for size, e in zip(shape, entries, strict=True)]
    dividing = [i for i, size in enumerate(local) if size % n == 0]
    if dividing:
        largest = max(dividing, key=local.__getitem__)
        entries[largest] += ("data",)
    return NamedSharding(mesh, PartitionSpec(*entries))


def compute_dtype(precision: str, platform: str):
    """Returns the type that matmuls run in: on a CPU, bfloat16 is emulated and slower (docs/LOG.md)."""
    if precision == "auto":
        precision = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(precision)


def check_experts(model: ModelConfig, mesh: Mesh) -> None:
    experts, parts = model.moe.experts, mesh.shape["expert"]
    if parts > 1 and not experts:
        raise UserError(f"mesh.expert={parts} is an axis that a dense model can't use: set model.moe.experts, or mesh.expert=1")
    if experts % parts:
        raise UserError(f"model.moe.experts={experts} is not divisible by mesh.expert={parts}")
    if model.moe.capacity is not None and experts and mesh.shape["context"] > 1:
        raise UserError(f"model.moe.capacity={model.moe.capacity} with mesh.context={mesh.shape['context']}: an expert's "
                        "places are given out along whole rows; take capacity=null (dropless), or mesh.context=1")


def check_noise(train: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError where micro-batches' own gradients are not at hand."""
    if train.noise_scale and mesh.shape["stage"] > 1:
        raise UserError(f"train.noise_scale={train.noise_scale} with mesh.stage={mesh.shape['stage']}: a pipeline sums the "
                        "micro-batches' gradients as they come; take mesh.stage=1, or noise_scale=0")


def check_batch(train: TrainConfig, mesh: Mesh) -> None:
    parts = batch_parts(mesh)
    rows = train.batch_size // train.micro_batches
    if rows % parts:
        raise UserError(
            f"train.batch_size={train.batch_size} in train.micro_batches={train.micro_batches} parts is {rows} rows a part, "
            f"which {' x '.join(f'mesh.{a}={mesh.shape[a]}' for a in RULES['batch'])} does not divide; "
            f"nearest batch_size: {max(round(rows / parts), 1) * parts * train.micro_batches}"
        )
