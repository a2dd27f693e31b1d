"""The gradient of a convolution with respect to its weights.

    dweight[k, c, i, j] = sum over samples n and positions (y, x) of  dy[n, y, x, k] x[n, s y + i - p, s x + j - p, c]

for stride s and padding p: for each tap (i, j) a product of two tall matrices, which general libraries do badly, since
the result is small and all of the work is in the sum. Here a tile of it (all taps j of a row of the filter, some input
channels, `TILE_LANES` output channels) stays in registers while the sum runs over some rows of a sample, which stay in
the nearest cache for all tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddim.kernels.conv_grad.constants import TILE_LANES
from ddim.kernels.record import Count, Pointer
from ddim.kernels.runtime import Kernel

WEIGHT_GRADIENT = Kernel(
    "conv_grad",
    "weight_gradient",
    (
        *map(Count, ("N", "H", "W", "C", "OH", "OW", "K", "size", "stride", "padding")),
        *map(Pointer, ("x", "dy", "dweight")),
    ),
)
TRAINING_KERNELS = KERNELS = (WEIGHT_GRADIENT,)


def is_supported(C: int, K: int, size: tuple[int, int]) -> bool:
    """Return whether `weight_gradient` supports a convolution.

    Args:
        C: input channels.
        K: output channels.
        size: height and width of the filter.

    Example:
        >>> is_supported(32, 16, (3, 3)), is_supported(3, 16, (3, 3))
        (True, False)
    """
    return size in ((2, 2), (3, 3)) and C % TILE_LANES == 0 and K % TILE_LANES == 0


def weight_gradient(x: Tensor, dy: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """Compute the gradient of a convolution's weights.

    Args:
        x: the convolution's input, (N, C, H, W) float32 on the CPU in channels_last.
        dy: the gradient of its output, (N, K, OH, OW), likewise.
        size: height and width of the filter, in pixels.
        stride: of the convolution, in pixels.
        padding: rows and columns of zeros on every side.

    Returns:
        (K, C, size, size) in channels_last.

    Example:
        >>> x = torch.ones(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
        >>> float(weight_gradient(x, x, size=3, stride=1, padding=1)[0, 0, 1, 1])
        16.0
    """
    N, C, H, W = x.shape
    _, K, OH, OW = dy.shape
    dweight = torch.empty((K, C, size, size), memory_format=torch.channels_last)
    counts = {"N": N, "H": H, "W": W, "C": C, "OH": OH, "OW": OW, "K": K}
    WEIGHT_GRADIENT(**counts, size=size, stride=stride, padding=padding, x=x, dy=dy, dweight=dweight)
    return dweight
