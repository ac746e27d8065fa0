"""Settings of `jaxllm plan compile`: a training run's own, and what to compile them for. No jax here."""

from dataclasses import dataclass

from jaxllm.train.config import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class CompileVerb(PretrainConfig):
    topology: str = ""  # the chips: v5e-256, v5p-128, v4-8, v6e-16, as they are rented (v4 and v5p count two cores a chip)
    fit: bool = True  # when it does not fit, try which single change makes it fit
    search: bool = False  # try meshes, remat and micro-batches; print who is best in memory against time
    tries: int = 12  # at most so many compilations for `fit` or `search`
    results: str | None = None  # search: file to note each compilation in; the same command goes on from it
    picture: str | None = None  # search: file to draw memory against time into, .svg, .png or .pdf
    hlo: str | None = None  # write the compiled program's text to this file

    def __post_init__(self):
        super().__post_init__()
        if self.tries < 1:
            raise ValueError(f"tries={self.tries}: should be at least 1")
        for name in ("results", "picture"):
            if getattr(self, name) and not self.search:
                raise ValueError(f"{name}={getattr(self, name)} is of a search: give --search too, or leave it out")

    @property
    def slices(self) -> int:
        """How many such slices mesh.dcn joins."""
        return self.mesh.dcn.data * self.mesh.dcn.fsdp
