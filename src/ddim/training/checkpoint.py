"""Checkpoints: everything that decides the future of a run, in one file a step, written whole or not at all.

`RUN/checkpoints/step-00001000.pt` holds the weights, their moving average, the optimiser's state, the step and the
losses that no line of the metrics has counted yet; data order and randomness are functions of the step. Files are read
with `weights_only=True`, so that loading one cannot run code.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch

from ddim.files import write_whole

logger = logging.getLogger(__name__)

NAME = re.compile(r"step-(\d{8,})\.pt")
KEYS = {"step", "model", "ema", "optimizer"}


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of a step, then delete all but the newest `keep` up to that step.

    Raises:
        OSError: if it cannot be written; the checkpoints there are stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    with write_whole(path) as temporary:
        torch.save({"step": step, **state}, temporary)
    there = _newest_first(folder)
    # One of a later step could not be read when the run was taken up, and is no replacement for this one.
    for old in there[there.index(path) + keep :]:
        old.unlink()
    return path


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, with a warning for each that is not; `None` where there is none."""
    for path in _newest_first(folder):
        try:
            # torch.load compares no checksums.
            with ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"{damaged} in it has another checksum")
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if missing := KEYS - state.keys():
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
            return state
        except Exception as error:  # a damaged file fails in whatever it is taken for
            logger.warning(
                "the checkpoint %s cannot be read and is skipped: %s",
                path,
                str(error).splitlines()[0] if str(error) else type(error).__name__,
            )
    return None


def _newest_first(folder: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in folder.glob("step-*.pt") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]
