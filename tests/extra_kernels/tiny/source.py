"""The kernel of `tiny`, for numba."""

from __future__ import annotations

from typing import Any

from numba import carray

from ddim.kernels.codegen import float_array, thread_range


def double(data: Any) -> None:
    """Double N numbers x."""
    args = carray(data, 1)[0]
    x = float_array(args.x, (args.N,))
    begin, end = thread_range(args.N)
    for n in range(begin, end):
        x[n] *= 2
