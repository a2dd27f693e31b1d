"""Images that PIL has no mode for: `.npy` arrays, and TIFF files with one page per channel.

A TIFF page holds one channel: 8 bits (`L`), 16 bits (`I;16`), 32-bit integers (`I`) or floats (`F`). PIL reads and
writes these without loss, and so do ImageJ, napari and tifffile, which show pages as a stack. Several samples per pixel
of more than 8 bits are beyond PIL. The description of the first page is the SHA-256 of the values, because TIFF has no
checksum of its own.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import IMAGEDESCRIPTION

from ddim.io.images import decode_image, decoder_reason, open_image
from ddim.io.reading import reader_reason

MAX_CHANNELS = 16
"""Channels that models of images have at most."""
TIFF_SUFFIXES = (".tif", ".tiff")
PAGE_MODES = {"uint8": "L", "uint16": "I;16", "int16": "I", "float32": "F"}
"""The mode of a TIFF page that keeps values of a type."""
COMPRESSION = "tiff_adobe_deflate"
PNG_DTYPES = {"uint8": (1, 2, 3, 4), "uint16": (1,)}
"""The numbers of channels that PNG keeps, by the type of values."""


def read_pixels(path: str | Path) -> Image.Image | np.ndarray:
    """Read an image of any kind from a file.

    Args:
        path: a file that PIL reads, a TIFF with one page per channel, or a `.npy` array (H, W) or (H, W, C).

    Returns:
        A PIL image where PIL has a mode for it; an array (H, W, C) for `.npy` and for several pages.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it cannot be decoded, is animated or too large, or holds no image.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/x.npy", np.zeros((4, 6, 5), np.uint16))
        ...     read_pixels(f"{folder}/x.npy").shape
        (4, 6, 5)
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"the file {path} does not exist")
    if file.suffix.lower() == ".npy":
        array = load_npy(file)
        if array.ndim not in (2, 3):
            raise ValueError(f"{path} must hold an image (H, W) or (H, W, C), got an array of shape {array.shape}")
        return np.array(array if array.ndim == 3 else array[:, :, None])
    if file.suffix.lower() not in TIFF_SUFFIXES:
        return decode_image(path, str(path))
    with file.open("rb") as stream:
        return decode_tiff(stream, str(path))


def decode_tiff(stream: IO[bytes], name: str) -> Image.Image | np.ndarray:
    """Decode a TIFF file of a single image, or with one page per channel.

    Args:
        stream: of its bytes.
        name: the image's name in messages.

    Returns:
        A PIL image, or an array (H, W, C) of several pages.

    Raises:
        ValueError: if it cannot be decoded, is an animation, or too large.

    Example:
        >>> decode_tiff(io.BytesIO(encode_tiff(np.zeros((2, 3, 4), np.uint16))), "x.tiff").shape
        (2, 3, 4)
    """
    pages = read_pages(stream, name)
    if pages is not None:
        return pages
    stream.seek(0)
    return decode_image(stream, name)


def load_npy(path: Path) -> np.ndarray:
    """Map a `.npy` file into memory, without reading pickles.

    Args:
        path: the file.

    Returns:
        The array, read-only.

    Raises:
        ValueError: if it is not an array, or damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/x.npy", np.zeros((2, 3)))
        ...     load_npy(Path(folder, "x.npy")).shape
        (2, 3)
    """
    try:
        # A map is refused where the file is shorter than its header claims, before anything is allocated.
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # damaged headers raise errors of many kinds
        raise ValueError(f"{path} cannot be read as .npy: {reader_reason(error)}") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} cannot be read as .npy: it is an archive of arrays")
    if not array.size:
        raise ValueError(f"{path} cannot be read as .npy: it has no values")
    return array


def read_pages(stream: IO[bytes], name: str = "it") -> np.ndarray | None:
    """Read a TIFF file that has one page per channel.

    Args:
        stream: of its bytes.
        name: the image's name in messages.

    Returns:
        (H, W, C); `None` for a file of a single page, and one that is not a TIFF of gray pages of one size.

    Raises:
        ValueError: if it has more than 16 such pages, or a page is damaged.

    Example:
        >>> pixels = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
        >>> bool((read_pages(io.BytesIO(encode_tiff(pixels))) == pixels).all())
        True
    """
    try:
        image = open_image(stream, formats=("TIFF",))
    except Exception:  # whoever decodes it as an image says why it is none
        return None
    with image:
        try:
            count = getattr(image, "n_frames", 1)
            if count == 1:
                return None
            pages: list[np.ndarray] = []
            for index in range(min(count, MAX_CHANNELS + 1)):
                image.seek(index)
                if image.mode not in PAGE_MODES.values() or image.size != (
                    pages[0].shape[::-1] if pages else image.size
                ):
                    return None
                pages.append(np.array(image))
        except Exception as error:  # decoders raise errors of many kinds
            raise ValueError(f"{name} cannot be read: {decoder_reason(error)}") from None
    if count > MAX_CHANNELS:
        raise ValueError(f"{name} must have at most {MAX_CHANNELS} pages, one per channel, got {count}")
    return np.stack(pages, axis=2)


