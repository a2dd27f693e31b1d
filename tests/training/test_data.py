"""Training images from source to batch: how they are fitted and cached, what becomes of those that cannot be read, and
that every image comes once an epoch, in an order that the seed alone decides, whatever the number of processes.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ddim.data import dataset as data
from ddim.data.dataset import (
    Batches,
    CachedPictures,
    ImageDataset,
    LazyImageDataset,
    Prefetcher,
    choose_cache,
    crop,
    generator_for,
    loader_rate,
    open_pictures,
    split_holdout,
)
from ddim.io.images import fit_image
from ddim.training.config import DataConfig
from digits import digits

CACHES = ["memory", "disk", "none"]


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for every test."""
    home = tmp_path / "cache-home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder."""
    path = tmp_path / "data"
    path.mkdir()
    return path


@pytest.fixture
def colours(folder: Path) -> list[Image.Image]:
    """What is in the folder: images of random colours, sizes and modes."""
    random = np.random.default_rng(0)
    shapes = [(16, 16, 3), (20, 31, 3), (40, 17), (16, 16, 4), (9, 5, 3), (64, 64), (18, 18, 3)]
    images = [Image.fromarray(random.integers(0, 256, shape, np.uint8)) for shape in shapes]
    for index, image in enumerate(images):
        image.save(folder / f"{index}.png")
    return images


def take_all(pictures: ImageDataset) -> np.ndarray:
    return pictures.take(torch.arange(pictures.shape[0])).numpy()


def fitted(images: Sequence[Image.Image], size: int, channels: int, **how: Any) -> np.ndarray:
    """As they should come out, (N, C, H, W)."""
    one_by_one = [np.atleast_3d(np.asarray(fit_image(image, size, size, channels, **how))) for image in images]
    return np.stack(one_by_one).transpose(0, 3, 1, 2)


# --- opening


@pytest.mark.parametrize("cache", CACHES)
def test_every_pixel_is_kept(pictures: Path, cache: str) -> None:
    grey = open_pictures(DataConfig(source=str(pictures), cache=cache), 8, 1)
    assert grey.shape == (40, 1, 8, 8)
    assert np.array_equal(take_all(grey), digits(40)[:, None])
    colour = open_pictures(DataConfig(source=str(pictures), cache=cache), 8, 3)
    assert colour.shape == (40, 3, 8, 8)
    assert np.array_equal(take_all(colour), np.repeat(digits(40)[:, None], 3, 1))
    wanted = torch.tensor([7, 3, 3, 39, 0])
    found = grey.take(wanted)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy()[:, 0], digits(40)[wanted.numpy()])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cache", CACHES)
def test_images_of_all_sizes_and_modes_are_fitted(
    folder: Path, colours: list[Image.Image], cache: str, channels: int
) -> None:
    for how, crops in (("center", True), ("none", False)):
        found = open_pictures(DataConfig(source=str(folder), cache=cache, crop=how), 16, channels)
        assert found.shape == (len(colours), channels, 16, 16)
        assert np.array_equal(take_all(found), fitted(colours, 16, channels, crop=crops))


def test_squeezing_keeps_what_cropping_cuts_off(folder: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, :8] = 255
    Image.fromarray(wide).save(folder / "wide.png")
    (cut,) = take_all(open_pictures(DataConfig(source=str(folder), cache="memory"), 8, 3))
    (squeezed,) = take_all(open_pictures(DataConfig(source=str(folder), cache="memory", crop="none"), 8, 3))
    assert not cut.any()
    # The filter overshoots a little at edges.
    assert squeezed[:, :, 0].min() > 245
    assert squeezed[:, :, -1].max() < 10


def test_a_random_crop_has_an_eighth_more_to_choose_from(folder: Path, colours: list[Image.Image]) -> None:
    for size, stored in ((16, 18), (8, 9), (10, 12), (64, 72)):
        found = open_pictures(DataConfig(source=str(folder), cache="memory", crop="random"), size, 3)
        assert found.shape == (len(colours), 3, stored, stored)
    assert np.array_equal(
        take_all(open_pictures(DataConfig(source=str(folder), crop="random"), 16, 3)), fitted(colours, 18, 3)
    )


def test_missing_and_empty(folder: Path) -> None:
    for cache in CACHES:
        with pytest.raises(FileNotFoundError, match="there is no image in "):
            open_pictures(DataConfig(source=str(folder), cache=cache), 8, 1)
        with pytest.raises(FileNotFoundError, match=r"there is no .*; give a folder of images"):
            open_pictures(DataConfig(source=str(folder / "missing"), cache=cache), 8, 1)


