"""The tensors of a checkpoint file, by their original names. Nothing that is read can run code.

*.safetensors      tensors
any other name     a file of `torch.save`: a dictionary of tensors, or the list of a training run of ermongroup/ddim,
                   [model, optimizer, epoch, step] or [model, optimizer, epoch, step, averaged model]
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim.io.reading import reader_reason
from ddim.io.weights import is_state_dict, read_pickle

logger = logging.getLogger(__name__)

DATA_PARALLEL_PREFIX = "module."
"""What `torch.nn.DataParallel` puts before every name."""
EMA_POSITION = 4
"""The position of the averaged model in the list of a training run."""


def read_checkpoint(path: Path, ema: bool = True) -> dict[str, Tensor]:
    """Read all tensors of a network.

    Args:
        path: the file.
        ema: use the averaged model of a training run if there is one.

    Returns:
        Tensors on the CPU by their original names.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is damaged, is not a checkpoint of a network, or loading it could run code.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     torch.save({"module.conv_in.bias": torch.zeros(2)}, f"{folder}/model.pt")
        ...     read_checkpoint(Path(folder) / "model.pt")
        {'conv_in.bias': tensor([0., 0.])}
    """
    if path.is_dir():
        raise FileNotFoundError(f"the checkpoint {path} is a folder, not a file; layout='diffusers' converts folders")
    if not path.is_file():
        raise FileNotFoundError(f"the checkpoint {path} does not exist")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    if isinstance(content, list | tuple):
        content = _choose_state(content, path, ema)
    if not is_state_dict(content) or not content:
        raise ValueError(
            f"{path} is not a checkpoint of a network: it holds neither a dictionary of tensors, dense and "
            "named, nor a list [model, optimizer, epoch, step, averaged model]"
        )
    if all(name.startswith(DATA_PARALLEL_PREFIX) for name in content):
        return {name.removeprefix(DATA_PARALLEL_PREFIX): tensor for name, tensor in content.items()}
    return dict(content)


def _choose_state(states: list[Any] | tuple[Any, ...], path: Path, ema: bool) -> Any:
    """Choose the averaged model or the model itself from the list of a training run."""
    if ema and len(states) > EMA_POSITION:
        return states[EMA_POSITION]
    if ema and states:
        logger.warning("%s holds no averaged weights; the raw ones are used", path)
    return states[0] if states else None


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged: {reader_reason(error)}") from None
