"""Names of devices and dtypes, as the command line gives them, turned into PyTorch's."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name, found to be there; `auto` is the first GPU there is, else the CPU.

    Raises:
        ValueError: if there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"there is no device {str(name)!r} here; give cpu, cuda, cuda:1, ... or auto") from None
    return device


def choose_dtype(name: str) -> torch.dtype:
    """ValueError unless it is one of `DTYPES`."""
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; it must be one of {', '.join(DTYPES)}")
    return DTYPES[name]