def keeps_png(dtype: str, channels: int) -> bool:
    """Return whether PNG keeps such images without loss.

    Args:
        dtype: of the values.
        channels: of each image.

    Example:
        >>> keeps_png("uint16", 1), keeps_png("uint16", 3)
        (True, False)
    """
    return channels in PNG_DTYPES.get(dtype, ())


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode an image as a PNG file.

    Args:
        pixels: (H, W, C), of a type and number of channels that `keeps_png`.

    Example:
        >>> encode_png(np.zeros((2, 2, 1), np.uint16))[1:4]
        b'PNG'
    """
    stream = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(stream, "PNG")
    return stream.getvalue()


def encode_tiff(pixels: np.ndarray) -> bytes:
    """Encode an image as a TIFF file with one page per channel, compressed without loss.

    Args:
        pixels: (H, W, C) of uint8, uint16, int16 (stored as 32-bit integers) or float32.

    Example:
        >>> encode_tiff(np.zeros((2, 2, 5), np.float32))[:2]
        b'II'
    """
    widened = pixels.astype(np.int32) if pixels.dtype == np.int16 else pixels
    info = {IMAGEDESCRIPTION: _description(widened)}
    pages: Sequence[Image.Image] = [Image.fromarray(np.ascontiguousarray(page)) for page in np.moveaxis(widened, 2, 0)]
    stream = io.BytesIO()
    pages[0].save(stream, "TIFF", save_all=True, append_images=pages[1:], tiffinfo=info, compression=COMPRESSION)
    return stream.getvalue()


def verify_tiff(content: bytes, shape: tuple[int, int, int], dtype: str) -> None:
    """Raise an error if a file is not what `encode_tiff` wrote.

    Args:
        content: of the file.
        shape: (H, W, C) of the image.
        dtype: of its values.

    Raises:
        ValueError: if it is of another shape or type, or damaged.

    Example:
        >>> content = encode_tiff(np.zeros((2, 2, 5), np.uint16))
        >>> verify_tiff(content, (2, 2, 5), "uint16")
        >>> verify_tiff(content, (2, 2, 5), "float32")
        Traceback (most recent call last):
        ValueError: it must hold float32 (2, 2, 5), got uint16 (2, 2, 5)
    """
    pixels = read_pages(io.BytesIO(content))
    if pixels is None:
        page = decode_image(io.BytesIO(content), "it")
        pixels = np.asarray(page).reshape(page.height, page.width, -1)
    stored = np.dtype(np.int32 if dtype == "int16" else dtype)
    if (pixels.shape, pixels.dtype) != (shape, stored):
        raise ValueError(f"it must hold {dtype} {shape}, got {pixels.dtype} {pixels.shape}")
    if _description(pixels).encode() not in content:
        raise ValueError("its SHA-256 does not match")


def _description(pixels: np.ndarray) -> str:
    return f"SHA-256 {hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()}"


def encode_image(pixels: np.ndarray) -> bytes:
    """Encode an image without loss: as PNG where that can be, else as TIFF.

    Args:
        pixels: (H, W, C) of uint8, uint16, int16 or float32.

    Example:
        >>> encode_image(np.zeros((2, 2, 3), np.uint8))[1:4], encode_image(np.zeros((2, 2, 5), np.uint8))[:2]
        (b'PNG', b'II')
    """
    return encode_png(pixels) if keeps_png(str(pixels.dtype), pixels.shape[2]) else encode_tiff(pixels)


def image_suffix(dtype: str, channels: int) -> str:
    """Return the suffix of the files that `encode_image` writes.

    Args:
        dtype: of the values.
        channels: of each image.

    Example:
        >>> image_suffix("uint8", 3), image_suffix("float32", 1)
        ('.png', '.tiff')
    """
    return ".png" if keeps_png(dtype, channels) else ".tiff"
