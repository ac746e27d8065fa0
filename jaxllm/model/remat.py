"""Which tensors of a layer are kept for the backward pass, by name. No jax here: settings are checked before it is imported."""

TENSORS = ("qkv", "attention", "gate", "up")  # as checkpoint_name calls them in layers.py, and the TPU's kernel in attention.py
SETS = {"mlp": ("gate", "up"), "qkv_attention": ("qkv", "attention")}


def named(remat: str) -> tuple[str, ...] | None:
    """Returns the tensors that a policy keeps besides a layer's input; None where it goes by no names (none, dots).

    full: no tensor. Else tensors and sets of them, joined by "+": "qkv+gate". Raises ValueError on a name that is neither.
    """
    if remat in ("none", "dots"):
        return None
    parts = [] if remat == "full" else remat.split("+")
    if wrong := [part for part in parts if part not in TENSORS and part not in SETS]:
        raise ValueError(f"{wrong[0]!r} is no tensor of a layer; should be none, dots, full, or some of {', '.join(TENSORS)}, "
                         "mlp (gate+up) and qkv_attention, joined by +")
    return tuple(dict.fromkeys(tensor for part in parts for tensor in SETS.get(part, (part,))))
