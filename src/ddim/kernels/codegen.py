"""Vector code for kernels: what numba's own loops cannot say, such as sums that stay in registers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from ddim.kernels.runtime import WIDE

SINGLE, INDEX = ir.FloatType(), ir.IntType(64)
FUSED = ("contract", "nsz")
"""What the compiler may do to sums and products: fuse them."""

ROWS = 9 if WIDE else 6
"""Sums over a panel of channels that the registers hold beside what is multiplied."""
LINE = 16
"""Numbers of a cache line."""
AHEAD = 4096
"""Bytes that weights are asked for before they are used: what memory takes to answer."""


class Code:
    """A builder of code that works on so many float32 numbers at a time.

    Pointers are to float32, distances are in numbers. Vectors need not be aligned.

    Args:
        builder: of the function that is being compiled.
        lanes: numbers a vector.
    """

    def __init__(self, builder: Any, lanes: int) -> None:
        self.builder, self.vector, self.lanes = builder, ir.VectorType(SINGLE, lanes), lanes
        self.zero = self.number(0)

    def at(self, start: Any, *distances: Any) -> Any:
        """The pointer so many numbers further."""
        for distance in distances:
            distance = ir.Constant(INDEX, distance) if isinstance(distance, int) else distance
            start = self.builder.gep(start, [distance], source_etype=SINGLE)
        return start

    def number(self, value: Any) -> Any:
        """It in all lanes."""
        return ir.Constant(self.vector, [float(value)] * self.lanes)

    def times(self, a: Any, b: Any) -> Any:
        a, b = (ir.Constant(INDEX, number) if isinstance(number, int) else number for number in (a, b))
        return self.builder.mul(a, b)

    def load(self, place: Any) -> Any:
        return self.builder.load(self.builder.bitcast(place, self.vector.as_pointer()), align=4, typ=self.vector)

    def store(self, value: Any, place: Any) -> None:
        self.builder.store(value, self.builder.bitcast(place, self.vector.as_pointer()), align=4)

    def splat(self, place: Any) -> Any:
        """The number there, in all lanes."""
        number = self.builder.load(place, align=4, typ=SINGLE)
        first = self.builder.insert_element(ir.Constant(self.vector, ir.Undefined), number, ir.Constant(INDEX, 0))
        return self.builder.shuffle_vector(
            first, first, ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        )

    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, flags=FUSED)

    def scale(self, a: Any, factor: float) -> Any:
        return self.builder.fmul(a, self.number(factor), flags=FUSED)

    def floor(self, a: Any) -> Any:
        return self._call(f"llvm.floor.v{self.lanes}f32", self.vector, a)

    def fused(self, a: Any, factor: Any, b: Any) -> Any:
        """A factor + b."""
        return self.add(self.builder.fmul(a, factor, flags=FUSED), b)

    def variable(self) -> Any:
        """A variable, a vector of zeros here."""
        place = cgutils.alloca_once(self.builder, self.vector)
        self.builder.store(self.zero, place)
        return place

    def add_to(self, total: Any, value: Any) -> None:
        """Add to the vector in the variable `total`."""
        self.builder.store(self.add(self.builder.load(total, typ=self.vector), value), total)

    def add_product(self, total: Any, a: Any, b: Any) -> None:
        """Add a b to the vector in the variable `total`."""
        self.add_to(total, self.builder.fmul(a, b, flags=FUSED))

    def prefetch(self, place: Any) -> None:
        """Have what is `AHEAD` of a vector fetched."""
        for line in range(0, self.lanes, LINE):
            arguments = (ir.Constant(ir.IntType(32), number) for number in (0, 3, 1))
            self._call("llvm.prefetch.p0", ir.VoidType(), self.at(place, AHEAD // 4 + line), *arguments)

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def in_rows(self, count: Any) -> Iterator[tuple[int, Any]]:
        """Loops that together go once through `count` rows, one at least, in parts of nearly the same size, `ROWS` at
        most: for each, its size and the first row.
        """
        count_up = self.builder.add(count, ir.Constant(INDEX, ROWS - 1))
        parts = self.builder.udiv(count_up, ir.Constant(INDEX, ROWS))
        least, more = self.builder.udiv(count, parts), self.builder.urem(count, parts)
        first, none = ir.Constant(INDEX, 0), ir.Constant(INDEX, 0)
        for rows in range(ROWS, 0, -1):
            is_more = self.builder.icmp_signed("==", least, ir.Constant(INDEX, rows - 1))
            is_least = self.builder.icmp_signed("==", least, ir.Constant(INDEX, rows))
            fewer = self.builder.select(is_least, self.builder.sub(parts, more), none)
            times = self.builder.select(is_more, more, fewer)
            with cgutils.for_range(self.builder, times) as turn:
                yield rows, self.builder.add(first, self.times(turn.index, rows))
            first = self.builder.add(first, self.times(times, rows))


def in_panels(builder: Any, C: Any, widths: tuple[int, ...]) -> Iterator[tuple[Code, Any]]:
    """Loops that together go once through C channels, the widest first: for each, its code and the first channel.

    Args:
        widths: channels at a time; each divides the one before, and the last divides C.
    """
    first = ir.Constant(INDEX, 0)
    for lanes in widths:
        code = Code(builder, lanes)
        times = builder.udiv(builder.sub(C, first), ir.Constant(INDEX, lanes))
        with cgutils.for_range(builder, times) as turn:
            yield code, builder.add(first, code.times(turn.index, lanes))
        first = builder.add(first, code.times(times, lanes))
