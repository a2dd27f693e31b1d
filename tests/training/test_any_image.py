"""Images of any kind through the commands: five channels of 16 bits in rectangles, files of all modes, alpha."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ddim import DDIMPipeline
from ddim.data.config import DataConfig
from ddim.data.dataset import open_dataset
from ddim.evaluation.image_sets import open_files
from ddim.io.array_files import read_pixels
from ddim.io.images import fit_image
from ddim.io.pixel_format import PixelFormat
from ddim.io.runs import list_checkpoints
from ddim.training.checkpoint import TENSOR_FILES
from ddim.training.config import validate
from ddim.training.run import train
from helpers import environment
from programs import run_cli, start_cli

SHAPE = 40, 64, 5
NETWORK = {
    "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "add_attention": False,
}
CELLS: dict[str, Any] = {
    "data": {"horizontal_flip": True, "vertical_flip": True, "crop": "random", "holdout": 2},
    "model": NETWORK | {"sample_size": [40, 64], "in_channels": 5, "out_channels": 5},
    "batch_size": 4,
    "max_steps": 8,
    "optim": {"lr": 1e-3, "warmup_steps": 0},
    "ema": {"decay": 0.5},
    "samples": {"every": 4, "count": 2, "num_inference_steps": 2},
    "evaluate": {"every": 4, "count": 0},
    "checkpoints": {"every": 2},
    "log_every": 1,
}


def cells(count: int) -> np.ndarray:
    """Spots of random brightness on a noisy ground, of another range in each channel: uint16 (N, 40, 64, 5)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :64]
    spot = np.exp(-((y - 20) ** 2 + (x - 32) ** 2) / 200)[None, :, :, None]
    peaks = rng.uniform(0.2, 1, (count, 1, 1, 5)) * np.array([200, 4000, 1000, 60000, 30])
    return (peaks * (spot + 0.02 * rng.random((count, *SHAPE)))).astype(np.uint16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with twelve arrays in `cells/`, and the configuration `cells.yaml`."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "cells").mkdir()
    for index, image in enumerate(cells(12)):
        np.save(folder / "cells" / f"{index:02d}.npy", image)
    (folder / "cells.yaml").write_text(yaml.safe_dump(CELLS))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run that was killed and resumed."""
    command = ["train", "--config", "cells.yaml", "--data", "cells", "--device", "cpu", "--out", "run"]
    out = folder / "run"
    with start_cli(*command, env=environment(folder), cwd=folder) as process:
        deadline = time.monotonic() + 60
        while not list_checkpoints(out / "checkpoints") and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert list_checkpoints(out / "checkpoints")
    done = run_cli(*command, env=environment(folder), cwd=folder)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def pipe(run: Path) -> DDIMPipeline:
    """The model of the run."""
    pipe = DDIMPipeline.from_pretrained(run / "final")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ddim(folder: Path, *arguments: str) -> str:
    """Run a command that succeeds; its stderr."""
    done = run_cli(*arguments, env=environment(folder), cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_killed_run_equals_uninterrupted_run(folder: Path, run: Path) -> None:
    other = folder / "uninterrupted"
    train(validate(CELLS | {"data": CELLS["data"] | {"source": str(folder / "cells")}}), other, "cpu")
    assert (run / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for ours, theirs in zip(*(list_checkpoints(out / "checkpoints") for out in (run, other)), strict=True):
        assert all((ours / file).read_bytes() == (theirs / file).read_bytes() for file in TENSOR_FILES.values())
    for name in ("samples.png", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"):
        assert (run / "final" / name).read_bytes() == (other / "final" / name).read_bytes()


def test_runs_do_not_resume_on_other_values(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for index in range(4):
        values = np.random.default_rng(index).integers(0, 65536, (8, 8), np.uint16)
        Image.fromarray(values).save(tmp_path / "images" / f"{index}.png")
    model = NETWORK | {"sample_size": 8, "in_channels": 1, "out_channels": 1}
    entries = CELLS | {"model": model, "max_steps": 1, "samples": CELLS["samples"] | {"every": 0, "count": 1}}
    data = {"source": str(tmp_path / "images"), "cache": "none"}
    train(validate(entries | {"data": data}), tmp_path / "run", "cpu")
    message = r"data: expected 4 images \(uint16, SHA-256 .*\), got 4 images \(SHA-256 "
    with pytest.raises(ValueError, match=message):
        train(validate(entries | {"data": data | {"dtype": "uint8"}}), tmp_path / "run", "cpu")


def test_ranges_of_the_data_are_recorded(run: Path, pipe: DDIMPipeline) -> None:
    values = cells(12)
    # Fitted to the larger size that is cropped from, within the range of each image.
    low, high = values.min((0, 1, 2)), values.max((0, 1, 2))
    assert pipe.pixel_format.dtype == "uint16"
    assert pipe.pixel_format.low == tuple(low)
    assert np.all(np.abs(np.array(pipe.pixel_format.high) - high) <= 0.05 * high)
    card = (run / "final" / "README.md").read_text()
    assert "A denoising diffusion model of 40x64 images, 5 channels of uint16" in card
    assert "none picked, in false color" in card
    record = yaml.safe_load((run / "config.yaml").read_text())
    assert PixelFormat.parse(record["data"]["pixel_format"]) == pipe.pixel_format
    facts = json.loads(run_cli("info", str(run), "--json", env=environment(run)).stdout)["images"]
    assert facts == {"height": 40, "width": 64, "channels": 5, **(pipe.pixel_format.record() or {})}


def test_network_equals_that_of_diffusers(run: Path, pipe: DDIMPipeline, caplog: pytest.LogCaptureFixture) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DModel.from_pretrained(run / "final" / "unet")
    x = torch.randn(2, 5, 40, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert float((theirs(x, 300).sample - pipe.unet(x, 300).sample).abs().max()) < 1e-5
    samples = diffusers.DDIMPipeline.from_pretrained(run / "final")(
        num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(1)
    ).images
    ours: Any = pipe(num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(1)).images
    low, high = np.array(pipe.pixel_format.low), np.array(pipe.pixel_format.high)
    assert np.abs(low + samples * (high - low) - ours).max() <= 0.51
    assert not caplog.messages


def test_samples_are_the_same_in_every_file(folder: Path, run: Path, pipe: DDIMPipeline) -> None:
    options = ["--model", "run", "-n", "3", "--steps", "3"]
    expected: Any = pipe(seeds=range(3), num_inference_steps=3, output_type="np").images
    assert expected.dtype == np.uint16
    for name in ("x.npz", "x.tiff", "samples", "x.tar"):
        assert "false color" not in ddim(folder, "sample", *options, "--out", name)
    assert "in false color: x.tiff, x.npz and folders hold the values" in ddim(
        folder, "sample", *options, "--out", "x.png"
    )
    images = np.load(folder / "x.npz")["arr_0"]
    assert np.abs(images.astype(int) - expected).max() <= 1
    files = sorted((folder / "samples").glob("*.tiff"))
    assert all(np.array_equal(read_pixels(file), image) for file, image in zip(files, images, strict=True))
    grid = read_pixels(folder / "x.tiff")
    assert np.array_equal(np.asarray(grid)[2:42, 2:66], images[0])
    with Image.open(folder / "x.png") as shown:
        assert shown.mode == "RGB"


def test_damaged_files_are_sampled_again(folder: Path, run: Path) -> None:
    options = ["sample", "--model", "run", "-n", "2", "--steps", "2", "--out", "again"]
    ddim(folder, *options)
    file = folder / "again" / "00001.tiff"
    content = file.read_bytes()
    file.write_bytes(content[:900] + bytes([content[900] ^ 255]) + content[901:])
    assert "sampling again what 1 damaged file held" in ddim(folder, *options)
    assert file.read_bytes() == content


def test_images_are_inverted_exactly(folder: Path, pipe: DDIMPipeline) -> None:
    values = cells(12)[:3]
    encoded = pipe.encode(values, num_inference_steps=10)
    decoded: Any = pipe.decode(encoded, num_inference_steps=10, output_type="pt").images
    low, high = np.array(pipe.pixel_format.low), np.array(pipe.pixel_format.high)
    clipped = values.clip(low, high.astype(np.uint16))
    error = (decoded.numpy().transpose(0, 2, 3, 1) - clipped) / (high - low)
    assert float((error**2).mean()) < 1e-6
    again: Any = pipe.decode(encoded, num_inference_steps=10, output_type="np").images
    assert again.dtype == np.uint16
    # The values themselves, but for rounding.
    assert np.all(np.abs(again.astype(float) - clipped) <= 1 + 0.002 * (high - low))
    ddim(folder, "encode", "cells/00.npy", "--model", "run", "--steps", "10", "--out", "codes.npz")
    ddim(folder, "decode", "codes.npz", "--out", "decoded.npz")
    back = np.load(folder / "decoded.npz")["arr_0"]
    assert np.abs(back.astype(int) - again[:1]).max() <= 1
    for command in (["reconstruct", "cells/00.npy"], ["edit", "cells/00.npy", "-n", "2"], ["interpolate", "1", "2"]):
        ddim(folder, *command, "--model", "run", "--steps", "3", "--out", "shown.png")


def test_images_are_evaluated_by_their_pixels(folder: Path, run: Path) -> None:
    options = ["evaluate", "run", "--reference", "cells", "-n", "6", "--steps", "2"]
    ddim(folder, *options, "--features", "pixels", "--metrics", "kid,precision", "--out", "score.json")
    ddim(folder, "sample", "--model", "run", "-n", "4", "--steps", "2", "--out", "y.tar")
    shards, arrays = open_files(str(folder / "y.tar")), open_files(str(folder / "cells"), 4, (5, 40, 64))
    assert (shards.shape, shards.pixel_format.dtype) == (arrays.shape, "uint16") == ((5, 40, 64), "uint16")
    assert float(next(shards.batches()).min()) == 0
    assert json.loads((folder / "score.json").read_text())["settings"]["image_shape"] == [5, 40, 64]
    done = run_cli(*options, "--features", "mnist", env=environment(folder), cwd=folder)
    assert done.stderr.splitlines()[-1].endswith(
        "--features must be pixels for images of 5 channels of uint16, got 'mnist'"
    )


def test_other_images_are_refused(folder: Path, run: Path) -> None:
    Image.new("RGB", (64, 40)).save(folder / "rgb.png")
    np.save(folder / "small.npy", np.zeros((40, 64, 5), np.uint8))
    for name, reason in (
        ("rgb.png", "rgb.png must hold uint16 values, got an image of mode RGB"),
        ("small.npy", "must hold uint16 values, got uint8"),
    ):
        done = run_cli("encode", name, "--model", "run", env=environment(folder), cwd=folder)
        assert (done.returncode, reason in done.stderr) == (1, True), done.stderr
    with pytest.raises(ValueError, match=r"must be 'np' or 'pt' for images of 5 channels of uint16, got 'pil'"):
        DDIMPipeline.from_pretrained(run / "final")(seeds=[0])


# --- files of all modes


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of several sizes, modes and depths."""
    folder = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 256, (24, 30, 3), np.uint8))
    color.convert("L").save(folder / "gray.png")
    color.save(folder / "rgb.webp", lossless=True)
    rgba = color.resize((20, 20)).convert("RGBA")
    rgba.putalpha(color.convert("L").resize((20, 20)))
    rgba.save(folder / "rgba.png")
    color.convert("P").save(folder / "palette.png")
    Image.fromarray(rng.integers(0, 65536, (16, 17), np.uint16)).save(folder / "deep.png")
    color.convert("CMYK").save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    color.save(folder / "turned.jpg", exif=exif)
    color.convert("LA").save(folder / "gray-alpha.png")
    return folder


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_files_of_all_modes_are_fitted(mixed: Path, channels: int) -> None:
    dataset = open_dataset(DataConfig(source=str(mixed), cache="memory"), (8, 12), channels)
    files = sorted(mixed.iterdir())
    assert dataset.shape == (len(files), channels, 8, 12)
    assert dataset.pixel_format.is_eight_bit
    for file, pixels in zip(files, dataset.read(torch.arange(len(files))), strict=True):
        image = read_pixels(file)
        assert isinstance(image, Image.Image)
        expected = np.asarray(fit_image(image, 8, 12, channels)).reshape(8, 12, channels)
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
    if channels in (2, 4):
        alpha = dataset.read(torch.arange(len(files)))[:, -1]
        has_alpha = [file.name in ("rgba.png", "gray-alpha.png") for file in files]
        transparent = [bool((values < 255).any()) for values in alpha]
        # The gray image with alpha was opaque.
        assert transparent == [file.name == "rgba.png" for file in files]
        assert sum(has_alpha) == 2


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_is_kept_through_training_and_inversion(tmp_path: Path, channels: int) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    originals = rng.integers(0, 256, (8, 8, 12, channels), np.uint8)
    for index, pixels in enumerate(originals):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    model = NETWORK | {"sample_size": [8, 12], "in_channels": channels, "out_channels": channels}
    config = CELLS | {"data": {"source": str(tmp_path / "images")}, "model": model, "max_steps": 4}
    train(validate(config | {"samples": CELLS["samples"] | {"every": 0}}), tmp_path / "run", "cpu")
    pipe = DDIMPipeline.from_pretrained(tmp_path / "run" / "final")
    pipe.set_progress_bar_config(disable=True)
    images: Any = pipe(seeds=[0, 1], num_inference_steps=2).images
    assert [image.mode for image in images] == [{2: "LA", 4: "RGBA"}[channels]] * 2
    files = [Image.open(tmp_path / "images" / f"{index}.png") for index in range(3)]
    decoded: Any = pipe.decode(pipe.encode(files, 8), 8).images
    for image, pixels in zip(decoded, originals, strict=False):
        assert np.abs(np.asarray(image).astype(int) - pixels).max() <= 1


