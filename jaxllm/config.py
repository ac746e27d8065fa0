"""YAML and dotted overrides into frozen dataclasses, and the help text of a verb out of them.

A setting's default and meaning stand in its dataclass, beside the code that it configures:

    lr: float = 3e-4  # peak learning rate

The comment is the help text.
"""

import dataclasses
import difflib
import inspect
import math
import pathlib
import re
import textwrap
import types
import typing

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from jaxllm.errors import UserError


def load(cls, path: str | None = None, overrides: typing.Sequence[str] = (), *, ignore: typing.Sequence[str] = ()):
    """Returns a `cls` filled from its defaults, then the YAML file at `path`, then `overrides` ("a.b=value").

    Top-level keys named in `ignore` are passed over (a run folder's config.yaml also holds versions).
    Raises UserError that names the file or flag, the key, what it was and what it should be.
    """
    merged = OmegaConf.structured(cls)
    if path is not None:
        read = _read_yaml(path)
        for key in ignore:
            read.pop(key, None)
        merged = _merge(cls, merged, read, where=path)
    return _filled(cls, merged, overrides, path or "command line")


def of_tree(cls, tree: dict, where: str):
    """Returns a `cls` filled from its defaults and nested dicts, as `load` does from a file named `where`."""
    return _filled(cls, _merge(cls, OmegaConf.structured(cls), OmegaConf.create(_verbatim(tree)), where), (), where)


def _filled(cls, merged: DictConfig, overrides: typing.Sequence[str], where: str):
    for override in overrides:
        merged = _merge(cls, merged, _read_override(cls, override), where="command line")
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise UserError(f"{where}: {missing[0]} is missing and has no default")
    try:
        filled = OmegaConf.to_object(merged)
    except ValueError as e:  # a dataclass's own __post_init__: "d_model=10 is not divisible by n_heads=4"
        raise UserError(str(e)) from None
    except OmegaConfBaseException as e:  # __post_init__ errors arrive wrapped in some versions
        raise UserError(str(e.__cause__ or e).split("\n")[0]) from None
    for key, value in flatten(to_dict(filled)).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {key}={value:g}: should be a finite number")
    return filled


def to_dict(cfg) -> dict:
    """Returns a config as plain nested dicts, the form that is saved and compared."""
    return dataclasses.asdict(cfg)


