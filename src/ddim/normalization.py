"""Group normalisation of a feature map plus a shift, then SiLU: what stands before nearly every convolution of the
U-Net.

    u = x + shift                       shift: a number a channel and sample (the projected time embedding), or none
    v = (u - mean) / sqrt(var + eps)    mean, var: over the pixels and channels of a sample's group
    z = weight v + bias
    y = z sigmoid(z)                    or y = z

(GroupNorm: arXiv 1803.08494.) In training on a CPU, where PyTorch passes over the map once for each of these and its
kernel for channels innermost is several times slower than that for pixels innermost, all of it is one compiled loop
(`ddim.kernels.norm`). That keeps nothing for the way back but x, mean and variance, and computes v, z and the sigmoid
again: with dz = dy dy/dz,

    dbias = sum dz,   dweight = sum dz v,   dshift = sum dx
    dx = (weight dz - M[weight dz] - v M[weight dz v]) / sqrt(var + eps)

where M is the mean over the pixels and channels of a sample's group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.kernels import differentiable_gradients, loops, stand_in


def norm_silu(norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None, silu: bool = True) -> Tensor:
    """Normalise `x + shift`, then SiLU.

    Args:
        norm: groups, weights and eps.
        x: (N, C, H, W).
        shift: (N, C) or (1, C).
        silu: `False` for the normalisation alone.

    Returns:
        (N, C, H, W).
    """
    others = () if shift is None else (shift,)
    if stand_in(norm, x, norm.weight, *others) and (module := loops("norm")) is not None:
        shift = x.new_zeros(x.shape[0], x.shape[1]) if shift is None else shift.expand(x.shape[0], -1).contiguous()
        settings = (norm.num_groups, norm.eps, silu, module)
        return _NormSiLU.apply(x, shift, norm.weight, norm.bias, *settings)  # type: ignore[no-untyped-call]
    return _plain(norm, x, shift, silu)


def _plain(norm: Callable[[Tensor], Tensor], x: Tensor, shift: Tensor | None, silu: bool) -> Tensor:
    normed = norm(x if shift is None else x + shift[:, :, None, None])
    return F.silu(normed) if silu else normed


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
        module: Any,
    ) -> Tensor:
        y, mean, rstd = module.forward(x, shift, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, shift, weight, bias, mean, rstd)
        ctx.groups, ctx.eps, ctx.silu, ctx.module = groups, eps, silu, module
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, weight, bias, mean, rstd = ctx.saved_tensors
        nothing = (None,) * 4
        if torch.is_grad_enabled():
            y = _plain(lambda u: F.group_norm(u, ctx.groups, weight, bias, ctx.eps), x, shift, ctx.silu)
            return *differentiable_gradients(y, (x, shift, weight, bias), ctx.needs_input_grad[:4], dy), *nothing
        dy = dy.contiguous(memory_format=torch.channels_last)
        return *ctx.module.backward(dy, x, shift, weight, bias, mean, rstd, ctx.silu), *nothing
