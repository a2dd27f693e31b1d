"""Group normalisation of a feature map plus a shift, then SiLU, and the way back: the loops behind
`ddim.normalization`, whose notation they use.

A sample is walked pixel by pixel, all channels of a pixel side by side, so that the inner loops are over channels and
vectorised. Sums over pixels are taken in float32 for `RUN` pixels at a time and then in float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from ddim.kernels.team import MATHS, array, kernel, run, share

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

SHARED = ("N", "P", "C", "groups", "silu", "x", "shift", "weight", "bias", "mean", "rstd")
FORWARD = np.dtype([(name, np.int64) for name in (*SHARED, "y")] + [("eps", np.float64)])
MAPS = ("N", "H", "W", "A", "B", "groups", "silu", "a", "b", "shifts", "shift", "weights", "weight")
INFERENCE = np.dtype(
    [(name, np.int64) for name in (*MAPS, "bias", "top", "rows", "columns", "y")] + [("eps", np.float64)]
)
BACKWARD = np.dtype([(name, np.int64) for name in (*SHARED, "dy", "dx", "dshift", "dweight", "dbias")])


@njit(inline="always", fastmath=MATHS)
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


@njit(fastmath=MATHS, error_model="numpy")
def add_rows(x: Any, first: int, last: int, sums: Any) -> None:
    """Add pixels first to last of x (P, C) to `sums` (C,) float32."""
    for p in range(first, last):
        for c in range(sums.size):
            sums[c] += x[p, c]


@njit(fastmath=MATHS, error_model="numpy")
def add_squares(x: Any, first: int, last: int, centre: Any, sums: Any) -> None:
    """Add the squared distances of pixels from `centre` (C,)."""
    for p in range(first, last):
        for c in range(sums.size):
            d = x[p, c] - centre[c]
            sums[c] += d * d


@njit(fastmath=MATHS, error_model="numpy")
def flush(sums: Any, totals: Any) -> None:
    """Move float32 sums to float64 totals."""
    for c in range(sums.size):
        totals[c] += sums[c]
        sums[c] = 0


@kernel(FORWARD)
def _forward(data: Any) -> None:
    job = carray(data, 1)[0]
    N, P, C, groups = job.N, job.P, job.C, job.groups
    D = C // groups
    x, y = array(job.x, (N, P, C)), array(job.y, (N, P, C))
    shift = array(job.shift, (N, C))
    weight, bias = array(job.weight, (C,)), array(job.bias, (C,))
    mean, rstd = array(job.mean, (N, groups)), array(job.rstd, (N, groups))
    # z = scale x + offset, channel by channel.
    scale, offset, sums = np.empty(C, np.float32), np.empty(C, np.float32), np.zeros(C, np.float32)
    totals = np.empty(C, np.float64)
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


@njit(fastmath=MATHS, error_model="numpy")
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


@kernel(BACKWARD)
def _backward(data: Any) -> None:
    job = carray(data, 1)[0]
    N, P, C, groups = job.N, job.P, job.C, job.groups
    D = C // groups
    x, dy, dx = array(job.x, (N, P, C)), array(job.dy, (N, P, C)), array(job.dx, (N, P, C))
    shift, dshift = array(job.shift, (N, C)), array(job.dshift, (N, C))
    weight, bias = array(job.weight, (C,)), array(job.bias, (C,))
    dweight, dbias = array(job.dweight, (N, C)), array(job.dbias, (N, C))
    mean, rstd = array(job.mean, (N, groups)), array(job.rstd, (N, groups))
    scale, offset, centre = np.empty(C, np.float32), np.empty(C, np.float32), np.empty(C, np.float32)
    slope, s0, s1 = np.empty(C, np.float32), np.zeros(C, np.float32), np.zeros(C, np.float32)
    t0, t1 = np.empty(C, np.float64), np.empty(C, np.float64)
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


@njit(fastmath=MATHS, error_model="numpy")
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


@njit(fastmath=MATHS, error_model="numpy")
def add_totals(x: Any, totals: Any, sums: Any) -> None:
    """Add the sums over all pixels of x (P, C) to float64 totals; `sums` is zero before and after."""
    for p in range(0, x.shape[0], RUN):
        add_rows(x, p, min(p + RUN, x.shape[0]), sums)
        flush(sums, totals)


@njit(fastmath=MATHS, error_model="numpy")
def add_total_squares(x: Any, centre: Any, totals: Any, sums: Any) -> None:
    """Add the sums of squared distances from `centre`."""
    for p in range(0, x.shape[0], RUN):
        add_squares(x, p, min(p + RUN, x.shape[0]), centre, sums)
        flush(sums, totals)


@njit(fastmath=MATHS, error_model="numpy")
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
    """The scale and the offset of each channel that normalise a sample, the maps a (H, W, A) and b (H, W, B) side by
    side; `sums` and `totals` (A + B,) are for its own use, the former zero before and after.
    """
    H, W, A = a.shape
    B = b.shape[2]
    D = (A + B) // groups
    totals[:] = 0
    add_totals(a.reshape(H * W, A), totals[:A], sums[:A])
    add_totals(b.reshape(H * W, B), totals[A:], sums[A:])
    for g in range(groups):
        mean = 0.0
        for c in range(g * D, (g + 1) * D):
            mean += totals[c] / (H * W) + shift[c]
        for c in range(g * D, (g + 1) * D):
            offset[c] = mean / D - shift[c]
    totals[:] = 0
    add_total_squares(a.reshape(H * W, A), offset[:A], totals[:A], sums[:A])
    add_total_squares(b.reshape(H * W, B), offset[A:], totals[A:], sums[A:])
    for g in range(groups):
        squares = 0.0
        for c in range(g * D, (g + 1) * D):
            squares += totals[c]
        rstd = 1 / math.sqrt(squares / (H * W * D) + eps)
        for c in range(g * D, (g + 1) * D):
            scale[c] = rstd * weight[c]
            offset[c] = bias[c] - offset[c] * scale[c]


@njit(fastmath=MATHS, error_model="numpy")
def apply_rows(a: Any, b: Any, y: Any, top: int, first: int, last: int, scale: Any, offset: Any, silu: bool) -> None:
    """silu(scale x + offset) of rows of the maps side by side, to y, where the first pixel is at (top, top)."""
    W, A = a.shape[1:]
    for h in range(first, last):
        row = y[h + top, top : top + W]
        apply_row(a[h], row, 0, scale[:A], offset[:A], silu)
        apply_row(b[h], row, A, scale[A:], offset[A:], silu)


@kernel(INFERENCE)
def _normalise(data: Any) -> None:
    job = carray(data, 1)[0]
    N, H, W, A, B = job.N, job.H, job.W, job.A, job.B
    C = A + B
    a, b = array(job.a, (N, H, W, A)), array(job.b, (N, H, W, B))
    shift = array(job.shift, (job.shifts, C))
    weight, bias = array(job.weight, (job.weights, C)), array(job.bias, (job.weights, C))
    y = array(job.y, (N, job.rows, job.columns, C))
    scale, offset, sums = np.empty(C, np.float32), np.empty(C, np.float32), np.zeros(C, np.float32)
    totals = np.empty(C, np.float64)
    # Threads share rows of pixels; what a sample's rows have in common is computed by each that has some of them.
    first, last = share(N * H)
    for n in range(first // H, (last + H - 1) // H):
        s, w = min(n, job.shifts - 1), min(n, job.weights - 1)
        affine(a[n], b[n], shift[s], weight[w], bias[w], job.groups, job.eps, scale, offset, sums, totals)
        top, bottom = max(first - n * H, 0), min(last - n * H, H)
        apply_rows(a[n], b[n], y[n], job.top, top, bottom, scale, offset, job.silu != 0)


def forward(
    x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and 1 / sqrt(var + eps), (N, groups).

    Args:
        x: (N, C, H, W) float32 on the CPU, channels innermost.
        shift: (N, C).
        weight: (C,).
        bias: (C,).
        groups: divides C.
        eps: added to the variance.
        silu: whether SiLU follows.
    """
    N, C, H, W = x.shape
    y, mean, rstd = torch.empty_like(x), x.new_empty(N, groups), x.new_empty(N, groups)
    sizes = {"N": N, "P": H * W, "C": C, "groups": groups, "silu": silu, "eps": eps}
    run(_forward, FORWARD, x=x, shift=shift, weight=weight, bias=bias, y=y, mean=mean, rstd=rstd, **sizes)
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (N, C, H, W), dshift (N, C), dweight (C,) and dbias (C,); `dy` as `x` in memory, the rest as in `forward`."""
    N, C, H, W = x.shape
    dx = torch.empty_like(x)
    dshift, dweight, dbias = x.new_empty(N, C), x.new_empty(N, C), x.new_empty(N, C)
    sizes = {"N": N, "P": H * W, "C": C, "groups": mean.shape[1], "silu": silu}
    given = {"x": x, "shift": shift, "weight": weight, "bias": bias, "mean": mean, "rstd": rstd, "dy": dy}
    run(_backward, BACKWARD, **given, dx=dx, dshift=dshift, dweight=dweight, dbias=dbias, **sizes)
    return dx, dshift, dweight.sum(0), dbias.sum(0)


def normalise(
    a: Tensor,
    b: Tensor | None,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    y: Tensor,
    rim: bool,
) -> None:
    """Write y of the map `a`, or of `a` and `b` side by side, for which nothing is kept for the way back.

    Args:
        a: (N, H, W, A) float32 on the CPU, contiguous, as all the others.
        b: (N, H, W, B), or `None`. C = A + B.
        shift: (N, C), or (1, C) for all samples.
        weight: (N, C) or (1, C).
        bias: as `weight`.
        groups: divides C.
        eps: added to the variance.
        silu: whether SiLU follows.
        y: (N, H, W, C), or more rows and columns with a `rim`.
        rim: the first pixel of y is at (1, 1), not at (0, 0).
    """
    N, H, W, A = a.shape
    maps = {"a": a, "b": a if b is None else b, "shift": shift, "weight": weight, "bias": bias, "y": y}
    sizes = {"N": N, "H": H, "W": W, "A": A, "B": 0 if b is None else b.shape[-1]}
    counts = {"shifts": shift.shape[0], "weights": weight.shape[0], "rows": y.shape[1], "columns": y.shape[2]}
    run(_normalise, INFERENCE, **sizes, **counts, **maps, groups=groups, eps=eps, silu=silu, top=int(rim))
