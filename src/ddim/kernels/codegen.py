"""What kernels are written with.

A kernel is a Python function of a pointer to its record. numba compiles its control flow, and what numba's own loops
cannot express, such as sums that stay in vector registers, is LLVM code that an intrinsic builds with `Code`.

    def double(data):
        args = carray(data, 1)[0]
        x = float_array(args.x, args.N)
        first, last = thread_range(args.N)
        for i in range(first, last):
            x[i] *= 2

    code = compile_kernel(double, Record([Count("N"), Pointer("x")]).dtype, "ddim_double")

Nothing here may need Python or numba when it runs: memory comes from C (`malloc`, `free`), and no error is raised.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ddim.kernels.machine import (
    CACHE_LINE_BYTES,
    CACHE_LINE_FLOATS,
    REGISTER_ROWS,
    THREAD_COUNT_SYMBOL,
    THREAD_SYMBOL,
)

# What the compiler may do to sums and products: fuse them. Infinities and NaN keep their meaning, sums their order:
# how it vectorizes cannot change a result.
FAST_MATH = ("contract", "nsz")

NUMBA_SETTINGS: dict[str, Any] = {
    "fastmath": set(FAST_MATH),
    # Division by zero gives inf or NaN and raises no error, which would need numba at run time.
    "error_model": "numpy",
    # Kernels are called by their address, not from Python: no wrappers.
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}

device_function = numba.njit(**NUMBA_SETTINGS)
"""Decorates functions that kernels call."""
inline_function = numba.njit(inline="always", **NUMBA_SETTINGS)
"""Decorates functions that numba copies into their callers."""

FLOAT, DOUBLE, INT32, INT64 = ir.FloatType(), ir.DoubleType(), ir.IntType(32), ir.IntType(64)

# How far ahead of their use weights are requested: about what a core reads in the time that memory takes to answer.
PREFETCH_BYTES = 4096
PREFETCH_READ, PREFETCH_KEEP, PREFETCH_DATA = 0, 3, 1
"""Arguments of LLVM's prefetch: for reading, into all levels of the cache, of data."""

_thread = types.ExternalFunction(THREAD_SYMBOL, types.int32())
_thread_count = types.ExternalFunction(THREAD_COUNT_SYMBOL, types.int32())
_aligned_alloc = types.ExternalFunction("aligned_alloc", types.int64(types.int64, types.int64))
_free = types.ExternalFunction("free", types.void(types.int64))


# Threads and memory.


@inline_function
def thread_range(N: int) -> Any:
    """Return the range of N pieces of work that this thread does: the first, and one past the last."""
    # Ranges of all threads together cover 0 to N, each number once, and differ in size by 1 at most.
    i, n = np.int64(_thread()), np.int64(_thread_count())
    return N * i // n, N * (i + 1) // n


@inline_function
def malloc(floats: int) -> Any:
    """Allocate scratch memory for float32 numbers at a cache line, and return its address; `free` releases it."""
    # aligned_alloc takes multiples of the alignment.
    size = (4 * floats + CACHE_LINE_BYTES - 1) // CACHE_LINE_BYTES * CACHE_LINE_BYTES
    return _aligned_alloc(np.int64(CACHE_LINE_BYTES), size)


@inline_function
def free(address: int) -> None:
    """Release memory of `malloc`."""
    _free(address)


# Arrays and pointers.


@intrinsic
def pointer(typing_context: Any, x: Any) -> Any:
    """Return a pointer to the first number of an array."""

    # An intrinsic returns its type, and the function that generates its code where it is called.
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.make_array(signature.args[0])(context, builder, arguments[0]).data

    return types.CPointer(x.dtype)(x), generate


