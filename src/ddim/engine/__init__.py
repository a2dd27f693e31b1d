"""How a U-Net is run fast: the same weights and, to rounding, the same numbers, in less time.

`prepare` gives what a pipeline can ask in a network's place; `cpu` is the one engine there is.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ddim.layers import (
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


def prepare(unet: Any) -> Any:
    """What runs a network fastest: an engine made of its weights as they are now, or else the network itself.

    Args:
        unet: anything that a pipeline takes.
    """
    reason = unfit(unet)
    if reason is None:
        try:
            from ddim.engine.cpu import CPUEngine
        except ImportError as error:
            reason = str(error)
        else:
            return CPUEngine(unet)
    logger.debug("the network runs as it is: %s", reason)
    return unet


def unfit(unet: Any) -> str | None:
    """Why the engine cannot stand in for a network; `None` if it can."""
    if type(unet) is not UNet2DModel:
        return f"a {type(unet).__name__} is not known"
    if unet.device.type != "cpu" or any(p.dtype != torch.float32 or p.device != unet.device for p in unet.parameters()):
        return "not all of it is float32 on the CPU"
    for name, module in unet.named_modules():
        if type(module) not in KNOWN or "forward" in vars(module):
            return f"{name} has been replaced"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has hooks"
    return None
