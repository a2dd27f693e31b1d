"""The loops of `ddim.kernels.norm`.

Vector code walks `RUN` pixels at a time, panel by panel of their channels: what belongs to a channel, and the sums over
those pixels, stay in registers. The sums are taken in float32 and then added up in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from ddim.kernels.codegen import FUSED, INDEX, Code, in_panels
from ddim.kernels.runtime import LANES
from ddim.kernels.source import array, doubles, part, pointer, release, reserve, share

RUN = 64
WIDTHS = (LANES, 8, 1)
"""Channels that are normalised side by side."""

LOG2_E = math.log2(math.e)
LN_2_HIGH = 0.693359375
LN_2_LOW = math.log(2) - LN_2_HIGH
LIMIT = 87
EXPONENT_BIAS, MANTISSA_BITS = 127, 23
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""Of (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2, the highest power first (Cephes, expf.c)."""


def _sigmoid(code: Code, z: Any) -> Any:
    """1 / (1 + exp(-z)) of a vector, 0 below -87."""
    builder = code.builder
    v = builder.fneg(z)
    v = builder.select(builder.fcmp_ordered(">", v, code.number(-LIMIT)), v, code.number(-LIMIT))
    below = builder.fcmp_ordered("<", v, code.number(LIMIT))
    w = builder.select(below, v, code.number(LIMIT))
    k = code.floor(code.fused(w, code.number(LOG2_E), code.number(0.5)))
    r = code.fused(k, code.number(-LN_2_LOW), code.fused(k, code.number(-LN_2_HIGH), w))
    p = code.number(EXP[0])
    for coefficient in EXP[1:]:
        p = code.fused(p, r, code.number(coefficient))
    mantissa = code.fused(builder.fmul(p, r, flags=FUSED), r, code.add(r, code.number(1)))
    whole = ir.VectorType(ir.IntType(32), code.lanes)
    bias, bits = (ir.Constant(whole, [number] * code.lanes) for number in (EXPONENT_BIAS, MANTISSA_BITS))
    power_of_2 = builder.bitcast(builder.shl(builder.add(builder.fptosi(k, whole), bias), bits), code.vector)
    s = builder.fdiv(code.number(1), code.fused(mantissa, power_of_2, code.number(1)))
    return builder.select(below, s, code.zero)


def _in_runs(builder: Any, P: Any, C: Any) -> Iterator[tuple[Code, Any, Any, Any]]:
    """Loops that together go once through P pixels of C channels: for each, its code, the first channel, the first
    pixel and how many they are.
    """
    run = ir.Constant(INDEX, RUN)
    runs = builder.udiv(builder.add(P, ir.Constant(INDEX, RUN - 1)), run)
    with cgutils.for_range(builder, runs) as turn:
        first = builder.mul(turn.index, run)
        left = builder.sub(P, first)
        pixels = builder.select(builder.icmp_signed("<", left, run), left, run)
        for code, channel in in_panels(builder, C, WIDTHS):
            yield code, channel, first, pixels


def _move(code: Code, variable: Any, totals: Any, channel: Any) -> None:
    """Add a panel's sums to float64 `totals`."""
    builder, doubles = code.builder, ir.VectorType(ir.DoubleType(), code.lanes)
    place = builder.gep(totals, [channel], source_etype=ir.DoubleType())
    place = builder.bitcast(place, doubles.as_pointer())
    more = builder.fpext(builder.load(variable, typ=code.vector), doubles)
    builder.store(builder.fadd(builder.load(place, align=8, typ=doubles), more), place, align=8)


