"""The loops of `ddim.kernels.norm`.

A sample is walked pixel by pixel, all channels of a pixel side by side, so that the inner loops are over channels and
vectorised. Sums over pixels are taken in float32 for `RUN` pixels at a time and then in float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from ddim.kernels.library import LANES
from ddim.kernels.source import array, doubles, inlined, part, pointer, release, reserve, share
from ddim.kernels.source.code import FUSED, INDEX, Code, in_panels

RUN = 64
WIDTHS = (LANES, 8, 1)
"""Channels that are normalised side by side."""

LOG2_E = np.float32(math.log2(math.e))
LN_2_HIGH = np.float32(0.693359375)
LN_2_LOW = np.float32(math.log(2) - 0.693359375)
ZERO, ONE = np.float32(0), np.float32(1)
HALF = np.float32(0.5)
LIMIT = np.float32(87)
EXPONENT_BIAS, MANTISSA_BITS = np.int32(127), np.int32(23)
# Of (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2, the highest power first (Cephes, expf.c).
EXP = tuple(
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)


@inlined
def sigmoid(z: Any) -> Any:
    """1 / (1 + exp(-z)) in float32, 0 below -87; without a call, so that loops over it are vectorised."""
    v = -z if -z > -LIMIT else -LIMIT
    w = v if v < LIMIT else LIMIT
    k = np.floor(w * LOG2_E + HALF)
    r = (w - k * LN_2_HIGH) - k * LN_2_LOW
    p = ((((EXP[0] * r + EXP[1]) * r + EXP[2]) * r + EXP[3]) * r + EXP[4]) * r + EXP[5]
    power_of_2 = np.int32((np.int32(k) + EXPONENT_BIAS) << MANTISSA_BITS).view(np.float32)
    s = ONE / (ONE + (p * r * r + r + ONE) * power_of_2)
    return s if v < LIMIT else ZERO


def _vector_sigmoid(code: Code, z: Any) -> Any:
    """The same of vectors."""
    builder = code.builder

    def fused(a: Any, factor: Any, b: Any) -> Any:
        return code.add(builder.fmul(a, factor, flags=FUSED), b)

    v = builder.fneg(z)
    v = builder.select(builder.fcmp_ordered(">", v, code.number(-LIMIT)), v, code.number(-LIMIT))
    below = builder.fcmp_ordered("<", v, code.number(LIMIT))
    w = builder.select(below, v, code.number(LIMIT))
    k = code.floor(fused(w, code.number(LOG2_E), code.number(HALF)))
    r = fused(k, code.number(-LN_2_LOW), fused(k, code.number(-LN_2_HIGH), w))
    p = code.number(EXP[0])
    for coefficient in EXP[1:]:
        p = fused(p, r, code.number(coefficient))
    mantissa = fused(builder.fmul(p, r, flags=FUSED), r, code.add(r, code.number(ONE)))
    whole = ir.VectorType(ir.IntType(32), code.lanes)
    bias, bits = (ir.Constant(whole, [int(number)] * code.lanes) for number in (EXPONENT_BIAS, MANTISSA_BITS))
    power_of_2 = builder.bitcast(builder.shl(builder.add(builder.fptosi(k, whole), bias), bits), code.vector)
    s = builder.fdiv(code.number(ONE), fused(mantissa, power_of_2, code.number(ONE)))
    return builder.select(below, s, code.zero)


def _totals(squares: bool) -> Any:
    @intrinsic
    def add_totals(typing_context: Any, x: Any, centre: Any, P: Any, C: Any, totals: Any) -> Any:
        """Add to float64 `totals` (C,) the sums over all pixels of x (P, C), or those of the squared distances from
        `centre` (C,); pointers to the first numbers.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, centre, P, C, totals = arguments
            run = ir.Constant(INDEX, RUN)
            runs = builder.udiv(builder.add(P, ir.Constant(INDEX, RUN - 1)), run)
            with cgutils.for_range(builder, runs) as turn:
                start = builder.mul(turn.index, run)
                left = builder.sub(P, start)
                pixels = builder.select(builder.icmp_signed("<", left, run), left, run)
                for code, channel in in_panels(builder, C, WIDTHS):
                    total = cgutils.alloca_once(builder, code.vector)
                    builder.store(code.zero, total)
                    middle = code.load(code.at(centre, channel)) if squares else None
                    first = code.at(x, code.times(start, C), channel)
                    with cgutils.for_range(builder, pixels) as pixel:
                        value = code.load(code.at(first, code.times(pixel.index, C)))
                        if squares:
                            distance = builder.fsub(value, middle, flags=FUSED)
                            code.add_product(total, distance, distance)
                        else:
                            builder.store(code.add(builder.load(total, typ=code.vector), value), total)
                    wide = ir.VectorType(ir.DoubleType(), code.lanes)
                    place = builder.gep(totals, [channel], source_etype=ir.DoubleType())
                    place = builder.bitcast(place, wide.as_pointer())
                    more = builder.fpext(builder.load(total, typ=code.vector), wide)
                    builder.store(builder.fadd(builder.load(place, align=8, typ=wide), more), place, align=8)
            return context.get_dummy_value()

        return types.void(x, centre, *[types.int64] * 2, totals), generate

    return add_totals