# --- types and ranges of arrays


@pytest.mark.parametrize("cache", ["memory", "disk", "none"])
@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "float64"])
def test_ranges_are_measured_whatever_the_cache(tmp_path: Path, dtype: str, cache: Any) -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(7, 6, 9, 2)) * 100 + 500).astype(dtype)
    np.save(tmp_path / "x.npy", values)
    dataset = open_dataset(DataConfig(source=str(tmp_path / "x.npy"), cache=cache), (6, 9), 2)
    stored = values.astype("float32" if dtype == "float64" else dtype)
    low, high = (tuple(map(float, bound)) for bound in (stored.min((0, 1, 2)), stored.max((0, 1, 2))))
    assert dataset.pixel_format == PixelFormat(str(stored.dtype), low, high)
    read = dataset.read(torch.arange(7))
    assert read.dtype == torch.float32
    assert np.array_equal(read.permute(0, 2, 3, 1).numpy(), stored.astype(np.float32))
    given = DataConfig(source=str(tmp_path / "x.npy"), cache=cache, value_range=(0, 1000))
    assert open_dataset(given, (6, 9), 2).pixel_format == PixelFormat(str(stored.dtype), (0.0,), (1000.0,))


@pytest.mark.parametrize(
    ("entries", "arrays", "message"),
    [
        ({"value_range": (0, 9)}, [np.uint8], r"data\.value_range must be null for images of 8 bits"),
        ({"value_range": (9, 9)}, [np.uint16], r"data\.value_range: pixel_format\.high must be above low"),
        ({"value_range": [(0, 9)] * 3}, [np.uint16], r"data\.value_range: .* bounds of 5 channels, got 3"),
        (
            {"value_range": (0, 70000)},
            [np.uint16],
            r"data\.value_range: pixel_format of uint16 must be within 0 and 65",
        ),
        ({}, [np.uint16, np.float32], "must hold images of one type of values, got float32 and uint16"),
        ({}, [np.int64], "must hold uint8, uint16, int16, or float32 values, got int64"),
        ({"max_unreadable": 0}, [np.uint16, None], r"1 images of .* the first: .*1\.npy: the image must be an array"),
    ],
)
def test_invalid_sets_raise(tmp_path: Path, entries: dict[str, Any], arrays: list[Any], message: str) -> None:
    for index, dtype in enumerate(arrays):
        np.save(tmp_path / f"{index}.npy", np.zeros((4, 4, 3 if dtype is None else 5), dtype or np.uint16))
    with pytest.raises(ValueError, match=message):
        open_dataset(DataConfig(source=str(tmp_path), **entries), 4, 5)


def test_deep_images_keep_their_depth_unless_8_bits_are_asked_for(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (3, 8, 8), np.uint16)
    for index, pixels in enumerate(values):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    deep = open_dataset(DataConfig(source=str(tmp_path)), 8, 1)
    assert np.array_equal(deep.read(torch.arange(3))[:, 0].numpy(), values.astype(np.float32))
    for config, channels in (
        (DataConfig(source=str(tmp_path), dtype="uint8"), 1),
        (DataConfig(source=str(tmp_path)), 3),
    ):
        shallow = open_dataset(config, 8, channels)
        assert np.array_equal(shallow.read(torch.arange(3))[:, 0].numpy(), (values / 257).round().astype(np.uint8))
