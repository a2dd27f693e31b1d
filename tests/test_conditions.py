"""Class labels and guidance through pipelines, against loops written here with the classes of `diffusers`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from ddim import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim.io.class_labels import ClassLabels
from helpers import error, randn

CONDITIONAL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "num_class_embeds": 4,
}
STEPS = 5


def make_pipeline(seed: int = 0, **settings: Any) -> DDIMPipeline:
    torch.manual_seed(seed)
    unet = UNet2DModel(**CONDITIONAL | settings).eval()
    if unet.class_embedding is not None:
        unet.class_embedding.weight.data.mul_(3)
    pipe = DDIMPipeline(unet, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> DDIMPipeline:
    return make_pipeline(class_names=("a", "b", "c"), has_null_class=True)


def copy_to_diffusers(unet: UNet2DModel) -> diffusers.UNet2DModel:
    settings = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    copy = diffusers.UNet2DModel(**settings).eval()
    copy.load_state_dict(unet.state_dict())
    return copy


@torch.no_grad()
def sample_in_diffusers(x: Tensor, predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t), t, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


def sample(pipe: DDIMPipeline, x: Tensor, **condition: Any) -> Tensor:
    images: Tensor = pipe(latents=x, num_inference_steps=STEPS, output_type="pt", **condition).images
    return images


@pytest.mark.parametrize("engine", ["auto", "eager"])
@pytest.mark.parametrize(
    ("condition", "labels", "baseline"),
    [
        ({"class_labels": 2}, [2, 2, 2], None),
        ({"class_labels": ["c", 0, "1"]}, [2, 0, 1], None),
        ({"class_labels": torch.tensor([2, 0, 1]), "guidance_scale": 2.5}, [2, 0, 1], [3, 3, 3]),
        ({"class_labels": "b", "guidance_scale": 0}, [1, 1, 1], [3, 3, 3]),
        (
            {"class_labels": np.array([1, 1, 0]), "guidance_scale": 2, "negative_labels": ["a", "c", "c"]},
            [1, 1, 0],
            [0, 2, 2],
        ),
        ({"class_labels": 1, "guidance_scale": 2, "guidance_interval": (200, 600)}, [1, 1, 1], [3, 3, 3]),
        ({}, [3, 3, 3], None),
    ],
)
def test_guided_loop(
    pipe: DDIMPipeline, condition: dict[str, Any], labels: list[int], baseline: list[int] | None, engine: str
) -> None:
    other = copy_to_diffusers(pipe.unet)
    scale, (low, high) = condition.get("guidance_scale", 1), condition.get("guidance_interval", (0, 999))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        conditional = other(x, t, torch.tensor(labels)).sample
        if baseline is None or not low <= t <= high:
            return conditional
        weak = other(x, t, torch.tensor(baseline)).sample
        return weak + scale * (conditional - weak)

    x = randn(3, 1, 8, 8)
    pipe.engine = engine
    assert error(sample(pipe, x, **condition), sample_in_diffusers(x, predict)) < 1e-4


def test_scales_one_and_zero_are_plain_sampling(pipe: DDIMPipeline) -> None:
    x = randn(3, 1, 8, 8, seed=1)
    conditional, null = sample(pipe, x, class_labels=[0, 1, 2]), sample(pipe, x)
    assert torch.equal(sample(pipe, x, class_labels=[0, 1, 2], guidance_scale=1.0), conditional)
    assert torch.equal(sample(pipe, x, class_labels=[0, 1, 2], guidance_scale=0.0), null)
    assert error(conditional, null) > 0.1
    for row in range(3):
        assert error(sample(pipe, x[row : row + 1], class_labels=row), conditional[row : row + 1]) < 1e-5


@pytest.mark.parametrize("settings", [{"has_null_class": True}, {"num_class_embeds": None}])
def test_autoguidance(settings: dict[str, Any]) -> None:
    """A weaker network is pushed away from, given the same labels; it also guides networks without classes."""
    pipe, guide = make_pipeline(**settings), make_pipeline(seed=1, **settings)
    networks = [copy_to_diffusers(pipe.unet), copy_to_diffusers(guide.unet)]
    labels = None if pipe.classes is None else torch.tensor([0, 1])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        strong, weak = (network(x, t, labels).sample for network in networks)
        return weak + 1.7 * (strong - weak)

    x = randn(2, 1, 8, 8)
    given = {} if labels is None else {"class_labels": labels}
    result = sample(pipe, x, guide=guide, guidance_scale=1.7, **given)
    assert error(result, sample_in_diffusers(x, predict)) < 1e-4
    assert torch.equal(sample(pipe, x, guide=guide, guidance_scale=0, **given), sample(guide, x, **given))


def test_guide_by_name(pipe: DDIMPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    x = randn(1, 1, 8, 8)
    assert torch.equal(
        sample(pipe, x, class_labels=1, guide=tmp_path, guidance_scale=2), sample(pipe, x, class_labels=1)
    )


def test_images_do_not_depend_on_their_batch(pipe: DDIMPipeline) -> None:
    labels = [0, 1, 2, 0, 1]
    together = pipe.sample_images(5, class_labels=labels, guidance_scale=2, num_inference_steps=2, batch_size=2)
    for index, label in enumerate(labels):
        (alone,) = pipe.sample_images(1, index, class_labels=label, guidance_scale=2, num_inference_steps=2)
        difference = np.asarray(alone).astype(int) - np.asarray(together[index]).astype(int)
        assert abs(difference).max() <= 1


def test_encode_and_decode_with_guidance(pipe: DDIMPipeline) -> None:
    """Real images would need a trained network; these are the network's own, of known latents."""
    condition: dict[str, Any] = {"class_labels": [0, 1, 2], "guidance_scale": 1.5, "num_inference_steps": 20}
    pipe.unet.conv_out.weight.data.mul_(0.1)
    try:
        images = pipe(seeds=range(3), output_type="np", **condition).images
        encoded = pipe.encode(images, tolerance=1e-6, **condition)
        assert bool((encoded.mse < 1e-6).all())
        assert (
            error(torch.as_tensor(pipe.decode(encoded, output_type="np", **condition).images), torch.as_tensor(images))
            < 5e-3
        )
        alone = pipe.encode(images[1:2], tolerance=1e-6, **condition | {"class_labels": "b"})
        assert torch.equal(alone.latents, encoded.latents[1:2])
        other = pipe.decode(encoded, output_type="np", **condition | {"class_labels": [1, 2, 0]}).images
        assert error(torch.as_tensor(other), torch.as_tensor(images)) > 0.02
    finally:
        pipe.unet.conv_out.weight.data.div_(0.1)


