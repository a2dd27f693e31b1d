"""Images of one size: decoded, fitted to the model, cached as bytes, read by index.

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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ddim.data.base import Source
from ddim.data.config import DataConfig
from ddim.data.inspection import inspect_images
from ddim.data.sources import open_source
from ddim.io.cache import Cache
from ddim.io.images import fit_image

logger = logging.getLogger(__name__)

FitFunction = Callable[[Image.Image], np.ndarray]
"""Fits a decoded image to the model: uint8 (C, H, W)."""

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

    Example:
        >>> dataset: ImageDataset = CachedImageDataset(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
        >>> dataset.shape
        (3, 1, 8, 8)
    """

    shape: tuple[int, int, int, int]
    fingerprint: str
    identity: str
    location: str

    def read(self, indices: Tensor) -> Tensor:
        """Read images by index.

        Args:
            indices: int64 (n,).

        Returns:
            uint8 (n, C, H, W).
        """
        ...


class CachedImageDataset:
    """Images that are decoded already.

    Args:
        pixels: uint8 (N, C, H, W).
        location: where they are kept, for messages.
        fingerprint: defaults to the SHA-256 of the pixels.
        identity: of the files that hold the images; defaults to the fingerprint.

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
    ) -> None:
        self.pixels, self.location = pixels, location
        self.shape = (pixels.shape[0], pixels.shape[1], pixels.shape[2], pixels.shape[3])
        self.fingerprint = fingerprint or hashlib.sha256(pixels.numpy().data).hexdigest()
        self.identity = identity or self.fingerprint

    def read(self, indices: Tensor) -> Tensor:
        """Read images by index.

        Args:
            indices: int64 (n,).

        Returns:
            uint8 (n, C, H, W), on the device of the pixels.
        """
        return self.pixels[indices.to(self.pixels.device)]


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
            One uint8 (C, H, W) per index; `None` for an image that cannot be read.

        Raises:
            ValueError: if more images than allowed cannot be read.
        """

        def read(decode: Callable[[], Image.Image]) -> np.ndarray | ValueError:
            try:
                return self.fit(decode())
            except ValueError as error:
                return error
            except Exception as error:  # some damage shows only in the conversion
                return ValueError(f"an image cannot be converted: {error}")

        results = list(self._pool.map(read, self.source.fetch(indices)))
        for index, result in zip(indices, results, strict=True):
            if isinstance(result, ValueError):
                self.errors.add(index, str(result))
        return [None if isinstance(result, ValueError) else result for result in results]

    def decode_all(self) -> Iterator[np.ndarray]:
        """Decode and fit all images, chunk by chunk, leaving out those that cannot be read.

        Yields:
            Chunks of uint8 (n, C, H, W), none of them empty.

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

    Example:
        >>> pixel = Image.new("L", (1, 1), 7)
        >>> source = Source("gray", 2, lambda indices: [lambda: pixel for _ in indices], identity="")
        >>> decoder = Decoder(source, lambda image: np.asarray(image)[None], DecodeErrors("gray", 0))
        >>> LazyImageDataset(decoder, (1, 1, 1)).read(torch.tensor([1, 1, 0])).shape
        torch.Size([3, 1, 1, 1])
    """

    location = "no cache: they are decoded at each visit"

    def __init__(self, decoder: Decoder, shape: tuple[int, int, int]) -> None:
        self.decoder = decoder
        self.shape = (decoder.source.count, *shape)
        self.fingerprint = self.identity = _hash_identity(decoder.source)

    def read(self, indices: Tensor) -> Tensor:
        """Decode images by index.

        Args:
            indices: int64 (n,).

        Returns:
            uint8 (n, C, H, W).

        Raises:
            ValueError: if more images than allowed, or all images, cannot be read.
        """
        visited = indices.tolist()
        decoded = dict(zip(visited, self.decoder.decode(visited), strict=True))
        for index, pixels in decoded.items():
            substitute = index
            while pixels is None:
                substitute = (substitute + 1) % self.shape[0]
                if substitute == index:
                    raise self.decoder.errors.none_readable()
                (pixels,) = self.decoder.decode([substitute])
            decoded[index] = pixels
        return torch.from_numpy(np.stack([decoded[index] for index in visited]))


