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
        On a mesh that splits the sequence the positions stand as parallel/context.py orders them.
        """
        x_BTD, _, routed_L = self.trunk(token_BT, pos_BT, self._attend(doc_BT), None, key, _real(doc_BT), capacity)
        return x_BTD, routed_L

    def layers(self, x_BTD, pos_BT, doc_BT, key_L=None, capacity: float | None = None):
        """Returns what `hidden_and_routed` does, after the layers that are here: in a pipeline, those of one stage."""
        x_BTD, _, routed_L = self.trunk.blocks(x_BTD, pos_BT, self._attend(doc_BT), None, key_L, _real(doc_BT), capacity)
        return x_BTD, routed_L

    def _attend(self, doc_BT):
        def attend(q_BTNH, k_BTKH, v_BTKH, cache):
            body = self.trunk.form.split_attention or self.trunk.form.attention
            return body(q_BTNH, k_BTKH, v_BTKH, doc_BT, window=self.window), cache

        return attend


def _real(doc_BT):
    return None if doc_BT is None else doc_BT > 0


def cast(params: nnx.State, dtype) -> nnx.State:
    """Returns the parameters in the compute type; routers stay float32, as a rounded score is another expert."""

    def one(var):
        return var if {"router", "balance"} & set(var.axes) else var.replace(var[...].astype(dtype))

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