# --- images that cannot be read


@pytest.fixture
def broken(pictures: Path, tmp_path: Path) -> Path:
    """The forty digits, of which the 4th, the 5th and the last are words."""
    path = shutil.copytree(pictures, tmp_path / "broken")
    for index in (3, 4, 39):
        (path / f"{index:04d}.png").write_text("words")
    return path


READABLE = [index for index in range(40) if index not in (3, 4, 39)]


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_unreadable_images_are_named_and_left_out(broken: Path, cache: str, caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(source=str(broken), cache=cache, max_unreadable=3)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ddim"):
            found = open_pictures(config, 8, 1)
        assert np.array_equal(take_all(found)[:, 0], digits(40)[READABLE])
        assert [record.getMessage() for record in caplog.records] == [
            f"{broken / name} cannot be read: not an image of a known format; it is skipped"
            for name in ("0003.png", "0004.png", "0039.png")
        ]


def test_unreadable_images_are_replaced_where_nothing_is_cached(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = open_pictures(DataConfig(source=str(broken), cache="none", max_unreadable=3), 8, 1)
    # The next that can be read, and the first after the last.
    stands_for = {3: 5, 4: 5, 39: 0}
    with caplog.at_level(logging.WARNING, "ddim"):
        for _ in range(2):
            assert np.array_equal(
                take_all(found)[:, 0], digits(40)[[stands_for.get(index, index) for index in range(40)]]
            )
            twice = found.take(torch.tensor([3, 3, 39, 8]))
            assert np.array_equal(twice[:, 0].numpy(), digits(40)[[5, 5, 0, 8]])
    assert len(caplog.records) == 3


@pytest.mark.parametrize("cache", CACHES)
def test_too_many_unreadable_images_stop_the_run(broken: Path, cache: str) -> None:
    said = (
        rf"^3 images of {broken} cannot be read, more than data\.max_unreadable allows \(2\); the first: "
        rf"{broken}/0003\.png cannot be read: not an image of a known format$"
    )
    with pytest.raises(ValueError, match=said):
        take_all(open_pictures(DataConfig(source=str(broken), cache=cache, max_unreadable=2), 8, 1))


def test_the_limit_holds_for_a_cache_that_is_there(broken: Path) -> None:
    open_pictures(DataConfig(source=str(broken), cache="disk"), 8, 1)
    with pytest.raises(ValueError, match=r"^2 images of .* cannot be read, more than .* allows \(1\)"):
        open_pictures(DataConfig(source=str(broken), cache="disk", max_unreadable=1), 8, 1)


@pytest.mark.parametrize("cache", CACHES)
def test_nothing_that_can_be_read(folder: Path, cache_home: Path, cache: str) -> None:
    for name in "abc":
        (folder / f"{name}.png").write_text("words")
    said = rf"^no image of {folder} can be read; the first: {folder}/a\.png cannot be read: not an image of"
    with pytest.raises(ValueError, match=said):
        take_all(open_pictures(DataConfig(source=str(folder), cache=cache), 8, 1))
    assert not [path for path in cache_home.rglob("*") if path.is_file()]


def test_an_image_that_cannot_be_converted_is_unreadable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, pixels in zip("ab", digits(2), strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.png")

    def fail(image: Image.Image, *arguments: Any, **named: Any) -> Image.Image:
        if str(getattr(image, "filename", "")).endswith("a.png"):
            raise OSError("broken data stream")
        return fit_image(image, *arguments, **named)

    monkeypatch.setattr(data, "fit_image", fail)
    found = open_pictures(DataConfig(source=str(folder), cache="memory"), 8, 1)
    assert np.array_equal(take_all(found)[:, 0], digits(2)[1:])
    with pytest.raises(ValueError, match="the first: an image cannot be converted: broken data stream"):
        open_pictures(DataConfig(source=str(folder), cache="memory", max_unreadable=0), 8, 1)


# --- caches


def test_memory_and_disk_hold_the_same(folder: Path, colours: list[Image.Image]) -> None:
    for crop_by in ("center", "random", "none"):
        memory, disk = (
            open_pictures(DataConfig(source=str(folder), cache=cache, crop=crop_by), 16, 3)
            for cache in ("memory", "disk")
        )
        assert memory.shape == disk.shape
        assert np.array_equal(take_all(memory), take_all(disk))
        assert memory.fingerprint == disk.fingerprint


def test_more_images_than_a_chunk_are_put_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = digits(60)
    np.savez(folder / "images.npz", expected)
    whole = open_pictures(DataConfig(source=str(folder / "images.npz"), cache="memory"), 8, 1)
    monkeypatch.setattr(data, "CHUNK", 7)
    for cache in ("memory", "disk"):
        found = open_pictures(DataConfig(source=str(folder / "images.npz"), cache=cache), 8, 1)
        assert np.array_equal(take_all(found)[:, 0], expected)
        assert found.fingerprint == whole.fingerprint


def test_a_cache_on_disk_is_decoded_once(pictures: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []

    def count(image: Image.Image, *arguments: Any, **named: Any) -> Image.Image:
        decoded.append(image)
        return fit_image(image, *arguments, **named)

    monkeypatch.setattr(data, "fit_image", count)
    config = DataConfig(source=str(pictures), cache="disk")
    first = open_pictures(config, 8, 1)
    assert len(decoded) == 40
    second = open_pictures(config, 8, 1)
    assert len(decoded) == 40
    assert np.array_equal(take_all(second), take_all(first))
    assert second.fingerprint == first.fingerprint
    assert str(cache_home / "ddim") in second.place
    open_pictures(config, 8, 3)
    open_pictures(DataConfig(source=str(pictures), cache="disk", crop="none"), 8, 1)
    assert len(decoded) == 120
    assert len(list((cache_home / "ddim/images").iterdir())) == 3


def test_a_cache_on_disk_holds_the_pixels_and_what_they_are(broken: Path, cache_home: Path) -> None:
    found = open_pictures(DataConfig(source=str(broken), cache="disk"), 8, 1)
    (cached,) = (cache_home / "ddim/images").iterdir()
    assert (cached / "pixels.bin").read_bytes() == digits(40)[READABLE].tobytes()
    about = json.loads((cached / "about.json").read_text())
    assert about["source"] == str(broken)
    assert about["shape"] == [37, 1, 8, 8]
    assert about["sha256"] == found.fingerprint
    assert len(about["unreadable"]) == 3


def test_a_cache_on_disk_is_made_again_when_the_images_change(folder: Path) -> None:
    config = DataConfig(source=str(folder), cache="disk")
    for index, pixels in enumerate(digits(3)):
        Image.fromarray(pixels).save(folder / f"{index}.png")
        assert np.array_equal(take_all(open_pictures(config, 8, 1))[:, 0], digits(index + 1))


def test_a_cache_that_was_not_finished_is_no_cache(
    pictures: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(source=str(pictures), cache="disk")
    calls = []

    def stop(image: Image.Image, *arguments: Any, **named: Any) -> Image.Image:
        calls.append(image)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return fit_image(image, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(data, "fit_image", stop)
        patched.setattr(data, "CHUNK", 5)
        with pytest.raises(KeyboardInterrupt):
            open_pictures(config, 8, 1)
    assert list((cache_home / "ddim/images").iterdir()) == []
    assert np.array_equal(take_all(open_pictures(config, 8, 1))[:, 0], digits(40))


def test_writing_into_what_a_cache_gave_does_not_change_it(pictures: Path) -> None:
    config = DataConfig(source=str(pictures), cache="disk")
    open_pictures(config, 8, 1).pixels.zero_()
    assert np.array_equal(take_all(open_pictures(config, 8, 1))[:, 0], digits(40))


def test_a_cache_that_cannot_be_written(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"\[Errno"):
        open_pictures(DataConfig(source=str(pictures), cache="disk"), 8, 1)


@pytest.mark.parametrize("cache", CACHES)
def test_the_fingerprint_changes_with_the_content(folder: Path, cache: str) -> None:
    config = DataConfig(source=str(folder), cache=cache)
    seen = []
    for pixels in digits(3):
        Image.fromarray(pixels).save(folder / "a.png")
        seen.append(open_pictures(config, 8, 1).fingerprint)
        assert open_pictures(config, 8, 1).fingerprint == seen[-1]
    assert len(set(seen)) == 3


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_the_fingerprint_tells_content_and_not_place(pictures: Path, tmp_path: Path, cache: str) -> None:
    np.savez(tmp_path / "images.npz", digits(40))
    places = [pictures, shutil.copytree(pictures, tmp_path / "copy"), tmp_path / "images.npz"]
    found = {open_pictures(DataConfig(source=str(place), cache=cache), 8, 1).fingerprint for place in places}
    assert len(found) == 1


def test_where_images_are_kept_is_chosen_by_their_size(
    cache_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 10 * 2**30
    asked = []

    def disk_usage(folder: Path) -> Any:
        asked.append(folder)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    assert choose_cache(2**31, shared=False) == "memory"
    assert not asked
    assert choose_cache(2**31 + 1, shared=False) == "disk"
    assert choose_cache(1, shared=True) == "disk"
    # At most half of what is free, of the disk where the cache will be.
    assert choose_cache(free // 2, shared=False) == "disk"
    assert choose_cache(free // 2 + 1, shared=False) == "none"
    assert set(asked) == {tmp_path}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**50))
    assert choose_cache(2**38, shared=False) == "disk"
    assert choose_cache(2**38 + 1, shared=False) == "none"


def test_several_processes_share_a_cache_on_disk(pictures: Path) -> None:
    alone = open_pictures(DataConfig(source=str(pictures)), 8, 1)
    shared = open_pictures(DataConfig(source=str(pictures)), 8, 1, shared=True)
    assert alone.place == "memory"
    assert shared.place.startswith("a memory map in ")
    assert shared.fingerprint == alone.fingerprint
    assert isinstance(
        open_pictures(DataConfig(source=str(pictures), cache="none"), 8, 1, shared=True), LazyImageDataset
    )


# --- images that are held out


@pytest.mark.parametrize(("count", "holdout"), [(10, 0), (10, 1), (10, 4), (10, 9), (1797, 200)])
def test_what_is_held_out_is_not_trained_on(count: int, holdout: int) -> None:
    training, held_out = split_holdout(count, holdout, seed=3)
    assert (len(training), len(held_out)) == (count - holdout, holdout)
    assert sorted(training.tolist() + held_out.tolist()) == list(range(count))
    assert training.tolist() == sorted(training.tolist())
    assert held_out.tolist() == sorted(held_out.tolist())
    again = split_holdout(count, holdout, seed=3)
    assert torch.equal(again[0], training)
    assert torch.equal(again[1], held_out)


def test_the_seed_decides_what_is_held_out() -> None:
    chosen = Counter(index for seed in range(300) for index in split_holdout(10, 3, seed)[1].tolist())
    # 90 each are expected, with a standard deviation of 8.
    assert all(50 < chosen[index] < 130 for index in range(10))
    assert torch.equal(split_holdout(10, 0, 1)[0], torch.arange(10))


# --- batches


def numbered(count: int) -> CachedPictures:
    """Images of one pixel that say which they are."""
    return CachedPictures(torch.arange(count, dtype=torch.uint8).reshape(count, 1, 1, 1))


def make_batches(count: int, batch_size: int, seed: int, **more: Any) -> Batches:
    return Batches(numbered(count), torch.arange(count), batch_size, seed, 1, **more)


def sequence(batches: Batches, steps: int) -> list[int]:
    return torch.cat([batches[step] for step in range(steps)]).flatten().tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 5, 7, 20, 33, 50, 61])
def test_every_image_comes_once_an_epoch(batch_size: int) -> None:
    batches = make_batches(20, batch_size, seed=3)
    assert batches[0].shape == (batch_size, 1, 1, 1)
    seen = sequence(batches, 200 // batch_size + 1)
    for epoch in range(10):
        assert sorted(seen[20 * epoch : 20 * epoch + 20]) == list(range(20))


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("local", [1, 3, 8])
def test_the_parts_of_processes_make_up_the_batch(processes: int, local: int) -> None:
    whole = make_batches(20, processes * local, seed=3)
    parts = [make_batches(20, processes * local, seed=3, part=(rank, processes)) for rank in range(processes)]
    seen = []
    for step in range(100 // (processes * local) + 1):
        pieces = [part[step] for part in parts]
        assert {len(piece) for piece in pieces} == {local}
        assert torch.equal(torch.cat(pieces), whole[step])
        seen += torch.cat(pieces).flatten().tolist()
    for epoch in range(5):
        assert sorted(seen[20 * epoch : 20 * epoch + 20]) == list(range(20))


def test_processes_crop_and_mirror_as_one_would() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, 3, 18, 18), np.uint8))
    pictures = CachedPictures(pixels)

    def make(part: tuple[int, int]) -> Batches:
        return Batches(pictures, torch.arange(20), 12, 3, 16, horizontal_flip=True, part=part)

    for processes in (2, 3, 4):
        for step in (0, 1, 7):
            parts = torch.cat([make((rank, processes))[step] for rank in range(processes)])
            assert torch.equal(parts, make((0, 1))[step])


def test_only_the_images_that_are_trained_on_come() -> None:
    training, held_out = split_holdout(20, 7, seed=3)
    batches = Batches(numbered(20), training, 5, 3, 1)
    seen = sequence(batches, 26)
    for epoch in range(10):
        assert sorted(seen[13 * epoch : 13 * epoch + 13]) == training.tolist()
    assert not set(seen) & set(held_out.tolist())


def test_order_is_a_function_of_the_seed_and_the_step() -> None:
    batches, again, other = (make_batches(20, 6, seed) for seed in (3, 3, 4))
    first = sequence(batches, 20)
    # Backwards, as no run asks for them: what a step gets does not depend on the steps before.
    assert [again[step].flatten().tolist() for step in reversed(range(20))] == [
        first[6 * step : 6 * step + 6] for step in reversed(range(20))
    ]
    assert sequence(other, 20) != first
    epochs = [tuple(first[20 * epoch : 20 * epoch + 20]) for epoch in range(6)]
    assert len(set(epochs)) == 6
    # The batch size cuts the same sequence differently.
    assert sequence(make_batches(20, 7, 3), 10) == first[:70]


def test_far_steps_are_reached_at_once() -> None:
    batches = make_batches(20, 8, 3)
    step = 10**9
    assert batches.positions(step).tolist() == make_batches(20, 8, 3).positions(step).tolist()
    five = [index for later in range(step, step + 5) for index in batches.positions(later).tolist()]
    # Step 10^9 begins an epoch: 8 * 10^9 is a multiple of 20.
    assert sorted(five[:20]) == sorted(five[20:]) == list(range(20))


def test_orders_are_uniform() -> None:
    firsts = Counter(int(make_batches(4, 1, seed)[0]) for seed in range(400))
    # 100 each are expected, with a standard deviation of 9.
    assert all(60 < firsts[image] < 140 for image in range(4))


@pytest.mark.parametrize("cache", CACHES)
def test_batches_are_the_same_from_every_cache(folder: Path, colours: list[Image.Image], cache: str) -> None:
    config = DataConfig(source=str(folder), cache=cache, crop="random", horizontal_flip=True)
    batches = Batches(open_pictures(config, 16, 3), torch.arange(len(colours)), 5, 0, 16, horizontal_flip=True)
    expected = Batches(
        CachedPictures(torch.from_numpy(fitted(colours, 18, 3).copy())), torch.arange(len(colours)), 5, 0, 16, True
    )
    for step in range(4):
        assert torch.equal(batches[step], expected[step])


def test_random_crops_are_windows_and_reach_every_corner() -> None:
    N, room = 6, 2
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (N, 3, 18, 18), np.uint8))
    batches = Batches(CachedPictures(pixels), torch.arange(N), N, 3, 16)
    corners: Counter[tuple[int, int]] = Counter()
    for step in range(60):
        for index, window in zip(batches.positions(step).tolist(), batches[step], strict=True):
            places = [
                (top, left)
                for top in range(room + 1)
                for left in range(room + 1)
                if torch.equal(window, pixels[index, :, top : top + 16, left : left + 16])
            ]
            assert len(places) == 1
            corners.update(places)
    # Nine windows, 40 times each, with a standard deviation of 6.
    assert len(corners) == 9
    assert all(15 < times < 65 for times in corners.values())
    assert torch.equal(Batches(CachedPictures(pixels), torch.arange(N), N, 3, 16)[5], batches[5])
    assert not torch.equal(Batches(CachedPictures(pixels), torch.arange(N), N, 4, 16)[5], batches[5])


def test_crop_takes_the_window_at_a_corner() -> None:
    images = torch.arange(2 * 2 * 5 * 5).reshape(2, 2, 5, 5)
    windows = crop(images, torch.tensor([[0, 2], [1, 0]]), 3)
    assert torch.equal(windows[0], images[0, :, 0:3, 2:5])
    assert torch.equal(windows[1], images[1, :, 1:4, 0:3])


def test_half_of_the_images_are_mirrored() -> None:
    N = 8
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (N, 3, 6, 6), np.uint8))
    batches = Batches(CachedPictures(pixels), torch.arange(N), N, 3, 6, horizontal_flip=True)
    mirrored = []
    for step in range(200):
        for index, image in zip(batches.positions(step).tolist(), batches[step], strict=True):
            mirrored.append(torch.equal(image, pixels[index].flip(2)))
            assert mirrored[-1] or torch.equal(image, pixels[index])
    # 800 of 1600, with a standard deviation of 20.
    assert 720 < sum(mirrored) < 880
    assert torch.equal(Batches(CachedPictures(pixels), torch.arange(N), N, 3, 6, horizontal_flip=True)[9], batches[9])
    plain = Batches(CachedPictures(pixels), torch.arange(N), N, 3, 6)
    assert all(torch.equal(plain[step], pixels[plain.positions(step)]) for step in range(5))


