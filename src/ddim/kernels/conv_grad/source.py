"""The kernel of `ddim.kernels.conv_grad`, for numba."""

from __future__ import annotations

from typing import Any

from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from ddim.kernels.codegen import Code, device_function, float_array, free, malloc, pointer, thread_range, unpack
from ddim.kernels.conv_grad.constants import TILE_LANES
from ddim.kernels.machine import HAS_AVX512

# Input channels of a tile in registers.
#
# The budget: with three taps they are 12 sums of one AVX-512 register each, or 6 of two AVX2 registers each. Either
# way 12 accumulators, enough to keep two units of fused multiply-add busy, and few enough for AVX2's 16 registers.
CHANNELS_PER_TILE = 4 if HAS_AVX512 else 2
# Positions, about, that a tile is summed over in registers before it is added to memory: their part of dy, 14 KB,
# stays in the nearest cache for all taps and input channels.
POSITIONS_PER_SUM = 224
# Numbers of x and dy, about, that are worked on at a time: 1 MB, which stays in the caches for all tiles.
CACHED_FLOATS = 1 << 18


def _make_add_tile(taps: int) -> Any:
    """Return an intrinsic that adds the sum over rows of some samples to a tile of `taps` taps."""

    @intrinsic
    def add_tile(typing_context: Any, x_view: Any, dy_view: Any, extent: Any, out: Any) -> Any:
        """Add to a tile.

        Operands:
            x_view: (a pointer to x at the first tap and channel, the numbers from sample to sample, from row to row and
                from position to position).
            dy_view: (a pointer to dy, the numbers from sample to sample).
            extent: (samples, rows, positions per row).
            out: a pointer to the tile, (taps, TILE_LANES input channels, TILE_LANES output channels).
        """
        tile = [(tap, channel) for tap in range(taps) for channel in range(CHANNELS_PER_TILE)]

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x_view, dy_view, extent, out = arguments
            x, x_sample, x_row, x_position = unpack(builder, x_view)
            dy, dy_sample = unpack(builder, dy_view)
            samples, rows, positions = unpack(builder, extent)
            code = Code(builder, TILE_LANES)
            # Register budget: see `CHANNELS_PER_TILE`. One accumulator per tap and input channel, and one vector of dy.
            sums = {entry: code.accumulator() for entry in tile}
            dy_row = code.multiply_index(positions, TILE_LANES)
            # Sum over positions: one vector of output channels of dy, times each tap's input channels.
            with cgutils.for_range(builder, samples) as sample, cgutils.for_range(builder, rows) as row:
                xs = code.at(x, code.multiply_index(sample.index, x_sample), code.multiply_index(row.index, x_row))
                dys = code.at(dy, code.multiply_index(sample.index, dy_sample), code.multiply_index(row.index, dy_row))
                with cgutils.for_range(builder, positions) as position:
                    window = code.at(xs, code.multiply_index(position.index, x_position))
                    gradient = code.load(code.at(dys, code.multiply_index(position.index, TILE_LANES)))
                    for tap, channel in tile:
                        value = code.broadcast(code.at(window, tap * TILE_LANES + channel))
                        code.accumulate_product(sums[tap, channel], value, gradient)
            # Add the registers to memory.
            for tap, channel in tile:
                target = code.at(out, (tap * TILE_LANES + channel) * TILE_LANES)
                code.store(code.add(code.load(target), code.value_of(sums[tap, channel])), target)
            return context.get_dummy_value()

        return types.void(x_view, dy_view, extent, out), generate

    return add_tile


_add_tile_of_2, _add_tile_of_3 = _make_add_tile(2), _make_add_tile(3)


