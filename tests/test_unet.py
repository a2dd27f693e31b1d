"""`UNet2DModel`: gradient checkpointing, timesteps, dtypes, configuration, modes, copies, invalid arguments.

`parity/test_unet.py` compares its outputs with `diffusers`.
"""

from __future__ import annotations

import copy
import json
import logging
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ddim.io.config import FrozenConfig
from ddim.unet import UNet2DModel
from helpers import public

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
RESNET = {
    "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "small": {},
    "resnet": RESNET,
    "scale-shift": RESNET | {"resnet_time_scale_shift": "scale_shift"},
    "fourier": {"time_embedding_type": "fourier"},
    "learned": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "classes": {"num_class_embeds": 5},
    "classes-timestep": {"class_embed_type": "timestep"},
    "without-middle": {"mid_block_type": None},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def build(**overrides: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**SMALL | overrides)


def inputs(model: UNet2DModel, number: int = 3, size: int = 8) -> dict[str, Tensor]:
    """Samples, timesteps, and class labels where the model takes them."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(number, 3, size, size, generator=generator, dtype=model.dtype)
    labels = {} if model.class_embedding is None else {"class_labels": torch.arange(number) % 5}
    return {"sample": sample, "timestep": torch.arange(1, number + 1) * 100, **labels}


def gradients(model: UNet2DModel) -> dict[str, Tensor]:
    """Return the gradients of the mean square of the output, with the same dropout in each call."""
    torch.manual_seed(2)
    arguments = inputs(model)
    variables = {"sample": arguments["sample"].requires_grad_()}
    variables |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = model(**arguments).sample.square().mean()
    return dict(zip(variables, torch.autograd.grad(loss, list(variables.values())), strict=True))


def saved_values(model: UNet2DModel) -> int:
    """Count the values that a forward pass saves for the backward pass."""
    count = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal count
        count += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs(model, size=32))
    return count


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@every_variant
def test_checkpointing_keeps_gradients(variant: dict[str, Any], dropout: float) -> None:
    model = build(**variant, dropout=dropout).train()
    plain = gradients(model)
    model.enable_gradient_checkpointing()
    checkpointed = gradients(model)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_dropout_affects_gradients() -> None:
    """Without an effect of dropout, the test above would not show that checkpointing repeats it."""
    name = "mid_block.resnets.1.conv2.weight"
    assert not torch.allclose(gradients(build().train())[name], gradients(build(dropout=0.3).train())[name])


def test_checkpointing_saves_memory() -> None:
    model = build(layers_per_block=2)
    plain = saved_values(model)
    model.enable_gradient_checkpointing()
    assert saved_values(model) < plain / 2
    model.disable_gradient_checkpointing()
    assert saved_values(model) == plain


@torch.no_grad()
def test_checkpointing_does_not_affect_inference() -> None:
    model = build().eval()
    expected = model(**inputs(model)).sample
    model.enable_gradient_checkpointing()
    assert torch.equal(model(**inputs(model)).sample, expected)


@pytest.mark.parametrize("single", [7, torch.tensor(7), torch.tensor([7])], ids=["int", "0-d", "one"])
@every_variant
@torch.no_grad()
def test_single_timestep_applies_to_whole_batch(variant: dict[str, Any], single: int | Tensor) -> None:
    model = build(**variant).eval().double()
    arguments = inputs(model)
    repeated = model(**arguments | {"timestep": torch.tensor([7, 7, 7])}).sample
    torch.testing.assert_close(model(**arguments | {"timestep": single}).sample, repeated, rtol=0, atol=1e-12)


@every_variant
@torch.no_grad()
def test_images_do_not_mix(variant: dict[str, Any]) -> None:
    """Each image of a batch, with its timestep and label, gives the same output as in a batch of one."""
    model = build(**variant).eval().double()
    arguments = inputs(model)
    batched = model(**arguments).sample
    single = [model(**{key: value[i : i + 1] for key, value in arguments.items()}).sample for i in range(3)]
    torch.testing.assert_close(batched, torch.cat(single), rtol=0, atol=1e-12)


@torch.no_grad()
def test_fractional_timesteps_of_tensors_are_not_rounded() -> None:
    model = build().eval()
    arguments = inputs(model)
    output = model(**arguments | {"timestep": torch.tensor(7.5)}).sample
    assert not torch.allclose(output, model(**arguments | {"timestep": 7}).sample)
    # Python numbers are, as in diffusers.
    assert torch.equal(model(**arguments | {"timestep": 7.5}).sample, model(**arguments | {"timestep": 7}).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@every_variant
@torch.no_grad()
def test_dtypes(variant: dict[str, Any], dtype: torch.dtype) -> None:
    reference, model = build(**variant).eval(), build(**variant).eval().to(dtype)
    assert model.dtype == dtype
    output = model(**inputs(model)).sample
    assert output.dtype == dtype
    expected = reference(**inputs(model) | {"sample": inputs(model)["sample"].float()}).sample
    # Fourier features multiply by large frequencies: rounded to 8 bits, these give a different embedding.
    if dtype == torch.float64 or model.config.time_embedding_type != "fourier":
        tolerance = 1e-5 if dtype == torch.float64 else 0.1
        torch.testing.assert_close(output.float(), expected, rtol=0, atol=tolerance)


@torch.no_grad()
def test_output_is_independent_of_memory_format() -> None:
    model = build(**RESNET).eval()
    arguments = inputs(model)
    expected = model(**arguments).sample
    model = model.to(memory_format=torch.channels_last)
    sample = arguments["sample"].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(**arguments | {"sample": sample}).sample, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_output_access() -> None:
    model = build().eval()
    arguments = inputs(model)
    output = model(**arguments)
    (sample,) = model(**arguments, return_dict=False)
    assert sample.shape == arguments["sample"].shape
    for other in (output.sample, output["sample"], output[0], *output.to_tuple()):
        assert torch.equal(other, sample)


@torch.no_grad()
def test_dropout_is_active_only_in_training() -> None:
    model = build(dropout=0.5)
    arguments = inputs(model)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(**arguments).sample

    assert model.train() is model
    assert torch.equal(run(0), run(0))
    assert not torch.allclose(run(0), run(1))
    model.eval()
    assert torch.equal(run(0), run(1))
    without = build(dropout=0.0).train()
    assert torch.equal(run(0), without(**arguments).sample)


def test_fourier_frequencies_are_fixed() -> None:
    model = build(time_embedding_type="fourier")
    assert not model.time_proj.weight.requires_grad
    assert "time_proj.weight" in model.state_dict()
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.num_parameters(only_trainable=True) == model.num_parameters() - 8
    assert build().num_parameters(only_trainable=True) == build().num_parameters()


def test_attributes() -> None:
    model = build(sample_size=(8, 16))
    assert model.sample_size == (8, 16)
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@every_variant
@torch.no_grad()
def test_copies(variant: dict[str, Any], duplicate: Callable[[UNet2DModel], UNet2DModel]) -> None:
    model = build(**variant).eval()
    twin = duplicate(model)
    assert isinstance(twin.config, FrozenConfig)
    assert twin.config == model.config
    expected = model(**inputs(model)).sample
    assert torch.equal(twin(**inputs(twin)).sample, expected)
    twin.conv_out.weight.zero_()
    assert torch.equal(model(**inputs(model)).sample, expected)


def test_config_records_every_argument() -> None:
    model = build(num_class_embeds=5)
    for name, value in SMALL.items():
        assert model.config[name] == getattr(model.config, name) == value
    assert model.config.num_class_embeds == 5
    assert model.config.norm_eps == 1e-5
    with pytest.raises(AttributeError, match="no entry 'channels'"):
        _ = model.config.channels


@pytest.mark.parametrize(
    "change",
    [
        lambda config: operator.delitem(config, "dropout"),
        lambda config: config.update(dropout=0.5),
        lambda config: config.setdefault("other", 1),
        lambda config: config.pop("dropout"),
    ],
    ids=["del []", "update", "setdefault", "pop"],
)
def test_config_keeps_its_entries(change: Callable[[FrozenConfig], Any]) -> None:
    config = build().config
    expected = dict(config)
    with pytest.raises(TypeError, match="read-only"):
        change(config)
    assert config == expected


@every_variant
def test_config_survives_json(variant: dict[str, Any]) -> None:
    model = build(**variant)
    text = model.to_json_string()
    parsed = json.loads(text)
    assert parsed["_class_name"] == "UNet2DModel"
    assert parsed["block_out_channels"] == [8, 16]
    twin = UNet2DModel.from_config(parsed)
    assert twin.to_json_string() == text
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(**inputs(model)).sample, twin.eval()(**inputs(twin)).sample)


def test_from_config_takes_overrides() -> None:
    model = UNet2DModel.from_config(build().config, in_channels=1, dropout=0.25)
    assert model.config == build(in_channels=1, dropout=0.25).config
    with pytest.raises(TypeError, match="channels_in"):
        UNet2DModel.from_config(build().config, channels_in=1)


def test_from_config_drops_unknown_entries(caplog: pytest.LogCaptureFixture) -> None:
    config = {**build().config, "_diffusers_version": "0.1", "beta_start": 0.1}
    with caplog.at_level(logging.WARNING, logger="ddim.io.config"):
        twin = UNet2DModel.from_config(config)
    assert public(twin.config) == public(build().config) | {"beta_start": 0.1}
    assert "beta_start" in caplog.text
    assert "_diffusers_version" not in caplog.text


def test_from_config_takes_only_mappings() -> None:
    with pytest.raises(TypeError, match="got int"):
        UNet2DModel.from_config(3)
    with pytest.raises(ValueError, match="got None"):
        UNet2DModel.from_config()


DOWN_NAMES = "must be one of DownBlock2D, AttnDownBlock2D, or ResnetDownsampleBlock2D"
UP_NAMES = "must be one of UpBlock2D, AttnUpBlock2D, or ResnetUpsampleBlock2D"
LENGTHS = "block_out_channels, down_block_types and up_block_types must have the same length"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, f"{DOWN_NAMES}, got 'SkipDownBlock2D'"),
        ({"down_block_types": ("KDownBlock2D", "DownBlock2D")}, f"{DOWN_NAMES}, got 'KDownBlock2D'"),
        ({"down_block_types": ("DownBlock2D", "UpBlock2D")}, f"{DOWN_NAMES}, got 'UpBlock2D'"),
        ({"up_block_types": ("SkipUpBlock2D", "UpBlock2D")}, f"{UP_NAMES}, got 'SkipUpBlock2D'"),
        ({"up_block_types": ("UpBlock2D", "KUpBlock2D")}, f"{UP_NAMES}, got 'KUpBlock2D'"),
        ({"mid_block_type": "MidBlock"}, "mid_block_type must be one of UNetMidBlock2D or None, got 'MidBlock'"),
        ({"act_fn": "tanh"}, "act_fn must be one of silu, swish, mish, gelu, or relu, got 'tanh'"),
        (
            {"time_embedding_type": "sine"},
            "time_embedding_type must be one of positional, fourier, or learned, got 'sine'",
        ),
        ({"time_embedding_type": "learned"}, "'learned' requires num_train_timesteps"),
        (
            {"resnet_time_scale_shift": "spatial"},
            "resnet_time_scale_shift must be one of default or scale_shift, got 'spatial'",
        ),
        ({"downsample_type": "fir"}, "downsample_type must be one of conv or resnet, got 'fir'"),
        ({"upsample_type": "fir"}, "upsample_type must be one of conv or resnet, got 'fir'"),
        (
            {"class_embed_type": "projection"},
            "class_embed_type must be one of None, timestep, or identity, got 'projection'",
        ),
        ({"block_out_channels": (8, 8, 8)}, f"{LENGTHS}, got 3, 2 and 2"),
        ({"down_block_types": ("DownBlock2D",)}, f"{LENGTHS}, got 2, 1 and 2"),
        ({"up_block_types": ("UpBlock2D",) * 3}, f"{LENGTHS}, got 2, 2 and 3"),
        ({"block_out_channels": (), "down_block_types": (), "up_block_types": ()}, "block_out_channels"),
        ({"layers_per_block": 0}, "layers_per_block must be an integer from 1 to 128, got 0"),
        ({"norm_num_groups": 3}, r"block_out_channels must be multiples of norm_num_groups \(3\), got 8"),
        ({"norm_num_groups": 16}, r"block_out_channels must be multiples of norm_num_groups \(16\), got 8"),
        ({"norm_num_groups": 0}, "norm_num_groups"),
        ({"attention_head_dim": 17}, "attention_head_dim must be from 1 to 16, .* got 17"),
        ({"attention_head_dim": 0}, "attention_head_dim must be from 1 to 16, .* got 0"),
        ({"attention_head_dim": -4}, "attention_head_dim must be from 1 to 16, .* got -4"),
    ],
)
def test_invalid_configurations_raise(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**overrides)


def test_head_dim_is_not_checked_without_attention() -> None:
    build(
        attention_head_dim=17,
        add_attention=False,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 8, 8), (1, 1, 3, 8, 8), (1, 3, 9, 8), (1, 3, 8, 7)])
def test_invalid_sample_shapes_raise(shape: tuple[int, ...]) -> None:
    message = rf"expected shape \(N, 3, H, W\), H and W multiples of 2, got \({', '.join(map(str, shape))}\)"
    with pytest.raises(ValueError, match=message):
        build()(torch.zeros(shape), 0)


def test_missing_and_unexpected_labels_raise() -> None:
    sample = torch.zeros(1, 3, 8, 8)
    for overrides in ({"num_class_embeds": 5}, {"class_embed_type": "timestep"}, {"class_embed_type": "identity"}):
        with pytest.raises(ValueError, match="class_labels must be given: the model is class-conditional"):
            build(**overrides)(sample, 0)
    with pytest.raises(ValueError, match="class_labels must be None: the model is unconditional"):
        build()(sample, 0, torch.tensor([1]))
