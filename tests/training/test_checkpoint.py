"""Checkpoints: written whole, read without running code, and never replaced by something worse."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddim.training.checkpoint import load_newest, save_checkpoint


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def state(step: int) -> dict[str, Any]:
    weights = torch.full((50,), float(step))
    return {"model": {"w": weights}, "ema": {"w": weights / 2}, "optimizer": {"state": {}}, "losses": [0.5, step]}


def save(folder: Path, *steps: int, keep: int = 10) -> list[Path]:
    return [save_checkpoint(folder, step, state(step), keep) for step in steps]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    assert load_newest(folder) is None
    (path,) = save(folder, 7)
    assert path == folder / "step-00000007.pt"
    loaded = load_newest(folder)
    assert loaded is not None
    assert loaded.keys() == {"step", *state(7)}
    assert (loaded["step"], loaded["losses"]) == (7, [0.5, 7])
    assert torch.equal(loaded["model"]["w"], torch.full((50,), 7.0))
    # Not by our own function alone: PyTorch's safe loader takes it.
    assert torch.load(path, weights_only=True)["step"] == 7


def test_the_newest_is_that_of_the_largest_step(tmp_path: Path) -> None:
    save(tmp_path, 99_999_999, 100_000_000, 5)
    (tmp_path / "step-200000000.txt").write_text("")
    (tmp_path / "step-7.pt").write_text("")
    loaded = load_newest(tmp_path)
    assert loaded is not None
    assert loaded["step"] == 100_000_000


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    (tmp_path / "notes.txt").write_text("stays")
    save(tmp_path, 1, 2, 3, 4, 5, keep=keep)
    assert names(tmp_path) == ["notes.txt", *(f"step-{step:08d}.pt" for step in range(6 - keep, 6))]


def test_an_unreadable_later_one_does_not_push_out_the_good(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "step-00000020.pt").write_bytes(b"half of it")
    save(tmp_path, 15, keep=1)
    assert names(tmp_path) == ["step-00000015.pt", "step-00000020.pt"]
    save(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["step-00000020.pt"]


@pytest.mark.parametrize("length", [0, 1, 100, 0.5, -1])
def test_a_truncated_one_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture, length: float) -> None:
    newest = save(tmp_path, 1, 2)[1]
    content = newest.read_bytes()
    newest.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])
    loaded = load_newest(tmp_path)
    assert loaded is not None
    assert loaded["step"] == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"the checkpoint {newest} cannot be read and is skipped: " in record.getMessage()
    assert "\n" not in record.getMessage()


def test_no_damage_gets_through(tmp_path: Path) -> None:
    """A flipped bit is noticed, or it lies where nothing is stored."""
    newest = save(tmp_path, 1, 2)[1]
    content, chance, noticed = newest.read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        newest.write_bytes(damaged)
        loaded = load_newest(tmp_path)
        assert loaded is not None
        noticed += loaded["step"] == 1
        expected = state(loaded["step"])
        assert loaded.keys() == {"step", *expected}
        assert torch.equal(loaded["model"]["w"], expected["model"]["w"])
        assert torch.equal(loaded["ema"]["w"], expected["ema"]["w"])
    assert noticed > 100


@pytest.mark.parametrize("written", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, written: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 3)
    with (folder / "step-99999999.pt").open("wb") as file:
        written({"step": 99_999_999, **state(1), "model": Malicious(tmp_path / "has-run")}, file)
    loaded = load_newest(folder)
    assert loaded is not None
    assert loaded["step"] == 3
    assert "step-99999999.pt cannot be read and is skipped" in caplog.text
    assert names(tmp_path) == ["checkpoints"]


@pytest.mark.parametrize("content", [{"step": 9}, [1, 2], torch.zeros(3)], ids=["a part", "a list", "a tensor"])
def test_something_else_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: dict[str, Any] | list[int] | Tensor
) -> None:
    torch.save(content, tmp_path / "step-00000009.pt")
    (tmp_path / "step-00000010.pt").mkdir()
    assert load_newest(tmp_path) is None
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    if isinstance(content, dict):
        assert "it has no ema, model, optimizer" in caplog.text


def test_a_failing_write_leaves_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, 2)

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    for step in (2, 3):
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, step, state(99), keep=1)
    assert names(tmp_path) == ["step-00000001.pt", "step-00000002.pt"]
    loaded = load_newest(tmp_path)
    assert loaded is not None
    assert loaded["losses"] == [0.5, 2]