add_totals, add_total_squares = _totals(False), _totals(True)


def _apply(silu: bool) -> Any:
    @intrinsic
    def apply(typing_context: Any, x: Any, P: Any, C: Any, scale: Any, offset: Any, y: Any, y_pixel: Any) -> Any:
        """scale x + offset, or SiLU of it, of pixels x (P, C) to places of y that are `y_pixel` numbers apart."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, P, C, scale, offset, y, y_pixel = arguments
            for code, channel in in_panels(builder, C, WIDTHS):
                factor, shift = code.load(code.at(scale, channel)), code.load(code.at(offset, channel))
                with cgutils.for_range(builder, P) as pixel:
                    value = code.load(code.at(x, channel, code.times(pixel.index, C)))
                    z = code.add(builder.fmul(value, factor, flags=FUSED), shift)
                    if silu:
                        z = builder.fmul(z, _vector_sigmoid(code, z), flags=FUSED)
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


@part
def flush(sums: Any, totals: Any) -> None:
    """Move float32 sums to float64 totals."""
    for c in range(sums.size):
        totals[c] += sums[c]
        sums[c] = 0


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


@part
def dz_and_sums(
    x: Any, dy: Any, dz: Any, scale: Any, offset: Any, centre: Any, first: int, last: int, silu: bool, s0: Any, s1: Any
) -> None:
    """dz of some pixels, and the sums of dz and of dz (x - centre)."""
    for p in range(first, last):
        if silu:
            for c in range(s0.size):
                z = x[p, c] * scale[c] + offset[c]
                s = sigmoid(z)
                dz[p, c] = dy[p, c] * s * (ONE + z * (ONE - s))
        else:
            for c in range(s0.size):
                dz[p, c] = dy[p, c]
        for c in range(s0.size):
            s0[c] += dz[p, c]
            s1[c] += dz[p, c] * (x[p, c] - centre[c])


def backward(data: Any) -> None:
    job = carray(data, 1)[0]
    N, P, C, groups = job.N, job.P, job.C, job.groups
    D = C // groups
    x, dy, dx = array(job.x, (N, P, C)), array(job.dy, (N, P, C)), array(job.dx, (N, P, C))
    shift, dshift = array(job.shift, (N, C)), array(job.dshift, (N, C))
    weight, bias = array(job.weight, (C,)), array(job.bias, (C,))
    dweight, dbias = array(job.dweight, (N, C)), array(job.dbias, (N, C))
    mean, rstd = array(job.mean, (N, groups)), array(job.rstd, (N, groups))
    room = reserve(10 * C)
    t0, t1 = doubles(room, C), doubles(room + 8 * C, C)
    floats = array(room + 16 * C, (6, C))
    scale, offset, centre, slope, s0, s1 = floats[0], floats[1], floats[2], floats[3], floats[4], floats[5]
    s0[:] = 0
    s1[:] = 0
    first, last = share(N)
    for n in range(first, last):
        for c in range(C):
            g = c // D
            scale[c] = rstd[n, g] * weight[c]
            centre[c] = mean[n, g] - shift[n, c]
            offset[c] = bias[c] - centre[c] * scale[c]
        t0[:] = 0
        t1[:] = 0
        for p in range(0, P, RUN):
            dz_and_sums(x[n], dy[n], dx[n], scale, offset, centre, p, min(p + RUN, P), job.silu != 0, s0, s1)
            flush(s0, t0)
            flush(s1, t1)
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
        for p in range(0, P, RUN):
            for q in range(p, min(p + RUN, P)):
                for c in range(C):
                    d = dx[n, q, c] * scale[c] + offset[c] - x[n, q, c] * slope[c]
                    dx[n, q, c] = d
                    s0[c] += d
            flush(s0, t0)
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
