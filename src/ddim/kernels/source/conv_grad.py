"""The loop of `ddim.kernels.conv_grad`."""

from __future__ import annotations

from typing import Any

from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from ddim.kernels.codegen import Code
from ddim.kernels.conv_grad import LANES
from ddim.kernels.runtime import WIDE
from ddim.kernels.source import array, part, pointer, release, reserve, share

CHANNELS = 4 if WIDE else 2
"""Input channels of a tile: with three taps, as many sums as the registers hold and the machine adds to at a time."""
PLACES = 224
"""About how many places a tile is summed over before it is added to memory."""
NEAR = 1 << 18
"""About how many numbers of the maps are worked on at a time, for them to stay in the caches."""


def _add_tile(taps: int) -> Any:
    """An intrinsic that adds to the tile of `taps` taps the sum over the rows of some samples."""

    @intrinsic
    def add_tile(
        typing_context: Any,
        x: Any,
        x_sample: Any,
        x_row: Any,
        x_place: Any,
        dy: Any,
        dy_sample: Any,
        samples: Any,
        rows: Any,
        places: Any,
        out: Any,
    ) -> Any:
        """x, dy, out: pointers to the first numbers; the rest: counts, and distances in numbers."""
        tile = [(tap, channel) for tap in range(taps) for channel in range(CHANNELS)]

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, x_sample, x_row, x_place, dy, dy_sample, samples, rows, places, out = arguments
            code = Code(builder, LANES)
            sums = {entry: code.variable() for entry in tile}
            dy_row = code.times(places, LANES)
            with cgutils.for_range(builder, samples) as sample, cgutils.for_range(builder, rows) as row:
                xs = code.at(x, code.times(sample.index, x_sample), code.times(row.index, x_row))
                dys = code.at(dy, code.times(sample.index, dy_sample), code.times(row.index, dy_row))
                with cgutils.for_range(builder, places) as place:
                    here = code.at(xs, code.times(place.index, x_place))
                    gradient = code.load(code.at(dys, code.times(place.index, LANES)))
                    for tap, channel in tile:
                        code.add_product(sums[tap, channel], code.splat(code.at(here, tap * LANES + channel)), gradient)
            for tap, channel in tile:
                target = code.at(out, (tap * LANES + channel) * LANES)
                code.store(code.add(code.load(target), builder.load(sums[tap, channel], typ=code.vector)), target)
            return context.get_dummy_value()

        return types.void(x, *[types.int64] * 3, dy, *[types.int64] * 4, out), generate

    return add_tile


_add_tile_2, _add_tile_3 = _add_tile(2), _add_tile(3)


@intrinsic
def _copy(typing_context: Any, source: Any, first: Any, target: Any, place: Any) -> Any:
    """`LANES` numbers, from the one at `first` of a pointer to the one at `place` of another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, first, target, place = arguments
        code = Code(builder, LANES)
        code.store(code.load(code.at(source, first)), code.at(target, place))
        return context.get_dummy_value()

    return types.void(source, types.int64, target, types.int64), generate


@part
def _pack(x: Any, rows: int, places: int, C: int, panel: Any, row: int) -> None:
    """Copy `LANES` channels of some rows of (places, C) to rows, of a panel, that are `row` numbers apart."""
    for h in range(rows):
        for w in range(places):
            _copy(x, (h * places + w) * C, panel, h * row + w * LANES)


def gradient(data: Any) -> None:
    job = carray(data, 1)[0]
    H, W, C, OH, OW, K, size, stride = job.H, job.W, job.C, job.OH, job.OW, job.K, job.size, job.stride
    x, dy = array(job.x, (job.N, H, W, C)), array(job.dy, (job.N, OH, OW, K))
    dweight = array(job.dweight, (K, size, size, C))
    block = min(OH, max(1, PLACES // OW))
    together = max(1, PLACES // (OH * OW))
    chunk = min(job.N, together * max(1, NEAR // (together * (H * W * C + OH * OW * K))))
    first, last = share(C // LANES * (K // LANES))
    x_size, dy_size = chunk * (H + 2 * job.padding) * (W + 2 * job.padding) * LANES, together * block * OW * LANES
    room = reserve(x_size + dy_size + (last - first) * size * size * LANES * LANES)
    xs = array(room, (chunk, H + 2 * job.padding, W + 2 * job.padding, LANES))
    dys = array(room + 4 * x_size, (together, block, OW, LANES))
    tiles = array(room + 4 * (x_size + dy_size), (last - first, size, size, LANES, LANES))
    xs[:] = 0
    tiles[:] = 0
    x_row, x_sample, dy_sample = xs.shape[2] * LANES, xs.shape[1] * xs.shape[2] * LANES, block * OW * LANES
    for start in range(0, job.N, chunk):
        end, packed = min(start + chunk, job.N), -1
        for panels in range(first, last):
            c, k = panels // (K // LANES) * LANES, panels % (K // LANES) * LANES
            if c != packed:
                for n in range(start, end):
                    inside = pointer(xs[n - start, job.padding, job.padding])
                    _pack(pointer(x[n, 0, 0, c:]), H, W, C, inside, x_row)
                packed = c
            tile = tiles[panels - first]
            for n in range(start, end, together):
                samples = min(together, end - n)
                for top in range(0, OH, block):
                    rows = min(block, OH - top)
                    for m in range(samples):
                        _pack(pointer(dy[n + m, top, 0, k:]), rows, OW, K, pointer(dys[m]), OW * LANES)
                    for lane in range(0, LANES, CHANNELS):
                        for i in range(size):
                            a, out = pointer(xs[n - start, stride * top + i, 0, lane:]), pointer(tile[i, 0, lane])
                            where = (a, x_sample, stride * x_row, stride * LANES, pointer(dys), dy_sample)
                            if size == 3:
                                _add_tile_3(*where, samples, rows, OW, out)
                            else:
                                _add_tile_2(*where, samples, rows, OW, out)
    for panels in range(first, last):
        c, k = panels // (K // LANES) * LANES, panels % (K // LANES) * LANES
        for i in range(size):
            for j in range(size):
                for lane in range(LANES):
                    for other in range(LANES):
                        dweight[k + lane, i, j, c + other] = tiles[panels - first, i, j, other, lane]
    release(room)
