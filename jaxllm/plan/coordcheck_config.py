"""Settings of `jaxllm plan coordcheck`: a training run's own, and how coarse the models are. No jax here."""

from dataclasses import dataclass, field

from jaxllm.train.config import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class CoordCheckVerb(PretrainConfig):
    widths: list[int] = field(default_factory=lambda: [64, 128, 256, 512, 1024])  # d_model of the models, the first is the base
    updates: int = 5  # optimizer steps of each model
    seeds: int = 3  # models of each width, whose numbers are averaged
    layers: int | None = 2  # of the models; null: model.n_layers
    head_width: int | None = 32  # width of a head at every width; null: that of model.d_model / model.n_heads
    vocabulary: int = 256  # words of the made-up text that they read
    rows: int = 4  # rows of a batch
    length: int = 64  # positions of a row
    limit: float = 0.1  # slopes of muP beyond it, either way, fail the check
    page: str | None = None  # file to write an HTML page with plots into
    picture: str | None = None  # file to draw the plots into, .svg, .png or .pdf

    def __post_init__(self):
        super().__post_init__()
        for name in ("updates", "seeds", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: should be at least 1")
        for name in ("vocabulary", "length"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}={getattr(self, name)}: should be at least 2")
        if len(self.widths) < 2 or sorted(set(self.widths)) != self.widths:
            raise ValueError(f"widths={self.widths}: should be two or more, each above the one before")
        if self.limit <= 0:
            raise ValueError(f"limit={self.limit:g}: should be above 0")
        if self.length > self.model.max_seq_len:
            raise ValueError(f"length={self.length} is longer than model.max_seq_len={self.model.max_seq_len}")
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"layers={self.layers}: should be at least 1, or null")
        head = self.head_width or self.model.head_dim
        if head < 1 or any(width % head for width in self.widths):
            raise ValueError(f"head_width={head}: does not divide every one of widths={self.widths}")
