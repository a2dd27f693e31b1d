"""Fine-tuning: weights in networks of other sizes and channels, from every kind of model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from ddim.pipeline import DDIMPipeline
from ddim.training.finetuning import CHANNEL_LAYERS, load_weights
from ddim.training.run import complete_config, train
from ddim.training.trainer import build_model
from ddim.unet import UNet2DModel
from digits import TINY_MODEL
from helpers import randn, same_tensors


def make_network(**arguments: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**(TINY_MODEL | arguments))


@pytest.mark.parametrize("channels", [3, 5])
def test_other_channels_keep_all_other_weights(channels: int) -> None:
    source, model = make_network(), make_network(in_channels=channels, out_channels=channels)
    before = model.conv_in.weight.clone()
    assert load_weights(model, source.state_dict()) == list(CHANNEL_LAYERS)
    state, old = model.state_dict(), source.state_dict()
    kept = {name for name in state if not name.startswith(CHANNEL_LAYERS)}
    assert all(torch.equal(state[name], old[name]) for name in kept)
    assert torch.equal(model.conv_in.weight, before)
    assert not model.conv_out.weight.any()
    assert not model.conv_out.bias.any()
    # It starts from zero, and its output layer learns from the first step on.
    output = model(randn(2, channels, 8, 8), 5).sample
    assert not output.any()
    (output - 1).square().sum().backward()
    assert model.conv_out.weight.grad is not None
    assert bool(model.conv_out.weight.grad.any())


def test_another_size_keeps_every_weight(tmp_path: Path, make_config: Any) -> None:
    source = make_network()
    DDIMPipeline(source, DDIMPipeline.from_pretrained("mnist").scheduler).save_pretrained(tmp_path / "model")
    config = complete_config(
        make_config(model={}, init=str(tmp_path / "model")).model_copy(update={"model": {"sample_size": 16}})
    )
    assert config.model["sample_size"] == 16
    assert config.model["down_block_types"] == TINY_MODEL["down_block_types"]
    model = build_model(config)
    assert same_tensors(model.state_dict(), source.state_dict())
    assert model(randn(1, 1, 16, 16), 3).sample.shape == (1, 1, 16, 16)


def test_network_with_a_variance_is_trained_without_it(tmp_path: Path, make_config: Any) -> None:
    source = make_network(out_channels=2)
    DDIMPipeline(source, DDIMPipeline.from_pretrained("mnist").scheduler).save_pretrained(tmp_path / "model")
    config = make_config(init=str(tmp_path / "model")).model_copy(update={"model": {}})
    model = build_model(complete_config(config))
    x = randn(2, 1, 8, 8)
    assert torch.equal(model(x, 3).sample, source(x, 3).sample[:, :1])


def test_two_channels_are_no_variance() -> None:
    model = make_network()
    assert load_weights(model, make_network(in_channels=2, out_channels=2).state_dict()) == list(CHANNEL_LAYERS)


def test_other_architectures_are_refused() -> None:
    source = make_network()
    for arguments in ({"block_out_channels": [16, 16]}, {"layers_per_block": 2}, {"mid_block_type": None}):
        with pytest.raises(ValueError, match=r"size mismatch|Missing key|Unexpected key") as caught:
            load_weights(make_network(**arguments), source.state_dict())
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def first(make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of gray images."""
    out = tmp_path_factory.mktemp("first")
    train(make_config(max_steps=2), out, "cpu")
    return out


@pytest.mark.parametrize("kind", ["run", "checkpoint", "raw", "final"])
def test_runs_and_checkpoints_are_started_from(
    kind: str, first: Path, make_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = first / "checkpoints" / "step-00000002"
    init = {"run": first, "checkpoint": checkpoint, "raw": f"{checkpoint}@raw", "final": first / "final"}[kind]
    expected = UNet2DModel.from_pretrained(checkpoint / "unet", variant="raw" if kind == "raw" else None).state_dict()
    config = make_config(init=str(init)).model_copy(update={"model": {"in_channels": 3, "out_channels": 3}})
    with caplog.at_level(logging.INFO, "ddim.training"):
        model = build_model(complete_config(config)).state_dict()
    assert caplog.messages == [
        f"{init} has 1 channel, the images have 3: conv_in and conv_out are new, all other weights are kept"
    ]
    kept = {name for name in model if not name.startswith(CHANNEL_LAYERS)}
    assert all(torch.equal(model[name], expected[name]) for name in kept)


def test_fine_tuned_runs_have_the_new_channels(first: Path, make_config: Any, tmp_path: Path) -> None:
    color = {"in_channels": 3, "out_channels": 3}
    config = make_config(init=str(first), max_steps=1).model_copy(update={"model": color})
    final = train(config, tmp_path / "second", "cpu")
    assert DDIMPipeline.from_pretrained(final)(seeds=[0], num_inference_steps=1).images[0].mode == "RGB"
