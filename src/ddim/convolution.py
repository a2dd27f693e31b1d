"""Convolutions that train faster on CPUs.

In training on a CPU three quarters of the time are convolutions. The gradient of their weights, a small result with a
long sum, is a compiled loop (`ddim.kernels.convolution`). So are 3x3 convolutions and the gradients of their inputs,
which are convolutions again, where maps are large enough: with a quarter of the multiplications
(`ddim.kernels.winograd`). Everything else, and everything elsewhere, is PyTorch's.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.kernels import differentiable_gradients, loops, stand_in


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv(x)`: (N, C, H, W) to (N, K, OH, OW)."""
    if not stand_in(conv, x, conv.weight):
        return conv(x)
    return conv2d(x, conv.weight, conv.bias, conv.stride[0], int(conv.padding[0]))


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> Tensor:
    """`F.conv2d` of float32 maps on the CPU, channels innermost, with that gradient where the loop takes the shape."""
    module = loops("convolution")
    K, C, *size = weight.shape
    if module is None or not module.fits(C, K, tuple(size)):
        return F.conv2d(x, weight, bias, stride, padding)
    return _Conv2d.apply(x, weight, bias, stride, padding, module)  # type: ignore[no-untyped-call]


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, module: Any) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.stride, ctx.padding, ctx.module = stride, padding, module
        if winograd := _winograd(x, weight, stride, padding):
            return cast(Tensor, winograd.convolve_once(x, weight, bias))
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        wants = ctx.needs_input_grad[:3]
        nothing = (None,) * 3
        if torch.is_grad_enabled():
            y = F.conv2d(x, weight, bias, ctx.stride, ctx.padding)
            return *differentiable_gradients(y, (x, weight, bias), wants, dy), *nothing
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = dw = db = None
        if wants[0]:
            dx = _input_gradient(dy, x, weight, ctx.stride, ctx.padding)
        if wants[1]:
            dw = ctx.module.weight_gradient(x, dy, weight.shape[2], ctx.stride, ctx.padding)
        if wants[2]:
            db = dy.sum((0, 2, 3))
        return dx, dw, db, *nothing


def _winograd(x: Tensor, weight: Tensor, stride: int, padding: int) -> ModuleType | None:
    """The module that takes such a convolution, if that pays."""
    (N, C, H, W), (K, _, size, _) = x.shape, weight.shape
    if (size, stride, padding) != (3, 1, 1):
        return None
    module = loops("winograd")
    return module if module is not None and module.pays_once(N, C, K, H, W) else None


def _input_gradient(dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    turned = weight.transpose(0, 1)
    if module := _winograd(dy, turned, stride, padding):
        return cast(Tensor, module.convolve_once(dy, turned.flip(2, 3), None))
    only_input = [True, False, False]
    sizes = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *sizes, only_input)[0]
