"""The Fréchet distance between two sets of images,

    d^2 = || mu_1 - mu_2 ||^2 + tr(Sigma_1 + Sigma_2 - 2 (Sigma_1 Sigma_2)^(1/2))

of the Gaussians with the means and covariances of their features (arXiv 1706.08500); with InceptionV3's features, FID.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def frechet_distance(first: Iterable[Tensor], second: Iterable[Tensor], features: nn.Module) -> float:
    """d^2 between two sets of images.

    Args:
        first: batches of images, uint8 (n, C, H, W), as `features` takes them; two images or more in all.
        second: the same of the other set.
        features: images to vectors (n, D), with an attribute `num_features`, D.
    """
    # A second or two to import.
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=features)
    for batches, real in ((first, True), (second, False)):
        for images in batches:
            metric.update(images, real=real)
    return float(metric.compute())
