"""Sets of images to compare: files, data sets, or samples of a model.

Images are read one batch at a time and decoded to one size and mode. A set of files is identified by a hash of its
pixels, samples by their model, settings and seeds.
"""

from __future__ import annotations

import hashlib
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

from ddim.data.base import Decoded, Source
from ddim.data.inspection import find_dtype
from ddim.data.sources import open_source
from ddim.io.array_files import TIFF_SUFFIXES, decode_tiff
from ddim.io.class_labels import arguments_of_batch
from ddim.io.images import as_array, decode_image, fit_array, fit_image, to_values
from ddim.io.pixel_format import EIGHT_BIT, PixelFormat, measured_format
from ddim.io.reading import reader_reason
from ddim.pipeline import ImagePipeline
from ddim.validation import shown

BATCH_SIZE = 64

Shape = tuple[int, int, int]
"""(C, H, W)."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one shape.

    Attributes:
        name: the set's name in tables.
        shape: (C, H, W).
        count: number of images.
        read_batch: reads or samples a batch anew, given its number: uint8 (n, C, H, W), or float32, with the range of
            `pixel_format` scaled to [0, 1], for values of other types. All batches have `BATCH_SIZE` images but the
            last.
        from_files: whether the images come from files, so that their features are cached.
        read_column: returns the values of another column of a table as text, one per image; `None` where there is no
            such column.
        pixel_format: the type and the ranges of the values.
        label_columns: returns the names of the columns that can say which class an image belongs to.
        class_names: returns the classes of a column in the order of the data set, if that declares them.

    Example:
        >>> pixels = torch.zeros(100, 1, 4, 4, dtype=torch.uint8)
        >>> images = ImageSet("zeros", (1, 4, 4), 100, pixels.split(BATCH_SIZE).__getitem__, from_files=False)
        >>> len(images), [len(batch) for batch in images.batches()]
        (2, [64, 36])
    """

    name: str
    shape: Shape
    count: int
    read_batch: Callable[[int], Tensor]
    from_files: bool
    read_column: Callable[[str], list[str] | None] = lambda name: None
    pixel_format: PixelFormat = EIGHT_BIT
    label_columns: Callable[[], tuple[str, ...]] = tuple
    class_names: Callable[[str], tuple[str, ...]] = lambda name: ()

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-self.count // BATCH_SIZE)

    def batches(self) -> Iterator[Tensor]:
        """Iterate over all batches in order."""
        return map(self.read_batch, range(len(self)))


