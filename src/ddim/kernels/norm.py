"""Group normalisation of a feature map plus a shift, then SiLU, and the way back, as compiled loops: what stands behind
`ddim.nn.ops`, whose notation they use, and the engine's form of it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ddim.kernels.runtime import Loop

SHARED = ("N", "P", "C", "groups", "silu", "x", "shift", "weight", "bias", "mean", "rstd")
FORWARD = Loop("norm", "forward", np.dtype([(name, np.int64) for name in (*SHARED, "y")] + [("eps", np.float64)]))
MAPS = ("N", "H", "W", "A", "B", "groups", "silu", "a", "b", "shifts", "shift", "weights", "weight")
NORMALISE = Loop(
    "norm",
    "normalise",
    np.dtype([(name, np.int64) for name in (*MAPS, "bias", "top", "rows", "columns", "y")] + [("eps", np.float64)]),
)
BACKWARD = Loop(
    "norm",
    "backward",
    np.dtype([(name, np.int64) for name in (*SHARED, "dy", "dx", "dshift", "dweight", "dbias")]),
)
TRAINING = (FORWARD, BACKWARD)
LOOPS = (FORWARD, BACKWARD, NORMALISE)


def forward(
    x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and 1 / sqrt(var + eps), (N, groups).

    Args:
        x: (N, C, H, W) float32 on the CPU, channels innermost.
        shift: (N, C).
        weight: (C,).
        bias: (C,).
        groups: divides C.
        eps: added to the variance.
        silu: whether SiLU follows.
    """
    N, C, H, W = x.shape
    y, mean, rstd = torch.empty_like(x), x.new_empty(N, groups), x.new_empty(N, groups)
    sizes = {"N": N, "P": H * W, "C": C, "groups": groups, "silu": silu, "eps": eps}
    FORWARD(x=x, shift=shift, weight=weight, bias=bias, y=y, mean=mean, rstd=rstd, **sizes)
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dx (N, C, H, W), dshift (N, C), dweight (C,) and dbias (C,); `dy` as `x` in memory, the rest as in `forward`."""
    N, C, H, W = x.shape
    dx = torch.empty_like(x)
    dshift, dweight, dbias = x.new_empty(N, C), x.new_empty(N, C), x.new_empty(N, C)
    sizes = {"N": N, "P": H * W, "C": C, "groups": mean.shape[1], "silu": silu}
    given = {"x": x, "shift": shift, "weight": weight, "bias": bias, "mean": mean, "rstd": rstd, "dy": dy}
    BACKWARD(**given, dx=dx, dshift=dshift, dweight=dweight, dbias=dbias, **sizes)
    return dx, dshift, dweight.sum(0), dbias.sum(0)


def normalise(
    a: Tensor,
    b: Tensor | None,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    y: Tensor,
    rim: bool,
) -> None:
    """Write y of the map `a`, or of `a` and `b` side by side, for which nothing is kept for the way back.

    Args:
        a: (N, H, W, A) float32 on the CPU, contiguous, as all the others.
        b: (N, H, W, B), or `None`. C = A + B.
        shift: (N, C), or (1, C) for all samples.
        weight: (N, C) or (1, C).
        bias: as `weight`.
        groups: divides C.
        eps: added to the variance.
        silu: whether SiLU follows.
        y: (N, H, W, C), or more rows and columns with a `rim`.
        rim: the first pixel of y is at (1, 1), not at (0, 0).
    """
    N, H, W, A = a.shape
    maps = {"a": a, "b": a if b is None else b, "shift": shift, "weight": weight, "bias": bias, "y": y}
    sizes = {"N": N, "H": H, "W": W, "A": A, "B": 0 if b is None else b.shape[-1]}
    counts = {"shifts": shift.shape[0], "weights": weight.shape[0], "rows": y.shape[1], "columns": y.shape[2]}
    NORMALISE(**sizes, **counts, **maps, groups=groups, eps=eps, silu=silu, top=int(rim))
