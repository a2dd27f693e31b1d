"""Where compiled kernels are kept, and how they run.

PyTorch's CPU operators run on an OpenMP thread pool whose threads busy-wait between operators, so a second pool would
oversubscribe the cores. Kernels therefore run on PyTorch's own pool: their address is passed to `GOMP_parallel`, as a
compiler does for `#pragma omp parallel`, and each thread does its range of the work. Without a GNU OpenMP runtime they
run on the calling thread.

Compiled code comes with the package, for the common processors (`ddim.kernels.shipped`). Loading it takes neither
numba nor llvmlite. For other processors, and changed sources, numba compiles a kernel from
`ddim.kernels.<folder>.source` once per machine, to object code that LLVM loads. That is kept in the user's cache
folder, or in `DDIM_KERNEL_CACHE`, under a hash of the sources, the compiler and the processor (`ddim.io.cache`). Where
nothing can be kept, each process compiles anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim.io.cache import Cache
from ddim.kernels import shipped
from ddim.kernels.machine import THREAD_COUNT_SYMBOL, THREAD_SYMBOL, describe_machine, target_machine
from ddim.kernels.record import Field, Record

logger = logging.getLogger(__name__)

MAX_COMPILERS = 4
"""Processes that compile at the same time; there are about as many kernels."""

_execution_engines: list[Any] = []
"""Own the code that LLVM has loaded."""


class Kernel:
    """A compiled kernel.

    Args:
        folder: the package in `ddim.kernels` whose module `source` has the function.
        function: the function's name there.
        fields: of the record that it takes.

    Example:
        >>> from ddim.kernels.record import Count
        >>> Kernel("norm", "forward", [Count("N")]).name
        'norm.forward'
    """

    def __init__(self, folder: str, function: str, fields: Sequence[Field]) -> None:
        self.folder, self.function = folder, function
        self.record = Record(fields)

    @property
    def name(self) -> str:
        """The folder and the function."""
        return f"{self.folder}.{self.function}"

    @property
    def symbol(self) -> str:
        """The name of the function in the compiled code."""
        return f"ddim_{self.folder}_{self.function}"

    @property
    def entry(self) -> str:
        """The name of the object code in the cache."""
        return f"{_code_version()}/{self.name}.o"

    @functools.cached_property
    def address(self) -> int:
        """The address of the code, which is loaded on first use, and compiled before where it does not come along.

        Raises:
            ImportError: if it has to be compiled and numba or llvmlite is not installed.
        """
        if (address := shipped.find(self.symbol)) is not None:
            return address
        cached = kernel_cache().read(self.entry, lambda content: _load(content.tobytes(), self.symbol))
        return _load(compile_code(self), self.symbol) if cached is None else cached

    @property
    def is_loaded(self) -> bool:
        """Whether `address` is known."""
        return "address" in vars(self)

    def __call__(self, **values: Tensor | float) -> None:
        """Run the kernel on every thread and wait for all.

        Args:
            values: the record's fields. A tensor must be float32 and contiguous in the order that the kernel documents:
                the kernel gets only its address.
        """
        record = self.record.pack(values)
        # The record lives until all threads have returned; `GOMP_parallel` waits for them.
        library = openmp_library()
        if library is None:
            ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self.address)(record)
        else:
            # With as many threads as PyTorch's operators: another number would resize the pool at each call.
            library.GOMP_parallel(self.address, record, torch.get_num_threads(), 0)


def ensure_compiled(*kernels: Kernel) -> None:
    """Compile and load kernels; several that have to be compiled, in parallel processes.

    Args:
        kernels: those that will run.

    Raises:
        ImportError: if one has to be compiled and numba or llvmlite is not installed.
    """
    cache = kernel_cache()
    to_load = [kernel for kernel in kernels if not kernel.is_loaded and shipped.find(kernel.symbol) is None]
    missing = [kernel for kernel in to_load if not cache.exists(kernel.entry)]
    # One alone is compiled here: a process would import numba all the same.
    if len(missing) > 1 and cache.is_usable(missing[0].entry):
        _compile_in_processes(missing)
    for kernel in kernels:
        kernel.address  # noqa: B018 - loads


def kernel_cache() -> Cache:
    """Return the cache of object code: `DDIM_KERNEL_CACHE`, or a folder of the user's cache folder.

    Example:
        >>> kernel_cache().kind
        'kernels'
    """
    given = os.environ.get("DDIM_KERNEL_CACHE")
    return Cache("kernels", Path(given) if given else None)


def _compile_in_processes(kernels: Sequence[Kernel]) -> None:
    """Compile kernels into the cache in other processes.

    They set `NUMBA_OPT=0`, which is quicker, since LLVM's passes then run in `ddim.kernels.compiler` only; in this
    process it would slow down other users of numba. What fails there is compiled here on first use, or raises here with
    its reason.
    """
    # In an embedded interpreter there is nothing to run this package with.
    if not Path(sys.executable or "").stem.startswith("python"):
        return
    logger.info("compiling %d kernels, once per machine", len(kernels))
    num_processes = min(len(kernels), os.cpu_count() or 1, MAX_COMPILERS)
    names = [kernel.name for kernel in kernels]
    environment = os.environ | {"NUMBA_OPT": "0", "OMP_NUM_THREADS": "1"}
    # Leaving the stack waits for the processes.
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        for rank in range(num_processes):
            command = [sys.executable, "-m", "ddim.kernels", *names[rank::num_processes]]
            devnull = subprocess.DEVNULL
            stack.enter_context(subprocess.Popen(command, env=environment, stdout=devnull, stderr=devnull))


@functools.cache
def openmp_library() -> ctypes.CDLL | None:
    """Return the OpenMP library that PyTorch runs on.

    Returns:
        The library; `None` if it has no `GOMP_parallel`, so that kernels run on the calling thread.
    """
    try:
        # The symbols that this process has loaded already, PyTorch's OpenMP library among them.
        library = ctypes.CDLL(None)
        for symbol in (THREAD_SYMBOL, THREAD_COUNT_SYMBOL):
            getattr(library, symbol)
        library.GOMP_parallel.restype = None
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    except (AttributeError, OSError, TypeError):
        return None
    return library


# What kernels call without an OpenMP library: the calling thread is number 0, of 1.
_return_0, _return_1 = (ctypes.CFUNCTYPE(ctypes.c_int32)(number) for number in (lambda: 0, lambda: 1))


def compile_code(kernel: Kernel) -> bytes:
    """Compile a kernel, and keep its object code in the cache.

    Args:
        kernel: the kernel.

    Returns:
        The object code.

    Raises:
        ImportError: if numba is not installed.
    """
    logger.info("compiling %s, once per machine", kernel.name)
    # By name: sources and the compiler need numba, running a compiled kernel does not.
    source = importlib.import_module(f"ddim.kernels.{kernel.folder}.source")
    compiler = importlib.import_module("ddim.kernels.compiler")
    code: bytes = compiler.compile_kernel(getattr(source, kernel.function), kernel.record.dtype, kernel.symbol)
    kernel_cache().write(kernel.entry, [code])
    return code


@functools.cache
def _code_version() -> str:
    """Return a hash of everything that the code depends on: the sources, the compiler, the processor."""
    try:
        compiler = version("numba")
    except PackageNotFoundError:
        compiler = "none"
    return hashlib.sha256(f"{compiler} {describe_machine()} {shipped.sources_sha256()}".encode()).hexdigest()[:16]


def _load(code: bytes, symbol: str) -> int:
    """Load object code, and return the address of a function in it.

    Raises:
        ImportError: if llvmlite is not installed.
        ValueError: if it is not an object file, or has no such function.
    """
    import llvmlite.binding as llvm

    library = openmp_library()
    for name, number in ((THREAD_SYMBOL, _return_0), (THREAD_COUNT_SYMBOL, _return_1)):
        function = number if library is None else getattr(library, name)
        llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    # LLVM ends the process where it is given no object file, and so would a call of the address 0.
    if not (object_file := llvm.ObjectFileRef.from_data(code)):
        raise ValueError("it is not an object file")
    # An empty module makes the engine; the object file brings the code.
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
    engine.add_object_file(object_file)
    engine.finalize_object()
    if not (address := int(engine.get_function_address(symbol))):
        raise ValueError(f"it has no function {symbol}")
    _execution_engines.append(engine)
    return address
