"""The operations of `ddim.engine.fused.operations` as PyTorch's operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """A group norm and the activation after it.

    Attributes:
        weight: (C,).
        bias: (C,).
        groups: divides C.
        eps: added to the variances.
        silu: whether SiLU follows.
    """

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    silu: bool


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
        a: (N, A, H, W).
        b: (N, B, H, W), or `None`.
        norm: of A + B channels.
        shift: (N, C) or (1, C), or `None`.
        scale: (N, C) or (1, C), or `None`.
        shift_after: of the shape of `scale`, given with it.

    Returns:
        (N, A + B, H, W).

    Example:
        >>> norm = Norm(torch.ones(2), torch.zeros(2), groups=1, eps=0.0, silu=False)
        >>> normalize(torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0), norm).flatten()
        tensor([-1.,  1.])
    """
    x = a if b is None else torch.cat([a, b], dim=1)
    x = x if shift is None else x + shift[:, :, None, None].to(x.dtype)
    y = F.group_norm(x, norm.groups, norm.weight, norm.bias, norm.eps)
    if scale is not None and shift_after is not None:
        y = y * (1 + scale[:, :, None, None]) + shift_after[:, :, None, None]
    return F.silu(y) if norm.silu else y


def add_residual(x: Tensor, bias: Tensor | None, skips: Sequence[Tensor], divisor: float = 1.0) -> Tensor:
    """Add skip connections; see `ddim.engine.fused.operations.add_residual`.

    Args:
        x: (N, C, H, W).
        bias: (C,), or `None`.
        skips: of the shape of `x`.
        divisor: divides the sum.

    Returns:
        (N, C, H, W).

    Example:
        >>> x = torch.ones(1, 1, 1, 1)
        >>> add_residual(x, torch.ones(1), [x, x], divisor=2.0).item()
        2.0
    """
    y = x if bias is None else x + bias[:, None, None]
    for skip in skips:
        y = y + skip
    return (y if divisor == 1 else y / divisor).to(x.dtype)


def interleave(x: Tensor) -> Tensor:
    """Interleave sub-pixel results; see `ddim.engine.fused.operations.interleave`.

    Args:
        x: (N, 4 C, H + 1, W + 1).

    Returns:
        (N, C, 2 H, 2 W) in channels_last.

    Example:
        >>> interleave(torch.arange(16.0).view(1, 4, 2, 2)).squeeze()
        tensor([[ 0.,  5.],
                [10., 15.]])
    """
    N, C, H, W = x.shape[0], x.shape[1] // 4, x.shape[2] - 1, x.shape[3] - 1
    y = x.new_empty((N, C, 2 * H, 2 * W)).contiguous(memory_format=torch.channels_last)
    for i, j in product((0, 1), repeat=2):
        part = x[:, (2 * i + j) * C : (2 * i + j + 1) * C, i : i + H, j : j + W]
        y[:, :, i::2, j::2] = part
    return y
