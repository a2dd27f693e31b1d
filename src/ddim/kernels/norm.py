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
ONE = np.float32(1)
HALF = np.float32(0.5)
LIMIT = np.float32(87)
EXPONENT_BIAS, MANTISSA_BITS = np.int32(127), np.int32(23)
# Of (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2, the highest power first (Cephes, expf.c).
EXP = tuple(
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)

FORWARD = np.dtype(
    [(name, np.int64) for name in ("N", "P", "C", "groups", "silu", "x", "shift", "weight", "bias", "y", "mean", "rstd")]
    + [("eps", np.float64)]
)
BACKWARD = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("N", "P", "C", "groups", "silu", "x", "shift", "weight", "bias", "mean", "rstd"),
            *("dy", "dx", "dshift", "dweight", "dbias"),
        )
    ]
)


@njit(inline="always", fastmath=MATHS)
def sigmoid(z: Any) -> Any:
    """1 / (1 + exp(-z)) in float32 without a call, so that loops over it are vectorised; 1e-7 from exact."""
    v = -z
    v = v if v > -LIMIT else -LIMIT
    v = v if v < LIMIT else LIMIT
    k = np.floor(v * LOG2_E + HALF)
    r = (v - k * LN_2_HIGH) - k * LN_2_LOW
    p = ((((EXP[0] * r + EXP[1]) * r + EXP[2]) * r + EXP[3]) * r + EXP[4]) * r + EXP[5]
    power_of_2 = np.int32((np.int32(k) + EXPONENT_BIAS) << MANTISSA_BITS).view(np.float32)
    return ONE / (ONE + (p * r * r + r + ONE) * power_of_2)


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