def open_dataset(config: DataConfig, size: int, channels: int, shared: bool = False) -> ImageDataset:
    """Open the images of a configuration, and decode them where they are to be cached.

    Args:
        config: which images, and how they are fitted and cached.
        size: height and width that the model takes, in pixels.
        channels: 1 for gray, 3 for color.
        shared: whether several processes of this machine read them.

    Returns:
        N images, (N, channels, size, size); with `crop: random` their sides are an eighth larger.

    Raises:
        FileNotFoundError: if the source does not exist or holds no image.
        ValueError: if it is of another kind, or more images than allowed cannot be read.
        RuntimeError: if the hub cannot be reached or refuses.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (20, 10)).save(f"{folder}/a.png")
        ...     open_dataset(DataConfig(source=folder), size=8, channels=3).shape
        (1, 3, 8, 8)
    """
    source = open_source(config.source, config.split, config.column)
    inspect_images(source, channels)
    stored_size = math.ceil(size * 9 / 8) if config.crop == "random" else size
    shape = (channels, stored_size, stored_size)

    def fit(image: Image.Image) -> np.ndarray:
        pixels = np.asarray(fit_image(image, stored_size, stored_size, channels, crop=config.crop != "none"))
        return np.ascontiguousarray(pixels.reshape(stored_size, stored_size, channels).transpose(2, 0, 1))

    decoder = Decoder(source, fit, DecodeErrors(source.name, config.max_unreadable))
    num_bytes = source.count * math.prod(shape)
    cache = choose_cache(num_bytes, shared) if config.cache == "auto" else config.cache
    with contextlib.ExitStack() as stack:
        stack.callback(decoder.close)
        if cache == "disk":
            key = json.dumps([source.identity, shape, config.crop])
            dataset = _open_disk_cache(hashlib.sha256(key.encode()).hexdigest(), shape, decoder)
            if dataset is not None:
                return dataset
        if cache == "none" or (cache == "disk" and num_bytes > MEMORY_CACHE_BYTES):
            stack.pop_all()
            return LazyImageDataset(decoder, shape)
        pixels = torch.from_numpy(np.concatenate(list(decoder.decode_all())))
        return CachedImageDataset(pixels, identity=_hash_identity(source))


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


def _open_disk_cache(entry: str, shape: tuple[int, int, int], decoder: Decoder) -> CachedImageDataset | None:
    """Map cached images into memory, decoding them first where they are missing.

    The entry holds the pixels, a JSON object that describes them, and the length of that in 8 bytes.

    Args:
        entry: the name in the cache.
        shape: (C, H, W) of each image.
        decoder: decodes the images.

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
        text = json.dumps({"sha256": digest.hexdigest(), "unreadable": list(reasons.values())}).encode()
        yield text + struct.pack("<Q", len(text))

    def parse(content: np.ndarray) -> tuple[CachedImageDataset, list[str]]:
        (length,) = struct.unpack("<Q", content[-8:].tobytes())
        pixels, text = np.split(content[:-8], [len(content) - 8 - length])
        about = json.loads(text.tobytes())
        images = torch.from_numpy(pixels.reshape(-1, *shape))
        location, identity = f"a memory map in {cache.folder}", _hash_identity(decoder.source)
        return CachedImageDataset(images, location, about["sha256"], identity), about["unreadable"]

    cached = cache.read(entry, parse)
    if cached is None:
        # This run has counted the images that cannot be read, whether it could write the cache or not.
        return result[0] if cache.write(entry, chunks()) and (result := cache.read(entry, parse)) else None
    dataset, unreadable = cached
    # An earlier run wrote the cache: its unreadable images count against this run's limit too.
    for index, reason in enumerate(unreadable):
        decoder.errors.add(index, reason)
    return dataset
