"""Make a Jupyter notebook of each tutorial: the cells are those of its Markdown page, the outputs those of a real run.

    python scripts/notebooks.py --data FOLDER       write notebooks/*.ipynb anew; FOLDER has mnist/*.parquet
    python scripts/notebooks.py sample restore      these two
    python scripts/notebooks.py --prose             take over changed prose of pages, and keep the outputs
    python scripts/notebooks.py --check             compare the cells with the pages; status 1 for those that differ

A page is the only source of its notebook: prose becomes Markdown, `python` blocks become code, `sh` blocks become lines
with `!`, and a cell that shows it follows whatever makes an image. Notebooks are executed in an empty folder. Commands
that take minutes run with further options (`LESS_WORK`), and a cell says so.
"""

from __future__ import annotations

import argparse
import ast
import base64
import io
import itertools
import os
import posixpath
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
PAGES = {path.stem: path for path in (ROOT / "docs/start.md", *sorted((ROOT / "docs/tutorials").glob("*.md")))}
"""The pages by the names of their notebooks."""
LESS_WORK = {
    "ddim sample --model mnist --count 1000": "--count 32",
    "ddim train --preset digits --out runs/digits": "--max-steps 300",
    "ddim train --preset digits-labels": "--max-steps 250",
    "ddim tune mnist --steps 5": "--codes 8",
    "ddim distill mnist --steps 4": "--max-steps 60 --count 256",
    "ddim train --data pics/ --out runs/pics": "--max-steps 300",
    "ddim train --data pics/ --init": "--max-steps 100",
    "ddim evaluate mnist --reference mnist/test.parquet --features mnist -n 2000": "-n 200",
    "ddim evaluate runs/digits --every-checkpoint": "-n 200",
    "ddim evaluate mnist --reference mnist/test.parquet --features mnist -n 500": "-n 32 --table-steps 5,10",
    "ddim evaluate mnist --reference mnist/train.parquet --held-out": "-n 100",
}
"""Options with which commands are executed, by how the commands begin. Of an option given twice the last one holds."""
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$\n?", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: .+ -->\n\Z")
"""Stands before a block that is not run; the block stays Markdown."""
HEADING = re.compile(r"^(?=#+ )", re.MULTILINE)
TARGET = re.compile(r"""(\]\(|\b(?:src|href)=")([^)"\s]+)""")
REQUIRES_TRAINING = re.compile(r"\bddim (train|evaluate|distill)\b")
SHOW = '''\
from PIL import Image, ImageOps

from ddim.io.image_files import make_grid


def show(images):
    """Return an image, images in a row or a grid, or an image file; small ones are enlarged."""
    if isinstance(images, str):
        images = Image.open(images)
    if isinstance(images, list):
        images = make_grid(images, columns=len(images) if len(images) <= 10 else None)
    return ImageOps.scale(images, min(4, max(1, 640 // images.width)), Image.Resampling.NEAREST)'''
SETUP = f"""\
import sys
sys.path.append({str(Path(__file__).parent)!r})
import notebooks
notebooks.prepare_kernel()
del notebooks, sys"""
"""Code that a kernel executes before the first cell."""
PROGRESS = re.compile(r"\d+%\|")
MEASUREMENT = re.compile(r"\b[\d.,]+ (s|min|h|images/s|MiB|GiB)\b")
"""What another machine, or another run, measures otherwise."""
LARGE_PNG_BYTES = 16_384
NUM_COLORS = 64


def make_notebook(name: str) -> NotebookNode:
    """Return the notebook of a page, not executed.

    Args:
        name: of the notebook, a key of `PAGES`.

    Raises:
        KeyError: for a name without a page.
        ValueError: for a command that does not end in its line.

    Example:
        >>> make_notebook("sample").cells[2].source.splitlines()[0]
        '# Sample'
    """
    page = PAGES[name]
    text = page.read_text()
    path = page.relative_to(ROOT).as_posix()
    extra = "'.[train]'" if REQUIRES_TRAINING.search(text) else "."
    introduction = (
        f"This notebook is made from [{path}](../{path}) by `scripts/notebooks.py`: change the page, not the notebook. "
        f"It requires the package, installed from a checkout of the repository by `pip install -e {extra}`."
    )
    cells = [new_markdown_cell(introduction), new_code_cell(SHOW), *page_cells(text, path)]
    for index, cell in enumerate(cells):
        cell.id = f"cell-{index:02}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def page_cells(text: str, path: str) -> Iterator[NotebookNode]:
    r"""Iterate over the cells of a page.

    Args:
        text: the page, Markdown.
        path: of the page in the repository, which its links start from.

    Yields:
        One Markdown cell per heading, with the prose below it; one code cell per block and per image that it makes.

    Example:
        >>> [cell.source for cell in page_cells("# A\n[b](b.md)\n```sh\nddim info\n```\n", "docs/a.md")]
        ['# A\n[b](../docs/b.md)', '!ddim info']
    """
    prose = ""
    end = 0
    for match in BLOCK.finditer(text):
        prose += text[end : match.start()]
        end = match.end()
        language, code = match.groups()
        if language not in ("python", "sh") or NOT_RUN.search(prose) or (language == "sh" and is_installation(code)):
            prose = NOT_RUN.sub("", prose) + match[0]
            continue
        yield from prose_cells(prose, path)
        prose = ""
        yield from python_cells(code) if language == "python" else shell_cells(code)
    yield from prose_cells(prose + text[end:], path)


