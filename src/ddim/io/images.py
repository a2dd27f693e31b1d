"""Tensors <-> PIL / NumPy, grids, files.

Inside the model a picture is a float tensor (N, C, H, W) in [-1, 1]; outside it is bytes, or floats in [0, 1]. C is 1
for grey, 3 for colour.
"""

from __future__ import annotations

import os
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ddim.io.atomic import atomic_write, write_folder
from ddim.validation import choice, join_choices

OUTPUT_TYPES = ("pil", "np", "pt")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
PICTURES = {".png": "a grid", ".npz": ""}
ANIMATION_SUFFIXES = {".gif": "an animation", ".webp": "an animation"}
GRID_GAP = 2
OPENING = threading.Lock()


def to_unit_range(samples: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], clipped."""
    return (samples / 2 + 0.5).clamp(0, 1)


def to_output(samples: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    """Samples as the caller wants them.

    Args:
        samples: (N, C, H, W) in [-1, 1], any device.
        output_type: `pil` for a list of N images, `np` for float32 (N, H, W, C) in [0, 1], `pt` for (N, C, H, W) in [0,
            1] on the same device.

    Raises:
        ValueError: for another output type.
    """
    check_output_type(output_type)
    unit = to_unit_range(samples)
    if output_type == "pt":
        return unit
    array = unit.permute(0, 2, 3, 1).float().cpu().numpy()
    return array if output_type == "np" else [as_pil(pixels) for pixels in to_bytes(array)]


def to_samples(
    images: Any, channels: int, height: int, width: int, resize: bool = False, name: str = "images"
) -> Tensor:
    """Pictures as samples of a model.

    Args:
        images: a PIL image or a list of them; a NumPy array (N, H, W, C) or (H, W, C), uint8 or floats in [0, 1]; or a
            floating tensor (N, C, H, W) or (C, H, W) in [-1, 1].
        channels: C that the model takes: 1 for grey, 3 for colour.
        height: H that it takes.
        width: W that it takes.
        resize: fit PIL images of other sizes and modes, as `fit_image` does; otherwise they are refused.
        name: how messages call them.

    Returns:
        float32 (N, C, H, W) in [-1, 1], or float64 for a float64 tensor.

    Raises:
        TypeError: for anything else.
        ValueError: for no images, another size, mode or dtype, or numbers that are not finite or out of range.
    """
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, list | tuple) and all(isinstance(image, Image.Image) for image in images):
        fitted = [
            _as_the_model_takes(
                image, channels, height, width, resize, getattr(image, "filename", "") or f"{name}[{index}]"
            )
            for index, image in enumerate(images)
        ]
        images = np.stack(fitted) if fitted else np.empty((0, height, width, channels), np.uint8)
    if isinstance(images, np.ndarray):
        samples = _from_array(images[None] if images.ndim == 3 else images, name)
    elif isinstance(images, Tensor):
        samples = _check_range(images[None] if images.ndim == 3 else images, -1, 1, name)
    else:
        raise TypeError(
            f"{name} is a {type(images).__name__}; give PIL images, a NumPy array (N, H, W, C) or a tensor (N, C, H, W)"
        )
    if samples.ndim != 4 or samples.shape[1:] != (channels, height, width) or not len(samples):
        layout = "(N, C, H, W)" if isinstance(images, Tensor) else "(N, H, W, C)"
        shape = (channels, height, width) if isinstance(images, Tensor) else (height, width, channels)
        raise ValueError(
            f"{name} has shape {tuple(images.shape)}; the model takes {layout} of at least one image of {shape}"
            + ("; arrays are not resized, PIL images are" if resize else "")
        )
    return samples


def _as_the_model_takes(
    image: Image.Image, channels: int, height: int, width: int, resize: bool, name: str
) -> np.ndarray:
    """uint8 (H, W, C)."""
    mode = "L" if channels == 1 else "RGB"
    if not resize and (image.size != (width, height) or image.mode != mode):
        raise ValueError(
            f"{name} is {image.width}x{image.height} {image.mode}; the model takes {width}x{height} {mode}; resizing "
            "(resize=True, --resize) crops the middle, scales it and converts it, with white behind what is transparent"
        )
    return np.atleast_3d(np.asarray(fit_image(image, height, width, channels)))


def _from_array(array: np.ndarray, name: str) -> Tensor:
    """(N, H, W, C) of bytes, or of floats in [0, 1], to (N, C, H, W) in [-1, 1]; other ranks keep their shape."""
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} is an array of {array.dtype}; it must be uint8, or floating in [0, 1]")
    # A copy, because arrays can be read-only, such as np.asarray makes of a PIL image, or strided backwards.
    values = torch.from_numpy(np.array(array, np.uint8 if array.dtype == np.uint8 else np.float32, order="C"))
    unit = values / 255 if array.dtype == np.uint8 else _check_range(values, 0, 1, name)
    samples = 2 * unit - 1
    return samples.movedim(-1, 1) if samples.ndim == 4 else samples


def _check_range(values: Tensor, low: int, high: int, name: str) -> Tensor:
    """Floats, float32 or wider, in [low, high] up to rounding."""
    if not values.is_floating_point():
        raise ValueError(f"{name} is a tensor of {values.dtype}; it must be floating in [{low}, {high}]")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} holds NaN or infinity; it must be finite")
    if values.numel() and (float(values.min()) < low - 1e-3 or float(values.max()) > high + 1e-3):
        raise ValueError(
            f"{name} lies in [{float(values.min()):.4g}, {float(values.max()):.4g}]; it must be in [{low}, {high}]"
        )
    return values.to(torch.promote_types(values.dtype, torch.float32))


def find_images(path: str | Path) -> list[Path]:
    """The image files in a folder, searched through and through, by their suffixes, sorted.

    Raises:
        FileNotFoundError: if there is none.
    """
    files = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise FileNotFoundError(f"there is no image in {path}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
    return files


def read_image(path: str | Path) -> Image.Image:
    """Decode a still image.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as `decode_image`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return decode_image(path, str(path))


