"""Where images come from: folders, parquet files, arrays, datasets on the hub.

A source has a length and returns the image at an index; `ddim.data.dataset` decodes, fits and caches it.

Nothing that is read can run code: arrays are read without pickles, datasets as tables (`ddim.data.parquet`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ddim.data.base import Decoded, Source, first_line
from ddim.data.metadata import METADATA_FILE, find_metadata, read_metadata
from ddim.extras import require
from ddim.io.array_files import MAX_CHANNELS, load_npy, read_pixels
from ddim.io.hub import HUB_ID
from ddim.io.image_files import find_images
from ddim.io.images import as_pil
from ddim.io.npz import open_npz
from ddim.io.pixel_format import DTYPES, stored_dtype
from ddim.validation import join_choices

DIGITS = "digits"
FOLDER = "folder"
"""The column of a folder's images that holds the names of their folders."""
ARRAYS_OF_IMAGES = f"(N, H, W) or (N, H, W, C) of {join_choices(DTYPES)} with C from 1 to {MAX_CHANNELS}"
"""What an array must be, for messages."""


def open_source(source: str, split: str = "train", column: str | None = None) -> Source:
    """Open a collection of images.

    Args:
        source: a folder of images or `.npy` arrays (searched recursively), or of parquet files; a parquet file with a
            column of encoded images; an `.npz` or `.npy` file with an array (N, H, W, C) or (N, H, W) of uint8, uint16,
            int16 or floats, C from 1 to 16; `owner/name`, a dataset on the hub; or `digits`, the 1,797 handwritten
            digits of scikit-learn, 8x8.
        split: split of a dataset on the hub.
        column: name of the column of images in a table; defaults to the first column of images.

    Returns:
        The source, with nothing decoded yet.

    Raises:
        FileNotFoundError: if it does not exist or holds no image.
        ValueError: if it is of another kind, or has no such column.
        RuntimeError: if the hub cannot be reached or refuses.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/images.npz", np.zeros((5, 8, 8), np.uint8))
        ...     open_source(f"{folder}/images.npz").count
        5
    """
    path = Path(source)
    if source == DIGITS:
        require(f"the data set {DIGITS}", "sklearn")
        from sklearn.datasets import load_digits

        digits = load_digits()
        columns = {"label": list(map(str, digits.target.tolist()))}
        images = _from_array(np.round(digits.images * (255 / 16)).astype(np.uint8), DIGITS)
        return replace(images, read_column=columns.get, labels="the column label", label_columns=lambda: tuple(columns))
    if path.is_dir():
        tables = sorted(
            str(file) for file in path.rglob("*.parquet") if file.is_file() and not file.name.startswith(".")
        )
        try:
            return _from_files(find_images(path), path)
        except FileNotFoundError:
            if not tables:
                raise
        return _from_tables(tables, source, column)
    if path.is_file():
        if path.suffix == ".parquet":
            return _from_tables([source], source, column)
        if path.suffix == ".npz":
            images = _from_array(_read_npz(path), source)
            names = _npz_labels(path, images.count)
            labels = f"the {'array' if len(names) == 1 else 'arrays'} {', '.join(names)}" if names else None
            read_column = partial(_read_npz_column, path, images.count)
            return replace(images, read_column=read_column, labels=labels, label_columns=lambda: names)
        if path.suffix == ".npy":
            return _from_npy(path)
        raise ValueError(f"{source} is neither a folder of images nor a .parquet, .npz or .npy file")
    if path.suffix not in (".parquet", ".npz", ".npy") and HUB_ID.fullmatch(source):
        require("reading a data set on the hub", "datasets")
        from ddim.data.parquet import read_hub_dataset

        return read_hub_dataset(source, split, column)
    raise FileNotFoundError(
        f"{source} does not exist; expected a folder of images, a .parquet, .npz or .npy file, the id of a dataset on "
        f"the hub such as owner/name, or {DIGITS}"
    )


