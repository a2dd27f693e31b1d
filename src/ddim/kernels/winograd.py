"""3x3 convolutions with a quarter of the multiplications: Winograd's F(4x4, 3x3) (arXiv 1509.09308).

A tile of 4x4 results depends on 6x6 inputs. With the matrices below (the points 0, 1, -1, 2, -2 and infinity),

    tile[k] = A^T (sum over c of  (G w[k, c] G^T) * (B^T d[c] B)) A

where * multiplies number by number: 36 products instead of 144, and for each of the 36 places the sums over channels of
many tiles are one product of matrices. The weights G w G^T are made once (`transform_weights`). A thread works on
`TILES` tiles at a time, from input to result, so that what lies between stays in its cache.

Each result is computed in the same order whatever the batch and the number of threads: its bits depend on nothing but
its own sample.

Maps are float32 with channels innermost and a rim: (N, 4 rows + 2, 4 columns + 2, C) for rows x columns tiles, zero
around the H x W pixels in it, which start at (1, 1). `rimmed` makes one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ddim.kernels.code import FUSED, INDEX, Code
from ddim.kernels.norm import MAPS, affine, apply_rows
from ddim.kernels.team import array, kernel, pointer, run, share

LANES = 16
"""Output channels of a product's tile, in registers."""
ROWS = 6
"""Tiles of a product's tile."""
HALF = 8
"""Channels transformed side by side."""
TILES = 18
SIDE, STEP = 6, 4
POINTS = SIDE * SIDE

BT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
AT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))

NAMES = ("N", "H", "W", "C", "K", "x", "weights", "bias", "adds", "residual", "y")
CONVOLUTION = np.dtype([(name, np.int64) for name in NAMES])

NORMALISED = np.dtype(
    [(name, np.int64) for name in (*MAPS, "beta", "K", "kernels", "bias", "adds", "residual", "y")]
    + [("eps", np.float64)]
)


def _combine(code: Code, matrix: Any, values: list[Any]) -> list[Any]:
    """The matrix times a column of vectors.

    Rows that differ by the signs of their odd places share sums: e + o and e - o.
    """
    sums: dict[tuple[float, ...], Any] = {}

    def total(row: tuple[float, ...]) -> Any:
        if row not in sums:
            result = None
            for factor, value in zip(row, values, strict=True):
                if factor:
                    if result is None:
                        result = value if factor == 1 else code.scale(value, factor)
                    elif factor in (1, -1):
                        result = (code.builder.fadd if factor == 1 else code.builder.fsub)(result, value, flags=FUSED)
                    else:
                        result = code.add(code.scale(value, factor), result)
            sums[row] = result
        return sums[row]

    results = []
    for row in matrix:
        mirrored = tuple(-f if i % 2 else f for i, f in enumerate(row))
        if mirrored in matrix and mirrored != row:
            even = tuple(0 if i % 2 else f for i, f in enumerate(row))
            first = max(row, mirrored)
            odd = tuple(f if i % 2 else 0 for i, f in enumerate(first))
            together = code.builder.fadd if row == first else code.builder.fsub
            results.append(together(total(even), total(odd), flags=FUSED))
        else:
            results.append(total(row))
    return results


@intrinsic
def _to_points(typing_context: Any, x: Any, x_row: Any, C: Any, v: Any, v_point: Any) -> Any:
    """B^T d B of all channels of a tile: from 6 rows, `x_row` apart, of x to 36 places, `v_point` apart, of v."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, x_row, C, v, v_point = arguments
        code = Code(builder, HALF)
        with cgutils.for_range(builder, builder.udiv(C, ir.Constant(INDEX, HALF))) as panel:
            channel = code.times(panel.index, HALF)
            here, there = code.at(x, channel), code.at(v, channel)
            columns = []
            for j in range(SIDE):
                column = [code.load(code.at(here, code.times(x_row, i), code.times(C, j))) for i in range(SIDE)]
                columns.append(_combine(code, BT, column))
            for i in range(SIDE):
                for j, value in enumerate(_combine(code, BT, [columns[q][i] for q in range(SIDE)])):
                    code.store(value, code.at(there, code.times(v_point, i * SIDE + j)))
        return context.get_dummy_value()

    return types.void(x, *[types.int64] * 2, v, types.int64), generate


def _from_points(adds: bool) -> Any:
    @intrinsic
    def from_points(
        typing_context: Any,
        m: Any,
        m_point: Any,
        K: Any,
        bias: Any,
        residual: Any,
        y: Any,
        y_row: Any,
        rows: Any,
        columns: Any,
    ) -> Any:
        """A^T m A plus bias, plus residual if it `adds`, of all channels of a tile, to its first `rows` x `columns`
        pixels.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            m, m_point, K, bias, residual, y, y_row, rows, columns = arguments
            code = Code(builder, HALF)
            with cgutils.for_range(builder, builder.udiv(K, ir.Constant(INDEX, HALF))) as panel:
                channel = code.times(panel.index, HALF)
                here = code.at(m, channel)
                shift = code.load(code.at(bias, channel))
                halves = []
                for j in range(SIDE):
                    column = [code.load(code.at(here, code.times(m_point, i * SIDE + j))) for i in range(SIDE)]
                    halves.append(_combine(code, AT, column))
                for i in range(STEP):
                    row = _combine(code, AT, [halves[q][i] for q in range(SIDE)])
                    with builder.if_then(builder.icmp_signed("<", ir.Constant(INDEX, i), rows)):
                        for j, value in enumerate(row):
                            with builder.if_then(builder.icmp_signed("<", ir.Constant(INDEX, j), columns)):
                                distances = (channel, code.times(y_row, i), code.times(K, j))
                                result = code.add(value, shift)
                                if adds:
                                    result = code.add(result, code.load(code.at(residual, *distances)))
                                code.store(result, code.at(y, *distances))
            return context.get_dummy_value()

        return types.void(m, *[types.int64] * 2, bias, residual, y, *[types.int64] * 3), generate

    return from_points


