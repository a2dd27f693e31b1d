"""The gradient of a convolution with respect to its weights.

    dweight[k, c, i, j] = sum over samples n and places (y, x) of  dy[n, y, x, k] input[n, s y + i - p, s x + j - p, c]

for stride s and padding p: for each tap (i, j) a product of two tall matrices, which general libraries do badly: the
result is small and all of the work is in the sum. Here a tile of it (all taps j of a kernel's row, `CHANNELS` input
channels, `LANES` output channels) stays in registers while the sum runs over some rows of a sample, which stay in the
nearest cache for all tiles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ddim.kernels.code import Code
from ddim.kernels.team import array, kernel, pointer, run, share

LANES = 16
CHANNELS = 2
PLACES = 224
"""About how many places a tile is summed over before it is added to memory."""
NEAR = 1 << 18
"""About how many numbers of the maps are worked on at a time, for them to stay in the caches."""

NAMES = ("N", "H", "W", "C", "OH", "OW", "K", "size", "stride", "padding", "x", "dy", "dweight")
GRADIENT = np.dtype([(name, np.int64) for name in NAMES])


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
            sums = {entry: cgutils.alloca_once_value(builder, code.zero) for entry in tile}
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


@njit
def _pack(x: Any, rows: int, places: int, C: int, panel: Any, row: int) -> None:
    """Copy `LANES` channels of some rows of (places, C) to rows, of a panel, that are `row` numbers apart."""
    for h in range(rows):
        for w in range(places):
            _copy(x, (h * places + w) * C, panel, h * row + w * LANES)


@kernel(GRADIENT)
def _gradient(data: Any) -> None:
    job = carray(data, 1)[0]
    H, W, C, OH, OW, K, size, stride = job.H, job.W, job.C, job.OH, job.OW, job.K, job.size, job.stride
    x, dy = array(job.x, (job.N, H, W, C)), array(job.dy, (job.N, OH, OW, K))
    dweight = array(job.dweight, (K, size, size, C))
    block = min(OH, max(1, PLACES // OW))
    together = max(1, PLACES // (OH * OW))
    chunk = min(job.N, together * max(1, NEAR // (together * (H * W * C + OH * OW * K))))
    xs = np.zeros((chunk, H + 2 * job.padding, W + 2 * job.padding, LANES), np.float32)
    dys = np.empty((together, block, OW, LANES), np.float32)
    x_row, x_sample, dy_sample = xs.shape[2] * LANES, xs.shape[1] * xs.shape[2] * LANES, block * OW * LANES
    first, last = share(C // LANES * (K // LANES))
    tiles = np.zeros((last - first, size, size, LANES, LANES), np.float32)
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


def fits(C: int, K: int, size: tuple[int, int]) -> bool:
    """Whether `weight_gradient` takes a convolution of C to K channels with a kernel of that size."""
    return size in ((2, 2), (3, 3)) and C % LANES == 0 and K % LANES == 0


def weight_gradient(x: Tensor, dy: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """The gradient (K, C, size, size), channels innermost as the maps are.

    Args:
        x: the convolution's input (N, C, H, W), float32 on the CPU, channels innermost.
        dy: the gradient of its output (N, K, OH, OW), likewise.
        size: of the kernel.
        stride: of the convolution.
        padding: with zeros, on all sides.
    """
    N, C, H, W = x.shape
    _, K, OH, OW = dy.shape
    dweight = torch.empty((K, C, size, size), memory_format=torch.channels_last)
    sizes = {"N": N, "H": H, "W": W, "C": C, "OH": OH, "OW": OW, "K": K}
    run(_gradient, GRADIENT, **sizes, size=size, stride=stride, padding=padding, x=x, dy=dy, dweight=dweight)
    return dweight
