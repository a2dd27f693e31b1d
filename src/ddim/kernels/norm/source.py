"""The kernels of `ddim.kernels.norm`, for numba.

Vector code passes over `PIXELS_PER_RUN` pixels at a time, panel by panel of their channels: what belongs to a channel,
and the sums over those pixels, stay in registers. The sums of a run are taken in float32 and then added in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from ddim.kernels.codegen import (
    DOUBLE,
    INT32,
    INT64,
    Code,
    device_function,
    double_array,
    float_array,
    free,
    in_panels,
    malloc,
    pointer,
    thread_range,
    unpack,
)
from ddim.kernels.machine import OUTPUT_LANES

# Pixels that are summed in float32: short enough for its rounding, and all panels of a run are read while its cache
# lines, which several panels may share, are still near.
PIXELS_PER_RUN = 64
# Of the polynomial (exp(r) - 1 - r) / r^2, the highest power first (Cephes, expf.c).
PANEL_WIDTHS = (OUTPUT_LANES, 8, 1)
"""Channels that are normalized side by side: two registers of them, then one of AVX, then single ones."""

# exp(w) = 2^k exp(r), k an integer and |r| <= ln(2) / 2. ln(2) is in two parts, the first of which has so few bits that
# k times it is exact (Cephes, expf.c).
LOG2_E = math.log2(math.e)
LN_2_HIGH = 0.693359375
LN_2_LOW = math.log(2) - LN_2_HIGH
EXP_COEFFICIENTS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
# exp of more does not fit a float32, with a power of 2 made from its exponent alone.
MAX_EXPONENT = 87
FLOAT_EXPONENT_BIAS, FLOAT_MANTISSA_BITS = 127, 23


# Vector code.


def _sigmoid(code: Code, z: Any) -> Any:
    """Return 1 / (1 + exp(-z)) of a vector, 0 below -87; NaN stays NaN."""
    builder = code.builder
    # w = -z, limited to [-87, 87]. Ordered comparisons are false for NaN, which both selects then replace by a number:
    # the caller multiplies by z, which is NaN still.
    v = builder.fneg(z)
    v = builder.select(builder.fcmp_ordered(">", v, code.constant(-MAX_EXPONENT)), v, code.constant(-MAX_EXPONENT))
    is_below = builder.fcmp_ordered("<", v, code.constant(MAX_EXPONENT))
    w = builder.select(is_below, v, code.constant(MAX_EXPONENT))
    # k = round(w / ln(2)), r = w - k ln(2).
    k = code.floor(code.multiply_add(w, code.constant(LOG2_E), code.constant(0.5)))
    r = code.multiply_add(k, code.constant(-LN_2_HIGH), w)
    r = code.multiply_add(k, code.constant(-LN_2_LOW), r)
    # exp(r) = 1 + r + r^2 p(r), by Horner's scheme.
    p = code.constant(EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        p = code.multiply_add(p, r, code.constant(coefficient))
    exp_r = code.multiply_add(code.multiply(p, r), r, code.add(r, code.constant(1)))
    # 2^k: k, with the bias added, is the exponent's bits of a float32.
    integers = ir.VectorType(INT32, code.lanes)
    bias, bits = (ir.Constant(integers, [n] * code.lanes) for n in (FLOAT_EXPONENT_BIAS, FLOAT_MANTISSA_BITS))
    power_of_2 = builder.bitcast(builder.shl(builder.add(builder.fptosi(k, integers), bias), bits), code.vector)
    s = builder.fdiv(code.constant(1), code.multiply_add(exp_r, power_of_2, code.constant(1)))
    return builder.select(is_below, s, code.zero)


def _in_pixel_runs(builder: Any, P: Any, C: Any) -> Iterator[tuple[Code, Any, Any, Any]]:
    """Generate loops that together pass once over P pixels of C channels, run by run, in each panel by panel.

    Yields:
        The code builder of a panel's width, the panel's first channel, the run's first pixel, and its number of pixels.
    """
    run = ir.Constant(INT64, PIXELS_PER_RUN)
    runs = builder.udiv(builder.add(P, ir.Constant(INT64, PIXELS_PER_RUN - 1)), run)
    with cgutils.for_range(builder, runs) as loop:
        first = builder.mul(loop.index, run)
        remaining = builder.sub(P, first)
        pixels = builder.select(builder.icmp_signed("<", remaining, run), remaining, run)
        for code, channel in in_panels(builder, C, PANEL_WIDTHS):
            yield code, channel, first, pixels


def _add_to_totals(code: Code, accumulator: Any, totals: Any, channel: Any) -> None:
    """Add a panel's sums over a run, in float32, to the float64 totals of its channels."""
    builder, doubles = code.builder, ir.VectorType(DOUBLE, code.lanes)
    address = builder.bitcast(builder.gep(totals, [channel], source_etype=DOUBLE), doubles.as_pointer())
    sums = builder.fpext(code.value_of(accumulator), doubles)
    builder.store(builder.fadd(builder.load(address, align=8, typ=doubles), sums), address, align=8)


