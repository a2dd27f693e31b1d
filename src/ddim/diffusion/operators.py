"""Linear measurements of images, by their singular value decompositions.

A measurement y = A x of an image x loses what A maps to zero. Each operator here knows

    A = U diag(s) V^T

with orthonormal U and V, as maps rather than matrices: `to_coefficients` is V^T, `from_coefficients` is V, `measure` is
U and `unmeasure` is U^T. All that restoration needs follows from them,

    forward(x)        = A x    = U s V^T x
    transpose(y)      = A^T y  = V s U^T y
    pseudo_inverse(y) = A^+ y  = V s^+ U^T y        s^+ = 1 / s where s > 0, else 0

Images are (N, C, H, W), measurements (N, *measurement_shape). Coefficients have whatever shape suits the operator;
those of `Blur` are complex, Fourier's. A map that has no such form, or is not linear, is any callable of images.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ddim.validation import integer, real

MIN_SINGULAR_VALUE = 1e-4
"""Singular values below this part of the largest one count as zero."""
MAX_MATRIX_ENTRIES = 1 << 26
"""The largest matrix whose decomposition is computed."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in gray (ITU-R BT.601), as PIL has them."""

Shape = Sequence[int]


class LinearOperator(ABC):
    """A linear map of images to measurements.

    Args:
        shape: (C, H, W) of the images.

    Attributes:
        shape: (C, H, W) of the images.
        measurement_shape: of a measurement, without N.
        singular_values: s, float32, of a shape that broadcasts with coefficients (N, ...); not negative.
    """

    measurement_shape: tuple[int, ...]
    singular_values: Tensor

    def __init__(self, shape: Shape) -> None:
        if len(shape) != 3:
            raise ValueError(f"shape must be (C, H, W) of images, got {tuple(shape)}")
        C, H, W = (integer("shape", size, 1) for size in shape)
        self.shape = C, H, W

    @abstractmethod
    def to_coefficients(self, x: Tensor) -> Tensor:
        """Return V^T x.

        Args:
            x: images, (N, C, H, W).
        """

    @abstractmethod
    def from_coefficients(self, coefficients: Tensor) -> Tensor:
        """Return V c, images (N, C, H, W).

        Args:
            coefficients: c.
        """

    @abstractmethod
    def measure(self, coefficients: Tensor) -> Tensor:
        """Return U c, measurements (N, *measurement_shape).

        Args:
            coefficients: c; those of singular value zero have no effect.
        """

    @abstractmethod
    def unmeasure(self, y: Tensor) -> Tensor:
        """Return U^T y, coefficients that are zero where the singular value is.

        Args:
            y: measurements, (N, *measurement_shape).
        """

    def forward(self, x: Tensor) -> Tensor:
        """Return A x, measurements (N, *measurement_shape).

        Args:
            x: images, (N, C, H, W).
        """
        return self.measure(self._values(x) * self.to_coefficients(x))

    def __call__(self, x: Tensor) -> Tensor:
        """Return `forward(x)`.

        Args:
            x: images, (N, C, H, W).
        """
        return self.forward(x)

    def transpose(self, y: Tensor) -> Tensor:
        """Return A^T y, images (N, C, H, W).

        Args:
            y: measurements, (N, *measurement_shape).
        """
        return self.from_coefficients(self._values(y) * self.unmeasure(y))

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """Return A^+ y, the shortest images (N, C, H, W) whose measurements come closest to y.

        Args:
            y: measurements, (N, *measurement_shape).
        """
        return self.from_coefficients(self.inverse_values(y) * self.unmeasure(y))

    def inverse_values(self, like: Tensor) -> Tensor:
        """Return s^+: 1 / s, and 0 where s is 0, of the dtype and device of a tensor.

        Args:
            like: the tensor.
        """
        values = self._values(like)
        return torch.where(values > 0, 1 / values.clamp(min=torch.finfo(values.dtype).tiny), 0)

    def _values(self, like: Tensor) -> Tensor:
        return self.singular_values.to(like.device, like.dtype)


def _without_small(values: Tensor) -> Tensor:
    """Return singular values, those that are rounding errors or nearly zero as zeros."""
    return torch.where(values > MIN_SINGULAR_VALUE * values.max(), values, 0)


