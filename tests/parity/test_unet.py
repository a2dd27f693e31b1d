"""`UNet2DModel` against the class of that name in `diffusers`: constructor, parameters, outputs, gradients.

Both models get the same random parameters, drawn so that every layer affects the output: none stays at zero or one,
which could hide an error.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel as DiffusersUNet2DModel
from torch import Tensor

from ddim.unet import UNet2DModel
from helpers import public, randn

DOWN = {"D": "DownBlock2D", "A": "AttnDownBlock2D", "R": "ResnetDownsampleBlock2D"}
UP = {"D": "UpBlock2D", "A": "AttnUpBlock2D", "R": "ResnetUpsampleBlock2D"}
N = 3


def blocks(down: str, up: str, *channels: int) -> dict[str, Any]:
    """Return block types by their initials, and channels, as arguments of the model."""
    return {
        "down_block_types": tuple(DOWN[kind] for kind in down),
        "up_block_types": tuple(UP[kind] for kind in up),
        "block_out_channels": channels,
    }


BASE = {"layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4, **blocks("DA", "AD", 8, 16)}
RESNET = {"downsample_type": "resnet", "upsample_type": "resnet"}
SCALE_SHIFT = {"resnet_time_scale_shift": "scale_shift"}
FOURIER = {"time_embedding_type": "fourier"}
LEARNED = {"time_embedding_type": "learned", "num_train_timesteps": 1000}

CONFIGS: dict[str, dict[str, Any]] = {
    "base": {},
    "blocks-plain": blocks("DD", "DD", 8, 16),
    "blocks-attention": blocks("AA", "AA", 8, 16),
    "blocks-resnet": blocks("RR", "RR", 8, 16),
    "blocks-plain-down-resnet-up": blocks("DD", "RR", 8, 16),
    "blocks-resnet-down-attention-up": blocks("RR", "AA", 8, 16),
    "blocks-attention-down-plain-up": blocks("AA", "DD", 8, 16),
    "blocks-mixed": blocks("DAR", "RDA", 16, 16, 32),
    "blocks-mixed-narrowing": blocks("RAD", "ADR", 16, 8, 12) | {"layers_per_block": 2},
    "blocks-old-names": {
        "down_block_types": ("UNetResDownBlock2D", "UNetResAttnDownBlock2D"),
        "up_block_types": ("UNetResAttnUpBlock2D", "UNetResUpBlock2D"),
    },
    "levels-1-plain": blocks("D", "D", 8),
    "levels-1-attention": blocks("A", "A", 8) | RESNET,
    "levels-1-resnet": blocks("R", "R", 8),
    "levels-3": blocks("DAD", "DAD", 8, 16, 24),
    "levels-4": blocks("DADD", "DDAD", 8, 16, 16, 16) | {"layers_per_block": 2},
    "resample-resnet": blocks("AAD", "AAA", 8, 16, 16) | RESNET,
    "resample-resnet-down": blocks("AA", "AA", 8, 16) | {"downsample_type": "resnet"},
    "resample-resnet-up": blocks("AA", "AA", 8, 16) | {"upsample_type": "resnet"},
    "resample-resnet-without-attention": RESNET | blocks("DD", "DD", 8, 16),
    "padding-0": {"downsample_padding": 0},
    "padding-0-attention": {"downsample_padding": 0} | blocks("AA", "AA", 8, 16),
    "padding-0-three-levels": {"downsample_padding": 0, "layers_per_block": 2} | blocks("DAD", "DAD", 8, 8, 16),
    "layers-2": {"layers_per_block": 2},
    "layers-3": {"layers_per_block": 3} | blocks("RA", "AR", 8, 16),
    "positional-sin-first": {"flip_sin_to_cos": False},
    "positional-ddpm": {"flip_sin_to_cos": False, "freq_shift": 1},
    "positional-cos-first-shifted": {"freq_shift": 1},
    "positional-odd": {"norm_num_groups": 3} | blocks("DA", "AD", 9, 18),
    "positional-odd-sin-first": {"norm_num_groups": 1, "flip_sin_to_cos": False, "freq_shift": 1}
    | blocks("DA", "AD", 7, 5),
    "fourier": FOURIER,
    "fourier-scale-shift": FOURIER | SCALE_SHIFT | blocks("RA", "AR", 8, 16),
    "learned": LEARNED,
    "learned-scale-shift": LEARNED | SCALE_SHIFT,
    "time-embedding-dim": {"time_embedding_dim": 10},
    "scale-shift": SCALE_SHIFT,
    "scale-shift-resnet": SCALE_SHIFT | RESNET | blocks("RA", "AA", 8, 16),
    "scale-shift-with-attention-norm": SCALE_SHIFT | {"attn_norm_num_groups": 2},
    "attention-norm-groups": {"attn_norm_num_groups": 8},
    "heads-single": {"attention_head_dim": None} | blocks("AA", "AA", 8, 16),
    "heads-of-1": {"attention_head_dim": 1},
    "heads-of-8": {"attention_head_dim": 8} | blocks("AA", "AA", 8, 16),
    "heads-not-dividing": {"attention_head_dim": 6} | blocks("AA", "AA", 8, 16),
    "heads-wider-than-a-plain-level": {"attention_head_dim": 16},
    "middle-without-attention": {"add_attention": False},
    "middle-none": {"mid_block_type": None},
    "middle-scaled": {"mid_block_scale_factor": 1.7},
    "middle-scaled-without-attention": {"mid_block_scale_factor": 0.5, "add_attention": False},
    "classes": {"num_class_embeds": 5},
    "classes-scale-shift": {"num_class_embeds": 5, "time_embedding_dim": 12} | SCALE_SHIFT,
    "classes-timestep": {"class_embed_type": "timestep"},
    "classes-timestep-fourier": {"class_embed_type": "timestep"} | FOURIER,
    "classes-timestep-learned": {"class_embed_type": "timestep"} | LEARNED,
    "classes-identity": {"class_embed_type": "identity"},
    "center-input": {"center_input_sample": True},
    "act-swish": {"act_fn": "swish"},
    "act-mish": {"act_fn": "mish"} | blocks("RA", "AR", 8, 16),
    "act-gelu": {"act_fn": "gelu"} | blocks("RA", "AR", 8, 16),
    "act-relu": {"act_fn": "relu"},
    "norm-groups-1": {"norm_num_groups": 1},
    "norm-groups-of-one-channel": {"norm_num_groups": 8} | blocks("DD", "DD", 8, 8) | {"attention_head_dim": 8},
    # Large, so that a norm with another epsilon shows.
    "norm-eps": {"norm_eps": 0.5} | RESNET | blocks("ARA", "ARA", 8, 16, 16),
    "channels-in-1-out-6": {"in_channels": 1, "out_channels": 6},
    "channels-in-4-out-2": {"in_channels": 4, "out_channels": 2},
    "dropout-in-eval-mode": {"dropout": 0.5},
    "sample-size": {"sample_size": (8, 16)},
}
SIZES = {
    "levels-1-plain": (7, 5),
    "levels-3": (28, 28),
    "levels-4": (16, 24),
    "padding-0-three-levels": (28, 28),
    "blocks-mixed": (20, 12),
    "blocks-resnet": (10, 6),
    "resample-resnet": (12, 20),
    "padding-0": (6, 10),
    "padding-0-attention": (4, 2),
    "heads-single": (6, 14),
}
CIFAR10 = {
    "sample_size": 32,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    **blocks("DADD", "DDAD", 128, 256, 256, 256),
}

every_config = pytest.mark.parametrize("name", CONFIGS)


def randomize(model: torch.nn.Module) -> None:
    """Draw every parameter, fixed ones too, at a scale that keeps activations near one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.5 * noise + ("norm" in name and name.endswith("weight")))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def pair(config: dict[str, Any]) -> tuple[UNet2DModel, DiffusersUNet2DModel]:
    """Return our model and that of diffusers with the same random parameters."""
    ours, theirs = UNet2DModel(**config).eval(), DiffusersUNet2DModel(**config).eval()
    randomize(ours)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@functools.cache
