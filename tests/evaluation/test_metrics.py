"""Metrics against closed forms and scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from ddim.evaluation.features import Pixels
from ddim.evaluation.image_sets import open_files
from ddim.evaluation.metrics import frechet, manifold_coverage, measure, sample_size_warning
from helpers import randn


def frechet_by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Fréchet distance by its definition, in float64."""
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * np.real(root)))


class TestFrechet:
    @pytest.mark.parametrize(("N", "M", "D", "scale"), [(400, 300, 8, 1.0), (1000, 1000, 64, 3.0), (90, 200, 30, 0.1)])
    def test_matches_scipy(self, N: int, M: int, D: int, scale: float) -> None:
        a, b = randn(N, D) @ randn(D, D, seed=2), scale * randn(M, D, seed=1) + 0.5
        assert frechet(a, b) == pytest.approx(frechet_by_scipy(a.double().numpy(), b.double().numpy()), rel=1e-3)

    def test_halves_of_real_images_and_noise(self) -> None:
        """Two halves of real digits are close, noise is far away; both distances are those of scipy."""
        digits = open_files("digits")
        pixels = torch.cat(list(digits.batches()))
        features = Pixels(digits.shape)
        first, second = features(pixels[::2]), features(pixels[1::2])
        noise = features(torch.randint(256, pixels[::2].shape, dtype=torch.uint8))
        near, far = frechet(first, second), frechet(first, noise)
        assert near == pytest.approx(frechet_by_scipy(first.numpy(), second.numpy()), rel=1e-3)
        assert far == pytest.approx(frechet_by_scipy(first.numpy(), noise.numpy()), rel=1e-3)
        assert near < far / 100

    def test_warns_of_small_sets(self) -> None:
        assert sample_size_warning(Pixels((1, 4, 4)), 17, 100) is None
        message = sample_size_warning(Pixels((1, 4, 4)), 16, 100)
        assert message is not None
        assert "16 images are too few for a Fréchet distance of 16 features" in message


class TestOtherMetrics:
    def test_kernel_distance(self) -> None:
        """Compared with the unbiased estimate written out, on one subset with all images."""
        x, y = randn(60, 5), randn(60, 5, seed=1) + 0.5
        values = measure(x, y, ["kid"])

        def kernel(a: Tensor, b: Tensor) -> Tensor:
            return (a.double() @ b.double().T / 5 + 1) ** 3

        xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
        n = 60
        expected = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1)) - 2 * xy.mean()
        assert values["kid"] == pytest.approx(float(expected), rel=1e-3)
        assert values["kid_std"] < 1e-6

    def test_inception_score(self) -> None:
        """Ten certain, equally frequent classes give nearly ten; a single class gives one."""
        certain = torch.eye(10).repeat(200, 1) * 50
        assert measure(randn(2000, 3), None, ["is"], certain)["is"] == pytest.approx(10, rel=0.05)
        assert measure(randn(2000, 3), None, ["is"], certain[:1].repeat(2000, 1))["is"] == pytest.approx(1)

    def test_precision_and_recall(self) -> None:
        """Samples of one of two clusters are all realistic, and cover half of the real images."""
        real = torch.cat([randn(300, 4), randn(300, 4, seed=1) + 100])
        values = measure(randn(300, 4, seed=2), real, ["precision", "recall"])
        assert values["precision"] > 0.9
        assert values["recall"] == pytest.approx(0.5, abs=0.06)
        assert manifold_coverage(randn(50, 4) + 1e4, real) == 0
        assert manifold_coverage(real, real) == 1

    def test_coverage_by_hand(self) -> None:
        manifold = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        # The third nearest neighbors are at distances 3, 2, 2 and 3.
        assert manifold_coverage(torch.tensor([[-3.0], [-3.1], [6.0], [6.1], [1.5]]), manifold) == pytest.approx(3 / 5)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((randn(9, 3), None, ["fid"]), "reference"),
            ((randn(9, 3), randn(9, 3), ["fd"]), "metrics must be one of fid, kid, .*, got 'fd'"),
            ((randn(3, 3), randn(9, 3), ["fid"]), "at least 4 images, got 3"),
            ((randn(9, 3), None, ["is"]), "requires features with logits"),
        ],
    )
    def test_invalid_input_raises(self, arguments: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            measure(*arguments)
