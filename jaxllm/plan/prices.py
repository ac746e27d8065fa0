"""Prices and models for `jaxllm plan advise`: prices.yaml with a user's own file laid over it. No jax here."""

import contextlib
import dataclasses
import datetime
import pathlib

import yaml

from jaxllm.config import Loader
from jaxllm.errors import UserError, nearest
from jaxllm.hardware import chips

OWN = pathlib.Path(__file__).with_name("prices.yaml")
APPROACHES = ("api", "prompted", "lora", "full", "continued", "scratch")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number, where it was read and when; `assumed` where nobody published it."""

    value: float
    source: str
    date: datetime.date
    assumed: bool


@dataclasses.dataclass(frozen=True)
class Api:
    """A commercial model behind an API; prices in USD for a million tokens."""

    input: Figure
    output: Figure
    context: Figure
    scores: dict[str, Figure]
    regions: dict[str, Figure]  # their value is 1: only the source counts
    cached: Figure | None = None
    regional_surcharge: Figure | None = None
    first_token_s: Figure | None = None
    tokens_per_s: Figure | None = None


@dataclasses.dataclass(frozen=True)
class Trained:
    """What an amount of training has reached."""

    parameters: Figure
    scores: dict[str, Figure]
    active: Figure | None = None
    trained_tokens: Figure | None = None

    @property
    def flops(self) -> float | None:
        """FLOPs of its pretraining, 6 a parameter that a token meets and token (Kaplan et al. 2020); None: not published."""
        return self.trained_tokens and 6 * (self.active or self.parameters).value * self.trained_tokens.value


@dataclasses.dataclass(frozen=True)
class OpenModel(Trained):
    """A model with open weights that can be served."""

    layers: Figure = None
    kv_heads: Figure = None
    head_width: Figure = None
    context: Figure = None
    licence: str = ""
    languages: tuple[str, ...] = ()
    data_published: bool = False


@dataclasses.dataclass(frozen=True)
class ChipPrice:
    usd_per_hour: Figure | None = None
    buy_usd: Figure | None = None
    server_chips: Figure | None = None
    kw: Figure | None = None


@dataclasses.dataclass(frozen=True)
class Approach:
    setup: Figure  # person-months
    upkeep: Figure  # persons
    runs: Figure


@dataclasses.dataclass(frozen=True)
class Prices:
    date: datetime.date
    apis: dict[str, Api]
    models: dict[str, OpenModel]
    trained: dict[str, Trained]
    chips: dict[str, ChipPrice]
    approaches: dict[str, Approach]
    assumptions: dict[str, Figure]
    public_text: dict[str, Figure]

    def assumed(self, name: str) -> float:
        return self.assumptions[name].value

    @property
    def tasks(self) -> tuple[str, ...]:
        """Every task for which some model has a score."""
        models = [*self.apis.values(), *self.models.values(), *self.trained.values()]
        return tuple(dict.fromkeys(task for m in models for task in m.scores))

    def engineer_month(self, given: float | None) -> float:
        return self.assumed("engineer_usd_per_year") * self.assumed("overhead") / 12 if given is None else given


KINDS = {"apis": Api, "models": OpenModel, "trained": Trained, "chips": ChipPrice, "approaches": Approach}
NEEDED = {"apis": ("input", "output", "context"), "models": ("parameters", "layers", "kv_heads", "head_width", "context"),
          "trained": ("parameters",), "chips": (), "approaches": ("setup", "upkeep", "runs")}
ABOVE_0 = ("mfu", "serving_share", "rented_load", "tokens_per_parameter", "train_bytes", "lora_bytes", "repeats")
PLAIN = {"licence": (str, "text"), "languages": (list, "a list of codes, e.g. [en, de]"),
         "data_published": (bool, "true or false")}  # facts that are no numbers
TABLES = ("scores", "regions")


def read_prices(own: str | None = None) -> Prices:
    """Returns the figures of prices.yaml with those of the file `own` laid over them.

    Raises UserError that names the file and the key for an unknown name, a missing or negative figure, or one without a source.
    """
    ours = tree = _tagged(_load(OWN), "prices.yaml")
    if own is not None:
        tree = _laid_over(tree, _tagged(_load(pathlib.Path(own)), own))
    where = own or "prices.yaml"
    parsed = {group: {name: _entry(kind, entry, f"{group}.{name}", NEEDED[group], where) for name, entry in tree[group].items()}
              for group, kind in KINDS.items()}
    for group, known in (("chips", chips()), ("approaches", APPROACHES), ("assumptions", ours["assumptions"])):
        for name in tree[group]:
            if name not in known:
                said = "is no chip of jaxllm/chips.yaml" if group == "chips" else "is not known"
                raise UserError(f"{where}: {group}.{name}: {said}; {nearest(name, known)}")
    assumptions = _figures(tree["assumptions"], "assumptions", where)
    for name in ABOVE_0:
        if assumptions[name].value <= 0:
            raise UserError(f"{where}: assumptions.{name}={assumptions[name].value:g}: should be above 0")
    public_text = _figures(tree["public_text"], "public_text", where)
    return Prices(tree["date"], **parsed, assumptions=assumptions, public_text=public_text)


def _load(path: pathlib.Path) -> dict:
    try:
        read = yaml.load(path.read_text(encoding="utf-8"), Loader) or {}
    except FileNotFoundError:
        raise UserError(f"prices={path}: no such file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"prices={path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    except yaml.YAMLError as e:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(read, dict):
        raise UserError(f"{path}: should hold `key: value` lines, found {type(read).__name__}")
    known = ("date", "sources", *KINDS, "assumptions", "public_text")
    for key in read:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}; {nearest(str(key), known)}")
    if not isinstance(read.get("date"), datetime.date):
        raise UserError(f"{path}: date={read.get('date')}: should be the day of these prices, e.g. date: 2026-11-28")
    return read


def _tagged(tree: dict, where: str) -> dict:
    """Returns the tree with every number replaced by its Figure."""
    sources, said = {}, tree.get("sources") or {}
    if not isinstance(said, dict):
        raise UserError(f"{where}: sources: should hold names and where they are from, found {type(said).__name__}")
    for name, s in said.items():
        if not isinstance(s, dict) or not ({"url", "assumption"} & s.keys()) or not isinstance(s.get("date"), datetime.date):
            raise UserError(f"{where}: sources.{name}: should be {{url: WHERE, date: DAY}} or {{assumption: WHY, date: DAY}}")
        sources[name] = (s.get("url") or s["assumption"], s["date"], "assumption" in s)

    def figure(value, source, key):
        if isinstance(value, str):  # PyYAML reads 1.5e9 as text
            with contextlib.suppress(ValueError):
                value = float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{where}: {key}={value!r}: should be a number, or [number, source]")
        if not value >= 0 or value == float("inf"):
            raise UserError(f"{where}: {key}={value:g}: should be 0 or more")
        if source is None:
            return Figure(float(value), where, tree["date"], False)
        if source not in sources:
            raise UserError(f"{where}: {key}: unknown source {source!r}; {nearest(str(source), sources)}")
        return Figure(float(value), *sources[source])

    def walk(node, key):
        last = key.rsplit(".", 1)[-1]
        if last in PLAIN:
            return _plain(node, last, key, where)
        if isinstance(node, dict):
            return {str(k): walk(v, f"{key}.{k}") for k, v in node.items()}
        if ".regions." in key:
            return figure(1, node, key)
        if isinstance(node, list) and len(node) == 2 and isinstance(node[1], str):
            return figure(*node, key)
        if node is None:
            raise UserError(f"{where}: {key} has no value: should be [number, source], or a number")
        return figure(node, None, key)

    out = {"date": tree["date"]}
    for group in (*KINDS, "assumptions", "public_text"):
        node = tree.get(group) or {}
        if not isinstance(node, dict):
            raise UserError(f"{where}: {group}: should hold names and figures, found {type(node).__name__}")
        out[group] = walk(node, group)
    return out


def _plain(node, name: str, key: str, where: str):
    kind, should = PLAIN[name]
    if not isinstance(node, kind) or (kind is list and not all(isinstance(one, str) for one in node)):
        raise UserError(f"{where}: {key}={node!r}: should be {should}")
    return tuple(node) if kind is list else node


def _laid_over(under: dict, over: dict) -> dict:
    """Returns `under` with the values of `over` in place of its own, key by key."""
    out = dict(under)
    for key, value in over.items():
        out[key] = _laid_over(under[key], value) if isinstance(value, dict) and isinstance(under.get(key), dict) else value
    return out


def _entry(kind, entry, key: str, needed: tuple[str, ...], where: str):
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {key}: should hold figures by name")
    known = [f.name for f in dataclasses.fields(kind)]
    for name in entry:
        if name not in known:
            raise UserError(f"{where}: {key}: unknown key {name!r}; {nearest(name, known)}")
    for name in needed:
        if name not in entry:
            raise UserError(f"{where}: {key}.{name} is missing: should be [number, source], or a number")
    tables = {name: _figures(entry.get(name, {}), f"{key}.{name}", where) for name in TABLES if name in known}
    made = kind(**{**entry, **tables})
    for name in ("parameters", "active", "layers", "kv_heads", "head_width", "context", "server_chips"):
        if isinstance(f := getattr(made, name, None), Figure) and f.value <= 0:
            raise UserError(f"{where}: {key}.{name}={f.value:g}: should be above 0")
    if (chips := getattr(made, "server_chips", None)) and chips.value != int(chips.value):
        raise UserError(f"{where}: {key}.server_chips={chips.value:g}: should be a whole number")
    if (active := getattr(made, "active", None)) and active.value > made.parameters.value:
        raise UserError(f"{where}: {key}.active={active.value:g}: should be at most its parameters, {made.parameters.value:g}")
    for task, f in (tables.get("scores") or {}).items():
        if f.value > 100:
            raise UserError(f"{where}: {key}.scores.{task}={f.value:g}: is per cent: should be at most 100")
    return made


def _figures(table, key: str, where: str) -> dict[str, Figure]:
    if not isinstance(table, dict) or not all(isinstance(f, Figure) for f in table.values()):
        raise UserError(f"{where}: {key}: should hold one figure for each name")
    return table
