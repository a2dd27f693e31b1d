"""3x3 convolutions with a quarter of the multiplications: Winograd's F(4x4, 3x3) (arXiv 1509.09308).

A tile of 4x4 results depends on 6x6 inputs. With the matrices of `ddim.kernels.winograd.constants`,

    tile[k] = A^T (sum over c of  (G w[k, c] G^T) * (B^T d[c] B)) A

where * multiplies number by number: 36 products instead of 144, and at each of the 36 points the sums over channels of
many tiles are one product of matrices. The weights G w G^T are computed once (`transform_weights`). A thread works on
some tiles at a time, from input to result, so that what lies between stays in its cache.

Each result is computed in the same order whatever the batch and the number of threads: its bits depend on its own
sample alone.

Inputs are float32 feature maps in channels_last with a halo: (N, 4 rows + 2, 4 columns + 2, C) for rows x columns
tiles, zero around the H x W pixels, which start at (1, 1). `padded` makes one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddim.kernels.machine import OUTPUT_LANES
from ddim.kernels.norm import NORM_FIELDS, NormTerms
from ddim.kernels.record import Count, Flag, Pointer
from ddim.kernels.runtime import Kernel
from ddim.kernels.winograd.constants import CHANNEL_MULTIPLE, POINTS, TILE_OUTPUT, G

CONV_FIELDS = (*map(Pointer, ("weights", "bias")), Flag("has_residual"), *map(Pointer, ("residual", "y")))
CONVOLVE = Kernel("winograd", "convolve", (*map(Count, ("N", "H", "W", "C", "K")), Pointer("x"), *CONV_FIELDS))
NORMALIZE_AND_CONVOLVE = Kernel("winograd", "normalize_and_convolve", (*NORM_FIELDS, Count("K"), *CONV_FIELDS))
KERNELS = (CONVOLVE, NORMALIZE_AND_CONVOLVE)
TRAINING_KERNELS = (NORMALIZE_AND_CONVOLVE,)

# Filters, about, that are transformed at a time: 2.4 MB of results, instead of a second copy of all weights.
FILTERS_PER_CHUNK = 1 << 14
# Pixels of a batch from which on it is faster to transform weights that are used once than to multiply with all.
MIN_PIXELS = 512
# Multiplications per pixel, channel and filter, up to which Winograd's method counts as one that needs fewer than the
# nine of a 3x3 filter: the transforms cost something too.
MAX_MULTIPLICATIONS_PER_PIXEL = 7


def is_supported(C: int) -> bool:
    """Return whether `convolve` supports a number of input channels; output channels are multiples of `OUTPUT_LANES`.

    Args:
        C: input channels.

    Example:
        >>> is_supported(64), is_supported(3)
        (True, False)
    """
    return C % CHANNEL_MULTIPLE == 0


def reduces_multiplications(H: int, W: int) -> bool:
    """Return whether the tiles of a feature map need clearly fewer multiplications than its nine per pixel.

    Tiles are computed as a whole: on small maps, much of a tile can lie outside.

    Args:
        H: height, in pixels.
        W: width, in pixels.

    Example:
        >>> reduces_multiplications(4, 4), reduces_multiplications(2, 2)
        (True, False)
    """
    return POINTS * -(-H // TILE_OUTPUT) * -(-W // TILE_OUTPUT) < MAX_MULTIPLICATIONS_PER_PIXEL * H * W


def is_profitable(N: int, C: int, K: int, H: int, W: int) -> bool:
    """Return whether `convolve_and_transform` supports a convolution and is faster than all multiplications.

    Args:
        N: samples.
        C: input channels.
        K: output channels.
        H: height, in pixels.
        W: width, in pixels.

    Example:
        >>> is_profitable(1, 64, 64, 32, 32), is_profitable(1, 64, 64, 4, 4)
        (True, False)
    """
    supported = is_supported(C) and K % OUTPUT_LANES == 0
    return supported and N * H * W >= MIN_PIXELS and reduces_multiplications(H, W)


def transform_weights(weight: Tensor) -> Tensor:
    """Transform a convolution's weights for `convolve`, in panels of `OUTPUT_LANES` output channels.

    Args:
        weight: (K, C, 3, 3), K a multiple of `OUTPUT_LANES`.

    Returns:
        G w G^T, (36, K / OUTPUT_LANES, C, OUTPUT_LANES) float32, contiguous.

    Example:
        >>> transform_weights(torch.zeros(2 * OUTPUT_LANES, 8, 3, 3)).shape[:3]
        torch.Size([36, 2, 8])
    """
    K, C = weight.shape[:2]
    g = torch.tensor(G, dtype=torch.float64)
    # (G w G^T) as one product, with the filter's nine numbers as a column.
    matrix = torch.kron(g, g).float()
    result = torch.empty(POINTS, K // OUTPUT_LANES, C, OUTPUT_LANES)
    panels_per_chunk = max(1, FILTERS_PER_CHUNK // (OUTPUT_LANES * C))
    chunks = weight.float().reshape(K // OUTPUT_LANES, OUTPUT_LANES, C, 9).split(panels_per_chunk)
    for chunk, target in zip(chunks, result.split(panels_per_chunk, dim=1), strict=True):
        target.copy_((matrix @ chunk.permute(3, 0, 2, 1).reshape(9, -1)).view(target.shape))
    return result


def padded_shape(N: int, C: int, H: int, W: int) -> tuple[int, int, int, int]:
    """Return the shape of a feature map with the halo that `convolve` reads: whole tiles, and a pixel on every side.

    Args:
        N: samples.
        C: channels.
        H: height without the halo, in pixels.
        W: width without the halo, in pixels.

    Example:
        >>> padded_shape(1, 8, 28, 5)
        (1, 30, 10, 8)
    """
    return N, -(-H // TILE_OUTPUT) * TILE_OUTPUT + 2, -(-W // TILE_OUTPUT) * TILE_OUTPUT + 2, C


def padded(x: Tensor) -> Tensor:
    """Copy a feature map into one with a halo of zeros.

    Args:
        x: (N, H, W, C) float32.

    Returns:
        A map of `padded_shape`, with x at [:, 1 : H + 1, 1 : W + 1].

    Example:
        >>> padded(torch.ones(1, 1, 1, 1)).sum()
        tensor(1.)
    """
    N, H, W, C = x.shape
    y = torch.zeros(padded_shape(N, C, H, W))
    y[:, 1 : H + 1, 1 : W + 1] = x
    return y


def convolve(x: Tensor, weights: Tensor, bias: Tensor, residual: Tensor | None, y: Tensor) -> None:
    """Convolve a feature map with a halo and add bias and residual.

    All tensors are float32 on the CPU and contiguous.

    Args:
        x: of `padded_shape` for C channels and H x W pixels; C a multiple of `CHANNEL_MULTIPLE`.
        weights: those of `transform_weights`.
        bias: (K,).
        residual: added to the result, (N, H, W, K); `None` for nothing.
        y: written to, (N, H, W, K), K a multiple of `OUTPUT_LANES`; may be `residual` itself.

    Example:
        >>> weights, y = transform_weights(torch.ones(OUTPUT_LANES, 8, 3, 3)), torch.empty(1, 4, 4, OUTPUT_LANES)
        >>> convolve(padded(torch.ones(1, 4, 4, 8)), weights, torch.zeros(OUTPUT_LANES), None, y)
        >>> y[0, :, :, 0].round()
        tensor([[32., 48., 48., 32.],
                [48., 72., 72., 48.],
                [48., 72., 72., 48.],
                [32., 48., 48., 32.]])
    """
    N, H, W, K = y.shape
    tensors = {"x": x, "weights": weights, "bias": bias, "residual": y if residual is None else residual, "y": y}
    CONVOLVE(**tensors, N=N, H=H, W=W, C=x.shape[-1], K=K, has_residual=residual is not None)


def normalize_and_convolve(
    a: Tensor,
    b: Tensor | None,
    terms: NormTerms,
    weights: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    y: Tensor,
) -> None:
    """Normalize one or two feature maps side by side, convolve the result, and add bias and residual.

    It is `ddim.kernels.norm.normalize` and `convolve`, except that each thread does both to a few samples at a time,
    which stay in its cache. All tensors are float32 on the CPU and contiguous.

    Args:
        a: (N, H, W, A).
        b: (N, H, W, B); `None` for none. C = A + B.
        terms: of the norm; with `groups` 0 the maps are taken as they are, or their SiLU.
        weights: those of `transform_weights`.
        bias: (K,).
        residual: added to the result, (N, H, W, K); `None` for nothing.
        y: written to, (N, H, W, K), K a multiple of `OUTPUT_LANES`; may be `residual` itself.

    Example:
        >>> one, zero = torch.ones(1, 8), torch.zeros(1, 8)
        >>> weights, y = transform_weights(torch.ones(OUTPUT_LANES, 8, 3, 3)), torch.empty(1, 4, 4, OUTPUT_LANES)
        >>> terms = NormTerms(zero, one, zero, groups=0, eps=0.0, silu=False)
        >>> normalize_and_convolve(torch.ones(1, 4, 4, 8), None, terms, weights, torch.zeros(OUTPUT_LANES), None, y)
        >>> y[0, 0, :, 0].round()
        tensor([32., 48., 48., 32.])
    """
    tensors = {"weights": weights, "bias": bias, "residual": y if residual is None else residual, "y": y}
    NORMALIZE_AND_CONVOLVE(**terms.values(a, b), **tensors, K=y.shape[-1], has_residual=residual is not None)


def convolve_and_transform(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve a feature map, padded with zeros, with weights that are transformed anew.

    Args:
        x: (N, C, H, W) float32 in channels_last, of sizes for which it `is_profitable`.
        weight: (K, C, 3, 3).
        bias: (K,); `None` for none.

    Returns:
        (N, K, H, W) in channels_last.

    Example:
        >>> x = torch.ones(1, 8, 32, 32).contiguous(memory_format=torch.channels_last)
        >>> convolve_and_transform(x, torch.ones(OUTPUT_LANES, 8, 3, 3), None)[0, 0, 1, 1].round()
        tensor(72.)
    """
    N, C, H, W = x.shape
    K = weight.shape[0]
    a, y, zeros = x.permute(0, 2, 3, 1), torch.empty(N, H, W, K), torch.zeros(1, max(C, K))
    terms = NormTerms(zeros, zeros, zeros, groups=0, eps=0.0, silu=False)
    bias = zeros if bias is None else bias
    normalize_and_convolve(a, None, terms, transform_weights(weight), bias, None, y)
    return y.permute(0, 3, 1, 2)
