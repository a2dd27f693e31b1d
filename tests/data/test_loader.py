"""Batches: each image once per epoch, in an order that the seed alone decides, whatever the number of processes."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ddim.data.augment import Augmentation, crop_windows
from ddim.data.config import DataConfig
from ddim.data.dataset import CachedImageDataset, open_dataset
from ddim.data.loader import Batches, Prefetcher, loader_rate, split_holdout
from ddim.data.seeding import generator_for
from ddim.distributed import ProcessGroup
from image_data import CACHES, fitted

FLIPS = Augmentation(horizontal_flip=True)

# --- held-out images


@pytest.mark.parametrize(("count", "holdout"), [(10, 0), (10, 1), (10, 4), (10, 9), (1797, 200)])
def test_split_holdout_partitions_the_images(count: int, holdout: int) -> None:
    training, held_out = split_holdout(count, holdout, seed=3)
    assert (len(training), len(held_out)) == (count - holdout, holdout)
    assert sorted(training.tolist() + held_out.tolist()) == list(range(count))
    assert training.tolist() == sorted(training.tolist())
    assert held_out.tolist() == sorted(held_out.tolist())
    again = split_holdout(count, holdout, seed=3)
    assert torch.equal(again[0], training)
    assert torch.equal(again[1], held_out)


def test_seed_decides_the_holdout() -> None:
    chosen = Counter(index for seed in range(300) for index in split_holdout(10, 3, seed)[1].tolist())
    # 90 each are expected, with a standard deviation of 8.
    assert all(50 < chosen[index] < 130 for index in range(10))
    assert torch.equal(split_holdout(10, 0, 1)[0], torch.arange(10))


# --- batches


def numbered(count: int) -> CachedImageDataset:
    """Images of one pixel, whose value is the image's index."""
    return CachedImageDataset(torch.arange(count, dtype=torch.uint8).reshape(count, 1, 1, 1))


def make_batches(count: int, batch_size: int, seed: int, **options: Any) -> Batches:
    return Batches(numbered(count), torch.arange(count), batch_size, seed, 1, **options)


def sequence(batches: Batches, steps: int) -> list[int]:
    return torch.cat([batches[step] for step in range(steps)]).flatten().tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 5, 7, 20, 33, 50, 61])
def test_each_image_is_visited_once_per_epoch(batch_size: int) -> None:
    batches = make_batches(20, batch_size, seed=3)
    assert batches[0].shape == (batch_size, 1, 1, 1)
    seen = sequence(batches, 200 // batch_size + 1)
    for epoch in range(10):
        assert sorted(seen[20 * epoch : 20 * epoch + 20]) == list(range(20))


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("local", [1, 3, 8])
def test_process_shards_concatenate_to_the_batch(processes: int, local: int) -> None:
    whole = make_batches(20, processes * local, seed=3)
    parts = [
        make_batches(20, processes * local, seed=3, processes=ProcessGroup(rank, processes))
        for rank in range(processes)
    ]
    seen = []
    for step in range(100 // (processes * local) + 1):
        pieces = [part[step] for part in parts]
        assert {len(piece) for piece in pieces} == {local}
        assert torch.equal(torch.cat(pieces), whole[step])
        seen += torch.cat(pieces).flatten().tolist()
    for epoch in range(5):
        assert sorted(seen[20 * epoch : 20 * epoch + 20]) == list(range(20))


def test_augmentation_does_not_depend_on_the_number_of_processes() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, 3, 18, 18), np.uint8))
    dataset = CachedImageDataset(pixels)

    def make(rank: int, size: int) -> Batches:
        group = ProcessGroup(rank, size)
        return Batches(dataset, torch.arange(20), 12, 3, 16, augmentation=FLIPS, processes=group)

    for processes in (2, 3, 4):
        for step in (0, 1, 7):
            parts = torch.cat([make(rank, processes)[step] for rank in range(processes)])
            assert torch.equal(parts, make(0, 1)[step])


def test_held_out_images_are_not_visited() -> None:
    training, held_out = split_holdout(20, 7, seed=3)
    batches = Batches(numbered(20), training, 5, 3, 1)
    seen = sequence(batches, 26)
    for epoch in range(10):
        assert sorted(seen[13 * epoch : 13 * epoch + 13]) == training.tolist()
    assert not set(seen) & set(held_out.tolist())


