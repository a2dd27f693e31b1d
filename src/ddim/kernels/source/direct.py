"""The loop of `ddim.kernels.direct`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from ddim.kernels.codegen import INDEX, Code
from ddim.kernels.runtime import LANES
from ddim.kernels.source import array, integers, pointer, release, reserve, share, singles

NEAR = 192
"""Pixels that are done for all output channels before the next."""


@intrinsic
def _add_taps(
    typing_context: Any,
    x: Any,
    places: Any,
    count: Any,
    row: Any,
    size: Any,
    C: Any,
    weights: Any,
    bias: Any,
    residual: Any,
    y: Any,
    K: Any,
) -> Any:
    """`LANES` channels of `count` pixels, which start `places` numbers into x, to y and on, `K` numbers apart; with a
    `residual`, unless that is null, added.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, places, count, row, size, C, weights, bias, residual, y, K = arguments
        code = Code(builder, LANES)
        for pixels, first in code.in_rows(count):
            sums, starts = [code.variable() for _ in range(pixels)], []
            for p in range(pixels):
                place = builder.gep(places, [builder.add(first, ir.Constant(INDEX, p))], source_etype=INDEX)
                starts.append(code.at(x, builder.load(place, typ=INDEX)))
            with cgutils.for_range(builder, size) as i, cgutils.for_range(builder, size) as j:
                number = builder.add(code.times(i.index, size), j.index)
                tap = code.at(weights, code.times(code.times(C, number), LANES))
                step = builder.add(code.times(row, i.index), code.times(C, j.index))
                here = [code.at(start, step) for start in starts]
                with cgutils.for_range(builder, C) as channel:
                    place = code.at(tap, code.times(channel.index, LANES))
                    code.prefetch(place)
                    factors = code.load(place)
                    for pixel, total in zip(here, sums, strict=True):
                        code.add_product(total, code.splat(code.at(pixel, channel.index)), factors)
            shift = code.load(bias)
            for total in sums:
                code.add_to(total, shift)
            with builder.if_then(cgutils.is_not_null(builder, residual)):
                for p, total in enumerate(sums):
                    before = code.load(code.at(residual, code.times(K, builder.add(first, ir.Constant(INDEX, p)))))
                    code.add_to(total, before)
            for p, total in enumerate(sums):
                there = code.at(y, code.times(K, builder.add(first, ir.Constant(INDEX, p))))
                code.store(builder.load(total, typ=code.vector), there)
        return context.get_dummy_value()

    return types.void(x, places, *[types.int64] * 4, weights, bias, residual, y, types.int64), generate


def convolve_directly(data: Any) -> None:
    job = carray(data, 1)[0]
    N, H, W, C, K, stride = job.N, job.H, job.W, job.C, job.K, job.stride
    row = job.columns * C
    x, bias = array(job.x, N * job.rows * row), array(job.bias, K)
    y, weights = array(job.y, (N * H * W, K)), array(job.weights, (K // LANES, job.size * job.size * C * LANES))
    pixels, panels = N * H * W, K // LANES
    first, last = 0, pixels
    left, right = share(panels)
    if pixels >= NEAR * (panels if panels < 4 else 4):
        first, last = share(pixels)
        left, right = 0, panels
    room = reserve(2 * NEAR)
    places = integers(room, NEAR)
    for start in range(first, last, NEAR):
        count = min(NEAR, last - start)
        for p in range(count):
            n, rest = (start + p) // (H * W), (start + p) % (H * W)
            places[p] = (n * job.rows + rest // W * stride) * row + rest % W * stride * C
        for panel in range(left, right):
            before = 0
            if job.adds:
                before = job.residual + 4 * (start * K + panel * LANES)
            w, shift = pointer(weights[panel]), pointer(bias[panel * LANES :])
            there = pointer(y[start, panel * LANES :])
            _add_taps(pointer(x), pointer(places), count, row, job.size, C, w, shift, singles(before), there, K)
    release(room)
