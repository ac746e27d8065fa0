"""Is the model too small or too large for its data, and which move helps: what each law says."""

from jaxllm.plan import laws, repeat
from jaxllm.plan.size_config import SizeVerb

NEAR = 1.25  # a size within this factor of the best one is called right: the loss is flat there


def judge(cfg: SizeVerb, law: laws.Law, parameters: float, tokens: float) -> dict:
    """Returns how far the size is from the best one for the same compute and data, by every law, and what each move brings."""
    flops = laws.FLOPS_A_TOKEN * parameters * tokens
    best = {key: best_size(one, flops, cfg.tokens) for key, one in laws.LAWS.items()}
    ratio = {key: parameters / n for key, n in best.items() if n is not None}
    own = parameters / (best_size(law, flops, cfg.tokens) or best_size(laws.parametric(law), flops, cfg.tokens))
    lower, upper = min(ratio.values()), max(ratio.values())
    word = "too large" if own > NEAR else "too small" if own < 1 / NEAR else "right"
    # Laws that call the model small while another calls it large: the verdict hangs on the law.
    return {"size": word, "times_the_best": own, "least": lower, "most": upper,
            "laws_agree": word == "right" or (lower > 1) == (upper > 1), "ratios": ratio,
            "moves": moves(cfg, law, parameters, tokens)}


def best_size(law: laws.Law, flops: float, unique: float | None) -> float | None:
    """Returns the best size for `flops`; None where tokens would repeat and the law tells no losses to weigh that by."""
    n, d = law.optimal(flops)
    if unique is None or d <= unique:
        return float(n)
    return repeat.optimal(flops, unique, law)[0] if isinstance(law, laws.Parametric) else None


def moves(cfg: SizeVerb, law: laws.Law, parameters: float, tokens: float) -> list[dict]:
    """Returns the loss after each move, and what it costs in compute: those at equal compute first, then by their gain."""
    one = laws.parametric(law)
    unique = cfg.tokens

    flops, now = laws.FLOPS_A_TOKEN * parameters * tokens, float(repeat.loss_of(one, parameters, tokens, unique))
    best_n, best_d = repeat.optimal(flops, unique, one) if unique is not None else map(float, one.optimal(flops))
    rows = [("the best split of the same compute", best_n, best_d, unique),
            ("twice the tokens, the same size", parameters, 2 * tokens, unique),
            ("twice the size, the same tokens", 2 * parameters, tokens, unique),
            ("half the tokens, the same size", parameters, tokens / 2, unique)]
    if unique is not None and tokens > unique:
        rows.append(("twice the different tokens, the same compute", parameters, tokens, 2 * unique))
    found = [{"move": name, "parameters": float(n), "tokens": float(d), "loss": after, "gain": now - after,
              "compute": laws.FLOPS_A_TOKEN * n * d / flops} for name, n, d, u in rows
             for after in [float(repeat.loss_of(one, n, d, u))]]
    return sorted(found, key=lambda m: (abs(m["compute"] - 1) > 1e-3, -m["gain"]))