def _make_pointer_cast(number: Any) -> Any:
    """Return an intrinsic that casts an address, an int64, to a pointer to such numbers."""

    @intrinsic
    def cast(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(number)(types.int64), generate

    return cast


as_float_pointer, as_double_pointer, as_int64_pointer = map(
    _make_pointer_cast, (types.float32, types.float64, types.int64)
)


@inline_function
def float_array(address: int, shape: Any) -> Any:
    """Return the contiguous float32 array of that shape at an address."""
    return numba.carray(as_float_pointer(address), shape)


@inline_function
def double_array(address: int, shape: Any) -> Any:
    """Return the contiguous float64 array of that shape at an address."""
    return numba.carray(as_double_pointer(address), shape)


@inline_function
def int64_array(address: int, shape: Any) -> Any:
    """Return the contiguous int64 array of that shape at an address."""
    return numba.carray(as_int64_pointer(address), shape)


# Vector code.


class Code:
    """A builder of code that works on vectors of float32 numbers.

    Pointers are to float32, offsets count numbers (`int`, or int64 values of LLVM). Vectors need not be aligned.

    Args:
        builder: LLVM's builder of the function that is being compiled.
        lanes: numbers per vector; LLVM splits what a register does not hold.
    """

    def __init__(self, builder: Any, lanes: int) -> None:
        self.builder, self.vector, self.lanes = builder, ir.VectorType(FLOAT, lanes), lanes
        self.zero = self.constant(0)

    # Addresses: pointers are opaque to LLVM, so that each step names its element type.

    def at(self, start: Any, *offsets: Any) -> Any:
        """Return the pointer that lies the sum of the offsets after `start`."""
        for offset in offsets:
            index = ir.Constant(INT64, offset) if isinstance(offset, int) else offset
            start = self.builder.gep(start, [index], source_etype=FLOAT)
        return start

    def multiply_index(self, a: Any, b: Any) -> Any:
        """Return the product of two int64 values, either of them an `int` or a value of LLVM."""
        a, b = (ir.Constant(INT64, number) if isinstance(number, int) else number for number in (a, b))
        return self.builder.mul(a, b)

    # Memory.

    def load(self, address: Any) -> Any:
        """Return the vector at an address."""
        # Aligned to one number only: unaligned loads that stay in a cache line cost the same.
        return self.builder.load(self.builder.bitcast(address, self.vector.as_pointer()), align=4, typ=self.vector)

    def store(self, value: Any, address: Any) -> None:
        """Write a vector to an address."""
        self.builder.store(value, self.builder.bitcast(address, self.vector.as_pointer()), align=4)

    def broadcast(self, address: Any) -> Any:
        """Return the number at an address in all lanes."""
        # LLVM makes one instruction of it, or an operand of the multiplication.
        number = self.builder.load(address, align=4, typ=FLOAT)
        first = self.builder.insert_element(ir.Constant(self.vector, ir.Undefined), number, ir.Constant(INT64, 0))
        return self.builder.shuffle_vector(
            first, first, ir.Constant(ir.VectorType(INT32, self.lanes), [0] * self.lanes)
        )

    def prefetch(self, address: Any) -> None:
        """Request the vector `PREFETCH_BYTES` after an address, one cache line at a time."""
        for line in range(0, self.lanes, CACHE_LINE_FLOATS):
            hints = (ir.Constant(INT32, hint) for hint in (PREFETCH_READ, PREFETCH_KEEP, PREFETCH_DATA))
            self._call("llvm.prefetch.p0", ir.VoidType(), self.at(address, PREFETCH_BYTES // 4 + line), *hints)

    # Arithmetic.

    def constant(self, value: Any) -> Any:
        """Return a number in all lanes."""
        return ir.Constant(self.vector, [float(value)] * self.lanes)

    def add(self, a: Any, b: Any) -> Any:
        """Return a + b."""
        return self.builder.fadd(a, b, flags=FAST_MATH)

    def subtract(self, a: Any, b: Any) -> Any:
        """Return a - b."""
        return self.builder.fsub(a, b, flags=FAST_MATH)

    def multiply(self, a: Any, b: Any) -> Any:
        """Return a b."""
        return self.builder.fmul(a, b, flags=FAST_MATH)

    def scale(self, a: Any, factor: float) -> Any:
        """Return a times a constant."""
        return self.multiply(a, self.constant(factor))

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """Return a b + c, which the compiler fuses."""
        return self.add(self.multiply(a, b), c)

    def floor(self, a: Any) -> Any:
        """Return the largest integers, as float32, that are not above a."""
        return self._call(f"llvm.floor.v{self.lanes}f32", self.vector, a)

    # Accumulators: variables that the compiler keeps in registers.

    def accumulator(self) -> Any:
        """Return a new variable that holds a vector of zeros."""
        # Allocated once, at the function's entry; LLVM then promotes it from the stack to registers.
        variable = cgutils.alloca_once(self.builder, self.vector)
        self.builder.store(self.zero, variable)
        return variable

    def value_of(self, accumulator: Any) -> Any:
        """Return the vector that an accumulator holds."""
        return self.builder.load(accumulator, typ=self.vector)

    def accumulate(self, accumulator: Any, value: Any) -> None:
        """Add a vector to an accumulator."""
        self.builder.store(self.add(self.value_of(accumulator), value), accumulator)

    def accumulate_product(self, accumulator: Any, a: Any, b: Any) -> None:
        """Add a b to an accumulator."""
        self.accumulate(accumulator, self.multiply(a, b))

    # Loops.

    def in_row_blocks(self, count: Any) -> Iterator[tuple[int, Any]]:
        """Generate loops that together pass once over `count` rows, at least 1, in blocks of nearly equal size.

        Blocks hold `REGISTER_ROWS` rows at most. Their sizes differ by 1 at most, so that no block is left with so few
        accumulators that it waits for each of its sums; for that there is code for every size, of which two run.

        Yields:
            The size of the loop's blocks (an `int`: the body is generated for it) and the first row (an int64 value).
        """
        zero = ir.Constant(INT64, 0)
        rounded_up = self.builder.add(count, ir.Constant(INT64, REGISTER_ROWS - 1))
        blocks = self.builder.udiv(rounded_up, ir.Constant(INT64, REGISTER_ROWS))
        # `larger` blocks of smaller_size + 1 rows, the other ones of smaller_size.
        smaller_size, larger = self.builder.udiv(count, blocks), self.builder.urem(count, blocks)
        first = zero
        # One loop per size of block. At most two of them run, and how often is known only at run time.
        for rows in range(REGISTER_ROWS, 0, -1):
            is_larger = self.builder.icmp_signed("==", smaller_size, ir.Constant(INT64, rows - 1))
            is_smaller = self.builder.icmp_signed("==", smaller_size, ir.Constant(INT64, rows))
            smaller = self.builder.select(is_smaller, self.builder.sub(blocks, larger), zero)
            repeats = self.builder.select(is_larger, larger, smaller)
            with cgutils.for_range(self.builder, repeats) as loop:
                yield rows, self.builder.add(first, self.multiply_index(loop.index, rows))
            first = self.builder.add(first, self.multiply_index(repeats, rows))

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        """Call one of LLVM's own functions."""
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)


def in_panels(builder: Any, C: Any, widths: tuple[int, ...]) -> Iterator[tuple[Code, Any]]:
    """Generate loops that together pass once over C channels, the widest panels first.

    Args:
        builder: LLVM's builder of the function that is being compiled.
        C: the number of channels, an int64 value.
        widths: channels per panel; each divides the one before it, and the last one divides C.

    Yields:
        The code builder of a panel's width, and the panel's first channel (an int64 value).
    """
    first = ir.Constant(INT64, 0)
    # What the wide panels leave is taken by the narrower ones.
    for lanes in widths:
        code = Code(builder, lanes)
        panels = builder.udiv(builder.sub(C, first), ir.Constant(INT64, lanes))
        with cgutils.for_range(builder, panels) as loop:
            yield code, builder.add(first, code.multiply_index(loop.index, lanes))
        first = builder.add(first, code.multiply_index(panels, lanes))


def unpack(builder: Any, values: Any) -> list[Any]:
    """Return the elements of a tuple that was passed to an intrinsic."""
    return list(cgutils.unpack_tuple(builder, values))
