"""Chips: peak rates, memory and links, from the dated figures in chips.yaml. No jax here."""

import dataclasses
import datetime
import difflib
import functools
import pathlib

import yaml

from jaxllm.errors import UserError

FIGURES = ("bf16_tflops", "fp16_tflops", "tf32_tflops", "fp32_tflops", "fp8_tflops", "int8_tflops",
           "memory_gib", "memory_gb_per_s", "link_gb_per_s", "links")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One published number of a chip, where it was read and when."""

    value: float
    source: str
    date: datetime.date


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator. Figures are of a chip as it is sold; the properties are of one device as jax counts them."""

    name: str
    vendor: str
    kinds: tuple[str, ...]  # what jax calls it
    devices: int  # jax devices a chip shows as
    figures: dict[str, Figure]
    xla: dict[str, str]  # compiler options that make training faster or smaller on it; chips.yaml says why

    def peak_flops(self, dtype: str) -> float | None:
        """Returns a device's dense peak for matmuls of this type at jax's default matmul precision; None: not known.

        At that precision a TPU multiplies float32 in bfloat16, an NVIDIA chip that has TF32 in TF32.
        """
        as_float32 = "tf32_tflops" if "tf32_tflops" in self.figures else "fp32_tflops"
        as_float32 = "bf16_tflops" if self.vendor == "google" else as_float32
        name = {"bfloat16": "bf16_tflops", "float16": "fp16_tflops", "int8": "int8_tflops", "float32": as_float32}[dtype]
        return self._of_device(name, 1e12)

    @property
    def bf16_flops(self) -> float | None:
        return self.peak_flops("bfloat16")

    @property
    def memory_bytes(self) -> float | None:
        return self._of_device("memory_gib", 2**30)

    @property
    def memory_bytes_per_s(self) -> float | None:
        return self._of_device("memory_gb_per_s", 1e9)

    @property
    def link_bytes_per_s(self) -> float | None:
        """Bytes a second over one of the chip's links in one direction."""
        figure = self.figures.get("link_gb_per_s")
        return figure and figure.value * 1e9

    @property
    def links(self) -> int | None:
        figure = self.figures.get("links")
        return figure and int(figure.value)

    def _of_device(self, name: str, unit: float) -> float | None:
        figure = self.figures.get(name)
        return figure and figure.value * unit / self.devices


@functools.cache
def chips() -> dict[str, Chip]:
    """Returns every chip that chips.yaml knows, by name."""
    read = yaml.safe_load(pathlib.Path(__file__).with_name("chips.yaml").read_text(encoding="utf-8"))

    def figure(value, source):
        return Figure(value, read["sources"][source]["url"], read["sources"][source]["date"])

    return {name: Chip(name, entry["vendor"], tuple(entry["kinds"]), entry["devices"],
                       {f: figure(*entry[f]) for f in FIGURES if f in entry},
                       {k: str(v) for k, v in entry.get("xla", {}).items()})
            for name, entry in read["chips"].items()}


def chip(device_kind: str) -> Chip | None:
    """Returns the chip that jax calls `device_kind`; None when it is not known, for a guess would make a wrong MFU."""
    return next((c for c in chips().values() if device_kind in c.kinds), None)


def find(name: str) -> Chip:
    """Returns the chip of this name, in any case; raises UserError that gives the names it may have meant."""
    by_name = {n.lower(): c for n, c in chips().items()} | {k.lower(): c for c in chips().values() for k in c.kinds}
    wanted = name.lower().strip()
    if found := by_name.get(wanted):
        return found
    near = [n for n in chips() if wanted and wanted in n.lower()]
    near = near or [by_name[n].name for n in difflib.get_close_matches(wanted, by_name, 1, cutoff=0.5)]
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(chips())}"
    raise UserError(f"unknown chip {name!r}; {hint}")
