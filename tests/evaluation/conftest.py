"""Fixtures of the tests of evaluation: the built-in model, a fresh cache folder, image sets of tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from ddim.evaluation.image_sets import BATCH_SIZE, ImageSet
from ddim.pipeline import DDIMPipeline


@pytest.fixture(scope="module")
def pipe() -> DDIMPipeline:
    pipe = DDIMPipeline.from_pretrained("mnist")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def features_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of cached features, empty."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "ddim" / "features"


@pytest.fixture(scope="session")
def as_files() -> Callable[..., ImageSet]:
    """`as_files(pixels, name)`: an image set of uint8 (N, C, H, W) that is cached like files."""

    def make(pixels: Tensor, name: str = "files") -> ImageSet:
        channels, height, width = pixels.shape[1:]
        read_batch = pixels.split(BATCH_SIZE).__getitem__
        return ImageSet(name, (channels, height, width), len(pixels), read_batch, from_files=True)

    return make
