"""What the kernels' tests share: inputs, layers, gradients, errors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from helpers import randn

Gradients = tuple[Tensor, ...]


def channels_last(x: Tensor) -> Tensor:
    """The same feature map (N, C, H, W) in channels_last."""
    return x.contiguous(memory_format=torch.channels_last)


def make_norm(C: int, groups: int) -> nn.GroupNorm:
    """A group norm all of whose weights matter."""
    norm = nn.GroupNorm(groups, C)
    with torch.no_grad():
        norm.weight.copy_(randn(C, seed=1))
        norm.bias.copy_(randn(C, seed=2))
    return norm


def make_conv(C: int, K: int, size: int, stride: int, padding: int) -> nn.Conv2d:
    """A convolution with weights in channels_last."""
    torch.manual_seed(0)
    return nn.Conv2d(C, K, size, stride, padding).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def gradients(run: Callable[[], Tensor], *inputs: Tensor) -> Gradients:
    """What `run` returns, and the gradients of a fixed linear function of it."""
    y = run()
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    return y.detach(), *torch.autograd.grad((y * slope).sum(), inputs)


def second_gradients(run: Callable[[], Tensor], x: Tensor, weight: Tensor) -> Gradients:
    """The gradients with respect to x and a weight of the squared gradient of x."""
    (first,) = torch.autograd.grad(run().square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), (x, weight))


def distance(actual: Gradients, expected: Gradients) -> float:
    """The largest relative distance of two tensors in pairs."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(actual, expected, strict=True))


def total_error(actual: Gradients, expected: Gradients) -> float:
    """The relative distance of all numbers as one vector: some gradients of a network are nothing but rounding."""
    vectors = [(torch.cat([tensor.flatten() for tensor in tensors]),) for tensors in (actual, expected)]
    return distance(vectors[0], (vectors[1][0].double(),))
