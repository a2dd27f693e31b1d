"""Which networks the engines run: those that their configuration builds, untouched. All others run as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from ddim.engine import get_engine
from ddim.engine.base import unsupported_reason
from ddim.unet import UNet2DModel
from helpers import randn


def build(**changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return UNet2DModel(**settings | changes).eval()


def set_attribute(name: str, value: Any) -> Callable[[Any], None]:
    """Return a function that sets an attribute of one of a network's modules."""
    module, _, attribute = name.rpartition(".")
    return lambda unet: setattr(unet.get_submodule(module), attribute, value)


def parametrize_weight(unet: Any) -> None:
    parametrize.register_parametrization(unet.conv_out, "weight", nn.Identity())


def patch_instance(unet: Any) -> None:
    forward = unet.forward
    unet.forward = lambda *args, **kwargs: forward(*args, **kwargs)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook": (lambda unet: unet.conv_in.register_forward_hook(lambda *_: None), "conv_in has hooks"),
    "backward hook": (lambda unet: unet.conv_in.register_full_backward_hook(lambda *_: None), "conv_in has hooks"),
    "hook of the network": (lambda unet: unet.register_forward_hook(lambda *_: None), "UNet2DModel has hooks"),
    "wrapper": (lambda unet: setattr(unet, "conv_in", nn.Sequential(unet.conv_in)), "conv_in has been replaced"),
    "parametrization": (parametrize_weight, "conv_out has been replaced"),
    "forward of the network": (patch_instance, "UNet2DModel has been patched"),
    "forward of a module": (
        set_attribute("mid_block.attentions.0.forward", lambda x, temb: x),
        "mid_block.attentions.0 has been patched",
    ),
    "padding": (set_attribute("conv_in.padding_mode", "circular"), "conv_in.padding_mode has been changed"),
    "dilation": (
        set_attribute("mid_block.resnets.0.conv1", nn.Conv2d(16, 16, 3, padding=2, dilation=2)),
        "mid_block.resnets.0.conv1.padding has been changed",
    ),
    "groups": (
        set_attribute("mid_block.resnets.0.conv1", nn.Conv2d(16, 16, 3, padding=1, groups=16)),
        "mid_block.resnets.0.conv1.groups has been changed",
    ),
    "no bias": (set_attribute("conv_out.bias", None), "conv_out has other parameters"),
    "no affine weights": (
        set_attribute("conv_norm_out", nn.GroupNorm(4, 16, affine=False)),
        "conv_norm_out.affine has been changed",
    ),
    "activation": (set_attribute("mid_block.resnets.0.nonlinearity", nn.GELU()), "nonlinearity has been replaced"),
    "scale": (set_attribute("mid_block.resnets.1.output_scale_factor", 2.0), "output_scale_factor has been changed"),
    "shortcut": (
        set_attribute("mid_block.resnets.1.conv_shortcut", nn.Conv2d(16, 16, 1)),
        "mid_block.resnets.1.conv_shortcut has been changed",
    ),
    "removed": (set_attribute("mid_block", None), "mid_block has been removed"),
    "dropout": (lambda unet: unet.train(), "dropout is in training mode"),
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES)
def test_changed_networks_run_as_they_are(change: Callable[[Any], Any], reason: str) -> None:
    unet = build(dropout=0.1)
    sample = randn(2, 3, 8, 8)
    assert get_engine(unet).name != "UNet2DModel"
    change(unet)
    assert reason in (unsupported_reason(unet) or "")
    engine = get_engine(unet)
    assert engine.name == "UNet2DModel"
    with torch.no_grad():
        torch.manual_seed(1)
        expected = unet(sample, 5).sample
        torch.manual_seed(1)
        assert torch.equal(engine.predict(sample, 5), expected)


@pytest.mark.parametrize("name", ["forward", "__call__"])
def test_patched_class(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = build()
    original = getattr(UNet2DModel, name)
    monkeypatch.setattr(UNet2DModel, name, lambda self, *args, **kwargs: original(self, *args, **kwargs))
    assert unsupported_reason(unet) == "UNet2DModel has been patched"
    monkeypatch.undo()
    assert unsupported_reason(unet) is None


def test_subclass() -> None:
    class Subclass(UNet2DModel):
        pass

    unet = build()
    unet.__class__ = Subclass
    assert unsupported_reason(unet) == "Subclass is not a UNet2DModel"


def test_what_does_not_change_the_network_is_supported() -> None:
    unet = build().train().requires_grad_(False)
    unet.enable_gradient_checkpointing()
    unet.sample_size = 16
    unet.note = "trained on faces"
    handle = unet.conv_in.register_forward_hook(lambda *_: None)
    handle.remove()
    assert unsupported_reason(unet) is None


def test_checking_leaves_the_generator() -> None:
    unet = build(time_embedding_type="fourier", norm_eps=1e-4)
    state = torch.get_rng_state()
    assert unsupported_reason(unet) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_first_convolution_of_other_channels() -> None:
    unet = build()
    unet.conv_in = nn.Conv2d(5, 16, 3, padding=1)
    assert unsupported_reason(unet) == "conv_in.in_channels has been changed"
    wider = build(in_channels=5)
    assert unsupported_reason(wider) is None
