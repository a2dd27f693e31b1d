"""What numba compiles: the loops of this package as Python functions, and how they become object code.

    DOUBLE = np.dtype([("N", np.int64), ("x", np.int64)])

    def double(data):
        job = carray(data, 1)[0]
        x = array(job.x, job.N)
        first, last = share(job.N)
        for i in range(first, last):
            x[i] *= 2

    code = compile_loop(double, DOUBLE, "ddim_double")

Nothing here may need Python or numba when it runs: memory comes from C (`reserve`, `release`), errors are not raised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from ddim.kernels.runtime import THREAD, THREADS, target_machine

MATHS = {"contract", "nsz"}
"""What the compiler may do to sums and products: fuse them. Infinities and NaN keep their meaning."""
SETTINGS: dict[str, Any] = {
    "fastmath": MATHS,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
ALIGNMENT = 64
EXTERNAL = {THREAD, THREADS, "aligned_alloc", "free", "memset", "memcpy", "memmove", "sqrt", "floorf"}
"""What object code may call."""

part = numba.njit(**SETTINGS)
"""Decorates functions that loops call."""
inlined = numba.njit(inline="always", **SETTINGS)
"""Decorates those that become part of the loop."""

thread = types.ExternalFunction(THREAD, types.int32())
threads = types.ExternalFunction(THREADS, types.int32())
_aligned_alloc = types.ExternalFunction("aligned_alloc", types.int64(types.int64, types.int64))
_free = types.ExternalFunction("free", types.void(types.int64))


@inlined
def share(N: int) -> Any:
    """The first of N pieces of work that this thread does, and the one after its last."""
    i, n = np.int64(thread()), np.int64(threads())
    return N * i // n, N * (i + 1) // n


@inlined
def reserve(floats: int) -> Any:
    """The address of memory for so many float32 numbers, at a cache line, to be given to `release`."""
    return _aligned_alloc(np.int64(ALIGNMENT), (4 * floats + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT)


@inlined
def release(address: int) -> None:
    """Give memory back."""
    _free(address)


@intrinsic
def pointer(typing_context: Any, x: Any) -> Any:
    """A pointer to the first number of an array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.make_array(signature.args[0])(context, builder, arguments[0]).data

    return types.CPointer(x.dtype)(x), generate


def _pointer_to(number: Any) -> Any:
    @intrinsic
    def at(typing_context: Any, address: Any) -> Any:
        """int64 to a pointer."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(number)(types.int64), generate

    return at


singles, _doubles, _integers = map(_pointer_to, (types.float32, types.float64, types.int64))


@inlined
def array(address: int, shape: Any) -> Any:
    """The contiguous float32 array of that shape at an address."""
    return numba.carray(singles(address), shape)


@inlined
def doubles(address: int, shape: Any) -> Any:
    """The same of float64."""
    return numba.carray(_doubles(address), shape)


@inlined
def integers(address: int, shape: Any) -> Any:
    """The same of int64."""
    return numba.carray(_integers(address), shape)


def compile_loop(function: Callable[..., None], job: np.dtype[Any], name: str) -> bytes:
    """Object code for this machine, with one function `void name(record *)`.

    Raises:
        RuntimeError: if it would call what is not there when it runs.
    """
    signature = types.void(types.CPointer(numba.from_dtype(job)))
    compiled = numba.njit(signature, **SETTINGS)(function)
    (result,) = compiled.overloads.values()
    library = result.library
    inner = result.fndesc.llvm_func_name
    module = llvm.parse_bitcode(library._final_module.as_bitcode())
    # numba's functions return a status and take places for a result and an error.
    module.link_in(
        llvm.parse_assembly(
            f"""
            declare i32 @"{inner}"(ptr, ptr, ptr)
            define void @{name}(ptr %data) {{
                %result = alloca ptr
                %error = alloca ptr
                %status = call i32 @"{inner}"(ptr %result, ptr %error, ptr %data)
                ret void
            }}
            """
        )
    )
    machine = target_machine()
    for function_ in module.functions:
        if not function_.is_declaration and function_.name != name:
            function_.linkage = "internal"
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    for _ in range(2):
        passes.getModulePassManager().run(module, passes)
    outside = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")}
    if unknown := outside - EXTERNAL:
        raise RuntimeError(f"{name} calls {', '.join(sorted(unknown))}, which is not there without numba")
    code: bytes = machine.emit_object(module)
    return code
