"""The space of a search: settings, where each may lie, and the way between a setting's values and the unit cube.

D settings of the space, F features of a trial.
"""

import dataclasses
import difflib
import functools
import math
import re

import numpy as np

from jaxllm.errors import UserError

KINDS = ("log", "uniform", "one_minus_log", "int", "log_int", "choice")
DIGITS = 4  # of a chosen number: more could not be told apart by a run, and a reader can type these


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One setting: a range in one of the scales, or a choice; `when` holds the (setting, value) that it depends on."""

    key: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    options: tuple = ()
    when: tuple[tuple[str, object], ...] = ()

    @property
    def is_log(self) -> bool:
        return self.kind in ("log", "log_int", "one_minus_log")

    def value(self, u: float):
        """Returns the setting's value at `u` in [0, 1]; whole numbers and options have equal shares of it."""
        if self.kind == "choice":
            return self.options[min(int(u * len(self.options)), len(self.options) - 1)]
        if self.kind in ("int", "log_int"):  # half a unit of room on both sides, so that the ends have as much as the others
            low, high = self._scaled(self.low - 0.5), self._scaled(self.high + 0.5)
            return int(min(max(round(self._unscaled(low + u * (high - low))), self.low), self.high))
        low, high = self.ends
        x = self._unscaled(low + u * (high - low))
        x = 1 - rounded(1 - x) if self.kind == "one_minus_log" else rounded(x)
        return float(min(max(round(x, 15), self.low), self.high))

    def place(self, value) -> float:
        """Returns where a value lies: 0 at the low end, 1 at the high one, outside below 0 or above 1; for options, even."""
        if self.kind == "choice":
            return (self.options.index(value) + 0.5) / len(self.options)
        low, high = self.ends
        try:
            return (self._scaled(value) - low) / (high - low)
        except ValueError:  # the log of 0
            return -math.inf

    def holds(self, value) -> bool:
        if self.kind == "choice":
            return value in self.options
        return isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high

    def probes(self) -> list:
        """Returns the values at the ends, or every option: what a check of the space tries."""
        return list(self.options) if self.kind == "choice" else [self.value(0.0), self.value(1.0)]

    def features(self, value) -> list[float]:
        """Returns what the Gaussian process sees of a value: its place, or of names one number an option."""
        if self.kind == "choice" and not all(isinstance(o, (int, float)) for o in self.options):
            return [0.5 * (option == value) for option in self.options]
        return [min(max(self.place(value), 0.0), 1.0)]

    def describe(self) -> str:
        told = f"[{', '.join(map(str, self.options))}]" if self.kind == "choice" else f"[{self.low:g}, {self.high:g}]"
        when = f" when {', '.join(f'{k}={v}' for k, v in self.when)}" if self.when else ""
        return f"{self.kind} {told}{when}"

    @functools.cached_property
    def ends(self) -> tuple[float, float]:
        """Both ends of the range in its own scale."""
        return self._scaled(self.low), self._scaled(self.high)

    def _scaled(self, x: float) -> float:
        if self.kind == "one_minus_log":
            return -math.log(1 - x)
        return math.log(x) if self.is_log else float(x)

    def _unscaled(self, x: float) -> float:
        if self.kind == "one_minus_log":
            return 1 - math.exp(-x)
        return math.exp(x) if self.is_log else x


@dataclasses.dataclass(frozen=True)
class Space:
    """The settings of a study, those that others depend on first."""

    dimensions: tuple[Dimension, ...]

    def decode(self, u_D) -> dict:
        """Returns the settings at a point of the unit cube; without those whose condition does not hold."""
        params: dict = {}
        for dim, u in zip(self.dimensions, u_D, strict=True):
            if self.counts(dim, params):
                params[dim.key] = dim.value(float(u))
        return params

    def counts(self, dim: Dimension, params: dict) -> bool:
        return all(params.get(key) == value for key, value in dim.when)

    def encode(self, params: dict) -> np.ndarray:
        """Returns the point u_D of the unit cube that settings lie at; a setting that does not count is in the middle."""
        return np.array([min(max(d.place(params[d.key]), 0.0), 1.0) if d.key in params else 0.5 for d in self.dimensions])

    def features(self, params: dict) -> np.ndarray:
        """Returns the features [F] of a trial's settings; those of a setting that does not count are the middle."""
        out = []
        for dim in self.dimensions:
            out += dim.features(params[dim.key]) if dim.key in params else [0.5] * len(dim.features(dim.value(0.5)))
        return np.array(out)

    def holds(self, params: dict) -> bool:
        """Returns whether settings are a point of this space: every setting that counts is given, and in its range."""
        wanted = [dim for dim in self.dimensions if self.counts(dim, params)]
        return all(dim.key in params and dim.holds(params[dim.key]) for dim in wanted) and len(params) == len(wanted)


def rounded(x: float) -> float:
    return float(f"{x:.{DIGITS}g}")