def test_order_depends_on_seed_and_step_only() -> None:
    batches, again, other = (make_batches(20, 6, seed) for seed in (3, 3, 4))
    first = sequence(batches, 20)
    # Backwards: the images of a step do not depend on the steps before.
    assert [again[step].flatten().tolist() for step in reversed(range(20))] == [
        first[6 * step : 6 * step + 6] for step in reversed(range(20))
    ]
    assert sequence(other, 20) != first
    epochs = [tuple(first[20 * epoch : 20 * epoch + 20]) for epoch in range(6)]
    assert len(set(epochs)) == 6
    # Another batch size divides the same sequence differently.
    assert sequence(make_batches(20, 7, 3), 10) == first[:70]


def test_distant_step_is_reached_directly() -> None:
    batches = make_batches(20, 8, 3)
    step = 10**9
    assert batches.image_indices(step).tolist() == make_batches(20, 8, 3).image_indices(step).tolist()
    indices = [index for later in range(step, step + 5) for index in batches.image_indices(later).tolist()]
    # Step 10^9 begins an epoch: 8 * 10^9 is a multiple of 20.
    assert sorted(indices[:20]) == sorted(indices[20:]) == list(range(20))


def test_order_is_uniform() -> None:
    firsts = Counter(int(make_batches(4, 1, seed)[0]) for seed in range(400))
    # 100 each are expected, with a standard deviation of 9.
    assert all(60 < firsts[image] < 140 for image in range(4))


@pytest.mark.parametrize("cache", CACHES)
def test_batches_do_not_depend_on_the_cache(folder: Path, mixed_images: list[Image.Image], cache: str) -> None:
    config = DataConfig(source=str(folder), cache=cache, crop="random", horizontal_flip=True)
    batches = Batches(
        open_dataset(config, 16, 3),
        torch.arange(len(mixed_images)),
        5,
        0,
        16,
        augmentation=FLIPS,
    )
    dataset = CachedImageDataset(torch.from_numpy(fitted(mixed_images, 18, 3).copy()))
    expected = Batches(dataset, torch.arange(len(mixed_images)), 5, 0, 16, augmentation=FLIPS)
    for step in range(4):
        assert torch.equal(batches[step], expected[step])


def test_random_crops_are_uniform_over_windows() -> None:
    N, margin = 6, 2
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (N, 3, 18, 18), np.uint8))
    batches = Batches(CachedImageDataset(pixels), torch.arange(N), N, 3, 16)
    corners: Counter[tuple[int, int]] = Counter()
    for step in range(60):
        for index, window in zip(batches.image_indices(step).tolist(), batches[step], strict=True):
            windows = [
                (top, left)
                for top in range(margin + 1)
                for left in range(margin + 1)
                if torch.equal(window, pixels[index, :, top : top + 16, left : left + 16])
            ]
            assert len(windows) == 1
            corners.update(windows)
    # Nine windows, 40 times each, with a standard deviation of 6.
    assert len(corners) == 9
    assert all(15 < times < 65 for times in corners.values())
    assert torch.equal(Batches(CachedImageDataset(pixels), torch.arange(N), N, 3, 16)[5], batches[5])
    assert not torch.equal(Batches(CachedImageDataset(pixels), torch.arange(N), N, 4, 16)[5], batches[5])


def test_crop_windows() -> None:
    images = torch.arange(2 * 2 * 5 * 5).reshape(2, 2, 5, 5)
    windows = crop_windows(images, torch.tensor([[0, 2], [1, 0]]), (3, 3))
    assert torch.equal(windows[0], images[0, :, 0:3, 2:5])
    assert torch.equal(windows[1], images[1, :, 1:4, 0:3])


def test_half_of_the_images_are_flipped() -> None:
    N = 8
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (N, 3, 6, 6), np.uint8))
    batches = Batches(CachedImageDataset(pixels), torch.arange(N), N, 3, 6, augmentation=FLIPS)
    flipped = []
    for step in range(200):
        for index, image in zip(batches.image_indices(step).tolist(), batches[step], strict=True):
            flipped.append(torch.equal(image, pixels[index].flip(2)))
            assert flipped[-1] or torch.equal(image, pixels[index])
    # 800 of 1600, with a standard deviation of 20.
    assert 720 < sum(flipped) < 880
    again = Batches(CachedImageDataset(pixels), torch.arange(N), N, 3, 6, augmentation=FLIPS)
    assert torch.equal(again[9], batches[9])
    plain = Batches(CachedImageDataset(pixels), torch.arange(N), N, 3, 6)
    assert all(torch.equal(plain[step], pixels[plain.image_indices(step)]) for step in range(5))