def decode_image(source: str | Path | IO[bytes], name: str) -> Image.Image:
    """Decode a still image.

    Args:
        source: a file's path, or what is in it.
        name: how messages call it.

    Raises:
        ValueError: if it cannot be decoded, is animated, or is so large that decoding it would be an attack on memory
            (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    try:
        # Python's filters of warnings are one for all threads.
        with OPENING, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(source)
        with opened as image:
            # MPO is a camera's JPEG with a preview or a depth map behind it, not an animation.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            image.load()
            still = image.copy()
        # As images that PIL itself opened: messages call an image by its file.
        setattr(still, "filename", name)  # noqa: B010 - the copy's class does not declare it
    except Exception as error:  # every decoder fails in its own way
        reason = "it is no image of a known format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{name} cannot be read: {reason}") from None
    if frames > 1:
        raise ValueError(f"{name} is an animation of {frames} frames; give a still image")
    return still


def check_output_type(output_type: Any) -> None:
    """ValueError unless it is one of `OUTPUT_TYPES`."""
    choice("output_type", output_type, OUTPUT_TYPES)


def to_bytes(array: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] to uint8, rounded."""
    return (array * 255).round().astype(np.uint8)


def as_pil(pixels: np.ndarray) -> Image.Image:
    """uint8 (H, W, C) as an image, grey for one channel."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def fit_image(image: Image.Image, height: int, width: int, channels: int, crop: bool = True) -> Image.Image:
    """Crop the largest centred part of the right shape, resize it (Lanczos), and convert it to grey or colour.

    An image of the right size is only converted. Transparency is laid on white. Without `crop`, the whole image is
    squeezed into shape.
    """
    if image.mode.startswith("I"):
        # PIL's conversion clips 16 bits at 255 where it should scale.
        image = Image.fromarray((np.asarray(image, np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size == (width, height):
        return image
    if crop:
        crop_width = max(1, min(image.width, round(image.height * width / height)))
        crop_height = max(1, min(image.height, round(image.width * height / width)))
        left, top = (image.width - crop_width) // 2, (image.height - crop_height) // 2
        image = image.crop((left, top, left + crop_width, top + crop_height))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def make_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Images of one size in rows, with a gap of 2 pixels between and around them.

    Args:
        images: at least one, all of one size and mode.
        columns: images a row; about as many as rows unless given.

    Raises:
        ValueError: for no images.
    """
    if not images:
        raise ValueError("a grid needs at least one image")
    columns = columns or round(len(images) ** 0.5 + 0.49)
    rows = -(-len(images) // columns)
    width, height = images[0].size
    grid = Image.new(images[0].mode, (columns * (width + GRID_GAP) + GRID_GAP, rows * (height + GRID_GAP) + GRID_GAP))
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(image, (column * (width + GRID_GAP) + GRID_GAP, row * (height + GRID_GAP) + GRID_GAP))
    return grid


def stack_rows(rows: Sequence[Sequence[Image.Image]], columns: int = 16) -> Image.Image:
    """Rows of pictures that belong together column by column, such as originals above their reconstructions.

    Args:
        rows: at least one, all of one length, all images of one size and mode.
        columns: where rows are longer, they are broken there, and the next part follows below.

    Raises:
        ValueError: for no images.
    """
    length = max((len(row) for row in rows), default=0)
    if not length:
        raise ValueError("a grid needs at least one image")
    columns = min(columns, length)
    blank = Image.new(rows[0][0].mode, rows[0][0].size)
    cells = []
    for first in range(0, length, columns):
        for row in rows:
            part = list(row[first : first + columns])
            cells += part + [blank] * (columns - len(part))
    return make_grid(cells, columns)


def is_folder_path(path: str | Path) -> bool:
    """Whether an output path means a folder: it is one, ends in a separator, or has no suffix."""
    return str(path).endswith(("/", os.sep)) or Path(path).is_dir() or not Path(path).suffix


def is_animation_path(path: str | Path) -> bool:
    """Whether an output path means an animation."""
    return Path(path).suffix.lower() in ANIMATION_SUFFIXES


def check_output_path(
    path: str | Path, allowed: Mapping[str, str] = PICTURES, folder_allowed: bool = True, name: str = "out"
) -> Path:
    """Find out, before any work, whether a result can be written here.

    Args:
        path: as for `save_images`, for one.
        allowed: suffixes, and what they mean.
        folder_allowed: whether a folder is meant by a path without a suffix.
        name: the argument's name, for the message.

    Returns:
        The path.

    Raises:
        ValueError: for a suffix that is not written here.
        FileNotFoundError: if the folder that shall hold it does not exist.
        NotADirectoryError: if a file stands where a folder is wanted.
        PermissionError: if that folder cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() not in allowed if not is_folder_path(path) else not folder_allowed:
        names = [f"{suffix} ({meaning})" if meaning else suffix for suffix, meaning in allowed.items()]
        choices = join_choices([*names, "be a folder"] if folder_allowed else names)
        raise ValueError(f"{name} must end in {choices}, got {str(path)!r}")
    folder = target if target.is_dir() else target.parent
    if not folder.exists():
        raise FileNotFoundError(f"the folder {folder} does not exist; make it, or write {target.name} elsewhere")
    if not folder.is_dir() or (is_folder_path(path) and target.exists() and not target.is_dir()):
        raise NotADirectoryError(f"{target if folder.is_dir() else folder} is a file, not a folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(f"the folder {folder} cannot be written: {error.strerror}") from None
    return target


def output_files(path: str | Path, count: int) -> list[Path]:
    """The files that `save_images` writes for `count` pictures."""
    target = Path(path)
    return [target / f"{index:05d}.png" for index in range(count)] if is_folder_path(path) else [target]


def save_animation(frames: Sequence[Image.Image], path: str | Path, frames_per_second: float = 10) -> Path:
    """Write an animation that repeats, whole or not at all.

    Args:
        frames: at least one, all of one size.
        path: in `.gif` (256 colours a frame) or `.webp` (lossless).
        frames_per_second: above 0; GIF rounds the time of a frame to 1/100 s.

    Returns:
        Where it is.

    Raises:
        ValueError: for no frames.
        OSError: as `save_images`.
    """
    if not frames:
        raise ValueError("an animation needs at least one frame")
    target = Path(path)
    duration = round(1000 / frames_per_second)
    with atomic_write(target) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=duration, loop=0, lossless=True)
    return target


def save_images(images: Sequence[Image.Image], path: str | Path, columns: int | None = None) -> Path:
    """Write pictures, whole or not at all.

    Args:
        images: at least one.
        path: `x.png` for a grid; `x.npz` for `arr_0`, uint8 (N, H, W, C), the format of the ADM evaluator; anything
            without a suffix, or an existing folder, for one `00000.png` an image.
        columns: of a grid, as for `make_grid`.

    Returns:
        Where they are.

    Raises:
        OSError: and its kinds, as `check_output_path`, or when the disk is full; what was there before stays.
    """
    target = check_output_path(path)
    if is_folder_path(path):
        with write_folder(target) as folder:
            for image, file in zip(images, output_files(folder, len(images)), strict=True):
                image.save(file)
    elif target.suffix.lower() == ".npz":
        arrays = np.stack([np.atleast_3d(np.asarray(image)) for image in images])
        # To an open file: NumPy would give a name in .NPZ another suffix.
        with atomic_write(target) as temporary, temporary.open("wb") as opened:
            np.savez_compressed(opened, arrays)
    else:
        save_picture(make_grid(images, columns), target)
    return target


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write one picture as it is, whole or not at all, in the format of its suffix; OSError if it cannot be."""
    with atomic_write(Path(path)) as temporary:
        picture.save(temporary)