def read_space(tree: dict) -> Space:
    """Returns the space that the config's `space` describes; raises UserError that names the setting and what is wrong."""
    raw = flat(tree)
    if not raw:
        raise UserError("space: is empty: give at least one setting, e.g. `optim.lr: {log: [1e-4, 1e-1]}`")
    dims = {key: dimension(key, one, raw) for key, one in raw.items()}
    ordered: list[Dimension] = []
    while len(ordered) < len(dims):
        known = {d.key for d in ordered}
        ready = [d for d in dims.values() if d.key not in known and all(key in known for key, _ in d.when)]
        if not ready:
            circle = sorted(dims.keys() - known)
            raise UserError(f"space.{circle[0]}.when: depends on itself, by way of {', '.join(circle)}")
        ordered.append(ready[0])
    return Space(tuple(ordered))


def flat(tree: dict, prefix: str = "") -> dict:
    """Returns {dotted setting: its description}: `optim: {lr: {…}}` and `optim.lr: {…}` mean the same."""
    out: dict = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        group = isinstance(value, dict) and value and not set(value) & {*KINDS, "when"}
        if group and all(isinstance(v, dict) for v in value.values()):
            found = flat(value, f"{name}.")
        else:
            found = {name: value}
        for k, v in found.items():  # from the command line, over the file's
            out[k] = {**out[k], **v} if isinstance(out.get(k), dict) and isinstance(v, dict) else v
    return out


def dimension(key: str, one, raw: dict) -> Dimension:
    """Returns one setting of the space, checked."""
    where = f"space.{key}"
    if not isinstance(one, dict):
        raise UserError(f"{where}={one!r}: should be {{KIND: …}}, of {', '.join(KINDS)}; what does not vary goes under fixed")
    if odd := [name for name in one if name not in (*KINDS, "when")]:
        near = difflib.get_close_matches(str(odd[0]), (*KINDS, "when"), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"kinds: {', '.join(KINDS)}"
        raise UserError(f"{where}: unknown kind {odd[0]!r}; {hint}")
    kinds = [name for name in one if name in KINDS]
    if len(kinds) != 1:
        raise UserError(f"{where}: should have one of {', '.join(KINDS)}, found {', '.join(kinds) or 'none'}")
    kind, given, when = kinds[0], plain(one[kinds[0]]), condition(where, key, one.get("when"), raw)
    if not isinstance(given, (list, tuple)):
        raise UserError(f"{where}.{kind}={given!r}: should be a list: {'options' if kind == 'choice' else '[low, high]'}")
    if kind == "choice":
        if len(given) < 2 or len({repr(x) for x in given}) < len(given):
            raise UserError(f"{where}.choice={list(given)}: should be two options or more, no two alike")
        return Dimension(key, kind, options=tuple(given), when=when)
    numbers = [x for x in given if isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)]
    if len(given) != 2 or len(numbers) != 2:
        raise UserError(f"{where}.{kind}={list(given)}: should be two numbers, [low, high]")
    low, high = given
    if not low < high:
        raise UserError(f"{where}.{kind}={list(given)}: is an empty range: the first should be below the second")
    if kind in ("int", "log_int") and (low != int(low) or high != int(high)):
        raise UserError(f"{where}.{kind}={list(given)}: should be two whole numbers")
    if kind in ("log", "log_int") and low <= 0:
        raise UserError(f"{where}.{kind}={list(given)}: a log range should begin above 0"
                        + ("; 0 may be an option of a choice, or the low end of uniform" if low == 0 else ""))
    if kind == "one_minus_log" and not (low >= 0 and high < 1):
        raise UserError(f"{where}.{kind}={list(given)}: should lie in [0, 1), as it is the log of 1 - value that is even")
    return Dimension(key, kind, low=low, high=high, when=when)


def condition(where: str, key: str, given, raw: dict) -> tuple[tuple[str, object], ...]:
    """Returns the pairs of a `when`, checked against the settings of the space."""
    if given is None:
        return ()
    if not isinstance(given, dict) or not given:
        raise UserError(f"{where}.when={given!r}: should be {{setting: value}}")
    pairs = []
    for other, value in flat_values(given).items():
        others = [name for name in raw if name != key]
        if other not in others:
            near = difflib.get_close_matches(other, others, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"settings of the space: {', '.join(others) or 'no other'}"
            raise UserError(f"{where}.when: {other!r} is not a setting of the space; {hint}")
        options = plain(raw[other].get("choice")) if isinstance(raw[other], dict) else None
        if not isinstance(options, (list, tuple)):
            raise UserError(f"{where}.when: {other} should be a choice, so that it can be equal to {value!r}")
        if value not in options:
            raise UserError(f"{where}.when: {other}={value!r} is never so: its options are {', '.join(map(str, options))}")
        pairs.append((other, value))
    return tuple(pairs)


def flat_values(tree: dict, prefix: str = "") -> dict:
    """Returns {dotted setting: value} of `fixed`, a point or a `when`, nested or dotted."""
    out: dict = {}
    for key, value in tree.items():
        out |= flat_values(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": plain(value)}
    return out


def plain(value):
    """Returns a value with 1e-3 as a number, which YAML reads as text."""
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value) else value
