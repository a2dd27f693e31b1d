"""Group normalization of a feature map plus a shift, then SiLU, forward and backward, in the notation of `ddim.nn.ops`.

`forward` and `backward` are those of training, which save the statistics; `normalize` is that of the engine, which
saves nothing, takes two feature maps side by side, and writes into a map with a halo.

The statistics take two passes, mean first and then the squared distances from it: one pass over squares would cancel
where the mean is large. Each sample's sums are taken in one order whatever the batch and the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.kernels.record import Count, Flag, Pointer, Real
from ddim.kernels.runtime import Kernel

COUNTS = (*map(Count, ("N", "P", "C", "groups")), Flag("silu"))
INPUTS = tuple(map(Pointer, ("x", "shift", "norm_weight", "norm_bias", "mean", "rstd")))
FORWARD = Kernel("norm", "forward", (*COUNTS, *INPUTS, Pointer("y"), Real("eps")))
BACKWARD = Kernel("norm", "backward", (*COUNTS, *INPUTS, *map(Pointer, ("dy", "dx", "dshift", "dweight", "dbias"))))
NORM_FIELDS = (
    *map(Count, ("N", "H", "W", "A", "B", "groups")),
    Flag("silu"),
    *map(Count, ("num_shifts", "num_weights")),
    *map(Pointer, ("a", "b", "shift", "norm_weight", "norm_bias")),
    Real("eps"),
)
"""What a kernel takes that normalizes the feature maps `a` and `b` side by side."""
NORMALIZE = Kernel("norm", "normalize", (*NORM_FIELDS, *map(Count, ("top", "padded_H", "padded_W")), Pointer("y")))
TRAINING_KERNELS = (FORWARD, BACKWARD)
KERNELS = (FORWARD, BACKWARD, NORMALIZE)


@dataclass(frozen=True)
class NormTerms:
    """What a feature map is normalized with.

    Attributes:
        shift: added before the norm, (N, C), or (1, C) for all samples.
        weight: multiplies the normalized map, (N, C) or (1, C).
        bias: added to it, of the shape of `weight`.
        groups: of the norm, which divides C; 0 for no norm (`normalize_and_convolve` only).
        eps: added to the variance.
        silu: whether SiLU follows.
    """

    shift: Tensor
    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    silu: bool

    def values(self, a: Tensor, b: Tensor | None) -> dict[str, Tensor | float]:
        """Return the values of `NORM_FIELDS`.

        Args:
            a: a feature map, (N, H, W, A).
            b: the one beside it, (N, H, W, B); `None` for none.
        """
        N, H, W, A = a.shape
        counts = {"N": N, "H": H, "W": W, "A": A, "B": 0 if b is None else b.shape[-1], "groups": self.groups}
        tensors = {"a": a, "b": a if b is None else b, "shift": self.shift}
        tensors |= {"norm_weight": self.weight, "norm_bias": self.bias}
        sizes = {"num_shifts": self.shift.shape[0], "num_weights": self.weight.shape[0]}
        return {**counts, **sizes, **tensors, "silu": self.silu, "eps": self.eps}


def forward(
    x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize a feature map plus a shift, then apply SiLU.

    Args:
        x: (N, C, H, W) float32 on the CPU in channels_last; the others are contiguous float32.
        shift: added before the norm, (N, C).
        weight: multiplies the normalized map, (C,).
        bias: added to it, (C,).
        groups: of the norm, which divides C.
        eps: added to the variance.
        silu: whether SiLU follows.

    Returns:
        y (N, C, H, W), and for `backward` the mean and 1 / sqrt(var + eps), both (N, groups).

    References:
        Group normalization: arXiv 1803.08494.

    Example:
        >>> x = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1).contiguous(memory_format=torch.channels_last)
        >>> y, mean, rstd = forward(x, torch.zeros(1, 2), torch.ones(2), torch.zeros(2), 1, 0.0, False)
        >>> y.flatten(), mean
        (tensor([-1.,  1.]), tensor([[2.]]))
    """
    N, C, H, W = x.shape
    y, mean, rstd = torch.empty_like(x), x.new_empty(N, groups), x.new_empty(N, groups)
    FORWARD(
        N=N,
        P=H * W,
        C=C,
        groups=groups,
        silu=silu,
        eps=eps,
        x=x,
        shift=shift,
        norm_weight=weight,
        norm_bias=bias,
        mean=mean,
        rstd=rstd,
        y=y,
    )
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `forward`.

    Args:
        dy: the gradient of y, (N, C, H, W), in memory as `x`.
        x: as given to `forward`, (N, C, H, W) in channels_last.
        shift: as given to `forward`, (N, C).
        weight: as given to `forward`, (C,).
        bias: as given to `forward`, (C,).
        mean: as `forward` returned it, (N, groups).
        rstd: as `forward` returned it, (N, groups).
        silu: as given to `forward`.

    Returns:
        dx (N, C, H, W), dshift (N, C), dweight (C,) and dbias (C,).

    Example:
        >>> x = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1).contiguous(memory_format=torch.channels_last)
        >>> shift, weight, bias = torch.zeros(1, 2), torch.ones(2), torch.zeros(2)
        >>> y, mean, rstd = forward(x, shift, weight, bias, 1, 0.0, False)
        >>> dx, dshift, dweight, dbias = backward(torch.ones_like(x), x, shift, weight, bias, mean, rstd, False)
        >>> dweight, dbias
        (tensor([-1.,  1.]), tensor([1., 1.]))
    """
    N, C, H, W = x.shape
    dx = torch.empty_like(x)
    dshift, dweight, dbias = x.new_empty(N, C), x.new_empty(N, C), x.new_empty(N, C)
    BACKWARD(
        N=N,
        P=H * W,
        C=C,
        groups=mean.shape[1],
        silu=silu,
        x=x,
        shift=shift,
        norm_weight=weight,
        norm_bias=bias,
        mean=mean,
        rstd=rstd,
        dy=dy,
        dx=dx,
        dshift=dshift,
        dweight=dweight,
        dbias=dbias,
    )
    # Threads divide samples, so that no sum depends on their number; the sum over samples is PyTorch's.
    return dx, dshift, dweight.sum(0), dbias.sum(0)


def normalize(a: Tensor, b: Tensor | None, terms: NormTerms, y: Tensor, has_halo: bool) -> None:
    """Normalize one or two feature maps side by side, into a map that may have a halo.

    Args:
        a: (N, H, W, A) float32 on the CPU, contiguous, as all the others.
        b: (N, H, W, B); `None` for none. C = A + B.
        terms: of the norm.
        y: written to: (N, H, W, C), or more rows and columns with a halo, which is left as it is.
        has_halo: whether the first pixel of the result is at (1, 1) of y instead of (0, 0).

    Example:
        >>> one, zero, y = torch.ones(1, 2), torch.zeros(1, 2), torch.empty(1, 1, 1, 2)
        >>> a, b = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
        >>> normalize(a, b, NormTerms(zero, one, zero, groups=1, eps=0.0, silu=False), y, has_halo=False)
        >>> y.flatten()
        tensor([-1.,  1.])
    """
    _, padded_H, padded_W, _ = y.shape
    NORMALIZE(**terms.values(a, b), y=y, padded_H=padded_H, padded_W=padded_W, top=int(has_halo))
