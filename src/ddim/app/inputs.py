"""Checks and limits of everything that comes from the page and its API.

Nothing that a client sends is trusted: a number may be negative, NaN, huge or a word, an upload anything at all. Each
check returns the value in its proper type, or raises `ValueError` or `TypeError` with one sentence that names the
argument and what is allowed.
"""

from __future__ import annotations

import base64
import binascii
import io
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

from PIL import Image, UnidentifiedImageError

from ddim import validation
from ddim.io.images import PIL_OPEN_LOCK, decode_image, decoder_reason
from ddim.validation import join_choices, shown

MAX_COUNT = 64
"""Images per run: one batch, so that they are those of `ddim sample`."""

MAX_STEPS = 1000
MAX_ETA = 2.0
MAX_GUIDANCE = 100.0
MAX_SEED = 2**53 - 1 - MAX_COUNT
"""Browsers cannot represent larger integers exactly."""

MAX_LATENTS = 8
"""Latents shown side by side, endpoints of a path, answers of a restoration, and images per upload."""

MAX_FRAMES = 33
MAX_MEGABYTES = 10
MAX_PIXELS = 25_000_000
MAX_DRAWING_CHARACTERS = 1_000_000
"""Length of the `data:` URL of a drawing."""

MAX_DECODED = 2
"""Images of clients that are decoded at a time: one may take 100 MB."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")

_decoding = threading.BoundedSemaphore(MAX_DECODED)

T = TypeVar("T")


def present_image(image: T | None, way: str) -> T:
    """Check that a tab has its image.

    Args:
        image: the image of the tab.
        way: how the tab gets one, beside uploads and pinned ones: a verb, for the message.

    Returns:
        The image.

    Raises:
        ValueError: if there is none.

    Example:
        >>> present_image(None, "draw")
        Traceback (most recent call last):
        ValueError: an image is missing; upload one, draw one, or use a pinned one
    """
    if image is None:
        raise ValueError(f"an image is missing; upload one, {way} one, or use a pinned one")
    return image


def integer(name: str, value: Any, minimum: int, maximum: int) -> int:
    """Check an integer, which JavaScript may send as a float without a fraction.

    Args:
        name: the argument's name, for the message.
        value: what a client sent.
        minimum: the smallest value allowed.
        maximum: the largest value allowed.

    Returns:
        The value as an `int`.

    Raises:
        ValueError: for anything else.

    Example:
        >>> integer("steps", 20.0, 1, 1000)
        20
        >>> integer("steps", 2.5, 1, 1000)
        Traceback (most recent call last):
        ValueError: steps must be an integer from 1 to 1000, got 2.5
    """
    is_integral = isinstance(value, float) and value.is_integer()
    return validation.integer(name, int(value) if is_integral else value, minimum, maximum)


def flag(name: str, value: Any) -> bool:
    """Check a boolean.

    Args:
        name: the argument's name, for the message.
        value: what a client sent.

    Returns:
        The value.

    Raises:
        ValueError: for anything else.

    Example:
        >>> flag("closed", "yes")
        Traceback (most recent call last):
        ValueError: closed must be one of True or False, got 'yes'
    """
    return bool(validation.choice(name, value, (True, False)))


def sequence(name: str, values: Any, minimum: int, maximum: int) -> list[Any]:
    """Check a list and its length.

    Args:
        name: the argument's name, for the message.
        values: what a client sent.
        minimum: the smallest length allowed.
        maximum: the largest length allowed.

    Returns:
        The entries, which are not checked.

    Raises:
        ValueError: for anything but a list of such a length.

    Example:
        >>> sequence("seeds", [1, 2, 3], 0, 2)
        Traceback (most recent call last):
        ValueError: seeds must be a list of 0 to 2 entries, got 3 entries
    """
    is_list = isinstance(values, list | tuple)
    if not is_list or not minimum <= len(values) <= maximum:
        given = f"{len(values)} entries" if is_list else shown(values)
        raise ValueError(f"{name} must be a list of {minimum} to {maximum} entries, got {given}")
    return list(values)


def seed(value: Any) -> int:
    """Check the seed of a first image, after which those of `MAX_COUNT` images follow.

    Args:
        value: what a client sent.

    Returns:
        The seed.

    Raises:
        ValueError: for anything but an integer from 0 to `MAX_SEED`.

    Example:
        >>> seed(7)
        7
    """
    return integer("seed", value, 0, MAX_SEED)


def upload(
    source: Any,
    folder: str | Path,
    finish: Callable[[Image.Image], Any] = lambda image: image,
    name: str = "picture",
) -> Any:
    """Decode an uploaded image, after its size and its header have been checked.

    Args:
        source: the path of a file, or the dictionary with a `path` that Gradio's clients send.
        folder: where uploads are stored; no other file is opened.
        finish: makes what is kept of the image; a few images at a time are in memory until then.
        name: the argument's name, for the message.

    Returns:
        What `finish` returned.

    Raises:
        ValueError: if it is not a file in the folder, exceeds a limit, or is not a still image of a known format.
    """
    given = source.get("path") if isinstance(source, dict) else source
    if not isinstance(given, str | Path) or not str(given):
        raise ValueError(f"{name} must be an uploaded file, got {shown(source)}")
    # The path is compared before the file is looked up: answers must not reveal which files this machine has.
    path = Path(given).resolve() if "\0" not in str(given) else Path("/")
    if not path.is_relative_to(Path(folder).resolve()) or not path.is_file():
        raise ValueError(f"{name} must be a file that was uploaded here; upload it first")
    if (size := path.stat().st_size) > MAX_MEGABYTES * 1_000_000:
        raise ValueError(f"{path.name} must have at most {MAX_MEGABYTES} MB, got {size / 1e6:.1f} MB")
    with _decoding, path.open("rb") as file:
        return finish(decode(file, path.name))


def drawing(url: Any, finish: Callable[[Image.Image], Any] = lambda image: image) -> Any:
    """Decode what was drawn on a canvas.

    Args:
        url: the `data:` URL of a PNG, as the canvas sends it.
        finish: as for `upload`.

    Returns:
        What `finish` returned.

    Raises:
        ValueError: for anything else, or a URL of more than `MAX_DRAWING_CHARACTERS`.

    Example:
        >>> drawing("http://example.org/x.png")
        Traceback (most recent call last):
        ValueError: the drawing must be a PNG of at most 1 MB
    """
    prefix = "data:image/png;base64,"
    message = "the drawing must be a PNG of at most 1 MB"
    if not isinstance(url, str) or not url.startswith(prefix) or len(url) > MAX_DRAWING_CHARACTERS:
        raise ValueError(message)
    try:
        data = base64.b64decode(url.removeprefix(prefix), validate=True)
    except (binascii.Error, ValueError):  # ValueError: letters beyond ASCII
        raise ValueError(message) from None
    with _decoding:
        return finish(decode(io.BytesIO(data), "the drawing"))


def decode(file: IO[bytes], name: str) -> Image.Image:
    """Decode an image after its header has been checked.

    Args:
        file: the encoded image.
        name: its name, for the message.

    Returns:
        The image.

    Raises:
        ValueError: if it has more than `MAX_PIXELS` pixels, or is not a still image in one of `FORMATS`.
    """
    width, height = _size(file, name)
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{name} must have at most {MAX_PIXELS / 1e6:g} million pixels, such as 5000 x 5000, got {width} x {height}"
        )
    file.seek(0)
    return decode_image(file, name)


def _size(file: IO[bytes], name: str) -> tuple[int, int]:
    """Return (width, height) from an image's header; nothing is decoded."""
    try:
        # Python's warning filters are shared by all threads.
        with PIL_OPEN_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                return image.size
    except Image.DecompressionBombError:
        raise ValueError(f"{name} must have at most {MAX_PIXELS / 1e6:g} million pixels, got far more") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image of a known format; give {join_choices(FORMATS)}") from None
    except Exception as error:  # every decoder fails in its own way
        raise ValueError(f"{name} cannot be read: {decoder_reason(error)}") from None
