"""Warnings about images that can be read, but are hardly what was meant: almost black, or in color for a gray model."""

from __future__ import annotations

import logging

import numpy as np
from PIL import Image

from ddim.data.base import Source
from ddim.io.images import fit_image

logger = logging.getLogger(__name__)

INSPECTED_IMAGES = 16
INSPECTED_SIDE = 256
"""Pixels per side of an image that are looked at, at most."""
MIN_RANGE = 0.1 * 255
"""Sets whose values span less than this are probably scaled wrongly."""
GRAY_SPREAD = 24
"""Difference of the channels up to which a pixel counts as gray; lossy formats tint gray pixels."""


def inspect_images(source: Source, channels: int) -> None:
    """Log a warning if a sample of a collection spans hardly any values, or is in color where the model is gray.

    Args:
        source: the collection.
        channels: 1 for a gray model, 3 for color.

    Example:
        >>> pixel = Image.new("RGB", (1, 1), "red")
        >>> inspect_images(Source("red", 3, lambda indices: [lambda: pixel for _ in indices], ""), channels=3)
    """
    indices = np.linspace(0, source.count - 1, min(source.count, INSPECTED_IMAGES)).round().astype(int).tolist()
    low, high, count, in_color = 255, 0, 0, 0
    for decode in source.fetch(indices):
        try:
            image = decode()
            size = min(image.width, INSPECTED_SIDE), min(image.height, INSPECTED_SIDE)
            # Nearest neighbors, because averages would narrow the range.
            small = image if size == image.size else image.resize(size, Image.Resampling.NEAREST)
            pixels = np.asarray(fit_image(small, size[1], size[0], 3))
        except Exception:  # whoever reads the images reports those that cannot be read
            continue
        count += 1
        low, high = min(low, int(pixels.min())), max(high, int(pixels.max()))
        in_color += int((pixels.max(2) - pixels.min(2)).max() > GRAY_SPREAD)
    sample = f"{source.name}: of {count} images looked at, "
    if count and high - low < MIN_RANGE:
        logger.warning("%sall values are from %d to %d in 0 to 255; check how they are scaled", sample, low, high)
    if channels == 1 and in_color:
        logger.warning("%s%d are in color and become gray; a color model has in_channels=3", sample, in_color)
