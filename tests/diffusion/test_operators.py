"""Linear operators: dot products, pseudo-inverses of the dense matrices, and PIL, SciPy and PyTorch doing the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ddim.diffusion.operators import (
    MIN_SINGULAR_VALUE,
    BicubicDownsample,
    Blur,
    BoxDownsample,
    GaussianBlur,
    Grayscale,
    LinearOperator,
    Mask,
    Matrix,
    Separable,
)
from helpers import randn, seeded

SHAPE = (3, 8, 6)
SIZE = 3 * 8 * 6

OPERATORS: dict[str, Callable[[], LinearOperator]] = {
    "mask": lambda: Mask(SHAPE, torch.rand(8, 6, generator=seeded(0)) > 0.4),
    "mask per channel": lambda: Mask(SHAPE, torch.rand(SHAPE, generator=seeded(0)) > 0.4),
    "box": lambda: BoxDownsample(SHAPE, 2),
    "bicubic": lambda: BicubicDownsample(SHAPE, 2),
    "gaussian": lambda: GaussianBlur(SHAPE, 0.8),
    "wide gaussian": lambda: GaussianBlur(SHAPE, 5.0),
    "blur": lambda: Blur(SHAPE, torch.rand(3, 5, generator=seeded(0))),
    "even kernel": lambda: Blur(SHAPE, torch.rand(4, 2, generator=seeded(0))),
    "box blur": lambda: Blur(SHAPE, torch.ones(2, 3) / 6),
    "gray": lambda: Grayscale(SHAPE),
    "wide matrix": lambda: Matrix(SHAPE, randn(20, SIZE)),
    "tall matrix": lambda: Matrix(SHAPE, randn(SIZE + 5, SIZE)),
    "separable": lambda: Separable(SHAPE, randn(3, 8), randn(7, 6)),
}


def dense(operator: LinearOperator) -> Tensor:
    """Return the matrix of an operator, float64."""
    images = torch.eye(SIZE, dtype=torch.float64).view(SIZE, *SHAPE)
    return operator(images).flatten(1).T


@pytest.fixture(params=OPERATORS)
def operator(request: pytest.FixtureRequest) -> LinearOperator:
    return OPERATORS[request.param]()


def test_transpose_passes_the_dot_product_test(operator: LinearOperator) -> None:
    x = randn(2, *SHAPE).double()
    y = randn(2, *operator.measurement_shape, seed=1).double()
    assert float((operator(x) * y).sum()) == pytest.approx(float((x * operator.transpose(y)).sum()), rel=1e-6)


def test_pseudo_inverse_is_that_of_the_matrix(operator: LinearOperator) -> None:
    y = randn(2, *operator.measurement_shape, seed=1).double()
    expected = y.flatten(1) @ torch.linalg.pinv(dense(operator), rtol=MIN_SINGULAR_VALUE).T
    torch.testing.assert_close(operator.pseudo_inverse(y).flatten(1), expected, rtol=1e-4, atol=1e-5)


def test_measurements_of_the_pseudo_inverse_are_those_measured(operator: LinearOperator) -> None:
    y = operator(randn(2, *SHAPE).double())
    torch.testing.assert_close(operator(operator.pseudo_inverse(y)), y, rtol=1e-6, atol=1e-6)


def test_singular_values_are_those_of_the_matrix(operator: LinearOperator) -> None:
    expected = torch.linalg.svdvals(dense(operator))
    expected = expected[expected > MIN_SINGULAR_VALUE * expected[0]]
    # A complex coefficient of `Blur` stands for two values, save at the frequencies that are their own mirror images.
    if not isinstance(operator, Blur):
        shape = operator.to_coefficients(torch.zeros(1, *SHAPE)).shape[1:]
        values = operator.singular_values.expand(shape).flatten().sort(descending=True).values
        torch.testing.assert_close(values[values > 0].double(), expected, rtol=1e-5, atol=1e-6)
    else:
        assert float(operator.singular_values.max()) == pytest.approx(float(expected[0]), rel=1e-5)


def test_coefficients_are_an_isometry(operator: LinearOperator) -> None:
    x = randn(2, *SHAPE).double()
    torch.testing.assert_close(operator.from_coefficients(operator.to_coefficients(x)), x, rtol=1e-6, atol=1e-6)


def test_float32_stays_float32(operator: LinearOperator) -> None:
    x = randn(2, *SHAPE)
    y = operator(x)
    assert y.dtype == operator.pseudo_inverse(y).dtype == operator.transpose(y).dtype == torch.float32
    torch.testing.assert_close(y.double(), operator(x.double()), rtol=1e-4, atol=1e-4)


def test_bicubic_is_that_of_pil() -> None:
    pixels = np.random.default_rng(0).random((8, 12), np.float32)
    expected = np.asarray(Image.fromarray(pixels).resize((3, 2), Image.Resampling.BICUBIC))
    result = BicubicDownsample((1, 8, 12), 4)(torch.from_numpy(pixels)[None, None])[0, 0]
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)


def test_box_is_that_of_pil() -> None:
    pixels = np.random.default_rng(0).random((8, 12), np.float32)
    expected = np.asarray(Image.fromarray(pixels).resize((6, 4), Image.Resampling.BOX))
    result = BoxDownsample((1, 8, 12), 2)(torch.from_numpy(pixels)[None, None])[0, 0]
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("std", [0.4, 1.0, 3.0])
def test_gaussian_blur_is_that_of_scipy(std: float) -> None:
    pixels = np.random.default_rng(0).random((9, 7))
    expected = gaussian_filter(pixels, std, mode="reflect", truncate=4)
    result = GaussianBlur((1, 9, 7), std)(torch.from_numpy(pixels)[None, None])[0, 0]
    np.testing.assert_allclose(result.numpy(), expected, atol=2e-4)


def test_blur_is_a_convolutional_layer() -> None:
    kernel, x = torch.rand(3, 5, generator=seeded(0)), randn(2, 1, 8, 6)
    padded = torch.nn.functional.pad(x, (2, 2, 1, 1), mode="circular")
    expected = torch.nn.functional.conv2d(padded, kernel[None, None])
    torch.testing.assert_close(Blur((1, 8, 6), kernel)(x), expected, rtol=1e-5, atol=1e-5)


def test_gray_is_that_of_pil() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
    expected = np.asarray(Image.fromarray(pixels).convert("L")).astype(float)
    result = Grayscale(SHAPE)(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())[0, 0]
    np.testing.assert_allclose(result.numpy(), expected, atol=0.51)


def test_masks_may_differ_by_image() -> None:
    masks = torch.rand(2, 8, 6, generator=seeded(0)) > 0.5
    x = randn(2, *SHAPE)
    assert torch.equal(Mask(SHAPE, masks[:, None].expand(2, *SHAPE))(x), x * masks[:, None])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask(SHAPE, torch.ones(8, 6)), "mask must be boolean, true where pixels are known, got torch.float32"),
        (lambda: Mask(SHAPE, torch.ones(6, 8).bool()), r"mask: expected shape \(8, 6\), that of the images, got"),
        (lambda: BoxDownsample(SHAPE, 3), "factor must divide the height and the width of .*, got 3"),
        (lambda: BoxDownsample(SHAPE, 0), "factor must be an integer of at least 1, got 0"),
        (lambda: BoxDownsample((8, 6), 2), r"shape must be \(C, H, W\) of images, got \(8, 6\)"),
        (lambda: GaussianBlur(SHAPE, 0.0), "std must be a number above 0"),
        (lambda: Blur(SHAPE, torch.ones(9, 2)), r"kernel must be \(h, w\), at most \(8, 6\), got \(9, 2\)"),
        (lambda: Blur(SHAPE, torch.zeros(3, 3)), "kernel must be finite, and not zero everywhere"),
        (
            lambda: Grayscale((1, 8, 6)),
            r"requires color images, of shape \(3, H, W\), got \(1, 8, 6\)",
        ),
        (lambda: Matrix(SHAPE, torch.ones(2, 5)), r"matrix: expected shape \(M, 144\), got \(2, 5\)"),
        (lambda: Matrix(SHAPE, torch.full((2, SIZE), torch.nan)), "matrix must be finite, and not zero everywhere"),
        (lambda: Matrix((3, 64, 64), torch.ones(1, 3 * 64 * 64)), "matrix must have at most 67,108,864 entries"),
        (lambda: Separable(SHAPE, torch.ones(2, 5), torch.ones(2, 6)), r"rows: expected shape \(n, 8\), got \(2, 5\)"),
    ],
)
def test_invalid_operators_raise(make: Callable[[], LinearOperator], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