def prose_cells(text: str, path: str) -> Iterator[NotebookNode]:
    """Iterate over the Markdown cells of prose: each heading begins one."""
    for section in HEADING.split(move_links(text, path)):
        if section.strip():
            yield new_markdown_cell(section.strip())


def move_links(text: str, path: str) -> str:
    """Return Markdown of a page with the links that it has in the folder of the notebooks.

    Args:
        text: Markdown.
        path: of the page in the repository.

    Example:
        >>> move_links('[a](b.md#c) [d](#e) <img src="../f.png"> [g](https://host/)', "docs/tutorials/x.md")
        '[a](../docs/tutorials/b.md#c) [d](../docs/tutorials/x.md#e) <img src="../docs/f.png"> [g](https://host/)'
    """

    def move(match: re.Match[str]) -> str:
        before, target = match.groups()
        if re.match("[a-z]+:", target):
            return match[0]
        if target.startswith("#"):
            return f"{before}../{path}{target}"
        return before + posixpath.normpath(posixpath.join("..", posixpath.dirname(path), target))

    return TARGET.sub(move, text)


def is_installation(code: str) -> bool:
    """Return whether all commands of a shell block are of `pip`: a notebook does not change what it runs in.

    Example:
        >>> is_installation("pip install -e .  # the package"), is_installation("ddim info")
        (True, False)
    """
    return all(words[0] == "pip" for _, words in commands(code))


def commands(code: str) -> Iterator[tuple[str, list[str]]]:
    r"""Iterate over the commands of a shell block: the text of each, with its continued lines, and its words.

    Args:
        code: the block; blank lines and comments are left out.

    Raises:
        ValueError: for a command with a quote that its line does not close.

    Example:
        >>> [words for _, words in commands("# all\nddim info  # of it\nddim sample \\\n  --out 'a b'")]
        [['ddim', 'info'], ['ddim', 'sample', '--out', 'a b']]
    """
    for command in re.split(r"(?<!\\)\n", code):
        try:
            words = shlex.split(command.replace("\\\n", " "), comments=True)
        except ValueError as error:
            raise ValueError(f"a command must end in its line, got {command!r}: {error}") from None
        if words:
            yield command, words


def shell_cells(code: str) -> Iterator[NotebookNode]:
    r"""Iterate over the cells of a shell block: its commands, what was executed instead, and the images they write.

    Example:
        >>> [cell.source for cell in shell_cells("cd run\nddim sample --out x.png\n")]
        ['%cd run\n!ddim sample --out x.png', 'show("x.png")']
    """
    found = list(commands(code))
    # A shell of its own runs each line with `!`, so that only the magic changes the folder of the lines after it.
    yield new_code_cell("\n".join(f"%{text}" if words[0] == "cd" else f"!{text}" for text, words in found))
    for _, words in found:
        options = less_work(words)
        if options:
            command = shlex.join(words)
            yield new_markdown_cell(
                f"The output above is that of `{command}` with `{' '.join(options)}`, which takes less time."
            )
    for _, words in found:
        for name in written_images(words):
            yield new_code_cell(shown(f'"{name}"'))


def less_work(words: Sequence[str]) -> list[str]:
    """Return the options that are added to a command where a notebook is executed.

    Example:
        >>> less_work(["ddim", "sample", "--model", "mnist", "--count", "1000", "--out", "digits/"])
        ['--count', '32']
    """
    command = shlex.join(words)
    return next((options.split() for start, options in LESS_WORK.items() if f"{command} ".startswith(f"{start} ")), [])


