"""Classes and guidance on the command line, against the same calls in Python."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from ddim import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim.cli import app
from ddim.io.latent_files import load_latents
from digits import TINY_MODEL


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    classes: dict[str, Any] = {"num_class_embeds": 4, "class_names": ("a", "b", "c, d"), "has_null_class": True}
    unet = UNet2DModel(**TINY_MODEL, **classes).eval()
    unet.conv_out.weight.data.mul_(0.1)
    folder = tmp_path_factory.mktemp("model")
    DDIMPipeline(unet, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(model: Path) -> DDIMPipeline:
    pipe = DDIMPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> Result:
    words = [str(argument) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["ddim", *words])
    return CliRunner().invoke(app, words)


def test_grid_has_a_row_per_class(model: Path, pipe: DDIMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        "--label",
        "all",
        "--guidance",
        "2",
        "--guidance-interval",
        "100,900",
        "-n",
        "6",
        "--steps",
        "2",
        "--scale",
        "1",
    ]
    assert run(monkeypatch, "sample", model, *options, "-o", "x.png").exit_code == 0
    images = pipe.sample_images(
        6, class_labels=[0, 0, 1, 1, 2, 2], guidance_scale=2, guidance_interval=(100, 900), num_inference_steps=2
    )
    grid = np.asarray(Image.open("x.png"))
    rows, columns = (np.flatnonzero(np.diff(np.pad(np.any(grid, axis=axis), 1).astype(int)) == 1) for axis in (1, 0))
    assert (len(rows), len(columns)) == (3, 2)
    for index, image in enumerate(images):
        top, left = 2 + index // 2 * 10, 2 + index % 2 * 10
        assert np.array_equal(grid[top : top + 8, left : left + 8], np.asarray(image))


def test_bulk_samples_hold_their_labels(model: Path, pipe: DDIMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["sample", model, "-n", "6", "--steps", "2", "--batch-size", "4", "-o", "x.npz"]
    assert run(monkeypatch, *command, "--label", "c, d").exit_code == 0
    assert np.load("x.npz")["arr_1"].tolist() == [2] * 6
    assert run(monkeypatch, *command, "--label", "a,b", "--overwrite", "--guidance", "3").exit_code == 0
    with np.load("x.npz") as file:
        assert file["arr_1"].tolist() == [0, 0, 0, 1, 1, 1]
        images = pipe.sample_images(
            6, batch_size=4, class_labels=list("aaabbb"), guidance_scale=3, num_inference_steps=2, output_type="np"
        )
        np.testing.assert_allclose(file["arr_0"] / 255, np.stack(images), atol=0.51 / 255)
    settings = json.loads(Path("x.npz.manifest.json").read_text())["settings"]
    assert settings["class_labels"] == [[0, 3], [1, 3]]
    assert settings["negative_labels"] == [[3, 6]]
    other = run(monkeypatch, *command, "--label", "a,b", "--guidance", "2")
    assert "(--guidance 2.0 instead of 3.0)" in str(other.exception)


def test_decode_repeats_the_condition_of_the_encoding(
    model: Path, pipe: DDIMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, image in enumerate(pipe.sample_images(2, class_labels="a", num_inference_steps=10)):
        image.save(f"{index}.png")
    options = ["-m", model, "--label", "a,b", "--guidance", "2", "--steps", "10"]
    assert run(monkeypatch, "encode", "0.png", "1.png", *options, "-o", "x.npz").exit_code == 0
    assert run(monkeypatch, "decode", "x.npz", "-o", "images").exit_code == 0
    for index in range(2):
        original, decoded = (
            np.asarray(Image.open(file)).astype(int) for file in (f"{index}.png", f"images/0000{index}.png")
        )
        assert abs(original - decoded).max() <= 1
    assert run(monkeypatch, "decode", "x.npz", "--label", "b", "-o", "others").exit_code == 0
    assert Path("images/00000.png").read_bytes() != Path("others/00000.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "x"], "--label must be from 0 to 2 or one of a, b, c, d, got 'x'"),
        (["--label", "3"], "--label must be from 0 to 2"),
        (["--label", "a,,b"], "labels must be indices or names, separated by commas, got 'a,,b'"),
        (["--label", "a,b", "-n", "5"], "--count must be a multiple of the 2 labels, got 5"),
        (["--guidance", "2"], "guidance requires --label, --negative-label, or a guide"),
        (["--label", "a", "--guidance", "-1"], "--guidance must be a number of at least 0, got -1"),
        (["--label", "a", "--guidance", "2", "--guidance-interval", "5"], "--guidance-interval must be two timesteps"),
        (["--label", "a", "--negative-label", "b"], "--negative-label requires a --guidance other than 1"),
        (["--label", "a", "--guidance", "2", "--guide", "mnist"], "--guide must have the model's sample shape"),
        (["--label", "a", "--guidance", "2", "--guide", "missing"], "missing"),
    ],
)
def test_wrong_options(model: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DDIMPipeline, "sample_images", lambda *args, **kwargs: pytest.fail("images were sampled"))
    result = run(monkeypatch, "sample", model, *arguments)
    assert message in str(result.exception)
    assert result.exit_code


def test_frames_go_from_class_to_class(model: Path, pipe: DDIMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["-m", model, "--steps", "4", "--frames", "3", "--guidance", "2", "-o", "x.npz"]
    assert run(monkeypatch, "interpolate", "5", "5", "7", "--label", "a,b,a", *options).exit_code == 0
    latents = pipe.sampler.initial_noise(seeds=[5, 5, 7])[0]
    timesteps = pipe.scheduler.make_timesteps(4)
    images = pipe.interpolate(
        list(latents),
        frames=3,
        class_labels=list("aba"),
        guidance_scale=2,
        timesteps=timesteps,
        as_samples=True,
        output_type="np",
    ).images
    np.testing.assert_allclose(np.load("x.npz")["arr_0"] / 255, images, atol=0.51 / 255)
    first, *_, last = np.load("x.npz")["arr_0"][:3].astype(int)
    assert abs(first - last).max() > 0
    labels = ["a", "b", "a"]
    for frame, (seed, label) in zip((0, 2, 4), zip((5, 5, 7), labels, strict=True), strict=True):
        sampled = pipe(seeds=[seed], class_labels=label, guidance_scale=2, num_inference_steps=4).images[0]
        assert abs(np.load("x.npz")["arr_0"][frame, ..., 0].astype(int) - np.asarray(sampled)).max() <= 1


def test_points_keep_the_classes_of_their_encoding(
    model: Path, pipe: DDIMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, image in enumerate(pipe.sample_images(2, class_labels="a", num_inference_steps=10)):
        image.save(f"{index}.png")
    encode = ["encode", "-m", model, "--guidance", "2", "--steps", "10"]
    assert run(monkeypatch, *encode, "0.png", "1.png", "--label", "a,b", "-o", "x.npz").exit_code == 0
    assert run(monkeypatch, *encode, "0.png", "--label", "b", "-o", "y.npz").exit_code == 0
    assert run(monkeypatch, "interpolate", "x.npz", "y.npz", "--frames", "2", "-o", "z.npz").exit_code == 0
    for frame, original in enumerate(("0.png", "1.png", "0.png")):
        decoded = np.load("z.npz")["arr_0"][frame, ..., 0].astype(int)
        assert abs(decoded - np.asarray(Image.open(original)).astype(int)).max() <= 1
    # The same images, given with the same labels.
    options = ["-m", model, "--guidance", "2", "--label", "a,b,b", "--frames", "2", "--steps", "10", "-o", "i.npz"]
    assert run(monkeypatch, "interpolate", "0.png", "1.png", "0.png", *options).exit_code == 0
    assert abs(np.load("i.npz")["arr_0"].astype(int) - np.load("z.npz")["arr_0"]).max() <= 1
    mixed = run(monkeypatch, "interpolate", "x.npz", "3", "-o", "q.npz")
    assert "the points were encoded with different classes or guidance; give --label" in str(mixed.exception)
    assert not Path("q.npz").exists()


def test_direction_is_of_the_classes(model: Path, pipe: DDIMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pipe.sample_images(3, class_labels=list("aab"), num_inference_steps=10)
    for folder, index in (("with", 0), ("without", 1), ("without", 2)):
        Path(folder).mkdir(exist_ok=True)
        images[index].save(f"{folder}/{index}.png")
    options = ["-m", model, "--steps", "4", "--guidance", "2", "-o", "x.npz"]
    assert run(monkeypatch, "direction", "with", "without", "--label", "a,b,b", *options).exit_code == 0
    expected = pipe.direction(images[:1], images[1:], 4, class_labels=list("abb"), guidance_scale=2)
    np.testing.assert_allclose(load_latents("x.npz", "direction")[0][0], expected, atol=1e-5)
    refused = run(monkeypatch, "direction", "with", "without", "--label", "a,b", *options)
    assert "must be a multiple of the 2 labels, got 3" in str(refused.exception)


def test_classes_are_evaluated(model: Path, pipe: DDIMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    # The reference holds samples of the same seeds, so that each class is recognized, as far as it is by its images.
    count = 12
    images = pipe.sample_images(count, class_labels=[0] * 4 + [1] * 4 + [2] * 4, num_inference_steps=2)
    names = np.array(["a"] * 4 + ["b"] * 4 + ["c, d"] * 4)
    np.savez("reference.npz", images=np.stack([np.asarray(image) for image in images]), label=names)
    options = ["--reference", "reference.npz", "--metrics", "fid", "--per-class", "--steps", "2", "-o", "x.json"]
    given = ["--label", "all", "-n", "12", "-o", "x.csv", "-o", "x.md"]
    result = run(monkeypatch, "evaluate", model, *options, *given)
    assert result.exit_code == 0, result.exception
    report = json.loads(Path("x.json").read_text())
    assert report["metrics"]["agreement"] == 1
    assert list(report["classes"]) == ["a", "b", "c, d"]
    for values in report["classes"].values():
        assert (values["samples"], values["reference"], values["agreement"]) == (4, 4, 1)
        assert abs(values["fid"]) < 1e-3
    assert report["settings"]["label"] == "all"
    assert "100.0%" in result.output
    assert "agreement_class_a" in Path("x.csv").read_text()
    assert "| c, d | 4 | 4 | 100.0% |" in Path("x.md").read_text()
    # The same from a file, whose labels are indices.
    assert run(monkeypatch, "sample", model, "--label", "all", "-n", "12", "--steps", "2", "-o", "s.npz").exit_code == 0
    assert run(monkeypatch, "evaluate", "s.npz", *[o for o in options if o not in ("--steps", "2")]).exit_code == 0
    assert json.loads(Path("x.json").read_text())["classes"] == report["classes"]


def test_timesteps_are_tuned_for_classes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    options = ["--steps", "2", "--codes", "4", "--label", "all", "--guidance", "2", "-o", "tuned"]
    result = run(monkeypatch, "tune", model, *options)
    assert result.exit_code == 0, result.exception
    assert "timesteps " in result.output
    assert DDIMPipeline.from_pretrained("tuned").classes.names == ("a", "b", "c, d")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["interpolate", "1", "2", "3", "--label", "a,b"], "the number of points must be a multiple of the 2 "),
        (["interpolate", "1", "2", "--label", "x"], "--label must be from 0 to 2"),
        (["evaluate", "--reference", "digits", "--per-class"], "classes of the samples: .* has no labels"),
        (["evaluate", "--per-class", "--label", "a"], "--per-class requires labeled images as the --reference"),
        (["evaluate", "--reference", "digits", "--per-class", "--label", "a"], "SAMPLES must have the classes of the"),
        (["tune", "--label", "x", "-o", "t"], "--label must be from 0 to 2"),
    ],
)
def test_wrong_labels_of_other_commands(
    model: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DDIMPipeline, "__call__", lambda *args, **kwargs: pytest.fail("images were sampled"))
    result = run(monkeypatch, *arguments, "-m", model, *(["-n", "4"] if arguments[0] == "evaluate" else []))
    assert re.search(message, str(result.exception)), result.exception
    assert result.exit_code


def test_labels_of_files_have_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, "evaluate", "digits", "--reference", "digits", "--label", "3")
    assert "--label and the options of guidance require a model" in str(result.exception)
