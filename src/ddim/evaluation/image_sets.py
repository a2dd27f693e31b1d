"""Sets of images to be compared: files, data sets, or what a model paints.

Images are read one batch at a time, decoded to one size and mode. A set of files is known by a hash of its pixels, a
painted one by its model, settings and seeds.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddim.data.base import Source
from ddim.data.sources import open_source
from ddim.io.images import decode_image, fit_image, is_folder_path, to_bytes
from ddim.pipeline import DDIMPipeline

BATCH = 64

Shape = tuple[int, int, int]
"""(C, H, W)."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one shape.

    Attributes:
        name: how tables call it.
        shape: (C, H, W).
        count: how many there are.
        batch: reads or paints the images of a batch anew, given its number: uint8 (n, C, H, W). All have `BATCH` but
            the last.
        files: whether they come from files, so that what is computed of them is worth keeping.
    """

    name: str
    shape: Shape
    count: int
    batch: Callable[[int], Tensor]
    files: bool

    def __len__(self) -> int:
        """How many batches there are."""
        return -(-self.count // BATCH)

    def batches(self) -> Iterator[Tensor]:
        """All batches in order."""
        return map(self.batch, range(len(self)))


def open_files(source: str, count: int | None = None, shape: Shape | None = None, split: str = "train") -> ImageSet:
    """Images of files or of a data set.

    Args:
        source: what `ddim train --data` takes (a folder, an `.npz` or parquet file, a data set on the hub, `digits`),
            or tar shards: `x.tar`, which is a file or stands for `x-000000.tar`, ...
        count: the first so many only.
        shape: (C, H, W) to fit them to: centre crop, Lanczos; that of the first image unless given.
        split: of a data set on the hub.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is of another kind, or has fewer images than `count`.
    """
    found = _open_shards(Path(source)) if source.endswith(".tar") else open_source(source, split)
    if count is not None and count > found.count:
        raise ValueError(f"{source} has {found.count} images; {count} are asked for")
    total = found.count if count is None else count
    if shape is None:
        first = found.fetch([0])[0]()
        shape = (1 if first.mode in ("L", "1") else 3, first.height, first.width)
    channels, height, width = shape

    def batch(number: int) -> Tensor:
        decoders = found.fetch(range(number * BATCH, min((number + 1) * BATCH, total)))
        images = [fit_image(decode(), height, width, channels) for decode in decoders]
        pixels = torch.from_numpy(np.stack([np.atleast_3d(np.asarray(image)) for image in images]))
        return pixels.permute(0, 3, 1, 2).contiguous()

    return ImageSet(source, shape, total, batch, files=True)


def sample_image_set(pipe: DDIMPipeline, count: int, seed: int = 0, name: str = "samples", **settings: Any) -> ImageSet:
    """What a pipeline paints from seeds `seed` to `seed + count - 1`, in the batches in which it fills files.

    Args:
        pipe: paints.
        count: how many.
        seed: of the first.
        name: of the set.
        settings: `eta`, `num_inference_steps`, `timesteps`, `order`, `use_sigma_hat` and `use_clipped_model_output` of
            `DDIMPipeline.__call__`.
    """
    fast = DDIMPipeline(pipe.unet, pipe.scheduler, pipe.engine)
    fast.set_progress_bar_config(disable=True)
    size = min(BATCH, count)

    def batch(number: int) -> Tensor:
        start = number * size
        seeds = range(seed + start, seed + start + size)
        images = fast(size, seeds=seeds, output_type="np", return_dict=False, **settings)[0]
        pixels = torch.from_numpy(to_bytes(np.asarray(images)))[: count - start]
        return pixels.permute(0, 3, 1, 2).contiguous()

    return ImageSet(name, pipe.sample_shape, count, batch, files=False)


def is_model(source: str) -> bool:
    """Whether a name means a model rather than images: a built-in one, or a folder with a pipeline."""
    from ddim.io.hub import MODEL_INDEX, builtin_models

    return source in builtin_models() or (is_folder_path(source) and (Path(source) / MODEL_INDEX).is_file())


def _open_shards(path: Path) -> Source:
    """The images of tar files, in order; members are found once and read from where they lie."""
    shards = [path] if path.is_file() else sorted(path.parent.glob(f"{path.stem}-*.tar"))
    if not shards:
        raise FileNotFoundError(f"there is no {path}, nor {path.stem}-000000.tar")
    members: list[tuple[Path, int, int, str]] = []
    for shard in shards:
        try:
            with tarfile.open(shard, "r:") as archive:
                entries = [entry for entry in archive if entry.isfile()]
        except tarfile.TarError as error:
            raise ValueError(f"{shard} cannot be read as tar: {error}") from None
        images = [entry for entry in entries if entry.name.lower().endswith((".png", ".jpg", ".jpeg", ".webp"))]
        members += [(shard, entry.offset_data, entry.size, entry.name) for entry in images]
    if not members:
        raise FileNotFoundError(f"{path} has no images")

    def decode(shard: Path, offset: int, size: int, name: str) -> Image.Image:
        with shard.open("rb") as stream:
            stream.seek(offset)
            return decode_image(io.BytesIO(stream.read(size)), f"{shard}:{name}")

    def fetch(indices: Sequence[int]) -> list[Callable[[], Image.Image]]:
        return [partial(decode, *members[i]) for i in indices]

    return Source(str(path), len(members), fetch, "")