def test_generator_depends_on_seed_purpose_and_index_only() -> None:
    numbers = {
        key: torch.randn(4, generator=generator_for(*key))
        for key in [(0, "step", 1), (0, "step", 2), (0, "order", 1), (1, "step", 1), (12, "step", 3), (1, "step", 23)]
    }
    torch.manual_seed(5)
    for key, expected in numbers.items():
        assert torch.equal(torch.randn(4, generator=generator_for(*key)), expected)
    assert len({tuple(draw.tolist()) for draw in numbers.values()}) == len(numbers)
    before = torch.random.get_rng_state()
    generator_for(0, "step", 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    generator_for(2**63 - 1, "step", 10**9)


# --- prefetching


@pytest.fixture
def make_prefetcher() -> Any:
    """`make_prefetcher(fetch, last)` creates a `Prefetcher` and closes it after the test."""
    prefetchers: list[Prefetcher] = []

    def make(fetch: Callable[[int], Any], last: int) -> Prefetcher:
        prefetchers.append(Prefetcher(fetch, last))
        return prefetchers[-1]

    yield make
    for prefetcher in prefetchers:
        prefetcher.close()


def test_prefetcher_returns_the_same_values(make_prefetcher: Callable[..., Prefetcher]) -> None:
    batches = make_batches(20, 6, 3)
    prefetcher = make_prefetcher(make_batches(20, 6, 3).__getitem__, 9)
    # In order, as a run; then from another step, as a resumed run; then backwards.
    for step in [*range(10), 4, 5, 9, 0, 3, 3, 2]:
        assert torch.equal(prefetcher[step], batches[step])


def test_next_step_is_fetched_in_the_background(make_prefetcher: Callable[..., Prefetcher]) -> None:
    steps: list[int] = []
    threads: set[str] = set()
    second_fetched = threading.Event()

    def fetch(step: int) -> int:
        steps.append(step)
        threads.add(threading.current_thread().name)
        if step == 1:
            second_fetched.set()
        return step * step

    prefetcher = make_prefetcher(fetch, 2)
    assert steps == []
    assert prefetcher[0] == 0
    assert second_fetched.wait(10)
    assert [prefetcher[1], prefetcher[2]] == [1, 4]
    prefetcher.close()
    assert steps == [0, 1, 2]
    assert threading.current_thread().name not in threads


def test_nothing_is_fetched_beyond_the_last_step(make_prefetcher: Callable[..., Prefetcher]) -> None:
    steps: list[int] = []
    prefetcher = make_prefetcher(steps.append, 4)
    for step in range(5):
        prefetcher[step]
    # A fetch that has not begun would be cancelled.
    time.sleep(0.05)
    prefetcher.close()
    assert steps == [0, 1, 2, 3, 4]


def test_fetch_errors_are_raised_at_their_step(make_prefetcher: Callable[..., Prefetcher]) -> None:
    def fetch(step: int) -> int:
        if step == 2:
            raise ValueError("3 images cannot be read")
        return step

    prefetcher = make_prefetcher(fetch, 9)
    assert [prefetcher[0], prefetcher[1]] == [0, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match="3 images cannot be read"):
            prefetcher[2]
    assert prefetcher[3] == 3


def test_close_ends_the_thread(make_prefetcher: Callable[..., Prefetcher]) -> None:
    before = set(threading.enumerate())

    def fetch(step: int) -> int:
        if step:
            time.sleep(0.05)
        return step

    prefetcher = make_prefetcher(fetch, 9)
    assert prefetcher[0] == 0
    assert set(threading.enumerate()) - before
    prefetcher.close()
    assert not set(threading.enumerate()) - before
    with pytest.raises(RuntimeError):
        prefetcher[5]


@pytest.mark.parametrize("cache", CACHES)
def test_loader_rate_is_positive(image_folder: Path, cache: str) -> None:
    dataset = open_dataset(DataConfig(source=str(image_folder), cache=cache), 8, 1)
    rate = loader_rate(Batches(dataset, torch.arange(40), 8, 0, 8), seconds=0.02)
    assert rate > 0
    assert math.isfinite(rate)


def test_loader_rate_counts_images() -> None:
    class Slow(CachedImageDataset):
        def read(self, indices: Tensor) -> Tensor:
            time.sleep(0.01)
            return super().read(indices)

    dataset = Slow(torch.zeros(20, 1, 1, 1, dtype=torch.uint8))
    rate = loader_rate(Batches(dataset, torch.arange(20), 8, 0, 1), seconds=0.1)
    # Eight images in each hundredth of a second, at most.
    assert 0 < rate <= 800