def written_images(words: Sequence[str]) -> list[str]:
    """Return the image files that a command writes.

    Example:
        >>> written_images(["ddim", "evaluate", "--out", "a.png", "--pairs", "b.png"]), written_images(["ddim", "info"])
        (['a.png', 'b.png'], [])
    """
    names = [word for option, word in itertools.pairwise(words) if option[0] == "-" and is_image(word)]
    if words[:2] == ["ddim", "sample"] and not {"--out", "-o"} & set(words):
        names.append("samples.png")  # the default
    return names


def is_image(name: str) -> bool:
    """Return whether a file of this name is an image that notebooks show."""
    return name.endswith((".png", ".gif"))


def shown(value: str) -> str:
    """Return the code that shows a value; files of several frames are shown as they are."""
    return f"from IPython import display\n\ndisplay.Image({value})" if value.endswith('.gif"') else f"show({value})"


def python_cells(code: str) -> Iterator[NotebookNode]:
    r"""Iterate over the cells of a Python block: the block, and one for each image, list of images or file it makes.

    Example:
        >>> code = "images = pipe(seeds=[0]).images\nimages[0].save('x.png')\nedits.images\n"
        >>> [cell.source for cell in python_cells(code)][1:]
        ['show(images)', 'show("x.png")', 'show(edits.images)']
        >>> [cell.source for cell in python_cells("x = pipe(output_type='np').images\n")][1:]
        []
    """
    yield new_code_cell(code.rstrip("\n"))
    values: dict[str, None] = {}
    for statement in ast.parse(code).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if is_images(value):
                values[name] = None
            case ast.Expr(value=ast.Attribute(value=ast.Name()) as value) if is_images(value):
                values[ast.unparse(value)] = None
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr="save"), args=[ast.Constant(value=str(name))])):
                if is_image(name):
                    values[f'"{name}"'] = None
    yield from (new_code_cell(shown(value)) for value in values)


def is_images(node: ast.expr) -> bool:
    """Return whether an expression is `result.images`, or one of these, of PIL images."""
    if isinstance(node, ast.Subscript):
        node = node.value
    is_converted = any(isinstance(part, ast.keyword) and part.arg == "output_type" for part in ast.walk(node))
    return isinstance(node, ast.Attribute) and node.attr == "images" and not is_converted


def prepare_kernel() -> None:
    """Make the lines with `!` of the kernel that calls this fail where their command fails, and do less work.

    Random numbers without a seed become those of seed 0, so that two runs have the same outputs.
    """
    import torch
    from IPython import get_ipython

    torch.manual_seed(0)
    get_ipython().system = run_command  # type: ignore[no-untyped-call, union-attr]


def run_command(command: str) -> None:
    """Run a line of a notebook in a shell, with the options of `LESS_WORK`, and print its output.

    Args:
        command: what follows the `!`.

    Raises:
        RuntimeError: if its exit status is not 0.
    """
    words = shlex.split(command, comments=True)
    if less_work(words):
        command = shlex.join([*words, *less_work(words)])
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout.decode(), end="")
    if done.returncode:
        raise RuntimeError(f"{command}: exit status {done.returncode}")


def execute(notebook: NotebookNode, folder: Path, setup: str, kernel: AsyncKernelManager | None = None) -> None:
    """Execute the cells of a notebook from first to last; their outputs are in it afterwards.

    Args:
        notebook: the notebook, which is changed.
        folder: where a kernel starts that is not running yet.
        setup: code that is executed before the first cell.
        kernel: runs on afterwards; a kernel of its own by default.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raises.
    """
    client = NotebookClient(
        new_notebook(cells=[new_code_cell(setup), *notebook.cells], metadata=notebook.metadata),
        km=kernel,
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    try:
        client.execute()
    finally:
        # The client of a kernel that runs on is left connected, which its collection some time later complains about.
        if kernel is not None and client.kc is not None:
            client.kc.stop_channels()


def clean_outputs(notebook: NotebookNode, folder: Path) -> None:
    """Remove from outputs what differs between two runs, or is large: progress bars, times, paths, colors of plots.

    Args:
        notebook: an executed notebook, which is changed.
        folder: where it was executed.
    """
    count = 0
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = [output for output in cell.outputs if clean_output(output, count, folder)]


def clean_output(output: NotebookNode, count: int, folder: Path) -> bool:
    """Clean one output; return whether anything is left of it."""
    if output.output_type == "stream":
        output.text = clean_text(output.text, folder)
        return bool(output.text.strip())
    if "execution_count" in output:
        output.execution_count = count
    data = output.get("data", {})
    data.pop("image/jpeg", None)
    if "image/png" in data:
        data["image/png"] = shrink_png(data["image/png"])
    if "text/plain" in data:
        data["text/plain"] = clean_text(data["text/plain"], folder)
    output.metadata = NotebookNode()
    return True


def clean_text(text: str, folder: Path) -> str:
    r"""Return text of an output without progress bars, times and the folder.

    Args:
        text: as a terminal would get it.
        folder: where it was written.

    Example:
        >>> clean_text(" 50%|#  |\r100%|###| 20/20\n16 images in 3.1 s\n/x/digits.png\n", Path("/x"))
        '16 images in ... s\ndigits.png\n'
    """
    lines = []
    for line in text.split("\n"):
        # A carriage return starts a line again; a line that only had a progress bar ends empty or with it.
        kept = line.rpartition("\r")[2]
        if not PROGRESS.search(kept) and (kept.strip() or "\r" not in line):
            lines.append(kept)
    return MEASUREMENT.sub(r"... \1", "\n".join(lines)).replace(f"{folder}/", "").replace(str(folder), ".")


def shrink_png(data: str) -> str:
    """Return a PNG, in base64, with few colors if it is large."""
    content = base64.b64decode(data)
    if len(content) > LARGE_PNG_BYTES:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(content)).convert("RGB").quantize(NUM_COLORS).save(buffer, "PNG", optimize=True)
        content = min(content, buffer.getvalue(), key=len)
    return base64.b64encode(content).decode()


