"""Batches of a dataset in a seeded order, prefetched by a thread.

The order is a function of the seed alone: epoch e visits the images in a permutation drawn from (seed, e), step n takes
the n-th batch of the endless sequence of epochs, and process r of P takes the r-th part of that batch. Each image is
visited once per epoch, whatever P, and a run that resumes needs to know nothing but its step. Where classes are
balanced, an epoch has as many visits, the same number for each class: images of large classes miss epochs, those of
small ones are visited several times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ddim.data.augment import Augmentation
from ddim.data.dataset import ImageDataset
from ddim.data.seeding import generator_for
from ddim.distributed import SINGLE_PROCESS, ProcessGroup
from ddim.io.images import height_and_width

NO_AUGMENTATION = Augmentation()


def split_holdout(count: int, holdout: int, seed: int) -> tuple[Tensor, Tensor]:
    """Divide the indices of a dataset into those that are trained on and those held out.

    Args:
        count: number of images.
        holdout: number of images to hold out.
        seed: decides which.

    Returns:
        Indices to train on and held-out indices, both int64 in ascending order.

    Example:
        >>> training, held_out = split_holdout(10, holdout=3, seed=0)
        >>> len(training), len(held_out)
        (7, 3)
    """
    order = torch.randperm(count, generator=generator_for(seed, "holdout", 0)) if holdout else torch.arange(count)
    return order[holdout:].sort().values, order[:holdout].sort().values


def balanced_order(classes: Tensor, generator: torch.Generator) -> Tensor:
    """Draw as many images as there are, every class equally often, in random order.

    Within a class no image is visited once more than another. A remainder goes to random classes.

    Args:
        classes: of the images, int64 (N,), on the CPU.
        generator: draws.

    Returns:
        Positions of images, int64 (N,).

    Example:
        >>> classes = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
        >>> order = balanced_order(classes, torch.Generator().manual_seed(0))
        >>> classes[order].bincount()
        tensor([4, 4])
    """
    sizes = classes.bincount()
    members = [part for part in torch.split(classes.argsort(stable=True), sizes.tolist()) if len(part)]
    N, K = len(classes), len(members)
    visits = torch.full((K,), N // K)
    visits[torch.randperm(K, generator=generator)[: N % K]] += 1
    positions = []
    for part, count in zip(members, visits.tolist(), strict=True):
        rounds = range(-(-count // len(part)))
        drawn = torch.cat([part[torch.randperm(len(part), generator=generator)] for _ in rounds] or [part[:0]])
        positions.append(drawn[:count])
    return torch.cat(positions)[torch.randperm(N, generator=generator)]


class Batches:
    """The endless, seeded sequence of batches, or one process's part of each.

    Args:
        dataset: the images.
        indices: images of the dataset that are trained on, int64 (N,).
        batch_size: images per step, over all processes; may exceed N.
        seed: decides the order and the augmentation.
        size: height and width that the model takes, one number for squares; larger images are cropped at random.
        augmentation: how images are changed at random.
        processes: this process among those that divide each batch; its size must divide `batch_size`.
        balanced: visit all classes equally often; requires labels.

    Attributes:
        local: this process's part of a batch, a slice.

    Example:
        >>> from ddim.data.dataset import CachedImageDataset
        >>> dataset = CachedImageDataset(torch.zeros(5, 1, 8, 8, dtype=torch.uint8))
        >>> batches = Batches(dataset, torch.arange(5), batch_size=2, seed=0, size=8)
        >>> batches[1000].shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        dataset: ImageDataset,
        indices: Tensor,
        batch_size: int,
        seed: int,
        size: int | Sequence[int],
        augmentation: Augmentation = NO_AUGMENTATION,
        processes: ProcessGroup = SINGLE_PROCESS,
        balanced: bool = False,
    ) -> None:
        self.dataset, self.indices, self.batch_size, self.seed = dataset, indices, batch_size, seed
        self.size, self.augmentation = height_and_width(size), augmentation
        local_size = batch_size // processes.size
        self.local = slice(processes.rank * local_size, (processes.rank + 1) * local_size)
        self._classes: Tensor | None = None
        if balanced:
            if dataset.labels is None:
                raise ValueError("data.balanced requires data.labels, got none")
            self._classes = dataset.labels.indices.cpu()[indices]
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __getitem__(self, step: int) -> Tensor:
        """Return the images of a step, (n, C, *size), uint8 or float32; an epoch's last batch runs into the next."""
        return self.read_labeled(step)[0]

    def read_labeled(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Return the images of a step and their classes.

        Args:
            step: number of the step, from 0.

        Returns:
            Images, (n, C, *size), uint8 or float32; classes, int64 (n,), or `None` without labels.
        """
        # Read: the seed and the step alone decide which images are visited.
        images, labels = self.dataset.read_labeled(self.image_indices(step))
        return self.augmentation.apply(images, self.seed, step, self.size, self.batch_size, self.local), labels

    def image_indices(self, step: int) -> Tensor:
        """Return the indices of the images that this process visits in a step.

        Args:
            step: number of the step, from 0.

        Returns:
            Indices into the dataset, int64 (n,).
        """
        N = len(self.indices)
        # Positions in the endless sequence of epochs; a batch may span several.
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.local]
        epochs = positions // N
        parts = [
            self._epoch_order(epoch)[positions[epochs == epoch] % N]
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        return self.indices[torch.cat(parts)]

    def _epoch_order(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch = epoch
            generator = generator_for(self.seed, "order", epoch)
            if self._classes is None:
                self._order = torch.randperm(len(self.indices), generator=generator)
            else:
                self._order = balanced_order(self._classes, generator)
        return self._order


class Prefetcher:
    """Calls a function of the step one step early, in a thread.

    Args:
        fetch: the function.
        last: last step that is fetched.

    Example:
        >>> prefetcher = Prefetcher(lambda step: step**2, last=3)
        >>> [prefetcher[step] for step in range(4)]
        [0, 1, 4, 9]
        >>> prefetcher.close()
    """

    def __init__(self, fetch: Callable[[int], Any], last: int) -> None:
        self.fetch, self.last = fetch, last
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[Any]] | None = None

    def __getitem__(self, step: int) -> Any:
        """Return the value of a step, and start fetching the next one."""
        # Consecutive steps find their value in flight; any other step is fetched now.
        if self._next is None or self._next[0] != step:
            self._next = step, self._pool.submit(self.fetch, step)
        value = self._next[1].result()
        self._next = (step + 1, self._pool.submit(self.fetch, step + 1)) if step < self.last else None
        return value

    def close(self) -> None:
        """Wait for the fetch in flight, and end the thread."""
        self._pool.shutdown(cancel_futures=True)


def loader_rate(batches: Batches, seconds: float = 0.05) -> float:
    """Measure how fast a loader delivers images when nothing else runs.

    Args:
        batches: the loader.
        seconds: how long to measure.

    Returns:
        Images per second.

    Example:
        >>> from ddim.data.dataset import CachedImageDataset
        >>> dataset = CachedImageDataset(torch.zeros(5, 1, 8, 8, dtype=torch.uint8))
        >>> loader_rate(Batches(dataset, torch.arange(5), 2, seed=0, size=8), seconds=0.01) > 0
        True
    """
    batches[0]  # opens what is opened once
    start, count, step = time.perf_counter(), 0, 1
    while time.perf_counter() - start < seconds:
        count += len(batches[step])
        step += 1
    return count / (time.perf_counter() - start)
