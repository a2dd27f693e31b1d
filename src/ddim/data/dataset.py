"""Training images: decoded once, fitted to the model, kept as bytes, and handed out in a seeded order.

The order is a function of the seed alone: epoch e visits the images in a permutation drawn from (seed, e), step n takes
the n-th batch of the endless sequence of epochs, and process r of P takes the r-th part of that batch. Each image is
seen once an epoch, whatever P, and a run that resumes needs to know nothing but its step.

Decoded images are kept in memory, or, where they are large or several processes share them, in a memory map in the
user's cache folder; sets too large for that are decoded at each visit, by threads. Either way the next batch is fetched
while the network works on this one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ddim.data.sources import Source, open_source
from ddim.io.atomic import replace_folder
from ddim.io.cache import cache_folder
from ddim.io.images import fit_image
from ddim.training.config import DataConfig

logger = logging.getLogger(__name__)

CHUNK = 256
IN_MEMORY = 2**31
ON_DISK = 2**38
"""Up to so many bytes `cache: auto` keeps decoded images in memory, or on disk."""


class ImageDataset(Protocol):
    """Images of one size.

    Attributes:
        shape: (N, C, H, W).
        fingerprint: changes when they do; runs go on only with the same.
        place: where they are kept, for people.
    """

    shape: tuple[int, int, int, int]
    fingerprint: str
    place: str

    def take(self, indices: Tensor) -> Tensor:
        """The images at int64 indices (n,): uint8 (n, C, H, W)."""
        ...


class CachedPictures:
    """Images that are decoded already.

    Args:
        pixels: uint8 (N, C, H, W).
        place: where they are kept.
        fingerprint: computed unless given.
    """

    def __init__(self, pixels: Tensor, place: str = "memory", fingerprint: str | None = None) -> None:
        self.pixels, self.place = pixels, place
        self.shape = (pixels.shape[0], pixels.shape[1], pixels.shape[2], pixels.shape[3])
        self.fingerprint = fingerprint or hashlib.sha256(pixels.numpy().data).hexdigest()

    def take(self, indices: Tensor) -> Tensor:
        return self.pixels[indices.to(self.pixels.device)]


class LazyImageDataset:
    """Images that are decoded when they are asked for; in place of one that cannot be read comes the next that can.

    Args:
        source: of encoded images.
        fit: a decoded image to uint8 (C, H, W).
        shape: (C, H, W).
        unreadable: where those that cannot be read are counted.
    """

    place = "nowhere: they are decoded at each visit"

    def __init__(
        self,
        source: Source,
        fit: Callable[[Image.Image], np.ndarray],
        shape: tuple[int, int, int],
        unreadable: DecodeErrors,
    ) -> None:
        self.source, self.fit, self.unreadable = source, fit, unreadable
        self.shape = (source.count, *shape)
        self.fingerprint = hashlib.sha256(source.identity.encode()).hexdigest()
        self._pool = ThreadPoolExecutor(os.cpu_count())

    def take(self, indices: Tensor) -> Tensor:
        wanted = indices.tolist()
        decoded = dict(zip(wanted, decode(self.source, wanted, self.fit, self._pool, self.unreadable), strict=True))
        for index, pixels in decoded.items():
            other = index
            while pixels is None:
                other = (other + 1) % self.source.count
                if other == index:
                    raise _nothing_readable(self.source, self.unreadable)
                (pixels,) = decode(self.source, [other], self.fit, self._pool, self.unreadable)
            decoded[index] = pixels
        return torch.from_numpy(np.stack([decoded[index] for index in wanted]))


class DecodeErrors:
    """Counts and names the images that cannot be read.

    Args:
        source: how messages call the collection.
        limit: so many are skipped; one more is a ValueError.
    """

    def __init__(self, source: str, limit: int) -> None:
        self.source, self.limit = source, limit
        self.reasons: dict[int, str] = {}

    def add(self, index: int, reason: str) -> None:
        """Count one, once."""
        if index in self.reasons:
            return
        self.reasons[index] = reason
        if len(self.reasons) > self.limit:
            first = next(iter(self.reasons.values()))
            raise ValueError(
                f"{len(self.reasons)} images of {self.source} cannot be read, more than data.max_unreadable allows "
                f"({self.limit}); the first: {first}"
            )
        logger.warning("%s; it is skipped", reason)


def decode(
    source: Source,
    indices: Sequence[int],
    fit: Callable[[Image.Image], np.ndarray],
    pool: ThreadPoolExecutor,
    unreadable: DecodeErrors,
) -> list[np.ndarray | None]:
    """Decode and fit some images of a source, by the pool's threads; `None` for those that cannot be read."""

    def read(opener: Callable[[], Image.Image]) -> np.ndarray | ValueError:
        try:
            return fit(opener())
        except ValueError as error:
            return error
        except Exception as error:  # an image can be damaged in ways that only its conversion finds
            return ValueError(f"an image cannot be converted: {error}")

    results = list(pool.map(read, source.fetch(indices)))
    for index, result in zip(indices, results, strict=True):
        if isinstance(result, ValueError):
            unreadable.add(index, str(result))
    return [None if isinstance(result, ValueError) else result for result in results]


