"""The documentation site: pages of all modules, docstrings of all names, links, and the check of what was built."""

from __future__ import annotations

import ast
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import check_website
import ddim
from check_website import find_faults
from ddim.cli import COMMANDS, main
from website.commands import commands_text
from website.links import move_links
from website.pages import ROOT, module_navigation, module_page, module_text, modules, parse, public_names, site_paths

PLACES = {"README.md": "index.md", "docs/a/x.md": "a/x.md", "docs/y.md": "y.md", "docs/i.png": "i.png"}


def submodules(folder: Path, prefix: str) -> Iterator[str]:
    """Names of the public modules of a package, as Python finds them."""
    for module in pkgutil.iter_modules([str(folder)]):
        if not module.name.startswith("_"):
            yield f"{prefix}.{module.name}"
            if module.ispkg:
                yield from submodules(folder / module.name, f"{prefix}.{module.name}")


def test_every_public_module_has_a_page() -> None:
    assert set(modules()) == {"ddim", *submodules(Path(ddim.__file__).parent, "ddim")}
    pages = [page for section in module_navigation() for page in next(iter(section.values()))]
    assert sorted(pages) == sorted(module_page(name) for name in modules())
    assert all(f"::: {name}\n" in module_text(name) for name in modules())


def test_every_public_name_has_a_docstring() -> None:
    without = [
        name
        for module, path in modules().items()
        for name, node in public_names(path, module)
        if not ast.get_docstring(node)  # type: ignore[arg-type]
    ]
    assert without == []


def known_names() -> set[str]:
    """Names that a page may link: those of `public_names`, constants, and what packages export."""
    names: set[str] = set()
    for module, path in modules().items():
        names |= {name for name, _ in public_names(path, module)}
        for node in parse(path).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names |= {f"{module}.{target.id}" for target in targets if isinstance(target, ast.Name)}
            if isinstance(node, ast.ImportFrom) and path.name == "__init__.py":
                names |= {f"{module}.{alias.name}" for alias in node.names}
    return names | {f"ddim.{name}" for name in ddim.__all__}


def test_names_in_pages_exist() -> None:
    known = known_names()
    for page in [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        used = set(re.findall(r"`(ddim(?:\.\w+)+)(?:\(\))?`", page.read_text()))
        # Files of commands, such as `ddim.tar`, are not names of code.
        assert used <= known, (page, used - known)


def test_every_command_and_option_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = commands_text()
    assert text.count("\n## ddim ") == len(COMMANDS)
    monkeypatch.setattr(sys, "argv", ["ddim", "evaluate", "--help"])
    with pytest.raises(SystemExit):
        main()
    help_text = capsys.readouterr().out
    section = text[text.index("## ddim evaluate\n") :].split("\n## ")[0]
    assert set(re.findall(r"--[a-z-]{3,}", help_text)) - {"--help"} <= set(re.findall(r"--[a-z-]+", section))


@pytest.mark.parametrize(
    ("text", "source", "moved"),
    [
        ("[a](../../README.md#b)", "docs/a/x.md", "[a](../index.md#b)"),
        ("[a](docs/a/x.md) ![i](docs/i.png)", "README.md", "[a](a/x.md) ![i](i.png)"),
        ("[the `code`\nof it](src/x.py), [d](tests)", "README.md", "the `code`\nof it, d"),
        ("[docs/y.md](docs/y.md#z) [y](docs/y.md)", "README.md", "[Why](y.md#z) [y](y.md)"),
        ("[a](https://host/x.md) [b](#b)", "README.md", "[a](https://host/x.md) [b](#b)"),
        ('<a href="docs/y.md#z"><img src="docs/i.png">', "README.md", '<a href="y.html#z"><img src="i.png">'),
        ("`x[0](tests)`\n```python\nx[0](tests)\n```\n", "README.md", "`x[0](tests)`\n```python\nx[0](tests)\n```\n"),
    ],
)
def test_links_are_moved(text: str, source: str, moved: str) -> None:
    assert move_links(text, source, PLACES, {"y.md": "Why"}) == moved


def test_places_of_the_site_are_distinct() -> None:
    places = [place for path, place in site_paths().items() if (ROOT / path).is_file()]
    assert len(places) == len(set(places))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a site with all names of one module."""
    path = ROOT / "src/ddim/tuning.py"
    monkeypatch.setattr(check_website, "modules", lambda: {"ddim.tuning": path})
    (tmp_path / "api").mkdir()
    ids = (f'<i id="{name}"></i>' for name, _ in public_names(path, "ddim.tuning"))
    (tmp_path / "api/ddim.tuning.html").write_text("".join(ids))
    return tmp_path


@pytest.mark.parametrize(
    ("index", "fault"),
    [
        ('<a href="api/ddim.tuning.html#ddim.tuning"> <a href="https://host/"> <h2 id="c"></h2> <a href="#c">', None),
        ('<a href="missing.html">', "no file missing.html"),
        ('<a href="../outside.html">', "no file ../outside.html"),
        ('<a href="api/ddim.tuning.html#missing">', "no anchor api/ddim.tuning.html#missing"),
        ('<script src="https://host/x.js"></script>', "loads https://host/x.js"),
        ('<link rel="stylesheet" href="//host/x.css">', "loads //host/x.css"),
    ],
)
def test_faults_of_pages_are_found(index: str, fault: str | None, site: Path) -> None:
    (site / "index.html").write_text(index)
    assert find_faults(site) == ([] if fault is None else [f"index.html: {fault}"])


def test_styles_and_missing_names_are_found(site: Path) -> None:
    (site / "x.css").write_text("@font-face { src: url(https://host/f.woff2) }")
    (site / "api/ddim.tuning.html").write_text('<i id="ddim.tuning"></i>')
    faults = find_faults(site)
    assert "x.css: loads https://host/f.woff2" in faults
    assert "no entry of ddim.tuning.tune" in faults


def test_equations_become_mathml() -> None:
    pytest.importorskip("latex2mathml")
    from website.equations import equation

    html = equation(r"x_t = \sqrt{\alpha_t} x_0 \tag{4}")
    assert '<span class="number">(4)</span>' in html
    assert 'id="eq-4"' in html
    assert "<msqrt>" in html
    assert "tag" not in html
