"""Image files: finding and reading them, output paths, grids, animations, saving."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ddim.io.atomic import atomic_write, write_folder
from ddim.io.images import decode_image
from ddim.validation import join_choices, pluralize, shorten

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
"""Files with these suffixes are read as images."""
OUTPUT_SUFFIXES = {".png": "a grid", ".npz": ""}
"""Suffixes that `save_images` writes, and what they mean."""
ANIMATION_SUFFIXES = {".gif": "an animation", ".webp": "an animation"}
NUMBERED_FILE = re.compile(r"([0-9]{5}|[1-9][0-9]{5,})\.png")
"""The names that `save_images` gives to the files of a folder."""
MANIFEST_NAME = "manifest.json"
"""A folder of samples of `ddim.bulk` has this file."""
MAX_LISTED = 5
"""Skipped files that a message names."""
GRID_GAP = 2
"""Pixels between and around the images of a grid."""
MIN_TILE_PIXELS = 64
"""Sides of the images of a grid that is enlarged."""
MAX_ENLARGED_PIXELS = 4096
"""Sides of a grid that is enlarged."""


def find_images(path: str | Path) -> list[Path]:
    """Find the image files in a folder and its subfolders, by their suffixes.

    Hidden files, such as those that macOS adds (`._x.png`), and what is not a regular file, such as pipes and devices,
    are skipped with a warning.

    Args:
        path: the folder.

    Returns:
        The files, sorted.

    Raises:
        FileNotFoundError: if there are none.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("L", (4, 4)).save(f"{folder}/one.png")
        ...     [file.name for file in find_images(folder)]
        ['one.png']
    """
    files, skipped = [], []

    def skip(error: OSError) -> None:
        if error.filename != str(path):
            skipped.append(f"{os.path.relpath(str(error.filename), path)} ({error.strerror})")

    for folder, _, names in os.walk(path, onerror=skip):
        for file in (Path(folder, name) for name in names):
            if file.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            if file.name.startswith(".") or not file.is_file():
                skipped.append(str(file.relative_to(path)))
            else:
                files.append(file)
    if skipped:
        listed = ", ".join(sorted(skipped)[:MAX_LISTED]) + (", ..." if len(skipped) > MAX_LISTED else "")
        # Names in another encoding hold characters that cannot be printed.
        listed = listed.encode(errors="backslashreplace").decode()
        logger.warning("%s: %s skipped: %s", path, pluralize(len(skipped), "hidden or special file"), listed)
    if not files:
        raise FileNotFoundError(f"{path} contains no images; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
    return sorted(files)


def read_image(path: str | Path) -> Image.Image:
    """Read a still image from a file.

    Args:
        path: the file.

    Returns:
        The image, in its own mode and size.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it cannot be decoded, is animated or too large.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("L", (4, 4)).save(f"{folder}/one.png")
        ...     read_image(f"{folder}/one.png").size
        (4, 4)
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"the file {path} does not exist")
    return decode_image(path, str(path))


