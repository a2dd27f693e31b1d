"""Vector code for kernels: what numba's own loops cannot say, such as sums that stay in registers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

SINGLE, INDEX = ir.FloatType(), ir.IntType(64)
FUSED = ("contract", "nsz")
"""What the compiler may do to sums and products: fuse them."""


class Code:
    """A builder of code that works on so many float32 numbers at a time.

    Pointers are to float32, distances are in numbers. Vectors need not be aligned.

    Args:
        builder: of the function that is being compiled.
        lanes: numbers a vector.
    """

    def __init__(self, builder: Any, lanes: int) -> None:
        self.builder, self.vector = builder, ir.VectorType(SINGLE, lanes)
        self.zero = ir.Constant(self.vector, [0.0] * lanes)
        self.lanes = lanes

    def at(self, start: Any, *distances: Any) -> Any:
        """The pointer so many numbers further."""
        for distance in distances:
            distance = ir.Constant(INDEX, distance) if isinstance(distance, int) else distance
            start = self.builder.gep(start, [distance], source_etype=SINGLE)
        return start

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
        return self.builder.fmul(a, ir.Constant(self.vector, [float(factor)] * self.lanes), flags=FUSED)

    def add_product(self, total: Any, a: Any, b: Any) -> None:
        """Add a b to the vector in the variable `total`."""
        product = self.builder.fmul(a, b, flags=FUSED)
        self.builder.store(self.add(self.builder.load(total, typ=self.vector), product), total)
