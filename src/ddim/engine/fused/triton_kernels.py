"""The operations of `ddim.engine.fused.operations` as kernels in Triton. Importing this module requires Triton.

Feature maps are channels_last: a sample is a matrix of P = H W positions by C channels, and a tile of it is BLOCK_P
positions by BLOCK_C channels side by side, which threads read and write by 16 bytes. Tile sizes are powers of two, as
Triton requires; what lies outside is masked. All arithmetic is in float32.

Group normalization of u = x + shift has two forms:

- Where the channels of a few groups fit into the registers of a thread block at all P positions, one kernel reads x
  once: sums, then sums of squared differences from the mean, then the result.
- Otherwise one kernel computes mean and sum of squared differences of each chunk of positions, and a second combines
  them, by the formula of Chan, Golub and LeVeque, and normalizes:

      mean = sum_k n_k mean_k / n,    M2 = sum_k (M2_k + n_k (mean_k - mean)^2)

No form subtracts a mean's square from a mean of squares, which would lose all digits where the mean is large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddim.engine.fused.reference import Norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TILE_ELEMENTS = 16384
"""Elements of a tile: 32 per thread of 16 warps, so that two thread blocks fit a multiprocessor."""
MAX_TILE_ELEMENTS = 32768
"""Elements of a tile that still stays in registers, with 32 warps."""
MAX_REGISTERS = 64
"""Registers of a thread of 16 warps, of which 32 hold its part of a tile."""
STREAM_ELEMENTS = 4096
"""Elements of a tile of operations without sums."""
VECTOR_CHANNELS = 8
"""Channels of 16 bits that a thread reads at once: tiles begin at multiples of it, where groups allow it."""
MAX_TILE_CHANNELS = 64
"""Channels of a tile of several groups: sums over groups compare all pairs of its channels."""
MAX_STREAM_CHANNELS = 1024
MAX_GROUP_CHANNELS = 8192
MAX_CHUNKS = 32
"""Chunks of positions whose statistics are combined."""
MAX_INDEX = 2**31 - 1
MAX_TILES = 2**16 - 1
"""Programs along the second axis of a grid, of which CUDA launches no more."""


@triton.jit
def _load(a_ptr, b_ptr, n, p, c, mask, P, A, C, HAS_B: tl.constexpr):
    """Load positions p and channels c of sample n of one feature map, or of two side by side, as float32."""
    sample = n.to(tl.int64) * P
    if HAS_B:
        from_a = mask & (c < A)[None, :]
        from_b = mask & (c >= A)[None, :]
        B = C - A
        x = tl.load(a_ptr + sample * A + (p[:, None] * A + c[None, :]), mask=from_a, other=0.0).to(tl.float32)
        x += tl.load(b_ptr + sample * B + (p[:, None] * B + (c - A)[None, :]), mask=from_b, other=0.0).to(tl.float32)
    else:
        x = tl.load(a_ptr + sample * C + (p[:, None] * C + c[None, :]), mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _load_row(ptr, n, stride, c, mask, USED: tl.constexpr):
    """Load channels c of sample n's row as float32, or zeros where rows are not USED."""
    if USED:
        row = tl.load(ptr + n.to(tl.int64) * stride + c, mask=mask, other=0.0).to(tl.float32)
    else:
        row = tl.zeros(c.shape, tl.float32)
    return row


@triton.jit
def _sum_groups(values, CHANNELS_PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr, GROUPS: tl.constexpr):
    """Sum per-channel values (BLOCK_C,) over the channels of each group; each channel gets its group's sum."""
    if GROUPS == 1:
        sums = tl.zeros([BLOCK_C], tl.float32) + tl.sum(values, axis=0)
    else:
        group = tl.arange(0, BLOCK_C) // CHANNELS_PER_GROUP
        is_same = group[:, None] == group[None, :]
        sums = tl.sum(tl.where(is_same, values[None, :], 0.0), axis=1)
    return sums


