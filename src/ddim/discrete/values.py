"""Values 0..K-1: what they are as gray, and as channels of a network.

Value k of an image is the gray value k / (K - 1) of [0, 1]; a gray value is the nearest of them. For a network an image
of C channels is one of C K channels, K for each in the order of the values. It is given one-hot vectors with -1 for 0
and predicts logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_VALUES = 256
"""The values of 8 bits."""


def quantize(samples: Tensor, num_values: int) -> Tensor:
    """Return the nearest values of images.

    Args:
        samples: in [-1, 1], any shape; values beyond are clipped.
        num_values: K.

    Returns:
        int64, of the same shape.

    Example:
        >>> quantize(torch.tensor([-1.0, 0.1, 1.0]), 3)
        tensor([0, 1, 2])
    """
    unit = (samples / 2 + 0.5).clamp(0, 1)
    return (unit * (num_values - 1)).round().long()


def to_samples(values: Tensor, num_values: int) -> Tensor:
    """Return the images that values stand for.

    Args:
        values: int64, any shape.
        num_values: K.

    Returns:
        float32 in [-1, 1], of the same shape.

    Example:
        >>> to_samples(torch.tensor([0, 1, 2]), 3)
        tensor([-1.,  0.,  1.])
    """
    return values.float() / (num_values - 1) * 2 - 1


def one_hot(values: Tensor, num_values: int) -> Tensor:
    """Return values as one-hot vectors.

    Args:
        values: int64 (...), in 0..K-1.
        num_values: K.

    Returns:
        float32 (..., K).

    Example:
        >>> one_hot(torch.tensor(1), 3)
        tensor([0., 1., 0.])
    """
    return torch.nn.functional.one_hot(values, num_values).float()


def to_channels(values: Tensor, num_values: int) -> Tensor:
    """Return values as a network is given them: one-hot, with -1 for 0.

    Args:
        values: int64 (N, C, H, W), in 0..K-1.
        num_values: K.

    Returns:
        float32 (N, C K, H, W).

    Example:
        >>> to_channels(torch.tensor([[[[1]]]]), 3).flatten()
        tensor([-1.,  1., -1.])
    """
    return (2 * one_hot(values, num_values) - 1).movedim(-1, 2).flatten(1, 2)


def from_channels(channels: Tensor, num_values: int) -> Tensor:
    """Return what a network is given or predicts with the K numbers of an entry as the last dimension.

    Args:
        channels: (N, C K, H, W).
        num_values: K.

    Returns:
        (N, C, H, W, K).

    Example:
        >>> from_channels(torch.zeros(2, 6, 8, 8), 3).shape
        torch.Size([2, 2, 8, 8, 3])
    """
    count, _, *size = channels.shape
    return channels.reshape(count, -1, num_values, *size).movedim(2, -1)