_finish, _finish_and_add = _from_points(False), _from_points(True)


def _multiply(rows: int) -> Any:
    @intrinsic
    def multiply(typing_context: Any, v: Any, C: Any, u: Any, m: Any, K: Any) -> Any:
        """`rows` tiles times `LANES` output channels: v (rows, C) u (C, LANES) to m (rows, of K)."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            v, C, u, m, K = arguments
            code = Code(builder, LANES)
            sums = [cgutils.alloca_once_value(builder, code.zero) for _ in range(rows)]
            tiles = [code.at(v, code.times(C, t)) for t in range(rows)]
            with cgutils.for_range(builder, C) as channel:
                weights = code.load(code.at(u, code.times(channel.index, LANES)))
                for tile, total in zip(tiles, sums, strict=True):
                    code.add_product(total, code.splat(code.at(tile, channel.index)), weights)
            for t, total in enumerate(sums):
                code.store(builder.load(total, typ=code.vector), code.at(m, code.times(K, t)))
            return context.get_dummy_value()

        return types.void(v, types.int64, u, m, types.int64), generate

    return multiply


_multiply_1, _multiply_2, _multiply_3, _multiply_4, _multiply_5, _multiply_6 = map(_multiply, range(1, ROWS + 1))


@njit
def convolve_tiles(
    x: Any, y: Any, u: Any, bias: Any, adds: bool, residual: Any, first: int, last: int, v: Any, m: Any
) -> None:
    """Tiles first to last of some samples, row by row; `v` and `m` are for its own use."""
    H, W, K = y.shape[1:]
    C = x.shape[3]
    down, across = (H + STEP - 1) // STEP, (W + STEP - 1) // STEP
    for start in range(first, last, TILES):
        count = min(TILES, last - start)
        for t in range(count):
            n, rest = (start + t) // (down * across), (start + t) % (down * across)
            here = pointer(x[n, rest // across * STEP, rest % across * STEP])
            _to_points(here, x.shape[2] * C, C, pointer(v[0, t * C :]), v.shape[1])
        for point in range(POINTS):
            for panel in range(K // LANES):
                weights = pointer(u[point, panel])
                for t in range(0, count, ROWS):
                    rows, a, b = count - t, pointer(v[point, t * C :]), pointer(m[point, t * K + panel * LANES :])
                    if rows >= 6:
                        _multiply_6(a, C, weights, b, K)
                    elif rows == 5:
                        _multiply_5(a, C, weights, b, K)
                    elif rows == 4:
                        _multiply_4(a, C, weights, b, K)
                    elif rows == 3:
                        _multiply_3(a, C, weights, b, K)
                    elif rows == 2:
                        _multiply_2(a, C, weights, b, K)
                    else:
                        _multiply_1(a, C, weights, b, K)
        for t in range(count):
            n, rest = (start + t) // (down * across), (start + t) % (down * across)
            top, left = rest // across * STEP, rest % across * STEP
            a, b, there = pointer(m[0, t * K :]), pointer(bias), pointer(y[n, top, left])
            rows, columns = min(STEP, H - top), min(STEP, W - left)
            if adds:
                before = pointer(residual[n, top, left])
                _finish_and_add(a, m.shape[1], K, b, before, there, W * K, rows, columns)
            else:
                _finish(a, m.shape[1], K, b, b, there, W * K, rows, columns)


@kernel(CONVOLUTION)
def _convolve(data: Any) -> None:
    job = carray(data, 1)[0]
    N, H, W, C, K = job.N, job.H, job.W, job.C, job.K
    down, across = (H + STEP - 1) // STEP, (W + STEP - 1) // STEP
    x = array(job.x, (N, STEP * down + 2, STEP * across + 2, C))
    y, residual, bias = array(job.y, (N, H, W, K)), array(job.residual, (N, H, W, K)), array(job.bias, (K,))
    u = array(job.weights, (POINTS, K // LANES, C, LANES))
    # A cache line more for each point: at distances of powers of two they would compete for a few places in the cache.
    v, m = np.empty((POINTS, TILES * C + LANES), np.float32), np.empty((POINTS, TILES * K + LANES), np.float32)
    first, last = share(N * down * across)
    convolve_tiles(x, y, u, bias, job.adds != 0, residual, first, last, v, m)


@kernel(NORMALISED)
def _normalise_and_convolve(data: Any) -> None:
    job = carray(data, 1)[0]
    N, H, W, A, B, K = job.N, job.H, job.W, job.A, job.B, job.K
    C = A + B
    down, across = (H + STEP - 1) // STEP, (W + STEP - 1) // STEP
    a, b = array(job.a, (N, H, W, A)), array(job.b, (N, H, W, B))
    shift = array(job.shift, (job.shifts, C))
    weight, beta = array(job.weight, (job.weights, C)), array(job.beta, (job.weights, C))
    y, residual, bias = array(job.y, (N, H, W, K)), array(job.residual, (N, H, W, K)), array(job.bias, (K,))
    u = array(job.kernels, (POINTS, K // LANES, C, LANES))
    v, m = np.empty((POINTS, TILES * C + LANES), np.float32), np.empty((POINTS, TILES * K + LANES), np.float32)
    scale, offset, sums = np.empty(C, np.float32), np.empty(C, np.float32), np.zeros(C, np.float32)
    totals = np.empty(C, np.float64)
    together = max(1, TILES // (down * across))
    x = np.zeros((together, STEP * down + 2, STEP * across + 2, C), np.float32)
    first, last = share(N)
    for start in range(first, last, together):
        end = min(start + together, last)
        for n in range(start, end):
            s, w = min(n, job.shifts - 1), min(n, job.weights - 1)
            affine(a[n], b[n], shift[s], weight[w], beta[w], job.groups, job.eps, scale, offset, sums, totals)
            apply_rows(a[n], b[n], x[n - start], 1, 0, H, scale, offset, job.silu != 0)
        tiles = (end - start) * down * across
        convolve_tiles(x, y[start:end], u, bias, job.adds != 0, residual[start:end], 0, tiles, v, m)


def fits(C: int, K: int) -> bool:
    """Whether `convolve` takes C to K channels."""
    return C % HALF == 0 and K % LANES == 0


def transform_weights(weight: Tensor) -> Tensor:
    """(K, C, 3, 3) to what `convolve` takes, (36, K / 16, C, 16) float32."""
    K, C = weight.shape[:2]
    g = torch.tensor(G, dtype=torch.float64)
    points = torch.einsum("ia,kcab,jb->ijck", g, weight.double(), g)
    return points.reshape(POINTS, C, K // LANES, LANES).transpose(1, 2).float().contiguous()


def rimmed(N: int, C: int, H: int, W: int) -> Tensor:
    """A map of zeros that has a rim; the pixels' place is [:, 1 : H + 1, 1 : W + 1]."""
    return torch.zeros(N, -(-H // STEP) * STEP + 2, -(-W // STEP) * STEP + 2, C)


def convolve(x: Tensor, weights: Tensor, bias: Tensor, residual: Tensor | None, y: Tensor) -> None:
    """Write to `y` (N, H, W, K) the convolution of a map that has a rim, plus bias, plus residual.

    Args:
        x: as `rimmed` makes it for C channels and H x W pixels.
        weights: as `transform_weights` makes them.
        bias: (K,).
        residual: (N, H, W, K), or `None`.
        y: another tensor than `residual`, or the same.
    """
    N, H, W, K = y.shape
    sizes = {"N": N, "H": H, "W": W, "C": x.shape[-1], "K": K, "adds": residual is not None}
    before = y if residual is None else residual
    run(_convolve, CONVOLUTION, **sizes, x=x, weights=weights, bias=bias, residual=before, y=y)


def normalise_and_convolve(
    a: Tensor,
    b: Tensor | None,
    shift: Tensor,
    weight: Tensor,
    beta: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    kernels: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    y: Tensor,
) -> None:
    """Write to `y` the convolution of what `ddim.kernels.norm.normalise` makes of `a` and `b`: each thread does both to
    a few samples at a time, which stay in its cache. Arguments as there and in `convolve`.
    """
    N, H, W, K = y.shape
    maps = {"a": a, "b": a if b is None else b, "shift": shift, "weight": weight, "beta": beta}
    maps |= {"kernels": kernels, "bias": bias, "residual": y if residual is None else residual, "y": y}
    sizes = {"N": N, "H": H, "W": W, "A": a.shape[-1], "B": 0 if b is None else b.shape[-1], "K": K}
    counts = {"shifts": shift.shape[0], "weights": weight.shape[0], "adds": residual is not None}
    run(_normalise_and_convolve, NORMALISED, **sizes, **counts, **maps, groups=groups, eps=eps, silu=silu)
