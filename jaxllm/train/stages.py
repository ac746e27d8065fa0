"""The language model cut into pipeline stages: embedding on the first, final norm, head and loss on the last."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxllm.errors import UserError
from jaxllm.model.config import ModelConfig
from jaxllm.model.heads import cast
from jaxllm.parallel.context import balance
from jaxllm.parallel.pipeline import Parts, pipeline_value_and_grad
from jaxllm.parallel.schedule import Schedule, make
from jaxllm.partition import constrain
from jaxllm.train.config import TrainConfig
from jaxllm.train.loss import next_token_loss
from jaxllm.train.step import Objective, micro_key, routers_loss, split


def schedule_of(model: ModelConfig, train: TrainConfig, mesh: Mesh) -> Schedule | None:
    """Returns the table of a run, None without a pipeline; raises UserError when layers or micro-batches do not fit."""
    stages = mesh.shape["stage"]
    if stages == 1:
        if train.split_embedding:
            raise UserError("train.split_embedding=true needs mesh.stage of 2 or more, found 1")
        return None
    if mesh.shape["fsdp"] > 1 and mesh.shape["tensor"] > 1 and jax.__version_info__ < (0, 10):
        raise UserError(f"mesh.stage={stages} with both mesh.fsdp={mesh.shape['fsdp']} and mesh.tensor={mesh.shape['tensor']} "
                        f"needs jax 0.10 or newer, found {jax.__version__}; with one of the two it runs")
    if mesh.shape["context"] > 1 and train.context_attention == "ring":  # its permutations would wait for other branches
        raise UserError(f"train.context_attention=ring cannot run with mesh.stage={stages}: take gather")
    v = train.virtual_stages
    try:
        schedule = make(train.pipeline, stages, train.micro_batches, v)
    except UserError as e:
        raise UserError(f"mesh.stage={stages}, train.pipeline={train.pipeline}: {e}") from None
    unit = model.layers_a_unit
    if model.n_layers % (stages * v * unit):
        parts = f"mesh.stage={stages}" + (f" x train.virtual_stages={v}" if v > 1 else "")
        parts += f" x model.moe.every={unit}" if unit > 1 else ""
        nearest = max(round(model.n_layers / (stages * v * unit)), 1) * stages * v * unit
        raise UserError(f"model.n_layers={model.n_layers}: {parts} does not divide it; nearest: {nearest}")
    return schedule


def pipelined(objective: Objective, schedule: Schedule, mesh: Mesh, params: nnx.State):
    """Returns f(params, batch, key) -> ((summed loss, number of targets), gradients), as step.accumulated's.

    `params`: the parameters' shapes, of which it takes the structure.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    is_block = ["blocks_L" in jax.tree_util.keystr(path) for path, _ in paths]

    def apart(params):  # two lists of arrays: what all stages share, and what is stacked by layers
        leaves = jax.tree.leaves(params)
        return [[a for a, own in zip(leaves, is_block, strict=True) if own is wanted] for wanted in (False, True)]

    def together(shared, blocks):
        shared, blocks = iter(shared), iter(blocks)
        return jax.tree.unflatten(structure, [next(blocks if own else shared) for own in is_block])

    def model(shared=None, blocks=None):  # a part uses only what it is given
        none = [None] * len(paths)
        return nnx.merge(objective.graph, together(shared or none, blocks or none))

    def loss(shared, x_BTD, inputs):
        head = model(shared)
        return next_token_loss(head.trunk.norm(x_BTD), head.head_DV(), inputs["target_BT"], inputs["weight_BT"],
                               chunk=objective.chunk, z_loss=objective.z_loss, label_smoothing=objective.label_smoothing,
                               phases=head.trunk.form.phases)[0]

    def body(blocks, x_BTD, inputs, key_L):
        x_BTD, routed_L = model(blocks=blocks).layers(x_BTD, inputs["pos_BT"], inputs["doc_BT"], key_L, objective.capacity)
        n = jnp.sum(inputs["weight_BT"], dtype=jnp.float32)
        return x_BTD, n * routers_loss(objective.moe, routed_L), routed_L

    parts = Parts(embed=lambda shared, inputs: model(shared).trunk.embed(inputs["token_BT"]), body=body, loss=loss)
    value_and_grad = pipeline_value_and_grad(parts, schedule, mesh)
    m = schedule.micro_batches

    def loss_and_grads(params, batch, key):
        batch = balance(batch, mesh.shape["context"])
        # Placed as on any mesh before the stages take them, however they lie between steps (train.split_embedding): otherwise
        # the compiler would put permutations into the stages' branches.
        params = jax.tree.map(lambda var: var if var.ndim > len(var.axes) else var.replace(constrain(var[...], *var.axes)),
                              cast(params, objective.dtype), is_leaf=lambda x: isinstance(x, nnx.Variable))
        shared, blocks = apart(params)
        key_mL = None
        if key is not None:
            n_units = blocks[0].shape[0]
            key_mL = jnp.stack([jax.random.split(micro_key(key, i, m), n_units) for i in range(m)])
        total, d_shared, d_blocks, routed_L = value_and_grad(shared, blocks, {k: split(m, x) for k, x in batch.items()}, key_mL)
        return (total, (jnp.sum(batch["weight_BT"], dtype=jnp.float32), routed_L)), together(d_shared, d_blocks)

    return loss_and_grads
