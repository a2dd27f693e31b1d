"""Checkpoints: everything that decides the future of a run, a folder a step, written whole or not at all.

    RUN/checkpoints/step-00001000/
        model.safetensors        the weights being trained, under the names of `diffusers`
        ema.safetensors          their moving average
        optimizer.safetensors    the moments of AdamW
        state.json               the step, the loss scale, the losses that no line of the metrics has counted yet
        SHA256SUMS               of all of these, as `sha256sum --check` reads it

Data order, augmentation, timesteps, noise and dropout are functions of the seed and the step, so that there is no state
of theirs to keep. Nothing here is pickled: reading a checkpoint cannot run code. A folder is taken only if `SHA256SUMS`
is, to the byte, what its files would be given.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddim.io.atomic import replace_folder
from ddim.io.json_files import read_json, to_json

logger = logging.getLogger(__name__)

NAME = re.compile(r"step-(\d{8,})")
TENSORS = ("model", "ema", "optimizer")
STATE, SUMS = "state.json", "SHA256SUMS"


class Checkpoint(NamedTuple):
    """What is in a checkpoint.

    Attributes:
        step: how many steps had been taken.
        tensors: `model`, `ema` and `optimizer`: name -> tensor on the CPU.
        state: plain values.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    keep_every: int = 0,
) -> Path:
    """Write the checkpoint of a step, then delete older ones.

    Args:
        folder: made where it is missing.
        step: how many steps have been taken.
        tensors: `model`, `ema` and `optimizer`.
        state: values that JSON can hold.
        keep: the newest so many, up to this step, stay.
        keep_every: those of multiples of this stay as well; 0 for none.

    Returns:
        The checkpoint's own folder.

    Raises:
        OSError: if it cannot be written; the checkpoints there are stay.
    """
    path = folder / f"step-{step:08d}"
    with replace_folder(path) as temporary:
        for name in TENSORS:
            content = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors[name].items()}
            try:
                save_file(content, temporary / f"{name}.safetensors")
            except SafetensorError as error:
                raise OSError(f"cannot write {path}: {error}") from error
        (temporary / STATE).write_text(to_json({"step": step, **state}), encoding="utf-8")
        (temporary / SUMS).write_text(checksums(temporary), encoding="utf-8")
    there = newest_first(folder)
    # One of a later step could not be read when the run was taken up, and is no replacement for this one.
    for old in there[there.index(path) + keep :]:
        if not keep_every or step_of(old) % keep_every:
            _delete(old)
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and hold it against its checksums.

    Args:
        path: the folder of a step.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it is not, to the byte, what was written.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        if (path / SUMS).read_bytes() != checksums(path).encode():
            raise ValueError(f"its files are not those that {SUMS} tells")
        state = read_json(path / STATE)
        tensors = {name: load_file(path / f"{name}.safetensors") for name in TENSORS}
        return Checkpoint(state.pop("step"), tensors, state)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"the checkpoint {path} is damaged or not whole: {' '.join(str(error).split())}") from None


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, with a warning for each that is not; `None` where there is none."""
    for path in newest_first(folder):
        try:
            return load_checkpoint(path)
        except ValueError as error:
            logger.warning("%s; it is skipped", error)
    return None


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, by step."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def checksums(path: Path) -> str:
    """A line for each file in a folder except the list itself: SHA-256, two spaces, name."""
    lines = []
    for file in sorted(p for p in path.iterdir() if p.name != SUMS):
        with file.open("rb") as content:
            lines.append(f"{hashlib.file_digest(content, 'sha256').hexdigest()}  {file.name}\n")
    return "".join(lines)


def clean(folder: Path) -> None:
    """Remove what a process that died has left half written or half deleted."""
    for pattern in (".step-*", ".deleted-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _delete(path: Path) -> None:
    """Out of sight at once, so that none is ever found half deleted."""
    gone = path.rename(path.with_name(f".deleted-{path.name}"))
    with contextlib.suppress(OSError):
        shutil.rmtree(gone)
