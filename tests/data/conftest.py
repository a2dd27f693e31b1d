"""What the tests of data share: folders of images, and caches that are not the user's."""

from __future__ import annotations

from pathlib import Path

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
from PIL import Image

from digits import write_digits


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of each test; `datasets` and the hub's client have theirs beside it."""
    home = tmp_path / "cache-home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf/datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf/hub"))
    return home


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 40 digits."""
    return write_digits(tmp_path_factory.mktemp("digits"), 40)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder."""
    path = tmp_path / "data"
    path.mkdir()
    return path


@pytest.fixture
def mixed_images(folder: Path) -> list[Image.Image]:
    """Images of random pixels, sizes and modes, which fill `folder`."""
    random = np.random.default_rng(0)
    shapes = [(16, 16, 3), (20, 31, 3), (40, 17), (16, 16, 4), (9, 5, 3), (64, 64), (18, 18, 3)]
    images = [Image.fromarray(random.integers(0, 256, shape, np.uint8)) for shape in shapes]
    for index, image in enumerate(images):
        image.save(folder / f"{index}.png")
    return images
