"""Sets of images from every kind of file, and models."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ddim.bulk import sample_many
from ddim.evaluation.features import Pixels
from ddim.evaluation.image_sets import open_files, sample_image_set
from ddim.evaluation.metrics import compute_features
from ddim.io.hub import is_model
from ddim.pipeline import DDIMPipeline
from digits import write_digits


def test_all_formats_hold_equal_images(pipe: DDIMPipeline, tmp_path: Path) -> None:
    hashes = set()
    settings: dict[str, Any] = {"num_inference_steps": 2}
    for name in ("images", "x.npz", "x.tar"):
        sample_many(pipe, tmp_path / name, 9, batch_size=64, shard_size=4, **settings)
        images = open_files(str(tmp_path / name))
        assert (images.count, images.shape) == (9, (1, 28, 28))
        hashes.add(compute_features(images, Pixels(images.shape)).sha256)
    hashes.add(compute_features(sample_image_set(pipe, 9, **settings), Pixels((1, 28, 28))).sha256)
    assert len(hashes) == 1
    assert open_files(str(tmp_path / "x-000000.tar")).count == 9


def test_count_and_shape(tmp_path: Path) -> None:
    write_digits(tmp_path, 12)
    images = open_files(str(tmp_path), 5, (3, 6, 10))
    (batch,) = images.batches()
    assert batch.shape == (5, 3, 6, 10)
    assert batch.dtype == torch.uint8


def test_tar_of_another_machine(tmp_path: Path) -> None:
    """Hidden files of macOS are left out, a pipe does not hang, and a truncated archive is refused by name."""
    write_digits(tmp_path / "digits", 3)
    with tarfile.open(tmp_path / "x-000000.tar", "w") as archive:
        for file in sorted((tmp_path / "digits").iterdir()):
            archive.add(file, f"digits/{file.name}")
            archive.add(file, f"digits/._{file.name}")
    os.mkfifo(tmp_path / "x-000001.tar")
    assert open_files(str(tmp_path / "x.tar")).count == 3
    with (tmp_path / "x-000000.tar").open("r+b") as stream:
        stream.truncate(tarfile.BLOCKSIZE * 3 // 2)
    with pytest.raises(ValueError, match=r"x-000000\.tar (is truncated|cannot be read as tar)"):
        open_files(str(tmp_path / "x.tar"))


def test_invalid_files_raise(tmp_path: Path) -> None:
    write_digits(tmp_path, 3)
    with pytest.raises(ValueError, match=r"count must be at most 3, .*, got 4"):
        open_files(str(tmp_path), 4)
    with pytest.raises(FileNotFoundError, match=r"nor x-000000\.tar exists"):
        open_files(str(tmp_path / "x.tar"))
    (tmp_path / "bad.tar").write_bytes(b"not an archive" * 100)
    with pytest.raises(ValueError, match="cannot be read as tar"):
        open_files(str(tmp_path / "bad.tar"))


def test_is_model(tmp_path: Path, pipe: DDIMPipeline) -> None:
    assert is_model("mnist")
    assert not is_model(str(tmp_path))
    pipe.save_pretrained(tmp_path)
    assert is_model(str(tmp_path))
