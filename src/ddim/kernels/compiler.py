"""From a Python function to object code: numba makes LLVM's IR of it, LLVM optimizes that and emits the code.

Object code must run without Python and numba: it may call what `EXTERNAL` lists, which is bound when it is loaded
(threads) or part of the C library (memory, mathematics).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from numba import types

from ddim.kernels.codegen import NUMBA_SETTINGS
from ddim.kernels.machine import THREAD_COUNT_SYMBOL, THREAD_SYMBOL, target_machine

EXTERNAL = {
    *(THREAD_SYMBOL, THREAD_COUNT_SYMBOL),
    *("aligned_alloc", "free", "memset", "memcpy", "memmove", "sqrt", "floorf"),
}
"""The functions that object code may call."""


def compile_kernel(function: Callable[..., None], record: np.dtype[Any], symbol: str) -> bytes:
    """Compile a function for this machine.

    Args:
        function: takes a pointer to a record; written with `ddim.kernels.codegen`.
        record: the record's layout.
        symbol: the name of the function in the object code.

    Returns:
        Object code with one function, `void symbol(record *)`.

    Raises:
        RuntimeError: if it would call functions that exist only with numba, as errors that it raises do.
    """
    # From Python to LLVM's IR, specialized for a pointer to this record.
    signature = types.void(types.CPointer(numba.from_dtype(record)))
    compiled = numba.njit(signature, **NUMBA_SETTINGS)(function)
    # The signature is given, so that it is compiled here, once.
    (result,) = compiled.overloads.values()
    library = result.library
    inner = result.fndesc.llvm_func_name
    module = llvm.parse_bitcode(library._final_module.as_bitcode())
    # numba's functions return a status and take pointers to a result and an error: wrap them in a plain C function.
    module.link_in(
        llvm.parse_assembly(
            f"""
            declare i32 @"{inner}"(ptr, ptr, ptr)
            define void @{symbol}(ptr %data) {{
                %result = alloca ptr
                %error = alloca ptr
                %status = call i32 @"{inner}"(ptr %result, ptr %error, ptr %data)
                ret void
            }}
            """
        )
    )
    # All else becomes internal, so that LLVM inlines it and drops what is left.
    for value in (*module.functions, *module.global_variables):
        if not value.is_declaration and value.name != symbol:
            value.linkage = "internal"
    machine = target_machine()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    # A second round sees through what the first has inlined.
    for _ in range(2):
        passes.getModulePassManager().run(module, passes)
    called = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")}
    if unknown := called - EXTERNAL:
        raise RuntimeError(f"{symbol} calls functions that need numba at run time: {', '.join(sorted(unknown))}")
    # For this processor, with all of its instructions: the code is never copied to another machine's cache.
    code: bytes = machine.emit_object(module)
    return code
