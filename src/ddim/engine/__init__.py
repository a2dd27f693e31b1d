"""How a U-Net is run fast: the same weights and, to rounding, the same numbers, in less time.

    auto      the engine of the network's device: `cpu`, or `cuda`; the network itself where none fits
    eager     the network itself
    compile   what `torch.compile` makes of it

An engine is made of a network's weights once, and made again when they have changed.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddim.nn.layers import (
    ACTIVATIONS,
    Attention,
    Downsample2D,
    GaussianFourierProjection,
    ResnetBlock2D,
    TimestepEmbedding,
    Timesteps,
    Upsample2D,
)
from ddim.unet import DownBlock2D, MidBlock2D, UNet2DModel, UpBlock2D

logger = logging.getLogger(__name__)

KNOWN = {
    *(UNet2DModel, DownBlock2D, MidBlock2D, UpBlock2D, ResnetBlock2D, Attention, Downsample2D, Upsample2D),
    *(Timesteps, GaussianFourierProjection, TimestepEmbedding, *ACTIVATIONS.values()),
    *(nn.Conv2d, nn.Linear, nn.GroupNorm, nn.Embedding, nn.Identity, nn.Dropout, nn.ModuleList),
}


ENGINES = ("auto", "eager", "compile")

_made: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Any]] = weakref.WeakKeyDictionary()
"""For each network the state it was in and what was made of it."""


def check_engine(name: str) -> str:
    """The name, if it is one of `ENGINES`; ValueError otherwise."""
    if name not in ENGINES:
        raise ValueError(f"there is no engine {name!r}; there are {', '.join(ENGINES)}")
    return name


def prepare(unet: Any, engine: str = "auto") -> Any:
    """What runs a network: something that is called as it is, `network(sample, timestep).sample`, without gradients.

    Args:
        unet: anything that a pipeline takes.
        engine: of `ENGINES`.

    Raises:
        ValueError: for another engine.
        RuntimeError: if it is to be compiled and cannot be.
    """
    if check_engine(engine) == "eager":
        return unet
    if engine == "compile":
        from ddim.engine.cuda import compiled

        return compiled(unet)
    if (reason := altered(unet) or _unfit(unet)) is None:
        state = _state(unet)
        before, made = _made.get(unet, (None, None))
        if before == state:
            return made
        made, reason = _make(unet)
        if made is not None:
            _made[unet] = state, made
            return made
    logger.debug("the network runs as it is: %s", reason)
    return unet


def _unfit(unet: UNet2DModel) -> str | None:
    """Why the engine of its device cannot stand in for a network that is not `altered`; `None` if it can."""
    if unet.device.type == "cuda":
        from ddim.engine import cuda

        return cuda.unfit(unet)
    fits = all(p.dtype == torch.float32 and p.device.type == "cpu" for p in unet.parameters())
    return None if fits else "not all of it is float32 on the CPU, or on a CUDA device"


def _make(unet: UNet2DModel) -> tuple[Any, str | None]:
    """An engine, or why there is none."""
    if unet.device.type == "cuda":
        from ddim.engine.cuda import CUDAEngine

        return CUDAEngine(unet), None
    try:
        from ddim.engine.cpu import CPUEngine

        return CPUEngine(unet), None
    except ImportError as error:
        return None, str(error)


def altered(unet: Any) -> str | None:
    """What a network has that no engine knows; `None` for a `UNet2DModel` as it was built."""
    if type(unet) is not UNet2DModel:
        return f"a {type(unet).__name__} is not known"
    for name, module in unet.named_modules():
        if type(module) not in KNOWN or "forward" in vars(module):
            return f"{name} has been replaced"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has hooks"
    return None


def _state(unet: nn.Module) -> Any:
    """Changes whenever a weight does, in whatever way."""
    places = [(p.data_ptr(), p._version, p.dtype) for p in unet.parameters()]
    sums = [_sum(p.detach()) for p in unet.parameters()]
    # Of a GPU's, all at once: asking for a number waits for the device.
    return places, torch.stack(sums).tolist() if isinstance(sums[0], Tensor) else sums


def _sum(weights: Tensor) -> Any:
    """Of the bits, taken for whole numbers: a number on a CPU, a tensor elsewhere."""
    if weights.ndim == 4 and weights.is_contiguous(memory_format=torch.channels_last):
        weights = weights.permute(0, 2, 3, 1)
    if weights.device.type != "cpu":
        return weights.flatten().view(torch.uint8).sum(dtype=torch.int64)
    # Several times as fast as PyTorch's.
    bits = weights.flatten().view(torch.uint8).numpy()
    whole = bits.size // 8 * 8
    return int(bits[:whole].view(np.int64).sum()) + int(bits[whole:].sum())
