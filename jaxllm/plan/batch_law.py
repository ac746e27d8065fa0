"""What a batch size costs and how the learning rate goes with it. All sizes in one unit, tokens or sequences."""


def steps_and_examples(batch: float, noise_scale: float) -> tuple[float, float]:
    """Returns (steps as a multiple of the fewest, examples as a multiple of the fewest) that reach the same loss.

    S / S_min = 1 + B_noise / B and E / E_min = 1 + B / B_noise, on the curve (S / S_min − 1)(E / E_min − 1) = 1 (McCandlish et
    al. 2018, section 2.3). At B = B_noise, the critical batch, both are 2.
    """
    return 1 + noise_scale / batch, 1 + batch / noise_scale


def batch_for_steps(times_fewest: float, noise_scale: float) -> float:
    """Returns the batch that needs so many times the fewest steps; raises ValueError at 1 or less, which no batch reaches."""
    if times_fewest <= 1:
        raise ValueError(f"{times_fewest:g} times the fewest steps: should be above 1")
    return noise_scale / (times_fewest - 1)


def rate_by_noise(lr: float, batch: float, other: float, noise_scale: float) -> float:
    """Returns the rate at batch `other` where `lr` is right at `batch`, by lr_max / (1 + B_noise / B).

    McCandlish et al. 2018, equation 2.7, for SGD: proportional to small batches, the same for all far above the noise scale.
    """
    return lr * (1 + noise_scale / batch) / (1 + noise_scale / other)


def adam_at(lr: float, b1: float, b2: float, eps: float, times: float) -> dict[str, float] | None:
    """Returns Adam's settings at a batch that is `times` as large, by the square-root rule (Malladi et al. 2022).

    lr · √κ, 1 − κ (1 − b) for both means, eps / √κ; None where a mean would have no past left, so that the rule cannot hold.
    """
    if times * (1 - min(b1, b2)) >= 1:
        return None
    return {"lr": lr * times**0.5, "b1": 1 - times * (1 - b1), "b2": 1 - times * (1 - b2), "eps": eps / times**0.5}
