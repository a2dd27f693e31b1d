"""Normalization and convolution as the network calls them, on PyTorch's operators or on compiled kernels.

In training on a CPU, float32 feature maps in channels_last go through kernels compiled by numba (`ddim.kernels`), which
read and write memory once where PyTorch does several times, and need fewer multiplications by Winograd's method. All
else runs by calling the modules: `use_compiled_kernels` decides.

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
from collections.abc import Sequence
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.untouched import PLAIN_TENSORS, is_untouched

logger = logging.getLogger(__name__)

TRAINING_MODULES = ("norm", "conv_grad", "winograd")
"""The packages of `ddim.kernels` that training runs on."""


def use_compiled_kernels(module: nn.Module, expected: type[nn.Module], x: Tensor, *tensors: Tensor) -> bool:
    """Return whether compiled kernels run instead of a call of the module: in training in float32 on a CPU.

    Args:
        module: whose operation it is.
        expected: the class whose operation the kernels compute.
        x: the feature map (N, C, H, W).
        tensors: the other operands.

    Returns:
        `True` for an untouched module in training mode whose feature map is in channels_last, outside of autocast and
        of graphs that are being compiled or traced.

    Example:
        >>> x = torch.zeros(1, 8, 4, 4)
        >>> use_compiled_kernels(nn.Identity(), nn.Identity, x)
        False
        >>> use_compiled_kernels(nn.Identity(), nn.Identity, x.contiguous(memory_format=torch.channels_last))
        True
    """
    return (
        # First of all: not every version of PyTorch's compiler traces the rest.
        not torch.compiler.is_compiling()
        and module.training
        and x.device.type == "cpu"
        and not x.is_contiguous()
        and is_untouched(module, expected)
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and all(_is_plain_float32(tensor) for tensor in (x, *tensors, *module.parameters(recurse=False)))
    )


def _is_plain_float32(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN_TENSORS and tensor.dtype == torch.float32


@functools.cache
def load_kernels(name: str) -> ModuleType | None:
    """Return one of `TRAINING_MODULES`, with its kernels ready to run.

    The kernels of all of them are made ready at once, so that those that have to be compiled are compiled in parallel.

    Args:
        name: of the package.

    Returns:
        The package; `None` where kernels cannot be compiled.
    """
    try:
        modules = {each: importlib.import_module(f"ddim.kernels.{each}") for each in TRAINING_MODULES}
        kernels = [kernel for module in modules.values() for kernel in module.TRAINING_KERNELS]
        importlib.import_module("ddim.kernels.runtime").ensure_compiled(*kernels)
        return modules[name]
    except ImportError as error:
        logger.debug("%s runs on PyTorch's operators: %s", name, error)
        return None


def norm_act(
    norm: nn.Module, act: nn.Module | None, x: Tensor, shift: Tensor | None = None, conv: nn.Module | None = None
) -> Tensor:
    """Normalize `x + shift`, then apply an activation.

    Args:
        norm: the normalization, an `nn.GroupNorm` or what client code replaced it by.
        act: the activation; `None` for none.
        x: (N, C, H, W).
        shift: (N, C) or (1, C); `None` for none.
        conv: the convolution that reads the result. Compiled kernels run only if its weights are in channels_last:
            attention leaves feature maps in channels_last in every network. `None` for no such condition.

    Returns:
        (N, C, H, W).

    References:
        Group normalization: arXiv 1803.08494.

    Example:
        >>> norm_act(nn.GroupNorm(1, 2, eps=0.0), nn.ReLU(), torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)).flatten()
        tensor([0., 1.], grad_fn=<ViewBackward0>)
    """
    kernels = _norm_kernels(norm, x, shift, conv)
    if kernels is None:
        normed = norm(x if shift is None else x + shift[:, :, None, None])
        return normed if act is None else cast(Tensor, act(normed))
    norm = cast(nn.GroupNorm, norm)
    shift = x.new_zeros(x.shape[:2]) if shift is None else shift.expand(x.shape[0], -1).contiguous()
    silu = act is not None and is_untouched(act, nn.SiLU)
    settings = (norm.num_groups, norm.eps, silu, kernels)
    y: Tensor = _NormSiLU.apply(x, shift, norm.weight, norm.bias, settings)  # type: ignore[no-untyped-call]
    return y if act is None or silu else cast(Tensor, act(y))


def _norm_kernels(norm: nn.Module, x: Tensor, shift: Tensor | None, conv: nn.Module | None) -> ModuleType | None:
    """Return the kernels of `norm_act`, if they support its modules and tensors; `None` otherwise."""
    if not use_compiled_kernels(norm, nn.GroupNorm, x, *(() if shift is None else (shift,))):
        return None
    N, C, *_ = x.shape
    shapes = [tuple(parameter.shape) for parameter in norm.parameters(recurse=False)]
    if shapes != [(C,), (C,)] or not (shift is None or tuple(shift.shape) in ((N, C), (1, C))):
        return None
    return load_kernels("norm") if conv is None or has_channels_last_weights(conv) else None


def has_channels_last_weights(conv: nn.Module) -> bool:
    """Return whether an untouched convolution's weights are in channels_last; `False` for any other module.

    Args:
        conv: the convolution.

    Example:
        >>> conv = nn.Conv2d(2, 2, 3)
        >>> has_channels_last_weights(conv), has_channels_last_weights(conv.to(memory_format=torch.channels_last))
        (False, True)
    """
    if not is_untouched(conv, nn.Conv2d):
        return False
    return cast(nn.Conv2d, conv).weight.is_contiguous(memory_format=torch.channels_last)


class _NormSiLU(torch.autograd.Function):
    """`norm_act` by compiled kernels; settings are (groups, eps, silu, the package of kernels)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, settings: tuple[int, float, bool, Any]
    ) -> Tensor:
        groups, eps, silu, kernels = settings
        y, mean, rstd = kernels.forward(x, shift, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, shift, weight, bias, mean, rstd)
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, weight, bias, mean, rstd = ctx.saved_tensors
        groups, eps, silu, kernels = ctx.settings
        if torch.is_grad_enabled():
            y = F.group_norm(x + shift[:, :, None, None], groups, weight, bias, eps)
            y = F.silu(y) if silu else y
            return *_differentiable_gradients(y, (x, shift, weight, bias), ctx.needs_input_grad[:4], dy), None
        dy = dy.contiguous(memory_format=torch.channels_last)
        return *kernels.backward(dy, x, shift, weight, bias, mean, rstd, silu), None


