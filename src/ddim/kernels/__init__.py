"""Loops over feature maps that are compiled by numba and run on PyTorch's own threads.

They exist where PyTorch passes over memory many times for what one pass can do, or where its libraries are far from the
machine's speed. All of them take float32 maps on the CPU with channels innermost, and whoever calls them has a plain
form in PyTorch for everything else. `norm`, `convolution`, `winograd` and `direct` have them, `source` is what numba
compiles, `library` keeps and runs what comes of it.

Here is what decides between the two forms in training.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

IN_TRAINING = ("norm", "convolution", "winograd")
"""The modules whose loops stand in for PyTorch's operations in training."""


def stand_in(module: nn.Module, x: Tensor, *others: Tensor) -> bool:
    """Whether compiled loops stand in for PyTorch's operations: in training, where the time goes, on a CPU.

    Args:
        module: whose operation it is.
        x: the map (N, C, H, W).
        others: what else takes part.
    """
    return (
        module.training
        and x.device.type == "cpu"
        and all(tensor.dtype == torch.float32 for tensor in (x, *others))
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    )


def differentiable_gradients(
    y: Tensor, inputs: Sequence[Tensor | None], wants: Sequence[bool], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of a plain form of y, where gradients of gradients are asked for; `None` for what nobody wants."""
    wanted = [tensor for tensor, needed in zip(inputs, wants, strict=True) if needed and tensor is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return tuple(next(found) if needed else None for needed in wants)


@functools.cache
def loops(name: str) -> ModuleType | None:
    """One of `IN_TRAINING`, its loops ready, or `None` where they cannot be compiled."""
    try:
        modules = {each: importlib.import_module(f"ddim.kernels.{each}") for each in IN_TRAINING}
        # All at once: what has to be compiled is compiled side by side.
        wanted = [loop for module in modules.values() for loop in module.TRAINING]
        importlib.import_module("ddim.kernels.library").ready(*wanted)
        return modules[name]
    except ImportError as error:
        logger.debug("%s is PyTorch's own: %s", name, error)
        return None
