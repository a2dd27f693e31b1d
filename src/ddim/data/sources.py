"""Where training images come from: folders, parquet files, data sets on the hub, arrays. A source has a length and
gives the image at an index; it is decoded, fitted and cached by `ddim.data.dataset`.

Nothing that is read can run code: arrays are read without pickles, data sets as tables (`ddim.data.parquet`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ddim.io.hub import HUB_ID
from ddim.io.image_files import find_images, read_image
from ddim.io.images import as_pil

DIGITS = "digits"


@dataclass(frozen=True)
class Source:
    """A collection of encoded images.

    Attributes:
        name: how messages call it.
        count: how many images there are, readable or not.
        fetch: takes indices, and returns for each a function that decodes the image, or raises a ValueError that names
            it. Fetching is quick and done by one thread; decoding may be done by many.
        identity: changes when the images do, as far as can be told without decoding them.
    """

    name: str
    count: int
    fetch: Callable[[Sequence[int]], list[Callable[[], Image.Image]]]
    identity: str


def open_source(source: str, split: str = "train", column: str | None = None) -> Source:
    """Find a collection of images.

    Args:
        source: a folder of images (searched through and through) or of parquet files; a parquet file with a column of
            encoded images; an `.npz` file with an array of uint8 (N, H, W, C) or (N, H, W); `owner/name`, a data set on
            the hub; or `digits`, the 1,797 handwritten digits of scikit-learn, 8x8.
        split: of a data set on the hub.
        column: of images in a table; found by itself unless given.

    Raises:
        FileNotFoundError: if there is nothing there, or no image in it.
        ValueError: if it is of another kind, or has no such column.
        RuntimeError: if the hub cannot be reached or refuses.
    """
    path = Path(source)
    if source == DIGITS:
        from sklearn.datasets import load_digits

        return _from_array(np.round(load_digits().images * (255 / 16)).astype(np.uint8), DIGITS)
    if path.is_dir():
        tables = sorted(str(file) for file in path.rglob("*.parquet"))
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
            return _from_array(_read_npz(path), source)
        raise ValueError(f"{source} is neither a folder of images nor a .parquet or .npz file")
    if path.suffix not in (".parquet", ".npz") and HUB_ID.fullmatch(source):
        from ddim.data.parquet import download

        return download(source, split, column)
    raise FileNotFoundError(
        f"there is no {source}; give a folder of images, a .parquet or .npz file, the id of a data set on the hub such "
        f"as owner/name, or {DIGITS}"
    )


def _from_files(files: list[Path], folder: Path) -> Source:
    def fetch(indices: Sequence[int]) -> list[Callable[[], Image.Image]]:
        return [partial(read_image, files[i]) for i in indices]

    return Source(str(folder), len(files), fetch, _stamp(files))


def _from_tables(files: list[str], name: str, column: str | None) -> Source:
    # `datasets` takes a second to import.
    from ddim.data.parquet import read_parquet

    return read_parquet(files, name, column, _stamp([Path(file) for file in files]))


def _from_array(pixels: np.ndarray, name: str) -> Source:
    if pixels.ndim == 3:
        pixels = pixels[..., None]

    def fetch(indices: Sequence[int]) -> list[Callable[[], Image.Image]]:
        return [partial(as_pil, pixels[i]) for i in indices]

    return Source(name, len(pixels), fetch, hashlib.sha256(pixels.tobytes()).hexdigest())


def _read_npz(path: Path) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # a damaged archive fails in whatever it is taken for
        raise ValueError(f"{path} cannot be read as .npz: {first_line(error)}") from None
    for array in arrays.values():
        if (
            array.dtype == np.uint8
            and array.size
            and (array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3)))
        ):
            return array
    found = ", ".join(f"{key}: {array.dtype} {array.shape}" for key, array in arrays.items())
    raise ValueError(f"{path} has no array of images, uint8 (N, H, W, C) with C 1 or 3; it holds {found or 'nothing'}")


def _stamp(files: Sequence[Path]) -> str:
    """A hash of files' paths, sizes and times."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
