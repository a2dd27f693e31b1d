"""Images in the forms that sources read, and what is read from them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ddim.data.base import Source
from ddim.io.images import fit_image

CACHES = ["memory", "disk", "none"]
"""All values of `DataConfig.cache` but `auto`."""


def fitted(images: Sequence[Image.Image], size: int, channels: int, **options: Any) -> np.ndarray:
    """Images as a dataset must return them, uint8 (N, C, H, W)."""
    arrays = [np.atleast_3d(np.asarray(fit_image(image, size, size, channels, **options))) for image in images]
    return np.stack(arrays).transpose(0, 3, 1, 2)


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """An image file of a format."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_table(path: Path, **columns: pa.Array) -> str:
    """Write a plain parquet file; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


def write_hugging_face(path: Path, pixels: np.ndarray, column: str = "image", num_classes: int | None = None) -> str:
    """Write a parquet file as `datasets` does, with a column of labels first, all different by default; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"label": datasets.Value("int64"), column: datasets.Image()})
    labels = [index % (num_classes or len(pixels)) for index in range(len(pixels))]
    columns = {"label": labels, column: [Image.fromarray(image) for image in pixels]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return str(path)


def read_source(source: Source) -> list[np.ndarray]:
    """All images of a source."""
    return [np.asarray(decode()) for decode in source.fetch(range(source.count))]


def assert_images(source: Source, expected: np.ndarray) -> None:
    """Check that a source holds these images, in order."""
    assert source.count == len(expected)
    assert np.array_equal(np.stack(read_source(source)), expected)


def decode_error(source: Source, index: int = 0) -> str:
    """The message for an image that cannot be decoded."""
    (decode,) = source.fetch([index])
    with pytest.raises(ValueError, match="cannot be read") as caught:
        decode()
    assert "\n" not in str(caught.value)
    return str(caught.value)