def _differentiable_gradients(
    y: Tensor, inputs: Sequence[Tensor | None], needed: Sequence[bool], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """Return gradients that have gradients, from y by PyTorch's operators; `None` for inputs that need none."""
    differentiated = [tensor for tensor, need in zip(inputs, needed, strict=True) if need and tensor is not None]
    gradients = iter(torch.autograd.grad(y, differentiated, dy, create_graph=True))
    return tuple(next(gradients) if need else None for need in needed)


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a convolution.

    Args:
        conv: the convolution, an `nn.Conv2d` or what client code replaced it by.
        x: (N, C, H, W).

    Returns:
        (N, K, OH, OW).

    Example:
        >>> convolve(nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.zeros(1, 3, 4, 4)).shape
        torch.Size([1, 8, 2, 2])
    """
    if not use_compiled_convolution(conv, x):
        return cast(Tensor, conv(x))
    conv = cast(nn.Conv2d, conv)
    return conv2d(x, conv.weight, conv.bias, conv.stride[0], int(conv.padding[0]))


def use_compiled_convolution(conv: nn.Module, x: Tensor) -> bool:
    """Return whether compiled kernels run instead of a call of a convolution.

    Args:
        conv: the convolution, an `nn.Conv2d` or what client code replaced it by.
        x: its input, (N, C, H, W).

    Example:
        >>> use_compiled_convolution(nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 4, 4))
        False
    """
    return (
        use_compiled_kernels(conv, nn.Conv2d, x)
        and has_channels_last_weights(conv)
        and is_plain_convolution(cast(nn.Conv2d, conv), x)
    )


def is_plain_convolution(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return whether a convolution is that of its weights, with one stride and one padding by zeros.

    Args:
        conv: the convolution.
        x: its input, (N, C, H, W).

    Example:
        >>> x = torch.zeros(1, 2, 4, 4)
        >>> is_plain_convolution(nn.Conv2d(2, 2, 3), x), is_plain_convolution(nn.Conv2d(2, 2, 3, groups=2), x)
        (True, False)
    """
    return (
        conv.padding_mode == "zeros"
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.stride in ((1, 1), (2, 2))
        and conv.padding in ((0, 0), (1, 1))
        and conv.weight.shape[1] == x.shape[1]
        and (conv.bias is None or conv.bias.shape == conv.weight.shape[:1])
    )


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> Tensor:
    """Compute `F.conv2d` with the gradients of compiled kernels, where these support its shape.

    Args:
        x: (N, C, H, W) float32 on the CPU in channels_last.
        weight: (K, C, size, size).
        bias: (K,); `None` for none.
        stride: in pixels.
        padding: rows and columns of zeros on every side.

    Returns:
        (N, K, OH, OW).

    Example:
        >>> x = torch.ones(1, 3, 2, 2).contiguous(memory_format=torch.channels_last)
        >>> conv2d(x, torch.ones(1, 3, 2, 2), None).flatten()
        tensor([12.])
    """
    kernels = load_kernels("conv_grad")
    K, C, *size = weight.shape
    if kernels is None or not kernels.is_supported(C, K, tuple(size)):
        return F.conv2d(x, weight, bias, stride, padding)
    return _Conv2d.apply(x, weight, bias, stride, padding, kernels)  # type: ignore[no-untyped-call]