def _totals(squares: bool) -> Any:
    @intrinsic
    def add_totals(typing_context: Any, x: Any, centre: Any, P: Any, C: Any, totals: Any) -> Any:
        """Add to float64 `totals` (C,) the sums over all pixels of x (P, C), or those of the squared distances from
        `centre` (C,); pointers to the first numbers.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, centre, P, C, totals = arguments
            for code, channel, first, pixels in _in_runs(builder, P, C):
                total = code.variable()
                middle = code.load(code.at(centre, channel)) if squares else None
                here = code.at(x, code.times(first, C), channel)
                with cgutils.for_range(builder, pixels) as pixel:
                    value = code.load(code.at(here, code.times(pixel.index, C)))
                    if squares:
                        distance = builder.fsub(value, middle, flags=FUSED)
                        code.add_product(total, distance, distance)
                    else:
                        code.add_to(total, value)
                _move(code, total, totals, channel)
            return context.get_dummy_value()

        return types.void(x, centre, *[types.int64] * 2, totals), generate

    return add_totals


add_totals, add_total_squares = _totals(False), _totals(True)


def _slopes(silu: bool) -> Any:
    @intrinsic
    def slopes(
        typing_context: Any,
        x: Any,
        dy: Any,
        dz: Any,
        P: Any,
        C: Any,
        scale: Any,
        offset: Any,
        centre: Any,
        totals: Any,
        weighted: Any,
    ) -> Any:
        """Dz of maps (P, C) from dy, z being scale x + offset; its sums are added to float64 `totals` (C,), those of
        dz (x - centre) to `weighted`.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, dy, dz, P, C, scale, offset, centre, totals, weighted = arguments
            for code, channel, first, pixels in _in_runs(builder, P, C):
                factor, shift, middle = (code.load(code.at(of, channel)) for of in (scale, offset, centre))
                sums = code.variable(), code.variable()
                start = builder.add(code.times(first, C), channel)
                with cgutils.for_range(builder, pixels) as pixel:
                    place = builder.add(start, code.times(pixel.index, C))
                    value, slope = (code.load(code.at(of, place)) for of in (x, dy))
                    if silu:
                        z = code.fused(value, factor, shift)
                        s = _sigmoid(code, z)
                        rest = builder.fsub(code.number(1), s, flags=FUSED)
                        slope = builder.fmul(slope, s, flags=FUSED)
                        slope = builder.fmul(slope, code.fused(z, rest, code.number(1)), flags=FUSED)
                    code.store(slope, code.at(dz, place))
                    code.add_to(sums[0], slope)
                    code.add_product(sums[1], slope, builder.fsub(value, middle, flags=FUSED))
                for total, target in zip(sums, (totals, weighted), strict=True):
                    _move(code, total, target, channel)
            return context.get_dummy_value()

        return types.void(x, dy, dz, *[types.int64] * 2, scale, offset, centre, totals, weighted), generate

    return slopes


_slopes_silu, _slopes_affine = _slopes(True), _slopes(False)


@intrinsic
def _finish_slopes(
    typing_context: Any, x: Any, dx: Any, P: Any, C: Any, scale: Any, slope: Any, offset: Any, totals: Any
) -> Any:
    """Scale dx - slope x + offset in place of dx (P, C); its sums over all pixels are added to float64 `totals`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, dx, P, C, scale, slope, offset, totals = arguments
        for code, channel, first, pixels in _in_runs(builder, P, C):
            factor, against, shift = (code.load(code.at(of, channel)) for of in (scale, slope, offset))
            total = code.variable()
            start = builder.add(code.times(first, C), channel)
            with cgutils.for_range(builder, pixels) as pixel:
                place = builder.add(start, code.times(pixel.index, C))
                value, there = code.load(code.at(x, place)), code.at(dx, place)
                rest = builder.fmul(value, against, flags=FUSED)
                result = builder.fsub(code.fused(code.load(there), factor, shift), rest, flags=FUSED)
                code.store(result, there)
                code.add_to(total, result)
            _move(code, total, totals, channel)
        return context.get_dummy_value()

    return types.void(x, dx, *[types.int64] * 2, scale, slope, offset, totals), generate


def _apply(silu: bool) -> Any:
    @intrinsic
    def apply(typing_context: Any, x: Any, P: Any, C: Any, scale: Any, offset: Any, y: Any, y_pixel: Any) -> Any:
        """Scale x + offset, or SiLU of it, of pixels x (P, C) to places of y that are `y_pixel` numbers apart."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, P, C, scale, offset, y, y_pixel = arguments
            for code, channel in in_panels(builder, C, WIDTHS):
                factor, shift = code.load(code.at(scale, channel)), code.load(code.at(offset, channel))
                with cgutils.for_range(builder, P) as pixel:
                    value = code.load(code.at(x, channel, code.times(pixel.index, C)))
                    z = code.fused(value, factor, shift)
                    if silu:
                        z = builder.fmul(z, _sigmoid(code, z), flags=FUSED)
                    code.store(z, code.at(y, channel, code.times(pixel.index, y_pixel)))
            return context.get_dummy_value()

        return types.void(x, *[types.int64] * 2, scale, offset, y, types.int64), generate

    return apply


