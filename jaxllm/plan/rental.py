"""What chips cost, draw and reach, from the dated figures in prices.yaml and rental.yaml. No jax here."""

import functools
import pathlib
from typing import NamedTuple

import yaml

from jaxllm.hardware import Figure
from jaxllm.plan.prices import ChipPrice, read_prices


class Reported(NamedTuple):
    """A model FLOP utilisation that others wrote about."""

    model: str
    chips: str
    mfu: float
    source: str


@functools.cache
def _read() -> dict:
    return yaml.safe_load(pathlib.Path(__file__).with_name("rental.yaml").read_text(encoding="utf-8"))


def _figure(value, source: str) -> Figure:
    known = _read()["sources"][source]
    return Figure(value, known["url"], known["date"])


def usd_per_hour(chip: str) -> Figure | None:
    """Returns what one chip of this name (as in chips.yaml) costs an hour; None: no figure is held."""
    priced = _prices().get(chip)
    if priced is not None and priced.usd_per_hour is not None:
        return Figure(priced.usd_per_hour.value, priced.usd_per_hour.source, priced.usd_per_hour.date)
    return _of(chip, "usd_per_hour")


@functools.cache
def _prices() -> dict[str, ChipPrice]:
    return read_prices().chips


def watts(chip: str) -> Figure | None:
    """Returns the design power of one chip without its host; None: not published, or not held."""
    return _of(chip, "watts")


def _of(chip: str, name: str) -> Figure | None:
    entry = _read()["chips"].get(chip, {})
    return _figure(*entry[name]) if name in entry else None


def reported_mfu() -> list[Reported]:
    return [Reported(model, chips, mfu, _figure(mfu, source).source) for model, chips, mfu, source in _read()["mfu"]]


def chip_hours_between_failures() -> Figure:
    return _figure(*_read()["chip_hours_between_failures"])
