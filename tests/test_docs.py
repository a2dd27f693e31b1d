"""README and docs: all snippets run in order, links and files exist, lines are short, words are those of the field."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from ddim.info import describe
from ddim.io.hub import builtin_models
from docs_runner import make_small_models, run_command, run_page
from docs_snippets import excluded, parse_shell, snippets
from notebooks import PAGES as NOTEBOOK_PAGES

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "src" / "ddim" / "models").glob("*/README.md")),
]
NOT_RUN_HERE = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *NOTEBOOK_PAGES.values()]
"""Pages for developers, and those whose snippets `test_notebooks.py` runs."""
MAX_NOT_RUN = 4
"""Snippets of all pages that are not run."""
MAX_LINE = 120
UNWANTED = re.compile(
    r"\b(paint\w*|pictures?|unless given|in place of|goes on|gone on|tells?|told|the peer|of one's own|wants|"
    r"(?<!there )is no|evaluations? an?|images? a|steps? an?)\b",
    re.IGNORECASE,
)


def prose(text: str) -> str:
    """Return a page without code, which may hold names that are part of the interface."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def by_name(path: Path) -> str:
    """Name a page in a test's id."""
    return str(path.relative_to(ROOT))


def test_snippets_are_extracted() -> None:
    text = "a\n```python\nx = 1\n```\n\n<!-- not run: network -->\n```python\ny\n```\n```sh\nddim info\n```\n"
    assert snippets(text) == [("python", "x = 1\n", 3), ("sh", "ddim info\n", 11)]
    assert excluded(text) == ["network"]


def test_shell_is_parsed_by_the_shell() -> None:
    code = "ddim info  # words\nddim sample 'a b' \\\n  --out \"x.png\"\n"
    assert parse_shell(code) == [["ddim", "info"], ["ddim", "sample", "a b", "--out", "x.png"]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_small_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("page", [page for page in PAGES if page not in NOT_RUN_HERE], ids=by_name)
def test_snippets_run_in_order(
    page: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(page, models, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", NOTEBOOK_PAGES.values(), ids=by_name)
def test_installation_names_extras(page: Path) -> None:
    for snippet in snippets(page.read_text()):
        if snippet.language == "sh":
            for command in parse_shell(snippet.code):
                if command[0] == "pip":
                    run_command(command)


def test_few_snippets_are_not_run() -> None:
    reasons = [reason for page in PAGES for reason in excluded(page.read_text())]
    assert len(reasons) <= MAX_NOT_RUN, reasons


def test_gflop_is_that_of_ddim_info() -> None:
    costs = {folder: str(describe(name)["gflop_per_image_and_step"]) for name, folder in builtin_models().items()}
    for page in PAGES:
        given = set(re.findall(r"([\d.]+) GFLOP per image and step", page.read_text()))
        assert given == {costs[page.parent]} if page.parent in costs else given <= set(costs.values()), page


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_lines_are_short(page: Path) -> None:
    long = [
        line
        for line in page.read_text().splitlines()
        if len(line) > MAX_LINE and not line.startswith("|") and "](" not in line
    ]
    assert not long


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_words(page: Path) -> None:
    assert UNWANTED.findall(prose(page.read_text())) == []


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_named_files_and_modules_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"python -m (benchmarks\.\w+)", text):
        if name != "benchmarks.NAME":
            assert (ROOT / name.replace(".", "/")).with_suffix(".py").exists(), name
    for name in re.findall(r"(?:src/ddim|tests|scripts|examples|docs)/[\w./-]*\w", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_benchmarks_are_documented(path: Path) -> None:
    if "def main(" in path.read_text():
        assert f"python -m benchmarks.{path.stem}`" in (ROOT / "docs" / "benchmarks.md").read_text()


def test_map_of_the_code_is_complete() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tree = text[text.index("src/ddim/\n") : text.index("tests/ ")]
    described = set(re.findall(r"^  (\w+(?:\.py|/))", tree, re.MULTILINE))
    package = ROOT / "src" / "ddim"
    present = {f"{path.name}/" for path in package.iterdir() if path.is_dir()} - {"__pycache__/"}
    present |= {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py", "version.py"}
    assert described == present


def test_layers_are_those_that_are_enforced() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["id"] == "layers"]
    assert "```\n{}\n```".format("\n".join(layers[1:])) in (ROOT / "CONTRIBUTING.md").read_text()