def open_files(
    source: str,
    count: int | None = None,
    shape: Shape | None = None,
    split: str = "train",
    pixel_format: PixelFormat | None = None,
) -> ImageSet:
    """Open images of files or of a data set.

    Args:
        source: a folder, an `.npz` or parquet file, a data set on the hub, `digits`, or tar shards: `x.tar`, which is a
            file or stands for `x-000000.tar`, ...
        count: the number of images, from the first on; defaults to all.
        shape: (C, H, W) that the images are fitted to by center crop and Lanczos resampling; defaults to that of the
            first image.
        split: the split of a data set on the hub.
        pixel_format: the type and the ranges of the values; defaults to the type of the images (8 bits for files of
            several depths) and the range of each channel, for which all of them are read.

    Returns:
        The set.

    Raises:
        FileNotFoundError: if the images do not exist.
        ValueError: if `source` is of another kind, or has fewer images than `count`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Image.new("L", (9, 8)).save(f"{folder}/one.png")
        ...     open_files(folder).shape
        (1, 8, 9)
    """
    images = _open_shards(Path(source)) if source.endswith(".tar") else open_source(source, split)
    if count is not None and count > images.count:
        raise ValueError(f"count must be at most {images.count}, the number of images in {source}, got {count}")
    total = images.count if count is None else count
    channels, height, width = _shape_of(images.fetch([0])[0]()) if shape is None else shape
    dtype = find_dtype(images, channels) if pixel_format is None else pixel_format.dtype

    def fit(image: Decoded) -> np.ndarray:
        if dtype == "uint8" and isinstance(image, Image.Image):
            return np.atleast_3d(np.asarray(fit_image(image, height, width, channels)))
        name = getattr(image, "filename", "") or f"an image of {source}"
        return fit_array(as_array(image, dtype, name), height, width, channels, name=name)

    def read_values(number: int) -> Tensor:
        decoders = images.fetch(range(number * BATCH_SIZE, min((number + 1) * BATCH_SIZE, total)))
        pixels = torch.from_numpy(np.stack([fit(decode()) for decode in decoders]))
        return pixels.permute(0, 3, 1, 2).contiguous()

    if pixel_format is None and dtype != "uint8":
        ranges = [
            values.float().flatten(2).aminmax(dim=2) for values in map(read_values, range(-(-total // BATCH_SIZE)))
        ]
        low = torch.cat([bounds.min for bounds in ranges]).amin(0)
        pixel_format = measured_format(
            dtype, low.tolist(), torch.cat([bounds.max for bounds in ranges]).amax(0).tolist()
        )
    checked = pixel_format or EIGHT_BIT

    def read_batch(number: int) -> Tensor:
        return _scale(read_values(number), checked)

    def read_column(name: str) -> list[str] | None:
        values = images.read_column(name)
        return None if values is None else values[:total]

    return ImageSet(
        *(source, (channels, height, width), total, read_batch, True, read_column, checked),
        label_columns=images.label_columns,
        class_names=images.class_names,
    )


def _shape_of(image: Decoded) -> Shape:
    """Return the shape (C, H, W) of an image; 3 channels for all modes with color or alpha."""
    if isinstance(image, np.ndarray):
        return image.shape[2], image.shape[0], image.shape[1]
    is_gray = image.mode in ("L", "1", "F") or image.mode.startswith("I")
    return 1 if is_gray else 3, image.height, image.width


def _scale(values: Tensor, pixel_format: PixelFormat) -> Tensor:
    """Return bytes as they are, and other values with their range scaled to [0, 1], not clipped."""
    return values if pixel_format.is_eight_bit else pixel_format.to_samples(values) / 2 + 0.5


def sample_image_set(
    pipe: ImagePipeline, count: int, seed: int = 0, name: str = "samples", **settings: Any
) -> ImageSet:
    """Return samples of a pipeline from seeds `seed` to `seed + count - 1`, equal to those of bulk sampling.

    Images are sampled when a batch is read.

    Args:
        pipe: the pipeline.
        count: number of images.
        seed: seed of the first image.
        name: the set's name in tables.
        settings: `eta`, `num_inference_steps`, `timesteps`, `order`, `use_sigma_hat` and `use_clipped_model_output` of
            `DDIMPipeline.__call__`; its arguments of classes and guidance, labels one for all images or one per image.

    Returns:
        The set; with labels, its column `label` holds the names of the classes.

    Example:
        >>> from ddim import DDIMPipeline
        >>> digits = sample_image_set(DDIMPipeline.from_pretrained("mnist"), 100, num_inference_steps=20)
        >>> digits.shape, len(digits)
        ((1, 28, 28), 2)
    """
    check_own_number_of_steps(pipe, **settings)
    quiet_pipe = pipe.quiet_copy()
    size, pixel_format = min(BATCH_SIZE, count), pipe.pixel_format

    def read_batch(number: int) -> Tensor:
        start = number * size
        # A last batch in full size, because networks round differently for batches of different sizes.
        seeds = range(seed + start, seed + start + size)
        arguments = arguments_of_batch(settings, start, size, count)
        images = quiet_pipe(size, seeds=seeds, output_type="np", return_dict=False, **arguments)[0]
        pixels = torch.from_numpy(to_values(images, pixel_format))[: count - start]
        return _scale(pixels.permute(0, 3, 1, 2).contiguous(), pixel_format)

    columns: dict[str, list[str]] = {}
    if (labels := settings.get("class_labels")) is not None and pipe.classes is not None:
        columns["label"] = [pipe.classes.name_of(index) for index in pipe.classes.resolve(labels, count).tolist()]
    return ImageSet(
        name,
        pipe.sample_shape,
        count,
        read_batch,
        from_files=False,
        read_column=columns.get,
        pixel_format=pixel_format,
        label_columns=lambda: tuple(columns),
    )


def check_own_number_of_steps(
    pipe: ImagePipeline, num_inference_steps: int = 0, timesteps: Sequence[int] | None = None, **settings: Any
) -> None:
    """Check that a model takes the number of steps that is asked for: what is recorded must be what was measured.

    Args:
        pipe: the pipeline.
        num_inference_steps: S.
        timesteps: used instead of S.
        settings: others of `sample_image_set`.

    Raises:
        ValueError: if the model was distilled to fewer steps, which it would take instead.

    Example:
        >>> from ddim import DDIMPipeline
        >>> check_own_number_of_steps(DDIMPipeline.from_pretrained("mnist"), 50)
    """
    distilled = getattr(pipe.scheduler, "distilled_steps", None)
    if distilled is not None and timesteps is None and num_inference_steps > distilled:
        raise ValueError(
            f"num_inference_steps must be at most {distilled}, those of this distilled model, got {num_inference_steps}"
        )


def batch_sha256(batch: Tensor) -> str:
    """Return a hash of a batch of images, (n, C, H, W).

    Example:
        >>> batch_sha256(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))[:8]
        'df3f6198'
    """
    return hashlib.sha256(batch.numpy().tobytes()).hexdigest()


def set_sha256(images: ImageSet, hashes: Sequence[str]) -> str:
    """Return the hash of a set of images from those of its batches.

    Args:
        images: the set.
        hashes: `batch_sha256` of each batch, in order.

    Example:
        >>> len(set_sha256(open_files("digits", 1), ["0" * 64]))
        64
    """
    return hashlib.sha256(str((images.count, images.shape, list(hashes))).encode()).hexdigest()


def _check_size(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return a member of a tar file unless its size is negative, after which `tarfile` may find it again for ever."""
    if entry.size < 0:
        raise tarfile.ReadError(f"the member {shown(entry.name)} must have a size of at least 0, got {entry.size}")
    return entry


def _open_shards(path: Path) -> Source:
    """Open the images of tar files; members are located once and read from their offsets."""
    shards = [path] if path.is_file() else sorted(p for p in path.parent.glob(f"{path.stem}-*.tar") if p.is_file())
    if not shards:
        raise FileNotFoundError(f"neither {path} nor {path.stem}-000000.tar exists")
    members: list[tuple[Path, int, int, str]] = []
    for shard in shards:
        try:
            with tarfile.open(shard, "r:") as archive:
                entries = [entry for entry in map(_check_size, archive) if entry.isfile()]
        except Exception as error:  # damaged headers raise errors of many kinds
            raise ValueError(f"{shard} cannot be read as tar: {reader_reason(error)}") from None
        # macOS adds hidden files, `._x.png`.
        images = [
            entry
            for entry in entries
            if entry.name.lower().endswith((".png", ".jpg", ".jpeg", ".webp", *TIFF_SUFFIXES))
            and Path(entry.name).name[0] != "."
        ]
        for entry in images:
            if entry.offset_data + entry.size > shard.stat().st_size:
                raise ValueError(f"{shard} is truncated: it ends within {shown(entry.name)}")
        members += [(shard, entry.offset_data, entry.size, entry.name) for entry in images]
    if not members:
        raise FileNotFoundError(f"{path} contains no images")

    def decode(shard: Path, offset: int, size: int, name: str) -> Decoded:
        with shard.open("rb") as stream:
            stream.seek(offset)
            content = io.BytesIO(stream.read(size))
        is_tiff = name.lower().endswith(TIFF_SUFFIXES)
        return (decode_tiff if is_tiff else decode_image)(content, f"{shard}:{name}")

    def fetch(indices: Sequence[int]) -> list[Callable[[], Decoded]]:
        return [partial(decode, *members[i]) for i in indices]

    return Source(str(path), len(members), fetch, "")