def make_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Arrange images in rows, with a gap of 2 pixels between and around them.

    Args:
        images: at least one, all of one size and mode.
        columns: images per row; defaults to a grid as square as possible.

    Returns:
        The grid, in the mode of the images.

    Raises:
        ValueError: for no images.

    Example:
        >>> make_grid([Image.new("L", (4, 4))] * 6, columns=3).size
        (20, 14)
    """
    if not images:
        raise ValueError("images must hold at least one image, got none")
    columns = columns or round(len(images) ** 0.5 + 0.49)
    rows = -(-len(images) // columns)
    width, height = images[0].size
    grid = Image.new(images[0].mode, (columns * (width + GRID_GAP) + GRID_GAP, rows * (height + GRID_GAP) + GRID_GAP))
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(image, (column * (width + GRID_GAP) + GRID_GAP, row * (height + GRID_GAP) + GRID_GAP))
    return grid


def stack_rows(rows: Sequence[Sequence[Image.Image]], columns: int = 16) -> Image.Image:
    """Arrange rows of images that correspond by column, such as originals above their reconstructions.

    Args:
        rows: at least one, all of one length, all images of one size and mode.
        columns: the most images per row; longer rows are wrapped together.

    Returns:
        The grid.

    Raises:
        ValueError: for no images.

    Example:
        >>> row = [Image.new("L", (4, 4))] * 3
        >>> stack_rows([row, row], columns=2).size
        (14, 26)
    """
    length = max((len(row) for row in rows), default=0)
    if not length:
        raise ValueError("rows must hold at least one image, got none")
    columns = min(columns, length)
    blank = Image.new(rows[0][0].mode, rows[0][0].size)
    cells = []
    for first in range(0, length, columns):
        for row in rows:
            part = list(row[first : first + columns])
            cells += part + [blank] * (columns - len(part))
    return make_grid(cells, columns)


def enlarge(image: Image.Image, tile: Image.Image, factor: int | None = None) -> Image.Image:
    """Enlarge an image by an integer factor, each pixel to a square, so that small images can be seen.

    Args:
        image: an image, or a grid.
        tile: an image of the grid.
        factor: at least 1; defaults to the smallest that makes the sides of the tile 64 pixels or more, as far as those
            of the grid stay within 4096.

    Returns:
        The enlarged image, in its mode.

    Example:
        >>> tile = Image.new("L", (28, 28))
        >>> enlarge(make_grid([tile] * 4), tile).size
        (186, 186)
    """
    if factor is None:
        factor = max(1, min(-(-MIN_TILE_PIXELS // min(tile.size)), MAX_ENLARGED_PIXELS // max(image.size)))
    width, height = image.size
    return image if factor == 1 else image.resize((width * factor, height * factor), Image.Resampling.NEAREST)


def is_folder_path(path: str | Path) -> bool:
    """Return whether an output path means a folder: it is one, ends in a separator, or has no suffix.

    Example:
        >>> is_folder_path("samples/"), is_folder_path("samples.png")
        (True, False)
    """
    # Not Path.is_dir, which raises for names that no file can have.
    return str(path).endswith(("/", os.sep)) or os.path.isdir(path) or not Path(path).suffix  # noqa: PTH112


def is_animation_path(path: str | Path) -> bool:
    """Return whether an output path means an animation.

    Example:
        >>> is_animation_path("walk.gif")
        True
    """
    return Path(path).suffix.lower() in ANIMATION_SUFFIXES


def check_output_path(
    path: str | Path,
    allowed: Mapping[str, str] = OUTPUT_SUFFIXES,
    folder_allowed: bool = True,
    name: str = "out",
) -> Path:
    """Check, before any work, that a result can be written to a path.

    Args:
        path: the output path, as for `save_images`.
        allowed: suffixes, and what they mean.
        folder_allowed: whether the path may mean a folder.
        name: the argument's name, for the message.

    Returns:
        The path.

    Raises:
        ValueError: for a suffix that is not allowed.
        FileNotFoundError: if the folder that would hold the result does not exist.
        NotADirectoryError: if a file stands where a folder is required.
        PermissionError: if that folder cannot be written.

    Example:
        >>> check_output_path("samples.jpg")
        Traceback (most recent call last):
        ValueError: out must end in .png (a grid), .npz, or be a folder, got 'samples.jpg'
    """
    target = Path(path)
    if target.suffix.lower() not in allowed if not is_folder_path(path) else not folder_allowed:
        kinds = [f"{suffix} ({meaning})" if meaning else suffix for suffix, meaning in allowed.items()]
        choices = join_choices([*kinds, "be a folder"] if folder_allowed else kinds)
        raise ValueError(f"{name} must end in {choices}, got {shorten(repr(str(path)))}")
    folder = target if target.is_dir() else target.parent
    if not folder.exists():
        raise FileNotFoundError(f"the folder {folder} does not exist; create it, or write {target.name} elsewhere")
    if not folder.is_dir() or (is_folder_path(path) and target.exists() and not target.is_dir()):
        raise NotADirectoryError(f"{target if folder.is_dir() else folder} is a file, not a folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(f"the folder {folder} cannot be written: {error.strerror}") from None
    return target


def output_files(path: str | Path, count: int) -> list[Path]:
    """Return the files that `save_images` writes.

    Args:
        path: the output path.
        count: the number of images.

    Returns:
        One path per image for a folder, else the path alone.

    Example:
        >>> [file.name for file in output_files("samples", 2)]
        ['00000.png', '00001.png']
    """
    target = Path(path)
    return [target / f"{index:05d}.png" for index in range(count)] if is_folder_path(path) else [target]


def earlier_files(path: str | Path) -> list[Path]:
    """Return the files that an output of `save_images` meets.

    Args:
        path: the output path.

    Returns:
        The numbered images of a folder, sorted; else the path, if such a file exists.

    Raises:
        FileExistsError: for a folder that `ddim.bulk` wrote: its images may be very many, and may be resumed.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("00000.png", "00007.png", "7.png"):
        ...         (Path(folder) / name).touch()
        ...     [file.name for file in earlier_files(folder)]
        ['00000.png', '00007.png']
    """
    if not is_folder_path(path):
        return [Path(path)] if os.path.isfile(path) else []  # noqa: PTH113
    if not os.path.isdir(path):  # noqa: PTH112
        return []
    if Path(path, MANIFEST_NAME).exists():
        raise FileExistsError(f"{path} holds samples, which its {MANIFEST_NAME} lists; write to another folder")
    return sorted(Path(path, name) for name in os.listdir(path) if NUMBERED_FILE.fullmatch(name))  # noqa: PTH208


def replaced_files(path: str | Path, count: int) -> list[Path]:
    """Return the files that an output of `save_images` replaces.

    Args:
        path: the output path.
        count: the number of images to be written.

    Returns:
        As `earlier_files`.

    Raises:
        FileExistsError: for a folder that `ddim.bulk` wrote, or with files so numbered beyond these images, which would
            be taken for theirs.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "00002.png").touch()
        ...     len(replaced_files(folder, count=3)), replaced_files(folder, count=2)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        FileExistsError: ... images numbered beyond the 2 to be written (1, such as 00002.png); delete them, or ...
    """
    earlier = earlier_files(path)
    if is_folder_path(path) and (beyond := sorted(set(earlier) - set(output_files(path, count)))):
        raise FileExistsError(
            f"{path} holds images numbered beyond the {count} to be written ({len(beyond)}, such as "
            f"{beyond[0].name}); delete them, or write to another folder"
        )
    return earlier


def save_animation(frames: Sequence[Image.Image], path: str | Path, frames_per_second: float = 10) -> Path:
    """Write a looping animation atomically.

    Args:
        frames: at least one, all of one size.
        path: a `.gif` (256 colors per frame) or `.webp` (lossless) file.
        frames_per_second: positive; GIF rounds the duration of a frame to 1/100 s.

    Returns:
        The path.

    Raises:
        ValueError: for no frames.
        OSError: if it cannot be written; an earlier file stays.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_animation([Image.new("L", (4, 4), 9 * i) for i in range(3)], f"{folder}/walk.gif").name
        'walk.gif'
    """
    if not frames:
        raise ValueError("frames must hold at least one image, got none")
    target = Path(path)
    duration = round(1000 / frames_per_second)
    with atomic_write(target) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=duration, loop=0, lossless=True)
    return target


def save_images(
    images: Sequence[Image.Image], path: str | Path, columns: int | None = None, scale: int | None = 1
) -> Path:
    """Write images atomically: as a grid, an array, or one file per image.

    All keep their pixels, so that they can be read back: a single image has no gap around it.

    Args:
        images: at least one, all of one size and mode.
        path: `x.png` for a grid, or for a single image as it is; `x.npz` for `arr_0`, uint8 (N, H, W, C), the format of
            the ADM evaluator; a path without a suffix, or an existing folder, for `00000.png`, `00001.png`, ...
        columns: images per row of a grid; defaults to a grid as square as possible.
        scale: factor by which a grid is enlarged; `None` chooses it, as `enlarge` does.

    Returns:
        The path.

    Raises:
        ValueError: for another suffix.
        FileExistsError: for a folder that `ddim.bulk` wrote, or with files so numbered beyond these images, which would
            be taken for theirs.
        OSError: if it cannot be written; earlier files stay.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_images([Image.new("L", (4, 4))] * 3, f"{folder}/samples.npz")
        ...     np.load(f"{folder}/samples.npz")["arr_0"].shape
        (3, 4, 4, 1)
    """
    target = check_output_path(path)
    replaced_files(path, len(images))
    if is_folder_path(path):
        with write_folder(target) as folder:
            for image, file in zip(images, output_files(folder, len(images)), strict=True):
                image.save(file)
    elif target.suffix.lower() == ".npz":
        arrays = np.stack([np.atleast_3d(np.asarray(image)) for image in images])
        # To an open file, because NumPy would append its suffix to a name in .NPZ.
        with atomic_write(target) as temporary, temporary.open("wb") as opened:
            np.savez_compressed(opened, arrays)
    else:
        is_single = len(images) == 1
        grid = images[0] if is_single else make_grid(images, columns)
        save_image(enlarge(grid, images[0], 1 if is_single and scale is None else scale), target)
    return target


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write one image atomically, in the format of its suffix.

    Args:
        image: any mode and size.
        path: the file.

    Raises:
        OSError: if it cannot be written; an earlier file stays.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_image(Image.new("L", (4, 4)), f"{folder}/one.png")
        ...     read_image(f"{folder}/one.png").size
        (4, 4)
    """
    with atomic_write(Path(path)) as temporary:
        image.save(temporary)