def flatten(tree: dict, prefix: str = "") -> dict:
    """Returns {"a.b": value} of nested dicts."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def to_yaml(tree: dict) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _read_yaml(path: str) -> DictConfig:
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = pathlib.Path(path).parent
        near = difflib.get_close_matches(pathlib.Path(path).name, [p.name for p in folder.glob("*.y*ml")], 1)
        hint = f"; did you mean {folder / near[0]}?" if near else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    try:
        loaded = yaml.load(text, Loader) or {}
    except yaml.YAMLError as e:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: should hold `key: value` lines, found {type(loaded).__name__}")
    return OmegaConf.create(_verbatim(loaded))


class Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would take the last without a word."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"found {key.value!r} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _verbatim(tree):
    """Returns nested values with every "${" escaped, as OmegaConf would else look a value up there."""
    if isinstance(tree, dict):
        return {key: _verbatim(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_verbatim(value) for value in tree]
    return tree.replace("${", "\\${") if isinstance(tree, str) else tree


def _read_override(cls, override: str) -> DictConfig:
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", key):
        raise UserError(f"--{override}: should be --dotted.key=value")
    if _is_text(cls, key) and value != "null":  # as it stands: a prompt may end in a space, a name may look like a number
        nested: object = _verbatim(value)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        return OmegaConf.create(nested)
    try:
        return OmegaConf.create(_verbatim(OmegaConf.to_container(OmegaConf.from_dotlist([override]))))
    except (yaml.YAMLError, OmegaConfBaseException) as e:
        raise UserError(f"--{override}: {' '.join(str(e).split())}") from None


def _is_text(cls, key: str) -> bool:
    """Returns whether a key holds text, and nothing that YAML would have to tell apart from text."""
    for name, field in _fields(cls).items():
        if re.fullmatch(re.escape(name).replace("NAME", r"[\w-]+"), key):
            return field.type is str or set(typing.get_args(field.type)) == {str, type(None)}
    return False


def _merge(cls, base: DictConfig, extra: DictConfig, where: str) -> DictConfig:
    groups = {f.name for f in dataclasses.fields(cls) if dataclasses.is_dataclass(f.type) or typing.get_origin(f.type) is dict}
    for key in groups & extra.keys():
        if not isinstance(extra[key], DictConfig):
            raise UserError(f"{where}: {key}={extra[key]!r}: is a group: should be {key}.KEY=value, or `{key}:` and keys below")
    try:
        return OmegaConf.merge(base, extra)
    except ConfigKeyError as e:
        key = e.full_key or str(e.key)
        raise UserError(f"{where}: unknown key {key!r}{_nearest(cls, key)}") from None
    except (OmegaConfBaseException, ValueError, TypeError) as e:
        key = getattr(e, "full_key", None) or ""
        value = OmegaConf.select(extra, key) if key else None
        field = _fields(cls).get(key) if isinstance(key, str) else None
        expected = f"should be {_type_name(field.type)}" if field else " ".join(str(e).split("\n")[0].split())
        raise UserError(f"{where}: {key}={value!r}: {expected}") from None


def _nearest(cls, key: str) -> str:
    """Returns "; did you mean 'optim.lr'?" for the valid name that is most like `key`, or ""."""
    names = list(_fields(cls))
    group, last = key.split(".")[0], key.rsplit(".", 1)[-1]
    groups = {n.split(".")[0] for n in names}
    if group not in groups and (near := difflib.get_close_matches(group, groups, 1)):
        return f"; did you mean {'.'.join([near[0], *key.split('.')[1:]])!r}?"
    near = difflib.get_close_matches(key, names, 1, cutoff=0.75)
    near = near or [n for n in names if n.rsplit(".", 1)[-1] == last][:1]
    near = near or [n for n in names if difflib.SequenceMatcher(None, n.rsplit(".", 1)[-1], last).ratio() > 0.7][:1]
    near = near or difflib.get_close_matches(key, names, 1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; valid: {', '.join(sorted(groups))}"


# ---------------------------------------------------------------- help


@dataclasses.dataclass(frozen=True)
class _Field:
    type: object
    default: object
    meaning: str


def help_text(cls, usage: str) -> str:
    """Returns the usage line and every key of `cls` with its type, default and meaning, group by group."""
    lines, group = [usage, ""], None
    for name, field in _fields(cls).items():
        head = name.rpartition(".")[0]
        if head != group:
            lines += ["", f"{head or 'settings'}:"]
            group = head
        default = "" if field.default is dataclasses.MISSING else f" [{_show(field.default)}]"
        first = f"  --{name}={_type_name(field.type)}{default}"
        meaning = textwrap.wrap(field.meaning, 100)
        if len(first) < 46 and meaning:
            lines.append(f"{first:<46}{meaning.pop(0)}")
        else:
            lines.append(first)
        lines += [" " * 46 + line for line in meaning]
    return "\n".join([*lines, "", "on every verb: --help, --json=FILE (the result as one JSON object; - for standard output)"])


def _fields(cls, prefix: str = "", holder=None) -> dict[str, _Field]:
    """Returns {"optim.lr": field} of every leaf below a dataclass; a mapping's key is written NAME.

    Defaults are those of `holder`, an instance, where there is one: a group may be given others than its class has.
    """
    out, meanings = {}, _comments(cls)
    for f in dataclasses.fields(cls):
        name, inner = prefix + f.name, f.type
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory
        default = getattr(holder, f.name, default)
        if typing.get_origin(inner) is dict:
            name, inner, default = f"{name}.NAME", typing.get_args(inner)[1], None
        if dataclasses.is_dataclass(inner):
            out |= _fields(inner, name + ".", default() if callable(default) and default is not inner else default)
            continue
        default = default() if callable(default) else default
        out[name] = _Field(inner, default, meanings.get(f.name, ""))
    return out


def _comments(cls) -> dict[str, str]:
    """Returns {field: its comment}, of inherited fields too: the one on its line, or else the full-line comments above it."""
    out, above = {}, []
    sources = [inspect.getsource(one) for one in reversed(cls.__mro__) if dataclasses.is_dataclass(one)]
    for line in "\n".join(sources).splitlines():
        if found := re.match(r"\s+(\w+): [^#]*(?:#\s*(.*))?$", line):
            out[found[1]] = found[2] or " ".join(above)
            above = []
        elif found := re.match(r"\s+# ?(.*)$", line):
            above.append(found[1])
        else:
            above = []
    return out


def _type_name(kind) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "|".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return "|".join("null" if a is type(None) else _type_name(a) for a in args)
    if origin in (tuple, list):
        return f"[{_type_name(args[0])},...]"
    return getattr(kind, "__name__", str(kind))


def _show(value) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(str, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