@intrinsic
def _copy_lanes(typing_context: Any, source: Any, source_offset: Any, target: Any, target_offset: Any) -> Any:
    """Copy `TILE_LANES` numbers between two pointers, each with an offset in numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, source_offset, target, target_offset = arguments
        code = Code(builder, TILE_LANES)
        code.store(code.load(code.at(source, source_offset)), code.at(target, target_offset))
        return context.get_dummy_value()

    return types.void(source, types.int64, target, types.int64), generate


@device_function
def _pack(x: Any, rows: int, positions: int, C: int, panel: Any, panel_row: int) -> None:
    """Copy `TILE_LANES` channels of rows of (positions, C) to rows of a panel, `panel_row` numbers apart."""
    # Panels are contiguous: their positions lie one cache line apart, those of the map C numbers.
    for h in range(rows):
        for w in range(positions):
            _copy_lanes(x, (h * positions + w) * C, panel, h * panel_row + w * TILE_LANES)


def weight_gradient(data: Any) -> None:
    """Compute this thread's tiles of a gradient; see `ddim.kernels.conv_grad.weight_gradient`."""
    args = carray(data, 1)[0]
    H, W, C, OH, OW, K = args.H, args.W, args.C, args.OH, args.OW, args.K
    size, stride, padding = args.size, args.stride, args.padding
    x, dy = float_array(args.x, (args.N, H, W, C)), float_array(args.dy, (args.N, OH, OW, K))
    dweight = float_array(args.dweight, (K, size, size, C))

    # How much is worked on at a time: some rows of dy, or all rows of some samples where maps are small (`group`), and
    # a chunk of samples whose maps stay in the cache. All of it follows from the sizes, and so do the bits of the sums.
    block = min(OH, max(1, POSITIONS_PER_SUM // OW))
    group = max(1, POSITIONS_PER_SUM // (OH * OW))
    chunk = min(args.N, group * max(1, CACHED_FLOATS // (group * (H * W * C + OH * OW * K))))

    # Threads divide the tiles, each of which is summed by one thread alone.
    first, last = thread_range(C // TILE_LANES * (K // TILE_LANES))

    # Scratch: panels of x with their zero padding, panels of dy, and this thread's tiles.
    padded_H, padded_W = H + 2 * padding, W + 2 * padding
    x_size, dy_size = chunk * padded_H * padded_W * TILE_LANES, group * block * OW * TILE_LANES
    scratch = malloc(x_size + dy_size + (last - first) * size * size * TILE_LANES * TILE_LANES)
    xs = float_array(scratch, (chunk, padded_H, padded_W, TILE_LANES))
    dys = float_array(scratch + 4 * x_size, (group, block, OW, TILE_LANES))
    tiles = float_array(scratch + 4 * (x_size + dy_size), (last - first, size, size, TILE_LANES, TILE_LANES))
    xs[:] = 0
    tiles[:] = 0
    x_row, x_sample, dy_sample = padded_W * TILE_LANES, padded_H * padded_W * TILE_LANES, block * OW * TILE_LANES

    # Chunks of samples, then tiles, input channels outermost, so that a panel of x serves all output channels.
    for start in range(0, args.N, chunk):
        end, packed = min(start + chunk, args.N), -1
        for number in range(first, last):
            c, k = number // (K // TILE_LANES) * TILE_LANES, number % (K // TILE_LANES) * TILE_LANES
            # Load: pack a panel of x, once for all tiles of these input channels. The padding stays zero.
            if c != packed:
                for n in range(start, end):
                    inside = pointer(xs[n - start, padding, padding])
                    _pack(pointer(x[n, 0, 0, c:]), H, W, C, inside, x_row)
                packed = c
            # The tile stays where it is, in a cache, while the rows of these samples pass by.
            tile = tiles[number - first]
            for n in range(start, end, group):
                samples = min(group, end - n)
                for top in range(0, OH, block):
                    rows = min(block, OH - top)
                    # Load: pack a panel of dy.
                    for m in range(samples):
                        _pack(pointer(dy[n + m, top, 0, k:]), rows, OW, K, pointer(dys[m]), OW * TILE_LANES)
                    # Multiply and sum, for each row of taps and `CHANNELS_PER_TILE` input channels.
                    for lane in range(0, TILE_LANES, CHANNELS_PER_TILE):
                        for i in range(size):
                            window, out = pointer(xs[n - start, stride * top + i, 0, lane:]), pointer(tile[i, 0, lane])
                            x_view = (window, x_sample, stride * x_row, stride * TILE_LANES)
                            dy_view, extent = (pointer(dys), dy_sample), (samples, rows, OW)
                            if size == 3:
                                _add_tile_of_3(x_view, dy_view, extent, out)
                            else:
                                _add_tile_of_2(x_view, dy_view, extent, out)

    # Store: transpose tiles, whose output channels are innermost, into dweight, whose input channels are.
    for number in range(first, last):
        c, k = number // (K // TILE_LANES) * TILE_LANES, number % (K // TILE_LANES) * TILE_LANES
        for i in range(size):
            for j in range(size):
                for output in range(TILE_LANES):
                    for channel in range(TILE_LANES):
                        dweight[k + output, i, j, c + channel] = tiles[number - first, i, j, channel, output]
    free(scratch)
