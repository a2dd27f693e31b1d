"""Checkpoints: everything that decides the future of a run, one folder per step, written atomically.

    RUN/checkpoints/step-00001000/
        model_index.json, scheduler/, unet/    a pipeline folder, with the averaged weights and, as the variant `raw`,
                                               the weights being trained; see `ddim.io.runs`
        optimizer.safetensors                  the moments of AdamW
        averages.safetensors                   averages of other lengths: `ddim.training.averages`
        state.json                             the step, the loss scale, the metrics that no line of `metrics.jsonl`
                                               covers yet
        SHA256SUMS                             of all of these, as `sha256sum --check` reads it

Data order, augmentation, timesteps, noise and dropout are functions of the seed and the step, so that they have no
state to save. Nothing here is pickled: reading a checkpoint cannot run code. A folder is accepted only if its
`SHA256SUMS` matches its files to the byte.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddim.io.atomic import replace_folder
from ddim.io.json_files import read_json, to_json
from ddim.io.runs import RAW, SUMS_FILE, checkpoint_step, checksums, list_checkpoints, verify_checksums
from ddim.io.weights import WEIGHTS

logger = logging.getLogger(__name__)

TENSOR_FILES = {
    "model": f"unet/{WEIGHTS}.{RAW}.safetensors",
    "ema": f"unet/{WEIGHTS}.safetensors",
    "optimizer": "optimizer.safetensors",
    "averages": "averages.safetensors",
}
OPTIONAL_TENSORS = ("averages",)
"""Tensors that a checkpoint may lack, which is read as none."""
STATE_FILE = "state.json"


class Checkpoint(NamedTuple):
    """Content of a checkpoint.

    Attributes:
        step: number of steps taken.
        tensors: `model`, `ema`, `optimizer` and `averages`, each a mapping from names to tensors on the CPU; `averages`
            is empty where none are tracked.
        state: plain values.

    Example:
        >>> Checkpoint(5, {"model": {}, "ema": {}, "optimizer": {}, "averages": {}}, {"seconds": 1.0}).step
        5
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
    configs: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write the checkpoint of a step atomically, then delete older ones.

    Args:
        folder: folder of all checkpoints; created where it is missing.
        step: number of steps taken.
        tensors: `model`, `ema`, `optimizer` and, if there are any, `averages`.
        state: values that JSON can hold.
        keep: number of checkpoints to keep, the newest up to this step.
        keep_every: keep checkpoints of multiples of this step as well; 0 for none.
        configs: further files of the pipeline folder: texts by name.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: if it cannot be written; earlier checkpoints stay.

    Example:
        >>> import tempfile, torch
        >>> tensors = {name: {"w": torch.zeros(2)} for name in TENSOR_FILES}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_checkpoint(Path(folder), 7, tensors, {}, keep=1)
        ...     path.name, load_checkpoint(path).step
        ('step-00000007', 7)
    """
    path = folder / f"step-{step:08d}"
    with replace_folder(path) as temporary:
        for name, file in TENSOR_FILES.items():
            if name in OPTIONAL_TENSORS and not tensors.get(name):
                continue
            content = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors[name].items()}
            (temporary / file).parent.mkdir(exist_ok=True)
            try:
                save_file(content, temporary / file, {"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"cannot write {path}: {error}") from error
        for file, text in configs.items():
            (temporary / file).parent.mkdir(exist_ok=True)
            (temporary / file).write_text(text, encoding="utf-8")
        (temporary / STATE_FILE).write_text(to_json({"step": step, **state}), encoding="utf-8")
        (temporary / SUMS_FILE).write_text(checksums(temporary), encoding="utf-8")
    checkpoints = list_checkpoints(folder)
    # A later checkpoint was unreadable when the run resumed before it, and does not replace this one.
    for old in checkpoints[checkpoints.index(path) + keep :]:
        if not keep_every or checkpoint_step(old) % keep_every:
            _delete(old)
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and verify its checksums.

    Args:
        path: folder of the checkpoint, `step-...`.

    Returns:
        Its content, on the CPU.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if its content is not, to the byte, what was written.

    Example:
        >>> load_checkpoint(Path("step-00000001"))
        Traceback (most recent call last):
        FileNotFoundError: the checkpoint step-00000001 does not exist
    """
    if not path.is_dir():
        raise FileNotFoundError(f"the checkpoint {path} does not exist")
    verify_checksums(path)
    try:
        state = read_json(path / STATE_FILE)
        files = {name: _tensor_file(path, name) for name in TENSOR_FILES}
        tensors = {
            name: {} if name in OPTIONAL_TENSORS and not file.exists() else load_file(file)
            for name, file in files.items()
        }
        return Checkpoint(state.pop("step"), tensors, state)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"the checkpoint {path} is damaged or incomplete: {' '.join(str(error).split())}") from None


def _tensor_file(path: Path, name: str) -> Path:
    """Return the file of a group of tensors; version 0.1 kept them beside each other, under their names."""
    file = path / TENSOR_FILES[name]
    return file if file.exists() else path / f"{name}.safetensors"


def load_newest(folder: Path) -> Checkpoint | None:
    """Read the newest complete checkpoint, and log a warning for each newer one that is damaged.

    Args:
        folder: folder of all checkpoints; may be missing.

    Returns:
        The checkpoint; `None` if there is none.

    Example:
        >>> load_newest(Path("missing")) is None
        True
    """
    for path in list_checkpoints(folder):
        try:
            return load_checkpoint(path)
        except ValueError as error:
            logger.warning("%s; it is skipped", error)
    return None


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left half written or half deleted.

    Args:
        folder: folder of all checkpoints; may be missing.

    Example:
        >>> remove_partial(Path("missing"))
    """
    for pattern in (".step-*", ".deleted-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _delete(path: Path) -> None:
    """Delete a checkpoint: hidden by a rename first, so that a reader never meets it half deleted."""
    hidden = path.rename(path.with_name(f".deleted-{path.name}"))
    with contextlib.suppress(OSError):
        shutil.rmtree(hidden)
