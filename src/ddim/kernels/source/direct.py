"""The loop of `ddim.kernels.direct`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from ddim.kernels.direct import LANES, SIDE, TAPS
from ddim.kernels.source import array, integers, pointer, release, reserve, share, singles
from ddim.kernels.source.code import INDEX, Code

NEAR = 192
"""Pixels that are done for all output channels before the next."""


def _add_taps(pixels: int) -> Any:
    @intrinsic
    def add_taps(
        typing_context: Any,
        x: Any,
        places: Any,
        row: Any,
        C: Any,
        weights: Any,
        bias: Any,
        residual: Any,
        y: Any,
        K: Any,
    ) -> Any:
        """`LANES` channels of some pixels, which start `places` numbers into x, to y and on, `K` numbers apart; with a
        `residual`, unless that is null, added.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, places, row, C, weights, bias, residual, y, K = arguments
            code = Code(builder, LANES)
            sums = [cgutils.alloca_once_value(builder, code.zero) for _ in range(pixels)]
            starts = []
            for p in range(pixels):
                place = builder.gep(places, [ir.Constant(INDEX, p)], source_etype=INDEX)
                starts.append(code.at(x, builder.load(place, typ=INDEX)))
            side = ir.Constant(INDEX, SIDE)
            with cgutils.for_range(builder, side) as i, cgutils.for_range(builder, side) as j:
                number = builder.add(code.times(i.index, SIDE), j.index)
                tap = code.at(weights, code.times(code.times(C, number), LANES))
                step = builder.add(code.times(row, i.index), code.times(C, j.index))
                here = [code.at(start, step) for start in starts]
                with cgutils.for_range(builder, C) as channel:
                    factors = code.load(code.at(tap, code.times(channel.index, LANES)))
                    for pixel, total in zip(here, sums, strict=True):
                        code.add_product(total, code.splat(code.at(pixel, channel.index)), factors)
            shift = code.load(bias)
            for total in sums:
                builder.store(code.add(builder.load(total, typ=code.vector), shift), total)
            with builder.if_then(cgutils.is_not_null(builder, residual)):
                for p, total in enumerate(sums):
                    before = code.load(code.at(residual, code.times(K, p)))
                    builder.store(code.add(builder.load(total, typ=code.vector), before), total)
            for p, total in enumerate(sums):
                code.store(builder.load(total, typ=code.vector), code.at(y, code.times(K, p)))
            return context.get_dummy_value()

        return types.void(x, places, types.int64, types.int64, weights, bias, residual, y, types.int64), generate

    return add_taps


_add_taps_1, _add_taps_4, _add_taps_6 = map(_add_taps, (1, 4, 6))


def convolve_directly(data: Any) -> None:
    job = carray(data, 1)[0]
    N, H, W, C, K, stride = job.N, job.H, job.W, job.C, job.K, job.stride
    row = job.columns * C
    x, bias = array(job.x, N * job.rows * row), array(job.bias, K)
    y, weights = array(job.y, (N * H * W, K)), array(job.weights, (K // LANES, TAPS * C * LANES))
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
            p = 0
            while p < count:
                before = 0
                if job.adds:
                    before = job.residual + 4 * ((start + p) * K + panel * LANES)
                w, shift = pointer(weights[panel]), pointer(bias[panel * LANES :])
                here, there = pointer(places[p:]), pointer(y[start + p, panel * LANES :])
                if count - p >= 6:
                    _add_taps_6(pointer(x), here, row, C, w, shift, singles(before), there, K)
                    p += 6
                elif count - p >= 4:
                    _add_taps_4(pointer(x), here, row, C, w, shift, singles(before), there, K)
                    p += 4
                else:
                    _add_taps_1(pointer(x), here, row, C, w, shift, singles(before), there, K)
                    p += 1
    release(room)
