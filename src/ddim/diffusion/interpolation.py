"""Between latent codes: spherical interpolation (appendix D.5 of arXiv 2010.02502), along paths and over grids.

With theta the angle between two codes as vectors,

    slerp(z0, z1, t) = sin((1 - t) theta) / sin(theta) z0 + sin(t theta) / sin(theta) z1                  (67)

keeps to the shell around the origin on which Gaussian codes lie, where the straight line would cut through its empty
inside. The given codes themselves come back bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ddim.validation import integer

PARALLEL = 1e-6
"""sin(theta) below which equation (67) would divide by nearly nothing."""


def slerp(z0: Tensor, z1: Tensor, t: float | Tensor) -> Tensor:
    """Spherical interpolation, equation (67).

    Nearly parallel codes, and those of which one is zero, are interpolated along the straight line, which is the limit
    of the formula. Between opposite codes every half circle is as short as the others: one is taken, always the same.

    Args:
        z0: a code of any shape; with four dimensions (N, C, H, W) it is N codes, each with an angle of its own.
        z1: of the same shape and dtype.
        t: from 0, which gives z0, to 1, which gives z1; or a tensor (F,) of such numbers.

    Returns:
        Of the shape of `z0`, or (F, *shape) for a tensor of t; in the dtype of `z0`.

    Raises:
        ValueError: for codes of different shapes or dtypes, that are empty or not finite, or a t outside [0, 1].
        TypeError: for codes that are no tensors.
    """
    check_codes([z0, z1])
    where = torch.as_tensor(t, dtype=torch.float64).cpu()
    outside = where[~((where >= 0) & (where <= 1))]
    if where.ndim > 1 or len(outside):
        given = f"t has shape {tuple(where.shape)}" if where.ndim > 1 else f"t is {float(outside[0]):g}"
        raise ValueError(f"{given}; it must be a number from 0 to 1, or a one-dimensional tensor of them")
    batched = z0.ndim == 4
    pairs = zip(z0, z1, strict=True) if batched else [(z0, z1)]
    frames = torch.stack([_slerp(a, b, where.reshape(-1)) for a, b in pairs], 1 if batched else 0)
    frames = frames if batched else frames[0]
    return frames if where.ndim else frames[0]


def slerp_path(codes: Sequence[Tensor], frames: int, closed: bool = False) -> Tensor:
    """Frames from code to code.

    Args:
        codes: at least two, of one shape (C, H, W).
        frames: of each leg, both its ends included.
        closed: come back to the first code, for animations that repeat.

    Returns:
        With K codes ((K - 1) (frames - 1) + 1, C, H, W), frame i (frames - 1) being code i; closed
        (K (frames - 1), C, H, W), which stops one frame before the first code would repeat.

    Raises:
        ValueError: for fewer codes than two, fewer frames than two, or as `slerp`.
    """
    check_codes(codes)
    integer("frames", frames, 2)
    t = torch.linspace(0, 1, frames, dtype=torch.float64)[:-1]
    ends = [*codes[1:], codes[0]] if closed else codes[1:]
    legs = [slerp(z0, z1, t) for z0, z1 in zip(codes[: len(ends)], ends, strict=True)]
    return torch.cat(legs if closed else [*legs, codes[-1][None]])


def slerp_grid(corners: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    """A grid between four codes: along the upper and lower edge, then from one to the other.

    Args:
        corners: upper left, upper right, lower left, lower right, each (C, H, W).
        rows: at least 2.
        columns: at least 2.

    Returns:
        (rows * columns, C, H, W), row by row.

    Raises:
        ValueError: for another number of corners, another shape, a smaller grid, or as `slerp`.
    """
    if len(corners) != 4:
        raise ValueError(f"a grid lies between four codes; {len(corners)} were given")
    check_codes(corners)
    if corners[0].ndim != 3:
        raise ValueError(f"code 0 has shape {tuple(corners[0].shape)}; a grid lies between codes (C, H, W)")
    for name, count in (("rows", rows), ("columns", columns)):
        integer(name, count, 2)
    upper = slerp_path(corners[:2], columns)
    lower = slerp_path(corners[2:], columns)
    return slerp(upper, lower, torch.linspace(0, 1, rows, dtype=torch.float64)).flatten(0, 1)


def check_codes(codes: Sequence[Tensor]) -> None:
    """ValueError unless there are at least two finite codes of one shape and dtype; TypeError for what is no tensor."""
    if len(codes) < 2:
        raise ValueError(f"{len(codes)} code{' was' if len(codes) == 1 else 's were'} given; a path has at least two")
    for index, code in enumerate(codes):
        if not isinstance(code, Tensor):
            raise TypeError(f"code {index} is a {type(code).__name__}; it must be a tensor")
        if code.shape != codes[0].shape:
            raise ValueError(
                f"code {index} has shape {tuple(code.shape)}, code 0 {tuple(codes[0].shape)}; they must agree"
            )
        if code.dtype != codes[0].dtype:
            raise ValueError(f"code {index} is {code.dtype}, code 0 {codes[0].dtype}; they must agree")
        if not code.numel():
            raise ValueError(f"code {index} has shape {tuple(code.shape)}; it holds no number")
        if not code.is_floating_point() or not bool(torch.isfinite(code).all()):
            raise ValueError(f"code {index} holds NaN, infinity or integers; codes are finite floating-point numbers")


def _slerp(z0: Tensor, z1: Tensor, t: Tensor) -> Tensor:
    """(F, *shape) between two codes; in float64 where the device has it."""
    wide = torch.float32 if z0.device.type == "mps" else torch.float64
    a, b = z0.to(wide).flatten(), z1.to(wide).flatten()
    norms = float(a.norm()), float(b.norm())
    t = t.to(z0.device, wide)[:, None]
    frames = torch.lerp(a, b, t)
    if min(norms) > 0:
        u, v = a / norms[0], b / norms[1]
        # Kahan's formula: exact for small angles and for angles near pi, where the arc cosine is not.
        theta = 2 * torch.atan2((u - v).norm(), (u + v).norm())
        if float(theta.sin()) > PARALLEL:
            frames = (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / theta.sin()
        elif float(theta) > 1 and len(u) > 1:
            around = torch.cos(t * math.pi) * u + torch.sin(t * math.pi) * _perpendicular(u)
            frames = (norms[0] + t * (norms[1] - norms[0])) * around
    frames = frames.to(z0.dtype).view(-1, *z0.shape)
    frames[(t == 0).flatten()] = z0
    frames[(t == 1).flatten()] = z1
    return frames


def _perpendicular(u: Tensor) -> Tensor:
    """A unit vector at right angles to `u`, the same for the same `u`."""
    axis = torch.zeros_like(u)
    axis[u.abs().argmin()] = 1
    aside = axis - (axis @ u) * u
    return aside / aside.norm()
