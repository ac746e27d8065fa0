"""Settings of a run on several hosts. No jax here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    # Where process 0 is reached, HOST:PORT; null: as the launcher's environment says (Slurm, torchrun, TPU pods, JAX_*)
    coordinator: str | None = None
    count: int | None = None  # processes that take part, one a host; null: as the environment says, else 1
    index: int | None = None  # which of them this one is, from 0; null: as the environment says
    port: int = 8476  # port of process 0 where only its host is known
    timeout: int = 300  # seconds to wait for the other processes to start

    def __post_init__(self):
        if self.count is not None and self.count < 1:
            raise ValueError(f"processes.count={self.count}: should be at least 1")
        if self.index is not None and not 0 <= self.index < (self.count or self.index + 1):
            raise ValueError(f"processes.index={self.index}: should be 0 or more, and below processes.count={self.count}")
        if (self.count or 1) > 1 and (self.index is None or self.coordinator is None):
            raise ValueError(f"processes.count={self.count} needs processes.index, and processes.coordinator=HOST:PORT of "
                             "process 0")
        if self.timeout < 1 or not 0 < self.port < 65536:
            raise ValueError(f"processes.timeout={self.timeout}, processes.port={self.port}: should be at least 1, and a port")
