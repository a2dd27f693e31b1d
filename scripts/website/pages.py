"""The pages of the site: files of the repository, a page per module of the package, and one of all commands.

The Markdown files are written for a reader of the repository; `docs/` is the root of the site, and files outside of it
get a place in it here. Pages of modules are made from docstrings, so that they cannot lag behind the code.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/ddim"
INHERITING = ("ddim.pipeline", "ddim.scheduler")
"""Modules whose classes are shown with the methods that they inherit."""


def repository_files() -> dict[str, str]:
    """Return the files outside of `docs/` that the site has, by their path in the repository, with that in the site."""
    named = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
    named["src/ddim/models/faces/LICENSE"] = "models/faces/license.txt"
    patterns = {
        "src/ddim/models/*/README.md": lambda path: f"models/{path.parent.name}/index.md",
        "src/ddim/models/*/*.png": lambda path: f"models/{path.parent.name}/{path.name}",
        "benchmarks/results/*.md": lambda path: f"benchmarks/results/{path.name}",
        "benchmarks/results/*.png": lambda path: f"benchmarks/results/{path.name}",
        "examples/*.py": lambda path: f"examples/{path.stem}.md",
    }
    for pattern, place in patterns.items():
        named |= {path.relative_to(ROOT).as_posix(): place(path) for path in sorted(ROOT.glob(pattern))}
    return named


def site_paths() -> dict[str, str]:
    """Return where a link to a path of the repository leads in the site; paths that are not in it are left out."""
    paths = {path.relative_to(ROOT).as_posix(): path.relative_to(ROOT / "docs").as_posix() for path in docs_files()}
    paths |= repository_files()
    paths |= {path.relative_to(ROOT).as_posix(): module_page(name) for name, path in modules().items()}
    return paths | {"examples": "examples/index.md", "docs": "index.md", ".": "index.md"}


@cache
def titles() -> dict[str, str]:
    """Return the first heading of each Markdown file, by its path in the site."""
    headings = {}
    for path, place in site_paths().items():
        match = re.search(r"^# (.+)$", (ROOT / path).read_text(), re.MULTILINE) if path.endswith(".md") else None
        if match and not path.startswith("benchmarks/"):
            headings[place] = match[1]
    return headings


def docs_files() -> list[Path]:
    """Return the files of `docs/`."""
    return [path for path in sorted((ROOT / "docs").rglob("*")) if path.is_file()]


def modules() -> dict[str, Path]:
    """Return the public modules of the package by name."""
    named = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["ddim", *path.relative_to(PACKAGE).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if not any(part.startswith("_") for part in name.split(".")):
            named[name] = path
    return named


def module_page(name: str) -> str:
    """Return the page of a module."""
    return f"api/{name}.md"


def module_text(name: str) -> str:
    """Return the Markdown of a module's page, from which mkdocstrings makes its documentation."""
    options = "\n    options:\n      inherited_members: true" if name in INHERITING else ""
    return f"---\ntitle: {name}\n---\n\n::: {name}{options}\n"


def module_navigation() -> list[dict[str, list[str]]]:
    """Return the navigation of all modules: a section for the package's root and one per subpackage."""
    sections: dict[str, list[str]] = {}
    for name in modules():
        parts = name.split(".")
        is_package = (PACKAGE / parts[1]).is_dir() if len(parts) > 1 else False
        sections.setdefault(".".join(parts[:2]) if is_package else "ddim", []).append(module_page(name))
    return [{section: pages} for section, pages in sections.items()]


def public_names(path: Path, module: str) -> Iterator[tuple[str, ast.AST]]:
    """Iterate over a module, and its public functions, classes and methods: the full name and the node of each."""
    tree = parse(path)
    yield module, tree
    yield from _definitions(tree, module)


@cache
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a module."""
    return ast.parse(path.read_text())


def _definitions(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name[0] != "_":
            if any(
                isinstance(decorator, ast.Name) and decorator.id == "overload" for decorator in child.decorator_list
            ):
                continue  # what follows the signatures has the docstring
            name = f"{prefix}.{child.name}"
            yield name, child
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, name)


def example_text(path: Path) -> str:
    """Return the page of an example: its name and its code, whose docstring says what it is."""
    return f"# {path.name}\n\n```python\n{path.read_text()}```\n"


def examples_text() -> str:
    """Return the page that lists the examples, each with the first line of its docstring."""
    rows = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        summary = (ast.get_docstring(parse(path)) or "").splitlines()[0]
        rows.append(f"| [{path.name}]({path.stem}.md) | {summary} |")
    head = "# Examples\n\nScripts of one page each, in the folder `examples/` of the repository.\n\n| | |\n|---|---|\n"
    return head + "\n".join(rows) + "\n"
