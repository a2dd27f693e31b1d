"""Warnings about a set of images: hardly any range of values, or color for a gray model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddim.data.config import DataConfig
from ddim.data.dataset import open_dataset
from ddim.data.inspection import inspect_images
from ddim.data.sources import open_source
from digits import write_digits


def write(folder: Path, low: int, high: int, channels: int, count: int = 20) -> str:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(low, high, (count, 8, 8, channels), np.uint8, endpoint=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image.squeeze(2) if channels == 1 else image).save(folder / f"{index:02d}.png")
    return str(folder)


def test_narrow_range_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path / "dark", 0, 20, 1)
    open_dataset(DataConfig(source=source), 8, 1)
    assert caplog.messages == [
        f"{source}: of 16 images looked at, all values are from 0 to 20 in 0 to 255; check how they are scaled"
    ]


def test_sixteen_bit_images_of_eight_bits_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16)).save(tmp_path / "x.png")
    inspect_images(open_source(str(tmp_path)), 1)
    assert "all values are from 0 to 1 in 0 to 255" in caplog.text


def test_color_for_a_gray_model_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path / "color", 0, 255, 3, count=3)
    open_dataset(DataConfig(source=source), 8, 3)
    assert not caplog.messages
    open_dataset(DataConfig(source=source), 8, 1)
    assert caplog.messages == [
        f"{source}: of 3 images looked at, 3 are in color and become gray; a color model has in_channels=3"
    ]


def test_ordinary_images_are_not_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_digits(tmp_path / "digits", 5)
    for file in (tmp_path / "digits").iterdir():
        Image.open(file).convert("RGB").save(file.with_suffix(".jpg"), quality=60)
    (tmp_path / "digits" / "notes.png").write_text("reported where it is read")
    for channels in (1, 3):
        inspect_images(open_source(str(tmp_path / "digits")), channels)
    assert not caplog.messages
