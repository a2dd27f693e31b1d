"""Features: networks, or simpler functions, from images to vectors, on whose distribution sets are compared."""

from __future__ import annotations

from torch import Tensor, nn


class Pixels(nn.Module):
    """The pixels themselves, in [0, 1]: no network, no download. Distances tell means and covariances of pixels apart,
    and not what a picture shows.

    Args:
        shape: (C, H, W) of the images.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = shape
        self.num_features = channels * height * width

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) to float64 (N, C H W)."""
        return images.flatten(1).double() / 255
