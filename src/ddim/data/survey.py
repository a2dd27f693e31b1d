"""What a collection of images is like: how many, of which sizes and channels, with which labels.

A sample of the images, evenly spaced over the collection, is decoded for it; the others are only counted.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ddim.data.base import Decoded, Source
from ddim.data.inspection import GRAY_SPREAD, INSPECTED_SIDE
from ddim.io.images import fit_image
from ddim.validation import pluralize

SURVEYED_IMAGES = 128
SURVEY_SECONDS = 3.0
"""No further images are decoded after this time: large photographs take a tenth of a second each."""


@dataclass(frozen=True)
class ImageSurvey:
    """What a sample of a collection showed.

    Attributes:
        name: how messages refer to the collection.
        count: number of images in it, readable or not.
        sizes: (H, W) in pixels of each image of the sample.
        modes: pixel formats in the sample, each with its number of images, the commonest first: Pillow's names, or the
            type and number of channels of arrays.
        channels: channels of a model of all of them: those of arrays; otherwise 1 if every image is gray, else 3.
        labels: what says which class an image belongs to, such as `10 folders`; `None` for nothing.

    Example:
        >>> ImageSurvey("pics", 500, [(32, 32)], [("RGB", 1)], 3, None).channels
        3
    """

    name: str
    count: int
    sizes: list[tuple[int, int]]
    modes: list[tuple[str, int]]
    channels: int
    labels: str | None


def survey_images(source: Source) -> ImageSurvey:
    """Decode a sample of a collection, and describe the collection.

    Args:
        source: the collection.

    Returns:
        What the sample showed; images that cannot be read are left out of it.

    Raises:
        ValueError: if no image of the sample can be read.

    Example:
        >>> pixel = Image.new("RGB", (2, 1), "red")
        >>> survey_images(Source("red", 3, lambda indices: [lambda: pixel for _ in indices], ""))
        ImageSurvey(name='red', count=3, sizes=[(1, 2), (1, 2), (1, 2)], modes=[('RGB', 3)], channels=3, labels=None)
    """
    deadline = time.monotonic() + SURVEY_SECONDS
    indices = np.linspace(0, source.count - 1, min(source.count, SURVEYED_IMAGES)).round().astype(int)

    def look(decode: Callable[[], Decoded]) -> tuple[tuple[int, int], str, int] | Exception | None:
        if time.monotonic() > deadline:
            return None
        try:
            image = decode()
            if isinstance(image, np.ndarray):
                height, width, channels = image.shape if image.ndim == 3 else (*image.shape, 1)
                return (height, width), f"{image.dtype} of {pluralize(channels, 'channel')}", channels
            return (image.height, image.width), image.mode, 3 if _is_in_color(image) else 1
        except Exception as error:  # whoever reads the images reports those that cannot be read
            return error

    # In a random order, so that the images that are reached in time are from the whole collection.
    order = np.random.default_rng(0).permutation(indices).tolist()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looks = list(pool.map(look, source.fetch(order)))
    seen = [each for each in looks if isinstance(each, tuple)]
    if not seen:
        reasons = [str(each) for each in looks if isinstance(each, Exception)]
        raise ValueError(f"no image of {source.name} can be read; the first: {(reasons or ['it takes too long'])[0]}")
    sizes, modes, channels = zip(*seen, strict=True)
    return ImageSurvey(
        source.name, source.count, list(sizes), Counter(modes).most_common(), max(channels), source.labels
    )


def _is_in_color(image: Image.Image) -> bool:
    """Return whether the channels of some pixel differ by more than lossy formats tint gray ones."""
    if len(image.getbands()) == 1 and image.mode != "P":
        return False
    size = min(image.width, INSPECTED_SIDE), min(image.height, INSPECTED_SIDE)
    # Nearest neighbors, because averages would lose small colored parts.
    small = image if size == image.size else image.resize(size, Image.Resampling.NEAREST)
    pixels = np.asarray(fit_image(small, size[1], size[0], 3)).astype(int)
    return bool((pixels.max(2) - pixels.min(2)).max() > GRAY_SPREAD)
