"""What a rollout's sampler is checked by: log-probabilities from the full forward of training, and a digest of weights.

B sample, P prompt slot, R response slot, S = P + R, D width, V vocabulary.
"""

import hashlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxllm.generate.rollout_arrays import Rollout
from jaxllm.model.heads import cast
from jaxllm.partition import constrain, leaf_name, replicated
from jaxllm.train.checkpoint import checksums
from jaxllm.train.loss import token_logps

CHUNK = 128  # positions of each row that have logits at once


def digest(params: nnx.State, dtype) -> str:
    """Returns a SHA-256 over the name, shape and checksum of every parameter in the compute type, the same on every mesh."""
    params = jax.jit(cast, static_argnums=1)(params, dtype)
    named = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    sums = jax.device_get(checksums(list(named.values())))
    lines = [f"{name} {leaf.shape} {leaf.dtype} {int(total)}" for (name, leaf), total in zip(named.items(), sums, strict=True)]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def logps(graph: nnx.GraphDef, params: nnx.State, rollout: Rollout, temperature: float, n_tokens: int, mesh: Mesh):
    """Returns logp_BR, log softmax(logits / temperature) of the responses over the first `n_tokens` ids; 0 beyond their ends.

    Temperature 0 counts as 1, as for the sampler.
    """
    arrays = jax.device_put((rollout.token_BS, rollout.first_B, rollout.length_B), replicated(mesh))
    logp_BR = _logps(graph, rollout.prompt_slots, n_tokens, params, jnp.float32(temperature or 1.0), *arrays)
    return np.asarray(jax.device_put(logp_BR, replicated(mesh))) * rollout.action_BR


@partial(jax.jit, static_argnums=(0, 1, 2))
def _logps(graph, P: int, n_tokens: int, params, temperature, token_BS, first_B, length_B):
    model = nnx.merge(graph, params)
    slot_1S = jnp.arange(token_BS.shape[1] - 1, dtype=jnp.int32)[None]
    token_BS = constrain(token_BS, "batch", None)
    pos_BS = jnp.maximum(slot_1S - first_B[:, None], 0)
    doc_BS = ((slot_1S >= first_B[:, None]) & (slot_1S < P + length_B[:, None])).astype(jnp.int32)
    x_BSD = model.hidden(token_BS[:, :-1], pos_BS, doc_BS)
    head_DV = model.head_DV()[:, :n_tokens] / temperature.astype(x_BSD.dtype)
    return token_logps(x_BSD[:, P - 1 :], head_DV, token_BS[:, P:], chunk=CHUNK)