_apply_silu, _apply_affine = _apply(True), _apply(False)


@part
def apply_row(x: Any, y: Any, first: int, scale: Any, offset: Any, silu: bool) -> None:
    """silu(scale x + offset) of places x (W, C), to the channels of y (W, of more) from `first` on."""
    if x.shape[0] * x.shape[1] == 0:
        return
    W, C = x.shape
    there = pointer(y[0, first:])
    if silu:
        _apply_silu(pointer(x), W, C, pointer(scale), pointer(offset), there, y.shape[1])
    else:
        _apply_affine(pointer(x), W, C, pointer(scale), pointer(offset), there, y.shape[1])


def forward(data: Any) -> None:
    job = carray(data, 1)[0]
    N, P, C, groups = job.N, job.P, job.C, job.groups
    D = C // groups
    x, y = array(job.x, (N, P, C)), array(job.y, (N, P, C))
    shift = array(job.shift, (N, C))
    weight, bias = array(job.weight, (C,)), array(job.bias, (C,))
    mean, rstd = array(job.mean, (N, groups)), array(job.rstd, (N, groups))
    # z = scale x + offset, channel by channel.
    room = reserve(4 * C)
    totals = doubles(room, C)
    scale, offset = array(room + 8 * C, C), array(room + 12 * C, C)
    first, last = share(N)
    for n in range(first, last):
        totals[:] = 0
        add_totals(pointer(x[n]), pointer(offset), P, C, pointer(totals))
        for g in range(groups):
            m = 0.0
            for c in range(g * D, (g + 1) * D):
                m += totals[c] / P + shift[n, c]
            mean[n, g] = m / D
            for c in range(g * D, (g + 1) * D):
                offset[c] = mean[n, g] - shift[n, c]
        totals[:] = 0
        add_total_squares(pointer(x[n]), pointer(offset), P, C, pointer(totals))
        for g in range(groups):
            squares = 0.0
            for c in range(g * D, (g + 1) * D):
                squares += totals[c]
            rstd[n, g] = 1 / math.sqrt(squares / (P * D) + job.eps)
            for c in range(g * D, (g + 1) * D):
                scale[c] = rstd[n, g] * weight[c]
                offset[c] = bias[c] - offset[c] * scale[c]
        apply_row(x[n], y[n], 0, scale, offset, job.silu != 0)
    release(room)


def backward(data: Any) -> None:
    job = carray(data, 1)[0]
    N, P, C, groups = job.N, job.P, job.C, job.groups
    D = C // groups
    x, dy, dx = array(job.x, (N, P, C)), array(job.dy, (N, P, C)), array(job.dx, (N, P, C))
    shift, dshift = array(job.shift, (N, C)), array(job.dshift, (N, C))
    weight, bias = array(job.weight, (C,)), array(job.bias, (C,))
    dweight, dbias = array(job.dweight, (N, C)), array(job.dbias, (N, C))
    mean, rstd = array(job.mean, (N, groups)), array(job.rstd, (N, groups))
    room = reserve(8 * C)
    t0, t1 = doubles(room, C), doubles(room + 8 * C, C)
    floats = array(room + 16 * C, (4, C))
    scale, offset, centre, slope = floats[0], floats[1], floats[2], floats[3]
    first, last = share(N)
    for n in range(first, last):
        for c in range(C):
            g = c // D
            scale[c] = rstd[n, g] * weight[c]
            centre[c] = mean[n, g] - shift[n, c]
            offset[c] = bias[c] - centre[c] * scale[c]
        t0[:] = 0
        t1[:] = 0
        maps = pointer(x[n]), pointer(dy[n]), pointer(dx[n]), P, C
        terms = pointer(scale), pointer(offset), pointer(centre), pointer(t0), pointer(t1)
        if job.silu:
            _slopes_silu(*maps, *terms)
        else:
            _slopes_affine(*maps, *terms)
        for g in range(groups):
            r = np.float64(rstd[n, g])
            m0 = m1 = 0.0
            for c in range(g * D, (g + 1) * D):
                m0 += weight[c] * t0[c] / (P * D)
                m1 += weight[c] * t1[c] * r / (P * D)
            for c in range(g * D, (g + 1) * D):
                dbias[n, c], dweight[n, c] = t0[c], t1[c] * r
                # dx = scale dz - slope x + offset
                slope[c] = r * r * m1
                offset[c] = r * r * m1 * centre[c] - r * m0
        t0[:] = 0
        lines = pointer(scale), pointer(slope), pointer(offset)
        _finish_slopes(pointer(x[n]), pointer(dx[n]), P, C, *lines, pointer(t0))
        for c in range(C):
            dshift[n, c] = t0[c]
    release(room)


