"""The page's work on models whose images PIL has no mode for: shown in false color, encoded by their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddim import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim.app.events import Endpoint
from ddim.app.handlers.interpolate import PathSettings, interpolate, make_endpoints
from ddim.app.handlers.invert import EditSettings, edit, invert
from ddim.app.handlers.sample import SampleSettings, sample, save
from ddim.app.handlers.steps import DDIM_STEPS, compare
from ddim.app.pictures import Picture, describe_images, fit
from ddim.app.runs import Run
from digits import TINY_MODEL

SHAPE = 6, 8


def make_pipe(channels: int, dtype: str) -> DDIMPipeline:
    """A tiny model."""
    record = None if dtype == "uint8" else {"dtype": dtype, "low": [0], "high": [1000]}
    torch.manual_seed(0)
    arguments = TINY_MODEL | {"sample_size": list(SHAPE), "in_channels": channels, "out_channels": channels}
    return DDIMPipeline(
        UNet2DModel(**arguments, pixel_format=record).eval(), DDIMScheduler(50, clip_sample=False), engine="eager"
    )


@pytest.mark.parametrize(
    ("channels", "dtype", "mode", "description"),
    [
        (5, "uint16", "RGB", "5 channels of uint16 in false color, 8 x 6 pixels"),
        (6, "uint8", "RGB", "6 channels of uint8 in false color, 8 x 6 pixels"),
        (1, "float32", "L", "gray, float32 shown in 8 bits, 8 x 6 pixels"),
        (2, "uint8", "LA", "gray with alpha, 8 x 6 pixels"),
    ],
)
def test_models_of_any_images_run_on_the_page(
    tmp_path: Path, channels: int, dtype: str, mode: str, description: str
) -> None:
    pipe = make_pipe(channels, dtype)
    assert describe_images(pipe) == description
    previews: list[Any] = []
    run = Run(previews.append)

    sampled = sample(run, pipe, SampleSettings(2, 0.5, count=2))
    assert [(image.mode, image.size) for image in sampled.images] == [(mode, (8, 6))] * 2
    grid, array = save(sampled, tmp_path)
    values = np.load(array)["arr_0"]
    expected: Any = pipe(seeds=[0, 1], num_inference_steps=2, eta=0.5, output_type="np").images
    if dtype == "uint8":
        expected = (expected * 255).round()
    assert values.dtype == dtype
    assert np.abs(values - expected.astype(np.float64)).max() <= 1
    with Image.open(grid) as shown:
        assert shown.mode == mode
    exact = channels == 2
    assert ("output_type" in sampled.settings.as_python("x", sampled.keeps_values)) != exact

    # Noise was added on the way, so that the image itself is the endpoint.
    endpoint = sampled.endpoint(0)
    assert endpoint.seed is None
    path = interpolate(run, pipe, [endpoint, *make_endpoints(run, pipe, [3], [])], PathSettings(3, 2, False))
    assert [frame.mode for frame in path.frames] == [mode] * 3

    picture = endpoint.picture
    assert picture is not None
    assert [result.image.mode for result in invert(run, pipe, picture, 2).results] == [mode] * 2
    assert [image.mode for image in edit(run, pipe, picture, EditSettings(0.5, 2, range(2)))] == [mode] * 2
    rows = compare(run, pipe, 0, 1)
    assert len(rows) == sum(steps < 50 for steps in DDIM_STEPS) + 1


def test_uploads_must_hold_the_models_values() -> None:
    pipe = make_pipe(1, "uint16")
    deep = Image.fromarray(np.full((12, 16), 500, np.uint16))
    fitted = fit(pipe, deep)
    assert (fitted.shown.mode, fitted.values.dtype, fitted.values.shape) == ("L", np.uint16, (6, 8, 1))
    assert np.asarray(fitted.shown).max() == 128
    with pytest.raises(ValueError, match="must hold uint16 values, got an image of mode RGB"):
        fit(pipe, Image.new("RGB", (8, 6)))
    with pytest.raises(ValueError, match=r"must be an array \(H, W, 6\)"):
        fit(make_pipe(6, "uint8"), Image.new("RGB", (8, 6)))
    assert Endpoint(Picture(fitted.shown, fitted.values)).image is fitted.shown
