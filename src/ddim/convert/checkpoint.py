"""The tensors of a checkpoint file, by their original names. Nothing that is read here can run code.

*.safetensors      tensors
any other name     what `torch.save` wrote: a dictionary of tensors, or the list of a training run of ermongroup/ddim,
                   [model, optimizer, epoch, step] or [model, optimizer, epoch, step, averaged model]
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim.io.weights import read_pickle

logger = logging.getLogger(__name__)

# Of torch.nn.DataParallel, around the whole model.
WRAPPER = "module."
TRAINING_STATE = 4


def read_checkpoint(path: Path, ema: bool = True) -> dict[str, Tensor]:
    """All tensors of a network, on the CPU.

    Args:
        path: of the file.
        ema: take the averaged model of a training run, where there is one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or holds something else, or loading it could run code.
    """
    if not path.is_file():
        kind = "a folder; give a file, or --layout diffusers" if path.is_dir() else "not there"
        raise FileNotFoundError(f"the checkpoint {path} is {kind}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    if isinstance(content, list | tuple):
        content = _choose(content, path, ema)
    if not _is_state_dict(content):
        raise ValueError(
            f"{path} is no checkpoint of a network: it holds neither a dictionary of tensors nor a list [model, "
            "optimizer, epoch, step, averaged model]"
        )
    if all(name.startswith(WRAPPER) for name in content):
        return {name.removeprefix(WRAPPER): tensor for name, tensor in content.items()}
    return dict(content)


def _choose(states: list[Any] | tuple[Any, ...], path: Path, ema: bool) -> Any:
    """Of a training run's list, the averaged model or the model itself."""
    if ema and len(states) > TRAINING_STATE:
        return states[TRAINING_STATE]
    if ema and states:
        logger.warning("%s holds no averaged weights; the raw ones are taken", path)
    return states[0] if states else None


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items())
    )


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from None
