"""Convolutions of any size and stride, by all of their multiplications.

They serve 1x1 convolutions, and 3x3 convolutions of feature maps so small that reading transformed weights
(`ddim.kernels.winograd`) would take longer.

    y[n, h, w, k] = bias[k] + sum over i, j, c of  weight[k, c, i, j] x[n, s h + i, s w + j, c]

Some pixels times `OUTPUT_LANES` output channels are a tile of results that stays in registers while the sum runs over
the taps (i, j) and the channels; no patches are copied. Threads divide the output channels, so that each reads its part
of the weights once, or the pixels where there are many. Each result is computed in the same order whatever the batch
and the number of threads: its bits depend on its own sample alone.
"""

from __future__ import annotations

from torch import Tensor

from ddim.kernels.machine import OUTPUT_LANES
from ddim.kernels.record import Count, Flag, Pointer
from ddim.kernels.runtime import Kernel

CONVOLVE = Kernel(
    "direct",
    "convolve",
    (
        *map(Count, ("N", "H", "W", "C", "K", "padded_H", "padded_W", "size", "stride")),
        *map(Pointer, ("x", "weights", "bias")),
        Flag("has_residual"),
        *map(Pointer, ("residual", "y")),
    ),
)
KERNELS = (CONVOLVE,)


def arrange_weights(weight: Tensor) -> Tensor:
    """Arrange a convolution's weights for `convolve`, in panels of `OUTPUT_LANES` output channels.

    Args:
        weight: (K, C, size, size), K a multiple of `OUTPUT_LANES`.

    Returns:
        (K / OUTPUT_LANES, size, size, C, OUTPUT_LANES) float32, contiguous.

    Example:
        >>> import torch
        >>> arrange_weights(torch.zeros(2 * OUTPUT_LANES, 5, 3, 3)).shape[:4]
        torch.Size([2, 3, 3, 5])
    """
    K, C, size, _ = weight.shape
    panels = weight.reshape(K // OUTPUT_LANES, OUTPUT_LANES, C, size, size)
    return panels.permute(0, 3, 4, 2, 1).float().contiguous()


def convolve(x: Tensor, weights: Tensor, bias: Tensor, stride: int, residual: Tensor | None, y: Tensor) -> None:
    """Convolve a padded feature map and add bias and residual.

    All tensors are float32 on the CPU and contiguous.

    Args:
        x: (N, padded_H, padded_W, C) with padded_H >= stride (H - 1) + size, padded_W likewise.
        weights: those of `arrange_weights`.
        bias: (K,).
        stride: of the convolution, in pixels.
        residual: added to the result, (N, H, W, K); `None` for nothing.
        y: written to, (N, H, W, K), K a multiple of `OUTPUT_LANES`; may be `residual` itself.

    Example:
        >>> import torch
        >>> weights, y = arrange_weights(torch.ones(OUTPUT_LANES, 2, 1, 1)), torch.empty(1, 1, 1, OUTPUT_LANES)
        >>> convolve(torch.ones(1, 1, 1, 2), weights, torch.zeros(OUTPUT_LANES), 1, None, y)
        >>> y.unique()
        tensor([2.])
    """
    N, H, W, K = y.shape
    _, padded_H, padded_W, C = x.shape
    counts = {"N": N, "H": H, "W": W, "C": C, "K": K, "padded_H": padded_H, "padded_W": padded_W}
    tensors = {"x": x, "weights": weights, "bias": bias, "residual": y if residual is None else residual, "y": y}
    CONVOLVE(**counts, **tensors, size=weights.shape[1], stride=stride, has_residual=residual is not None)
