"""Images of any number of channels and type of values as 8-bit images that can be looked at.

One channel becomes gray, three become RGB, and others become false color: channel c of C gets a color of hue c / C, and
a pixel is the sum of the colors, weighted by the values. Weights are normalized such that a pixel with the same value
in all channels is gray of that value. Channels are scaled by the ranges of the format. 8-bit images of up to four
channels are shown as they are.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ddim.io.images import as_pil
from ddim.io.pixel_format import PixelFormat


def false_colors(channels: int) -> np.ndarray:
    """Return the color of each channel.

    Args:
        channels: C.

    Returns:
        float64 (C, 3), each column of sum 1.

    Example:
        >>> false_colors(3).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    if channels == 2:
        # Two hues that share no primary color, and together have all: red and cyan.
        return np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    colors = np.array([colorsys.hsv_to_rgb(index / channels, 1.0, 1.0) for index in range(channels)])
    if channels == 1:
        colors = np.ones((1, 3))
    return colors / colors.sum(0)


def preview(images: Sequence[np.ndarray] | np.ndarray, pixel_format: PixelFormat) -> list[Image.Image]:
    """Return images as they are shown.

    Args:
        images: N arrays (H, W, C) of the format's type, in its units.
        pixel_format: their type and ranges.

    Returns:
        N images of modes `L`, `LA`, `RGB` or `RGBA`.

    Example:
        >>> preview(np.zeros((2, 4, 6, 5), np.uint16), PixelFormat("uint16", (0,), (9,)))[0].mode
        'RGB'
    """
    return [_show(np.asarray(image), pixel_format) for image in images]


def shows_values(channels: int, pixel_format: PixelFormat) -> bool:
    """Return whether images are shown as they are, without rounding and false color.

    Args:
        channels: of each image.
        pixel_format: their type.

    Example:
        >>> from ddim.io.pixel_format import EIGHT_BIT
        >>> shows_values(4, EIGHT_BIT), shows_values(5, EIGHT_BIT)
        (True, False)
    """
    return pixel_format.is_eight_bit and channels <= 4


def _show(image: np.ndarray, pixel_format: PixelFormat) -> Image.Image:
    channels = image.shape[2]
    if shows_values(channels, pixel_format):
        return as_pil(image)
    values = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].double()
    unit = pixel_format.to_unit(values)[0].permute(1, 2, 0).numpy()
    shown = unit if channels in (1, 3) else (unit @ false_colors(channels)).clip(0, 1)
    return as_pil((shown * 255).round().astype(np.uint8))
