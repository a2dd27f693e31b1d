"""Images as tensors, NumPy arrays and PIL images.

Inside the model an image is a float tensor (N, C, H, W) in [-1, 1]; outside it is bytes, or floats in [0, 1]. C is 1
for gray, 2 for gray with alpha, 3 for color, 4 for color with alpha. Images of other types of values, and of more
channels, are arrays in the units of their data (`ddim.io.pixel_format`).
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ddim.io.pixel_format import EIGHT_BIT, NonFiniteError, PixelFormat, cast_exactly
from ddim.io.reading import DAMAGED, reader_reason
from ddim.validation import choice

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "numpy", "pt")
"""The types that samples are returned as: PIL images, NumPy arrays (two names), tensors."""
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are decoded, whatever a file's name; PIL would start other programs for some of the others."""
CONVERTIBLE_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}
"""Modes of 8 bits per channel that PIL converts to gray and color."""
MAX_UINT16 = 65535
STRIP_BYTES = 16 << 20
"""Values that are converted to bytes at a time."""
RANGE_TOLERANCE = 1e-3
"""By how much values may exceed the range of images, which allows for rounding."""
PIL_OPEN_LOCK = threading.Lock()
"""Held while an image is opened with a filter on warnings, because Python's filters are shared by all threads."""


MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""The mode of 8-bit images by their number of channels."""


def to_unit_range(samples: Tensor) -> Tensor:
    """Map samples from [-1, 1] to [0, 1], clipped.

    Args:
        samples: any shape.

    Returns:
        A tensor of the same shape, dtype and device.

    Example:
        >>> to_unit_range(torch.tensor([-1.0, 0.0, 3.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return (samples / 2 + 0.5).clamp(0, 1)


def height_and_width(size: Any) -> tuple[int, int]:
    """Return the height and width that a `sample_size` stands for.

    Args:
        size: an integer, for squares; or a pair (H, W).

    Example:
        >>> height_and_width(28), height_and_width([40, 64])
        ((28, 28), (40, 64))
    """
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def to_output(
    samples: Tensor, output_type: str, pixel_format: PixelFormat = EIGHT_BIT
) -> list[Image.Image] | np.ndarray | Tensor:
    """Convert samples to an output type.

    Args:
        samples: (N, C, H, W) in [-1, 1], on any device.
        output_type: `pil` for a list of N images, `np` or `numpy` for (N, H, W, C) in [0, 1], `pt` for
            (N, C, H, W) in [0, 1] on the same device.
        pixel_format: of the model. Of other images than those of 8 bits, `np` is of the format's type and in the data's
            units, and `pt` in these units without rounding.

    Returns:
        The images.

    Raises:
        ValueError: for another output type, or PIL images where PIL has no mode for them.

    Example:
        >>> to_output(torch.zeros(2, 1, 4, 4), "np").shape
        (2, 4, 4, 1)
    """
    check_output_type(output_type, samples.shape[1], pixel_format)
    unit = to_unit_range(samples)
    if not pixel_format.is_eight_bit:
        if output_type == "pt":
            return pixel_format.scale(unit)
        values = pixel_format.to_array(unit)
        return values if output_type != "pil" else [as_pil(pixels) for pixels in values]
    if output_type == "pt":
        return unit
    dtype = torch.float32 if output_type == "pil" else torch.promote_types(unit.dtype, torch.float32)
    array = unit.permute(0, 2, 3, 1).to("cpu", dtype).numpy()
    return array if output_type != "pil" else [as_pil(pixels) for pixels in to_bytes(array)]


def to_samples(
    images: Any,
    channels: int,
    height: int,
    width: int,
    resize: bool | None = False,
    name: str = "images",
    pixel_format: PixelFormat = EIGHT_BIT,
) -> Tensor:
    """Convert images to samples of a model.

    Args:
        images: a PIL image or a list of them, or of arrays (H, W, C); a NumPy array (N, H, W, C) or (H, W, C), uint8 or
            floats in [0, 1]; or a floating tensor (N, C, H, W) or (C, H, W) in [-1, 1].
        channels: C that the model requires.
        height: H that it requires, in pixels.
        width: W that it requires, in pixels.
        resize: crop, scale and convert listed images of other sizes and modes, as `fit_image` and `fit_array` do;
            otherwise they are refused, and the message recommends it, unless this is `None`.
        name: the argument's name in messages.
        pixel_format: of the model. Where it is not that of 8-bit images, images and arrays hold values of its type, in
            the data's units; values beyond the range are clipped, with a warning.

    Returns:
        float32 (N, C, H, W) in [-1, 1], or float64 for a float64 tensor.

    Raises:
        TypeError: for objects of other types.
        ValueError: for no images, another size, mode or dtype, or values that are non-finite or out of range.

    Example:
        >>> to_samples(np.full((4, 4, 1), 255, np.uint8), 1, 4, 4).unique()
        tensor([1.])
    """
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, list | tuple) and all(isinstance(image, Image.Image | np.ndarray) for image in images):
        fitted = [
            _to_pixels(
                image,
                *(channels, height, width),
                *(resize, getattr(image, "filename", "") or f"{name}[{index}]", pixel_format),
            )
            for index, image in enumerate(images)
        ]
        images = np.stack(fitted) if fitted else np.empty((0, height, width, channels), np.uint8)
    if isinstance(images, np.ndarray):
        samples = _from_array(images[None] if images.ndim == 3 else images, name, pixel_format)
    elif isinstance(images, Tensor):
        samples = _check_range(images[None] if images.ndim == 3 else images, -1, 1, name)
    else:
        raise TypeError(
            f"{name} must be PIL images, a NumPy array (N, H, W, C) or a tensor (N, C, H, W), got "
            f"{type(images).__name__}"
        )
    if samples.ndim != 4 or samples.shape[1:] != (channels, height, width) or not len(samples):
        shape = (channels, height, width) if isinstance(images, Tensor) else (height, width, channels)
        raise ValueError(
            f"{name}: expected shape (N, {', '.join(map(str, shape))}) with N at least 1, got {tuple(images.shape)}"
            + ("; arrays are not resized, PIL images are" if resize else "")
        )
    return samples


def fit_image(image: Image.Image, height: int, width: int, channels: int, crop: bool = True) -> Image.Image:
    """Fit an image to a model: crop its center to the aspect ratio, resize it (Lanczos), convert it to gray or color.

    An image of the right size is only converted. Alpha is kept where the model has a channel for it; else transparent
    pixels are blended with white. Pixels of 16 bits, and floats in [0, 1], are scaled to 8 bits.

    Args:
        image: any mode and size.
        height: height of the result, in pixels.
        width: width of the result, in pixels.
        channels: 1 for gray, 2 for gray with alpha, 3 for color, 4 for color with alpha.
        crop: crop to the aspect ratio; if false, the whole image is stretched.

    Returns:
        An image of mode `L`, `LA`, `RGB` or `RGBA`.

    Raises:
        ValueError: if the image has values of another range, non-finite ones, or a mode that is neither gray nor color;
            or for more channels.

    Example:
        >>> fitted = fit_image(Image.new("RGBA", (30, 20)), 8, 8, 1)
        >>> fitted.mode, fitted.size
        ('L', (8, 8))
    """
    if channels not in MODES:
        name = getattr(image, "filename", "") or "the image"
        raise ValueError(f"{name} must be an array of {channels} channels, got an image of mode {image.mode}")
    image = _to_eight_bits(image)
    if image.has_transparency_data:
        image = _convert(image, "RGBA") if channels in (2, 4) else _blend_with_white(image, MODES[channels])
    elif image.mode not in ("1", "L"):
        # PIL converts some modes, such as CMYK, to no mode with alpha.
        image = _convert(image, "RGB")
    if image.mode == "L" and channels == 3:
        # Color is made of gray at its new size: a large image would take four times the memory before.
        return _resize(image, height, width, crop).convert("RGB")
    return _resize(_convert(image, MODES[channels]), height, width, crop)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Return an image in a mode; itself, where PIL would make a copy."""
    return image if image.mode == mode else image.convert(mode)


def _blend_with_white(image: Image.Image, mode: str) -> Image.Image:
    """Return an image with transparency in the mode `L` or `RGB`, made a few rows at a time: copies take memory."""
    result = Image.new(mode, image.size)
    for top, stored in _strips(image):
        strip = stored.convert("RGBA")
        opaque = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        result.paste(opaque.convert(mode), (0, top))
    return result


def _resize(image: Image.Image, height: int, width: int, crop: bool) -> Image.Image:
    """Crop the center of an image to the aspect ratio, if that is asked for, and resize it."""
    if image.size == (width, height):
        return image
    box = _crop_box(*image.size, height, width)
    if crop and box != (0, 0, *image.size):
        image = image.crop(box)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def fit_array(
    image: np.ndarray, height: int, width: int, channels: int, crop: bool = True, name: str = ""
) -> np.ndarray:
    """Fit an array to a model: crop its center to the aspect ratio, resize each channel (Lanczos).

    An array of the right size is returned as it is. Resizing does not leave the range of a channel's values.

    Args:
        image: (H, W, C).
        height: height of the result, in pixels.
        width: width of the result, in pixels.
        channels: C that the model requires.
        crop: crop to the aspect ratio; if false, the whole image is stretched.
        name: of the image, in messages.

    Returns:
        (height, width, channels) of the same type; integers are rounded.

    Raises:
        ValueError: for another number of channels.

    Example:
        >>> fit_array(np.zeros((20, 30, 5), np.uint16), 8, 8, 5).shape
        (8, 8, 5)
    """
    if image.ndim != 3 or image.shape[2] != channels or not image.size:
        raise ValueError(
            f"{name or 'the image'} must be an array (H, W, {channels}), got one of shape {tuple(image.shape)}"
        )
    if image.shape[:2] == (height, width):
        return image
    if crop:
        left, top, right, bottom = _crop_box(image.shape[1], image.shape[0], height, width)
        image = image[top:bottom, left:right]
    resized = [
        np.asarray(Image.fromarray(page).resize((width, height), Image.Resampling.LANCZOS)).clip(page.min(), page.max())
        for page in np.moveaxis(image, 2, 0).astype(np.float32)
    ]
    result = np.stack(resized, axis=2)
    return (result if np.issubdtype(image.dtype, np.floating) else result.round()).astype(image.dtype)


def as_array(image: Image.Image | np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Return the values of an image that a model of other values than 8 bits takes.

    Args:
        image: a PIL image of one channel (`I;16`, `I`, `F`), or an array (H, W, C).
        dtype: that the model requires.
        name: of the image, in messages.

    Returns:
        (H, W, C) of `dtype`.

    Raises:
        ValueError: for values of another type, or that are not finite.

    Example:
        >>> as_array(Image.new("I;16", (4, 3)), "uint16", "x.png").shape
        (3, 4, 1)
    """
    if isinstance(image, Image.Image) and image.mode not in ("F", "I") and not image.mode.startswith("I;16"):
        raise ValueError(f"{name} must hold {dtype} values, got an image of mode {image.mode}")
    values = np.asarray(image)
    values = values[:, :, None] if values.ndim == 2 else values
    if values.ndim != 3 or not values.size:
        raise ValueError(f"{name} must be an image (H, W, C), got an array of shape {values.shape}")
    return cast_exactly(values, dtype, name)


def _crop_box(width: int, height: int, target_height: int, target_width: int) -> tuple[int, int, int, int]:
    """Return the largest centered box of an aspect ratio: left, top, right, bottom."""
    crop_width = max(1, min(width, round(height * target_width / target_height)))
    crop_height = max(1, min(height, round(width * target_height / target_width)))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def decode_image(source: str | Path | IO[bytes], name: str) -> Image.Image:
    """Decode a still image.

    Args:
        source: a file's path, or a stream of its bytes.
        name: the image's name in messages.

    Returns:
        The image, read completely, in its own mode, upright as its EXIF data says; its `filename` is `name`.

    Raises:
        ValueError: if it cannot be decoded, is animated, or is so large that decoding it would exhaust memory
            (`PIL.Image.MAX_IMAGE_PIXELS`).

    Example:
        >>> import io
        >>> decode_image(io.BytesIO(b"text"), "notes.png")
        Traceback (most recent call last):
        ValueError: notes.png cannot be read: not an image of a known format
    """
    if isinstance(source, str | Path):
        # A stream in any case: by its path PIL maps an uncompressed TIFF into memory, and scrambles one whose
        # orientation swaps height and width.
        try:
            with Path(source).open("rb") as stream:
                return decode_image(stream, name)
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {decoder_reason(error)}") from None
    try:
        opened = open_image(source)
        if opened.format == "PNG":
            # Decoding ends with the last pixel, before the checksum of the data that it is made of.
            opened.verify()
            source.seek(0)
            opened = open_image(source)
        with opened as image:
            # MPO is a camera's JPEG with a preview or depth map behind it, not an animation.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            image.load()
            still = upright(image, name)
            if image.format in ("PPM", "PNG") and still.mode == "I":
                # Their depths above 8 bits are 16 bits, which versions of PIL return as 32-bit integers.
                still = Image.fromarray(np.asarray(still).astype(np.uint16))
        # PIL sets this attribute of images that it opens itself; messages name images by it.
        setattr(still, "filename", name)  # noqa: B010 - the copy's class does not declare it
    except Exception as error:  # decoders raise errors of many kinds
        raise ValueError(f"{name} cannot be read: {decoder_reason(error)}") from None
    if frames > 1:
        raise ValueError(f"{name} must be a still image, got an animation of {frames} frames")
    return still


def open_image(stream: IO[bytes], formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open an image, of which only the header is read, and refuse one that would exhaust memory.

    Args:
        stream: of the file's bytes.
        formats: that are recognized, as PIL names them.

    Raises:
        Exception: of many types, as PIL raises them.

    Example:
        >>> import io
        >>> stream = io.BytesIO()
        >>> Image.new("L", (4, 3)).save(stream, "PNG")
        >>> open_image(stream).size
        (4, 3)
    """
    with PIL_OPEN_LOCK, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(stream, formats=formats)


def decoder_reason(error: Exception) -> str:
    """Return why an image cannot be decoded, in words about the image.

    Args:
        error: what PIL raised.

    Example:
        >>> decoder_reason(ValueError("invalid literal for int() with base 10: b'x'"))
        'it is damaged'
        >>> decoder_reason(OSError("image file is truncated (0 bytes not processed)"))
        'image file is truncated (0 bytes not processed)'
    """
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    # PIL's errors of other kinds are about its own code.
    has_reason = isinstance(
        error, OSError | SyntaxError | Image.DecompressionBombError | Image.DecompressionBombWarning
    )
    return reader_reason(error) if has_reason else DAMAGED


def upright(image: Image.Image, name: str) -> Image.Image:
    """Return a copy of an image, turned and mirrored as its EXIF data says.

    Args:
        image: a decoded image.
        name: its name in messages.

    Returns:
        The image without an orientation; damaged EXIF data is ignored, with a warning.

    Example:
        >>> upright(Image.new("L", (4, 3)), "x.png").size
        (4, 3)
    """
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF data is a file format of its own, and its reader raises errors of many kinds
        logger.warning("%s has damaged EXIF data; its orientation is ignored", name)
        return image.copy()


def check_output_type(output_type: Any, channels: int | None = None, pixel_format: PixelFormat = EIGHT_BIT) -> None:
    """Check that an output type is one of `OUTPUT_TYPES` and takes images of so many channels.

    Args:
        output_type: what the caller gave.
        channels: of the images; `None` if not known.
        pixel_format: of the images.

    Raises:
        ValueError: if it is not, or for PIL images where PIL has no mode for them.

    Example:
        >>> check_output_type("pil", 3)
    """
    choice("output_type", output_type, OUTPUT_TYPES)
    if output_type == "pil" and channels is not None and not pixel_format.fits_pil(channels):
        kind = f"{channels} channels" if pixel_format.is_eight_bit else pixel_format.describe(channels)
        raise ValueError(f"output_type must be 'np' or 'pt' for images of {kind}, got 'pil'")


def to_bytes(array: np.ndarray) -> np.ndarray:
    """Round floats in [0, 1] to uint8.

    Args:
        array: any shape.

    Returns:
        uint8 of the same shape.

    Raises:
        NonFiniteError: if a value is NaN or infinite, as are those of a network that overflows.

    Example:
        >>> to_bytes(np.array([0.0, 0.5, 1.0])).tolist()
        [0, 128, 255]
    """
    if not np.isfinite(array).all():
        raise NonFiniteError("images must be finite, got NaN or infinity: the network's predictions overflow")
    return (array * 255).round().astype(np.uint8)


def to_values(images: Any, pixel_format: PixelFormat) -> np.ndarray:
    """Return images of the output type `np` in the type of their format: floats in [0, 1] become bytes.

    Args:
        images: (N, H, W, C), as `to_output` returns them.
        pixel_format: of the model.

    Returns:
        (N, H, W, C) of the format's type.

    Raises:
        NonFiniteError: if a value is NaN or infinite.

    Example:
        >>> to_values(np.ones((1, 2, 2, 1)), EIGHT_BIT).max()
        np.uint8(255)
    """
    array = np.asarray(images)
    return to_bytes(array) if pixel_format.is_eight_bit else array


def as_pil(pixels: np.ndarray) -> Image.Image:
    """Convert pixels to a PIL image.

    Args:
        pixels: uint8 (H, W, C), C from 1 to 4; or uint16 or float32 (H, W, 1).

    Returns:
        An image of mode `L`, `LA`, `RGB` or `RGBA`; or `I;16` or `F`.

    Example:
        >>> image = as_pil(np.zeros((2, 3, 1), np.uint8))
        >>> image.mode, image.size
        ('L', (3, 2))
    """
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _to_pixels(
    image: Image.Image | np.ndarray,
    channels: int,
    height: int,
    width: int,
    resize: bool | None,
    name: str,
    pixel_format: PixelFormat,
) -> np.ndarray:
    """Convert an image to the (H, W, C) that a model requires, or refuse it."""
    if isinstance(image, Image.Image):
        image = upright(image, name)
    if not pixel_format.is_eight_bit or channels not in MODES or isinstance(image, np.ndarray):
        if isinstance(image, Image.Image) and pixel_format.dtype == "uint8":
            raise ValueError(f"{name} must be an array of {channels} channels, got an image of mode {image.mode}")
        values = as_array(image, pixel_format.dtype, name)
        if not resize and values.shape[:2] != (height, width):
            hint = "" if resize is None else "; resize=True crops the center and scales it"
            raise ValueError(f"{name} must be {width}x{height}, got {values.shape[1]}x{values.shape[0]}{hint}")
        return fit_array(values, height, width, channels, name=name)
    mode = MODES[channels]
    if not resize and (image.size != (width, height) or image.mode != mode):
        blended = ", with white behind transparent pixels" if channels in (1, 3) else ""
        hint = "" if resize is None else f"; resize=True crops the center, scales it and converts it{blended}"
        raise ValueError(f"{name} must be {width}x{height} {mode}, got {image.width}x{image.height} {image.mode}{hint}")
    setattr(image, "filename", name)  # noqa: B010 - messages name images by it
    return np.atleast_3d(np.asarray(fit_image(image, height, width, channels)))


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale the values of an image to 8 bits, or refuse those whose range is unknown; PIL would clip them at 255."""
    mode, name = image.mode, getattr(image, "filename", "") or "the image"
    if mode in CONVERTIBLE_MODES:
        # PIL converts gray with premultiplied alpha to nothing else.
        return image.convert("LA") if mode == "La" else image
    if mode != "F" and not mode.startswith("I"):
        raise ValueError(f"{name} must be gray or color, got mode {mode}; convert it to RGB")
    low, high = (extreme([extreme(np.asarray(strip)) for _, strip in _strips(image)]) for extreme in (np.min, np.max))
    if mode == "F":
        if not np.isfinite([low, high]).all():
            raise ValueError(f"{name} must hold finite values, got NaN or infinity")
        if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
            raise ValueError(f"{name} must hold floats in [0, 1], got values in [{low:.4g}, {high:.4g}]")
        return Image.fromarray(_by_strips(lambda strip: to_bytes(strip.clip(0, 1)), image))
    # In 32 bits, values up to 255 may be of 8 or of 16 bits.
    if mode == "I" and (low < 0 or high > MAX_UINT16 or 0 < high <= 255):
        raise ValueError(
            f"{name} must hold 8 or 16 bits per pixel, got 32-bit integers from {low} to {high}; convert it to mode L "
            "or I;16"
        )
    return Image.fromarray(_by_strips(lambda strip: (strip / np.float32(257)).round().astype(np.uint8), image))


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield an image a few rows at a time, with the number of the first.

    A large one and its copies would not fit into memory; PIL makes two of an image that becomes an array.
    """
    width, height = image.size
    rows = max(1, STRIP_BYTES // (4 * width))
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def _by_strips(convert: Callable[[np.ndarray], np.ndarray], image: Image.Image) -> np.ndarray:
    """Convert an image of one channel to bytes (H, W)."""
    result = np.empty(image.size[::-1], np.uint8)
    for top, strip in _strips(image):
        result[top : top + strip.height] = convert(np.asarray(strip))
    return result


def _from_array(array: np.ndarray, name: str, pixel_format: PixelFormat) -> Tensor:
    """Convert bytes or floats in [0, 1], (N, H, W, C), to (N, C, H, W) in [-1, 1]; other ranks keep their shape."""
    if not pixel_format.is_eight_bit:
        return _from_values(cast_exactly(array, pixel_format.dtype, name), name, pixel_format)
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} must be uint8, or floating in [0, 1], got an array of {array.dtype}")
    # A copy, because arrays can be read-only, as np.asarray of a PIL image is, or have negative strides.
    values = torch.from_numpy(np.array(array, np.uint8 if array.dtype == np.uint8 else np.float32, order="C"))
    unit = values / 255 if array.dtype == np.uint8 else _check_range(values, 0, 1, name)
    samples = 2 * unit - 1
    return samples.movedim(-1, 1) if samples.ndim == 4 else samples


def _from_values(array: np.ndarray, name: str, pixel_format: PixelFormat) -> Tensor:
    """Convert values in a format's units, (N, H, W, C), to (N, C, H, W) in [-1, 1]; other ranks keep their shape."""
    values = torch.from_numpy(np.array(array, np.float32, order="C"))
    if values.ndim != 4 or len(pixel_format.low) not in (1, values.shape[3]):
        return values  # whose shape the caller refuses
    samples = pixel_format.to_samples(values.movedim(-1, 1))
    if beyond := int((samples.abs() > 1 + RANGE_TOLERANCE).flatten(1).any(1).sum()):
        message = "%s: %d of %d images hold values beyond the model's range, which are clipped"
        logger.warning(message, name, beyond, len(samples))
    return samples.clamp(-1, 1)


def _check_range(values: Tensor, low: int, high: int, name: str) -> Tensor:
    """Return floats in [low, high], up to rounding, as float32 or wider."""
    if not values.is_floating_point():
        raise ValueError(f"{name} must be floating in [{low}, {high}], got a tensor of {values.dtype}")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    if values.numel():
        smallest, largest = float(values.min()), float(values.max())
        if smallest < low - RANGE_TOLERANCE or largest > high + RANGE_TOLERANCE:
            raise ValueError(f"{name} must be in [{low}, {high}], got values in [{smallest:.4g}, {largest:.4g}]")
    return values.to(torch.promote_types(values.dtype, torch.float32))