def write_notebook(name: str, data: Path | None) -> None:
    """Execute the notebook of a page and write it.

    Args:
        name: of the notebook, a key of `PAGES`.
        data: a folder with mnist/train.parquet and mnist/test.parquet, which the page `publish` requires.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raises.
    """
    notebook = make_notebook(name)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "notebook").resolve()
        folder.mkdir()
        if data is not None:
            (folder / "mnist").symlink_to(data.resolve() / "mnist")
        # Commands are those of this interpreter; the user's settings of IPython do not count.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        os.environ["IPYTHONDIR"] = scratch
        execute(notebook, folder, SETUP)
        clean_outputs(notebook, folder)
    save(name, notebook)


def rewrite_prose(name: str) -> None:
    """Write the notebook of a page with the outputs that it has.

    Args:
        name: of the notebook, a key of `PAGES`.

    Raises:
        ValueError: if its code differs from that of the page.
    """
    notebook = make_notebook(name)
    code, previous = [
        [cell for cell in cells if cell.cell_type == "code"] for cells in (notebook.cells, read_notebook(name).cells)
    ]
    if [cell.source for cell in code] != [cell.source for cell in previous]:
        raise ValueError(f"the code of {name} differs from that of its page; it must be executed")
    for cell, earlier in zip(code, previous, strict=True):
        cell.outputs, cell.execution_count = earlier.outputs, earlier.execution_count
    save(name, notebook)


def save(name: str, notebook: NotebookNode) -> None:
    """Write a notebook into its file."""
    NOTEBOOKS.mkdir(exist_ok=True)
    nbformat.write(notebook, NOTEBOOKS / f"{name}.ipynb")
    print(f"notebooks/{name}.ipynb")


def sources(notebook: NotebookNode) -> list[tuple[str, str]]:
    """Return the kind and the source of each cell."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def read_notebook(name: str) -> NotebookNode:
    """Return the notebook of a page as it was written; one without cells if there is none."""
    path = NOTEBOOKS / f"{name}.ipynb"
    return nbformat.read(path, as_version=4) if path.exists() else new_notebook()


def differing(names: Sequence[str]) -> list[str]:
    """Return the notebooks whose cells are not those of their pages."""
    return [name for name in names if sources(read_notebook(name)) != sources(make_notebook(name))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check notebooks; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all by default: {', '.join(PAGES)}")
    parser.add_argument("--check", action="store_true", help="only report whose cells differ from their page")
    parser.add_argument("--prose", action="store_true", help="execute nothing: write what differs in its prose only")
    parser.add_argument("--data", type=Path, help="a folder with mnist/train.parquet and mnist/test.parquet")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - PAGES.keys():
        parser.error(f"NAME must be one of {', '.join(PAGES)}, got {', '.join(sorted(unknown))}")
    names = options.names or list(PAGES)
    if options.check:
        found = differing(names)
        for name in found:
            print(f"notebooks/{name}.ipynb differs from {PAGES[name].relative_to(ROOT)}")
        return bool(found)
    for name in names:
        if not options.prose:
            write_notebook(name, options.data)
        elif differing([name]):
            rewrite_prose(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