def open_pictures(config: DataConfig, size: int, channels: int, shared: bool = False) -> ImageDataset:
    """Find the images that a run learns from, and decode them where they are to be cached.

    Args:
        config: where they are and how they are fitted.
        size: height and width that the model takes.
        channels: 1 for grey, 3 for colour.
        shared: several processes of this machine read them.

    Returns:
        N images, (N, channels, size, size); with `crop: random` they are an eighth larger.

    Raises:
        FileNotFoundError: if there is nothing there, or no image in it.
        ValueError: if it is of another kind, or more images than allowed cannot be read.
        RuntimeError: if the hub cannot be reached or refuses.
        OSError: if the cache cannot be written.
    """
    source = open_source(config.source, config.split, config.column)
    stored = math.ceil(size * 9 / 8) if config.crop == "random" else size
    shape = (channels, stored, stored)

    def fit(image: Image.Image) -> np.ndarray:
        pixels = np.asarray(fit_image(image, stored, stored, channels, crop=config.crop != "none"))
        return np.ascontiguousarray(pixels.reshape(stored, stored, channels).transpose(2, 0, 1))

    unreadable = DecodeErrors(source.name, config.max_unreadable)
    cache = choose_cache(source.count * math.prod(shape), shared) if config.cache == "auto" else config.cache
    if cache == "none":
        return LazyImageDataset(source, fit, shape, unreadable)
    if cache == "disk":
        key = json.dumps([source.identity, shape, config.crop])
        return _on_disk(cache_folder() / "images" / hashlib.sha256(key.encode()).hexdigest(), source, fit, unreadable)
    pixels = list(_decode_all(source, fit, unreadable))
    return CachedPictures(torch.from_numpy(np.concatenate(pixels)))


def choose_cache(size: int, shared: bool) -> str:
    """`memory`, `disk` or `none` for so many bytes of decoded images."""
    if size <= IN_MEMORY and not shared:
        return "memory"
    folder = cache_folder()
    while not folder.exists():
        folder = folder.parent
    return "disk" if size <= min(ON_DISK, shutil.disk_usage(folder).free // 2) else "none"


def _decode_all(
    source: Source, fit: Callable[[Image.Image], np.ndarray], unreadable: DecodeErrors
) -> Iterator[np.ndarray]:
    """Chunks of uint8 (n, C, H, W), without the images that cannot be read; ValueError if none is left."""
    decoded = 0
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=source.count, desc="reading images", unit="image", leave=False, disable=None) as bar,
    ):
        for first in range(0, source.count, CHUNK):
            indices = range(first, min(first + CHUNK, source.count))
            chunk = [pixels for pixels in decode(source, indices, fit, pool, unreadable) if pixels is not None]
            bar.update(len(indices))
            decoded += len(chunk)
            if chunk:
                yield np.stack(chunk)
    if not decoded:
        raise _nothing_readable(source, unreadable)


def _nothing_readable(source: Source, unreadable: DecodeErrors) -> ValueError:
    return ValueError(f"no image of {source.name} can be read; the first: {next(iter(unreadable.reasons.values()))}")


def _on_disk(
    folder: Path, source: Source, fit: Callable[[Image.Image], np.ndarray], unreadable: DecodeErrors
) -> CachedPictures:
    """A memory map of decoded images in a folder, made now unless it is there."""
    if not (folder / "about.json").is_file():
        digest = hashlib.sha256()
        shape: list[int] = []
        with replace_folder(folder) as temporary:
            with (temporary / "pixels.bin").open("wb") as file:
                for chunk in _decode_all(source, fit, unreadable):
                    content = chunk.tobytes()
                    digest.update(content)
                    file.write(content)
                    shape = [(shape or [0])[0] + len(chunk), *chunk.shape[1:]]
            about = {
                "source": source.name,
                "shape": shape,
                "sha256": digest.hexdigest(),
                "unreadable": list(unreadable.reasons.values()),
            }
            (temporary / "about.json").write_text(json.dumps(about))
    about = json.loads((folder / "about.json").read_text())
    for index, reason in enumerate(about["unreadable"] if not unreadable.reasons else ()):
        unreadable.add(index, reason)
    # Copy on write: PyTorch wants memory that could be written.
    pixels = np.memmap(folder / "pixels.bin", np.uint8, "c", shape=tuple(about["shape"]))
    return CachedPictures(torch.from_numpy(pixels), f"a memory map in {folder}", about["sha256"])