@triton.jit
def _finish(
    centered, rstd, n, c, c_mask, weight_ptr, bias_ptr, scale_ptr, after_ptr, modulation_stride,
    HAS_SCALE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Scale and shift normalized values, then apply SiLU."""
    weight = tl.load(weight_ptr + c, mask=c_mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c_mask, other=0.0).to(tl.float32)
    if HAS_SCALE:
        factor = 1.0 + _load_row(scale_ptr, n, modulation_stride, c, c_mask, True)
        weight = weight * factor
        bias = bias * factor + _load_row(after_ptr, n, modulation_stride, c, c_mask, True)
    y = centered * (rstd * weight)[None, :] + bias[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def _normalize_tile(
    a_ptr, b_ptr, y_ptr, weight_ptr, bias_ptr, shift_ptr, scale_ptr, after_ptr, shift_stride, modulation_stride,
    P, A, C, blocks, eps,
    HAS_B: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_SCALE: tl.constexpr, SILU: tl.constexpr,
    CHANNELS_PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Normalize GROUPS groups of one sample, all of whose positions are in one tile."""
    # A program is a sample and a block of channels; programs side by side read channels side by side.
    program = tl.program_id(0)
    n = program // blocks
    lane = tl.arange(0, BLOCK_C)
    c = (program % blocks) * (GROUPS * CHANNELS_PER_GROUP) + lane
    p = tl.arange(0, BLOCK_P)
    c_mask = (lane < GROUPS * CHANNELS_PER_GROUP) & (c < C)
    mask = (p < P)[:, None] & c_mask[None, :]

    # Load x, add the shift.
    x = _load(a_ptr, b_ptr, n, p, c, mask, P, A, C, HAS_B)
    if HAS_SHIFT:
        shift = _load_row(shift_ptr, n, shift_stride, c, c_mask, True)
        x = tl.where(mask, x + shift[None, :], 0.0)

    # Mean, then the variance around it.
    mean = _sum_groups(tl.sum(x, axis=0), CHANNELS_PER_GROUP, BLOCK_C, GROUPS) / (P * CHANNELS_PER_GROUP)
    centered = tl.where(mask, x - mean[None, :], 0.0)
    squares = tl.sum(centered * centered, axis=0)
    variance = _sum_groups(squares, CHANNELS_PER_GROUP, BLOCK_C, GROUPS) / (P * CHANNELS_PER_GROUP)
    rstd = 1.0 / tl.sqrt(variance + eps)

    # Scale, shift, activate, store.
    y = _finish(
        centered, rstd, n, c, c_mask, weight_ptr, bias_ptr, scale_ptr, after_ptr, modulation_stride, HAS_SCALE, SILU
    )  # fmt: skip
    offsets = n.to(tl.int64) * P * C + (p[:, None] * C + c[None, :])
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _compute_moments(
    a_ptr, b_ptr, mean_ptr, m2_ptr, shift_ptr, shift_stride, P, A, C, blocks, chunk,
    HAS_B: tl.constexpr, HAS_SHIFT: tl.constexpr,
    CHANNELS_PER_GROUP: tl.constexpr, GROUPS: tl.constexpr,
    TILES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute mean and sum of squared differences of GROUPS groups in a chunk of positions of one sample.

    Both are written per channel, (N, chunks, C), where all channels of a group have the same.
    """
    program = tl.program_id(0)
    n = program // blocks
    lane = tl.arange(0, BLOCK_C)
    c = (program % blocks) * (GROUPS * CHANNELS_PER_GROUP) + lane
    c_mask = (lane < GROUPS * CHANNELS_PER_GROUP) & (c < C)
    shift = _load_row(shift_ptr, n, shift_stride, c, c_mask, HAS_SHIFT)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, P)

    # Moments per channel, tile by tile.
    count = tl.zeros([BLOCK_C], tl.float32)
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(TILES):
        start = first + tile * BLOCK_P
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < last)[:, None] & c_mask[None, :]
        x = _load(a_ptr, b_ptr, n, p, c, mask, P, A, C, HAS_B)
        x = tl.where(mask, x + shift[None, :], 0.0)
        # The last tiles of the last chunk may be empty; its first is not.
        tile_count = tl.zeros([BLOCK_C], tl.float32) + tl.maximum(tl.minimum(last - start, BLOCK_P), 0)
        tile_mean = tl.sum(x, axis=0) / tl.maximum(tile_count, 1.0)
        centered = tl.where(mask, x - tile_mean[None, :], 0.0)
        total = count + tile_count
        delta = tile_mean - mean
        mean += delta * (tile_count / total)
        m2 += tl.sum(centered * centered, axis=0) + delta * delta * (count * tile_count / total)
        count = total

    # Combine the channels of each group.
    group_mean = _sum_groups(mean, CHANNELS_PER_GROUP, BLOCK_C, GROUPS) / CHANNELS_PER_GROUP
    delta = tl.where(c_mask, mean - group_mean, 0.0)
    group_m2 = _sum_groups(m2 + count * delta * delta, CHANNELS_PER_GROUP, BLOCK_C, GROUPS)
    offsets = (n.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * C + c
    tl.store(mean_ptr + offsets, group_mean, mask=c_mask)
    tl.store(m2_ptr + offsets, group_m2, mask=c_mask)


@triton.jit
def _apply_moments(
    a_ptr, b_ptr, y_ptr, mean_ptr, m2_ptr, weight_ptr, bias_ptr, shift_ptr, scale_ptr, after_ptr,
    shift_stride, modulation_stride, P, A, C, blocks, chunk, chunks, eps,
    HAS_B: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_SCALE: tl.constexpr, SILU: tl.constexpr,
    CHANNELS_PER_GROUP: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Normalize a tile by the moments of all chunks."""
    program = tl.program_id(0)
    n = program // blocks
    lane = tl.arange(0, BLOCK_C)
    c = (program % blocks) * BLOCK_CHANNELS + lane
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    c_mask = (lane < BLOCK_CHANNELS) & (c < C)
    mask = (p < P)[:, None] & c_mask[None, :]

    # Load x, add the shift.
    x = _load(a_ptr, b_ptr, n, p, c, mask, P, A, C, HAS_B)
    if HAS_SHIFT:
        x += _load_row(shift_ptr, n, shift_stride, c, c_mask, True)[None, :]

    # Combine the moments of the chunks, of which the last may be shorter.
    k = tl.arange(0, BLOCK_K)
    rows = tl.where(k < chunks, tl.minimum(P - k * chunk, chunk), 0).to(tl.float32)
    k_mask = (k < chunks)[:, None] & c_mask[None, :]
    offsets = n.to(tl.int64) * chunks * C + (k[:, None] * C + c[None, :])
    means = tl.load(mean_ptr + offsets, mask=k_mask, other=0.0)
    m2 = tl.load(m2_ptr + offsets, mask=k_mask, other=0.0)
    mean = tl.sum(means * (rows / P)[:, None], axis=0)
    delta = means - mean[None, :]
    total = tl.sum(m2 + delta * delta * (rows * CHANNELS_PER_GROUP)[:, None], axis=0)
    # Divided one by one: the number of a group's values may exceed an integer.
    rstd = 1.0 / tl.sqrt(total / P / CHANNELS_PER_GROUP + eps)

    # Scale, shift, activate, store.
    y = _finish(
        x - mean[None, :], rstd, n, c, c_mask, weight_ptr, bias_ptr, scale_ptr, after_ptr, modulation_stride,
        HAS_SCALE, SILU,
    )  # fmt: skip
    offsets = n.to(tl.int64) * P * C + (p[:, None] * C + c[None, :])
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_residual(
    x_ptr, first_ptr, second_ptr, bias_ptr, y_ptr, rows, C, factor,
    HAS_FIRST: tl.constexpr, HAS_SECOND: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute (x + bias + first + second) factor for a tile of positions of all samples by channels."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    mask = (r < rows)[:, None] & c_mask[None, :]
    offsets = r.to(tl.int64)[:, None] * C + c[None, :]
    # All loads before the first sum, so that they are under way together.
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_FIRST:
        first = tl.load(first_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_SECOND:
        second = tl.load(second_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + c, mask=c_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_FIRST:
        x += first
    if HAS_SECOND:
        x += second
    tl.store(y_ptr + offsets, (x * factor).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _interleave(x_ptr, y_ptr, rows, H, W, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Copy the four sub-pixel results (N, H + 1, W + 1, 4 C) to their places in (N, 2 H, 2 W, C)."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (r < rows)[:, None] & (c < C)[None, :]
    # The position that each row writes: sample n, row 2 h + i, column 2 w + j.
    column = r % (2 * W)
    row = r // (2 * W)
    n = row // (2 * H)
    i = row % 2
    h = (row % (2 * H)) // 2
    j = column % 2
    w = column // 2
    source = (n * (H + 1) + h + i).to(tl.int64) * (W + 1) + w + j
    offsets = (source * 4 + 2 * i + j)[:, None] * C + c[None, :]
    values = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    tl.store(y_ptr + (r.to(tl.int64)[:, None] * C + c[None, :]), values, mask=mask)


@dataclass(frozen=True)
class Tiling:
    """How a group norm is divided among thread blocks.

    Attributes:
        groups: of a tile.
        block_c: lanes of a tile, a power of two that holds the channels of its groups.
        block_p: positions of a tile, a power of two.
        is_single: whether a tile holds all positions.
    """

    groups: int
    block_c: int
    block_p: int
    is_single: bool


def choose_tiling(P: int, C: int, groups: int) -> Tiling:
    """Choose the tiles of a group norm.

    Args:
        P: positions of a sample.
        C: channels.
        groups: of the norm.

    Returns:
        Tiles of whole groups. They begin at multiples of `VECTOR_CHANNELS` channels where the number of groups allows
        it.
    """
    size = C // groups
    positions = triton.next_power_of_2(P)

    def lanes(number: int) -> int:
        return max(16, triton.next_power_of_2(number * size))

    # The least number of groups that ends at a multiple of a vector, and has 16 channels where there are as many.
    least = min(groups, VECTOR_CHANNELS // math.gcd(size, VECTOR_CHANNELS))
    while least * size < 16 and 2 * least <= groups:
        least *= 2
    is_single = positions * lanes(least) <= MAX_TILE_ELEMENTS
    limit = TILE_ELEMENTS // (positions if is_single else 64)
    number = least
    while 2 * number <= groups and lanes(2 * number) <= min(limit, MAX_TILE_CHANNELS):
        number *= 2
    if number > 1 and lanes(number) > MAX_TILE_CHANNELS:
        number = 1  # Unaligned, but sums over groups stay small.
        is_single = positions * lanes(number) <= MAX_TILE_ELEMENTS
    block_p = positions if is_single else max(1, min(positions, TILE_ELEMENTS // lanes(number)))
    return Tiling(number, lanes(number), block_p, is_single)


def _launch_options(elements: int) -> dict[str, int]:
    """Return how many warps work on a tile, and with how many registers."""
    warps = 32 if elements > TILE_ELEMENTS else max(1, min(16, elements // 512))
    # The compiler for AMD's devices has no such option; 32 warps have no more registers anyway.
    limits = {"maxnreg": MAX_REGISTERS} if warps == 16 and torch.version.hip is None else {}
    return {"num_warps": warps, **limits}


def is_supported(shape: Sequence[int], dtype: torch.dtype, groups: int = 1) -> bool:
    """Return whether the kernels support a feature map.

    Args:
        shape: of the result, (N, C, H, W).
        dtype: of all feature maps.
        groups: of the norm, for `normalize`.
    """
    N, C, H, W = shape
    P = H * W
    # Positions and channels of a sample, positions of all samples, and programs are counted in 32 bits.
    is_indexable = min(shape) > 0 and P * C <= MAX_INDEX and N * max(P, C) <= MAX_INDEX // 2
    if dtype not in DTYPES or not is_indexable or C % groups != 0 or C // groups > MAX_GROUP_CHANNELS:
        return False
    return P // choose_tiling(P, C, groups).block_p < MAX_TILES


def normalize(
    a: Tensor,
    b: Tensor | None,
    norm: Norm,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift_after: Tensor | None = None,
) -> Tensor:
    """Normalize; see `ddim.engine.fused.operations.normalize`.

    Args:
        a: (N, A, H, W) in channels_last.
        b: (N, B, H, W) in channels_last, of the dtype of `a`; `None` for none.
        norm: of A + B channels.
        shift: (N, C) or (1, C), or `None`.
        scale: (N, C) or (1, C), or `None`.
        shift_after: of the shape and strides of `scale`, given with it.

    Returns:
        (N, A + B, H, W) in channels_last.
    """
    N, A, H, W = a.shape
    P, C = H * W, A + (0 if b is None else b.shape[1])
    y = torch.empty((N, C, H, W), dtype=a.dtype, device=a.device, memory_format=torch.channels_last)
    tiling = choose_tiling(P, C, norm.groups)
    size = C // norm.groups
    blocks = -(-norm.groups // tiling.groups)
    shift_stride = 0 if shift is None or shift.shape[0] == 1 else shift.stride(0)
    modulation_stride = 0 if scale is None or scale.shape[0] == 1 else scale.stride(0)
    options = _launch_options(tiling.block_p * tiling.block_c)
    # Pointers that are not read still have to be pointers.
    inputs = a, a if b is None else b
    rows = [norm.weight if row is None else row for row in (shift, scale, shift_after)]
    flags = {"HAS_B": b is not None, "HAS_SHIFT": shift is not None}
    modulation = {"HAS_SCALE": scale is not None, "SILU": norm.silu}
    sizes = {"CHANNELS_PER_GROUP": size, "BLOCK_P": tiling.block_p, "BLOCK_C": tiling.block_c}
    if tiling.is_single:
        _normalize_tile[(N * blocks,)](
            *inputs, y, norm.weight, norm.bias, *rows, shift_stride, modulation_stride,
            P, A, C, blocks, norm.eps, **flags, **modulation, **sizes, GROUPS=tiling.groups, **options,
        )  # fmt: skip
        return y
    tiles = -(-P // tiling.block_p)
    tiles_per_chunk = -(-tiles // MAX_CHUNKS)
    chunk = tiling.block_p * tiles_per_chunk
    chunks = -(-P // chunk)
    mean, m2 = torch.empty((2, N, chunks, C), dtype=torch.float32, device=a.device)
    _compute_moments[(N * blocks, chunks)](
        *inputs, mean, m2, rows[0], shift_stride, P, A, C, blocks, chunk,
        **flags, **sizes, GROUPS=tiling.groups, TILES=tiles_per_chunk, **options,
    )  # fmt: skip
    _apply_moments[(N * blocks, tiles)](
        *inputs, y, mean, m2, norm.weight, norm.bias, *rows, shift_stride, modulation_stride,
        P, A, C, blocks, chunk, chunks, norm.eps, **flags, **modulation, **sizes,
        BLOCK_CHANNELS=tiling.groups * size, BLOCK_K=triton.next_power_of_2(chunks), **options,
    )  # fmt: skip
    return y


def add_residual(x: Tensor, bias: Tensor | None, skips: Sequence[Tensor], divisor: float = 1.0) -> Tensor:
    """Add skip connections; see `ddim.engine.fused.operations.add_residual`.

    Args:
        x: (N, C, H, W) in channels_last.
        bias: (C,), or `None`.
        skips: up to two, of the shape, dtype and memory format of `x`.
        divisor: divides the sum.

    Returns:
        (N, C, H, W) in channels_last.
    """
    N, C, H, W = x.shape
    y = torch.empty_like(x)
    rows = N * H * W
    block_c = min(triton.next_power_of_2(C), MAX_STREAM_CHANNELS)
    block_r = max(1, min(STREAM_ELEMENTS // block_c, triton.next_power_of_2(rows)))
    first, second = [*skips, x, x][:2]
    _add_residual[(-(-rows // block_r), -(-C // block_c))](
        x, first, second, x if bias is None else bias, y, rows, C, 1.0 / divisor,
        HAS_FIRST=len(skips) > 0, HAS_SECOND=len(skips) > 1, HAS_BIAS=bias is not None,
        BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return y


def interleave(x: Tensor) -> Tensor:
    """Interleave sub-pixel results; see `ddim.engine.fused.operations.interleave`.

    Args:
        x: (N, 4 C, H + 1, W + 1) in channels_last.

    Returns:
        (N, C, 2 H, 2 W) in channels_last.
    """
    N, C, H, W = x.shape[0], x.shape[1] // 4, x.shape[2] - 1, x.shape[3] - 1
    y = torch.empty((N, C, 2 * H, 2 * W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    rows = 4 * N * H * W
    block_c = min(triton.next_power_of_2(C), MAX_STREAM_CHANNELS)
    block_r = max(1, min(STREAM_ELEMENTS // block_c, triton.next_power_of_2(rows)))
    grid = (-(-rows // block_r), -(-C // block_c))
    _interleave[grid](x, y, rows, H, W, C, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4)
    return y
