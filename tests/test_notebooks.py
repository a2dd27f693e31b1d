"""The notebooks: their cells are those of the pages, their outputs can be committed, and all of them run."""

from __future__ import annotations

import asyncio
import doctest
import json
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

import notebooks
from docs_snippets import parse_shell, snippets
from notebooks import (
    LESS_WORK,
    NOTEBOOKS,
    PAGES,
    clean_text,
    commands,
    differing,
    execute,
    main,
    make_notebook,
    move_links,
    page_cells,
    read_notebook,
    run_command,
)

MAX_BYTES = 1_500_000
MACHINE = re.compile(r"/(?:tmp|home|root|work|Users|mnt|opt|usr|var|site-packages)\b|[A-Z]:\\\\")
"""Beginnings of paths of a machine."""
PREPARE = """\
%reset -f
import sys
from pathlib import Path
sys.path.append({tests!r})
import docs_runner
docs_runner.prepare_kernel(Path({models!r}), Path({folder!r}))
del docs_runner, sys, Path"""
"""What runs in the kernel before a notebook."""


def outputs_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Return the outputs of all cells."""
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_examples_of_docstrings() -> None:
    assert doctest.testmod(notebooks).failed == 0


def test_there_is_a_notebook_per_page() -> None:
    assert len(PAGES) == 8
    assert {path.stem for path in NOTEBOOKS.iterdir()} == set(PAGES)


def test_cells_are_those_of_the_pages() -> None:
    assert differing(list(PAGES)) == [], "run python scripts/notebooks.py"


def test_changed_pages_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = Path(__file__).parents[1] / "docs/glossary.md"
    monkeypatch.setitem(PAGES, "start", changed)
    assert main(["--check", "start"]) == 1
    assert capsys.readouterr().out == "notebooks/start.ipynb differs from docs/glossary.md\n"
    assert main(["--check", "sample"]) == 0
    with pytest.raises(SystemExit):
        main(["--check", "missing"])


def test_changed_prose_keeps_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGES["start"].read_text()
    before = read_notebook("start")
    monkeypatch.setattr(Path, "read_text", lambda _: text.replace("# Start", "New prose.\n\n# Start"))
    monkeypatch.setattr(notebooks, "save", lambda _, notebook: written.append(notebook))
    written: list[nbformat.NotebookNode] = []
    assert main(["--prose", "start"]) == 0
    assert sum("New prose" in cell.source for cell in written[0].cells) == 1
    assert outputs_of(written[0]) == outputs_of(before) != []
    monkeypatch.setattr(Path, "read_text", lambda _: text.replace("seeds=range(16)", "seeds=range(4)"))
    with pytest.raises(ValueError, match="must be executed"):
        main(["--prose", "start"])


@pytest.mark.parametrize("name", PAGES)
def test_all_code_of_a_page_is_in_its_notebook(name: str) -> None:
    code = [cell.source for cell in make_notebook(name).cells if cell.cell_type == "code"]
    for snippet in snippets(PAGES[name].read_text()):
        if snippet.language == "python":
            assert snippet.code.rstrip("\n") in code
        elif not snippet.code.startswith("pip"):
            # As the shell reads the page, and as it reads the lines of the notebook.
            cell = code[code.index("\n".join(f"!{text}" for text, _ in commands(snippet.code)))]
            assert parse_shell(cell.replace("!", "")) == parse_shell(snippet.code)


@pytest.mark.parametrize("name", PAGES)
def test_outputs_are_complete_and_of_no_machine(name: str) -> None:
    notebook = read_notebook(name)
    outputs = outputs_of(notebook)
    assert "error" not in {output.output_type for output in outputs}
    assert not MACHINE.search(json.dumps(outputs))
    assert "%|" not in json.dumps(outputs)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    shown = [cell for cell in code if cell.source.startswith("show(")]
    assert shown
    assert all("image/png" in cell.outputs[0].data for cell in shown)
    assert all(not cell.metadata for cell in notebook.cells)


def test_notebooks_are_small() -> None:
    assert sum(path.stat().st_size for path in NOTEBOOKS.iterdir()) < MAX_BYTES


@pytest.mark.parametrize("start", LESS_WORK)
def test_commands_with_less_work_are_on_the_pages(start: str) -> None:
    code = "".join(snippet.code for page in PAGES.values() for snippet in snippets(page.read_text()))
    assert re.search(rf"^{re.escape(start)}\s", code, re.MULTILINE)


@pytest.mark.parametrize("name", PAGES)
def test_links_of_notebooks_lead_somewhere(name: str) -> None:
    for cell in make_notebook(name).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"""\]\(([^)\s]+)\)|src="([^"]+)""", cell.source):
                path = "".join(target).partition("#")[0]
                assert path.startswith("https:") or (NOTEBOOKS / path).exists(), path


def test_excluded_and_other_blocks_stay_prose() -> None:
    text = "a\n<!-- not run: hours -->\n```sh\nddim train\n```\n```text\nb\n```\n```sh\npip install x\n```\n"
    (cell,) = page_cells(text, "docs/x.md")
    assert cell.cell_type == "markdown"
    assert cell.source == "a\n```sh\nddim train\n```\n```text\nb\n```\n```sh\npip install x\n```"


def test_open_quotes_are_refused() -> None:
    with pytest.raises(ValueError, match="must end in its line"):
        list(commands("python -c 'import ddim\nimport torch'"))


def test_anchors_of_the_page_lead_to_it() -> None:
    assert move_links("[a](#b)", "docs/tutorials/x.md") == "[a](../docs/tutorials/x.md#b)"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (" 50%|#  | 1/2\r100%|##| 2/2\nx.png\n", "x.png\n"),
        ("loading\r       \rdone\n", "done\n"),
        ("reading\r       \r\ndone\n", "done\n"),
        ("time  2 h 21 min, 3.92 s per step\n", "time  ... h ... min, ... s per step\n"),
        ("/a/b/x.png in /a/b\n\nsteps 3\n", "x.png in .\n\nsteps 3\n"),
    ],
)
def test_outputs_are_cleaned(text: str, cleaned: str) -> None:
    assert clean_text(text, Path("/a/b")) == cleaned


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncKernelManager]:
    """One kernel for all notebooks, which have nothing of it but the imported modules in common."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        manager = AsyncKernelManager(kernel_name="python3")
        yield manager
        asyncio.run(manager.shutdown_kernel(now=True))


@pytest.fixture
def prepare(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the code that prepares the kernel for a notebook in the temporary folder."""
    models = tmp_path_factory.getbasetemp() / "models-of-notebooks"
    return PREPARE.format(tests=str(Path(__file__).parent), models=str(models), folder=str(tmp_path))


@pytest.mark.parametrize("name", PAGES)
def test_notebook_runs(name: str, kernel: AsyncKernelManager, tmp_path: Path, prepare: str) -> None:
    execute(read_notebook(name), tmp_path, prepare, kernel)


def test_failing_commands_fail(kernel: AsyncKernelManager, tmp_path: Path, prepare: str) -> None:
    with pytest.raises(RuntimeError, match="exit 3: exit status 3"):
        run_command("exit 3")
    notebook = new_notebook(cells=[new_code_cell("!ddim sample --steps 0")])
    with pytest.raises(CellExecutionError, match="ddim sample --steps 0"):
        execute(notebook, tmp_path, prepare, kernel)
