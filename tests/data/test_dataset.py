"""Datasets: how images are fitted and cached, and what happens to those that cannot be read."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddim.data import dataset as dataset_module
from ddim.data.config import DataConfig
from ddim.data.dataset import ImageDataset, LazyImageDataset, choose_cache, open_dataset
from ddim.io.images import fit_image
from digits import digits
from image_data import CACHES, fitted


def read_all(dataset: ImageDataset) -> np.ndarray:
    return dataset.read(torch.arange(dataset.shape[0])).numpy()


# --- opening


@pytest.mark.parametrize("cache", CACHES)
def test_pixels_are_preserved(image_folder: Path, cache: str) -> None:
    gray = open_dataset(DataConfig(source=str(image_folder), cache=cache), 8, 1)
    assert gray.shape == (40, 1, 8, 8)
    assert np.array_equal(read_all(gray), digits(40)[:, None])
    color = open_dataset(DataConfig(source=str(image_folder), cache=cache), 8, 3)
    assert color.shape == (40, 3, 8, 8)
    assert np.array_equal(read_all(color), np.repeat(digits(40)[:, None], 3, 1))
    indices = torch.tensor([7, 3, 3, 39, 0])
    images = gray.read(indices)
    assert images.dtype == torch.uint8
    assert np.array_equal(images.numpy()[:, 0], digits(40)[indices.numpy()])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cache", CACHES)
def test_all_sizes_and_modes_are_fitted(
    folder: Path, mixed_images: list[Image.Image], cache: str, channels: int
) -> None:
    for crop, is_cropped in (("center", True), ("none", False)):
        dataset = open_dataset(DataConfig(source=str(folder), cache=cache, crop=crop), 16, channels)
        assert dataset.shape == (len(mixed_images), channels, 16, 16)
        assert np.array_equal(read_all(dataset), fitted(mixed_images, 16, channels, crop=is_cropped))


def test_crop_none_squeezes(folder: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, :8] = 255
    Image.fromarray(wide).save(folder / "wide.png")
    (cropped,) = read_all(open_dataset(DataConfig(source=str(folder), cache="memory"), 8, 3))
    (squeezed,) = read_all(open_dataset(DataConfig(source=str(folder), cache="memory", crop="none"), 8, 3))
    assert not cropped.any()
    # The filter overshoots a little at edges.
    assert squeezed[:, :, 0].min() > 245
    assert squeezed[:, :, -1].max() < 10


def test_random_crop_stores_an_eighth_more(folder: Path, mixed_images: list[Image.Image]) -> None:
    for size, stored in ((16, 18), (8, 9), (10, 12), (64, 72)):
        dataset = open_dataset(DataConfig(source=str(folder), cache="memory", crop="random"), size, 3)
        assert dataset.shape == (len(mixed_images), 3, stored, stored)
    assert np.array_equal(
        read_all(open_dataset(DataConfig(source=str(folder), crop="random"), 16, 3)), fitted(mixed_images, 18, 3)
    )


def test_missing_and_empty_sources_raise(folder: Path) -> None:
    for cache in CACHES:
        with pytest.raises(FileNotFoundError, match="contains no images; looked for "):
            open_dataset(DataConfig(source=str(folder), cache=cache), 8, 1)
        with pytest.raises(FileNotFoundError, match="missing does not exist; expected a folder of images"):
            open_dataset(DataConfig(source=str(folder / "missing"), cache=cache), 8, 1)


# --- images that cannot be read


@pytest.fixture
def broken(image_folder: Path, tmp_path: Path) -> Path:
    """Forty digits, of which the 4th, the 5th and the last are text."""
    path = shutil.copytree(image_folder, tmp_path / "broken")
    for index in (3, 4, 39):
        (path / f"{index:04d}.png").write_text("words")
    return path


READABLE = [index for index in range(40) if index not in (3, 4, 39)]


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_unreadable_images_are_logged_and_skipped(broken: Path, cache: str, caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(source=str(broken), cache=cache, max_unreadable=3)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ddim"):
            dataset = open_dataset(config, 8, 1)
        assert np.array_equal(read_all(dataset)[:, 0], digits(40)[READABLE])
        assert [record.getMessage() for record in caplog.records] == [
            f"{broken / name} cannot be read: not an image of a known format; it is skipped"
            for name in ("0003.png", "0004.png", "0039.png")
        ]


def test_lazy_dataset_replaces_unreadable_images(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = open_dataset(DataConfig(source=str(broken), cache="none", max_unreadable=3), 8, 1)
    # The next that can be read, and the first after the last.
    substitute = {3: 5, 4: 5, 39: 0}
    with caplog.at_level(logging.WARNING, "ddim"):
        for _ in range(2):
            assert np.array_equal(
                read_all(dataset)[:, 0], digits(40)[[substitute.get(index, index) for index in range(40)]]
            )
            twice = dataset.read(torch.tensor([3, 3, 39, 8]))
            assert np.array_equal(twice[:, 0].numpy(), digits(40)[[5, 5, 0, 8]])
    assert len(caplog.records) == 3


@pytest.mark.parametrize("cache", CACHES)
def test_too_many_unreadable_images_raise(broken: Path, cache: str) -> None:
    message = (
        rf"^3 images of {broken} cannot be read, data\.max_unreadable allows 2; the first: "
        rf"{broken}/0003\.png cannot be read: not an image of a known format$"
    )
    with pytest.raises(ValueError, match=message):
        read_all(open_dataset(DataConfig(source=str(broken), cache=cache, max_unreadable=2), 8, 1))


def test_limit_of_unreadable_images_holds_for_an_existing_cache(broken: Path) -> None:
    open_dataset(DataConfig(source=str(broken), cache="disk"), 8, 1)
    with pytest.raises(ValueError, match=r"^2 images of .* cannot be read, data\.max_unreadable allows 1; "):
        open_dataset(DataConfig(source=str(broken), cache="disk", max_unreadable=1), 8, 1)


@pytest.mark.parametrize("cache", CACHES)
def test_no_readable_image_raises(folder: Path, cache_home: Path, cache: str) -> None:
    for name in "abc":
        (folder / f"{name}.png").write_text("words")
    message = rf"^no image of {folder} can be read; the first: {folder}/a\.png cannot be read: not an image"
    with pytest.raises(ValueError, match=message):
        read_all(open_dataset(DataConfig(source=str(folder), cache=cache), 8, 1))
    assert not [path for path in cache_home.rglob("*") if path.is_file()]


def test_failed_conversion_counts_as_unreadable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, pixels in zip("ab", digits(2), strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.png")

    def fail(image: Image.Image, *arguments: Any, **named: Any) -> Image.Image:
        if str(getattr(image, "filename", "")).endswith("a.png"):
            raise OSError("broken data stream")
        return fit_image(image, *arguments, **named)

    monkeypatch.setattr(dataset_module, "fit_image", fail)
    dataset = open_dataset(DataConfig(source=str(folder), cache="memory"), 8, 1)
    assert np.array_equal(read_all(dataset)[:, 0], digits(2)[1:])
    with pytest.raises(ValueError, match="the first: an image cannot be converted: broken data stream"):
        open_dataset(DataConfig(source=str(folder), cache="memory", max_unreadable=0), 8, 1)


# --- caches


def test_memory_and_disk_caches_are_equal(folder: Path, mixed_images: list[Image.Image]) -> None:
    for crop in ("center", "random", "none"):
        memory, disk = (
            open_dataset(DataConfig(source=str(folder), cache=cache, crop=crop), 16, 3) for cache in ("memory", "disk")
        )
        assert memory.shape == disk.shape
        assert np.array_equal(read_all(memory), read_all(disk))
        assert memory.fingerprint == disk.fingerprint


def test_chunks_are_concatenated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = digits(60)
    np.savez(folder / "images.npz", expected)
    whole = open_dataset(DataConfig(source=str(folder / "images.npz"), cache="memory"), 8, 1)
    monkeypatch.setattr(dataset_module, "DECODE_CHUNK_IMAGES", 7)
    for cache in ("memory", "disk"):
        dataset = open_dataset(DataConfig(source=str(folder / "images.npz"), cache=cache), 8, 1)
        assert np.array_equal(read_all(dataset)[:, 0], expected)
        assert dataset.fingerprint == whole.fingerprint


def test_disk_cache_is_decoded_once(image_folder: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []

    def count(image: Image.Image, *arguments: Any, **named: Any) -> Image.Image:
        decoded.append(image)
        return fit_image(image, *arguments, **named)

    monkeypatch.setattr(dataset_module, "fit_image", count)
    config = DataConfig(source=str(image_folder), cache="disk")
    first = open_dataset(config, 8, 1)
    assert len(decoded) == 40
    second = open_dataset(config, 8, 1)
    assert len(decoded) == 40
    assert np.array_equal(read_all(second), read_all(first))
    assert second.fingerprint == first.fingerprint
    assert str(cache_home / "ddim") in second.location
    open_dataset(config, 8, 3)
    open_dataset(DataConfig(source=str(image_folder), cache="disk", crop="none"), 8, 1)
    assert len(decoded) == 120
    assert len(list((cache_home / "ddim/images").iterdir())) == 3


@pytest.mark.parametrize("position", [40, 32 + 37 * 64 + 5, -3])
def test_damaged_disk_cache_is_decoded_again(
    broken: Path, cache_home: Path, position: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = DataConfig(source=str(broken), cache="disk")
    first = open_dataset(config, 8, 1)
    (entry,) = (cache_home / "ddim/images").iterdir()
    content = bytearray(entry.read_bytes())
    content[position] ^= 1
    entry.write_bytes(content)
    caplog.clear()
    again = open_dataset(config, 8, 1)
    assert np.array_equal(read_all(again)[:, 0], digits(40)[READABLE])
    assert again.fingerprint == first.fingerprint
    assert f"{entry} is damaged" in caplog.messages[0]


def test_disk_cache_is_rebuilt_when_images_change(folder: Path) -> None:
    config = DataConfig(source=str(folder), cache="disk")
    for index, pixels in enumerate(digits(3)):
        Image.fromarray(pixels).save(folder / f"{index}.png")
        assert np.array_equal(read_all(open_dataset(config, 8, 1))[:, 0], digits(index + 1))


def test_interrupted_disk_cache_is_not_used(
    image_folder: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(source=str(image_folder), cache="disk")
    calls = []

    def stop(image: Image.Image, *arguments: Any, **named: Any) -> Image.Image:
        calls.append(image)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return fit_image(image, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(dataset_module, "fit_image", stop)
        patched.setattr(dataset_module, "DECODE_CHUNK_IMAGES", 5)
        with pytest.raises(KeyboardInterrupt):
            open_dataset(config, 8, 1)
    assert list((cache_home / "ddim/images").iterdir()) == []
    assert np.array_equal(read_all(open_dataset(config, 8, 1))[:, 0], digits(40))


def test_disk_cache_is_copy_on_write(image_folder: Path) -> None:
    config = DataConfig(source=str(image_folder), cache="disk")
    open_dataset(config, 8, 1).pixels.zero_()
    assert np.array_equal(read_all(open_dataset(config, 8, 1))[:, 0], digits(40))


def test_unwritable_cache_is_replaced_by_memory(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    dataset = open_dataset(DataConfig(source=str(image_folder), cache="disk"), 8, 1)
    assert np.array_equal(read_all(dataset)[:, 0], digits(40))
    assert dataset.location == "memory"
    assert len(caplog.messages) == 1
    monkeypatch.setattr(dataset_module, "MEMORY_CACHE_BYTES", 1)
    assert isinstance(open_dataset(DataConfig(source=str(image_folder), cache="disk"), 8, 1), LazyImageDataset)


@pytest.mark.parametrize("cache", CACHES)
def test_fingerprint_changes_with_content(folder: Path, cache: str) -> None:
    config = DataConfig(source=str(folder), cache=cache)
    seen = []
    for pixels in digits(3):
        Image.fromarray(pixels).save(folder / "a.png")
        seen.append(open_dataset(config, 8, 1).fingerprint)
        assert open_dataset(config, 8, 1).fingerprint == seen[-1]
    assert len(set(seen)) == 3


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_fingerprint_does_not_depend_on_location(image_folder: Path, tmp_path: Path, cache: str) -> None:
    np.savez(tmp_path / "images.npz", digits(40))
    sources = [image_folder, shutil.copytree(image_folder, tmp_path / "copy"), tmp_path / "images.npz"]
    prints = {open_dataset(DataConfig(source=str(source), cache=cache), 8, 1).fingerprint for source in sources}
    assert len(prints) == 1


def test_cache_is_chosen_by_size(cache_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 10 * 2**30
    queried = []

    def disk_usage(folder: Path) -> Any:
        queried.append(folder)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    assert choose_cache(2**31, shared=False) == "memory"
    assert not queried
    assert choose_cache(2**31 + 1, shared=False) == "disk"
    assert choose_cache(1, shared=True) == "disk"
    # At most half of the free space of the cache folder's disk.
    assert choose_cache(free // 2, shared=False) == "disk"
    assert choose_cache(free // 2 + 1, shared=False) == "none"
    assert set(queried) == {tmp_path}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**50))
    assert choose_cache(2**38, shared=False) == "disk"
    assert choose_cache(2**38 + 1, shared=False) == "none"


def test_several_processes_share_a_disk_cache(image_folder: Path) -> None:
    private = open_dataset(DataConfig(source=str(image_folder)), 8, 1)
    shared = open_dataset(DataConfig(source=str(image_folder)), 8, 1, shared=True)
    assert private.location == "memory"
    assert shared.location.startswith("a memory map in ")
    assert shared.fingerprint == private.fingerprint
    assert isinstance(
        open_dataset(DataConfig(source=str(image_folder), cache="none"), 8, 1, shared=True), LazyImageDataset
    )
