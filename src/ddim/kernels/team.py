"""Compiled loops on PyTorch's own threads.

PyTorch's operations run on a team of OpenMP threads, which spin for a while after each operation, waiting for the next.
Threads of another pool would have to share the cores with them. A kernel here is called by that very team: `run` hands
its address to `GOMP_parallel`, as compilers do for `#pragma omp parallel`, and each thread does its `share` of the
work. Where PyTorch has no such team, the calling thread does all of it.

A kernel takes a pointer to one record of sizes and of addresses of float32 arrays:

    DOUBLE = np.dtype([("N", np.int64), ("x", np.int64)])

    @kernel(DOUBLE)
    def double(data):
        job = carray(data, 1)[0]
        x = array(job.x, job.N)
        first, last = share(job.N)
        for i in range(first, last):
            x[i] *= 2

    run(double, DOUBLE, N=x.numel(), x=x)

Compiled code is kept in the user's cache folder, or in `NUMBA_CACHE_DIR`; where nothing can be kept, each process
compiles anew.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from ddim.files import cache_folder

MATHS = {"contract", "nsz"}
"""What the compiler may do to sums and products: fuse them. Infinities and NaN keep their meaning."""


THREAD, THREADS = "ddim_thread", "ddim_threads"
"""The names under which kernels find `omp_get_thread_num` and `omp_get_num_threads`."""


def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that PyTorch runs on, if it is one that can be asked for a team."""
    try:
        library = ctypes.CDLL(None)
        for symbol, name in ((THREAD, "omp_get_thread_num"), (THREADS, "omp_get_num_threads")):
            llvmlite.binding.add_symbol(symbol, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
        library.GOMP_parallel.restype = None
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    except (AttributeError, OSError, TypeError):
        return None
    return library


_library = _openmp()
if _library is None:
    # The only thread is the first.
    _numbers = [numba.cfunc(types.int32())(number) for number in (lambda: 0, lambda: 1)]
    for _symbol, _number in zip((THREAD, THREADS), _numbers, strict=True):
        llvmlite.binding.add_symbol(_symbol, _number.address)
thread = types.ExternalFunction(THREAD, types.int32())
"""In a kernel: this thread's number."""
threads = types.ExternalFunction(THREADS, types.int32())
"""In a kernel: how many threads run it."""


@numba.njit(inline="always")
def share(N: int) -> Any:
    """In a kernel: the first of N pieces of work that this thread does, and the one after its last."""
    part, parts = np.int64(thread()), np.int64(threads())
    return N * part // parts, N * (part + 1) // parts


@intrinsic
def pointer(typing_context: Any, x: Any) -> Any:
    """In a kernel: a pointer to the first number of a float32 array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.make_array(signature.args[0])(context, builder, arguments[0]).data

    return types.CPointer(types.float32)(x), generate


@intrinsic
def _at(typing_context: Any, address: Any) -> Any:
    """int64 to a pointer to float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), generate


@numba.njit(inline="always")
def array(address: int, shape: Any) -> Any:
    """In a kernel: the contiguous float32 array of that shape at an address."""
    return numba.carray(_at(address), shape)


def kernel(job: np.dtype[Any]) -> Callable[[Callable[..., None]], Any]:
    """Compile a function of a pointer to a `job` record; what comes has an `address`."""
    signature = types.void(types.CPointer(numba.from_dtype(job)))

    def compile_(function: Callable[..., None]) -> Any:
        settings = {"nopython": True, "fastmath": MATHS, "error_model": "numpy"}
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(Path(before or cache_folder() / "kernels") / _sources())
        try:
            return numba.cfunc(signature, cache=True, **settings)(function)
        except RuntimeError:
            return numba.cfunc(signature, **settings)(function)
        finally:
            numba.config.CACHE_DIR = before

    return compile_


def run(compiled: Any, job: np.dtype[Any], **values: Tensor | float) -> None:
    """Call a kernel on every thread and wait for all.

    Args:
        compiled: the kernel.
        job: its record's type.
        values: the record's fields; of a tensor, which must be float32 and contiguous in the order that the kernel
            thinks, the address.
    """
    record = np.zeros(1, job)
    for name, value in values.items():
        record[name] = value.data_ptr() if isinstance(value, Tensor) else value
    if _library is None:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)(record.ctypes.data)
    else:
        _library.GOMP_parallel(compiled.address, record.ctypes.data, torch.get_num_threads(), 0)


def _sources() -> str:
    """A hash of the code of all kernels: compiled code of any other is not used."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
