"""The built-in model with classes, against `diffusers`, its card, and real digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ddim.evaluation.classifiers import load_classifier
from ddim.io.class_labels import ClassLabels
from ddim.io.hub import builtin_models
from ddim.pipeline import DDIMPipeline
from ddim.training.config import load_config
from ddim.unet import UNet2DModel
from helpers import error, randn

FOLDER = builtin_models()["mnist-labels"]
DIGITS = Path(__file__).with_name("mnist-digits.png")
"""A 3, an 8 and a 5 of MNIST's test images, side by side (LeCun, Cortes, Burges; CC BY-SA 3.0)."""
DIGIT_LABELS = [3, 8, 5]
CARD_STEPS = 50


@pytest.fixture(scope="module")
def pipe() -> DDIMPipeline:
    pipe = DDIMPipeline.from_pretrained("mnist-labels")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def reference() -> diffusers.UNet2DModel:
    """The network that `diffusers` makes of the same files."""
    return diffusers.UNet2DModel.from_pretrained(FOLDER, subfolder="unet", torch_dtype=torch.float32).eval()


def test_classes_are_digits_and_none(pipe: DDIMPipeline) -> None:
    assert pipe.classes == ClassLabels(10, tuple("0123456789"), has_null=True)


@torch.no_grad()
def test_diffusers_loads_the_network(pipe: DDIMPipeline, reference: diffusers.UNet2DModel) -> None:
    x, t, labels = randn(3, 1, 28, 28), torch.tensor([0, 500, 999]), torch.tensor([3, 7, 10])
    assert error(pipe.unet(x, t, labels).sample, reference(x, t, labels).sample) < 1e-5


@torch.no_grad()
def test_guidance_1_is_the_conditional_loop(pipe: DDIMPipeline, reference: diffusers.UNet2DModel) -> None:
    noise, labels = randn(2, 1, 28, 28, seed=4), torch.tensor([3, 7])
    scheduler = diffusers.DDIMScheduler.from_pretrained(FOLDER, subfolder="scheduler")
    scheduler.set_timesteps(6)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(reference(x, t, labels).sample, t, x).prev_sample
    settings: dict[str, Any] = {"latents": noise, "num_inference_steps": 6, "output_type": "pt"}
    images = pipe(class_labels=[3, 7], guidance_scale=1.0, **settings).images
    assert error(images, (x / 2 + 0.5).clamp(0, 1)) < 1e-4
    assert torch.equal(images, pipe(class_labels=labels, **settings).images)


@pytest.mark.filterwarnings("ignore")
def test_inversion_with_guidance_3_returns_real_digits(pipe: DDIMPipeline) -> None:
    with Image.open(DIGITS) as strip:
        digits = [strip.crop((left, 0, left + 28, 28)) for left in range(0, 2 * 28, 28)]
    result = pipe.reconstruct(digits, 20, class_labels=DIGIT_LABELS[:2], guidance_scale=3.0)
    assert result.mse.max() < 1e-6
    for image, digit in zip(result.images, digits, strict=True):
        assert np.abs(np.asarray(image, int) - np.asarray(digit, int)).max() <= 1


def test_samples_are_of_their_class(pipe: DDIMPipeline) -> None:
    """98% of 5,000 are without guidance, and all but 2 in 1,000 with 1.5, by the classifier of `--features mnist`."""
    classifier = load_classifier("mnist", (1, 28, 28))
    labels = list(range(10)) * 2
    settings: dict[str, Any] = {"num_inference_steps": 10, "output_type": "pt"}
    images = pipe(20, seeds=range(20), class_labels=labels, guidance_scale=1.5, **settings).images
    predicted = classifier.logits(classifier((255 * images).round().byte())).argmax(1)
    assert (predicted == torch.tensor(labels)).sum() >= 19


def test_cards_samples_are_those_of_the_model(pipe: DDIMPipeline) -> None:
    """The first image of the row of threes, in the pixels of the grid, which is enlarged three times."""
    (image,) = pipe(seeds=[30], class_labels=3, guidance_scale=1.2, num_inference_steps=CARD_STEPS).images
    with Image.open(FOLDER / "samples.png") as grid:
        pixels = np.asarray(grid, int)[1::3, 1::3]
    assert pixels.shape == (10 * 30 + 2, 10 * 30 + 2)
    assert np.abs(pixels[3 * 30 + 2 :][:28, 2:30] - np.asarray(image, int)).max() <= 2


def test_network_is_that_of_its_preset() -> None:
    config = load_config("mnist-labels")
    network = UNet2DModel.from_pretrained("mnist-labels", subfolder="unet").config
    assert {key: network[key] for key in config.model} == config.model
    weights = FOLDER / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 4e6
