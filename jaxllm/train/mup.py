"""What muP does in the optimizer: a learning rate, a weight decay and an epsilon of its own for each kind of weight.

The rules are those of Yang et al. 2022 (Tensor Programs V, table 8) for update rules whose steps do not depend on the
gradient's size, and of Dey et al. 2025 (CompleteP, table 1). m is the width in units of the base's:

- matrices from width to width, and from the width to a few numbers (routers, scores, LoRA's A): rate / m;
- the embedding, the head (whose 1 / m is in `LanguageModel.head_DV`), gains, biases, LoRA's B: the rate as it is;
- weight decay times rate is the same for every matrix at every width (Wang and Aitchison 2024): decay grows by what the rate
  falls by;
- gradients fall with width and depth: Adam's epsilon falls with them.
"""

import jax
import optax
from flax import nnx

from jaxllm.errors import UserError
from jaxllm.model.config import ModelConfig

FOLLOWS = ("adamw", "lion", "muon")  # update rules whose step has the same size whatever the gradient's is


def check_rule(name: str, model: ModelConfig) -> None:
    """Raises UserError for an update rule whose learning rate would not carry over to another width."""
    if model.mup.base_width is not None and name not in FOLLOWS:
        raise UserError(f"optim.name={name} with model.mup.base_width={model.mup.base_width}: muP's rules here are for "
                        f"{', '.join(FOLLOWS)}; take one of them, or base_width=null")


def rate_of(var: nnx.Variable, model: ModelConfig, *, muon: bool = False) -> float:
    """Returns what a weight's learning rate is multiplied with; `muon`: Muon trains the matrices of blocks.

    Muon's update has the spectral norm 0.2 sqrt(width), a matrix's may have that of its own, which is the same at every width
    (Yang, Simon and Bernstein 2023), or, from the width to a few numbers, one that falls with its root.
    """
    few = {"router", "scores"} & set(var.axes) or var.axes[-1] == "rank"
    if {"vocab", "norm", "balance"} & set(var.axes) or var.axes[0] == "rank":
        return 1.0
    return model.times_width ** (-0.5 if muon and not few else -1.0)


def scaled_rates(model: ModelConfig, *, muon: bool = False) -> optax.GradientTransformation:
    """Returns the transformation that multiplies each weight's step with `rate_of`; decay comes after it, so that it stays
    what it was."""
    return _by_leaf(lambda var: rate_of(var, model, muon=muon))


def scaled_epsilon(model: ModelConfig) -> optax.GradientTransformation:
    """Returns the transformation of gradients that makes Adam's epsilon, as a share of them, what it is at the base.

    eps / c on a gradient is eps on c times the gradient, as Adam's step is of no size. c is times_width, in layers
    (which are stacked) times_width · times_depth.
    """
    return _by_leaf(lambda var: model.times_width * (model.times_depth if var.ndim > len(var.axes) else 1.0))


def _by_leaf(factor) -> optax.GradientTransformation:
    def update(updates, params):
        del params

        def one(var):
            return var.replace(var[...] * factor(var))

        return jax.tree.map(one, updates, is_leaf=lambda x: isinstance(x, nnx.Variable))

    return optax.stateless(update)
