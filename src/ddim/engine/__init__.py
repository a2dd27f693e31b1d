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

import numpy as np
import torch
from torch import Tensor, nn

from ddim.engine.base import EagerEngine, Engine, unsupported_reason
from ddim.unet import UNet2DModel
from ddim.validation import choice

logger = logging.getLogger(__name__)

ENGINES = ("auto", "eager", "compile")

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
        fingerprint = _fingerprint_weights(unet)
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


def _fingerprint_weights(unet: nn.Module) -> Any:
    """Return a value that changes whenever a weight does, in whatever way: addresses, versions and sums of the bits."""
    identities = [(p.data_ptr(), p._version, p.dtype) for p in unet.parameters()]
    sums = [_sum_bits(p.detach()) for p in unet.parameters()]
    # A GPU's sums are read all at once: reading one waits for the device.
    return identities, torch.stack(sums).tolist() if isinstance(sums[0], Tensor) else sums


def _sum_bits(weights: Tensor) -> Any:
    """Return the sum of the bits, taken as integers: an `int` for weights on a CPU, a tensor () elsewhere."""
    if weights.ndim == 4 and weights.is_contiguous(memory_format=torch.channels_last):
        weights = weights.permute(0, 2, 3, 1)
    if weights.device.type != "cpu":
        return weights.flatten().view(torch.uint8).sum(dtype=torch.int64)
    # NumPy's sum of int64 is several times as fast as PyTorch's.
    octets = weights.flatten().view(torch.uint8).numpy()
    aligned = octets.size // 8 * 8
    return int(octets[:aligned].view(np.int64).sum()) + int(octets[aligned:].sum())
