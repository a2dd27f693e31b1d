"""Devices and dtypes by the names that the command line and configurations use."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ddim.validation import choice, shown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """Return the device of a name, and check that it is available.

    Args:
        name: a PyTorch device such as `cpu`, `cuda` or `cuda:1`; `auto` is the first GPU, or the CPU without one.

    Returns:
        The device.

    Raises:
        ValueError: if this machine has no such device.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(
            f"device must be auto or a device of this machine, such as cpu, cuda or cuda:1, got {shown(str(name))}"
        ) from None
    return device


def choose_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name.

    Args:
        name: one of `DTYPES`.

    Returns:
        The dtype.

    Raises:
        ValueError: for another name.

    Example:
        >>> choose_dtype("bfloat16")
        torch.bfloat16
    """
    return DTYPES[choice("dtype", name, DTYPES)]


def execution_device(network: Any) -> torch.device:
    """Return the device that a network runs on: that of its weights, or where hooks of `accelerate` bring them.

    Args:
        network: any object; one without a `.device` runs on the CPU.

    Example:
        >>> execution_device(torch.nn.Identity())
        device(type='cpu')
    """
    device = getattr(network, "device", "cpu")
    # All modules of a network that is offloaded, to the CPU or the meta device, have a hook, or none.
    if isinstance(network, nn.Module) and "_hf_hook" in vars(network):
        hooks = [vars(module).get("_hf_hook") for module in network.modules()]
        devices = [getattr(hook, "execution_device", None) for hook in hooks]
        device = next((hooked for hooked in devices if hooked is not None), device)
    return torch.device(device)
