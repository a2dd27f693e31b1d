"""Generated images against `diffusers`: equal weights, settings and random numbers give equal images."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from ddim import DDIMPipeline, DDIMScheduler
from ddim.io.hub import builtin_models
from helpers import seeded


@pytest.fixture(scope="module")
def reference() -> diffusers.DDIMPipeline:
    """Return the pipeline of `diffusers` with its own U-Net and the weights and scheduler of the built-in model."""
    ours = DDIMPipeline.from_pretrained("mnist")
    unet = diffusers.UNet2DModel(**ours.unet.config)
    unet.load_state_dict(ours.unet.state_dict())
    scheduler = diffusers.DDIMScheduler.from_pretrained(builtin_models()["mnist"], subfolder="scheduler")
    pipe = diffusers.DDIMPipeline(unet.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> DDIMPipeline:
    pipe = DDIMPipeline.from_pretrained("mnist")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_arrays(pipe, generator, **settings):
    return pipe(batch_size=2, generator=generator, output_type="np", **settings).images


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("generators", ["one", "list"])
def test_images_match_diffusers(pipe, reference, eta, generators) -> None:
    def generator():
        one = seeded(3)
        return one if generators == "one" else [one, seeded(4)]

    a, b = (sample_arrays(p, generator(), eta=eta, num_inference_steps=12) for p in (pipe, reference))
    assert a.shape == b.shape == (2, 28, 28, 1)
    assert a.dtype == b.dtype == np.float32
    assert np.abs(a - b).max() <= 1 / 255


def test_global_generator_matches_diffusers(pipe, reference) -> None:
    images = []
    for p in (pipe, reference):
        torch.manual_seed(5)
        images.append(sample_arrays(p, None, eta=1.0, num_inference_steps=4))
    assert np.abs(images[0] - images[1]).max() <= 1 / 255


def test_positional_arguments_match_diffusers(pipe, reference) -> None:
    a, b = (p(1, seeded(0), 0.0, 5, True, "pil", False)[0][0] for p in (pipe, reference))
    assert a.mode == b.mode == "L"
    assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


@pytest.mark.parametrize(
    "settings",
    [
        {"timestep_spacing": "trailing"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
        {"thresholding": True, "sample_max_value": 2.0, "clip_sample": False},
        {"beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1},
    ],
)
def test_scheduler_settings_carry_over(pipe, reference, settings) -> None:
    ours = DDIMPipeline(pipe.unet, DDIMScheduler(**settings))
    theirs = diffusers.DDIMPipeline(reference.unet, diffusers.DDIMScheduler(**settings))
    for p in (ours, theirs):
        p.set_progress_bar_config(disable=True)
    a, b = (sample_arrays(p, seeded(1), num_inference_steps=10) for p in (ours, theirs))
    assert np.abs(a - b).max() <= 1 / 255


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_diffusers_loads_faces_and_samples_the_same_images(eta: float) -> None:
    ours = DDIMPipeline.from_pretrained("faces")
    theirs = diffusers.DDIMPipeline.from_pretrained(builtin_models()["faces"], torch_dtype=torch.float32)
    for p in (ours, theirs):
        p.set_progress_bar_config(disable=True)
    a, b = (sample_arrays(p, seeded(6), eta=eta, num_inference_steps=8) for p in (ours, theirs))
    assert a.shape == b.shape == (2, 64, 64, 3)
    assert np.abs(a - b).max() <= 1 / 255


def test_accepts_unet_and_scheduler_of_diffusers(pipe, reference) -> None:
    mixed = DDIMPipeline(reference.unet, diffusers.DDPMScheduler(clip_sample=False))
    mixed.set_progress_bar_config(disable=True)
    a, b = (sample_arrays(p, seeded(2), num_inference_steps=10) for p in (mixed, reference))
    assert np.abs(a - b).max() <= 1 / 255
