"""The operations between convolutions: kernels in Triton where they support the device and the shape, or PyTorch's.

`normalize` is group normalization with all that surrounds it in a U-Net,

    u = [a; b] + shift                  two feature maps side by side, so that they are never concatenated
    v = (u - mean) / sqrt(var + eps)    mean, var: over the positions and channels of a sample's group
    z = (weight v + bias) (1 + scale) + shift_after
    y = z sigmoid(z)                    or y = z

(GroupNorm: arXiv 1803.08494.) Here alone it is decided which of the two runs; both give the same result, to rounding.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ddim.engine.fused import reference
from ddim.engine.fused.reference import Norm

logger = logging.getLogger(__name__)


@functools.cache
def load_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Return the kernels in Triton, if they run on a device.

    Triton comes with PyTorch for CUDA, and compiles for a device on first use. It needs a C compiler, which not every
    machine has, and old devices lack some dtypes: so all kernels are compiled and run here once.

    Args:
        device: of the network.
        dtype: of the network.

    Returns:
        `ddim.engine.fused.triton_kernels`; `None` where PyTorch's operators have to do.

    Example:
        >>> load_kernels(torch.device("cpu"), torch.float32) is None
        True
    """
    if device.type != "cuda":
        return None
    try:
        kernels = importlib.import_module("ddim.engine.fused.triton_kernels")
        with torch.inference_mode(False), torch.cuda.device(device):
            _check_kernels(kernels, device, dtype)
    # Whatever a compiler for another device raises: PyTorch's operators give the same results.
    except Exception as error:
        logger.debug("the network runs on PyTorch's operators: Triton does not work on %s: %s", device, error)
        return None
    return kernels


def _check_kernels(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    """Compile and run the kernels on small feature maps; raise `RuntimeError` if a result is wrong."""
    new = functools.partial(torch.linspace, device=device, dtype=dtype)
    x = new(-2, 2, 64).view(1, 16, 2, 2).contiguous(memory_format=torch.channels_last)
    norm = Norm(new(0.5, 1.5, 16), new(-1, 1, 16), groups=4, eps=1e-5, silu=True)
    pairs = [
        (kernels.normalize(x, None, norm), reference.normalize(x, None, norm)),
        (kernels.add_residual(x, None, [x]), reference.add_residual(x, None, [x])),
        (kernels.interleave(x), reference.interleave(x)),
    ]
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    if not all(torch.allclose(actual, expected, tolerance, tolerance) for actual, expected in pairs):
        raise RuntimeError("a result is wrong")


def _supporting_kernels(x: Tensor, shape: Sequence[int], groups: int = 1) -> ModuleType | None:
    """Return the kernels, if they run on the device of x and support a result of this shape; `None` otherwise."""
    kernels = load_kernels(x.device, x.dtype)
    return kernels if kernels is not None and kernels.is_supported(shape, x.dtype, groups) else None


def _as_channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def normalize(
    a: Tensor,
    b: Tensor | None,
    norm: Norm,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift_after: Tensor | None = None,
) -> Tensor:
    """Normalize one feature map, or two side by side.

    Args:
        a: (N, A, H, W).
        b: (N, B, H, W), of the dtype of `a`; `None` for none.
        norm: of C = A + B channels.
        shift: added first, (N, C) or (1, C); `None` for none.
        scale: (N, C) or (1, C); `None` for none.
        shift_after: of the shape of `scale`, given with it.

    Returns:
        (N, C, H, W), of the dtype of `a`.

    Example:
        >>> norm = Norm(torch.ones(2), torch.zeros(2), groups=1, eps=0.0, silu=False)
        >>> normalize(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), norm, torch.tensor([[0.0, 2.0]])).flatten()
        tensor([-1.,  1.])
    """
    N, A, H, W = a.shape
    C = A + (0 if b is None else b.shape[1])
    kernels = _supporting_kernels(a, (N, C, H, W), norm.groups)
    if kernels is None:
        return reference.normalize(a, b, norm, shift, scale, shift_after)
    b = None if b is None else _as_channels_last(b)
    y: Tensor = kernels.normalize(_as_channels_last(a), b, norm, shift, scale, shift_after)
    return y


def add_residual(x: Tensor, bias: Tensor | None, skips: Sequence[Tensor], divisor: float = 1.0) -> Tensor:
    """Compute (x + bias + the sum of skips) / divisor.

    Args:
        x: (N, C, H, W).
        bias: (C,); `None` for none.
        skips: up to two, of the shape and dtype of `x`.
        divisor: the block's scale factor.

    Returns:
        (N, C, H, W), of the dtype of `x`.

    Example:
        >>> add_residual(torch.ones(1, 1, 1, 1), torch.ones(1), []).item()
        2.0
    """
    kernels = _supporting_kernels(x, x.shape)
    if kernels is None:
        return reference.add_residual(x, bias, skips, divisor)
    y: Tensor = kernels.add_residual(_as_channels_last(x), bias, [_as_channels_last(skip) for skip in skips], divisor)
    return y


def interleave(x: Tensor) -> Tensor:
    """Interleave the results of sub-pixel convolutions.

    Args:
        x: (N, 4 C, H + 1, W + 1): four feature maps side by side. Pixel (2 h + i, 2 w + j) of the result is pixel
            (h + i, w + j) of map 2 i + j, for i and j in (0, 1).

    Returns:
        (N, C, 2 H, 2 W).

    Example:
        >>> interleave(torch.arange(16.0).view(1, 4, 2, 2)).squeeze()
        tensor([[ 0.,  5.],
                [10., 15.]])
    """
    N, C, H, W = x.shape[0], x.shape[1] // 4, x.shape[2] - 1, x.shape[3] - 1
    kernels = _supporting_kernels(x, (N, C, 2 * H, 2 * W))
    if kernels is None:
        return reference.interleave(x)
    y: Tensor = kernels.interleave(_as_channels_last(x))
    return y
