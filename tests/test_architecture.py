"""The rules of the house, as far as standard tools do not check them (layers and circles: `lint-imports`)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/ddim"
MODULES = sorted(PACKAGE.rglob("*.py"))

MANY_PARAMETERS = 9
MAX_FUNCTIONS_WITH_MANY_PARAMETERS = 13
MIN_COMMENTS_PER_100_LINES = 10

NAMES_OF_LIBRARIES = {"_fields", "_fingerprint", "_version"}
"""Of named tuples, datasets and tensors, though modules of the package have functions of these names."""

PHRASES = (
    r"\b(evaluations?|numbers?|images?|steps?|pictures?|seeds?|one|bytes|channels|file|line|row|noise) an? "
    r"(step|image|picture|sample|batch|pixel|channel|head|parameter|machine|second)\b",
    r"\b(is|are) no ",
    r"\bunless given\b",
    r"\btold\b",
    r"\bpaint(s|ed|ing|er)?\b",
    r"\bgo(es)? on\b",
    r"\bin place of\b",
)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_accesses(path: Path) -> Iterator[str]:
    """Private names of other modules that a module of the package uses."""
    tree = ast.parse(path.read_text())
    owned = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    owned |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    owned |= {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ddim"):
            names = [alias.name for alias in node.names if is_private(alias.name)]
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in owned:
            names = [node.attr]
        else:
            continue
        yield from (f"{path.relative_to(ROOT)}:{node.lineno} {name}" for name in names)


def package_private_names() -> set[str]:
    """Names with a leading underscore that some module of the package defines."""
    names = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return {name for name in names if is_private(name)}


def test_no_module_uses_a_private_name_of_another() -> None:
    """Only names that the package itself defines count: others are those of PyTorch, numba and `datasets`."""
    ours = package_private_names() - NAMES_OF_LIBRARIES
    found = [use for path in MODULES for use in private_accesses(path) if use.split()[-1] in ours]
    assert found == []


def parameters(function: ast.FunctionDef) -> int:
    arguments = function.args
    listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    names = [argument.arg for argument in listed if argument is not None]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def is_overload(function: ast.FunctionDef) -> bool:
    """Whether it is one more signature of a function."""
    return any(isinstance(decorator, ast.Name) and decorator.id == "overload" for decorator in function.decorator_list)


def test_few_functions_have_many_parameters() -> None:
    """The constructors of `UNet2DModel` and `DDIMScheduler` are those of `diffusers`; commands have options.

    Kernels in Triton take each pointer, size and compile-time constant as an argument.
    """
    found = []
    for path in MODULES:
        if path.is_relative_to(PACKAGE / "cli") or path.name in ("unet.py", "scheduler.py", "triton_kernels.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and parameters(node) >= MANY_PARAMETERS and not is_overload(node):
                found.append(f"{path.relative_to(ROOT)} {node.name}: {parameters(node)}")
    assert len(found) <= MAX_FUNCTIONS_WITH_MANY_PARAMETERS, found


def test_kernels_are_commented() -> None:
    """Comment lines per 100 lines of code, docstrings and blank lines left out."""
    comments = code = 0
    for path in (PACKAGE / "kernels").rglob("*.py"):
        source = path.read_text()
        docstrings: set[int] = set()
        for node in ast.walk(ast.parse(source)):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        for number, line in enumerate(source.splitlines(), 1):
            if line.strip() and number not in docstrings:
                comments += line.strip().startswith("#")
                code += not line.strip().startswith("#")
    assert 100 * comments / code >= MIN_COMMENTS_PER_100_LINES


@pytest.mark.parametrize(("engine", "most"), [("auto", 21), ("eager", 15)])
def test_a_sample_passes_few_files(engine: str, most: int) -> None:
    command = [sys.executable, ROOT / "scripts/count_hops.py", "--engine", engine]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) <= most


def test_words_are_those_of_the_field() -> None:
    """Outside the deprecated alias `paint`."""
    texts = [*MODULES, *(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    pattern = re.compile("|".join(PHRASES), re.IGNORECASE)
    found = []
    for path in texts:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if pattern.search(line) and not (path.name == "pipeline.py" and "paint" in line):
                found.append(f"{path.relative_to(ROOT)}:{number} {line.strip()}")
    assert found == []


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=str
)
def test_lines_of_documents_have_at_most_120_characters(path: Path) -> None:
    lines = path.read_text().splitlines()
    # A table's row and a link cannot be broken.
    assert [line for line in lines if len(line) > 120 and "|" not in line and "](" not in line] == []
