"""Checks and limits of all that comes from the page and its API.

Nothing that a client sends is trusted: a number may be negative, NaN, huge or a word, an upload anything at all. Each
check returns what it was asked for in its proper type, or raises `ValueError` with one sentence that says what was
wrong and what is allowed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from PIL import Image, UnidentifiedImageError

from ddim.io.images import PIL_OPEN_LOCK, decode_image
from ddim.validation import join_choices

MAX_COUNT = 64
"""Pictures a run: one batch, so that they are those of `ddim sample`."""

MAX_STEPS = 1000
MAX_ETA = 2.0
MAX_SEED = 2**53 - 1 - MAX_COUNT
"""Above it a browser cannot count."""

MAX_CODES = 8
"""Codes that are shown side by side, endpoints of a path, and pictures an upload."""

MAX_FRAMES = 33
MAX_MEGABYTES = 10
MAX_PIXELS = 25_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def said(value: Any) -> str:
    """What a client sent, as a message repeats it: short, whatever it was."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print very long integers.
        text = "a number of thousands of digits"
    return text if len(text) <= 40 else f"{text[:37]}..."


def whole(name: str, value: Any, least: int, most: int) -> int:
    """A whole number from `least` to `most`; fractions, NaN, booleans and words are none."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    if not fits or value != int(value):
        raise ValueError(f"{name} is {said(value)}; it must be a whole number from {least} to {most}")
    return int(value)


def real(name: str, value: Any, least: float, most: float) -> float:
    """A number from `least` to `most`; NaN, booleans and words are none."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    if not fits or not math.isfinite(value):
        raise ValueError(f"{name} is {said(value)}; it must be a number from {least:g} to {most:g}")
    return float(value)


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of the words in `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {said(value)}; it must be {join_choices(choices)}")
    return value


def flag(name: str, value: Any) -> bool:
    """`True` or `False`."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {said(value)}; it must be true or false")
    return value


def several(name: str, values: Any, least: int, most: int) -> list[Any]:
    """A list of `least` to `most` entries."""
    if not isinstance(values, list | tuple):
        raise ValueError(f"{name} is {said(values)}; it must be a list of {least} to {most}")
    if not least <= len(values) <= most:
        raise ValueError(f"{name} has length {len(values)}; it must be a list of {least} to {most}")
    return list(values)


def seed(value: Any) -> int:
    """A seed that leaves room for those of `MAX_COUNT` pictures."""
    return whole("seed", value, 0, MAX_SEED)


def upload(source: Any, folder: str | Path) -> Image.Image:
    """Decode an uploaded picture, after its size and its header have been looked at.

    Args:
        source: the path of a file, or the dictionary with a `path` that Gradio's clients send for one.
        folder: where uploads are kept; no other file is opened.

    Raises:
        ValueError: if it is no file there, is larger than the limits, or no still picture of a known format.
    """
    given = source.get("path") if isinstance(source, dict) else source
    if not isinstance(given, str | Path) or not str(given):
        raise ValueError(f"the picture is {said(source)}; upload a file")
    # Looked up before the path is, so that an answer does not tell which files this machine has.
    path = Path(given).resolve() if "\0" not in str(given) else Path("/")
    if not path.is_relative_to(Path(folder).resolve()) or not path.is_file():
        raise ValueError("the picture is no file that was uploaded here; upload it first")
    if (size := path.stat().st_size) > MAX_MEGABYTES * 1_000_000:
        raise ValueError(f"{path.name} has {size / 1e6:.1f} MB; at most {MAX_MEGABYTES} MB are taken")
    with path.open("rb") as file:
        return decode(file, path.name)


def decode(file: IO[bytes], name: str) -> Image.Image:
    """Decode a picture whose header has been looked at.

    Args:
        file: what is in it.
        name: how messages call it.

    Raises:
        ValueError: if it has more than `MAX_PIXELS`, or is no still picture in one of `FORMATS`.
    """
    width, height = _size(file, name)
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{name} has {width} x {height} pixels; at most {MAX_PIXELS / 1e6:g} million are taken, such as 5000 x 5000"
        )
    file.seek(0)
    return decode_image(file, name)


def _size(file: IO[bytes], name: str) -> tuple[int, int]:
    """(width, height) by a picture's header; nothing is decoded."""
    try:
        # Python's filters of warnings are one for all threads.
        with PIL_OPEN_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                return image.size
    except Image.DecompressionBombError:
        raise ValueError(f"{name} has far too many pixels; at most {MAX_PIXELS / 1e6:g} million are taken") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is no picture of a known format; give {join_choices(FORMATS)}") from None
    except Exception as error:  # every decoder fails in its own way
        raise ValueError(f"{name} cannot be read: {error}") from None