def _from_files(files: list[Path], folder: Path) -> Source:
    def fetch(indices: Sequence[int]) -> list[Callable[[], Decoded]]:
        return [partial(read_pixels, files[i]) for i in indices]

    parents = {file.parent for file in files}
    metadata = find_metadata(parents, folder)
    found = [f"{len(parents)} folders"] if len(parents) > 1 else []
    found += [METADATA_FILE] if metadata else []

    def label_columns() -> tuple[str, ...]:
        columns = read_metadata(metadata, files) if metadata else {}
        return (*columns, *([FOLDER] if len(parents) > 1 and FOLDER not in columns else []))

    def read_column(name: str) -> list[str] | None:
        columns = read_metadata(metadata, files) if metadata else {}
        if name in columns:
            return columns[name]
        return [file.parent.name for file in files] if name == FOLDER and len(parents) > 1 else None

    return Source(
        str(folder),
        len(files),
        fetch,
        _stamp(files),
        read_column,
        lambda index: str(files[index]),
        " and ".join(found) or None,
        label_columns,
    )


def _from_tables(files: list[str], name: str, column: str | None) -> Source:
    # `datasets` takes a second to import.
    require("reading parquet files", "datasets")
    from ddim.data.parquet import read_parquet

    return read_parquet(files, name, column, _stamp([Path(file) for file in files]))


def _from_array(pixels: np.ndarray, name: str, identity: str | None = None) -> Source:
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    decode: Callable[[np.ndarray], Decoded] = np.array
    if pixels.dtype == np.uint8 and pixels.shape[3] <= 4:
        decode = as_pil

    def fetch(indices: Sequence[int]) -> list[Callable[[], Decoded]]:
        return [partial(decode, pixels[i]) for i in indices]

    identity = identity or hashlib.sha256(pixels.tobytes()).hexdigest()
    return Source(name, len(pixels), fetch, identity, describe=lambda index: f"image {index} of {name}")


def _from_npy(path: Path) -> Source:
    images = load_npy(path)
    if not _holds_images(images.dtype, images.shape):
        raise ValueError(f"{path} must hold images as an array {ARRAYS_OF_IMAGES}, got {images.dtype} {images.shape}")
    return _from_array(images, str(path), _stamp([path]))


def _holds_images(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bool:
    """Return whether an array can be images."""
    try:
        stored_dtype(dtype, "")
    except ValueError:
        return False
    return bool(np.prod(shape)) and (len(shape) == 3 or (len(shape) == 4 and shape[3] <= MAX_CHANNELS))


def _read_npz(path: Path) -> np.ndarray:
    """Return the first array of an `.npz` file that can be images, without reading pickles."""
    try:
        with open_npz(path) as file:
            for name, header in file.headers.items():
                if header.dtype.hasobject:
                    raise ValueError(f"its array {name!r} is a pickle, which can run code")
            # Arrays of bytes first: they are images more surely than others.
            for name, header in sorted(file.headers.items(), key=lambda item: item[1].dtype != np.uint8):
                if _holds_images(header.dtype, header.shape):
                    return file.read(name)
            content = ", ".join(f"{name}: {header.dtype} {header.shape}" for name, header in file.headers.items())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as .npz: {first_line(error)}") from None
    raise ValueError(f"{path} must hold images as an array {ARRAYS_OF_IMAGES}, got {content or 'nothing'}")


def _npz_labels(path: Path, count: int) -> tuple[str, ...]:
    """Name the arrays of an `.npz` file that can be classes: one integer, boolean or text per image."""
    with open_npz(path) as file:
        return tuple(
            name for name, header in file.headers.items() if header.shape == (count,) and header.dtype.kind in "biuU"
        )


def _read_npz_column(path: Path, count: int, name: str) -> list[str] | None:
    """Return an array of one number or text per image, as text."""
    with open_npz(path) as file:
        header = file.headers.get(name)
        if header is None or header.shape != (count,) or header.dtype.kind not in "biufU":
            return None
        return ["none" if value == "" else str(value) for value in file.read(name).tolist()]


def _stamp(files: Sequence[Path]) -> str:
    """Hash the paths, sizes and modification times of files."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        # Names may be in any encoding.
        digest.update(os.fsencode(file.resolve()) + f" {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
