"""Settings of `jaxllm plan batch`. No jax here."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class BatchVerb:
    run: str = ""  # the run folder (the word after the verb); its train.noise_scale has to be above 0
    last: float = 0.25  # share of the logged noise scales, the latest, whose median counts: it grows while a model learns
    batches: list[int] = field(default_factory=list)  # tokens of the batches to tell of; none: powers of 4 around the run's

    def __post_init__(self):
        if not 0 < self.last <= 1:
            raise ValueError(f"last={self.last:g}: should be in (0, 1]")
        if any(tokens < 1 for tokens in self.batches):
            raise ValueError(f"batches={self.batches}: should be numbers of tokens, each at least 1")
