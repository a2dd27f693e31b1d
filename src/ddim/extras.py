"""Optional packages: which extra of this package brings which module."""

from __future__ import annotations

import sys
from importlib.util import find_spec

EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "matplotlib": "train",
    "psutil": "train",
    "pyarrow": "train",
    "pydantic": "train",
    "sklearn": "train",
    "tensorboard": "train",
    "torchmetrics": "train",
    "yaml": "train",
    "torch_fidelity": "inception",
    "torchvision": "inception",
    "fastapi": "app",
    "gradio": "app",
    "uvicorn": "app",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "openvino": "export",
}
"""Extras by the modules that they bring, those of a package's own dependencies among them."""


def require(purpose: str, *modules: str) -> None:
    """Check that optional modules are installed, before work that imports them.

    Args:
        purpose: what requires them, the subject of the message.
        modules: top-level modules of `EXTRAS`.

    Raises:
        ImportError: if one is missing, with the command that installs it.

    Example:
        >>> require("arithmetic", "math")
    """
    for module in modules:
        if not _is_installed(module):
            raise ImportError(missing_module(purpose, module), name=module)


def missing_module(purpose: str, module: str) -> str:
    """Return the message about a module that is not installed.

    Args:
        purpose: what requires it.
        module: its name.

    Example:
        >>> missing_module("evaluation", "torchmetrics")
        "evaluation requires torchmetrics; install it with: pip install 'ddim[train]'"
    """
    name = module.partition(".")[0]
    what = f"'ddim[{EXTRAS[name]}]'" if name in EXTRAS else name
    return f"{purpose} requires {name}; install it with: pip install {what}"


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # of a module without a specification, which some programs make
        return sys.modules.get(module) is not None


def check_xformers() -> None:
    """Check that xformers is installed, without which `enable_xformers_memory_efficient_attention` raises.

    Raises:
        ModuleNotFoundError: if it is not, which scripts catch.
    """
    if find_spec("xformers") is None:
        raise ModuleNotFoundError("xformers is not installed; attention runs by PyTorch's fused operator")
