"""The kernels of `ddim.kernels.winograd`, for numba.

The stages of a block of tiles: load and transform its inputs (`v`), multiply with the transformed weights at each of
the 36 points (`m`), transform back, add bias and residual, store.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from ddim.kernels.codegen import (
    INT64,
    Code,
    device_function,
    double_array,
    float_array,
    free,
    in_panels,
    inline_function,
    malloc,
    pointer,
    thread_range,
    unpack,
)
from ddim.kernels.machine import OUTPUT_LANES
from ddim.kernels.norm.source import affine, apply_rows
from ddim.kernels.winograd.constants import AT, BT, CHANNEL_MULTIPLE, POINTS, TILE_INPUT, TILE_OUTPUT

# Channels that are transformed side by side: one register of them, since a transform has 36 vectors at once.
TRANSFORM_LANES = OUTPUT_LANES // 2
# Tiles that go from input to result together: two or three times `REGISTER_ROWS`. More would reuse each weight that
# is read more often, but their v and m would not stay in the cache.
TILES_PER_BLOCK = 18
# Numbers left free after each point of v and m: at distances of powers of two, the 36 points of a tile would compete
# for a few sets of the cache.
POINT_PADDING = OUTPUT_LANES


# Vector code.


def _multiply_matrix(code: Code, matrix: Any, values: list[Any]) -> list[Any]:
    """Return a constant matrix times a column of vectors.

    Two rows that differ only by the signs of their odd entries, e + o and e - o, share the sums e and o: in B^T and A^T
    the points 1 and -1, and 2 and -2, give such pairs.
    """
    sums: dict[tuple[float, ...], Any] = {}

    def weighted_sum(row: tuple[float, ...]) -> Any:
        if row not in sums:
            result = None
            for factor, value in zip(row, values, strict=True):
                if not factor:
                    continue
                if result is None:
                    result = value if factor == 1 else code.scale(value, factor)
                elif factor == 1:
                    result = code.add(result, value)
                elif factor == -1:
                    result = code.subtract(result, value)
                else:
                    # The compiler fuses product and sum.
                    result = code.add(code.scale(value, factor), result)
            sums[row] = result
        return sums[row]

    # One result per row of the matrix.
    results = []
    for row in matrix:
        mirrored = tuple(-factor if i % 2 else factor for i, factor in enumerate(row))
        if mirrored in matrix and mirrored != row:
            even = tuple(0 if i % 2 else factor for i, factor in enumerate(row))
            # The odd part of the same one of the two rows, so that its sum is shared.
            first = max(row, mirrored)
            odd = tuple(factor if i % 2 else 0 for i, factor in enumerate(first))
            combine = code.add if row == first else code.subtract
            results.append(combine(weighted_sum(even), weighted_sum(odd)))
        else:
            results.append(weighted_sum(row))
    return results


@intrinsic
def _transform_input(typing_context: Any, x_view: Any, C: Any, v_view: Any) -> Any:
    """Write B^T d B of all channels of a tile.

    Operands:
        x_view: (a pointer to the tile's first input, the numbers from row to row); positions lie C numbers apart.
        C: channels.
        v_view: (a pointer to the tile's first point, the numbers from point to point).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_view, C, v_view = arguments
        x, x_row = unpack(builder, x_view)
        v, v_point = unpack(builder, v_view)
        # Register budget: 36 vectors of intermediate results, a few of which spill to the stack with 32 registers.
        for code, channel in in_panels(builder, C, (TRANSFORM_LANES, CHANNEL_MULTIPLE)):
            source, target = code.at(x, channel), code.at(v, channel)
            # Load and transform columns.
            columns = []
            for j in range(TILE_INPUT):
                offsets = [(code.multiply_index(x_row, i), code.multiply_index(C, j)) for i in range(TILE_INPUT)]
                columns.append(_multiply_matrix(code, BT, [code.load(code.at(source, *offset)) for offset in offsets]))
            # Transform rows and store.
            for i in range(TILE_INPUT):
                row = [columns[j][i] for j in range(TILE_INPUT)]
                for j, value in enumerate(_multiply_matrix(code, BT, row)):
                    code.store(value, code.at(target, code.multiply_index(v_point, i * TILE_INPUT + j)))
        return context.get_dummy_value()

    return types.void(x_view, types.int64, v_view), generate


@intrinsic
def _multiply_tiles(typing_context: Any, v: Any, C: Any, u: Any, m: Any, K: Any, count: Any) -> Any:
    """Multiply tiles by a panel of weights, at one point: m = v u.

    Operands:
        v: a pointer to the point's inputs, (count, C).
        C: input channels.
        u: a pointer to the point's weights, (C, OUTPUT_LANES).
        m: a pointer to the point's results, count rows of OUTPUT_LANES numbers that lie K apart.
        K: output channels.
        count: tiles, at least 1.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v, C, u, m, K, count = arguments
        code = Code(builder, OUTPUT_LANES)
        # Register budget: see `REGISTER_ROWS`. Each tile of a block has an accumulator of two registers.
        for rows, first in code.in_row_blocks(count):
            sums = [code.accumulator() for _ in range(rows)]
            numbers = [builder.add(first, ir.Constant(INT64, t)) for t in range(rows)]
            tiles = [code.at(v, code.multiply_index(C, number)) for number in numbers]
            # Multiply: one vector of weights, two registers, times one number of each tile.
            with cgutils.for_range(builder, C) as channel:
                address = code.at(u, code.multiply_index(channel.index, OUTPUT_LANES))
                code.prefetch(address)
                weights = code.load(address)
                for tile, total in zip(tiles, sums, strict=True):
                    code.accumulate_product(total, code.broadcast(code.at(tile, channel.index)), weights)
            # Store.
            for t, total in enumerate(sums):
                target = code.at(m, code.multiply_index(K, builder.add(first, ir.Constant(INT64, t))))
                code.store(code.value_of(total), target)
        return context.get_dummy_value()

    return types.void(v, types.int64, u, m, *[types.int64] * 2), generate


def _make_transform_output(has_residual: bool) -> Any:
    """Return an intrinsic that transforms a tile back, with a residual or without."""

    @intrinsic
    def transform_output(
        typing_context: Any, m_view: Any, K: Any, bias: Any, residual: Any, y_view: Any, extent: Any
    ) -> Any:
        """Write A^T m A plus bias, plus residual, to the pixels of a tile that lie in the map.

        Operands:
            m_view: (a pointer to the tile's first point, the numbers from point to point).
            K: output channels, a multiple of `TRANSFORM_LANES`.
            bias: a pointer to (K,).
            residual: a pointer to the tile's first residual; laid out as y.
            y_view: (a pointer to the tile's first result, the numbers from row to row and from position to position).
            extent: (rows, columns) that are written, from 1 to 4.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            m_view, K, bias, residual, y_view, extent = arguments
            m, m_point = unpack(builder, m_view)
            y, y_row, y_position = unpack(builder, y_view)
            rows, columns = unpack(builder, extent)
            # Register budget: 24 vectors, of the four rows that the six columns of points become.
            for code, channel in in_panels(builder, K, (TRANSFORM_LANES,)):
                source, shift = code.at(m, channel), code.load(code.at(bias, channel))
                # Load and transform columns.
                transformed = []
                for j in range(TILE_INPUT):
                    offsets = [code.multiply_index(m_point, i * TILE_INPUT + j) for i in range(TILE_INPUT)]
                    column = [code.load(code.at(source, offset)) for offset in offsets]
                    transformed.append(_multiply_matrix(code, AT, column))
                # Transform rows; add and store what lies in the map.
                for i in range(TILE_OUTPUT):
                    row = _multiply_matrix(code, AT, [transformed[j][i] for j in range(TILE_INPUT)])
                    # The last tiles of a row or column may reach over the edge of the map.
                    with builder.if_then(builder.icmp_signed("<", ir.Constant(INT64, i), rows)):
                        for j, value in enumerate(row):
                            with builder.if_then(builder.icmp_signed("<", ir.Constant(INT64, j), columns)):
                                position = (code.multiply_index(y_row, i), code.multiply_index(y_position, j))
                                result = code.add(value, shift)
                                if has_residual:
                                    result = code.add(result, code.load(code.at(residual, channel, *position)))
                                code.store(result, code.at(y, channel, *position))
            return context.get_dummy_value()

        return types.void(m_view, types.int64, bias, residual, y_view, extent), generate

    return transform_output


_transform_output, _transform_output_and_add = _make_transform_output(False), _make_transform_output(True)


# What the kernels share: functions that become part of them.


@inline_function
def tiles_along(size: int) -> int:
    """Return the number of tiles along a side of a feature map."""
    return (size + TILE_OUTPUT - 1) // TILE_OUTPUT


@inline_function
def scratch_floats(C: int, K: int) -> int:
    """Return the size of the scratch memory of `convolve_tiles`."""
    return POINTS * (TILES_PER_BLOCK * (C + K) + 2 * POINT_PADDING)


@device_function
def convolve_tiles(x: Any, filters: Any, residuals: Any, y: Any, tiles: Any, panels: Any, scratch: int) -> None:
    """Convolve a range of tiles of some samples, for a range of panels of output channels.

    Args:
        x: feature maps with a halo, of `padded_shape`.
        filters: transformed weights (POINTS, panels, C, OUTPUT_LANES), and the bias (K,).
        residuals: whether they are added, and (N, H, W, K).
        y: (N, H, W, K).
        tiles: the first one and one past the last, counted row by row, sample by sample.
        panels: the first one and one past the last.
        scratch: the address of `scratch_floats` numbers.
    """
    H, W, K = y.shape[1:]
    C = x.shape[3]
    u, bias = filters
    has_residual, residual = residuals
    first_panel, last_panel = panels
    first, last = tiles
    columns_of_tiles = tiles_along(W)
    tiles_per_sample = tiles_along(H) * columns_of_tiles
    channels, k = (last_panel - first_panel) * OUTPUT_LANES, first_panel * OUTPUT_LANES
    # v and m of a block: for each point, the tiles' input channels, and their output channels.
    v = float_array(scratch, (POINTS, TILES_PER_BLOCK * C + POINT_PADDING))
    m_address = scratch + 4 * POINTS * (TILES_PER_BLOCK * C + POINT_PADDING)
    m = float_array(m_address, (POINTS, TILES_PER_BLOCK * K + POINT_PADDING))
    for start in range(first, last, TILES_PER_BLOCK):
        count = min(TILES_PER_BLOCK, last - start)
        # Load and transform inputs.
        for t in range(count):
            n, tile = (start + t) // tiles_per_sample, (start + t) % tiles_per_sample
            h, w = tile // columns_of_tiles * TILE_OUTPUT, tile % columns_of_tiles * TILE_OUTPUT
            _transform_input((pointer(x[n, h, w]), x.shape[2] * C), C, (pointer(v[0, t * C :]), v.shape[1]))
        # Multiply: 36 products of (count, C) and (C, K).
        for point in range(POINTS):
            # v of this point stays in the nearest cache; the weights are read once per block of tiles.
            for panel in range(first_panel, last_panel):
                target = pointer(m[point, panel * OUTPUT_LANES :])
                _multiply_tiles(pointer(v[point]), C, pointer(u[point, panel]), target, K, count)
        # Transform back, add, store.
        for t in range(count):
            n, tile = (start + t) // tiles_per_sample, (start + t) % tiles_per_sample
            h, w = tile // columns_of_tiles * TILE_OUTPUT, tile % columns_of_tiles * TILE_OUTPUT
            m_view = pointer(m[0, t * K + k :]), m.shape[1]
            y_view = pointer(y[n, h, w, k:]), W * K, K
            extent = min(TILE_OUTPUT, H - h), min(TILE_OUTPUT, W - w)
            # Two versions of the code, so that the inner loop does not test for a residual.
            if has_residual:
                source = pointer(residual[n, h, w, k:])
                _transform_output_and_add(m_view, channels, pointer(bias[k:]), source, y_view, extent)
            else:
                _transform_output(m_view, channels, pointer(bias[k:]), pointer(bias[k:]), y_view, extent)


# Kernels.


def convolve(data: Any) -> None:
    """Convolve this thread's range of tiles; see `ddim.kernels.winograd.convolve`."""
    args = carray(data, 1)[0]
    N, H, W, C, K = args.N, args.H, args.W, args.C, args.K
    rows, columns = tiles_along(H), tiles_along(W)
    x = float_array(args.x, (N, TILE_OUTPUT * rows + 2, TILE_OUTPUT * columns + 2, C))
    y, residual = float_array(args.y, (N, H, W, K)), float_array(args.residual, (N, H, W, K))
    u, bias = float_array(args.weights, (POINTS, K // OUTPUT_LANES, C, OUTPUT_LANES)), float_array(args.bias, (K,))

    # Divide among threads: tiles, or, where these are so few that reading the weights takes the time, output channels.
    tiles, panels = N * rows * columns, K // OUTPUT_LANES
    first, last = thread_range(tiles)
    first_panel, last_panel = 0, panels
    if tiles <= TILES_PER_BLOCK:
        first, last = 0, tiles
        first_panel, last_panel = thread_range(panels)

    scratch = malloc(scratch_floats(C, K))
    residuals = args.has_residual != 0, residual
    convolve_tiles(x, (u, bias), residuals, y, (first, last), (first_panel, last_panel), scratch)
    free(scratch)


def normalize_and_convolve(data: Any) -> None:
    """Normalize and convolve this thread's range of samples; see `ddim.kernels.winograd.normalize_and_convolve`."""
    args = carray(data, 1)[0]
    N, H, W, A, B, K, groups = args.N, args.H, args.W, args.A, args.B, args.K, args.groups
    C = A + B
    rows, columns = tiles_along(H), tiles_along(W)
    padded_H, padded_W = TILE_OUTPUT * rows + 2, TILE_OUTPUT * columns + 2
    a, b = float_array(args.a, (N, H * W, A)), float_array(args.b, (N, H * W, B))
    shift = float_array(args.shift, (args.num_shifts, C))
    weight = float_array(args.norm_weight, (args.num_weights, C))
    beta = float_array(args.norm_bias, (args.num_weights, C))
    y, residual = float_array(args.y, (N, H, W, K)), float_array(args.residual, (N, H, W, K))
    u, bias = float_array(args.weights, (POINTS, K // OUTPUT_LANES, C, OUTPUT_LANES)), float_array(args.bias, (K,))

    # Scratch: that of `convolve_tiles`; C doubles, 2 C floats and 2 groups doubles for the norm; as many padded samples
    # as make a block of tiles.
    batch = max(1, TILES_PER_BLOCK // (rows * columns))
    size = scratch_floats(C, K)
    scratch = malloc(size + 4 * C + 4 * groups + batch * padded_H * padded_W * C)
    totals, floats = double_array(scratch + 4 * size, C), float_array(scratch + 4 * (size + 2 * C), (2, C))
    statistics = double_array(scratch + 4 * (size + 4 * C), (2, groups))
    x = float_array(scratch + 4 * (size + 4 * C + 4 * groups), (batch, padded_H, padded_W, C))
    scale, offset = floats[0], floats[1]
    # The halo stays zero. Without groups the maps are taken as they are.
    x[:] = 0
    scale[:] = 1
    offset[:] = 0

    # Threads divide samples, which they take in batches of about one block of tiles.
    first, last = thread_range(N)
    for start in range(first, last, batch):
        end = min(start + batch, last)
        # Normalize into padded maps.
        for n in range(start, end):
            s, w = min(n, args.num_shifts - 1), min(n, args.num_weights - 1)
            maps, terms = (a[n], b[n]), (shift[s], weight[w], beta[w])
            if groups:
                affine(maps, terms, groups, args.eps, (statistics[0], statistics[1]), (scale, offset, totals))
            apply_rows(maps, (0, H, W), x[n - start], 1, (scale, offset), args.silu != 0)
        # Convolve them while they are in the cache.
        tiles = (0, (end - start) * rows * columns)
        residuals = args.has_residual != 0, residual[start:end]
        convolve_tiles(x, (u, bias), residuals, y[start:end], tiles, (0, K // OUTPUT_LANES), scratch)
    free(scratch)
