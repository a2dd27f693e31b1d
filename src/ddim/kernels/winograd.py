"""3x3 convolutions with a quarter of the multiplications: Winograd's F(4x4, 3x3) (arXiv 1509.09308).

A tile of 4x4 results depends on 6x6 inputs. With the matrices below (the points 0, 1, -1, 2, -2 and infinity),

    tile[k] = A^T (sum over c of  (G w[k, c] G^T) * (B^T d[c] B)) A

where * multiplies number by number: 36 products instead of 144, and for each of the 36 places the sums over channels of
many tiles are one product of matrices. The weights G w G^T are made once (`transform_weights`). A thread works on
some tiles at a time, from input to result, so that what lies between stays in its cache.

Each result is computed in the same order whatever the batch and the number of threads: its bits depend on nothing but
its own sample.

Maps are float32 with channels innermost and a rim: (N, 4 rows + 2, 4 columns + 2, C) for rows x columns tiles, zero
around the H x W pixels in it, which start at (1, 1). `rimmed` makes one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ddim.kernels.norm import MAPS
from ddim.kernels.runtime import LANES, Loop

UNIT = 8
"""Input channels come in so many."""
SIDE, STEP = 6, 4
POINTS = SIDE * SIDE

BT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
AT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))

NAMES = ("N", "H", "W", "C", "K", "x", "weights", "bias", "adds", "residual", "y")
CONVOLVE = Loop("winograd", "convolve", np.dtype([(name, np.int64) for name in NAMES]))
NORMALISE_AND_CONVOLVE = Loop(
    "winograd",
    "normalise_and_convolve",
    np.dtype(
        [(name, np.int64) for name in (*MAPS, "beta", "K", "kernels", "bias", "adds", "residual", "y")]
        + [("eps", np.float64)]
    ),
)
LOOPS = (CONVOLVE, NORMALISE_AND_CONVOLVE)
TRAINING = (NORMALISE_AND_CONVOLVE,)
BLOCK = 1 << 14
"""About how many kernels are transformed at a time."""
LEAST = 512
"""Pixels of a batch for which it pays to transform weights that are used once."""


def fits(C: int) -> bool:
    """Whether `convolve` takes so many input channels; of output channels it takes multiples of `LANES`."""
    return C % UNIT == 0


def saves(H: int, W: int) -> bool:
    """Whether the tiles of such a map, whole ones, want clearly fewer than its nine multiplications a pixel."""
    return POINTS * -(-H // STEP) * -(-W // STEP) < 7 * H * W


def transform_weights(weight: Tensor) -> Tensor:
    """(K, C, 3, 3) to what `convolve` takes, (36, K / LANES, C, LANES) float32."""
    K, C = weight.shape[:2]
    g = torch.tensor(G, dtype=torch.float64)
    matrix = torch.kron(g, g).float()
    result = torch.empty(POINTS, K // LANES, C, LANES)
    # Some panels at a time, so that no second copy of all weights is made on the way.
    together = max(1, BLOCK // (LANES * C))
    panels = weight.float().reshape(K // LANES, LANES, C, 9).split(together)
    for part, target in zip(panels, result.split(together, dim=1), strict=True):
        target.copy_((matrix @ part.permute(3, 0, 2, 1).reshape(9, -1)).view(target.shape))
    return result


def rimmed(N: int, C: int, H: int, W: int) -> Tensor:
    """A map of zeros that has a rim; the pixels' place is [:, 1 : H + 1, 1 : W + 1]."""
    return torch.zeros(N, -(-H // STEP) * STEP + 2, -(-W // STEP) * STEP + 2, C)


def convolve(x: Tensor, weights: Tensor, bias: Tensor, residual: Tensor | None, y: Tensor) -> None:
    """Write to `y` (N, H, W, K) the convolution of a map that has a rim, plus bias, plus residual.

    Args:
        x: as `rimmed` makes it for C channels and H x W pixels.
        weights: as `transform_weights` makes them.
        bias: (K,).
        residual: (N, H, W, K), or `None`.
        y: another tensor than `residual`, or the same.
    """
    N, H, W, K = y.shape
    sizes = {"N": N, "H": H, "W": W, "C": x.shape[-1], "K": K, "adds": residual is not None}
    before = y if residual is None else residual
    CONVOLVE(**sizes, x=x, weights=weights, bias=bias, residual=before, y=y)


def normalise_and_convolve(
    a: Tensor,
    b: Tensor | None,
    shift: Tensor,
    weight: Tensor,
    beta: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    kernels: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    y: Tensor,
) -> None:
    """Write to `y` the convolution of what `ddim.kernels.norm.normalise` makes of `a` and `b`: each thread does both to
    a few samples at a time, which stay in its cache. Arguments as there and in `convolve`; with 0 `groups`, of `a` and
    `b` as they are, or their SiLU.
    """
    N, H, W, K = y.shape
    maps = {"a": a, "b": a if b is None else b, "shift": shift, "weight": weight, "beta": beta}
    maps |= {"kernels": kernels, "bias": bias, "residual": y if residual is None else residual, "y": y}
    sizes = {"N": N, "H": H, "W": W, "A": a.shape[-1], "B": 0 if b is None else b.shape[-1], "K": K}
    counts = {"shifts": shift.shape[0], "weights": weight.shape[0], "adds": residual is not None}
    NORMALISE_AND_CONVOLVE(**sizes, **counts, **maps, groups=groups, eps=eps, silu=silu)


def pays_once(N: int, C: int, K: int, H: int, W: int) -> bool:
    """Whether `convolve_once` takes such maps and is faster than all multiplications."""
    return fits(C) and K % LANES == 0 and LEAST <= N * H * W and saves(H, W)


def convolve_once(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution, padded with zeros, of maps (N, C, H, W) whose channels are innermost: (N, K, H, W) likewise.

    Args:
        x: of sizes for which it `pays_once`, float32 as all of them.
        weight: (K, C, 3, 3), which is transformed anew.
        bias: (K,), or `None` for zeros.
    """
    N, C, H, W = x.shape
    K = weight.shape[0]
    a, y, nothing = x.permute(0, 2, 3, 1), torch.empty(N, H, W, K), torch.zeros(1, max(C, K))
    terms = (nothing, nothing, nothing, 0, 0.0, False)
    bias = nothing if bias is None else bias
    normalise_and_convolve(a, None, *terms, transform_weights(weight), bias, None, y)
    return y.permute(0, 3, 1, 2)
