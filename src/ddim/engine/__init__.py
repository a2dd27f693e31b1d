"""Engines: what runs a U-Net fast, with the same weights and, to rounding, the same results.

    auto      the engine of the network's device, `cpu` or `cuda`; the network itself where neither supports it
    eager     the network itself
    compile   the network compiled by `torch.compile`

An engine is made from a network's weights once, and again when they have changed.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

from torch import nn

from ddim.engine.base import EagerEngine, Engine, unsupported_reason
from ddim.engine.digests import fingerprint_weights
from ddim.unet import UNet2DModel
from ddim.validation import choice

logger = logging.getLogger(__name__)

ENGINES = ("auto", "eager", "compile")
"""The names of the engines."""

_cache: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Engine]] = weakref.WeakKeyDictionary()
"""The engine of each network, and the fingerprint of the weights that it was made from."""


def check_engine(name: str) -> str:
    """Check that an engine's name is one of `ENGINES`.

    Args:
        name: what the caller gave as `engine`.

    Returns:
        The name.

    Raises:
        ValueError: if it is another.

    Example:
        >>> check_engine("fast")
        Traceback (most recent call last):
        ValueError: engine must be one of auto, eager, or compile, got 'fast'
    """
    return choice("engine", name, ENGINES)


def get_engine(unet: Any, name: str = "auto") -> Engine:
    """Return the engine that runs a network; that of an unchanged network is the one made before.

    Args:
        unet: any object that is called as `unet(sample, timestep).sample`.
        name: one of `ENGINES`.

    Returns:
        An engine. It does not keep the network alive, unless it is the network itself that runs.

    Raises:
        ValueError: for another name.
        RuntimeError: if name is `compile` and `torch.compile` does not work on this machine.

    Example:
        >>> unet = UNet2DModel(sample_size=8, block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
        >>> get_engine(unet, "eager").name
        'UNet2DModel'
    """
    if check_engine(name) == "eager":
        return EagerEngine(unet)
    if name == "compile":
        from ddim.engine.cuda import compile_network

        return EagerEngine(compile_network(unet))
    reason = unsupported_reason(unet)
    if reason is None:
        fingerprint = fingerprint_weights(unet)
        previous, engine = _cache.get(unet, (None, None))
        if engine is not None and previous == fingerprint:
            return engine
        engine, reason = _build(unet)
        if engine is not None:
            _cache[unet] = fingerprint, engine
            return engine
    logger.debug("the network runs as it is: %s", reason)
    return EagerEngine(unet)


def _build(unet: UNet2DModel) -> tuple[Engine | None, str | None]:
    """Return an engine, or the reason why there is none."""
    if unet.device.type == "cuda":
        from ddim.engine.cuda import CUDAEngine

        return CUDAEngine(unet), None
    try:
        from ddim.engine.cpu import CPUEngine

        return CPUEngine(unet), None
    except ImportError as error:
        return None, str(error)