@part
def affine(
    a: Any,
    b: Any,
    shift: Any,
    weight: Any,
    bias: Any,
    groups: int,
    eps: float,
    scale: Any,
    offset: Any,
    totals: Any,
) -> None:
    """The scale and the offset of each channel that normalise a sample, the maps a (P, A) and b (P, B) side by side;
    `totals` (A + B,) is for its own use.
    """
    P, A = a.shape
    B = b.shape[1]
    D = (A + B) // groups
    totals[:] = 0
    add_totals(pointer(a), pointer(offset), P, A, pointer(totals))
    add_totals(pointer(b), pointer(offset), P, B, pointer(totals[A:]))
    for g in range(groups):
        mean = 0.0
        for c in range(g * D, (g + 1) * D):
            mean += totals[c] / P + shift[c]
        for c in range(g * D, (g + 1) * D):
            offset[c] = mean / D - shift[c]
    totals[:] = 0
    add_total_squares(pointer(a), pointer(offset), P, A, pointer(totals))
    add_total_squares(pointer(b), pointer(offset[A:]), P, B, pointer(totals[A:]))
    for g in range(groups):
        squares = 0.0
        for c in range(g * D, (g + 1) * D):
            squares += totals[c]
        rstd = 1 / math.sqrt(squares / (P * D) + eps)
        for c in range(g * D, (g + 1) * D):
            scale[c] = rstd * weight[c]
            offset[c] = bias[c] - offset[c] * scale[c]


@part
def apply_rows(
    a: Any, b: Any, W: int, y: Any, top: int, first: int, last: int, scale: Any, offset: Any, silu: bool
) -> None:
    """silu(scale x + offset) of rows of W pixels of the maps side by side, to y, whose first pixel is at (top, top)."""
    A = a.shape[1]
    for h in range(first, last):
        row = y[h + top, top : top + W]
        apply_row(a[h * W : (h + 1) * W], row, 0, scale[:A], offset[:A], silu)
        apply_row(b[h * W : (h + 1) * W], row, A, scale[A:], offset[A:], silu)


def normalise(data: Any) -> None:
    job = carray(data, 1)[0]
    N, H, W, A, B = job.N, job.H, job.W, job.A, job.B
    C = A + B
    a, b = array(job.a, (N, H * W, A)), array(job.b, (N, H * W, B))
    shift = array(job.shift, (job.shifts, C))
    weight, bias = array(job.weight, (job.weights, C)), array(job.bias, (job.weights, C))
    y = array(job.y, (N, job.rows, job.columns, C))
    room = reserve(4 * C)
    totals = doubles(room, C)
    scale, offset = array(room + 8 * C, C), array(room + 12 * C, C)
    # Threads share rows of pixels; what a sample's rows have in common is computed by each that has some of them.
    first, last = share(N * H)
    for n in range(first // H, (last + H - 1) // H):
        s, w = min(n, job.shifts - 1), min(n, job.weights - 1)
        affine(a[n], b[n], shift[s], weight[w], bias[w], job.groups, job.eps, scale, offset, totals)
        top, bottom = max(first - n * H, 0), min(last - n * H, H)
        apply_rows(a[n], b[n], W, y[n], job.top, top, bottom, scale, offset, job.silu != 0)
    release(room)
