"""Checkpoints: everything that decides the future of a run, in one file a step, written whole or not at all.

`RUN/checkpoints/step-00001000.pt` holds the weights, their moving average, the optimiser's state and the step; data
order and randomness are functions of the step. Files are read with `weights_only=True`, so that loading one cannot run
code.
"""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch

from ddim.files import write_whole

logger = logging.getLogger(__name__)

NAME = re.compile(r"step-(\d{8,})\.pt")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of a step, then delete all but the newest `keep`.

    Raises:
        OSError: if it cannot be written; the checkpoints there are stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    with write_whole(path) as temporary:
        torch.save({"step": step, **state}, temporary)
    for old in _newest_first(folder)[keep:]:
        old.unlink()
    return path


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, with a warning for each that cannot; `None` where there is none."""
    for path in _newest_first(folder):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, BadZipFile) as error:
            logger.warning(
                "the checkpoint %s cannot be read and is skipped: %s",
                path,
                str(error).splitlines()[0] if str(error) else type(error).__name__,
            )
    return None


def _newest_first(folder: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in folder.glob("step-*.pt") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]