def test_generators_depend_on_seed_purpose_and_index_alone() -> None:
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


# --- fetching ahead


@pytest.fixture
def ahead() -> Any:
    """`ahead(fetch, last)` is an `Prefetcher`, closed in the end."""
    made: list[Prefetcher] = []

    def make(fetch: Callable[[int], Any], last: int) -> Prefetcher:
        made.append(Prefetcher(fetch, last))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_fetching_ahead_changes_no_value(ahead: Callable[..., Prefetcher]) -> None:
    batches = make_batches(20, 6, 3)
    fetched = ahead(make_batches(20, 6, 3).__getitem__, 9)
    # In order, as a run does; then from elsewhere, as one that is taken up; then backwards.
    for step in [*range(10), 4, 5, 9, 0, 3, 3, 2]:
        assert torch.equal(fetched[step], batches[step])


def test_the_next_step_is_fetched_while_this_one_is_used(ahead: Callable[..., Prefetcher]) -> None:
    asked: list[int] = []
    threads: set[str] = set()
    second = threading.Event()

    def fetch(step: int) -> int:
        asked.append(step)
        threads.add(threading.current_thread().name)
        if step == 1:
            second.set()
        return step * step

    fetched = ahead(fetch, 2)
    assert asked == []
    assert fetched[0] == 0
    assert second.wait(10)
    assert [fetched[1], fetched[2]] == [1, 4]
    fetched.close()
    assert asked == [0, 1, 2]
    assert threading.current_thread().name not in threads


