"""What is found in a collection: sizes, pixel formats, channels, labels, by images written for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddim.data.sources import open_source
from ddim.data.survey import SURVEYED_IMAGES, ImageSurvey, survey_images
from digits import digits, write_digits
from image_data import write_hugging_face


def survey(source: Path | str) -> ImageSurvey:
    return survey_images(open_source(str(source)))


def test_mixed_sizes_and_modes(tmp_path: Path) -> None:
    images = {
        "a.png": Image.new("L", (10, 20)),
        "b.png": Image.new("RGB", (30, 12), "red"),
        "c.png": Image.new("RGBA", (8, 8), "blue"),
        "d.jpg": Image.new("CMYK", (16, 16)),
        "e.png": Image.new("P", (9, 9)),
    }
    for name, image in images.items():
        image.save(tmp_path / name)
    found = survey(tmp_path)
    assert sorted(found.sizes) == sorted((image.height, image.width) for image in images.values())
    assert sorted(found.modes) == [(mode, 1) for mode in sorted(image.mode for image in images.values())]
    assert (found.count, found.channels, found.labels) == (5, 3, None)


@pytest.mark.parametrize(("tint", "channels"), [(0, 1), (10, 1), (60, 3)])
def test_color_is_what_the_pixels_are_not_the_mode(tmp_path: Path, tint: int, channels: int) -> None:
    for index in range(3):
        pixels = np.full((8, 8, 3), 100, np.uint8)
        pixels[3, 4, 0] += tint if index == 2 else 0
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    assert survey(tmp_path).channels == channels


def test_class_folders_are_labels(tmp_path: Path) -> None:
    for name in ("cats", "dogs", "cows"):
        write_digits(tmp_path / name, 2)
    assert survey(tmp_path).labels == "3 folders"
    assert survey(tmp_path / "cats").labels is None


def test_columns_and_arrays_are_labels(tmp_path: Path) -> None:
    write_hugging_face(tmp_path / "train.parquet", digits(4))
    assert survey(tmp_path / "train.parquet").labels == "the column label"
    np.savez(tmp_path / "images.npz", images=digits(4), labels=np.arange(4), scores=np.ones(4), mean=np.ones((8, 8)))
    assert survey(tmp_path / "images.npz").labels == "the array labels"
    np.savez(tmp_path / "plain.npz", digits(4))
    assert survey(tmp_path / "plain.npz").labels is None


def test_arrays_have_their_channels(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", np.zeros((4, 12, 20, 5), np.uint16))
    found = survey(tmp_path / "images.npz")
    assert (found.sizes, found.modes, found.channels) == ([(12, 20)] * 4, [("uint16 of 5 channels", 4)], 5)
    np.save(tmp_path / "gray.npy", np.zeros((4, 12, 20), np.float32))
    assert survey(tmp_path / "gray.npy").channels == 1


def test_deep_gray_images_are_gray(tmp_path: Path) -> None:
    for index in range(2):
        Image.fromarray(np.full((8, 8), 40_000 * index, np.uint16)).save(tmp_path / f"{index}.png")
    found = survey(tmp_path)
    assert (found.modes, found.channels) == ([("I;16", 2)], 1)


def test_a_sample_is_looked_at_and_all_are_counted(tmp_path: Path) -> None:
    np.savez(tmp_path / "many.npz", np.zeros((1000, 8, 8), np.uint8))
    found = survey(tmp_path / "many.npz")
    assert (found.count, len(found.sizes)) == (1000, SURVEYED_IMAGES)


def test_unreadable_images_are_left_out(tmp_path: Path) -> None:
    write_digits(tmp_path, 2)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    found = survey(tmp_path)
    assert (found.count, len(found.sizes)) == (3, 2)
    for path in tmp_path.glob("0*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"^no image of .* can be read; the first: .*broken\.png") as caught:
        survey(tmp_path)
    assert "\n" not in str(caught.value)
