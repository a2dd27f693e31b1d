"""Augmentations against PIL and colorsys; the same for any number of processes; each independent of the others."""

from __future__ import annotations

import colorsys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from ddim.data.augment import Augmentation, change_colors, rotate_quarters, turn_hue
from ddim.data.dataset import CachedImageDataset
from ddim.data.loader import Batches
from ddim.distributed import ProcessGroup
from ddim.io.pixel_format import PixelFormat

N = 12
EVERYTHING = Augmentation(True, True, True, 0.3, 0.3, 0.3, 0.1)


def noise(*shape: int) -> Tensor:
    """Random bytes."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def batches(augmentation: Augmentation, group: ProcessGroup | None = None, size: int = 6, stored: int = 6) -> Batches:
    """Batches of 12 color images."""
    options = {} if group is None else {"processes": group}
    dataset = CachedImageDataset(noise(N, 3, stored, stored))
    return Batches(dataset, torch.arange(N), N, 5, size, augmentation, **options)


@pytest.mark.parametrize("augmentation", [EVERYTHING, Augmentation(vertical_flip=True), Augmentation(rotate=True)])
def test_processes_see_parts_of_the_same_batches(augmentation: Augmentation) -> None:
    whole = batches(augmentation, size=6, stored=7)
    for count in (2, 3):
        parts = [batches(augmentation, ProcessGroup(rank, count), 6, 7) for rank in range(count)]
        for step in (0, 7):
            assert torch.equal(torch.cat([part[step] for part in parts]), whole[step])
    assert not torch.equal(whole[0], whole[N])


def test_flips_and_turns_are_as_frequent_as_stated() -> None:
    plain = batches(Augmentation())
    for augmentation, variants in (
        (Augmentation(vertical_flip=True), lambda image: [image, image.flip(1)]),
        (Augmentation(rotate=True), lambda image: [torch.rot90(image, k, (1, 2)) for k in range(4)]),
    ):
        augmented, counts = batches(augmentation), Counter[int]()
        for step in range(100):
            for before, after in zip(plain[step], augmented[step], strict=True):
                counts[[torch.equal(variant, after) for variant in variants(before)].index(True)] += 1
        share = 1200 / len(counts)
        assert len(counts) == len(variants(plain[0][0]))
        assert all(abs(count - share) < 4 * share**0.5 for count in counts.values())


def test_each_draws_its_own_numbers() -> None:
    flips = batches(Augmentation(horizontal_flip=True))
    both = batches(Augmentation(horizontal_flip=True, vertical_flip=True))
    vertical = batches(Augmentation(vertical_flip=True))
    for step in range(3):
        flipped = torch.stack(
            [
                image.flip(1) if not torch.equal(plain, turned) else image
                for image, plain, turned in zip(flips[step], batches(Augmentation())[step], vertical[step], strict=True)
            ]
        )
        assert torch.equal(both[step], flipped)


def test_rectangles_are_cropped_uniformly() -> None:
    pixels = torch.arange(5 * 7, dtype=torch.uint8).reshape(1, 1, 5, 7).expand(N, 1, 5, 7).contiguous()
    cropped = Batches(CachedImageDataset(pixels), torch.arange(N), N, 3, (4, 4))
    corners = Counter(int(image[0, 0, 0]) for step in range(200) for image in cropped[step])
    assert sorted(corners) == [7 * top + left for top in range(2) for left in range(4)]
    assert all(abs(count - 300) < 70 for count in corners.values())
    assert cropped[0].shape == (N, 1, 4, 4)


def test_values_that_are_not_bytes_are_augmented() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (N, 5, 6, 6), np.uint16)
    dataset = CachedImageDataset(torch.from_numpy(values), pixel_format=PixelFormat("uint16", (0,), (65535,)))
    augmented = Batches(dataset, torch.arange(N), N, 5, 6, Augmentation(True, True, True))
    plain = Batches(dataset, torch.arange(N), N, 5, 6)
    assert augmented[0].dtype == torch.float32
    assert torch.equal(augmented[0].flatten(2).sort().values, plain[0].flatten(2).sort().values)
    assert torch.equal(plain[0].sort(0).values, torch.from_numpy(values.astype(np.float32)).sort(0).values)


def test_quarter_turns_match_pil() -> None:
    images = noise(4, 3, 5, 5)
    turned = rotate_quarters(images, torch.arange(4))
    for index in range(4):
        expected = Image.fromarray(images[index].permute(1, 2, 0).numpy()).rotate(90 * index)
        assert np.array_equal(turned[index].permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.6])
def test_color_factors_match_pil(factor: float) -> None:
    images, one = noise(2, 3, 8, 8), torch.ones(2)
    chosen = torch.full((2,), factor)
    for enhance, factors in (
        (ImageEnhance.Brightness, (chosen, one, one)),
        (ImageEnhance.Contrast, (one, chosen, one)),
        (ImageEnhance.Color, (one, one, chosen)),
    ):
        changed = change_colors(images.float() / 255, *factors) * 255
        for image, result in zip(images, changed, strict=True):
            expected = np.asarray(enhance(Image.fromarray(image.permute(1, 2, 0).numpy())).enhance(factor))
            # PIL rounds the luma, its mean, and the result.
            assert np.abs(result.permute(1, 2, 0).numpy() - expected).max() < 2.6


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.25, 0.4])
def test_hue_matches_colorsys(turn: float) -> None:
    images = torch.cat([noise(1, 3, 8, 8).float() / 255, torch.full((1, 3, 8, 8), 0.4)])
    turned = turn_hue(images, torch.full((2,), turn))
    for before, after in zip(
        images.double().permute(0, 2, 3, 1).reshape(-1, 3), turned.permute(0, 2, 3, 1).reshape(-1, 3), strict=True
    ):
        hue, saturation, value = colorsys.rgb_to_hsv(*before.tolist())
        expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        assert np.abs(after.numpy() - expected).max() < 1e-5


def test_colors_stay_within_the_range() -> None:
    augmented = batches(EVERYTHING)[3]
    assert augmented.dtype == torch.float32
    assert (float(augmented.min()) >= 0, float(augmented.max()) <= 255) == (True, True)