def split_holdout(count: int, holdout: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the images to train on, in order, and of those that are not; which is decided by the seed."""
    order = torch.randperm(count, generator=generator_for(seed, "holdout", 0)) if holdout else torch.arange(count)
    return order[holdout:].sort().values, order[:holdout].sort().values


class Batches:
    """The endless, seeded sequence of batches, or one process's part of it.

    Args:
        pictures: the images.
        indices: of those that are trained on, int64 (N,).
        batch_size: of all processes together; may exceed N.
        seed: decides the order and the augmentation.
        size: height and width that the model takes; larger images are cropped at random.
        horizontal_flip: mirror each with probability 1/2.
        part: this process, and how many there are.
    """

    def __init__(
        self,
        pictures: ImageDataset,
        indices: Tensor,
        batch_size: int,
        seed: int,
        size: int,
        horizontal_flip: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.pictures, self.indices, self.batch_size, self.seed = pictures, indices, batch_size, seed
        self.size, self.horizontal_flip = size, horizontal_flip
        rank, processes = part
        local = batch_size // processes
        self.local = slice(rank * local, (rank + 1) * local)
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __getitem__(self, step: int) -> Tensor:
        """The images of a step, uint8 (n, C, size, size); an epoch's last batch runs over into the next."""
        images = self.pictures.take(self.positions(step))
        generator = generator_for(self.seed, "augment", step)
        room = self.pictures.shape[2] - self.size
        if room:
            corners = torch.randint(room + 1, (self.batch_size, 2), generator=generator)[self.local]
            images = crop(images, corners.to(images.device), self.size)
        if self.horizontal_flip:
            flipped = (torch.rand(self.batch_size, generator=generator) < 0.5)[self.local].to(images.device)
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        return images

    def positions(self, step: int) -> Tensor:
        """Which images a step takes, int64 (n,)."""
        N = len(self.indices)
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.local]
        epochs = positions // N
        visited = range(int(epochs[0]), int(epochs[-1]) + 1)
        parts = [self._epoch_order(epoch)[positions[epochs == epoch] % N] for epoch in visited]
        return self.indices[torch.cat(parts)]

    def _epoch_order(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(len(self.indices), generator=generator_for(self.seed, "order", epoch))
        return self._order


def crop(images: Tensor, corners: Tensor, size: int) -> Tensor:
    """A square window of each image, (n, C, H, W) to (n, C, size, size), at its corner (n, 2): top, left."""
    n, C = images.shape[:2]
    span = torch.arange(size, device=images.device)
    rows = (corners[:, 0, None] + span)[:, None, :, None]
    columns = (corners[:, 1, None] + span)[:, None, None, :]
    batch = torch.arange(n, device=images.device)[:, None, None, None]
    channels = torch.arange(C, device=images.device)[None, :, None, None]
    return images[batch, channels, rows, columns]


class Prefetcher:
    """Calls a function of the step one step ahead, in a thread of its own.

    Args:
        fetch: the function.
        last: the step after which nothing is fetched.
    """

    def __init__(self, fetch: Callable[[int], Any], last: int) -> None:
        self.fetch, self.last = fetch, last
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[Any]] | None = None

    def __getitem__(self, step: int) -> Any:
        if self._next is None or self._next[0] != step:
            self._next = step, self._pool.submit(self.fetch, step)
        result = self._next[1].result()
        self._next = (step + 1, self._pool.submit(self.fetch, step + 1)) if step < self.last else None
        return result

    def close(self) -> None:
        """Wait for what is being fetched, and end the thread."""
        self._pool.shutdown(cancel_futures=True)


def loader_rate(batches: Batches, seconds: float = 0.2) -> float:
    """Images a second that the data gives when nothing else is done."""
    batches[0]
    started, count, step = time.perf_counter(), 0, 1
    while time.perf_counter() - started < seconds:
        count += len(batches[step])
        step += 1
    return count / (time.perf_counter() - started)


def generator_for(seed: int, purpose: str, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on these alone: what happens in step n is then a function of (seed, n), with no state to
    save.
    """
    digest = hashlib.sha256(f"{seed} {purpose} {index}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
