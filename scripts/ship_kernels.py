"""Compile the kernels that come with the package: a shared library for each level of processors.

    python scripts/ship_kernels.py               # after a change of src/ddim/kernels
    python scripts/ship_kernels.py --out FOLDER  # elsewhere, to compare

Each kernel is compiled by a process of its own, whose bytes depend on nothing else. Any x86-64 machine with Linux and a
C compiler, which links, can do it: LLVM compiles for levels that the processor does not have.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from ddim.io.json_files import to_json
from ddim.kernels import conv_grad, direct, norm, shipped, winograd
from ddim.kernels.machine import LEVEL_VARIABLE, LEVELS
from ddim.kernels.runtime import Kernel, compile_code

KERNELS = {kernel.name: kernel for package in (norm, winograd, direct, conv_grad) for kernel in package.KERNELS}
COMPILER = ("numba", "llvmlite")
# Of the C library and its mathematics, nothing of the C compiler's own; no table of what is inside.
LINK = ("cc", "-shared", "-nostartfiles", "-s", "-Wl,--build-id=none,--hash-style=gnu,-z,now,-z,noexecstack", "-o")


def compile_one(kernel: Kernel, path: Path) -> None:
    """Compile a kernel for this process's level, and write its object code."""
    path.write_bytes(compile_code(kernel))


def compile_in_process(name: str, level: str, folder: Path) -> Path:
    """Compile a kernel for a level in another process, and return the path of its object code."""
    path = folder / f"{level}-{name}.o"
    # LLVM's passes run in `ddim.kernels.compiler` only; hashes of strings are those of every run.
    variables = {LEVEL_VARIABLE: level, "NUMBA_OPT": "0", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--kernel", name, "--path", path]
    subprocess.run(command, env=os.environ | variables, check=True)
    return path


def link(objects: Sequence[Path], path: Path) -> None:
    """Link object code to a shared library."""
    subprocess.run([*LINK, path, *objects, "-lm"], check=True)


def describe_compiler() -> dict[str, str]:
    """Return the versions of what compiles."""
    return {name: version(name) for name in COMPILER}


def sha256(path: Path) -> str:
    """Return the hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Compile all kernels for all levels."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=shipped.FOLDER)
    parser.add_argument("--kernel", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kernel:
        compile_one(KERNELS[args.kernel], args.path)
        return
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            level: [pool.submit(compile_in_process, name, level, Path(folder)) for name in KERNELS] for level in LEVELS
        }
        files = {level: [job.result() for job in of_level] for level, of_level in jobs.items()}
        for level, objects in files.items():
            link(objects, args.out / shipped.path_of(level).name)
        hashes = {path.stem: sha256(path) for objects in files.values() for path in objects}
    described = {"sources_sha256": shipped.sources_sha256(), **describe_compiler(), "objects_sha256": hashes}
    (args.out / shipped.VERSIONS.name).write_text(to_json(described) + "\n")


if __name__ == "__main__":
    main()
