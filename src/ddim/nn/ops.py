"""Normalization and convolution as the network calls them, and the decision between PyTorch's operators and compiled
kernels.

In training on a CPU, float32 feature maps in channels_last go through kernels compiled by numba (`ddim.kernels`), which
read and write memory once where PyTorch does several times, and save multiplications by Winograd's method. Everything
else runs on PyTorch's operators: `use_compiled_kernels` decides.

Group normalization of a feature map plus a shift, then SiLU, stands before nearly every convolution of the U-Net:

    u = x + shift                       shift: one number per channel and sample (the projected time embedding), or none
    v = (u - mean) / sqrt(var + eps)    mean, var: over the positions and channels of a sample's group
    z = weight v + bias
    y = z sigmoid(z)                    or y = z

(GroupNorm: arXiv 1803.08494.) The kernel saves only x, mean and 1 / sqrt(var + eps) for the backward pass and computes
v, z and the sigmoid again: with dz = dy dy/dz,

    dbias = sum dz,   dweight = sum dz v,   dshift = sum dx
    dx = (weight dz - M[weight dz] - v M[weight dz v]) / sqrt(var + eps)

where M is the mean over the positions and channels of a sample's group.

Convolutions take three quarters of the time of training on a CPU. The gradient of their weights, a small result with a
long sum, has its own kernel (`ddim.kernels.conv_grad`). 3x3 convolutions and the gradients of their inputs, which are
convolutions again, run by Winograd's method where feature maps are large enough (`ddim.kernels.winograd`).
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

IN_TRAINING = ("norm", "conv_grad", "winograd")
"""The modules whose loops stand in for PyTorch's operations in training."""


def use_compiled_kernels(module: nn.Module, x: Tensor, *others: Tensor) -> bool:
    """Whether compiled loops stand in for PyTorch's operations: in training, where the time goes, on a CPU.

    Args:
        module: whose operation it is.
        x: the map (N, C, H, W).
        others: what else takes part.
    """
    return (
        module.training
        and x.device.type == "cpu"
        and all(tensor.dtype == torch.float32 for tensor in (x, *others))
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def differentiable_gradients(
    y: Tensor, inputs: Sequence[Tensor | None], wants: Sequence[bool], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of a plain form of y, where gradients of gradients are asked for; `None` for what nobody wants."""
    wanted = [tensor for tensor, needed in zip(inputs, wants, strict=True) if needed and tensor is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return tuple(next(found) if needed else None for needed in wants)


@functools.cache
def loops(name: str) -> ModuleType | None:
    """One of `IN_TRAINING`, its loops ready, or `None` where they cannot be compiled."""
    try:
        modules = {each: importlib.import_module(f"ddim.kernels.{each}") for each in IN_TRAINING}
        # All at once: what has to be compiled is compiled side by side.
        wanted = [loop for module in modules.values() for loop in module.TRAINING]
        importlib.import_module("ddim.kernels.runtime").ready(*wanted)
        return modules[name]
    except ImportError as error:
        logger.debug("%s is PyTorch's own: %s", name, error)
        return None


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
    if use_compiled_kernels(norm, x, norm.weight, *others) and (module := loops("norm")) is not None:
        shift = x.new_zeros(x.shape[0], x.shape[1]) if shift is None else shift.expand(x.shape[0], -1).contiguous()
        settings = (norm.num_groups, norm.eps, silu, module)
        return _NormSiLU.apply(x, shift, norm.weight, norm.bias, *settings)  # type: ignore[no-untyped-call]
    return _plain_norm(norm, x, shift, silu)


def _plain_norm(norm: Callable[[Tensor], Tensor], x: Tensor, shift: Tensor | None, silu: bool) -> Tensor:
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
            y = _plain_norm(lambda u: F.group_norm(u, ctx.groups, weight, bias, ctx.eps), x, shift, ctx.silu)
            return *differentiable_gradients(y, (x, shift, weight, bias), ctx.needs_input_grad[:4], dy), *nothing
        dy = dy.contiguous(memory_format=torch.channels_last)
        return *ctx.module.backward(dy, x, shift, weight, bias, mean, rstd, ctx.silu), *nothing


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv(x)`: (N, C, H, W) to (N, K, OH, OW)."""
    if not use_compiled_kernels(conv, x, conv.weight):
        return conv(x)
    return conv2d(x, conv.weight, conv.bias, conv.stride[0], int(conv.padding[0]))


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> Tensor:
    """`F.conv2d` of float32 maps on the CPU, channels innermost, with that gradient where the loop takes the shape."""
    module = loops("conv_grad")
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
