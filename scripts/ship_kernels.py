"""Compile the kernels' object code that comes with the package, for each level of processors.

    python scripts/ship_kernels.py               # after a change of src/ddim/kernels
    python scripts/ship_kernels.py --out FOLDER  # elsewhere, to compare

Each kernel is compiled by a process of its own, whose bytes depend on nothing else. Any x86-64 machine with Linux can
do it: LLVM compiles for levels that the processor does not have.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from ddim.io.json_files import to_json
from ddim.kernels import conv_grad, direct, norm, objects, winograd
from ddim.kernels.machine import LEVEL_VARIABLE, LEVELS
from ddim.kernels.runtime import Kernel, compile_code, openmp_library

KERNELS = {kernel.name: kernel for package in (norm, winograd, direct, conv_grad) for kernel in package.KERNELS}
COMPILER = ("numba", "llvmlite")


def compile_one(kernel: Kernel, path: Path) -> None:
    """Compile a kernel for this process's level, and write its object code."""
    openmp_library()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compile_code(kernel))


def compile_in_process(name: str, level: str, folder: Path) -> Path:
    """Compile a kernel for a level in another process, and return the path of its object code."""
    path = folder / objects.path_of(name, level).relative_to(objects.FOLDER)
    # LLVM's passes run in `ddim.kernels.compiler` only; hashes of strings are those of every run.
    variables = {LEVEL_VARIABLE: level, "NUMBA_OPT": "0", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--kernel", name, "--path", path]
    subprocess.run(command, env=os.environ | variables, check=True)
    return path


def describe_compiler() -> dict[str, str]:
    """Return the versions of what compiles."""
    return {name: version(name) for name in COMPILER}


def main() -> None:
    """Compile all kernels for all levels."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=objects.FOLDER)
    parser.add_argument("--kernel", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kernel:
        compile_one(KERNELS[args.kernel], args.path)
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compile_in_process, name, level, args.out) for level in LEVELS for name in KERNELS]
        for job in jobs:
            print(job.result())
    described = {"sources_sha256": objects.sources_sha256(), **describe_compiler()}
    (args.out / objects.VERSIONS.name).write_text(to_json(described) + "\n")


if __name__ == "__main__":
    main()
