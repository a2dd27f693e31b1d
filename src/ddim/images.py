"""Tensors <-> PIL / NumPy, grids, files. A picture inside the model is a float tensor (N, C, H, W) in [-1, 1]; outside, bytes or floats in [0, 1]."""

from __future__ import annotations

from PIL import Image


def fit_image(image: Image.Image, height: int, width: int, channels: int) -> Image.Image:
    """Crop the largest centred part of the right shape, resize it (Lanczos), and convert it to grey or colour.

    An image that already fits is only converted. Transparency is laid on white.
    """
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size == (width, height):
        return image
    scale = max(width / image.width, height / image.height)
    crop_width, crop_height = width / scale, height / scale
    left, top = (image.width - crop_width) / 2, (image.height - crop_height) / 2
    return image.resize(
        (width, height), Image.Resampling.LANCZOS, box=(left, top, left + crop_width, top + crop_height)
    )
