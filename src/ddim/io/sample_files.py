"""Samples of any model as files: without loss where the format of the file allows it, else in false color.

x.png     a grid; 8 bits up to four channels, 16 bits of one channel; others in false color, to be looked at
x.tiff    the same grid with the values themselves, one page per channel
x.npz     `arr_0`, (N, H, W, C) of the model's type, in the units of its data
a folder  one file per image: PNG where it keeps the values, else TIFF
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddim.io.array_files import TIFF_SUFFIXES, encode_image, encode_png, encode_tiff, image_suffix, keeps_png
from ddim.io.atomic import atomic_write, write_folder
from ddim.io.false_color import preview, shows_values
from ddim.io.image_files import (
    GRID_GAP,
    check_output_path,
    enlargement,
    grid_columns,
    is_folder_path,
    output_files,
    replaced_files,
    save_images,
)
from ddim.io.images import as_pil
from ddim.io.pixel_format import PixelFormat


def save_samples(
    values: Sequence[np.ndarray] | np.ndarray,
    pixel_format: PixelFormat,
    path: str | Path,
    columns: int | None = None,
    scale: int | None = 1,
) -> bool:
    """Write images atomically: as a grid, an array, or one file per image.

    Args:
        values: N arrays (H, W, C) of the format's type, in its units.
        pixel_format: their type and ranges.
        path: as described at the head of this module.
        columns: images per row of a grid; defaults to a grid as square as possible.
        scale: factor by which a grid is enlarged; `None` chooses it for PNG, as `ddim.io.image_files.enlarge` does, and
            is 1 for TIFF.

    Returns:
        Whether the file holds the values; not in false color.

    Raises:
        ValueError: for another suffix.
        FileExistsError: for a folder with images numbered beyond these, or that `ddim.bulk` wrote.
        OSError: if it cannot be written; earlier files stay.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_samples(np.zeros((3, 4, 4, 5), np.uint16), PixelFormat("uint16", (0,), (9,)), f"{folder}/x.png")
        False
    """
    channels = values[0].shape[2]
    if shows_values(channels, pixel_format):
        save_images([as_pil(image) for image in values], path, columns, scale)
        return True
    target = check_output_path(path)
    replaced_files(path, len(values), image_suffix(pixel_format.dtype, channels))
    suffix = "" if is_folder_path(path) else target.suffix.lower()
    if not suffix:
        files = output_files(target, len(values), image_suffix(pixel_format.dtype, channels))
        with write_folder(target) as folder:
            for image, file in zip(values, files, strict=True):
                (folder / file.name).write_bytes(encode_image(image))
    elif suffix == ".npz":
        # To an open file, because NumPy would append its suffix to a name in .NPZ.
        with atomic_write(target) as temporary, temporary.open("wb") as opened:
            np.savez_compressed(opened, np.stack(list(values)))
    elif suffix in TIFF_SUFFIXES or keeps_png(pixel_format.dtype, channels):
        is_tiff, is_single = suffix in TIFF_SUFFIXES, len(values) == 1
        grid = values[0] if is_single else make_array_grid(values, columns)
        if scale is None:
            # For the eye, which TIFF files of values are not made for.
            scale = 1 if is_tiff or is_single else enlargement(grid.shape[1::-1], values[0].shape[1::-1])
        grid = grid.repeat(scale, 0).repeat(scale, 1)
        with atomic_write(target) as temporary:
            temporary.write_bytes(encode_tiff(grid) if is_tiff else encode_png(grid))
    else:
        save_images(preview(values, pixel_format), path, columns, scale)
        return False
    return True


def make_array_grid(images: Sequence[np.ndarray] | np.ndarray, columns: int | None = None) -> np.ndarray:
    """Arrange arrays in rows, with a gap of 2 pixels of zeros between and around them; see `make_grid`.

    Args:
        images: at least one, all (H, W, C) of one type.
        columns: images per row; defaults to a grid as square as possible.

    Returns:
        The grid, (rows, columns, C).

    Example:
        >>> make_array_grid(np.ones((6, 4, 4, 5), np.uint16), columns=3).shape
        (14, 20, 5)
    """
    columns = columns or grid_columns(len(images))
    rows = -(-len(images) // columns)
    height, width, channels = images[0].shape
    shape = rows * (height + GRID_GAP) + GRID_GAP, columns * (width + GRID_GAP) + GRID_GAP, channels
    grid = np.zeros(shape, images[0].dtype)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = row * (height + GRID_GAP) + GRID_GAP, column * (width + GRID_GAP) + GRID_GAP
        grid[top : top + height, left : left + width] = image
    return grid