def test_nothing_is_fetched_beyond_the_last_step(ahead: Callable[..., Prefetcher]) -> None:
    asked: list[int] = []
    fetched = ahead(asked.append, 4)
    for step in range(5):
        fetched[step]
    # A fetch that has not begun would be cancelled.
    time.sleep(0.05)
    fetched.close()
    assert asked == [0, 1, 2, 3, 4]


def test_errors_of_the_fetch_reach_the_caller_at_their_step(ahead: Callable[..., Prefetcher]) -> None:
    def fetch(step: int) -> int:
        if step == 2:
            raise ValueError("3 images cannot be read")
        return step

    fetched = ahead(fetch, 9)
    assert [fetched[0], fetched[1]] == [0, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match="3 images cannot be read"):
            fetched[2]
    assert fetched[3] == 3


def test_closing_ends_the_thread(ahead: Callable[..., Prefetcher]) -> None:
    before = set(threading.enumerate())

    def fetch(step: int) -> int:
        if step:
            time.sleep(0.05)
        return step

    fetched = ahead(fetch, 9)
    assert fetched[0] == 0
    assert set(threading.enumerate()) - before
    fetched.close()
    assert not set(threading.enumerate()) - before
    with pytest.raises(RuntimeError):
        fetched[5]


@pytest.mark.parametrize("cache", CACHES)
def test_the_rate_of_the_loader_is_positive(pictures: Path, cache: str) -> None:
    found = open_pictures(DataConfig(source=str(pictures), cache=cache), 8, 1)
    rate = loader_rate(Batches(found, torch.arange(40), 8, 0, 8), seconds=0.02)
    assert rate > 0
    assert math.isfinite(rate)


def test_the_rate_of_the_loader_counts_images() -> None:
    class Slow(CachedPictures):
        def take(self, indices: Tensor) -> Tensor:
            time.sleep(0.01)
            return super().take(indices)

    pictures = Slow(torch.zeros(20, 1, 1, 1, dtype=torch.uint8))
    rate = loader_rate(Batches(pictures, torch.arange(20), 8, 0, 1), seconds=0.1)
    # Eight images in each hundredth of a second, at most.
    assert 0 < rate <= 800
