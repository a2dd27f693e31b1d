"""When a module may be bypassed: the one rule for the fused, compiled and engine paths that use its weights directly.

Client code changes modules by hooks, parametrizations, adapters such as LoRA, wrappers, subclasses and patched methods.
What it changed takes effect only if the module is called. The fast paths therefore call every module but those that are
exactly as PyTorch, or this package, defines them. Nothing is remembered of a module from one call to the next.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

PLAIN_TENSORS = (nn.Parameter, Tensor, type(None))
"""The classes, exactly, of weights that may be read: those of a subclass may hold anything."""

INSTANCE_PATCHES = frozenset(
    {
        "__call__",
        "_call_impl",
        "_compiled_call_impl",
        "_wrapped_call_impl",
        "_conv_forward",
        "forward",
        "weight",
        "bias",
    }
)
"""Attributes that an instance has of its own only when it is patched: methods, and weights that are not parameters."""


def is_untouched(module: nn.Module, expected: type[nn.Module]) -> bool:
    """Return whether calling a module does what its class and its weights say, so that it may be bypassed.

    Args:
        module: the module.
        expected: the class whose computation replaces the call.

    Returns:
        `True` if the module is exactly of the expected class, has plain weights and no hooks (its own or PyTorch's
        global ones), neither it nor its class is patched, and nothing transforms PyTorch's operators. A parametrized
        module has another class; weight norm, spectral norm and pruning are hooks.

    Example:
        >>> conv = nn.Conv2d(1, 1, 3)
        >>> is_untouched(conv, nn.Conv2d), is_untouched(nn.Sequential(conv), nn.Conv2d)
        (True, False)
        >>> handle = conv.register_forward_hook(lambda *_: None)
        >>> is_untouched(conv, nn.Conv2d)
        False
    """
    if not is_unchanged(module, expected):
        return False
    return torch.compiler.is_compiling() or not are_operators_transformed()


def is_unchanged(module: nn.Module, expected: type[nn.Module]) -> bool:
    """Return whether client code left a module as it is; see `is_untouched`, which asks about PyTorch's operators too.

    Args:
        module: the module.
        expected: its class before any change.

    Example:
        >>> is_unchanged(nn.Identity(), nn.Identity), is_unchanged(nn.Sequential(), nn.Identity)
        (True, False)
    """
    if type(module) is not expected or has_hooks(module) or not INSTANCE_PATCHES.isdisjoint(vars(module)):
        return False
    for weights in module._parameters.values():
        if type(weights) not in PLAIN_TENSORS:
            return False
    return torch.compiler.is_compiling() or not is_patched(expected)


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling a module runs hooks, forward or backward: its own or PyTorch's global ones.

    Args:
        module: the module.

    Example:
        >>> has_hooks(nn.Identity())
        False
    """
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_backward_pre_hooks
        or torch_module._global_backward_hooks
    )


def is_patched(cls: type[nn.Module]) -> bool:
    """Return whether a method that decides what calling a module does is not the one that its class was written with.

    Args:
        cls: a class of modules.

    Example:
        >>> is_patched(nn.Conv2d)
        False
    """
    methods = (cls.forward, cls.__call__, cls._call_impl, getattr(cls, "_conv_forward", None))
    return not _are_original(cls, *methods)  # type: ignore[arg-type]


def are_operators_transformed() -> bool:
    """Return whether PyTorch's operators do more than compute: `torch.func`, forward-mode AD or a dispatch mode.

    Example:
        >>> torch.func.grad(lambda x: x * are_operators_transformed())(torch.tensor(1.0))
        tensor(1.)
    """
    return bool(
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    )


@functools.lru_cache(maxsize=256)
def _are_original(cls: type[nn.Module], *methods: Callable[..., Any] | None) -> bool:
    """Return whether methods were written in the file of a class or of one of its bases."""
    files = {getattr(sys.modules[base.__module__], "__file__", None) for base in cls.__mro__}
    codes = [getattr(method, "__code__", None) for method in methods if method is not None]
    return all(code is not None and code.co_filename in files for code in codes)