def test_interpolation_between_classes(pipe: DDIMPipeline) -> None:
    z = randn(2, 1, 8, 8)
    settings: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt", "guidance_scale": 2}
    frames = pipe.interpolate(z, frames=3, class_labels=["a", "c"], **settings).images
    ends = pipe.decode(z, class_labels=["a", "c"], **settings).images
    assert error(frames[[0, 2]], ends) < 1e-5
    with pytest.raises(ValueError, match="class_labels must be one label, or one per image"):
        pipe.interpolate(z, frames=3, class_labels=[0, 1, 2], **settings)


def test_other_methods_take_conditions(pipe: DDIMPipeline) -> None:
    x, condition = randn(2, 1, 8, 8), {"class_labels": ["a", "b"], "guidance_scale": 3}
    images = sample(pipe, x, **condition)
    trajectory = pipe.trajectory(latents=x, num_inference_steps=STEPS, output_type="pt", **condition)
    assert torch.equal(trajectory.images, images)
    (row,) = pipe.consistency(x, [STEPS], output_type="pt", **condition)
    assert torch.equal(row, images)
    edited = pipe.edit(images * 2 - 1, 0.5, 4, "pt", seeds=[1], **condition)
    unconditional = pipe.edit(images * 2 - 1, 0.5, 4, "pt", seeds=[1])
    assert error(edited.images, unconditional.images) > 0.01