class Mask(LinearOperator):
    """The pixels that are known: 1 where the mask is, 0 elsewhere; measurements have the shape of images.

    Args:
        shape: (C, H, W) of the images.
        mask: boolean (H, W), (C, H, W), or with N in front where images have masks of their own: true where pixels are
            known.

    Raises:
        ValueError: for another shape, or a mask that is not boolean.

    Example:
        >>> operator = Mask((1, 2, 2), torch.tensor([[True, False], [True, True]]))
        >>> operator(torch.ones(1, 1, 2, 2)).flatten().tolist()
        [1.0, 0.0, 1.0, 1.0]
    """

    def __init__(self, shape: Shape, mask: Tensor) -> None:
        super().__init__(shape)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be boolean, true where pixels are known, got {mask.dtype}")
        if mask.ndim == 3 and mask.shape[1:] == self.shape[1:] and mask.shape[0] not in (1, self.shape[0]):
            mask = mask[:, None]  # (N, H, W)
        try:
            expanded = mask.expand(*mask.shape[:-3], *self.shape)
        except RuntimeError:
            expanded = mask
        if expanded.shape[-3:] != self.shape or expanded.ndim > 4:
            raise ValueError(f"mask: expected shape {self.shape[1:]}, that of the images, got {tuple(mask.shape)}")
        self.measurement_shape = self.shape
        self.singular_values = expanded.float()

    def to_coefficients(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def from_coefficients(self, coefficients: Tensor) -> Tensor:
        """Return the coefficients."""
        return coefficients

    def measure(self, coefficients: Tensor) -> Tensor:
        """Return the coefficients that are known, and zeros."""
        return self._values(coefficients) * coefficients

    def unmeasure(self, y: Tensor) -> Tensor:
        """Return the pixels that are known, and zeros."""
        return self._values(y) * y


class Separable(LinearOperator):
    """One matrix along the height and one along the width of each channel: y = A_h x A_w^T.

    Args:
        shape: (C, H, W) of the images.
        rows: A_h, (h, H).
        columns: A_w, (w, W).

    Example:
        >>> operator = Separable((1, 2, 2), torch.tensor([[0.5, 0.5]]), torch.eye(2))
        >>> operator(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).flatten().round(decimals=4).tolist()
        [2.0, 3.0]
    """

    def __init__(self, shape: Shape, rows: Tensor, columns: Tensor) -> None:
        super().__init__(shape)
        for name, matrix, size in (("rows", rows, self.shape[1]), ("columns", columns, self.shape[2])):
            if matrix.ndim != 2 or matrix.shape[1] != size:
                raise ValueError(f"{name}: expected shape (n, {size}), got {tuple(matrix.shape)}")
        self.measurement_shape = self.shape[0], len(rows), len(columns)
        (self._u_rows, s_rows, self._v_rows), (self._u_columns, s_columns, self._v_columns) = (
            _decompose(matrix) for matrix in (rows, columns)
        )
        self.singular_values = _without_small(s_rows[:, None] * s_columns).float()

    def to_coefficients(self, x: Tensor) -> Tensor:
        """Return V_h^T x V_w."""
        return _sandwich(self._v_rows.mT, x, self._v_columns)

    def from_coefficients(self, coefficients: Tensor) -> Tensor:
        """Return V_h c V_w^T."""
        return _sandwich(self._v_rows, coefficients, self._v_columns.mT)

    def measure(self, coefficients: Tensor) -> Tensor:
        """Return U_h c U_w^T."""
        return _sandwich(self._u_rows, coefficients * self._is_measured(coefficients), self._u_columns.mT)

    def unmeasure(self, y: Tensor) -> Tensor:
        """Return U_h^T y U_w."""
        return _sandwich(self._u_rows.mT, y, self._u_columns) * self._is_measured(y)

    def _is_measured(self, like: Tensor) -> Tensor:
        return (self._values(like) > 0).to(like.dtype)


def _decompose(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (n, m), s (m,) and V (m, m) of a matrix (n, m), U and s filled up with zeros, in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=True)
    missing = vh.shape[0] - len(s)
    return (
        torch.nn.functional.pad(u[:, : len(s)], (0, missing)),
        torch.nn.functional.pad(s, (0, missing)),
        vh.mT,
    )


def _sandwich(left: Tensor, x: Tensor, right: Tensor) -> Tensor:
    return left.to(x.device, x.dtype) @ x @ right.to(x.device, x.dtype)


class BoxDownsample(Separable):
    """The means of squares of pixels.

    Args:
        shape: (C, H, W) of the images.
        factor: side of a square; H and W are multiples of it.

    Raises:
        ValueError: if they are not.

    Example:
        >>> round(BoxDownsample((1, 2, 2), 2)(torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])).item(), 4)
        3.0
    """

    def __init__(self, shape: Shape, factor: int) -> None:
        factor = _check_factor(shape, factor)
        rows, columns = (torch.eye(size // factor).repeat_interleave(factor, 1) / factor for size in shape[1:])
        super().__init__(shape, rows, columns)


class BicubicDownsample(Separable):
    """Antialiased bicubic interpolation to a smaller size, as PIL's.

    Args:
        shape: (C, H, W) of the images.
        factor: H and W are multiples of it.

    Raises:
        ValueError: if they are not.

    Example:
        >>> BicubicDownsample((3, 64, 64), 4).measurement_shape
        (3, 16, 16)
    """

    def __init__(self, shape: Shape, factor: int) -> None:
        factor = _check_factor(shape, factor)
        super().__init__(shape, *(_bicubic_matrix(size, size // factor) for size in shape[1:]))


def _check_factor(shape: Shape, factor: int) -> int:
    factor = integer("factor", factor, 1)
    if len(shape) != 3:
        raise ValueError(f"shape must be (C, H, W) of images, got {tuple(shape)}")
    if any(size % factor for size in shape[1:]):
        raise ValueError(f"factor must divide the height and the width of {tuple(shape)}, got {factor}")
    return factor


def _bicubic_matrix(size: int, target: int) -> Tensor:
    """Return the matrix (target, size) of antialiased bicubic interpolation along one axis."""
    identity = torch.eye(size, dtype=torch.float64)[None, None]
    return torch.nn.functional.interpolate(identity, (target, size), mode="bicubic", antialias=True)[0, 0]


class GaussianBlur(Separable):
    """A Gaussian blur; images are mirrored at their borders.

    Args:
        shape: (C, H, W) of the images.
        std: standard deviation in pixels, above 0.

    Example:
        >>> round(GaussianBlur((1, 8, 8), 1.0)(torch.ones(1, 1, 8, 8)).mean().item(), 4)
        1.0
    """

    def __init__(self, shape: Shape, std: float) -> None:
        std = real("std", std, above=0, below=1e3)
        super().__init__(shape, *(_blur_matrix(size, std) for size in shape[1:]))


def _blur_matrix(size: int, std: float) -> Tensor:
    """Return the matrix (size, size) of a Gaussian blur along one axis."""
    radius = min(math.ceil(4 * std), 8 * size)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.softmax(-offsets.double().square() / (2 * std**2), 0)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for offset, weight in zip(offsets, weights, strict=True):
        # Mirrored with the border pixel repeated: ... 1 0 | 0 1 2 ... has the period 2 size.
        position = (torch.arange(size) + offset) % (2 * size)
        source = torch.minimum(position, 2 * size - 1 - position)
        matrix[torch.arange(size), source] += weight
    return matrix


class Blur(LinearOperator):
    """A convolution with any kernel; images are continued periodically.

    Args:
        shape: (C, H, W) of the images.
        kernel: (h, w), at most as large as the images; its middle, at (h // 2, w // 2), lies on the pixel.

    Raises:
        ValueError: for a kernel of another shape, or one that is zero or not finite.

    Example:
        >>> operator = Blur((1, 4, 4), torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
        >>> operator(torch.arange(16.0).view(1, 1, 4, 4))[0, 0, 0].round().tolist()
        [1.0, 2.0, 3.0, 0.0]
    """

    def __init__(self, shape: Shape, kernel: Tensor) -> None:
        super().__init__(shape)
        _, H, W = self.shape
        if kernel.ndim != 2 or kernel.shape[0] > H or kernel.shape[1] > W:
            raise ValueError(f"kernel must be (h, w), at most {(H, W)}, got {tuple(kernel.shape)}")
        if not bool(torch.isfinite(kernel).all()) or not bool(kernel.any()):
            raise ValueError("kernel must be finite, and not zero everywhere")
        h, w = kernel.shape
        padded = torch.zeros(H, W, dtype=torch.float64)
        padded[:h, :w] = kernel.double()
        # y(p) is the sum of kernel(q) x(p + q - middle), a correlation, as that of convolutional layers.
        transfer = torch.fft.rfft2(padded.roll((-(h // 2), -(w // 2)), (0, 1))).conj()
        self.measurement_shape = self.shape
        values = _without_small(transfer.abs())
        self.singular_values = values.float()
        self._phase = torch.where(values > 0, transfer / transfer.abs().clamp(min=1e-300), 0)

    def to_coefficients(self, x: Tensor) -> Tensor:
        """Return the Fourier coefficients of x."""
        return torch.fft.rfft2(x, norm="ortho")

    def from_coefficients(self, coefficients: Tensor) -> Tensor:
        """Return the images of Fourier coefficients."""
        return torch.fft.irfft2(coefficients, s=self.shape[1:], norm="ortho")

    def measure(self, coefficients: Tensor) -> Tensor:
        """Return the images of the coefficients, turned by the phases of the kernel."""
        return self.from_coefficients(self._phase.to(coefficients.device, coefficients.dtype) * coefficients)

    def unmeasure(self, y: Tensor) -> Tensor:
        """Return the coefficients of y, turned back."""
        coefficients = self.to_coefficients(y)
        return self._phase.to(y.device, coefficients.dtype).conj() * coefficients


class Grayscale(LinearOperator):
    """The luma of color images.

    Args:
        shape: (3, H, W) of the images.

    Raises:
        ValueError: for images without three channels.

    Example:
        >>> Grayscale((3, 8, 8))(torch.ones(1, 3, 8, 8)).shape
        torch.Size([1, 1, 8, 8])
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        C, H, W = self.shape
        if C != 3:
            raise ValueError(f"a gray measurement requires color images, of shape (3, H, W), got {self.shape}")
        _, s, vh = torch.linalg.svd(torch.tensor([LUMA], dtype=torch.float64), full_matrices=True)
        # The sign of a singular vector is free.
        self._basis = vh * vh[0].sum().sign()
        self.measurement_shape = 1, H, W
        self.singular_values = torch.cat([s, torch.zeros(2)]).float().view(3, 1, 1)

    def to_coefficients(self, x: Tensor) -> Tensor:
        """Return x in the basis of luma and two colors."""
        return torch.einsum("kc,nchw->nkhw", self._basis.to(x.device, x.dtype), x)

    def from_coefficients(self, coefficients: Tensor) -> Tensor:
        """Return the images of coefficients."""
        return torch.einsum("kc,nkhw->nchw", self._basis.to(coefficients.device, coefficients.dtype), coefficients)

    def measure(self, coefficients: Tensor) -> Tensor:
        """Return the first channel."""
        return coefficients[:, :1]

    def unmeasure(self, y: Tensor) -> Tensor:
        """Return y as the first of three channels."""
        return torch.nn.functional.pad(y, (0, 0, 0, 0, 0, 2))


class Matrix(LinearOperator):
    """Any matrix, of images as vectors.

    Args:
        shape: (C, H, W) of the images.
        matrix: A, (M, C H W), of at most `MAX_MATRIX_ENTRIES` entries.

    Raises:
        ValueError: for another shape, a larger matrix, or one that is zero or not finite.

    Example:
        >>> Matrix((1, 2, 2), torch.ones(1, 4))(torch.ones(1, 1, 2, 2)).tolist()
        [[4.0]]
    """

    def __init__(self, shape: Shape, matrix: Tensor) -> None:
        super().__init__(shape)
        size = math.prod(self.shape)
        if matrix.ndim != 2 or matrix.shape[1] != size:
            raise ValueError(f"matrix: expected shape (M, {size}), got {tuple(matrix.shape)}")
        if max(len(matrix), size) * size > MAX_MATRIX_ENTRIES:
            raise ValueError(f"matrix must have at most {MAX_MATRIX_ENTRIES:,} entries, got {tuple(matrix.shape)}")
        if not bool(torch.isfinite(matrix).all()) or not bool(matrix.any()):
            raise ValueError("matrix must be finite, and not zero everywhere")
        self._u, s, self._v = _decompose(matrix)
        self.measurement_shape = (len(matrix),)
        self.singular_values = _without_small(s).float()

    def to_coefficients(self, x: Tensor) -> Tensor:
        """Return V^T x, (N, C H W)."""
        return x.flatten(1) @ self._v.to(x.device, x.dtype)

    def from_coefficients(self, coefficients: Tensor) -> Tensor:
        """Return V c."""
        x = coefficients @ self._v.mT.to(coefficients.device, coefficients.dtype)
        return x.view(-1, *self.shape)

    def measure(self, coefficients: Tensor) -> Tensor:
        """Return U c, (N, M)."""
        measured = coefficients * (self._values(coefficients) > 0)
        return measured @ self._u.mT.to(coefficients.device, coefficients.dtype)

    def unmeasure(self, y: Tensor) -> Tensor:
        """Return U^T y."""
        return y @ self._u.to(y.device, y.dtype) * (self._values(y) > 0)
