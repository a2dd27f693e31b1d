"""Training images: read once through `datasets`, fitted to the model, kept in memory as bytes.

The order is a function of the seed alone: epoch e visits the images in a permutation drawn from (seed, e), and step n
takes the n-th batch of the endless sequence of epochs. A run that resumes needs to know nothing but its step.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ddim.images import find_images, fit_image


def load_images(path: Path, size: int, channels: int) -> Tensor:
    """Read a collection of images.

    Args:
        path: a folder of images (searched through and through), or a parquet file in the Hugging Face layout, with a
            column of encoded images.
        size: height and width to fit every image to (centre crop, Lanczos).
        channels: 1 for grey, 3 for colour.

    Returns:
        uint8 (N, channels, size, size).

    Raises:
        FileNotFoundError: if there is nothing there, or no image in it.
        ValueError: if a file is neither a folder nor parquet, has no images, or one of them cannot be decoded.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; give a folder of images or a parquet file")
    rows = _open(path)
    images = np.empty((len(rows), channels, size, size), np.uint8)
    for index, row in enumerate(tqdm(rows, desc="reading images", unit="image", leave=False, disable=None)):
        content, name = (row["bytes"], row["path"]) if row else (None, None)
        # A path that stands in a parquet file is not followed: it could lead anywhere.
        source = name if path.is_dir() else content and io.BytesIO(content)
        try:
            if not source:
                raise ValueError("it is missing")
            with Image.open(source) as image:
                pixels = np.asarray(fit_image(image, size, size, channels))
        except Exception as error:  # every decoder fails in its own way
            raise ValueError(f"image {name or index} of {path} cannot be read: {error}") from None
        images[index] = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(images)


def _open(path: Path) -> Any:
    """The rows of a data set, each {"bytes", "path"} of an encoded image, or `None`."""
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # errors come as exceptions as well
    if path.is_dir():
        return [{"bytes": None, "path": str(file)} for file in find_images(path)]
    if path.suffix != ".parquet":
        raise ValueError(f"{path} is neither a folder of images nor a .parquet file")
    try:
        rows = datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # Every reader underneath has errors of its own.
        raise ValueError(f"{path} cannot be read as parquet: {error.__cause__ or error}") from None
    columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        columns = [name for name in rows.column_names if name == "image"]
    if not columns or not len(rows):
        raise ValueError(f"{path} has no column of images; its columns are {', '.join(rows.column_names)}")
    try:
        return rows.select_columns(columns[0]).cast_column(columns[0], datasets.Image(decode=False))[columns[0]]
    except Exception as error:
        raise ValueError(f"the column {columns[0]} of {path} holds no images: {error}") from None


def fingerprint(images: Tensor) -> str:
    """A hash of the images, so that a run cannot go on with others."""
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


class Batches:
    """The endless, seeded sequence of batches.

    Args:
        images: uint8 (N, C, H, W).
        batch_size: may exceed N.
        seed: decides the order.
    """

    def __init__(self, images: Tensor, batch_size: int, seed: int) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __getitem__(self, step: int) -> Tensor:
        """The batch of a step, uint8 (batch_size, C, H, W); an epoch's last batch runs over into the next."""
        N = len(self.images)
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return self.images[torch.tensor([int(self._epoch_order(p // N)[p % N]) for p in positions])]

    def _epoch_order(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(len(self.images), generator=generator_for(self.seed, "order", epoch))
        return self._order


def generator_for(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator that depends on these three alone: what happens in step n is then a function of (seed, n), with
    no state to save.
    """
    digest = hashlib.sha256(f"{seed} {purpose} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
