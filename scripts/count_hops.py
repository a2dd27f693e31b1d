"""Count the files that one sample passes from the command line to the PNG.

    python scripts/count_hops.py [--engine eager] [--list] [--all]

A file counts if, while `ddim sample --count 1` runs, a function of it holds the sample or what is derived from it in a
variable or returns it: a tensor, an image, or a collection of them. Loading the model is not part of a sample's path.
`--all` counts every file of the package with a function that is called at all, loading included.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

import ddim
from ddim.cli import main

ROOT = Path(ddim.__file__).parent
LOADING = ("from_pretrained", "<module>")


def count_hops(engine: str, every_file: bool = False) -> list[str]:
    """Run `ddim sample` for one image and return the files of the package that the sample passes, sorted.

    Args:
        engine: `auto` or `eager`.
        every_file: count every file with a function that is called.
    """
    files: set[str] = set()
    paths: dict[str, str | None] = {}

    def profile(frame: FrameType, event: str, result: Any) -> None:
        name = frame.f_code.co_filename
        if name not in paths:
            path = Path(name)
            paths[name] = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else None
        file = paths[name]
        if event not in ("call", "return") or file is None:
            return
        if every_file:
            passes = not any(name == "<module>" for name in callers(frame))
        else:
            values = [*frame.f_locals.values(), result if event == "return" else None]
            passes = any(map(is_sample, values)) and not any(name in LOADING for name in callers(frame))
        if passes:
            files.add(file)

    with tempfile.TemporaryDirectory() as folder:
        arguments = ["ddim", "sample", "--count", "1", "--steps", "2", "--out", f"{folder}/x.png", "--engine", engine]
        # A run before the one that counts compiles kernels and imports modules.
        for profiler in (None, profile):
            sys.setprofile(profiler)
            try:
                run_command(arguments)
            finally:
                sys.setprofile(None)
    return sorted(files)


def run_command(arguments: list[str]) -> None:
    """Run a command of `ddim` in this process, silently; SystemExit if it fails.

    Args:
        arguments: as in `sys.argv`.
    """
    previous, sys.argv = sys.argv, arguments
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            main()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = previous


def callers(frame: FrameType) -> Iterator[str]:
    """Yield the names of a frame's function and of its callers, as far as they belong to the package.

    Args:
        frame: of the function.
    """
    current: FrameType | None = frame
    while current is not None:
        if Path(current.f_code.co_filename).is_relative_to(ROOT):
            yield current.f_code.co_name
        current = current.f_back


def is_sample(value: Any) -> bool:
    """Whether a value is an image, a tensor or array of two dimensions or more, or a collection or record of them.

    Schedules and timesteps, of one dimension, are not derived from a sample.

    Args:
        value: any object.
    """
    if isinstance(value, dict):
        return any(map(is_sample, value.values()))
    if isinstance(value, list | tuple):
        return any(map(is_sample, value[:2]))
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim >= 2
    return isinstance(value, Image.Image) or isinstance(getattr(value, "sample", None), Tensor)


def run() -> None:
    """Print the number of files, and with `--list` their names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("auto", "eager"), default="auto", help="the engine that samples")
    parser.add_argument("--list", action="store_true", help="print the files' names")
    parser.add_argument("--all", action="store_true", help="count every file with a function that is called")
    arguments = parser.parse_args()
    files = count_hops(arguments.engine, arguments.all)
    if arguments.list:
        print("\n".join(files))
    print(len(files))


if __name__ == "__main__":
    run()
