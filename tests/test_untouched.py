"""Which modules may be bypassed: every change that client code makes to a module, each by itself."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.spectral_norm import spectral_norm
from torch.nn.utils.weight_norm import weight_norm
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ddim.nn.layers import Attention, ResnetBlock2D, Upsample2D
from ddim.unet import UNet2DModel
from ddim.untouched import NETWORK_FUNCTIONS, are_operators_transformed, are_original, is_untouched

LIBRARY_MODULES = [
    *(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 4), nn.Embedding(3, 4)),
    *(nn.SiLU(), nn.Mish(), nn.GELU(), nn.ReLU(), nn.Dropout(), nn.Identity(), nn.AvgPool2d(2), nn.ModuleList()),
]


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class TaggedParameter(nn.Parameter):
    """A tensor subclass, as quantized weights are."""


class Conv2dSubclass(nn.Conv2d):
    """A subclass that changes nothing by itself."""


def set_plain_weight(conv: nn.Conv2d) -> None:
    """Compute the weight outside, as hypernetworks do."""
    weight = conv.weight.detach() * 2
    del conv.weight
    conv.weight = weight


CHANGES: dict[str, Callable[[nn.Conv2d], Any]] = {
    "forward hook": lambda conv: conv.register_forward_hook(lambda *_: None),
    "forward hook with keywords": lambda conv: conv.register_forward_hook(lambda *_: None, with_kwargs=True),
    "forward pre-hook": lambda conv: conv.register_forward_pre_hook(lambda *_: None),
    "full backward hook": lambda conv: conv.register_full_backward_hook(lambda *_: None),
    "full backward pre-hook": lambda conv: conv.register_full_backward_pre_hook(lambda *_: None),
    "backward hook": lambda conv: conv.register_backward_hook(lambda *_: None),
    "forward of the instance": lambda conv: setattr(conv, "forward", lambda x: x),
    "_conv_forward of the instance": lambda conv: setattr(conv, "_conv_forward", types.MethodType(F.conv2d, conv)),
    "compiled in place": lambda conv: conv.compile(backend="eager"),
    "parametrization": lambda conv: parametrize.register_parametrization(conv, "weight", Half()),
    "orthogonal": parametrizations.orthogonal,
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
    "pruning": lambda conv: prune.l1_unstructured(conv, "weight", 2),
    "weight of a subclass": lambda conv: setattr(conv, "weight", TaggedParameter(conv.weight.detach())),
    "weight that is not a parameter": set_plain_weight,
    "other class": lambda conv: setattr(conv, "__class__", Conv2dSubclass),
}
GLOBAL_HOOKS = [
    torch_module.register_module_forward_hook,
    torch_module.register_module_forward_pre_hook,
    torch_module.register_module_full_backward_hook,
    torch_module.register_module_full_backward_pre_hook,
]


@pytest.fixture
def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3)


@pytest.mark.parametrize("module", LIBRARY_MODULES, ids=lambda module: type(module).__name__)
def test_new_modules_are_untouched(module: nn.Module) -> None:
    assert is_untouched(module, type(module))
    assert is_untouched(copy.deepcopy(module).double().eval().requires_grad_(False), type(module))


def test_modules_of_the_network_are_untouched() -> None:
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8,) * 4, norm_num_groups=4)
    assert all(is_untouched(module, type(module)) for module in unet.modules())
    assert {Attention, ResnetBlock2D, Upsample2D} < {type(module) for module in unet.modules()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_modules_are_not(conv: nn.Conv2d, change: Callable[[nn.Conv2d], Any]) -> None:
    assert is_untouched(conv, nn.Conv2d)
    change(conv)
    assert not is_untouched(conv, nn.Conv2d)


@pytest.mark.parametrize("register", GLOBAL_HOOKS)
def test_global_hooks_touch_every_module(conv: nn.Conv2d, register: Callable[..., Any]) -> None:
    handle = register(lambda *_: None)
    try:
        assert not is_untouched(conv, nn.Conv2d)
    finally:
        handle.remove()
    assert is_untouched(conv, nn.Conv2d)


@pytest.mark.parametrize("name", ["forward", "_conv_forward", "__call__", "_call_impl"])
def test_patched_classes_touch_their_modules(conv: nn.Conv2d, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(nn.Conv2d, name)
    monkeypatch.setattr(nn.Conv2d, name, lambda self, *args: original(self, *args))
    assert not is_untouched(conv, nn.Conv2d)
    assert is_untouched(nn.SiLU(), nn.SiLU)
    monkeypatch.undo()
    assert is_untouched(conv, nn.Conv2d)


def test_patched_module_class_touches_every_module(conv: nn.Conv2d, monkeypatch: pytest.MonkeyPatch) -> None:
    original = nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *args, **kwargs: original(self, *args, **kwargs))
    assert not is_untouched(conv, nn.Conv2d)


def test_patch_that_pretends_to_be_the_method(conv: nn.Conv2d, monkeypatch: pytest.MonkeyPatch) -> None:
    """`functools.wraps` copies every name of a function."""
    import functools

    @functools.wraps(nn.Conv2d.forward)
    def patched(self: nn.Conv2d, x: Tensor) -> Tensor:
        return x

    monkeypatch.setattr(nn.Conv2d, "forward", patched)
    assert not is_untouched(conv, nn.Conv2d)


def test_hooks_that_are_removed_leave_no_trace(conv: nn.Conv2d) -> None:
    conv.register_forward_hook(lambda *_: None).remove()
    assert is_untouched(conv, nn.Conv2d)


def transforms() -> Iterator[tuple[str, Callable[[Callable[[], bool]], bool]]]:
    """Yield ways to call a function while PyTorch's operators do more than compute."""
    result: list[bool] = []

    def record(call: Callable[[], bool]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            result.append(call())
            return x.sum()

        return run

    x = torch.ones(2)
    yield "grad", lambda call: (torch.func.grad(record(call))(x), result.pop())[1]
    yield "vmap", lambda call: (torch.func.vmap(record(call))(x), result.pop())[1]
    contexts: dict[str, Callable[[], Any]] = {
        "forward AD": fwd.dual_level,
        "FLOP counter": lambda: FlopCounterMode(display=False),
        "function mode": TorchFunctionMode,
    }
    for name, context in contexts.items():

        def run(call: Callable[[], bool], context: Callable[[], Any] = context) -> bool:
            with ExitStack() as stack:
                stack.enter_context(context())
                return call()

        yield name, run


@pytest.mark.parametrize(("name", "transform"), list(transforms()))
def test_transforms_see_every_module(
    conv: nn.Conv2d, name: str, transform: Callable[[Callable[[], bool]], bool]
) -> None:
    assert not transform(lambda: is_untouched(conv, nn.Conv2d))
    assert is_untouched(conv, nn.Conv2d)


def test_default_device_transforms_nothing() -> None:
    with torch.device("cpu"):
        assert not are_operators_transformed()
        with TorchFunctionMode():
            assert are_operators_transformed()


@pytest.mark.parametrize(
    ("name", "module"), {"conv2d": nn.Conv2d(4, 4, 3), "group_norm": nn.GroupNorm(2, 4), "silu": nn.SiLU()}.items()
)
def test_patched_functions_touch_the_modules_that_call_them(
    name: str, module: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = {function for _, function in NETWORK_FUNCTIONS}
    assert name in functions
    original = getattr(F, name)
    monkeypatch.setattr(F, name, lambda *args: original(*args))
    assert not is_untouched(module, type(module))
    assert not are_original(NETWORK_FUNCTIONS)
    assert is_untouched(nn.Linear(4, 4), nn.Linear)
    monkeypatch.setattr(F, name, F.tanh)
    assert not is_untouched(module, type(module))
    monkeypatch.undo()
    assert is_untouched(module, type(module))
    assert are_original(NETWORK_FUNCTIONS)


def test_rule_can_be_compiled(conv: nn.Conv2d) -> None:
    def shift(x: Tensor) -> Tensor:
        return x + 1 if is_untouched(conv, nn.Conv2d) else x - 1

    assert torch.compile(shift, fullgraph=True, backend="eager")(torch.zeros(1)).item() == 1
    conv.register_forward_hook(lambda *_: None)
    torch.compiler.reset()
    assert torch.compile(shift, fullgraph=True, backend="eager")(torch.zeros(1)).item() == -1
