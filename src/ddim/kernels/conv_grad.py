"""The gradient of a convolution with respect to its weights.

    dweight[k, c, i, j] = sum over samples n and places (y, x) of  dy[n, y, x, k] input[n, s y + i - p, s x + j - p, c]

for stride s and padding p: for each tap (i, j) a product of two tall matrices, which general libraries do badly: the
result is small and all of the work is in the sum. Here a tile of it (all taps j of a kernel's row, `CHANNELS` input
channels, `LANES` output channels) stays in registers while the sum runs over some rows of a sample, which stay in the
nearest cache for all tiles.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ddim.kernels.runtime import Loop

LANES = 16
"""Of the input channels and of the output channels of a tile."""

NAMES = ("N", "H", "W", "C", "OH", "OW", "K", "size", "stride", "padding", "x", "dy", "dweight")
GRADIENT = Loop("conv_grad", "gradient", np.dtype([(name, np.int64) for name in NAMES]))
TRAINING = LOOPS = (GRADIENT,)


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
    GRADIENT(**sizes, size=size, stride=stride, padding=padding, x=x, dy=dy, dweight=dweight)
    return dweight
