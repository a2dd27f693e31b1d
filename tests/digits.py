"""scikit-learn's handwritten digits, 8x8 and gray: real images that require no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

TINY_MODEL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}
"""Arguments of a U-Net for the digits, with about 30 000 parameters."""


def digits(count: int | None = None) -> np.ndarray:
    """Return the first `count` of the 1797 digits, or all of them, as uint8 (N, 8, 8)."""
    return np.round(load_digits().images[:count] * (255 / 16)).astype(np.uint8)


def write_digits(folder: Path, count: int) -> Path:
    """Write one PNG per digit and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, pixels in enumerate(digits(count)):
        Image.fromarray(pixels).save(folder / f"{index:04d}.png")
    return folder
