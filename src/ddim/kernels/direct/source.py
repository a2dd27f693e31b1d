"""The kernel of `ddim.kernels.direct`, for numba."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from ddim.kernels.codegen import (
    INT64,
    Code,
    as_float_pointer,
    float_array,
    free,
    int64_array,
    malloc,
    pointer,
    thread_range,
    unpack,
)
from ddim.kernels.machine import OUTPUT_LANES

# Pixels that are computed for all output channels before the next ones: the block's input stays in the cache while
# all weights pass by.
PIXELS_PER_BLOCK = 192
# Threads divide the pixels instead of the panels of output channels from `PIXELS_PER_BLOCK` pixels for each panel on,
# of which so many count: there are then pixels enough for every thread to reuse the weights that it reads.
MAX_PANELS_FOR_PIXELS = 4


@intrinsic
def _convolve_block(typing_context: Any, pixels: Any, filters: Any, shape: Any, residual: Any, y: Any, K: Any) -> Any:
    """Compute `OUTPUT_LANES` channels of a block of pixels.

    Operands:
        pixels: (a pointer to x, a pointer to the offset of each pixel's window in x, their number).
        filters: (a pointer to a panel of weights, a pointer to its bias).
        shape: (the numbers from row to row of x, the filter's size, C).
        residual: a pointer to the first pixel's residual, or a null pointer.
        y: a pointer to the first pixel's results; those of the next pixel lie K numbers further, as in `residual`.
        K: output channels.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pixels, filters, shape, residual, y, K = arguments
        x, offsets, count = unpack(builder, pixels)
        weights, bias = unpack(builder, filters)
        row, size, C = unpack(builder, shape)
        code = Code(builder, OUTPUT_LANES)
        # Register budget: see `REGISTER_ROWS`. Each block of pixels has an accumulator of two registers per pixel.
        for block, first in code.in_row_blocks(count):
            sums, windows = [code.accumulator() for _ in range(block)], []
            # Load where each pixel's window begins.
            for p in range(block):
                address = builder.gep(offsets, [builder.add(first, ir.Constant(INT64, p))], source_etype=INT64)
                windows.append(code.at(x, builder.load(address, typ=INT64)))
            # Multiply: one vector of weights at a time, for all pixels of the block.
            with cgutils.for_range(builder, size) as i, cgutils.for_range(builder, size) as j:
                number = builder.add(code.multiply_index(i.index, size), j.index)
                tap = code.at(weights, code.multiply_index(code.multiply_index(C, number), OUTPUT_LANES))
                shift = builder.add(code.multiply_index(row, i.index), code.multiply_index(C, j.index))
                inputs = [code.at(window, shift) for window in windows]
                with cgutils.for_range(builder, C) as channel:
                    address = code.at(tap, code.multiply_index(channel.index, OUTPUT_LANES))
                    code.prefetch(address)
                    factors = code.load(address)
                    for pixel, total in zip(inputs, sums, strict=True):
                        code.accumulate_product(total, code.broadcast(code.at(pixel, channel.index)), factors)
            # Add bias and residual, after the sum, in this order whatever the block.
            bias_vector = code.load(bias)
            for total in sums:
                code.accumulate(total, bias_vector)
            distances = [code.multiply_index(K, builder.add(first, ir.Constant(INT64, p))) for p in range(block)]
            with builder.if_then(cgutils.is_not_null(builder, residual)):
                for distance, total in zip(distances, sums, strict=True):
                    code.accumulate(total, code.load(code.at(residual, distance)))
            # Store.
            for distance, total in zip(distances, sums, strict=True):
                code.store(code.value_of(total), code.at(y, distance))
        return context.get_dummy_value()

    return types.void(pixels, filters, shape, residual, y, types.int64), generate


def convolve(data: Any) -> None:
    """Run this thread's range of a convolution; see `ddim.kernels.direct.convolve`."""
    args = carray(data, 1)[0]
    N, H, W, C, K, stride = args.N, args.H, args.W, args.C, args.K, args.stride
    # x as one row of numbers: windows are found by their offsets.
    row = args.padded_W * C
    x, bias = float_array(args.x, N * args.padded_H * row), float_array(args.bias, K)
    panel_size = args.size * args.size * C * OUTPUT_LANES
    y, weights = float_array(args.y, (N * H * W, K)), float_array(args.weights, (K // OUTPUT_LANES, panel_size))
    pixels, panels = N * H * W, K // OUTPUT_LANES

    # Divide among threads: output channels, or pixels where there are many.
    first, last = 0, pixels
    first_panel, last_panel = thread_range(panels)
    if pixels >= PIXELS_PER_BLOCK * (panels if panels < MAX_PANELS_FOR_PIXELS else MAX_PANELS_FOR_PIXELS):
        first, last = thread_range(pixels)
        first_panel, last_panel = 0, panels

    # Scratch: one int64, of the size of two floats, per pixel.
    scratch = malloc(2 * PIXELS_PER_BLOCK)
    offsets = int64_array(scratch, PIXELS_PER_BLOCK)
    for start in range(first, last, PIXELS_PER_BLOCK):
        # A block of pixels, in the order in which they lie in memory, over the ends of rows and samples.
        count = min(PIXELS_PER_BLOCK, last - start)
        # Where each pixel's window begins in x.
        for p in range(count):
            n, position = (start + p) // (H * W), (start + p) % (H * W)
            offsets[p] = (n * args.padded_H + position // W * stride) * row + position % W * stride * C
        # All output channels of these pixels.
        for panel in range(first_panel, last_panel):
            channel = panel * OUTPUT_LANES
            # A null pointer without a residual, which the vector code tests for.
            residual = 0
            if args.has_residual:
                residual = args.residual + 4 * (start * K + channel)
            _convolve_block(
                (pointer(x), pointer(offsets), count),
                (pointer(weights[panel]), pointer(bias[channel:])),
                (row, args.size, C),
                as_float_pointer(residual),
                pointer(y[start, channel:]),
                K,
            )
    free(scratch)
