"""The loops of `ddim.kernels.winograd`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from ddim.kernels.codegen import FUSED, INDEX, Code, in_panels
from ddim.kernels.runtime import LANES
from ddim.kernels.source import array, doubles, inlined, part, pointer, release, reserve, share
from ddim.kernels.source.norm import affine, apply_rows
from ddim.kernels.winograd import AT, BT, POINTS, SIDE, STEP, UNIT

HALF = LANES // 2
"""Channels that are transformed side by side."""
TILES = 18
"""From input to result at a time."""


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
        for code, channel in in_panels(builder, C, (HALF, UNIT)):
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
        y_place: Any,
        rows: Any,
        columns: Any,
    ) -> Any:
        """A^T m A plus bias, plus residual if it `adds`, of K channels of a tile, to its first `rows` x `columns`
        pixels.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            m, m_point, K, bias, residual, y, y_row, y_place, rows, columns = arguments
            for code, channel in in_panels(builder, K, (HALF,)):
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
                                distances = (channel, code.times(y_row, i), code.times(y_place, j))
                                result = code.add(value, shift)
                                if adds:
                                    result = code.add(result, code.load(code.at(residual, *distances)))
                                code.store(result, code.at(y, *distances))
            return context.get_dummy_value()

        return types.void(m, *[types.int64] * 2, bias, residual, y, *[types.int64] * 4), generate

    return from_points


_finish, _finish_and_add = _from_points(False), _from_points(True)


@intrinsic
def _multiply_tiles(typing_context: Any, v: Any, C: Any, u: Any, m: Any, K: Any, count: Any) -> Any:
    """`count` tiles times `LANES` output channels, at one point: v (count, C) u (C, LANES) to m (count, of K)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v, C, u, m, K, count = arguments
        code = Code(builder, LANES)
        for rows, first in code.in_rows(count):
            sums = [code.variable() for _ in range(rows)]
            tiles = [code.at(v, code.times(C, builder.add(first, ir.Constant(INDEX, t)))) for t in range(rows)]
            with cgutils.for_range(builder, C) as channel:
                place = code.at(u, code.times(channel.index, LANES))
                code.prefetch(place)
                weights = code.load(place)
                for tile, total in zip(tiles, sums, strict=True):
                    code.add_product(total, code.splat(code.at(tile, channel.index)), weights)
            for t, total in enumerate(sums):
                there = code.at(m, code.times(K, builder.add(first, ir.Constant(INDEX, t))))
                code.store(builder.load(total, typ=code.vector), there)
        return context.get_dummy_value()

    return types.void(v, types.int64, u, m, *[types.int64] * 2), generate


@part
def convolve_tiles(
    x: Any,
    y: Any,
    u: Any,
    bias: Any,
    adds: bool,
    residual: Any,
    first: int,
    last: int,
    left: int,
    right: int,
    room: int,
) -> None:
    """Tiles first to last of some samples, row by row, panels left to right of their channels; `room` is the address of
    `needed` numbers.
    """
    H, W, K = y.shape[1:]
    C = x.shape[3]
    down, across = (H + STEP - 1) // STEP, (W + STEP - 1) // STEP
    channels, k = (right - left) * LANES, left * LANES
    # A cache line more for each point: at distances of powers of two they would compete for a few places in the cache.
    v = array(room, (POINTS, TILES * C + LANES))
    m = array(room + 4 * POINTS * (TILES * C + LANES), (POINTS, TILES * K + LANES))
    for start in range(first, last, TILES):
        count = min(TILES, last - start)
        for t in range(count):
            n, rest = (start + t) // (down * across), (start + t) % (down * across)
            here = pointer(x[n, rest // across * STEP, rest % across * STEP])
            _to_points(here, x.shape[2] * C, C, pointer(v[0, t * C :]), v.shape[1])
        for point in range(POINTS):
            for panel in range(left, right):
                there = pointer(m[point, panel * LANES :])
                _multiply_tiles(pointer(v[point]), C, pointer(u[point, panel]), there, K, count)
        for t in range(count):
            n, rest = (start + t) // (down * across), (start + t) % (down * across)
            h, w = rest // across * STEP, rest % across * STEP
            a, b, there = pointer(m[0, t * K + k :]), pointer(bias[k:]), pointer(y[n, h, w, k:])
            rows, columns = min(STEP, H - h), min(STEP, W - w)
            if adds:
                before = pointer(residual[n, h, w, k:])
                _finish_and_add(a, m.shape[1], channels, b, before, there, W * K, K, rows, columns)
            else:
                _finish(a, m.shape[1], channels, b, b, there, W * K, K, rows, columns)


@inlined
def needed(C: int, K: int) -> int:
    """By `convolve_tiles`."""
    return POINTS * (TILES * (C + K) + 2 * LANES)


def convolve(data: Any) -> None:
    job = carray(data, 1)[0]
    N, H, W, C, K = job.N, job.H, job.W, job.C, job.K
    down, across = (H + STEP - 1) // STEP, (W + STEP - 1) // STEP
    x = array(job.x, (N, STEP * down + 2, STEP * across + 2, C))
    y, residual, bias = array(job.y, (N, H, W, K)), array(job.residual, (N, H, W, K)), array(job.bias, (K,))
    u = array(job.weights, (POINTS, K // LANES, C, LANES))
    room = reserve(needed(C, K))
    tiles, panels = N * down * across, K // LANES
    first, last = share(tiles)
    left, right = 0, panels
    # Threads share tiles, or, where these are so few that reading the weights takes the time, output channels.
    if tiles <= TILES:
        first, last = 0, tiles
        left, right = share(panels)
    convolve_tiles(x, y, u, bias, job.adds != 0, residual, first, last, left, right, room)
    release(room)


def normalise_and_convolve(data: Any) -> None:
    job = carray(data, 1)[0]
    N, H, W, A, B, K = job.N, job.H, job.W, job.A, job.B, job.K
    C = A + B
    down, across = (H + STEP - 1) // STEP, (W + STEP - 1) // STEP
    a, b = array(job.a, (N, H * W, A)), array(job.b, (N, H * W, B))
    shift = array(job.shift, (job.shifts, C))
    weight, beta = array(job.weight, (job.weights, C)), array(job.beta, (job.weights, C))
    y, residual, bias = array(job.y, (N, H, W, K)), array(job.residual, (N, H, W, K)), array(job.bias, (K,))
    u = array(job.kernels, (POINTS, K // LANES, C, LANES))
    together = max(1, TILES // (down * across))
    rows, columns = STEP * down + 2, STEP * across + 2
    size = needed(C, K)
    room = reserve(size + 4 * C + together * rows * columns * C)
    totals, floats = doubles(room + 4 * size, C), array(room + 4 * (size + 2 * C), (2, C))
    x = array(room + 4 * (size + 4 * C), (together, rows, columns, C))
    scale, offset = floats[0], floats[1]
    x[:] = 0
    # Without groups the map is taken as it is.
    scale[:] = 1
    offset[:] = 0
    first, last = share(N)
    for start in range(first, last, together):
        end = min(start + together, last)
        for n in range(start, end):
            s, w = min(n, job.shifts - 1), min(n, job.weights - 1)
            if job.groups:
                affine(a[n], b[n], shift[s], weight[w], beta[w], job.groups, job.eps, scale, offset, totals)
            apply_rows(a[n], b[n], W, x[n - start], 1, 0, H, scale, offset, job.silu != 0)
        tiles = (end - start) * down * across
        convolve_tiles(x, y[start:end], u, bias, job.adds != 0, residual[start:end], 0, tiles, 0, K // LANES, room)
    release(room)
