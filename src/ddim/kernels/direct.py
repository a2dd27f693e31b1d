"""Convolutions of any size and stride, by all of their multiplications: 1x1, and 3x3 for maps so small that reading
transformed weights (`ddim.kernels.winograd`) would take longer.

    y[n, h, w, k] = bias[k] + sum over i, j, c of  weight[k, c, i, j] x[n, s h + i, s w + j, c]

Some pixels times `LANES` output channels are a tile of results that stays in registers while the sum runs over the
taps (i, j) and the channels; no patches are copied. Threads share output channels, so that each reads its part of the
weights once, or pixels where there are many. Each result is computed in the same order whatever the batch and the
number of threads.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ddim.kernels.runtime import LANES, Loop

NAMES = ("N", "H", "W", "C", "K", "rows", "columns", "size", "stride", "x", "weights", "bias", "adds", "residual", "y")
CONVOLVE = Loop("direct", "convolve_directly", np.dtype([(name, np.int64) for name in NAMES]))
LOOPS = (CONVOLVE,)


def arrange_weights(weight: Tensor) -> Tensor:
    """(K, C, size, size) to what `convolve` takes, (K / LANES, size, size, C, LANES) float32."""
    K, C, size, _ = weight.shape
    return weight.reshape(K // LANES, LANES, C, size, size).permute(0, 3, 4, 2, 1).float().contiguous()


def convolve(x: Tensor, weights: Tensor, bias: Tensor, stride: int, residual: Tensor | None, y: Tensor) -> None:
    """Write to `y` (N, H, W, K) the convolution of a map that has been padded, plus bias, plus residual.

    Args:
        x: (N, rows, columns, C) with rows >= stride (H - 1) + size, columns likewise; contiguous float32, as are all.
        weights: as `arrange_weights` makes them.
        bias: (K,).
        stride: of the convolution.
        residual: (N, H, W, K), or `None`.
        y: K a multiple of `LANES`; another tensor than `residual`, or the same.
    """
    N, H, W, K = y.shape
    _, rows, columns, C = x.shape
    sizes = {"N": N, "H": H, "W": W, "C": C, "K": K, "rows": rows, "columns": columns}
    sizes |= {"size": weights.shape[1], "stride": stride}
    before = y if residual is None else residual
    CONVOLVE(**sizes, x=x, weights=weights, bias=bias, adds=residual is not None, residual=before, y=y)
