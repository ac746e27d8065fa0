"""Settings of the verbs that read what is there and tell it. No jax here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReportVerb:
    runs: tuple[str, ...] = ()  # run folders (the words after the verb); several are drawn on one axis
    output: str | None = None  # where the page goes; null: report.html in the first run's folder


@dataclass(frozen=True, kw_only=True)
class DoctorVerb:
    self_test: bool = True  # also train, save, restore and sample a tiny model (about ten seconds)
