"""What jaxllm depends on, what of it is installed, and how much room that takes."""

import ast
import contextlib
import csv
import functools
import importlib.metadata
import pathlib
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SETUP = pathlib.Path(__file__).parents[1] / "setup.py"


def core() -> list[Requirement]:
    """Returns what jaxllm needs."""
    return _declared()[0]


def extras() -> dict[str, list[Requirement]]:
    """Returns what each optional part needs."""
    return _declared()[1]


@functools.cache
def _declared() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """Returns (core, extras) from the checkout's setup.py, or else from the installed metadata."""
    if SETUP.exists():
        tree = ast.parse(SETUP.read_text(encoding="utf-8"))
        assigned = [n for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
        names = {n.targets[0].id: n.value for n in assigned}
        keywords = {k.arg: k.value for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords}
        needs, optional = ast.literal_eval(keywords["install_requires"]), ast.literal_eval(names["EXTRAS"])
        return list(map(Requirement, needs)), {name: list(map(Requirement, each)) for name, each in optional.items()}
    named = importlib.metadata.metadata("jaxllm").get_all("Provides-Extra") or []
    always = needs_of("jaxllm")
    optional = {name: [n for n in needs_of("jaxllm", {name}) if n not in always] for name in named if name != "test"}
    return always, optional


def needs_of(name: str, extra: set[str] | frozenset[str] = frozenset()) -> list[Requirement]:
    """Returns what an installed package needs here, with these extras of it; [] when it is not installed."""
    try:
        needs = map(Requirement, importlib.metadata.requires(name) or [])
    except importlib.metadata.PackageNotFoundError:
        return []
    return [n for n in needs if n.marker is None or any(n.marker.evaluate({"extra": e}) for e in {"", *extra})]


def version(name: str) -> str | None:
    """Returns the installed version of a package; None without it."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def meets(need: Requirement) -> bool:
    """Returns whether what a requirement asks for is installed."""
    have = version(need.name)
    return have is not None and need.specifier.contains(have, prereleases=True)


def closure() -> list[importlib.metadata.Distribution]:
    """Returns the installed packages that jaxllm needs, those they need, and so on; jaxllm itself is not among them."""
    found, todo = {}, [(n.name, frozenset(n.extras)) for n in core()]
    seen = set(todo)
    while todo:
        name, extra = todo.pop()
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[canonicalize_name(name)] = importlib.metadata.distribution(name)
        more = {(canonicalize_name(n.name), frozenset(n.extras)) for n in needs_of(name, extra)} - seen
        seen |= more
        todo += more
    return list(found.values())


def everything() -> Iterator[importlib.metadata.Distribution]:
    """Yields each installed package once: the one that is imported, where there are two."""
    seen = set()
    for dist in importlib.metadata.distributions():
        name = dist.metadata["Name"]
        if name and canonicalize_name(name) not in seen:
            seen.add(canonicalize_name(name))
            yield dist


def size(dist: importlib.metadata.Distribution) -> int:
    """Returns the bytes of a package's files: as its RECORD gives them, looked up on disk where it does not (.pyc)."""
    total = 0
    for row in csv.reader((dist.read_text("RECORD") or "").splitlines()):
        if len(row) == 3 and row[2].isdigit():
            total += int(row[2])
        elif row:
            with contextlib.suppress(OSError):
                total += pathlib.Path(dist.locate_file(row[0])).stat().st_size
    return total
