"""What the tests of training share: images, and a configuration whose steps take a few milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddim.training.config import TrainConfig, validate
from digits import TINY_MODEL, digits, write_digits

ONE_LEVEL: dict[str, Any] = {
    "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
}


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 40 digits."""
    return write_digits(tmp_path_factory.mktemp("images"), 40)


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """The same as uint8 (40, 1, 8, 8)."""
    return torch.from_numpy(digits(40))[:, None]


@pytest.fixture(scope="session")
def make_config(image_folder: Path) -> Callable[..., TrainConfig]:
    """A configuration with entries replaced; those of `data`, `model`, `optim` and `samples` one by one."""
    base: dict[str, Any] = {
        "data": {"source": str(image_folder)},
        "model": TINY_MODEL | ONE_LEVEL,
        "batch_size": 8,
        "max_steps": 12,
        "optim": {"lr": 2e-3, "warmup_steps": 4},
        "samples": {"every": 0, "count": 4, "num_inference_steps": 2},
    }

    def make(**entries: Any) -> TrainConfig:
        sections = {name: base[name] | entries.get(name, {}) for name in ("data", "model", "optim", "samples")}
        return validate(base | entries | sections)

    return make
