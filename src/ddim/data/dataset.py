"""Images of one size: decoded, fitted to the model, cached in the type of their values, read by index.

Decoded images are kept in memory, or, where they are large or several processes share them, in a memory map in the
user's cache folder; datasets too large for either are decoded at each visit, by threads. Where the cache folder cannot
be used, they are kept in memory if they are not large.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ddim.data.base import Decoded, Source
from ddim.data.config import DataConfig
from ddim.data.inspection import find_dtype, inspect_images
from ddim.data.labels import ImageLabels, read_labels
from ddim.data.sources import open_source
from ddim.io.cache import Cache
from ddim.io.images import as_array, fit_array, fit_image, height_and_width
from ddim.io.pixel_format import EIGHT_BIT, PixelFormat, measured_format

logger = logging.getLogger(__name__)

FitFunction = Callable[[Decoded], np.ndarray]
"""Fits a decoded image to the model: (C, H, W), all of one type."""

DECODE_CHUNK_IMAGES = 256
MEMORY_CACHE_BYTES = 2**31
"""Decoded images up to this size are kept in memory where `cache` is `auto`."""
DISK_CACHE_BYTES = 2**38
"""Decoded images up to this size are kept on disk where `cache` is `auto`."""


class ImageDataset(Protocol):
    """Images of one size, read by index.

    Attributes:
        shape: (N, C, H, W).
        fingerprint: changes whenever the images do.
        identity: changes whenever the files do. A run resumes only with the same fingerprint or the same identity,
            because the fingerprint of images without a cache is not that of their pixels.
        location: where decoded images are kept, for messages.
        pixel_format: the type and the ranges of the images' values.
        labels: classes of the N images; `None` where they are not used.
        unused_labels: what says which class an image belongs to, where it is not used; `None` for nothing.

    Example:
        >>> dataset: ImageDataset = CachedImageDataset(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
        >>> dataset.shape
        (3, 1, 8, 8)
    """

    shape: tuple[int, int, int, int]
    fingerprint: str
    identity: str
    location: str
    pixel_format: PixelFormat
    labels: ImageLabels | None
    unused_labels: str | None

    def read(self, indices: Tensor) -> Tensor:
        """Read images by index.

        Args:
            indices: int64 (n,).

        Returns:
            (n, C, H, W) in the data's units: uint8, or float32 for values of other types.
        """
        ...

    def read_labeled(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Read images by index, with the classes of these very images.

        Args:
            indices: int64 (n,).

        Returns:
            The images, as `read` returns them; their classes, int64 (n,) on the same device, or `None` without labels.
        """
        ...


class CachedImageDataset:
    """Images that are decoded already.

    Args:
        pixels: (N, C, H, W) of the format's type.
        location: where they are kept, for messages.
        fingerprint: defaults to the SHA-256 of the pixels.
        identity: of the files that hold the images; defaults to the fingerprint.
        pixel_format: the type and the ranges of the values.
        labels: classes of the N images, on the device of the pixels.
        unused_labels: what says which class an image belongs to, where it is not used.

    Example:
        >>> dataset = CachedImageDataset(torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1))
        >>> dataset.read(torch.tensor([2, 0])).flatten()
        tensor([2, 0], dtype=torch.uint8)
    """

    def __init__(
        self,
        pixels: Tensor,
        location: str = "memory",
        fingerprint: str | None = None,
        identity: str | None = None,
        pixel_format: PixelFormat = EIGHT_BIT,
        labels: ImageLabels | None = None,
        unused_labels: str | None = None,
    ) -> None:
        self.pixels, self.location, self.pixel_format = pixels, location, pixel_format
        self.labels, self.unused_labels = labels, unused_labels
        self.shape = (pixels.shape[0], pixels.shape[1], pixels.shape[2], pixels.shape[3])
        self.fingerprint = fingerprint or hashlib.sha256(pixels.numpy().data).hexdigest()
        self.identity = identity or self.fingerprint

    def read(self, indices: Tensor) -> Tensor:
        """Read images by index.

        Args:
            indices: int64 (n,).

        Returns:
            (n, C, H, W), uint8 or float32, on the device of the pixels.
        """
        return _as_values(self.pixels[self._on_device(indices)])

    def read_labeled(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Read images by index, with their classes.

        Args:
            indices: int64 (n,).

        Returns:
            Images (n, C, H, W), and classes, int64 (n,), or `None`; on the device of the pixels.
        """
        indices = self._on_device(indices)
        return self.read(indices), None if self.labels is None else self.labels.indices[indices]

    def _on_device(self, indices: Tensor) -> Tensor:
        device = self.pixels.device
        if device.type == "cuda" and indices.device.type == "cpu":
            # A copy of pageable memory would wait for the device.
            return indices.pin_memory().to(device, non_blocking=True)
        return indices.to(device)

    def to(self, device: torch.device) -> CachedImageDataset:
        """Return the images and their classes on a device.

        Args:
            device: the device.
        """
        return CachedImageDataset(
            self.pixels.to(device),
            str(device),
            self.fingerprint,
            self.identity,
            self.pixel_format,
            None if self.labels is None else self.labels.to(device),
            self.unused_labels,
        )


class DecodeErrors:
    """Counts the images that cannot be read, up to a limit.

    Args:
        source: how messages refer to the collection.
        limit: number of images that may be unreadable.

    Attributes:
        reasons: why an image cannot be read, by index, in the order of discovery.

    Example:
        >>> errors = DecodeErrors("photos", limit=0)
        >>> errors.add(3, "3.png cannot be read")
        Traceback (most recent call last):
        ValueError: 1 images of photos cannot be read, data.max_unreadable allows 0; the first: 3.png cannot be read
    """

    def __init__(self, source: str, limit: int) -> None:
        self.source, self.limit = source, limit
        self.reasons: dict[int, str] = {}

    def add(self, index: int, reason: str) -> None:
        """Count an image once, however often it is visited, and log a warning.

        Args:
            index: index of the image in its source.
            reason: one sentence that names the image.

        Raises:
            ValueError: if more images than the limit cannot be read.
        """
        if index in self.reasons:
            return
        self.reasons[index] = reason
        if len(self.reasons) > self.limit:
            raise ValueError(
                f"{len(self.reasons)} images of {self.source} cannot be read, data.max_unreadable allows "
                f"{self.limit}; the first: {self._first_reason()}"
            )
        logger.warning("%s; it is skipped", reason)

    def none_readable(self) -> ValueError:
        """Return the error to raise where no image of the collection can be read."""
        return ValueError(f"no image of {self.source} can be read; the first: {self._first_reason()}")

    def _first_reason(self) -> str:
        return next(iter(self.reasons.values()))


class Decoder:
    """Decodes and fits the images of a source with a pool of threads.

    Args:
        source: the encoded images.
        fit: fits a decoded image.
        errors: counts the images that cannot be read.

    Example:
        >>> pixel = Image.new("L", (1, 1), 7)
        >>> source = Source("gray", 2, lambda indices: [lambda: pixel for _ in indices], identity="")
        >>> decoder = Decoder(source, lambda image: np.asarray(image)[None], DecodeErrors("gray", 0))
        >>> [pixels.tolist() for pixels in decoder.decode([1])]
        [[[[7]]]]
        >>> decoder.close()
    """

    def __init__(self, source: Source, fit: FitFunction, errors: DecodeErrors) -> None:
        self.source, self.fit, self.errors = source, fit, errors
        self._pool = ThreadPoolExecutor(os.cpu_count())

    def decode(self, indices: Sequence[int]) -> list[np.ndarray | None]:
        """Decode and fit images.

        Args:
            indices: which images of the source.

        Returns:
            One (C, H, W) per index; `None` for an image that cannot be read.

        Raises:
            ValueError: if more images than allowed cannot be read.
        """

        def read(index: int, decode: Callable[[], Decoded]) -> np.ndarray | ValueError:
            decoded: Decoded | None = None
            try:
                decoded = decode()
                return self.fit(decoded)
            except ValueError as error:
                # Arrays do not know their names, PIL images do.
                is_array = isinstance(decoded, np.ndarray)
                return ValueError(f"{self.source.describe(index)}: {error}") if is_array else error
            except Exception as error:  # some damage shows only in the conversion
                return ValueError(f"an image cannot be converted: {error}")

        results = list(self._pool.map(read, indices, self.source.fetch(indices)))
        for index, result in zip(indices, results, strict=True):
            if isinstance(result, ValueError):
                self.errors.add(index, str(result))
        return [None if isinstance(result, ValueError) else result for result in results]

    def decode_all(self) -> Iterator[np.ndarray]:
        """Decode and fit all images, chunk by chunk, leaving out those that cannot be read.

        Yields:
            Chunks of (n, C, H, W), none of them empty.

        Raises:
            ValueError: if more images than allowed, or all images, cannot be read.
        """
        count, decoded = self.source.count, 0
        with tqdm(total=count, desc="reading images", unit="image", leave=False, disable=None) as bar:
            for start in range(0, count, DECODE_CHUNK_IMAGES):
                indices = range(start, min(start + DECODE_CHUNK_IMAGES, count))
                chunk = [pixels for pixels in self.decode(indices) if pixels is not None]
                bar.update(len(indices))
                decoded += len(chunk)
                if chunk:
                    yield np.stack(chunk)
        if not decoded:
            raise self.errors.none_readable()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


class LazyImageDataset:
    """Images that are decoded at each visit; an unreadable image is replaced by the next readable one.

    Args:
        decoder: decodes and fits the images.
        shape: (C, H, W).
        pixel_format: the type and the ranges of the images' values.
        labels: classes of all images of the source; a substitute has its own.
        unused_labels: what says which class an image belongs to, where it is not used.

    Example:
        >>> pixel = Image.new("L", (1, 1), 7)
        >>> source = Source("gray", 2, lambda indices: [lambda: pixel for _ in indices], identity="")
        >>> decoder = Decoder(source, lambda image: np.asarray(image)[None], DecodeErrors("gray", 0))
        >>> LazyImageDataset(decoder, (1, 1, 1)).read(torch.tensor([1, 1, 0])).shape
        torch.Size([3, 1, 1, 1])
    """

    location = "no cache: they are decoded at each visit"

    def __init__(
        self,
        decoder: Decoder,
        shape: tuple[int, int, int],
        pixel_format: PixelFormat = EIGHT_BIT,
        labels: ImageLabels | None = None,
        unused_labels: str | None = None,
    ) -> None:
        self.decoder, self.pixel_format = decoder, pixel_format
        self.labels, self.unused_labels = labels, unused_labels
        self.shape = (decoder.source.count, *shape)
        self.fingerprint = self.identity = _hash_identity(decoder.source)

    def read(self, indices: Tensor) -> Tensor:
        """Decode images by index.

        Args:
            indices: int64 (n,).

        Returns:
            (n, C, H, W), uint8 or float32.

        Raises:
            ValueError: if more images than allowed, or all images, cannot be read.
        """
        return self.read_labeled(indices)[0]

    def read_labeled(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Decode images by index, with their classes: that of its substitute for an unreadable image.

        Args:
            indices: int64 (n,).

        Returns:
            Images (n, C, H, W), and classes, int64 (n,), or `None`.

        Raises:
            ValueError: if more images than allowed, or all images, cannot be read.
        """
        visited = indices.tolist()
        decoded = dict(zip(visited, self.decoder.decode(visited), strict=True))
        sources = {}
        for index, pixels in decoded.items():
            substitute = index
            while pixels is None:
                substitute = (substitute + 1) % self.shape[0]
                if substitute == index:
                    raise self.decoder.errors.none_readable()
                (pixels,) = self.decoder.decode([substitute])
            decoded[index], sources[index] = pixels, substitute
        images = _as_values(torch.from_numpy(np.stack([decoded[index] for index in visited])))
        if self.labels is None:
            return images, None
        return images, self.labels.indices[torch.tensor([sources[index] for index in visited])]


def open_dataset(config: DataConfig, size: int | Sequence[int], channels: int, shared: bool = False) -> ImageDataset:
    """Open the images of a configuration, and decode them where they are to be cached.

    Args:
        config: which images, and how they are fitted and cached.
        size: height and width that the model takes, in pixels; one number for squares.
        channels: 1 for gray, 2 for gray with alpha, 3 for color, 4 for color with alpha; any number of arrays.
        shared: whether several processes of this machine read them.

    Returns:
        N images, (N, channels, *size); with `crop: random` their sides are an eighth larger.

    Raises:
        FileNotFoundError: if the source does not exist or holds no image.
        ValueError: if it is of another kind, more images than allowed cannot be read, or `data.value_range` does not
            fit.
        RuntimeError: if the hub cannot be reached or refuses.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (20, 10)).save(f"{folder}/a.png")
        ...     open_dataset(DataConfig(source=folder), size=8, channels=3).shape
        (1, 3, 8, 8)
    """
    source = open_source(config.source, config.split, config.column)
    labels = read_labels(source, config.labels, class_names=config.class_names)
    unused_labels = source.labels if labels is None else None
    dtype = find_dtype(source, channels) if config.dtype == "auto" else config.dtype
    given = _given_format(config, dtype, channels)
    if dtype == "uint8":
        inspect_images(source, channels)
    height, width = (math.ceil(side * 9 / 8) if config.crop == "random" else side for side in height_and_width(size))
    shape = (channels, height, width)

    def fit(image: Decoded) -> np.ndarray:
        crop = config.crop != "none"
        if dtype == "uint8" and isinstance(image, Image.Image):
            pixels = np.asarray(fit_image(image, height, width, channels, crop)).reshape(height, width, channels)
        else:
            name = getattr(image, "filename", "") or "the image"
            pixels = fit_array(as_array(image, dtype, name), height, width, channels, crop, name)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    decoder = Decoder(source, fit, DecodeErrors(source.name, config.max_unreadable))
    num_bytes = source.count * math.prod(shape) * np.dtype(dtype).itemsize
    cache = choose_cache(num_bytes, shared) if config.cache == "auto" else config.cache
    with contextlib.ExitStack() as stack:
        stack.callback(decoder.close)
        if cache == "disk":
            key: list[object] = [source.identity, shape, config.crop]
            key += [] if dtype == "uint8" else [dtype]
            entry = hashlib.sha256(json.dumps(key).encode()).hexdigest()
            dataset = _open_disk_cache(entry, shape, decoder, dtype, given)
            if dataset is not None:
                dataset.labels, dataset.unused_labels = _labels_of_readable(labels, decoder), unused_labels
                return dataset
        if cache == "none" or (cache == "disk" and num_bytes > MEMORY_CACHE_BYTES):
            stack.pop_all()
            pixel_format = given or _measure(decoder.decode_all(), dtype)
            return LazyImageDataset(decoder, shape, pixel_format, labels, unused_labels)
        pixels = np.concatenate(list(decoder.decode_all()))
        pixel_format = given or _measure([pixels], dtype)
        return CachedImageDataset(
            torch.from_numpy(pixels),
            identity=_hash_identity(source),
            pixel_format=pixel_format,
            labels=_labels_of_readable(labels, decoder),
            unused_labels=unused_labels,
        )


def _labels_of_readable(labels: ImageLabels | None, decoder: Decoder) -> ImageLabels | None:
    """Return the labels of the images that have been decoded, in their order."""
    return None if labels is None else labels.without(decoder.errors.reasons)


def _given_format(config: DataConfig, dtype: str, channels: int) -> PixelFormat | None:
    """Return the format where it need not be measured: of 8-bit images, and of a range that the configuration gives."""
    if config.value_range is None:
        return EIGHT_BIT if dtype == "uint8" else None
    if dtype == "uint8":
        raise ValueError("data.value_range must be null for images of 8 bits, which are from 0 to 255")
    bounds = np.array(config.value_range, np.float64).reshape(-1, 2).tolist()
    try:
        return PixelFormat.parse(
            {"dtype": dtype, "low": [a for a, _ in bounds], "high": [b for _, b in bounds]}, channels
        )
    except ValueError as error:
        raise ValueError(f"data.value_range: {error}") from None


def _measure(chunks: Iterable[np.ndarray], dtype: str) -> PixelFormat:
    """Return the format of images (n, C, H, W) with the range of their values."""
    bounds = [(chunk.min((0, 2, 3)), chunk.max((0, 2, 3))) for chunk in chunks]
    low, high = np.min([low for low, _ in bounds], 0), np.max([high for _, high in bounds], 0)
    return measured_format(dtype, low.tolist(), high.tolist())


def _as_values(pixels: Tensor) -> Tensor:
    """Return bytes as they are, and other values as float32, which holds 16 bits exactly and has all operations."""
    return pixels if pixels.dtype == torch.uint8 else pixels.float()


def choose_cache(num_bytes: int, shared: bool) -> str:
    """Choose where decoded images are kept.

    Args:
        num_bytes: size of the decoded images.
        shared: whether several processes of this machine read them.

    Returns:
        `memory`, `disk` or `none`.

    Example:
        >>> choose_cache(2**20, shared=False)
        'memory'
    """
    if num_bytes <= MEMORY_CACHE_BYTES and not shared:
        return "memory"
    return "disk" if num_bytes <= min(DISK_CACHE_BYTES, Cache("images").free_bytes() // 2) else "none"


def _hash_identity(source: Source) -> str:
    return hashlib.sha256(source.identity.encode()).hexdigest()


def _open_disk_cache(
    entry: str, shape: tuple[int, int, int], decoder: Decoder, dtype: str, given: PixelFormat | None
) -> CachedImageDataset | None:
    """Map cached images into memory, decoding them first where they are missing.

    The entry holds the pixels, a JSON object that describes them, and the length of that in 8 bytes.

    Args:
        entry: the name in the cache.
        shape: (C, H, W) of each image.
        decoder: decodes the images.
        dtype: of their values.
        given: their format, where it need not be measured.

    Returns:
        The images; `None` if they cannot be cached.
    """
    cache, reasons = Cache("images"), decoder.errors.reasons
    digest = hashlib.sha256()

    def chunks() -> Iterator[bytes]:
        for chunk in decoder.decode_all():
            content = chunk.tobytes()
            digest.update(content)
            yield content
        about = {"sha256": digest.hexdigest(), "unreadable": list(reasons.values()), "indices": list(reasons)}
        text = json.dumps(about).encode()
        yield text + struct.pack("<Q", len(text))

    def parse(content: np.ndarray) -> tuple[CachedImageDataset, dict[int, str]]:
        (length,) = struct.unpack("<Q", content[-8:].tobytes())
        pixels, text = np.split(content[:-8], [len(content) - 8 - length])
        about = json.loads(text.tobytes())
        images = pixels.view(dtype).reshape(-1, *shape)
        pixel_format = given or _measure(np.array_split(images, -(-len(images) // DECODE_CHUNK_IMAGES)), dtype)
        location, identity = f"a memory map in {cache.folder}", _hash_identity(decoder.source)
        dataset = CachedImageDataset(torch.from_numpy(images), location, about["sha256"], identity, pixel_format)
        # Version 0.1 did not record which images cannot be read, and labels would not be those of the others.
        indices = about.get("indices", [] if not about["unreadable"] else None)
        return dataset, dict(zip(indices, about["unreadable"], strict=True))

    cached = cache.read(entry, parse)
    if cached is None:
        # This run has counted the images that cannot be read, whether it could write the cache or not.
        return result[0] if cache.write(entry, chunks()) and (result := cache.read(entry, parse)) else None
    dataset, unreadable = cached
    # An earlier run wrote the cache: its unreadable images count against this run's limit too.
    for index, reason in unreadable.items():
        decoder.errors.add(index, reason)
    return dataset
