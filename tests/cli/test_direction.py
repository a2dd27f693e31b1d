"""`ddim direction`, and `ddim decode --direction`: files against the Python API, and invalid options."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from cli_batch import Commands
from ddim.cli.direction import _split
from ddim.data.base import Source
from ddim.diffusion.interpolation import add_direction
from ddim.io.latent_files import load_latents
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel
from digits import digits

TIMESTEPS = [700, 300, 0]
STEPS = ["--timesteps", ",".join(map(str, TIMESTEPS)), "--batch-size", "1", "--model", "tiny"]


def handwritten() -> list[Image.Image]:
    """A zero, a one and a two."""
    return [Image.fromarray(pixels).resize((28, 28)) for pixels in digits(3)]


@pytest.fixture(scope="module")
def pipe(make_unet: Callable[..., UNet2DModel]) -> DDIMPipeline:
    pipe = DDIMPipeline(make_unet(sample_size=28, in_channels=1, out_channels=1), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def commands(pipe: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    folder = tmp_path_factory.mktemp("direction")
    pipe.save_pretrained(folder / "tiny")
    for kind, image in zip(("even", "odd", "even"), handwritten(), strict=True):
        (folder / kind).mkdir(exist_ok=True)
        image.save(folder / kind / f"{len(list((folder / kind).iterdir()))}.png")
    columns = {"image": handwritten(), "kind": ["even", "odd", "even"]}
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(folder / "data.parquet"))
    table = {
        "folders": ["direction", "odd", "even", *STEPS, "--out", "folders.safetensors"],
        "column": ["direction", "data.parquet", "--where", "kind=odd", *STEPS, "--out", "column.npz"],
        "first": ["direction", "odd", "even", "-n", "1", *STEPS, "--out", "first.npz"],
        "encode": ["encode", "even", *STEPS, "--out", "even.npz"],
        "decode": [
            *("decode", "even.npz", "--direction", "folders.safetensors", "--strength", "0.5", "--batch-size", "1"),
            *("--out", "shifted.npz"),
        ],
        "one source": ["direction", "odd"],
        "two data sets": ["direction", "odd", "even", "--where", "kind=odd"],
        "no value": ["direction", "data.parquet", "--where", "kind"],
        "no column": ["direction", "data.parquet", "--where", "beard=none"],
        "no such image": ["direction", "data.parquet", "--where", "kind=prime"],
        "strength alone": ["decode", "even.npz", "--strength", "2"],
        "same images": ["direction", "odd", "odd"],
        "not latents": ["decode", "folders.safetensors"],
        "point": ["interpolate", "folders.safetensors", "1"],
        "no direction": ["decode", "even.npz", "--direction", "even.npz"],
        "other steps": ["decode", "even.npz", "--direction", "folders.safetensors", "--steps", "2"],
    }
    with Commands(folder, table) as commands:
        yield commands


def test_direction_is_that_of_the_pipeline(commands: Commands, pipe: DDIMPipeline) -> None:
    zero, one, two = handwritten()
    expected = pipe.direction([one], [zero, two], timesteps=TIMESTEPS, batch_size=1)
    for name in ("folders", "column"):
        direction, settings = load_latents(commands.output(name), "direction")
        assert torch.equal(direction, expected[None])
        assert settings.timesteps == TIMESTEPS
    first, _ = load_latents(commands.output("first"), "direction")
    assert torch.equal(first[0], pipe.direction([one], [zero], timesteps=TIMESTEPS, batch_size=1))


def test_decode_adds_a_multiple_of_it(commands: Commands, pipe: DDIMPipeline) -> None:
    commands.output("folders")
    latents, _ = load_latents(commands.output("encode"))
    direction, _ = load_latents(commands.output("folders"), "direction")
    images = pipe.decode(add_direction(latents, direction[0], 0.5), timesteps=TIMESTEPS, batch_size=1).images
    shifted = np.load(commands.output("decode"))["arr_0"]
    assert np.array_equal(shifted[..., 0], np.stack([np.asarray(image) for image in images]))


@pytest.mark.parametrize(
    ("values", "value", "positive"),
    [
        (["3.0", "2.0", "none"], "3", [0]),
        (["True", "False", "none"], "true", [0]),
        (["True", "False", "none"], "None", [2]),
        (["3.0", "3", "2"], "3", [1]),
    ],
)
def test_values_may_be_spelled_otherwise(values: list[str], value: str, positive: list[int]) -> None:
    data = Source("data", len(values), lambda indices: [], "", {"column": values}.get)
    assert _split(data, f"column={value}")[0] == positive


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one source", "SOURCES must be two sources of images, with the attribute and without it, got 1"),
        ("two data sets", "SOURCES must be one data set, got 2"),
        ("no value", "--where must be a column and a value, such as label=3, got 'kind'"),
        ("no column", "data.parquet has no column 'beard'"),
        ("no such image", "got 'prime'; the column kind has ['even', 'odd']"),
        ("strength alone", "--strength has no effect without --direction"),
        ("same images", "the images with the attribute must differ from those without it, got the same ones"),
        ("not latents", "folders.safetensors must hold latents of images, got a direction in latent space"),
        ("point", "folders.safetensors must hold latents of images, got a direction in latent space"),
        ("no direction", "even.npz must hold a direction in latent space, got latents of images"),
        ("other steps", "got 2 steps from 500; --force decodes it anyway"),
    ],
)
def test_invalid_options_raise(commands: Commands, name: str, message: str) -> None:
    assert commands[name].code == 1
    assert message in commands[name].stderr
