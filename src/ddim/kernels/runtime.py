"""Compiled loops: where they are kept, and how they run on PyTorch's own threads.

PyTorch's operations run on a team of OpenMP threads, which spin for a while after each operation, waiting for the next.
Threads of another pool would have to share the cores with them. A loop here is called by that very team: its address is
handed to `GOMP_parallel`, as compilers do for `#pragma omp parallel`, and each thread does its share of the work. Where
PyTorch has no such team, the calling thread does all of it.

A loop takes a pointer to one record of sizes and of addresses of float32 arrays. numba compiles it from the functions
in `ddim.kernels.source`, once for a machine: the object code is kept in the user's cache folder, or in
`DDIM_KERNEL_CACHE`, by a hash of the sources, the compiler and the processor. Loading it takes llvmlite and some
milliseconds, without numba. Where nothing can be kept, each process compiles anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import logging
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from torch import Tensor

from ddim.io.atomic import atomic_write
from ddim.io.cache import cache_folder

logger = logging.getLogger(__name__)

WIDE = bool(llvm.get_host_cpu_features().get("avx512f"))
"""Whether the processor has 32 registers of 16 numbers each, not 16 of 8."""
LANES = 32 if WIDE else 16
"""Output channels of a product's tile: as many as two registers hold."""

THREAD, THREADS = "ddim_thread", "ddim_threads"
"""The names under which loops find the number of the thread that runs them, and how many there are."""


class Loop:
    """A compiled loop.

    Args:
        source: the module of `ddim.kernels.source` that has it.
        name: of the function there.
        job: the record that it takes.
    """

    def __init__(self, source: str, name: str, job: np.dtype[Any]) -> None:
        self.source, self.name, self.job = source, name, job
        self._names = job.names or ()
        self._record = struct.Struct("".join(job[name].char for name in self._names))

    @functools.cached_property
    def address(self) -> int:
        """Of the code, compiled or loaded at the first look.

        Raises:
            ImportError: if it has to be compiled and there is no numba.
        """
        _team()
        return _load(_object_code(self), f"ddim_{self.name}")

    def __call__(self, **values: Tensor | float) -> None:
        """Run it on every thread and wait for all.

        Args:
            values: the record's fields; of a tensor, which must be float32 and contiguous in the order that the loop
                thinks, the address.
        """
        ordered = [values[name] for name in self._names]
        record = self._record.pack(*[x.data_ptr() if isinstance(x, Tensor) else x for x in ordered])
        library = _team()
        if library is None:
            ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self.address)(record)
        else:
            library.GOMP_parallel(self.address, record, torch.get_num_threads(), 0)


def ready(*loops: Loop) -> None:
    """See to it that these can run; ImportError as `Loop.address`."""
    missing = [loop for loop in loops if "address" not in vars(loop) and not _path(loop).exists()]
    if len(missing) > 1 and _can_keep(missing[0]):
        _compile_apart(missing)
    for loop in loops:
        loop.address  # noqa: B018 - loads


def _can_keep(loop: Loop) -> bool:
    try:
        _path(loop).parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(_path(loop).parent, os.W_OK)


def _compile_apart(loops: Sequence[Loop]) -> None:
    """Compile in other processes, side by side, and there with settings of numba's that are quick and not for others.

    What fails there is compiled here when it is asked for, or fails with its reason.
    """
    if not Path(sys.executable or "").stem.startswith("python"):
        return
    logger.info("compiling %d loops, once for this machine", len(loops))
    number = min(len(loops), os.cpu_count() or 1, 4)
    command = [sys.executable, "-m", "ddim.kernels.source"]
    names = [f"{loop.source}.{loop.name}" for loop in loops]
    environment = os.environ | {"NUMBA_OPT": "0", "OMP_NUM_THREADS": "1"}
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        for turn in range(number):
            arguments = [*command, *names[turn::number]]
            nothing = subprocess.DEVNULL
            stack.enter_context(subprocess.Popen(arguments, env=environment, stdout=nothing, stderr=nothing))


@functools.cache
def _team() -> ctypes.CDLL | None:
    """The OpenMP library that PyTorch runs on, if it is one that can be asked for a team; what loops call is bound."""
    try:
        library = ctypes.CDLL(None)
        for symbol, name in ((THREAD, "omp_get_thread_num"), (THREADS, "omp_get_num_threads")):
            llvm.add_symbol(symbol, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
        library.GOMP_parallel.restype = None
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    except (AttributeError, OSError, TypeError):
        for symbol, number in ((THREAD, _FIRST), (THREADS, _ONE)):
            llvm.add_symbol(symbol, ctypes.cast(number, ctypes.c_void_p).value)
        return None
    return library


_FIRST, _ONE = (ctypes.CFUNCTYPE(ctypes.c_int32)(number) for number in (lambda: 0, lambda: 1))
"""What a loop without a team is told: it is the first thread, of one."""


def _path(loop: Loop) -> Path:
    """Where its code is kept."""
    folder = Path(os.environ.get("DDIM_KERNEL_CACHE") or cache_folder() / "kernels")
    return folder / _machine() / f"{loop.name}.o"


def _object_code(loop: Loop) -> bytes:
    """Kept, or else compiled and kept."""
    path = _path(loop)
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            return content[32:]
    logger.info("compiling %s, once for this machine", loop.name)
    source = importlib.import_module(f"ddim.kernels.source.{loop.source}")
    code: bytes = importlib.import_module("ddim.kernels.source").compile_loop(
        getattr(source, loop.name), loop.job, f"ddim_{loop.name}"
    )
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_bytes(hashlib.sha256(code).digest() + code)
    return code


@functools.cache
def _machine() -> str:
    """A hash of all that the code depends on."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    try:
        compiler = version("numba")
    except PackageNotFoundError:
        compiler = "none"
    features = llvm.get_host_cpu_features().flatten()
    known = f"{compiler} {llvm.llvm_version_info} {llvm.get_host_cpu_name()} {features}".encode()
    return hashlib.sha256(known + b"".join(file.read_bytes() for file in sources)).hexdigest()[:16]


def target_machine() -> Any:
    """For LLVM: this processor, with all that it can do."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        codemodel="jitdefault",
        jit=True,
    )


_engines: list[Any] = []
"""Own the code that has been loaded."""


def _load(code: bytes, name: str) -> int:
    """The address of a function in object code."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(name))
