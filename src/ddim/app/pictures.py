"""Images of a model on the page: as they are shown, and the values that the model takes and gives.

For 8-bit images of up to four channels both are the same; others are shown in false color (`ddim.io.false_color`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ddim.io.false_color import preview, shows_values
from ddim.io.images import as_array, fit_array, fit_image, to_values
from ddim.pipeline import DDIMPipeline


@dataclass(frozen=True, eq=False)  # Gradio hashes the values of a session, and arrays have no hash.
class Picture:
    """An image of a model's size.

    Attributes:
        shown: the image, in 8 bits.
        values: what the model takes: the same image, or an array (H, W, C).
    """

    shown: Image.Image
    values: Any


def pictures_of(pipe: DDIMPipeline, images: Any) -> list[Picture]:
    """Return results of a model as pictures.

    Args:
        pipe: the model.
        images: (N, H, W, C), as it returns them for the output type `np`.
    """
    pixel_format = pipe.pixel_format
    values = to_values(images, pixel_format)
    shown = preview(values, pixel_format)
    if shows_values(values.shape[3], pixel_format):
        return [Picture(image, image) for image in shown]
    return [Picture(image, array) for image, array in zip(shown, values, strict=True)]


def show_output(pipe: DDIMPipeline, images: Any) -> list[Image.Image]:
    """Return results of a model as they are shown.

    Args:
        pipe: the model.
        images: (N, H, W, C), as it returns them for the output type `np`.
    """
    return [picture.shown for picture in pictures_of(pipe, images)]


def fit(base: DDIMPipeline, image: Image.Image, factor: int = 1) -> Picture:
    """Fit an image to the model's size, or a part of it, and to its mode.

    Args:
        base: the model.
        image: of any size; of any mode where the model has 8 bits, else of the mode of its values.
        factor: by which the model's size is divided.

    Returns:
        The image, cropped, scaled and converted.

    Raises:
        ValueError: if the model takes no such image.
    """
    channels, height, width = base.sample_shape
    height, width = height // factor, width // factor
    if shows_values(channels, base.pixel_format):
        fitted = fit_image(image, height, width, channels)
        return Picture(fitted, fitted)
    dtype, name = base.pixel_format.dtype, getattr(image, "filename", "") or "the image"
    pixels: Any = np.atleast_3d(np.asarray(image)) if dtype == "uint8" else as_array(image, dtype, name)
    values = fit_array(pixels, height, width, channels, name=name)
    return Picture(preview([values], base.pixel_format)[0], values)


def describe_images(pipe: DDIMPipeline) -> str:
    """Return what a model's images are, as the page's title says it.

    Args:
        pipe: the model.

    Example:
        >>> describe_images(DDIMPipeline.from_pretrained("mnist"))
        'gray, 28 x 28 pixels'
    """
    channels, height, width = pipe.sample_shape
    kinds = {1: "gray", 2: "gray with alpha", 3: "color", 4: "color with alpha"}
    if shows_values(channels, pipe.pixel_format):
        kind = kinds[channels]
    elif channels == 1:
        kind = f"gray, {pipe.pixel_format.dtype} shown in 8 bits"
    else:
        kind = f"{pipe.pixel_format.describe(channels)} in false color"
    return f"{kind}, {width} x {height} pixels"