def named_pair(name: str) -> tuple[UNet2DModel, DiffusersUNet2DModel]:
    return pair(BASE | CONFIGS[name])


def inputs(name: str, model: UNet2DModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Return samples, and class labels where the model takes them."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(N, model.config.in_channels, *SIZES.get(name, (8, 8)), generator=generator, dtype=model.dtype)
    if model.class_embedding is None:
        return sample, {}
    if model.config.class_embed_type == "identity":
        labels = torch.randn(N, model.time_embedding.linear_2.out_features, generator=generator, dtype=model.dtype)
    else:
        labels = torch.tensor([4, 1, 3])
    return sample, {"class_labels": labels}


def timesteps(model: UNet2DModel, form: str) -> int | Tensor:
    # Fourier models divide their output by t: a large one would shrink the differences.
    several, single = ([2, 1, 9], 3) if model.config.time_embedding_type == "fourier" else ([0, 731, 999], 420)
    return {"int": single, "0-d": torch.tensor(single), "per-image": torch.tensor(several)}[form]


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


def test_constructor_signature_matches_diffusers() -> None:
    ours, theirs = (
        [(p.name, p.default) for p in inspect.signature(cls.__init__).parameters.values()]
        for cls in (UNet2DModel, DiffusersUNet2DModel)
    )
    # The arguments of this library alone are last, and recorded beside those of diffusers.
    assert ours[-3:] == [("pixel_format", None), ("class_names", None), ("has_null_class", False)]
    assert ours[:-3] == theirs


@every_config
def test_parameters_match_diffusers(name: str) -> None:
    ours, theirs = named_pair(name)
    assert shapes(ours) == shapes(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.num_parameters(only_trainable=True) == theirs.num_parameters(only_trainable=True)


@every_config
def test_configs_are_interchangeable(name: str) -> None:
    ours, theirs = named_pair(name)
    assert public(theirs.config) == public(ours.config)
    with torch.device("meta"):
        assert shapes(UNet2DModel.from_config(theirs.config)) == shapes(theirs)
        assert shapes(UNet2DModel.from_config(json.loads(theirs.to_json_string()))) == shapes(theirs)
        assert shapes(DiffusersUNet2DModel.from_config(json.loads(ours.to_json_string()))) == shapes(ours)


@pytest.mark.parametrize("form", ["int", "0-d", "per-image"])
@every_config
@torch.no_grad()
def test_output(name: str, form: str) -> None:
    ours, theirs = named_pair(name)
    (sample, labels), t = inputs(name, ours), timesteps(ours, form)
    expected = theirs(sample, t, **labels).sample
    assert 0.1 < expected.std() < 10
    output = ours(sample, t, **labels).sample
    assert output.shape == expected.shape
    assert (output - expected).abs().max() <= 1e-5
    (as_tuple,) = ours(sample, t, **labels, return_dict=False)
    assert torch.equal(as_tuple, output)


# diffusers leaves the embedding of "timestep" labels in float32, and fails.
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "classes-timestep"])
@torch.no_grad()
def test_output_in_float64(name: str) -> None:
    """Without the rounding of float32 the outputs are equal."""
    ours, theirs = (copy.deepcopy(model).double() for model in named_pair(name))
    sample, labels = inputs(name, ours)
    t = timesteps(ours, "per-image")
    expected = theirs(sample, t, **labels).sample
    output = ours(sample, t, **labels).sample
    assert output.dtype == torch.float64
    assert (output - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("name", ["base", "positional-ddpm", "fourier"])
@torch.no_grad()
def test_output_at_fractional_timesteps(name: str) -> None:
    ours, theirs = named_pair(name)
    sample, _ = inputs(name, ours)
    t = torch.tensor([0.5, 2.25, 7.75])
    assert (ours(sample, t).sample - theirs(sample, t).sample).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["blocks-mixed", "scale-shift-resnet", "classes-timestep-learned"])
def test_gradients(name: str) -> None:
    gradients = []
    for model in named_pair(name):
        sample, labels = inputs(name, model)
        variables = {"sample": sample.requires_grad_()} | dict(model.named_parameters())
        total = model(sample, timesteps(model, "per-image"), **labels).sample.sum()
        gradients.append(dict(zip(variables, torch.autograd.grad(total, list(variables.values())), strict=True)))
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        # A bias of the keys shifts all scores of a query equally, which softmax ignores: its gradient is only rounding.
        if not key.endswith("to_k.bias"):
            assert (ours[key] - expected).abs().max() <= 1e-4 * expected.abs().max(), key


@torch.no_grad()
def test_ddpm_cifar10() -> None:
    """The architecture of google/ddpm-cifar10-32 at its full size."""
    ours, theirs = pair(CIFAR10)
    assert shapes(ours) == shapes(theirs)
    assert ours.num_parameters() == theirs.num_parameters() == 35_746_307
    sample = randn(1, 3, 32, 32, seed=1)
    expected = theirs(sample, 420).sample
    assert (ours(sample, 420).sample - expected).abs().max() <= 1e-5 * expected.abs().max()
