"""What a look at a few images of a collection shows: the type of their values, and that they are hardly what was meant.

Warnings are logged of sets that are almost black, or in color for a gray model.
"""

from __future__ import annotations

import logging

import numpy as np
from PIL import Image

from ddim.data.base import Decoded, Source
from ddim.io.images import fit_image
from ddim.io.pixel_format import stored_dtype

logger = logging.getLogger(__name__)

INSPECTED_IMAGES = 16
INSPECTED_SIDE = 256
"""Pixels per side of an image that are looked at, at most."""
MIN_RANGE = 0.1 * 255
"""Sets whose values span less than this are probably scaled wrongly."""
GRAY_SPREAD = 24
"""Difference of the channels up to which a pixel counts as gray; lossy formats tint gray pixels."""


def find_dtype(source: Source, channels: int) -> str:
    """Return the type of a collection's values, by a look at a few images.

    Args:
        source: the collection.
        channels: of the model.

    Returns:
        That of all images looked at, one of `ddim.io.pixel_format.DTYPES`. It is `uint8` for image files of several
        depths, and for gray ones that are to become color: these are scaled to 8 bits.

    Raises:
        ValueError: for arrays of several types, or of a type that is not one of those.

    Example:
        >>> pixel = Image.new("I;16", (1, 1))
        >>> source = Source("dark", 3, lambda indices: [lambda: pixel for _ in indices], "")
        >>> find_dtype(source, channels=1), find_dtype(source, channels=3)
        ('uint16', 'uint8')
    """
    images = [image for image in _look_at(source) if image is not None]
    dtypes = sorted({_dtype_of(image, source.name) for image in images})
    has_arrays = any(isinstance(image, np.ndarray) for image in images)
    if len(dtypes) > 1 and has_arrays:
        raise ValueError(f"{source.name} must hold images of one type of values, got {' and '.join(dtypes)}")
    return dtypes[0] if len(dtypes) == 1 and (has_arrays or channels == 1) else "uint8"


def _dtype_of(image: Decoded, name: str) -> str:
    if isinstance(image, np.ndarray):
        return stored_dtype(image.dtype, name)
    return "float32" if image.mode == "F" else "uint16" if image.mode.startswith("I;16") else "uint8"


def _look_at(source: Source) -> list[Decoded | None]:
    """Decode a few images; `None` stands for those that cannot be read, which whoever reads the images reports."""
    indices = np.linspace(0, source.count - 1, min(source.count, INSPECTED_IMAGES)).round().astype(int).tolist()
    images: list[Decoded | None] = []
    for decode in source.fetch(indices):
        try:
            images.append(decode())
        except Exception:  # decoders raise errors of many kinds
            images.append(None)
    return images


def inspect_images(source: Source, channels: int) -> None:
    """Log a warning if a sample of a collection spans hardly any values, or is in color where the model is gray.

    Args:
        source: the collection.
        channels: 1 or 2 for a gray model, 3 or 4 for color.

    Example:
        >>> pixel = Image.new("RGB", (1, 1), "red")
        >>> inspect_images(Source("red", 3, lambda indices: [lambda: pixel for _ in indices], ""), channels=3)
    """
    low, high, count, in_color = 255, 0, 0, 0
    for image in _look_at(source):
        if not isinstance(image, Image.Image):
            continue
        try:
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
    if channels in (1, 2) and in_color:
        logger.warning("%s%d are in color and become gray; a color model has in_channels=3", sample, in_color)