class _Conv2d(torch.autograd.Function):
    """`F.conv2d` with the gradients of compiled kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, kernels: Any) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.stride, ctx.padding, ctx.kernels = stride, padding, kernels
        if winograd := _profitable_winograd(x, weight, stride, padding):
            return cast(Tensor, winograd.convolve_and_transform(x, weight, bias))
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        no_gradients = (None,) * 3  # of stride, padding and kernels
        if torch.is_grad_enabled():
            y = F.conv2d(x, weight, bias, ctx.stride, ctx.padding)
            return *_differentiable_gradients(y, (x, weight, bias), needed, dy), *no_gradients
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = dweight = dbias = None
        if needed[0]:
            dx = _input_gradient(dy, x, weight, ctx.stride, ctx.padding)
        if needed[1]:
            dweight = ctx.kernels.weight_gradient(x, dy, weight.shape[2], ctx.stride, ctx.padding)
        if needed[2]:
            dbias = dy.sum((0, 2, 3))
        return dx, dweight, dbias, *no_gradients


def _profitable_winograd(x: Tensor, weight: Tensor, stride: int, padding: int) -> ModuleType | None:
    """Return the kernels of Winograd's method, if they support a convolution and are faster; `None` otherwise."""
    (N, C, H, W), (K, _, size, _) = x.shape, weight.shape
    if (size, stride, padding) != (3, 1, 1):
        return None
    winograd = load_kernels("winograd")
    return winograd if winograd is not None and winograd.is_profitable(N, C, K, H, W) else None


def _input_gradient(dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Return the gradient of a convolution's input: for stride 1, the convolution of dy with the rotated filters."""
    transposed = weight.transpose(0, 1)
    if winograd := _profitable_winograd(dy, transposed, stride, padding):
        return cast(Tensor, winograd.convolve_and_transform(dy, transposed.flip(2, 3), None))
    dilation, is_transposed, output_padding, groups = [1, 1], False, [0, 0], 1
    sizes = [stride] * 2, [padding] * 2, dilation, is_transposed, output_padding, groups
    only_input = [True, False, False]
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *sizes, only_input)[0]
