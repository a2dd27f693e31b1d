"""The work and the event handlers of the tab Restore, without a server."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from ddim.app import inputs
from ddim.app.brush import read_marks, show_sheet
from ddim.app.class_inputs import ClassInputs
from ddim.app.events import Endpoint, Shared
from ddim.app.handlers.restore import INPAINT, SUPER_RESOLVE, RestoreHandlers
from ddim.app.measurements import Hole, Reduced, Source, check_factor, factors, read_mask
from ddim.app.pictures import Picture
from ddim.app.restoration import RestoreSettings, restore
from ddim.app.runs import Run, RunProgress, RunResult
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel
from digits import TINY_MODEL

H, W = 8, 12


def make_pipe(channels: int = 1, dtype: str = "uint8", **settings: Any) -> DDIMPipeline:
    """A tiny model."""
    record = None if dtype == "uint8" else {"dtype": dtype, "low": [0], "high": [1000]}
    torch.manual_seed(0)
    arguments = TINY_MODEL | {"sample_size": [H, W], "in_channels": channels, "out_channels": channels} | settings
    unet = UNet2DModel(**arguments, pixel_format=record).eval()
    pipe = DDIMPipeline(unet, DDIMScheduler(50, clip_sample=False), engine="eager")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> DDIMPipeline:
    return make_pipe()


def noise(size: tuple[int, int] = (W, H), mode: str = "L") -> Image.Image:
    width, height = size
    channels = len(mode)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def box_mask(size: tuple[int, int] = (W, H), box: tuple[int, int, int, int] = (2, 3, 7, 6)) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def data_url(image: Image.Image, prefix: str = "data:image/png;base64,") -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return prefix + base64.b64encode(file.getvalue()).decode()


def make_run() -> tuple[Run, list[Any]]:
    events: list[Any] = []
    return Run(events.append), events


# --- measurements


def test_hole_hides_the_missing_pixels_only(pipe: DDIMPipeline) -> None:
    image, mask = noise(), np.asarray(box_mask()) > 0
    hole = Hole.of(pipe, Source.of(pipe, image).picture, read_mask(pipe, box_mask(), (W, H)))
    pixels = np.asarray(hole.picture.shown)
    assert np.array_equal(pixels[~mask], np.asarray(image)[~mask])
    (filling,) = set(pixels[mask].tolist())
    assert filling == pytest.approx(np.asarray(image)[~mask].mean(), abs=1)
    assert np.array_equal(np.asarray(hole.mask) == 255, mask)


def test_mask_is_fitted_as_the_image_is(pipe: DDIMPipeline) -> None:
    """Of an image twice as large with margins, which are cropped."""
    large = box_mask((40, 2 * H), (8 + 4, 6, 8 + 14, 12))
    missing = read_mask(pipe, large, (40, 2 * H))
    assert np.array_equal(missing[0].numpy(), np.asarray(box_mask()) > 0)


def test_images_are_made_small_by_means_of_squares(pipe: DDIMPipeline) -> None:
    image = noise()
    reduced = Reduced.of(pipe, Source.of(pipe, image), 2, "box")
    means = np.asarray(image, float).reshape(H // 2, 2, W // 2, 2).mean((1, 3))
    assert np.abs(np.asarray(reduced.picture.shown) - means).max() <= 0.51


def test_small_images_are_taken_as_they_are(pipe: DDIMPipeline) -> None:
    small = noise((W // 4, H // 4))
    source = Source.of(pipe, small)
    reduced = Reduced.of(pipe, source, 4, "bicubic")
    assert np.array_equal(np.asarray(reduced.picture.shown), np.asarray(small))
    # By another factor it is enlarged and made small again.
    assert Reduced.of(pipe, source, 2, "box").picture.shown.size == (W // 2, H // 2)
    assert Source.of(pipe, noise((W // 2, H // 4))).small is None


def test_factors_divide_height_and_width(pipe: DDIMPipeline) -> None:
    assert factors(pipe) == [2, 4]
    for value in (3, 1, 8, 0, -2, 2.5, "2", None, True, 10**30, float("nan")):
        with pytest.raises(ValueError, match="factor must be "):
            check_factor(value, pipe)
    prime = make_pipe(sample_size=[7, 9], down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                      block_out_channels=(8,))  # fmt: skip
    assert factors(prime) == []
    with pytest.raises(ValueError, match="the model's 9 x 7 pixels have no common factor, got 2"):
        check_factor(2, prime)
    with pytest.raises(ValueError, match="kernel must be one of box or bicubic, got 'lanczos'"):
        Reduced.of(pipe, Source.of(pipe, noise()), 2, "lanczos")


# --- what is marked


HOSTILE: dict[str, tuple[Any, str]] = {
    "nothing": (None, "the drawing must be a PNG of at most 1 MB"),
    "empty": ("", "the drawing must be a PNG of at most 1 MB"),
    "an address": ("http://example.org/x.png", "the drawing must be a PNG of at most 1 MB"),
    "an editor's value": ({"background": "/etc/passwd", "layers": []}, "the drawing must be a PNG of at most 1 MB"),
    "another type": (data_url(box_mask(), "data:image/gif;base64,"), "the drawing must be a PNG of at most 1 MB"),
    "no base64": ("data:image/png;base64,???", "the drawing must be a PNG of at most 1 MB"),
    "other letters": ("data:image/png;base64,é", "the drawing must be a PNG of at most 1 MB"),
    "long": ("data:image/png;base64," + "A" * inputs.MAX_DRAWING_CHARACTERS, "the drawing must be a PNG of at most"),
    "no image": ("data:image/png;base64,AAAA", "the drawing is not an image of a known format"),
    "many pixels": (data_url(Image.new("1", (6000, 6000))), "the drawing must have at most 25 million pixels"),
    "another size": (data_url(box_mask((H, W))), "mask must have the 12 x 8 pixels of the image, got 8 x 12"),
    "nothing marked": (data_url(Image.new("L", (W, H), 127)), "nothing is marked; brush over what is unknown"),
    "nothing marked on a clear canvas": (data_url(Image.new("RGBA", (W, H))), "nothing is marked"),
    "everything marked": (data_url(Image.new("L", (W, H), 128)), "everything is marked; erase what is known"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_marks_are_refused(pipe: DDIMPipeline, name: str) -> None:
    value, sentence = HOSTILE[name]
    with pytest.raises(ValueError, match=sentence):
        read_marks(pipe, value)


def test_white_is_unknown(pipe: DDIMPipeline) -> None:
    missing = read_marks(pipe, data_url(box_mask().convert("RGBA")))
    assert np.array_equal(missing[0].numpy(), np.asarray(box_mask()) > 0)


def test_sheet_is_magnified_by_whole_numbers() -> None:
    assert "width:min(100%,336px);aspect-ratio:28/28" in show_sheet(Image.new("L", (28, 28)))
    assert "width:min(100%,320px);aspect-ratio:64/32" in show_sheet(Image.new("RGB", (64, 32)))
    assert "width:min(100%,1024px)" in show_sheet(Image.new("RGB", (1024, 1024)))
    assert 'canvas width="1" height="1"' in show_sheet(Image.new("L", (1, 1)))


# --- results


@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint8"), (3, "uint8"), (5, "uint16"), (1, "float32")])
def test_answers_are_those_of_the_library(channels: int, dtype: str, tmp_path: Path) -> None:
    """Of the measurement in a file; their mean and spread are those of NumPy."""
    pipe = make_pipe(channels, dtype)
    run, events = make_run()
    values: Any = pipe(seeds=[5], num_inference_steps=2, output_type="np").images[0]
    picture = Picture(noise(mode="L"), values)
    if dtype == "uint8":
        image = noise(mode={1: "L", 3: "RGB"}[channels])
        picture = Picture(image, image)
    missing = read_mask(pipe, box_mask(), (W, H))
    settings = RestoreSettings.checked(3, 4, 7)
    for measurement in (Hole.of(pipe, picture, missing), Reduced.of(pipe, Source(picture), 2, "box")):
        result = restore(run, pipe, measurement, settings)
        arguments: Any = {"num_inference_steps": 4, "output_type": "np", "samples": 3, "seeds": range(7, 10)}
        given = np.atleast_3d(np.asarray(measurement.picture.values))
        expected = (
            pipe.inpaint([given], missing, **arguments)
            if isinstance(measurement, Hole)
            else pipe.super_resolve([given], 2, **arguments)
        ).images
        answers = np.stack([np.atleast_3d(np.asarray(answer.values)) for answer in result.answers])
        assert np.array_equal(answers, (expected * 255).round() if dtype == "uint8" else expected)
        if dtype == "uint8":
            assert np.abs(np.atleast_3d(result.mean.values) - answers.mean(0)).max() <= 1
            deviation = answers.std(0, ddof=1).mean(-1) / 255
            assert result.max_spread == pytest.approx(deviation.max(), abs=0.005)
            assert np.abs(np.asarray(result.spread) / 255 * result.max_spread - deviation).max() < 0.01
        suffix = "png" if dtype == "uint8" else "npz"
        assert f" measurement.{suffix} " in result.as_command("x")
    assert any(isinstance(event, RunProgress) for event in events)


def test_settings_are_checked() -> None:
    for arguments, sentence in (
        ((0, 10, 0), "count must be an integer from 1 to 8, got 0"),
        ((9, 10, 0), "count must be an integer from 1 to 8, got 9"),
        ((1, 1001, 0), "steps must be an integer from 1 to 1000, got 1001"),
        ((1, 10, -1), "seed must be an integer from 0 to .*, got -1"),
        ((1, 10, 0, "3"), "label and guidance require a model with classes"),
    ):
        with pytest.raises(ValueError, match=sentence):
            RestoreSettings.checked(*arguments)


# --- handlers


class Models:
    """One model by any name."""

    def __init__(self, pipe: DDIMPipeline) -> None:
        self.pipe = pipe

    def open(self, name: str) -> DDIMPipeline:
        return self.pipe


def make_handlers(pipe: DDIMPipeline, folder: Path) -> RestoreHandlers:
    (folder / "uploads").mkdir()
    (folder / "downloads").mkdir()
    models: Any = Models(pipe)
    shared = Shared(
        *(models, gr.State("tiny"), gr.HTML(), gr.State([]), gr.HTML()),
        *(str(folder / "uploads"), str(folder / "downloads")),
    )
    class_inputs = ClassInputs(gr.Group(), gr.Dropdown(), gr.Slider(), 0)
    return RestoreHandlers(
        *(shared, gr.HTML(), gr.State(None), gr.HTML(), gr.HTML(), gr.Group(), gr.Dropdown()),
        *(gr.HTML(), gr.DownloadButton(), gr.DownloadButton(), gr.Code(), class_inputs),
    )


def test_marks_on_an_upload_are_filled_in(pipe: DDIMPipeline, tmp_path: Path) -> None:
    handlers = make_handlers(pipe, tmp_path)
    noise().save(tmp_path / "uploads" / "x.png")
    source = handlers.use_upload("tiny", str(tmp_path / "uploads" / "x.png"))[handlers.source]
    task = handlers.restore(data_url(box_mask()), "tiny", source, INPAINT, None, None, 2, 3, 5, "any", 1)
    run, _ = make_run()
    result = task.work(run)
    updates = task.show_result(RunResult(result, 0.5))
    html = updates[handlers.restored]
    for file in ("measurement.png", "mask.png", "answer-5.png", "answer-6.png", "mean.png", "spread.png"):
        assert f'download="{file}"' in html
    assert updates[handlers.command] == (
        "ddim inpaint measurement.png --mask mask.png --model tiny --count 2 --seed 5 --steps 3 --out restored.png"
    )
    answers = np.load(updates[handlers.answers_file].value["path"])["arr_0"]
    known = np.asarray(box_mask()) == 0
    for answer in answers:
        assert np.abs(answer[known, 0].astype(int) - np.asarray(noise())[known]).max() <= 1
    # One answer has neither a mean nor a spread.
    single = handlers.restore(data_url(box_mask()), "tiny", source, INPAINT, None, None, 1, 3, 5, "any", 1)
    assert "spread" not in single.show_result(RunResult(single.work(run), 0.5))[handlers.restored]


def test_small_upload_is_announced_and_super_resolved(pipe: DDIMPipeline, tmp_path: Path) -> None:
    handlers = make_handlers(pipe, tmp_path)
    small = noise((W // 4, H // 4))
    small.save(tmp_path / "uploads" / "x.png")
    updates = handlers.use_upload("tiny", str(tmp_path / "uploads" / "x.png"))
    assert "3 x 2 pixels is ready: it can be super-resolved by 4 as it is" in updates[handlers.status]
    source = updates[handlers.source]
    assert "3 x 2 pixels" in handlers.follow("tiny", source, SUPER_RESOLVE, 4, "box")[handlers.reduced].value
    task = handlers.restore("", "tiny", source, SUPER_RESOLVE, 4, "box", 1, 3, 0, "any", 1)
    result = task.work(make_run()[0])
    assert np.array_equal(np.asarray(result.measurement.picture.shown), np.asarray(small))
    assert result.as_command("my model") == (
        "ddim super-resolve measurement.png --factor 4 --kernel box --model 'my model' --count 1 --seed 0 --steps 3 "
        "--out restored.png"
    )


def test_sampled_and_pinned_images_are_used(tmp_path: Path) -> None:
    """An image of a class; the answers have the class, too."""
    pipe = make_pipe(num_class_embeds=3, class_names=("cat", "dog"), has_null_class=True)
    handlers = make_handlers(pipe, tmp_path)
    task = handlers.sample("tiny", 7, "dog", 2.0)
    endpoints = task.work(make_run()[0])
    source = task.show_result(RunResult(endpoints, 0.1))[handlers.source]
    (expected,) = pipe(seeds=[7], num_inference_steps=20, class_labels="dog", guidance_scale=2.0).images
    assert np.array_equal(np.asarray(source.picture.shown), np.asarray(expected))
    assert handlers.use_last_pinned("tiny", endpoints)[handlers.source].picture is endpoints[0].picture
    inpainting = handlers.restore(data_url(box_mask()), "tiny", source, INPAINT, None, None, 2, 3, 0, "cat", 1.5)
    result = inpainting.work(make_run()[0])
    assert "--label cat --guidance 1.5" in result.as_command("tiny")
    hole: Any = result.measurement
    expected_answers = pipe.inpaint(
        *(hole.picture.values, hole.missing),
        num_inference_steps=3,
        samples=2,
        seeds=[0, 1],
        class_labels="cat",
        guidance_scale=1.5,
    )
    for answer, image in zip(result.answers, expected_answers.images, strict=True):
        assert np.array_equal(np.asarray(answer.shown), np.asarray(image))


def test_mistakes_are_refused_before_anything_runs(pipe: DDIMPipeline, tmp_path: Path) -> None:
    handlers = make_handlers(pipe, tmp_path)
    source, marks = Source.of(pipe, noise()), data_url(box_mask())
    common: Any = (2, 3, 0, "any", 1)
    noise().save(tmp_path / "x.png")
    for call, sentence in (
        (lambda: handlers.restore(marks, "x", None, INPAINT, 2, "box", *common), "an image is missing; upload one"),
        (lambda: handlers.restore(marks, "x", source, "Paint", 2, "box", *common), "task must be one of Inpaint or"),
        (lambda: handlers.restore(marks, "x", source, [], 2, "box", *common), r"task must be .*, got \[\]"),
        (lambda: handlers.restore("", "x", source, INPAINT, 2, "box", *common), "the drawing must be a PNG"),
        (lambda: handlers.restore("", "x", source, SUPER_RESOLVE, 3, "box", *common), "factor must be one of 2 or 4"),
        (lambda: handlers.restore("", "x", source, SUPER_RESOLVE, 2, "", *common), "kernel must be one of box or"),
        (lambda: handlers.use_upload("x", str(tmp_path / "x.png")), "picture must be a file that was uploaded here"),
        (lambda: handlers.use_upload("x", None), "picture must be an uploaded file, got None"),
        (lambda: handlers.use_last_pinned("x", []), "no image is pinned"),
        (lambda: handlers.use_last_pinned("x", [Endpoint(None, 3)]), "no image is pinned"),
        (lambda: handlers.sample("x", -1, "any", 1), "seed must be an integer"),
        (lambda: handlers.follow("x", source, SUPER_RESOLVE, None, "box"), "factor must be an integer"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


def test_another_model_removes_the_image_and_offers_its_factors(pipe: DDIMPipeline, tmp_path: Path) -> None:
    handlers = make_handlers(pipe, tmp_path)
    updates = handlers.clear("tiny")
    assert updates[handlers.source] is None
    assert "no image yet" in updates[handlers.sheet]
    assert updates[handlers.restored] == updates[handlers.command] == ""
    assert [value for _, value in updates[handlers.factor].choices] == [2, 4]
    assert updates[handlers.factor].value == 4
