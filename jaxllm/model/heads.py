"""What stands on the trunk. One trunk, several heads: the language model's, and that of reward models and critics."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.model.config import ModelConfig
from jaxllm.model.formulation import Formulation
from jaxllm.model.layers import std_of_few, std_of_words, weight
from jaxllm.model.transformer import Trunk


class LanguageModel(nnx.Module):
    """A trunk and the matrix from its hidden states to the vocabulary."""

    def __init__(self, cfg: ModelConfig, form: Formulation, *, rngs: nnx.Rngs):
        self.window, self.readout = cfg.window, 1 / cfg.times_width
        self.trunk = Trunk(cfg, form, rngs=rngs)
        self.out_DV = None if cfg.tied else weight(rngs, {"embed": cfg.d_model, "vocab": cfg.vocab_size},
                                                   std=std_of_words(cfg))

    def head_DV(self) -> jax.Array:
        """Returns what hidden states are multiplied with: every logit there is comes from here, muP's 1 / times_width in it."""
        head_DV = self.trunk.embed_VD[...].T if self.out_DV is None else self.out_DV[...]
        return head_DV if self.readout == 1 else self.readout * head_DV

    def hidden(self, token_BT, pos_BT, doc_BT=None, key=None) -> jax.Array:
        """Returns x_BTD, documents kept apart; `key` turns dropout on. Logits are x_BTD @ head_DV(), never made here."""
        return self.hidden_and_routed(token_BT, pos_BT, doc_BT, key)[0]

    def hidden_and_routed(self, token_BT, pos_BT, doc_BT=None, key=None, capacity: float | None = None):
        """Returns (x_BTD, what the routers of the sparse layers did: Routed, stacked, or None without any).

        Document 0 is padding: it goes to no expert. With `capacity`, full experts drop tokens, as in training.
        On a mesh that splits the sequence the positions stand as parallel/context.py orders them.
        """
        x_BTD, _, routed_L = self.trunk(token_BT, pos_BT, self.trunk.within(doc_BT), None, key, _real(doc_BT), capacity)
        return x_BTD, routed_L

    def layers(self, x_BTD, pos_BT, doc_BT, key_L=None, capacity: float | None = None):
        """Returns what `hidden_and_routed` does, after the layers that are here: in a pipeline, those of one stage."""
        x_BTD, _, routed_L = self.trunk.blocks(x_BTD, pos_BT, self.trunk.within(doc_BT), None, key_L, _real(doc_BT), capacity)
        return x_BTD, routed_L


class ScoreModel(nnx.Module):
    """A trunk and a linear head of `n_scores` numbers at each position: a reward model (one for each objective), or a critic.

    B batch, T position, D width, O scores.
    """

    def __init__(self, cfg: ModelConfig, form: Formulation, n_scores: int = 1, *, rngs: nnx.Rngs):
        self.trunk = Trunk(cfg, form, rngs=rngs)
        # Ziegler et al. 2019 and Stiennon et al. 2020: standard deviation 1 / sqrt(D + 1)
        self.score_DO = weight(rngs, {"embed": cfg.d_model, "scores": n_scores},
                              std=std_of_few(cfg, (cfg.d_model + 1) ** -0.5))
        self.bias_O = nnx.Param(jnp.zeros(n_scores, jnp.float32), axes=("norm",))

    def scores(self, token_BT, pos_BT, doc_BT) -> jax.Array:
        """Returns float32 [B, T, O]: the scores of each row up to and with position t."""
        return self.scores_and_routed(token_BT, pos_BT, doc_BT)[0]

    def scores_and_routed(self, token_BT, pos_BT, doc_BT):
        """Returns (the scores, what the routers of the sparse layers did: Routed, stacked, or None without any)."""
        x_BTD, _, routed_L = self.trunk(token_BT, pos_BT, self.trunk.within(doc_BT), None, None, _real(doc_BT))
        y_BTO = jnp.einsum("BTD,DO->BTO", x_BTD, self.score_DO[...].astype(x_BTD.dtype), preferred_element_type=jnp.float32)
        return y_BTO + self.bias_O[...].astype(jnp.float32)[None, None], routed_L


def _real(doc_BT):
    return None if doc_BT is None else doc_BT > 0


def cast(params: nnx.State, dtype) -> nnx.State:
    """Returns the parameters in the compute type; routers stay float32, as a rounded score is another expert."""

    def one(var):
        return var if {"router", "balance"} & set(var.axes) else var.replace(var[...].astype(dtype))

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