def _make_sum(squares: bool) -> Any:
    """Return an intrinsic that sums over pixels: the values, or their squared distances from a center."""

    @intrinsic
    def add_sums(typing_context: Any, x: Any, center: Any, P: Any, C: Any, totals: Any) -> Any:
        """Add sums over all pixels to totals.

        Operands:
            x: a pointer to (P, C).
            center: a pointer to (C,); read for squares only.
            P: pixels.
            C: channels.
            totals: a pointer to float64 (C,).
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, center, P, C, totals = arguments
            # Register budget: one accumulator and one center of two registers each.
            for code, channel, first, pixels in _in_pixel_runs(builder, P, C):
                total = code.accumulator()
                middle = code.load(code.at(center, channel)) if squares else None
                start = code.at(x, code.multiply_index(first, C), channel)
                # Load and sum, pixel by pixel, always in this order.
                with cgutils.for_range(builder, pixels) as pixel:
                    value = code.load(code.at(start, code.multiply_index(pixel.index, C)))
                    if squares:
                        distance = code.subtract(value, middle)
                        code.accumulate_product(total, distance, distance)
                    else:
                        code.accumulate(total, value)
                _add_to_totals(code, total, totals, channel)
            return context.get_dummy_value()

        return types.void(x, center, *[types.int64] * 2, totals), generate

    return add_sums


_add_sums, _add_squares = _make_sum(squares=False), _make_sum(squares=True)


def _make_apply(silu: bool) -> Any:
    """Return an intrinsic that scales and offsets each channel, with SiLU or without."""

    @intrinsic
    def apply(typing_context: Any, x: Any, P: Any, C: Any, factors: Any, y_view: Any) -> Any:
        """Write scale x + offset, or SiLU of it.

        Operands:
            x: a pointer to (P, C).
            P: pixels.
            C: channels.
            factors: (a pointer to the scale (C,), a pointer to the offset (C,)).
            y_view: (a pointer to the first pixel's result, the numbers from pixel to pixel).
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, P, C, factors, y_view = arguments
            scale, offset = unpack(builder, factors)
            y, y_pixel = unpack(builder, y_view)
            for code, channel in in_panels(builder, C, PANEL_WIDTHS):
                # Load a panel's scale and offset once for all pixels.
                factor, shift = code.load(code.at(scale, channel)), code.load(code.at(offset, channel))
                with cgutils.for_range(builder, P) as pixel:
                    value = code.load(code.at(x, channel, code.multiply_index(pixel.index, C)))
                    z = code.multiply_add(value, factor, shift)
                    if silu:
                        z = code.multiply(z, _sigmoid(code, z))
                    # Store, with the distance between pixels of y, which may have more channels.
                    code.store(z, code.at(y, channel, code.multiply_index(pixel.index, y_pixel)))
            return context.get_dummy_value()

        return types.void(x, *[types.int64] * 2, factors, y_view), generate

    return apply


_apply_affine, _apply_affine_silu = _make_apply(silu=False), _make_apply(silu=True)


def _make_z_gradient(silu: bool) -> Any:
    """Return an intrinsic that computes dz and its sums, with SiLU or without."""

    @intrinsic
    def z_gradient(typing_context: Any, maps: Any, P: Any, C: Any, terms: Any, totals: Any) -> Any:
        """Write dz = dy dy/dz for z = scale x + offset, and add up dz and dz (x - center) over all pixels.

        Operands:
            maps: (pointers to x, to dy, and to dz, which is written), all (P, C).
            P: pixels.
            C: channels.
            terms: (pointers to scale, offset and center), all (C,).
            totals: (pointers to the sums of dz and of dz (x - center)), both float64 (C,).
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            maps, P, C, terms, totals = arguments
            x, dy, dz = unpack(builder, maps)
            targets = unpack(builder, totals)
            # Register budget: two accumulators and three terms of two registers each, beside the sigmoid's.
            for code, channel, first, pixels in _in_pixel_runs(builder, P, C):
                factor, shift, middle = (code.load(code.at(term, channel)) for term in unpack(builder, terms))
                sums = code.accumulator(), code.accumulator()
                start = builder.add(code.multiply_index(first, C), channel)
                with cgutils.for_range(builder, pixels) as pixel:
                    position = builder.add(start, code.multiply_index(pixel.index, C))
                    value, slope = (code.load(code.at(source, position)) for source in (x, dy))
                    if silu:
                        # d(z s)/dz = s (1 + z (1 - s)), s the sigmoid of z.
                        z = code.multiply_add(value, factor, shift)
                        s = _sigmoid(code, z)
                        complement = code.subtract(code.constant(1), s)
                        slope = code.multiply(slope, s)
                        slope = code.multiply(slope, code.multiply_add(z, complement, code.constant(1)))
                    # Store dz; add it up while it is in a register.
                    code.store(slope, code.at(dz, position))
                    code.accumulate(sums[0], slope)
                    code.accumulate_product(sums[1], slope, code.subtract(value, middle))
                for total, target in zip(sums, targets, strict=True):
                    _add_to_totals(code, total, target, channel)
            return context.get_dummy_value()

        return types.void(maps, *[types.int64] * 2, terms, totals), generate

    return z_gradient


_z_gradient, _z_gradient_silu = _make_z_gradient(silu=False), _make_z_gradient(silu=True)


@intrinsic
def _x_gradient(typing_context: Any, x: Any, dx: Any, P: Any, C: Any, terms: Any, totals: Any) -> Any:
    """Replace dz by dx = scale dz - slope x + offset, and add up dx over all pixels.

    Operands:
        x: a pointer to (P, C).
        dx: a pointer to dz (P, C), which becomes dx.
        P: pixels.
        C: channels.
        terms: (pointers to scale, slope and offset), all (C,).
        totals: a pointer to the sums of dx, float64 (C,).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, dx, P, C, terms, totals = arguments
        # Register budget: one accumulator and three terms of two registers each.
        for code, channel, first, pixels in _in_pixel_runs(builder, P, C):
            factor, slope, shift = (code.load(code.at(term, channel)) for term in unpack(builder, terms))
            total = code.accumulator()
            start = builder.add(code.multiply_index(first, C), channel)
            with cgutils.for_range(builder, pixels) as pixel:
                position = builder.add(start, code.multiply_index(pixel.index, C))
                value, target = code.load(code.at(x, position)), code.at(dx, position)
                weighted = code.multiply(value, slope)
                result = code.subtract(code.multiply_add(code.load(target), factor, shift), weighted)
                code.store(result, target)
                code.accumulate(total, result)
            _add_to_totals(code, total, totals, channel)
        return context.get_dummy_value()

    return types.void(x, dx, *[types.int64] * 2, terms, totals), generate


# What kernels share: functions that become part of them.


@device_function
def affine(maps: Any, terms: Any, groups: int, eps: float, statistics: Any, results: Any) -> None:
    """Compute each channel's scale and offset, with z = scale x + offset, that normalize a sample.

    Args:
        maps: the sample's feature maps side by side, a (P, A) and b (P, B).
        terms: shift, weight and bias, all (A + B,).
        groups: of the norm.
        eps: added to the variance.
        statistics: mean and rstd, both (groups,), which are written. What is computed from them has their precision:
            float32 where the backward pass reads them again, float64 otherwise.
        results: scale and offset, both (A + B,), and float64 scratch (A + B,).
    """
    a, b = maps
    shift, weight, bias = terms
    mean, rstd = statistics
    scale, offset, totals = results
    # D channels per group, some of which may lie in a and some in b.
    P, A = a.shape
    B = b.shape[1]
    D = (A + B) // groups
    # Mean of each group; until the end, `offset` is what is subtracted from x: the mean of x + shift, less the shift.
    totals[:] = 0
    _add_sums(pointer(a), pointer(offset), P, A, pointer(totals))
    _add_sums(pointer(b), pointer(offset), P, B, pointer(totals[A:]))
    for g in range(groups):
        m = 0.0
        for c in range(g * D, (g + 1) * D):
            m += totals[c] / P + shift[c]
        mean[g] = m / D
        for c in range(g * D, (g + 1) * D):
            offset[c] = mean[g] - shift[c]
    # Variance of each group, from the squared distances from its mean.
    totals[:] = 0
    _add_squares(pointer(a), pointer(offset), P, A, pointer(totals))
    _add_squares(pointer(b), pointer(offset[A:]), P, B, pointer(totals[A:]))
    for g in range(groups):
        squares = 0.0
        for c in range(g * D, (g + 1) * D):
            squares += totals[c]
        rstd[g] = 1 / math.sqrt(squares / (P * D) + eps)
        # weight (x - offset) rstd + bias, as one product and one sum.
        for c in range(g * D, (g + 1) * D):
            scale[c] = rstd[g] * weight[c]
            offset[c] = bias[c] - offset[c] * scale[c]


@device_function
def apply_row(x: Any, y: Any, first_channel: int, factors: Any, silu: bool) -> None:
    """Write scale x + offset, or SiLU of it, for a row of pixels.

    Args:
        x: (W, C).
        y: (W, C or more), written from `first_channel` on.
        first_channel: where the channels of x begin in y.
        factors: scale and offset, both (C,).
        silu: whether SiLU follows.
    """
    # The second map may have no channels: its row of y then has no first number to point to.
    if x.shape[0] * x.shape[1] == 0:
        return
    W, C = x.shape
    scale, offset = factors
    pointers = pointer(scale), pointer(offset)
    y_view = pointer(y[0, first_channel:]), y.shape[1]
    if silu:
        _apply_affine_silu(pointer(x), W, C, pointers, y_view)
    else:
        _apply_affine(pointer(x), W, C, pointers, y_view)


@device_function
def apply_rows(maps: Any, rows: Any, y: Any, top: int, factors: Any, silu: bool) -> None:
    """Write scale x + offset, or SiLU of it, for rows of the feature maps of a sample side by side.

    Args:
        maps: a (H W, A) and b (H W, B).
        rows: the first row, one past the last, and W.
        y: (rows, columns, A + B), whose pixel (top, top) is the first one of the maps.
        top: 1 with a halo, 0 without.
        factors: scale and offset, both (A + B,).
        silu: whether SiLU follows.
    """
    a, b = maps
    first, last, W = rows
    scale, offset = factors
    A = a.shape[1]
    for h in range(first, last):
        # One row of the result: the channels of a, then those of b.
        row = y[h + top, top : top + W]
        apply_row(a[h * W : (h + 1) * W], row, 0, (scale[:A], offset[:A]), silu)
        apply_row(b[h * W : (h + 1) * W], row, A, (scale[A:], offset[A:]), silu)


# Kernels.


def forward(data: Any) -> None:
    """Normalize this thread's range of samples; see `ddim.kernels.norm.forward`."""
    args = carray(data, 1)[0]
    N, P, C, groups = args.N, args.P, args.C, args.groups
    x, y, empty = float_array(args.x, (N, P, C)), float_array(args.y, (N, P, C)), float_array(args.x, (P, 0))
    shift = float_array(args.shift, (N, C))
    weight, bias = float_array(args.norm_weight, (C,)), float_array(args.norm_bias, (C,))
    mean, rstd = float_array(args.mean, (N, groups)), float_array(args.rstd, (N, groups))
    # Scratch: C doubles, which are 2 C floats, and 2 C floats.
    scratch = malloc(4 * C)
    totals = double_array(scratch, C)
    scale, offset = float_array(scratch + 8 * C, C), float_array(scratch + 12 * C, C)
    # Threads divide samples.
    first, last = thread_range(N)
    for n in range(first, last):
        maps, terms = (x[n], empty), (shift[n], weight, bias)
        affine(maps, terms, groups, args.eps, (mean[n], rstd[n]), (scale, offset, totals))
        apply_row(x[n], y[n], 0, (scale, offset), args.silu != 0)
    free(scratch)


def backward(data: Any) -> None:
    """Compute the gradients of this thread's range of samples; see `ddim.kernels.norm.backward`."""
    args = carray(data, 1)[0]
    N, P, C, groups = args.N, args.P, args.C, args.groups
    D = C // groups
    x, dy, dx = float_array(args.x, (N, P, C)), float_array(args.dy, (N, P, C)), float_array(args.dx, (N, P, C))
    shift, dshift = float_array(args.shift, (N, C)), float_array(args.dshift, (N, C))
    weight, bias = float_array(args.norm_weight, (C,)), float_array(args.norm_bias, (C,))
    dweight, dbias = float_array(args.dweight, (N, C)), float_array(args.dbias, (N, C))
    mean, rstd = float_array(args.mean, (N, groups)), float_array(args.rstd, (N, groups))
    # Scratch: 2 C doubles and 4 C floats.
    scratch = malloc(8 * C)
    sums, weighted_sums = double_array(scratch, C), double_array(scratch + 8 * C, C)
    floats = float_array(scratch + 16 * C, (4, C))
    scale, offset, center, slope = floats[0], floats[1], floats[2], floats[3]
    # Threads divide samples; dweight and dbias are summed over samples by the caller.
    first, last = thread_range(N)
    for n in range(first, last):
        # z = scale x + offset again, from the saved statistics.
        for c in range(C):
            g = c // D
            scale[c] = rstd[n, g] * weight[c]
            center[c] = mean[n, g] - shift[n, c]
            offset[c] = bias[c] - center[c] * scale[c]
        # First pass over the maps: dz, which is kept in dx, and its sums.
        sums[:] = 0
        weighted_sums[:] = 0
        maps = pointer(x[n]), pointer(dy[n]), pointer(dx[n])
        terms = pointer(scale), pointer(offset), pointer(center)
        totals = pointer(sums), pointer(weighted_sums)
        if args.silu:
            _z_gradient_silu(maps, P, C, terms, totals)
        else:
            _z_gradient(maps, P, C, terms, totals)
        # dbias, dweight, and the two means of each group that dx needs: see `ddim.nn.ops`.
        for g in range(groups):
            r = np.float64(rstd[n, g])
            m0 = m1 = 0.0
            for c in range(g * D, (g + 1) * D):
                m0 += weight[c] * sums[c] / (P * D)
                m1 += weight[c] * weighted_sums[c] * r / (P * D)
            for c in range(g * D, (g + 1) * D):
                dbias[n, c], dweight[n, c] = sums[c], weighted_sums[c] * r
                # dx = scale dz - slope x + offset
                slope[c] = r * r * m1
                offset[c] = r * r * m1 * center[c] - r * m0
        # Second pass: dx from dz, and its sums, which are dshift.
        sums[:] = 0
        _x_gradient(
            pointer(x[n]), pointer(dx[n]), P, C, (pointer(scale), pointer(slope), pointer(offset)), pointer(sums)
        )
        for c in range(C):
            dshift[n, c] = sums[c]
    free(scratch)


def normalize(data: Any) -> None:
    """Normalize this thread's range of rows; see `ddim.kernels.norm.normalize`."""
    args = carray(data, 1)[0]
    N, H, W, A, B, groups = args.N, args.H, args.W, args.A, args.B, args.groups
    C = A + B
    a, b = float_array(args.a, (N, H * W, A)), float_array(args.b, (N, H * W, B))
    shift = float_array(args.shift, (args.num_shifts, C))
    weight = float_array(args.norm_weight, (args.num_weights, C))
    bias = float_array(args.norm_bias, (args.num_weights, C))
    y = float_array(args.y, (N, args.padded_H, args.padded_W, C))
    # Scratch: C doubles, 2 C floats, 2 groups doubles.
    scratch = malloc(4 * C + 4 * groups)
    totals = double_array(scratch, C)
    scale, offset = float_array(scratch + 8 * C, C), float_array(scratch + 12 * C, C)
    statistics = double_array(scratch + 16 * C, (2, groups))
    # Threads divide rows of pixels; each computes the statistics of the samples that its rows belong to.
    first, last = thread_range(N * H)
    for n in range(first // H, (last + H - 1) // H):
        s, w = min(n, args.num_shifts - 1), min(n, args.num_weights - 1)
        maps, terms = (a[n], b[n]), (shift[s], weight[w], bias[w])
        affine(maps, terms, groups, args.eps, (statistics[0], statistics[1]), (scale, offset, totals))
        rows = max(first - n * H, 0), min(last - n * H, H), W
        apply_rows(maps, rows, y[n], args.top, (scale, offset), args.silu != 0)
    free(scratch)
