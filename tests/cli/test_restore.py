"""`ddim inpaint`, `super-resolve` and `restore`: files against the same calls in Python, and invalid options."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from ddim import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim.cli import app
from ddim.cli.restore import parse_box, parse_operator
from ddim.diffusion.operators import GaussianBlur
from digits import TINY_MODEL, digits


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_MODEL).eval()
    folder = tmp_path_factory.mktemp("model")
    DDIMPipeline(unet, DDIMScheduler(clip_sample=False, prediction_type="sample")).save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(model: Path) -> DDIMPipeline:
    pipe = DDIMPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for index, pixels in enumerate(digits(2)):
        Image.fromarray(pixels).save(f"images/{index}.png")
        Image.fromarray(pixels).resize((4, 4), Image.Resampling.BOX).save(f"small-{index}.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 1:5] = 255
    Image.fromarray(mask).save("mask.png")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> Result:
    words = [str(argument) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["ddim", *words])
    return CliRunner().invoke(app, words)


def arrays(path: str) -> np.ndarray:
    with np.load(path) as file:
        values: np.ndarray = file["arr_0"][..., 0]
    return values


def test_inpainted_images_are_those_of_the_pipeline(
    model: Path, pipe: DDIMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["-m", model, "--steps", "6", "-n", "2", "--seed", "5"]
    for given in (["--mask", "mask.png"], ["--box", "1,2,4,4"]):
        result = run(monkeypatch, "inpaint", "images", *given, *options, "-o", "x.npz")
        assert result.exit_code == 0, result.exception
        assert result.stdout == "x.npz\n"
        missing = torch.zeros(8, 8, dtype=torch.bool)
        missing[2:6, 1:5] = True
        expected = pipe.inpaint(
            [Image.open(f"images/{i}.png") for i in range(2)],
            missing,
            num_inference_steps=6,
            samples=2,
            seeds=range(5, 9),
            output_type="np",
        ).images
        np.testing.assert_allclose(arrays("x.npz") / 255, expected[..., 0], atol=0.51 / 255)
        for index, image in enumerate(arrays("x.npz")):
            assert np.array_equal(image[~missing.numpy()], digits(2)[index // 2][~missing.numpy()])


def test_grid_shows_what_was_given_the_samples_and_their_mean(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["-m", model, "--steps", "4", "--scale", "1"]
    assert run(monkeypatch, "inpaint", "images", "--mask", "mask.png", "-n", "3", *options).exit_code == 0
    with Image.open("inpainted.png") as grid:
        assert grid.size == (5 * 10 + 2, 2 * 10 + 2)
    assert run(monkeypatch, "super-resolve", "small-0.png", "--factor", "2", *options).exit_code == 0
    with Image.open("super-resolved.png") as grid:
        # Without a mean of one sample.
        assert grid.size == (2 * 10 + 2, 10 + 2)
        given = np.asarray(grid)[2:10, 2:10]
    assert np.array_equal(given[::2, ::2], np.asarray(Image.open("small-0.png")))


def test_small_images_come_back(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["-m", model, "--factor", "2", "--steps", "5", "-o", "x.npz"]
    assert run(monkeypatch, "super-resolve", "small-0.png", "small-1.png", *options).exit_code == 0
    for index, image in enumerate(arrays("x.npz")):
        again = image.reshape(4, 2, 4, 2).mean((1, 3))
        assert np.abs(again - np.asarray(Image.open(f"small-{index}.png"))).max() <= 0.5


def test_measurements_are_simulated(model: Path, pipe: DDIMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["-m", model, "--operator", "blur:0.8", "--steps", "5", "--method", "ddrm"]
    assert run(monkeypatch, "restore", "images", *options, "--simulate", "-o", "x.npz").exit_code == 0
    operator = GaussianBlur((1, 8, 8), 0.8)
    clean = torch.from_numpy(np.stack(digits(2))).float()[:, None] / 127.5 - 1
    result = pipe.restore(operator(clean), operator, 0.0, "ddrm", 5, "np", seeds=[0, 1])
    np.testing.assert_allclose(arrays("x.npz") / 255, result.images[..., 0], atol=0.51 / 255)


def test_blurred_images_are_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["-m", model, "--operator", "blur:0.8", "--noise-std", "0.05", "--steps", "4"]
    result = run(monkeypatch, "restore", "images", *options, "-n", "2")
    assert result.exit_code == 0, result.exception
    assert "4 images, 4 function evaluations each" in result.stderr
    assert Path("restored.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inpaint", "images"], "give either --mask or --box"),
        (["inpaint", "images", "--box", "1,1,2,2", "--mask", "mask.png"], "give either --mask or --box"),
        (["inpaint", "images", "--box", "1,1,2"], "--box must be X,Y,WIDTH,HEIGHT, such as 7,7,14,14, got '1,1,2'"),
        (["inpaint", "images", "--box", "5,5,4,4"], "--box must lie within the model's 8 x 8 pixels, got '5,5,4,4'"),
        (
            ["inpaint", "images", "--box", "1,1,0,4"],
            "--box must have a width and a height of at least 1",
        ),
        (["inpaint", "images", "--box", "a,1,2,2"], "--box must be integers separated by commas"),
        (["inpaint", "images", "--box", "0,0,8,8"], "--box must leave some of the model's 8 x 8 pixels"),
        (["inpaint", "images", "--mask", "missing.png"], "missing.png"),
        (
            ["inpaint", "images", "--box", "1,1,2,2", "--method", "magic"],
            "--method must be one of ddnm, .*, got 'magic'",
        ),
        (["inpaint", "images", "--box", "1,1,2,2", "-n", "0"], "--count must be an integer of at least 1, got 0"),
        (["inpaint", "images", "--box", "1,1,2,2", "--resampling", "5"], r"--resampling must be \(length, repeats\)"),
        (["inpaint", "small-0.png", "--box", "1,1,2,2"], "small-0.png"),
        (["super-resolve", "small-0.png", "--factor", "3"], "--factor must divide the height and the width"),
        (["super-resolve", "images", "--factor", "2"], "images"),
        (["super-resolve", "small-0.png", "--factor", "2", "--kernel", "x"], "--kernel must be one of box or bicubic"),
        (["restore", "images", "--operator", "magic"], "--operator must be gray, blur:STD, box:FACTOR or bicubic"),
        (["restore", "images", "--operator", "gray"], "a gray measurement requires color images"),
        (["restore", "images", "--operator", "blur:1", "--noise-std", "-1"], "--noise-std must be a number of at"),
        (["restore", "images", "--operator", "blur:1", "--method", "repaint"], "requires a Mask"),
        (["restore", "images", "--operator", "box:2"], "images"),
    ],
)
def test_invalid_options_raise(
    model: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UNet2DModel, "forward", lambda *args: pytest.fail("the network was evaluated"))
    result = run(monkeypatch, *arguments, "-m", model)
    assert result.exit_code
    assert re.search(message, str(result.exception)), result.exception


@pytest.mark.parametrize("text", ["blur", "blur:0", "blur:-1", "blur:nan", "box:1.5", "box:", "gray:2", "", "box:1e99"])
def test_invalid_operators_raise(text: str) -> None:
    with pytest.raises(ValueError, match="--operator must be"):
        parse_operator(text)


def test_box_is_in_pixels() -> None:
    missing = parse_box("1,2,3,4", (8, 8))
    rows, columns = torch.nonzero(missing, as_tuple=True)
    assert (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())) == (2, 5, 1, 3)
