"""The loops of `ddim.kernels.norm`.

A sample is walked pixel by pixel, all channels of a pixel side by side, so that the inner loops are over channels and
vectorised. Sums over pixels are taken in float32 for `RUN` pixels at a time and then in float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray

from ddim.kernels.source import array, doubles, inlined, part, release, reserve, share

RUN = 64

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


@part
def add_rows(x: Any, first: int, last: int, sums: Any) -> None:
    """Add pixels first to last of x (P, C) to `sums` (C,) float32."""
    for p in range(first, last):
        for c in range(sums.size):
            sums[c] += x[p, c]


@part
def add_squares(x: Any, first: int, last: int, centre: Any, sums: Any) -> None:
    """Add the squared distances of pixels from `centre` (C,)."""
    for p in range(first, last):
        for c in range(sums.size):
            d = x[p, c] - centre[c]
            sums[c] += d * d


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
    room = reserve(5 * C)
    scale, offset, sums = array(room + 8 * C, C), array(room + 12 * C, C), array(room + 16 * C, C)
    totals = doubles(room, C)
    sums[:] = 0
    first, last = share(N)
    for n in range(first, last):
        totals[:] = 0
        for p in range(0, P, RUN):
            add_rows(x[n], p, min(p + RUN, P), sums)
            flush(sums, totals)
        for g in range(groups):
            m = 0.0
            for c in range(g * D, (g + 1) * D):
                m += totals[c] / P + shift[n, c]
            mean[n, g] = m / D
            for c in range(g * D, (g + 1) * D):
                offset[c] = mean[n, g] - shift[n, c]
        totals[:] = 0
        for p in range(0, P, RUN):
            add_squares(x[n], p, min(p + RUN, P), offset, sums)
            flush(sums, totals)
        for g in range(groups):
            squares = 0.0
            for c in range(g * D, (g + 1) * D):
                squares += totals[c]
            rstd[n, g] = 1 / math.sqrt(squares / (P * D) + job.eps)
            for c in range(g * D, (g + 1) * D):
                scale[c] = rstd[n, g] * weight[c]
                offset[c] = bias[c] - offset[c] * scale[c]
        if job.silu:
            for p in range(P):
                for c in range(C):
                    z = x[n, p, c] * scale[c] + offset[c]
                    y[n, p, c] = z * sigmoid(z)
        else:
            for p in range(P):
                for c in range(C):
                    y[n, p, c] = x[n, p, c] * scale[c] + offset[c]
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
def apply_row(x: Any, y: Any, first: int, scale: Any, offset: Any, silu: bool) -> None:
    """silu(scale x + offset) of places x (W, C), to the channels of y from `first` on."""
    for w in range(x.shape[0]):
        place, result = x[w], y[w][first:]
        if silu:
            for c in range(place.size):
                z = place[c] * scale[c] + offset[c]
                result[c] = z * sigmoid(z)
        else:
            for c in range(place.size):
                result[c] = place[c] * scale[c] + offset[c]


@part
def add_totals(x: Any, totals: Any, sums: Any) -> None:
    """Add the sums over all pixels of x (P, C) to float64 totals; `sums` is zero before and after."""
    for p in range(0, x.shape[0], RUN):
        add_rows(x, p, min(p + RUN, x.shape[0]), sums)
        flush(sums, totals)


@part
def add_total_squares(x: Any, centre: Any, totals: Any, sums: Any) -> None:
    """Add the sums of squared distances from `centre`."""
    for p in range(0, x.shape[0], RUN):
        add_squares(x, p, min(p + RUN, x.shape[0]), centre, sums)
        flush(sums, totals)


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
    sums: Any,
    totals: Any,
) -> None:
    """The scale and the offset of each channel that normalise a sample, the maps a (P, A) and b (P, B) side by side;
    `sums` and `totals` (A + B,) are for its own use, the former zero before and after.
    """
    P, A = a.shape
    B = b.shape[1]
    D = (A + B) // groups
    totals[:] = 0
    add_totals(a, totals[:A], sums[:A])
    add_totals(b, totals[A:], sums[A:])
    for g in range(groups):
        mean = 0.0
        for c in range(g * D, (g + 1) * D):
            mean += totals[c] / P + shift[c]
        for c in range(g * D, (g + 1) * D):
            offset[c] = mean / D - shift[c]
    totals[:] = 0
    add_total_squares(a, offset[:A], totals[:A], sums[:A])
    add_total_squares(b, offset[A:], totals[A:], sums[A:])
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
    room = reserve(5 * C)
    scale, offset, sums = array(room + 8 * C, C), array(room + 12 * C, C), array(room + 16 * C, C)
    totals = doubles(room, C)
    sums[:] = 0
    # Threads share rows of pixels; what a sample's rows have in common is computed by each that has some of them.
    first, last = share(N * H)
    for n in range(first // H, (last + H - 1) // H):
        s, w = min(n, job.shifts - 1), min(n, job.weights - 1)
        affine(a[n], b[n], shift[s], weight[w], bias[w], job.groups, job.eps, scale, offset, sums, totals)
        top, bottom = max(first - n * H, 0), min(last - n * H, H)
        apply_rows(a[n], b[n], W, y[n], job.top, top, bottom, scale, offset, job.silu != 0)
    release(room)
