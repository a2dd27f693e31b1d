"""Spherical interpolation between latents, along paths and over grids (appendix D.5 of arXiv 2010.02502); directions.

With theta the angle between two latents as vectors,

    slerp(z0, z1, t) = sin((1 - t) theta) / sin(theta) z0 + sin(t theta) / sin(theta) z1                  (67)

stays on the shell around the origin on which Gaussian latents lie, where the straight line would cut through its empty
inside. The given latents themselves are returned bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ddim.validation import integer

MIN_SINE = 1e-6
"""sin(theta) below which equation (67) would divide by nearly zero."""


def slerp(z0: Tensor, z1: Tensor, t: float | Tensor) -> Tensor:
    """Interpolate spherically between two latents.

    Nearly parallel latents, and those of which one is zero, are interpolated along the straight line, which is the
    limit of the formula. Between opposite latents every half circle is as short as the others: always the same one is
    taken.

    Args:
        z0: a latent of any shape; with four dimensions (N, C, H, W) it is N latents, each with its own angle.
        z1: of the same shape and dtype.
        t: from 0, which gives z0, to 1, which gives z1; or a tensor (F,) of such numbers.

    Returns:
        A tensor of the shape and dtype of `z0`, or (F, *shape) for a tensor of t.

    Raises:
        ValueError: for latents of different shapes or dtypes, that are empty or not finite, or a t outside [0, 1].
        TypeError: for latents that are not tensors.

    References:
        Equation (67) of arXiv 2010.02502.

    Example:
        >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
        tensor([0.7071, 0.7071])
    """
    check_path([z0, z1])
    positions = torch.as_tensor(t, dtype=torch.float64).cpu()
    outside = positions[~((positions >= 0) & (positions <= 1))]
    if positions.ndim > 1 or len(outside):
        given = f"shape {tuple(positions.shape)}" if positions.ndim > 1 else f"{float(outside[0]):g}"
        raise ValueError(f"t must be a number from 0 to 1, or a one-dimensional tensor of them, got {given}")
    is_batch = z0.ndim == 4
    pairs = zip(z0, z1, strict=True) if is_batch else [(z0, z1)]
    frames = torch.stack([_slerp(a, b, positions.reshape(-1)) for a, b in pairs], 1 if is_batch else 0)
    frames = frames if is_batch else frames[0]
    return frames if positions.ndim else frames[0]


def slerp_path(latents: Sequence[Tensor], frames: int, closed: bool = False) -> Tensor:
    """Interpolate from latent to latent along a path.

    Args:
        latents: at least two, of one shape (C, H, W).
        frames: of each leg, both its ends included.
        closed: return to the first latent, for animations that repeat.

    Returns:
        With K latents ((K - 1) (frames - 1) + 1, C, H, W), frame i (frames - 1) being latent i; closed
        (K (frames - 1), C, H, W), which stops one frame before the first latent would repeat.

    Raises:
        ValueError: for fewer latents than two, fewer frames than two, or latents that do not agree.
        TypeError: for latents that are not tensors.

    Example:
        >>> latents = [torch.eye(4)[i].reshape(1, 2, 2) for i in range(3)]
        >>> slerp_path(latents, frames=5).shape, slerp_path(latents, frames=5, closed=True).shape
        (torch.Size([9, 1, 2, 2]), torch.Size([12, 1, 2, 2]))
    """
    check_path(latents)
    integer("frames", frames, 2)
    t = torch.linspace(0, 1, frames, dtype=torch.float64)[:-1]
    ends = [*latents[1:], latents[0]] if closed else latents[1:]
    legs = [slerp(z0, z1, t) for z0, z1 in zip(latents[: len(ends)], ends, strict=True)]
    return torch.cat(legs if closed else [*legs, latents[-1][None]])


def slerp_grid(corners: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    """Interpolate over a grid between four latents: along the upper and lower edge, then from one edge to the other.

    Args:
        corners: upper left, upper right, lower left, lower right, each (C, H, W).
        rows: at least 2.
        columns: at least 2.

    Returns:
        (rows * columns, C, H, W), row by row.

    Raises:
        ValueError: for another number of corners, another shape, a smaller grid, or latents that do not agree.
        TypeError: for corners that are not tensors.

    Example:
        >>> corners = [torch.eye(4)[i].reshape(1, 2, 2) for i in range(4)]
        >>> slerp_grid(corners, rows=3, columns=5).shape
        torch.Size([15, 1, 2, 2])
    """
    if len(corners) != 4:
        raise ValueError(f"corners must be the four latents of a grid, got {len(corners)}")
    check_path(corners)
    if corners[0].ndim != 3:
        raise ValueError(f"latent 0 of a grid: expected shape (C, H, W), got {tuple(corners[0].shape)}")
    for name, count in (("rows", rows), ("columns", columns)):
        integer(name, count, 2)
    upper = slerp_path(corners[:2], columns)
    lower = slerp_path(corners[2:], columns)
    return slerp(upper, lower, torch.linspace(0, 1, rows, dtype=torch.float64)).flatten(0, 1)


def path_weights(count: int, frames: int, closed: bool = False) -> Tensor:
    """Return how much of each point is in each frame of a linear interpolation along a path.

    Args:
        count: K, the number of points.
        frames: of each leg, both its ends included.
        closed: return to the first point.

    Returns:
        float64 (F, K), F frames as `slerp_path` returns them; each row sums to 1.

    Example:
        >>> path_weights(2, 3)
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000],
                [0.0000, 1.0000]], dtype=torch.float64)
    """
    integer("frames", frames, 2)
    points = torch.eye(count, dtype=torch.float64)
    t = torch.linspace(0, 1, frames, dtype=torch.float64)[:-1, None]
    ends = points.roll(-1, 0) if closed else points[1:]
    legs = [torch.lerp(a, b, t) for a, b in zip(points[: len(ends)], ends, strict=True)]
    return torch.cat(legs if closed else [*legs, points[-1:]])


def grid_weights(rows: int, columns: int) -> Tensor:
    """Return how much of each corner is in each place of a bilinear interpolation over a grid.

    Args:
        rows: at least 2.
        columns: at least 2.

    Returns:
        float64 (rows * columns, 4), corners and places in the order of `slerp_grid`; each row sums to 1.

    Example:
        >>> grid_weights(3, 3)[4]
        tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """
    return torch.einsum("ra,cb->rcab", path_weights(2, rows), path_weights(2, columns)).reshape(rows * columns, 4)


def add_direction(latents: Tensor, direction: Tensor, strength: float) -> Tensor:
    """Add a multiple of a direction to latents, and keep the norm of each.

    A sum alone would leave the shell on which Gaussian latents lie, and decode to noise.

    Args:
        latents: (N, C, H, W).
        direction: (C, H, W), as `DDIMPipeline.direction` returns it.
        strength: the multiple; a negative one goes the other way.

    Returns:
        (N, C, H, W), in the dtype of `latents`.

    Raises:
        ValueError: for a direction of another shape, or a sum that is zero.

    Example:
        >>> add_direction(torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[0.0, 4.0]]]), 1.0)
        tensor([[[[1.8000, 2.4000]]]])
    """
    if direction.shape != latents.shape[1:]:
        raise ValueError(
            f"direction: expected shape {tuple(latents.shape[1:])}, that of a latent, got {tuple(direction.shape)}"
        )
    moved = latents.double() + strength * direction.double()
    before, after = (x.double().flatten(1).norm(dim=1)[:, None, None, None] for x in (latents, moved))
    if not bool((after > 0).all()):
        raise ValueError("strength must leave something of every latent, got a sum of zero")
    return (moved * (before / after)).to(latents.dtype)


def check_path(latents: Sequence[Tensor]) -> None:
    """Check that latents can be interpolated: at least two, finite, of one shape and dtype.

    Args:
        latents: tensors of any shape.

    Raises:
        ValueError: if there are fewer than two, or they are empty, not finite or do not agree.
        TypeError: for one that is not a tensor.

    Example:
        >>> check_path([torch.zeros(2), torch.zeros(3)])
        Traceback (most recent call last):
        ValueError: latent 1: expected shape (2,) as of latent 0, got (3,)
    """
    if len(latents) < 2:
        raise ValueError(f"a path requires at least two latents, got {len(latents)}")
    for index, latent in enumerate(latents):
        if not isinstance(latent, Tensor):
            raise TypeError(f"latent {index} must be a tensor, got {type(latent).__name__}")
        if latent.shape != latents[0].shape:
            shapes = tuple(latents[0].shape), tuple(latent.shape)
            raise ValueError(f"latent {index}: expected shape {shapes[0]} as of latent 0, got {shapes[1]}")
        if latent.dtype != latents[0].dtype:
            raise ValueError(f"latent {index}: expected {latents[0].dtype} as of latent 0, got {latent.dtype}")
        if not latent.numel():
            raise ValueError(f"latent {index} must not be empty, got shape {tuple(latent.shape)}")
        if not latent.is_floating_point() or not bool(torch.isfinite(latent).all()):
            raise ValueError(f"latent {index} must be finite floating-point numbers, got NaN, infinity or integers")


def _slerp(z0: Tensor, z1: Tensor, t: Tensor) -> Tensor:
    """Return the frames (F, *shape) between two latents, computed in float64 where the device has it."""
    wide = torch.float32 if z0.device.type == "mps" else torch.float64
    a, b = z0.to(wide).flatten(), z1.to(wide).flatten()
    norms = float(a.norm()), float(b.norm())
    t = t.to(z0.device, wide)[:, None]
    frames = torch.lerp(a, b, t)
    if min(norms) > 0:
        u, v = a / norms[0], b / norms[1]
        # Kahan's formula: exact for small angles and for angles near pi, where the arc cosine is not.
        theta = 2 * torch.atan2((u - v).norm(), (u + v).norm())
        if float(theta.sin()) > MIN_SINE:
            frames = (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / theta.sin()
        elif float(theta) > 1 and len(u) > 1:
            half_circle = torch.cos(t * math.pi) * u + torch.sin(t * math.pi) * _perpendicular(u)
            frames = (norms[0] + t * (norms[1] - norms[0])) * half_circle
    frames = frames.to(z0.dtype).view(-1, *z0.shape)
    frames[(t == 0).flatten()] = z0
    frames[(t == 1).flatten()] = z1
    return frames


def _perpendicular(u: Tensor) -> Tensor:
    """Return a unit vector at right angles to `u`, always the same for the same `u`."""
    axis = torch.zeros_like(u)
    axis[u.abs().argmin()] = 1
    rest = axis - (axis @ u) * u
    return rest / rest.norm()