def test_labels_decide_the_batch_size(pipe: DDIMPipeline) -> None:
    assert len(pipe(class_labels=["a", "b", "c"], num_inference_steps=1).images) == 3
    assert len(pipe(4, class_labels="a", num_inference_steps=1).images) == 4


@pytest.mark.parametrize(
    ("condition", "kind", "message"),
    [
        ({"class_labels": 3}, ValueError, "class_labels must be from 0 to 2 or one of a, b, c, got 3"),
        ({"class_labels": -1}, ValueError, "from 0 to 2"),
        ({"class_labels": "d"}, ValueError, "one of a, b, c, got 'd'"),
        ({"class_labels": [0, 1, 2]}, ValueError, r"one label, or one per image \(2\), got 3"),
        ({"class_labels": []}, ValueError, "got 0"),
        ({"class_labels": 1.0}, TypeError, "class_labels must be integers or names, got 1.0"),
        ({"class_labels": True}, TypeError, "integers or names, got True"),
        (
            {"class_labels": 1, "guidance_scale": -2},
            ValueError,
            "guidance_scale must be a number of at least 0, got -2",
        ),
        ({"class_labels": 1, "guidance_scale": "2"}, TypeError, "guidance_scale must be a number"),
        ({"guidance_scale": 2}, ValueError, "guidance requires class_labels, negative_labels, or a guide"),
        ({"class_labels": 1, "guidance_interval": (0, 9)}, ValueError, "requires a guidance_scale other than 1"),
        ({"class_labels": 1, "guidance_scale": 2, "guidance_interval": (9, 0)}, ValueError, "in ascending order"),
        ({"class_labels": 1, "guidance_scale": 2, "guidance_interval": 9}, ValueError, "two timesteps"),
        ({"class_labels": 1, "negative_labels": 2}, ValueError, "requires a guidance_scale other than 1"),
        ({"class_labels": 1, "guidance_scale": 2, "negative_labels": 7}, ValueError, "negative_labels must be from 0"),
        (
            {"class_labels": 1, "guidance_scale": 2, "guide": 7},
            TypeError,
            "guide must be a pipeline or the name of one",
        ),
        ({"class_labels": 1, "guidance_scale": 2, "guide": "mnist"}, ValueError, "guide must have the model's sample"),
    ],
)
def test_wrong_conditions(
    pipe: DDIMPipeline, condition: dict[str, Any], kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe.unet, "forward", lambda *args: pytest.fail("the network was evaluated"))
    with pytest.raises(kind, match=message):
        pipe(seeds=[0, 1], num_inference_steps=1, **condition)


def test_models_without_classes_or_null_class(tiny_pipeline: DDIMPipeline) -> None:
    with pytest.raises(ValueError, match="must be None: the model has no classes"):
        tiny_pipeline(class_labels=3)
    with pytest.raises(ValueError, match="guidance requires a model with classes, or a guide"):
        tiny_pipeline(guidance_scale=2)
    pipe = make_pipeline()
    with pytest.raises(ValueError, match="must be given: the model has 4 classes and was trained without a null"):
        pipe()
    with pytest.raises(ValueError, match="requires negative_labels or a guide: the model was trained without"):
        pipe(class_labels=3, guidance_scale=2)


def test_classes_are_saved_where_diffusers_passes_over_them(
    pipe: DDIMPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe.save_pretrained(tmp_path)
    assert DDIMPipeline.from_pretrained(tmp_path).classes == ClassLabels(3, ("a", "b", "c"), has_null=True)
    network = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet")
    assert not caplog.messages
    x, labels = randn(2, 1, 8, 8), torch.tensor([0, 3])
    assert error(network(x, 500, labels).sample, pipe.unet(x, 500, labels).sample) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_class_embeds": None, "class_names": ["a"]}, "class_names and has_null_class require num_class_embeds"),
        ({"class_names": ["a", "b"]}, "class_names must hold 4 names, got 2"),
        ({"class_names": ["a", "b", "b", "c"]}, "class_names must be different names"),
        ({"num_class_embeds": 1, "has_null_class": True}, "num_class_embeds must be at least 1, and 2 with"),
    ],
)
def test_wrong_class_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet2DModel(**CONDITIONAL | settings)
