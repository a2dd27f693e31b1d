"""When an object may be bypassed: the one rule for all fast paths that do themselves what an object's methods would.

Client code changes modules by hooks, parametrizations, adapters such as LoRA, wrappers, subclasses and patched methods,
and schedulers by subclasses and patches. What it changed takes effect only if the object is called. Fused, compiled and
engine paths and the sampler's own loop therefore call every object but those that are exactly as PyTorch, or this
package, defines them: modules by `is_untouched`, others by `has_members`. Nothing is remembered of an object from one
call to the next.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import BuiltinFunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

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

Function = tuple[ModuleType, str]
"""A function as modules look it up: its namespace and name."""

FUNCTIONS: Mapping[type[nn.Module], tuple[Function, ...]] = {
    nn.AvgPool2d: ((F, "avg_pool2d"),),
    nn.Conv2d: ((F, "conv2d"),),
    nn.Dropout: ((F, "dropout"),),
    nn.Embedding: ((F, "embedding"), (torch, "embedding")),
    nn.GELU: ((F, "gelu"),),
    nn.GroupNorm: ((F, "group_norm"), (torch, "group_norm")),
    nn.Linear: ((F, "linear"),),
    nn.Mish: ((F, "mish"),),
    nn.ReLU: ((F, "relu"), (torch, "relu")),
    nn.SiLU: ((F, "silu"),),
}
"""The functions that a module of each class calls."""
INTERPOLATE: Function = (F, "interpolate")
NETWORK_FUNCTIONS: tuple[Function, ...] = (
    *(function for functions in FUNCTIONS.values() for function in functions),
    *(INTERPOLATE, (F, "pad"), (F, "scaled_dot_product_attention"), (torch, "cat")),
)
"""The functions that a network calls."""

TORCH_FOLDER = str(Path(torch.__file__).parent) + os.sep


def is_untouched(module: nn.Module, expected: type[nn.Module]) -> bool:
    """Return whether calling a module does what its class and its weights say, so that it may be bypassed.

    Args:
        module: the module.
        expected: the class whose computation replaces the call.

    Returns:
        `True` if the module is exactly of the expected class, has plain weights and no hooks (its own or PyTorch's
        global ones), neither it nor its class nor a function that it calls is patched, and nothing transforms
        PyTorch's operators. A parametrized module has another class; weight norm, spectral norm and pruning are hooks.

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
    if torch.compiler.is_compiling():
        return True
    return are_original(FUNCTIONS.get(expected, ())) and not are_operators_transformed()


def is_unchanged(module: nn.Module, expected: type[nn.Module]) -> bool:
    """Return whether client code left a module as it is; see `is_untouched`, which asks about PyTorch's operators too.

    Args:
        module: the module.
        expected: its class before any change.

    Example:
        >>> is_unchanged(nn.Identity(), nn.Identity), is_unchanged(nn.Sequential(), nn.Identity)
        (True, False)
    """
    # Written so that PyTorch's compiler traces it: some versions do not pass a module's dictionary to a set's methods.
    if type(module) is not expected or has_hooks(module) or any(name in module.__dict__ for name in INSTANCE_PATCHES):
        return False
    for weights in module._parameters.values():
        if type(weights) not in PLAIN_TENSORS:
            return False
    return torch.compiler.is_compiling() or not is_patched(expected)


def has_members(obj: Any, members: Mapping[str, Any]) -> bool:
    """Return whether looking up names on an object gives exactly the members that its class was written with.

    Args:
        obj: any object.
        members: functions and properties by name, as they stand in the class's `__dict__`.

    Returns:
        `False` if a subclass overrides one of them, the instance has one of its own, or the class has been patched.

    Example:
        >>> members = {"forward": nn.Conv2d.forward}
        >>> has_members(nn.Conv2d(1, 1, 1), members), has_members(nn.Linear(1, 1), members)
        (True, False)
    """
    return all(inspect.getattr_static(obj, name, None) is member for name, member in members.items())


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
    """Return whether PyTorch's operators do more than compute: tracing, `torch.func`, forward AD or a mode.

    Modes are those of `torch.overrides.TorchFunctionMode` and `TorchDispatchMode`, but for that of `torch.device` and
    `torch.set_default_device`, which leaves operators alone.

    Example:
        >>> torch.func.grad(lambda x: x * are_operators_transformed())(torch.tensor(1.0))
        tensor(1.)
    """
    return bool(
        torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or (
            torch._C._len_torch_function_stack()
            and not all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]
        )
    )


def are_original(functions: Iterable[Function]) -> bool:
    """Return whether functions are PyTorch's own.

    Args:
        functions: their namespaces and names.

    Example:
        >>> are_original([(F, "silu"), (F, "conv2d")])
        True
    """
    return all(_is_pytorch_function(name, getattr(namespace, name)) for namespace, name in functions)


@functools.lru_cache(maxsize=256)
def _is_pytorch_function(name: str, function: Callable[..., Any]) -> bool:
    """Return whether a function is the one of this name that PyTorch was built or written with."""
    if isinstance(function, BuiltinFunctionType):
        return function.__name__ == name
    code = getattr(function, "__code__", None)
    return code is not None and code.co_name == name and code.co_filename.startswith(TORCH_FOLDER)


@functools.lru_cache(maxsize=256)
def _are_original(cls: type[nn.Module], *methods: Callable[..., Any] | None) -> bool:
    """Return whether methods were written in the file of a class or of one of its bases."""
    files = {getattr(sys.modules[base.__module__], "__file__", None) for base in cls.__mro__}
    codes = [getattr(method, "__code__", None) for method in methods if method is not None]
    return all(code is not None and code.co_filename in files for code in codes)
