"""Imports point one way, so that a reader can take the rooms in order."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BASE = {"errors", "config", "mesh", "hardware", "platform", "__init__"}
MAY_IMPORT = {  # room -> the rooms it may import from, besides itself
    **dict.fromkeys(BASE, BASE),
    "partition": BASE,
    "data": BASE | {"report"},
    "model": BASE | {"partition"},
    "parallel": BASE | {"partition", "model"},
    "report": BASE,
    "train": BASE | {"partition", "data", "model", "parallel", "generate", "report"},
    "generate": BASE | {"partition", "data", "model", "train"},
    "align": BASE | {"partition", "data", "model", "parallel", "train", "generate", "report"},
    "plan": BASE | {"partition", "data", "model", "parallel", "train", "report"},
    "self_test": BASE | {"partition", "data", "model", "train", "generate"},
    "installed": BASE,
    "doctor": BASE | {"self_test", "installed", "report"},
    "cli": BASE,
    "__main__": {"cli"},
}
FILES = sorted((ROOT / "jaxllm").rglob("*.py"))


def room(path: pathlib.Path) -> str:
    return path.relative_to(ROOT / "jaxllm").parts[0].removesuffix(".py")


def imported(path: pathlib.Path):
    """Yields the rooms of jaxllm that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = (name or "").split(".")
            if parts[0] == "jaxllm":
                found = parts[1:2] or [a.name for a in node.names]
                yield from (f if (ROOT / "jaxllm" / f).is_dir() or (ROOT / "jaxllm" / f"{f}.py").exists() else "__init__" for f in found)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = room(path)
    wrong = {name for name in imported(path) if name != own and name not in MAY_IMPORT[own]}
    assert not wrong, f"{own} must not import {wrong}"


NO_JAX = """cli config mesh hardware doctor report.page report.data_page train.config generate.config data.tokenize data.tokenizer
    data.pipeline data.cluster data.extract data.clean data.privacy data.augment data.language data.filters data.harm data.homographs data.dedup
    data.decontaminate data.repeats data.substrings data.mixture data.review.verb data.preference data.pairs data.prompts align.rewards align.dpo_config data.chat data.chat_jinja
    plan.advise plan.advise_page plan.size plan.size_page plan.points plan.batch plan.coordcheck data.instruction_input data.rationale align.collect.verb""".split()  # data.loader: grain imports jax itself


@pytest.mark.parametrize("module", NO_JAX)
def test_what_needs_no_device_imports_no_jax(module):
    code = f"import sys, jaxllm.{module}; sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or f"jaxllm.{module} imports jax"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_importing_does_nothing(path):
    """At the top of a file: imports, definitions and constants; calls only in what they are assigned to or decorate."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        harmless = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        guard = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        registers = isinstance(node, ast.Expr) and ast.unparse(node).split("(")[0].endswith((".defvjp", ".register_dataclass"))
        assert isinstance(node, harmless) or docstring or guard or registers, f"line {node.lineno} acts on import"
