"""Build the packages and try them as a user who has nothing else: `make release`.

    python scripts/check_release.py                       # build into dist/, check, install, run
    python scripts/check_release.py --python python3.13   # with another interpreter
    python scripts/check_release.py --dist dist           # packages that were built before

Both packages are built, the wheel from the sdist, so that neither depends on the checkout. The wheel is installed into
an empty virtual environment with all that the pages use, and there, in an empty folder,

- README's five lines run,
- the snippets of README and the notebooks of `docs/start.md` and of the tutorials run, on small networks
  (`tests/docs_runner.py`),
- `ddim app` starts, and samples by its endpoint,
- `mypy --strict` checks a client's program (`tests/typed_client.py`).

Every Python process of the environment ends with an error when it opens a file of the checkout (an audit hook), so that
nothing can pass because the checkout is there.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_WHEEL_MB = 25
EXTRAS = "app,export,train"
TOOLS = (
    *("mypy", "types-PyYAML", "types-psutil", "types-tqdm", "pytest", "ipykernel", "nbclient", "nbformat"),
    "gradio_client",
)
"""What the checks require beside the package."""
PAGES = "(test_snippets_run_in_order and README.md) or test_notebook_runs"
"""Which tests run the pages, as an expression of pytest."""
PROJECT_FILES = ("Makefile", "pyproject.toml", "constraints.txt", "scripts/notebooks.py")
NEEDED_FILES = ("ddim/py.typed", "ddim/models/mnist/unet/", "ddim/models/faces/LICENSE", "ddim/training/presets/")
"""Beginnings of paths without which a wheel is incomplete."""
GUARD = """import sys
def forbid(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith({root!r}):
        print("reads from the checkout:", arguments[0], file=sys.stderr, flush=True)
        raise PermissionError(arguments[0])
sys.addaudithook(forbid)
"""
FIVE_LINES = re.compile(r"^Five lines of Python:\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def build(dist: Path) -> None:
    """Build the sdist, and the wheel from it, into a folder."""
    shutil.rmtree(dist, ignore_errors=True)
    run([sys.executable, "-m", "build", "--outdir", dist, ROOT], ROOT)


def check_wheel(wheel: Path) -> str:
    """Check what a wheel has.

    Args:
        wheel: its path.

    Returns:
        The version in its metadata.

    Raises:
        SystemExit: if it is too large, or lacks or has other files than it should.
    """
    megabytes = wheel.stat().st_size / 1e6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        version = email.message_from_bytes(archive.read(metadata))["Version"]
    expect(megabytes <= MAX_WHEEL_MB, f"{wheel.name} has {megabytes:.1f} MB, {MAX_WHEEL_MB} are allowed")
    for start in NEEDED_FILES:
        expect(any(name.startswith(start) for name in names), f"{wheel.name} has no {start}")
    strange = [name for name in names if not re.match(r"ddim/|ddim-[^/]+\.dist-info/", name)]
    expect(not strange, f"{wheel.name} has {strange}")
    print(f"{wheel.name}: version {version}, {len(names)} files, {megabytes:.1f} MB")
    return str(version)


def make_environment(folder: Path, python: str, wheel: Path) -> dict[str, str]:
    """Install a wheel into an empty environment whose processes cannot open files of the checkout.

    Args:
        folder: where the environment is made.
        python: the interpreter.
        wheel: what is installed.

    Returns:
        The environment variables of its programs.
    """
    run([python, "-m", "venv", folder], folder.parent)
    # pip builds nothing here and may read the constraints, hence before the guard.
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraints = ["--constraint", ROOT / "constraints.txt"]
    run([*pip, *constraints, f"{wheel}[{EXTRAS}]", *TOOLS], folder.parent)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "guard.py").write_text(GUARD.format(root=f"{ROOT}{os.sep}"))
    (packages / "guard.pth").write_text("import guard\n")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    home = {"HOME": f"{folder.parent}/home", "XDG_CACHE_HOME": f"{folder.parent}/cache"}
    return kept | home | {"PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(folder)}


def check_guard(folder: Path, environment: Mapping[str, str]) -> None:
    """Check that the environment has the wheel's package, and that the guard works."""
    where = run(["python", "-c", "import ddim; print(ddim.__file__)"], folder, environment, subprocess.PIPE)
    expect(where.startswith(environment["VIRTUAL_ENV"]), f"ddim was imported from {where}")
    forbidden = ["python", "-c", f"open({str(ROOT / 'README.md')!r})"]
    done = subprocess.run(forbidden, cwd=folder, env=environment, capture_output=True)
    expect(done.returncode != 0, "the checkout can be read")


def check_five_lines(folder: Path, environment: Mapping[str, str]) -> None:
    """Run README's five lines."""
    match = FIVE_LINES.search((ROOT / "README.md").read_text())
    expect(match is not None, "README.md has no five lines")
    assert match
    run(["python", "-c", match[1]], folder, environment)
    expect((folder / "digit.png").is_file(), "the five lines wrote no digit.png")


def check_pages(folder: Path, environment: Mapping[str, str]) -> None:
    """Run the snippets of the pages, from a copy of the pages, the notebooks and the tests alone."""
    (folder / "scripts").mkdir()
    for name in ("docs", "notebooks", "tests", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", *PROJECT_FILES):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, folder / name)
    tests = ["tests/test_docs.py", "tests/test_notebooks.py"]
    settings = ["--override-ini=testpaths=tests", "--override-ini=pythonpath=tests scripts"]
    run(["python", "-m", "pytest", *tests, *settings, "-k", PAGES], folder, environment)


def check_page_server(folder: Path, environment: Mapping[str, str]) -> None:
    """Start `ddim app`, sample by its endpoint, and stop it."""
    server = subprocess.Popen(
        ["ddim", "app", "--port", "0"], cwd=folder, env=dict(environment), stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout
        address = next((found[0] for line in server.stdout if (found := re.search(r"http://[\d.]+:\d+", line))), None)
        expect(address is not None, "ddim app printed no address")
        client = (
            "import sys; from gradio_client import Client; "
            "print(Client(sys.argv[1], verbose=False).predict(api_name='/sample', steps=2, count=2))"
        )
        run(["python", "-c", client, str(address)], folder, environment)
    finally:
        server.terminate()
        server.wait(30)


def check_types(folder: Path, environment: Mapping[str, str]) -> None:
    """Check a client's program by `mypy --strict`."""
    shutil.copyfile(ROOT / "tests/typed_client.py", folder / "client.py")
    run(["python", "-m", "mypy", "--strict", "client.py"], folder, environment)


def run(
    command: Sequence[str | Path],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    stdout: int | None = None,
) -> str:
    """Run a command in a folder; end the program where it fails.

    Args:
        command: the program and its arguments.
        folder: where it runs.
        environment: its variables, whose PATH leads to the program; those of this process by default.
        stdout: `subprocess.PIPE` to return what it prints; nothing is returned, and all printed, by default.
    """
    print("+", *command, flush=True)
    program = command[0] if environment is None else shutil.which(str(command[0]), path=environment["PATH"])
    environment = None if environment is None else dict(environment)
    done = subprocess.run([str(program), *command[1:]], cwd=folder, env=environment, stdout=stdout, text=True)
    expect(done.returncode == 0, f"failed with status {done.returncode}")
    return done.stdout or ""


def expect(condition: bool, message: str) -> None:
    """End the program with a message where something is not as it should be."""
    if not condition:
        sys.exit(f"check_release: {message}")


def main() -> None:
    """Build and check."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter of the empty environment")
    parser.add_argument("--dist", type=Path, help="folder of packages that were built before")
    arguments = parser.parse_args()
    dist = arguments.dist or ROOT / "dist"
    if arguments.dist is None:
        build(dist)
    (wheel,) = dist.resolve().glob("*.whl")
    check_wheel(wheel)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        environment = make_environment(folder / "environment", arguments.python, wheel)
        for check in (check_guard, check_five_lines, check_page_server, check_types, check_pages):
            empty = folder / check.__name__
            empty.mkdir()
            check(empty, environment)
    print(f"{wheel.name} works on its own")


if __name__ == "__main__":
    main()
