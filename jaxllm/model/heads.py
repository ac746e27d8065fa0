"""What stands on the trunk. One trunk, several heads: here the language model's."""

import jax
from flax import nnx

from jaxllm.model.config import ModelConfig
from jaxllm.model.formulation import Formulation
from jaxllm.model.layers import std_of, weight
from jaxllm.model.transformer import Trunk


class LanguageModel(nnx.Module):
    """A trunk and the matrix from its hidden states to the vocabulary."""

    def __init__(self, cfg: ModelConfig, form: Formulation, *, rngs: nnx.Rngs):
        self.window = cfg.window
        self.trunk = Trunk(cfg, form, rngs=rngs)
        self.out_DV = None if cfg.tied else weight(rngs, {"embed": cfg.d_model, "vocab": cfg.vocab_size},
                                                   std=std_of(cfg, cfg.d_model))

    def head_DV(self) -> jax.Array:
        return self.trunk.embed_VD[...].T if self.out_DV is None else self.out_DV[...]

    def hidden(self, token_BT, pos_BT, doc_BT=None, key=None) -> jax.Array:
        """Returns x_BTD, documents kept apart; `key` turns dropout on. Logits are x_BTD @ head_DV(), never made here."""
        return self.hidden_and_routed(token_BT, pos_BT, doc_BT, key)[0]

    def hidden_and_routed(self, token_BT, pos_BT, doc_BT=None, key=None, capacity: float | None = None):
        """Returns (x_BTD, what the routers of the sparse layers did: Routed, stacked, or None without any).

        Document 0 is padding: it goes to no expert. With `capacity`, full experts drop tokens, as in training.
        """

        def attend(q_BTNH, k_BTKH, v_BTKH, cache):
            return self.trunk.form.attention(q_BTNH, k_BTKH, v_BTKH, doc_BT, window=self.window), cache

        real_BT = None if doc_BT is None else doc_BT > 0
        x_BTD, _, routed_L = self.trunk(token_BT, pos_BT, attend, key=key, real_BT=real_BT, capacity=capacity)
        return x_BTD, routed_L


def cast(params: nnx.State, dtype) -> nnx.State:
    """Returns the parameters in the compute type; routers stay float32, as a rounded score is another expert."""

    def one(var):
        return var if {"router", "balance"} & set(var.axes) else var.replace(var[...].astype(dtype))

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
