"""Input images: bytes against the expected values, resizing against PIL, and files, intact and damaged."""

from __future__ import annotations

import io
import math
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from ddim.io import images as images_module
from ddim.io.image_files import find_images, read_image
from ddim.io.images import decode_image, fit_image, to_output, to_samples
from digits import digits, write_digits

H, W = 4, 6


def noise(mode: str = "RGB", width: int = W, height: int = H, seed: int = 0) -> Image.Image:
    shape = (height, width) if len(mode) == 1 else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def smooth(mode: str = "RGB", width: int = 40, height: int = 30) -> Image.Image:
    """An image that lossy formats hardly change."""
    y, x = np.mgrid[:height, :width]
    planes = [x * 6, y * 8, (x + y) * 3]
    array = np.stack(planes[: len(mode)], -1).clip(0, 255).astype(np.uint8)
    return Image.fromarray(array[..., 0] if mode == "L" else array)


def numbers(image: Image.Image) -> np.ndarray:
    """Return the values that the model must receive: (C, H, W) in [-1, 1], float64."""
    array = np.asarray(image).astype(np.float64).reshape(image.height, image.width, -1)
    return array.transpose(2, 0, 1) / 127.5 - 1


def assert_samples(got: Tensor, *images: Image.Image) -> None:
    assert got.dtype == torch.float32
    assert got.shape == (len(images), len(images[0].getbands()), images[0].height, images[0].width)
    np.testing.assert_allclose(got.numpy(), np.stack([numbers(image) for image in images]), rtol=0, atol=1.2e-7)


# --- PIL images


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("resize", [False, True])
def test_pil_images(mode: str, resize: bool) -> None:
    channels = len(mode)
    images = [noise(mode, seed=seed) for seed in range(3)]
    assert_samples(to_samples(images[0], channels, H, W, resize), images[0])
    assert_samples(to_samples(images, channels, H, W, resize), *images)
    assert_samples(to_samples(tuple(images), channels, H, W, resize), *images)


def test_files_of_digits(tmp_path: Path) -> None:
    files = find_images(write_digits(tmp_path, 20))
    got = to_samples([read_image(file) for file in files], 1, 8, 8)
    np.testing.assert_allclose(got[:, 0].numpy(), digits(20) / 127.5 - 1, rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("as_array", [False, True])
def test_round_trip_of_every_byte(as_array: bool) -> None:
    """0 maps to -1, 255 to 1, bytes between them evenly, and all bytes survive a round trip."""
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    samples = to_samples(every[..., None] if as_array else Image.fromarray(every), 1, 16, 16)
    flat = samples.double().flatten()
    assert flat[0] == -1
    assert flat[255] == 1
    np.testing.assert_allclose(flat.numpy(), np.linspace(-1, 1, 256), rtol=0, atol=1.2e-7)
    (image,) = to_output(samples, "pil")
    assert np.array_equal(np.asarray(image), every)


def test_order_of_channels_rows_and_columns() -> None:
    image = Image.new("RGB", (W, H))
    image.putpixel((5, 1), (255, 0, 0))  # PIL counts x first
    image.putpixel((2, 3), (0, 255, 0))
    image.putpixel((0, 2), (0, 0, 255))
    expected = torch.full((1, 3, H, W), -1.0)
    expected[0, 0, 1, 5] = expected[0, 1, 3, 2] = expected[0, 2, 2, 0] = 1
    assert torch.equal(to_samples(image, 3, H, W), expected)
    assert torch.equal(to_samples(np.array(image), 3, H, W), expected)
    assert torch.equal(to_samples(np.array(image) / 255, 3, H, W), expected)


# --- arrays


@pytest.mark.parametrize("channels", [1, 3])
def test_uint8_arrays(channels: int) -> None:
    images = [noise("L" if channels == 1 else "RGB", seed=seed) for seed in range(3)]
    array = np.stack([np.asarray(image).reshape(H, W, channels) for image in images])
    assert_samples(to_samples(array, channels, H, W), *images)
    assert_samples(to_samples(array[1], channels, H, W), images[1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", np.longdouble])
def test_float_arrays(dtype: Any) -> None:
    values = np.array([0, 0.25, 0.5, 0.75, 1, 0.125]).repeat(4).reshape(1, H, W, 1).astype(dtype)
    samples = to_samples(values, 1, H, W)
    assert samples.dtype == torch.float32
    assert samples.flatten()[::4].tolist() == [-1, -0.5, 0, 0.5, 1, -0.75]
    assert torch.equal(to_samples(values[0], 1, H, W), samples)


def test_round_trip_of_float_arrays() -> None:
    samples = torch.rand(5, 3, H, W, generator=torch.Generator().manual_seed(0)) * 2 - 1
    back = to_samples(to_output(samples, "np"), 3, H, W)
    torch.testing.assert_close(back, samples, rtol=0, atol=1.2e-7)


@pytest.fixture
def repeated_warnings() -> Iterator[None]:
    """Repeat the warnings that PyTorch gives once per process."""
    original = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(original)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_read_only_and_strided_arrays(dtype: Any, repeated_warnings: None) -> None:
    """Read-only arrays, as PIL returns them, with negative or large strides, transposed; none is written to."""
    array = (
        np.asarray(noise("RGB", 2 * W, 2 * H))
        if dtype == np.uint8
        else np.random.default_rng(0).random((2 * H, 2 * W, 3), dtype)
    )
    views = [
        array[:H, :W].copy(),
        array[:H, :W],
        array[::-2, ::-2],
        array[::2, ::2, ::-1],
        array[:W, :H].swapaxes(0, 1),
    ]
    for view in views:
        view.flags.writeable = False
        original = view.copy()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            samples = to_samples(view, 3, H, W)
        expected = original.astype(np.float64) / (255 if dtype == np.uint8 else 1) * 2 - 1
        np.testing.assert_allclose(samples[0].numpy(), expected.transpose(2, 0, 1), rtol=0, atol=1.2e-7)
        samples.zero_()
        assert np.array_equal(view, original)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(count=st.integers(1, 4), channels=st.sampled_from([1, 3]), height=st.integers(1, 9), width=st.integers(1, 9))
def test_all_input_types_give_equal_samples(count: int, channels: int, height: int, width: int) -> None:
    mode = "L" if channels == 1 else "RGB"
    images = [noise(mode, width, height, seed) for seed in range(count)]
    array = np.stack([np.asarray(image).reshape(height, width, channels) for image in images])
    expected = to_samples(images, channels, height, width)
    assert_samples(expected, *images)
    assert torch.equal(to_samples(array, channels, height, width), expected)
    torch.testing.assert_close(to_samples(array / 255, channels, height, width), expected, rtol=0, atol=1.2e-7)
    assert torch.equal(to_samples(expected, channels, height, width), expected)


# --- tensors


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_tensors_are_unchanged(channels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = (torch.rand(2, channels, H, W, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)
    samples = to_samples(tensor, channels, H, W)
    assert samples.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(samples, tensor.to(samples.dtype))
    assert torch.equal(to_samples(tensor[1], channels, H, W), samples[1:])


def test_rounding_errors_beyond_the_range_pass() -> None:
    tensor = torch.full((1, 1, H, W), 1 + 5e-4)
    assert torch.equal(to_samples(tensor, 1, H, W), tensor)
    assert torch.equal(to_samples(-tensor, 1, H, W), -tensor)


# --- invalid input

HINT = r"; resize=True crops the center, scales it and converts it, with white behind transparent pixels$"


@pytest.mark.parametrize(
    ("image", "channels", "message"),
    [
        (noise("RGB", 7, 4), 3, "images[0] must be 6x4 RGB, got 7x4 RGB"),
        (noise("RGB", 4, 6), 3, "images[0] must be 6x4 RGB, got 4x6 RGB"),
        (noise("L"), 3, "images[0] must be 6x4 RGB, got 6x4 L"),
        (noise("RGB"), 1, "images[0] must be 6x4 L, got 6x4 RGB"),
        (noise("RGBA"), 3, "images[0] must be 6x4 RGB, got 6x4 RGBA"),
        (noise("L").convert("LA"), 1, "images[0] must be 6x4 L, got 6x4 LA"),
        (noise("RGB").convert("P"), 3, "images[0] must be 6x4 RGB, got 6x4 P"),
        (noise("RGB").convert("CMYK"), 3, "images[0] must be 6x4 RGB, got 6x4 CMYK"),
        (Image.fromarray(np.zeros((H, W), np.uint16)), 1, "images[0] must be 6x4 L, got 6x4 I;16"),
    ],
)
def test_other_sizes_and_modes_raise(image: Image.Image, channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=HINT) as caught:
        to_samples(image, channels, H, W)
    assert str(caught.value).startswith(message + ";")
    right = noise("L" if channels == 1 else "RGB")
    with pytest.raises(ValueError, match=HINT) as caught:
        to_samples([right, image, right], channels, H, W, name="references")
    assert str(caught.value).startswith(message.replace("images[0]", "references[1]") + ";")


@pytest.mark.parametrize(
    "shape",
    [(), (6,), (4, 6), (6, 4, 1), (1, 4, 6), (4, 6, 3), (2, 6, 4, 1), (2, 1, 4, 6), (1, 2, 4, 6, 1), (0, 4, 6, 1)],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_of_another_shape_raise(shape: tuple[int, ...], dtype: Any) -> None:
    with pytest.raises(ValueError, match="expected shape") as caught:
        to_samples(np.zeros(shape, dtype), 1, 4, 6)
    assert str(caught.value) == f"images: expected shape (N, 4, 6, 1) with N at least 1, got {shape}"
    with pytest.raises(ValueError, match=r"; arrays are not resized, PIL images are$"):
        to_samples(np.zeros(shape, dtype), 1, 4, 6, resize=True)


@pytest.mark.parametrize(
    "shape",
    [(), (6,), (4, 6), (6, 4, 1), (4, 6, 1), (3, 4, 6), (2, 1, 6, 4), (2, 4, 6, 1), (1, 2, 1, 4, 6), (0, 1, 4, 6)],
)
def test_tensors_of_another_shape_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected shape") as caught:
        to_samples(torch.zeros(shape), 1, 4, 6)
    assert str(caught.value) == f"images: expected shape (N, 1, 4, 6) with N at least 1, got {shape}"


@pytest.mark.parametrize("empty", [[], ()])
@pytest.mark.parametrize("resize", [False, True])
def test_no_images_raises(empty: Any, resize: bool) -> None:
    with pytest.raises(ValueError, match=r"expected shape \(N, 4, 6, 3\) with N at least 1, got \(0, 4, 6, 3\)"):
        to_samples(empty, 3, H, W, resize)


@pytest.mark.parametrize(
    "images",
    [None, "image.png", Path("image.png"), b"", 3, [1, 2], [[0.5]], {}, [None], [torch.zeros(3, H, W)],
     [np.asarray(noise()), None], [noise(), "image.png"], [[noise()]]],
    ids=lambda images: repr(images)[:25],
)  # fmt: skip
def test_other_types_and_mixed_lists_raise(images: Any) -> None:
    with pytest.raises(TypeError) as caught:
        to_samples(images, 3, H, W)
    rule = "images must be PIL images, a NumPy array (N, H, W, C) or a tensor (N, C, H, W)"
    assert str(caught.value) == f"{rule}, got {type(images).__name__}"


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint16, bool, np.complex64, object, "U1"])
def test_arrays_of_other_dtypes_raise(dtype: Any) -> None:
    array = np.zeros((1, H, W, 1), dtype)
    with pytest.raises(
        ValueError, match=rf"images must be uint8, or floating in \[0, 1\], got an array of {array.dtype}"
    ):
        to_samples(array, 1, H, W)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_tensors_of_other_dtypes_raise(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"images must be floating in \[-1, 1\], got a tensor of {dtype}"):
        to_samples(torch.zeros(1, 1, H, W, dtype=dtype), 1, H, W)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_nonfinite_values_raise(value: float, kind: str) -> None:
    array = np.full((2, H, W, 1), 0.5)
    array[1, 2, 3] = value
    images = array if kind == "array" else torch.from_numpy(array).movedim(-1, 1)
    with pytest.raises(ValueError, match="images must be finite, got NaN or infinity"):
        to_samples(images, 1, H, W)


@pytest.mark.parametrize(("value", "message"), [(1.01, r"[0.5, 1.01]"), (-0.01, r"[-0.01, 0.5]"), (255, r"[0.5, 255]")])
def test_arrays_out_of_range_raise(value: float, message: str) -> None:
    array = np.full((2, H, W, 1), 0.5)
    array[1, 2, 3] = value
    with pytest.raises(ValueError, match="must be in") as caught:
        to_samples(array, 1, H, W, name="references")
    assert str(caught.value) == f"references must be in [0, 1], got values in {message}"


@pytest.mark.parametrize(("value", "message"), [(1.01, "[0.5, 1.01]"), (-1.01, "[-1.01, 0.5]"), (255, "[0.5, 255]")])
def test_tensors_out_of_range_raise(value: float, message: str) -> None:
    tensor = torch.full((2, 1, H, W), 0.5)
    tensor[1, 0, 2, 3] = value
    with pytest.raises(ValueError, match="must be in") as caught:
        to_samples(tensor, 1, H, W)
    assert str(caught.value) == f"images must be in [-1, 1], got values in {message}"


# --- resizing


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((12, 8), (0, 0, 12, 8)),  # the model's aspect ratio
        ((20, 8), (4, 0, 16, 8)),  # too wide
        ((12, 30), (0, 11, 12, 19)),  # too high
        ((3, 2), (0, 0, 3, 2)),  # too small
        ((9, 4), (1, 0, 7, 4)),  # an odd remainder: the larger half on the right; then the model's size
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_resizing_crops_the_center_and_scales_it(
    mode: str, size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    image = noise(mode, *size)
    by_hand = image.crop(box).resize((W, H), Image.Resampling.LANCZOS)
    assert_samples(to_samples(image, len(mode), H, W, resize=True), by_hand)


def test_resizing_a_mixed_list() -> None:
    """Each image is resized as if it were alone, whatever its size and mode."""
    images = [noise("RGB", 12, 8), noise("L", 6, 4), noise("RGBA", 9, 4), noise("RGB").convert("P"), noise("RGB")]
    together = to_samples(images, 3, H, W, resize=True)
    assert together.shape == (5, 3, H, W)
    for index, image in enumerate(images):
        assert torch.equal(together[index], to_samples(image, 3, H, W, resize=True)[0])
    assert_samples(together[4:], images[4])


def test_resizing_does_not_change_the_input() -> None:
    image = noise("RGBA", 9, 9)
    original = image.copy()
    to_samples(image, 1, H, W, resize=True)
    assert image.mode == "RGBA"
    assert np.array_equal(np.asarray(image), np.asarray(original))


def test_transparency_is_blended_with_white() -> None:
    image = noise("RGBA")
    color, alpha = np.split(np.asarray(image).astype(np.float64), [3], axis=2)
    on_white = (color * alpha + 255 * (255 - alpha)) / 255
    got = to_samples(image, 3, H, W, resize=True)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose((got + 1) * 127.5, on_white, rtol=0, atol=1)
    # Fully transparent pixels are white, whatever their color, for gray models too.
    clear = Image.new("RGBA", (W, H), (10, 200, 30, 0))
    for channels in (1, 3):
        assert bool((to_samples(clear, channels, H, W, resize=True) == 1).all())


def test_transparency_is_blended_before_scaling() -> None:
    """Otherwise the color of transparent pixels would bleed into their surroundings."""
    image = Image.new("RGBA", (2 * W, 2 * H), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (0, 0, W, 2 * H))
    assert bool((to_samples(image, 3, H, W, resize=True) == 1).all())


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, channels: int) -> None:
    deep = np.linspace(0, 65535, H * W).round().astype(np.uint16).reshape(H, W)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    image = read_image(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png must be 6x4 (L|RGB), got"):
        to_samples(image, channels, H, W)
    got = to_samples(image, channels, H, W, resize=True)
    assert got.shape == (1, channels, H, W)
    np.testing.assert_allclose(got[0].numpy(), np.stack([deep / 32767.5 - 1] * channels), rtol=0, atol=1 / 255 + 1e-6)
    assert got.min() == -1
    assert got.max() == 1


@pytest.mark.parametrize("name", ["palette.png", "palette.gif"])
def test_palettes(tmp_path: Path, name: str) -> None:
    image = Image.new("P", (2, 2))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 255, 255, 255])
    image.putdata([0, 1, 2, 3])
    image.save(tmp_path / name)
    got = to_samples(read_image(tmp_path / name), 3, 2, 2, resize=True)[0].permute(1, 2, 0)
    assert got.tolist() == [[[1, -1, -1], [-1, 1, -1]], [[-1, -1, 1], [1, 1, 1]]]
    image.save(tmp_path / name, transparency=1)
    got = to_samples(read_image(tmp_path / name), 3, 2, 2, resize=True)[0].permute(1, 2, 0)
    assert got.tolist() == [[[1, -1, -1], [1, 1, 1]], [[-1, -1, 1], [1, 1, 1]]]


# --- readable files

FORMATS: dict[str, dict[str, Any]] = {
    "png": {},
    "jpg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95},
    "bmp": {},
    "gif": {},
    "tiff": {},
    "ppm": {},
}


def write(folder: Path, suffix: str, image: Image.Image) -> Path:
    path = folder / f"image.{suffix}"
    image.save(path, **FORMATS[suffix])
    return path


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_files_of_every_format(tmp_path: Path, suffix: str, mode: str) -> None:
    image = smooth(mode)
    path = write(tmp_path, suffix, image)
    for given_path in (path, str(path)):
        got = read_image(given_path)
        assert isinstance(got, Image.Image)
        assert got.size == (40, 30)
    path.unlink()  # the image is decoded: nothing more is read
    error = np.abs(np.asarray(got.convert(mode)).astype(int) - np.asarray(image))
    if suffix in ("png", "bmp", "tiff", "ppm"):
        assert got.mode == mode
        assert error.max() == 0
    elif (suffix, mode) == ("gif", "L"):  # a palette of grays
        assert error.max() == 0
    else:
        assert error.mean() < 4


def test_format_is_detected_from_content(tmp_path: Path) -> None:
    noise().save(tmp_path / "image", "png")
    (tmp_path / "image").rename(tmp_path / "image.jpg")
    assert np.array_equal(np.asarray(read_image(tmp_path / "image.jpg")), np.asarray(noise()))


def test_transparency_survives_reading(tmp_path: Path) -> None:
    noise("RGBA").save(tmp_path / "x.png")
    got = read_image(tmp_path / "x.png")
    assert got.mode == "RGBA"
    assert np.array_equal(np.asarray(got), np.asarray(noise("RGBA")))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_animations_raise(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"moving.{suffix}"
    frames = [noise(seed=seed) for seed in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)
    with pytest.raises(ValueError, match="an animation") as caught:
        read_image(path)
    assert str(caught.value) == f"{path} must be a still image, got an animation of 3 frames"
    # With one frame it is a still image.
    frames[0].save(path, save_all=True)
    assert read_image(path).size == (W, H)


def test_camera_preview_is_not_an_animation(tmp_path: Path) -> None:
    """Many cameras write MPO files, several JPEGs in one, of which the first is the photograph."""
    photograph, preview = smooth(), Image.new("RGB", (10, 8), "red")
    photograph.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[preview], quality=95)
    with Image.open(tmp_path / "x.jpg") as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    got = np.asarray(read_image(tmp_path / "x.jpg")).astype(int)
    assert np.abs(got - np.asarray(photograph)).mean() < 4


# --- unreadable files


def read_error(path: Path) -> str:
    """Return the reason that the message gives after the file's name, in one line."""
    with pytest.raises(ValueError, match="cannot be read") as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be read: ")
    assert len(message.splitlines()) == 1
    reason = message.removeprefix(f"{path} cannot be read: ")
    assert reason.strip()
    return reason


def test_png_without_the_checksum_of_its_pixels_is_refused() -> None:
    """All pixels are there, and nothing says whether they are those that were written."""
    stream = io.BytesIO()
    noise("L", 6, 6).save(stream, "PNG")
    data = stream.getvalue()
    end = data.index(b"IEND") - 8
    assert decode_image(io.BytesIO(data), "x.png").size == (6, 6)
    for content in (data[:end], data[:end] + bytes(4) + data[end + 4 :]):
        with pytest.raises(ValueError, match=r"^x\.png cannot be read: "):
            decode_image(io.BytesIO(content), "x.png")


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.filterwarnings("ignore")  # PIL warns of TIFF files truncated in their directory
def test_truncated_files_raise(tmp_path: Path, suffix: str, mode: str) -> None:
    path = write(tmp_path, suffix, noise(mode, 40, 30))
    whole = path.read_bytes()
    for part in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95):
        path.write_bytes(whole[: int(len(whole) * part)])
        read_error(path)
    path.write_bytes(whole)
    assert read_image(path).size == (40, 30)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_load_or_raise(tmp_path: Path, suffix: str) -> None:
    """Each byte of the header is changed in turn; formats without checksums cannot detect all changes."""
    path = write(tmp_path, suffix, noise("RGB", 16, 12))
    whole = path.read_bytes()
    refused = 0
    for position in range(min(64, len(whole))):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            read_image(path)
        except ValueError as error:
            assert str(error).startswith(f"{path} ")  # noqa: PT017
            assert len(str(error).splitlines()) == 1  # noqa: PT017
            refused += 1
    assert refused > 3


@pytest.mark.parametrize(
    "content", [b"", b"This is not an image.\n", b"\x00" * 1000, b"<svg></svg>", b"\x89PNG\r\n\x1a\n"]
)
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "txt"])
def test_files_that_are_not_images_raise(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    path.write_bytes(content)
    reason = read_error(path)
    if not content.startswith(b"\x89"):
        assert reason == "not an image of a known format"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_zeros(width: int, height: int, rows: int) -> bytes:
    """Return a PNG whose header claims a size, with fewer rows of zeros."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes((width + 1) * rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 20_000])
@pytest.mark.parametrize("suffix", ["png", "pgm"])
def test_decompression_bombs_raise(tmp_path: Path, suffix: str, side: int) -> None:
    """PIL only warns of the smaller one; both are refused, by their headers."""
    path = tmp_path / f"bomb.{suffix}"
    path.write_bytes(png_of_zeros(side, side, 1) if suffix == "png" else b"P5 %d %d 255\n" % (side, side))
    assert f"Image size ({side * side} pixels) exceeds limit of" in read_error(path)


def test_pixel_limit_is_that_of_pil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png_of_zeros(10, 10, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_image(path).size == (10, 10)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    filters = list(warnings.filters)
    assert "Image size (100 pixels) exceeds limit of 99 pixels" in read_error(path)
    assert warnings.filters == filters
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(path).size == (10, 10)


@pytest.mark.parametrize("name", ["missing.png", "missing/x.png", "file.png/x.png", "folder", "folder.png", ""])
def test_missing_file_raises(tmp_path: Path, name: str) -> None:
    for folder in ("folder", "folder.png"):
        (tmp_path / folder).mkdir()
    noise().save(tmp_path / "file.png")
    path = tmp_path / name
    with pytest.raises(FileNotFoundError) as caught:
        read_image(path)
    assert str(caught.value) == f"the file {path} does not exist"


# --- folders


def test_find_images_searches_subfolders(tmp_path: Path) -> None:
    names = ["b.png", "a.JPG", "c/2.webp", "c/1.bmp", "c/d/e/deep.tif", ".hidden/x.jpeg", "z.Tiff", "0.gif", "p.ppm",
             "p.pgm", "with space.png"]  # fmt: skip
    others = ["notes.txt", "c/metadata.jsonl", "c/x.png.part", "png", "c/array.npz", "movie.mp4"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    expected = sorted(tmp_path / name for name in names)
    assert find_images(tmp_path) == expected
    assert find_images(str(tmp_path)) == expected
    assert find_images(tmp_path / "c") == [tmp_path / "c" / name for name in ("1.bmp", "2.webp", "d/e/deep.tif")]


def test_find_images_sorts(tmp_path: Path) -> None:
    write_digits(tmp_path / "digits", 12)
    assert [file.name for file in find_images(tmp_path)] == [f"{index:04d}.png" for index in range(12)]


@pytest.mark.parametrize("kind", ["empty", "others", "missing"])
def test_folders_without_images_raise(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / kind
    if kind != "missing":
        (folder / "sub.png").mkdir(parents=True)
    if kind == "others":
        (folder / "notes.txt").touch()
    with pytest.raises(FileNotFoundError) as caught:
        find_images(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder} contains no images; looked for .bmp, ")
    assert ".png" in message
    assert len(message.splitlines()) == 1


def test_files_that_are_not_regular_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither a pipe, which would be waited for, nor what macOS adds stops a folder; one line names them."""
    write_digits(tmp_path, 2)
    (tmp_path / "sub").mkdir()
    for name in ("._0000.png", "sub/._x.jpg", ".DS_Store"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    assert [file.name for file in find_images(tmp_path)] == ["0000.png", "0001.png"]
    expected = "5 hidden or special files skipped: ._0000.png, device.png, gone.png, pipe.png, sub/._x.jpg"
    assert caplog.messages == [f"{tmp_path}: {expected}"]
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "pipe.png")


def test_names_in_another_encoding(tmp_path: Path) -> None:
    write_digits(tmp_path, 1)
    name = os.fsencode(tmp_path) + b"/na\xefve.png"
    os.rename(tmp_path / "0000.png", name)  # noqa: PTH104 - bytes
    (file,) = find_images(tmp_path)
    assert os.fsencode(file) == name
    assert read_image(file).size == (8, 8)


# --- modes and orientations


def save_tiff(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_floats_are_scaled(tmp_path: Path, channels: int) -> None:
    values = np.linspace(0, 1, H * W).astype(np.float32).reshape(H, W)
    image = read_image(save_tiff(tmp_path / "x.tiff", values))
    assert image.mode == "F"
    got = to_samples(image, channels, H, W, resize=True)[0].numpy()
    np.testing.assert_allclose(got, np.stack([2 * values - 1] * channels), rtol=0, atol=1.01 / 255)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 254.5]], np.float32), r"must hold floats in \[0, 1\], got values in \[0, 254\.5\]"),
        (np.array([[-1, 1]], np.float32), r"must hold floats in \[0, 1\], got values in \[-1, 1\]"),
        (np.array([[0, np.nan]], np.float32), "must hold finite values, got NaN or infinity"),
        (np.array([[0, np.inf]], np.float32), "must hold finite values, got NaN or infinity"),
        (np.array([[0, 65536]], np.int32), "must hold 8 or 16 bits per pixel, got 32-bit integers from 0 to 65536"),
        (np.array([[-1, 300]], np.int32), "must hold 8 or 16 bits per pixel, got 32-bit integers from -1 to 300"),
        (np.array([[0, 255]], np.int32), r"from 0 to 255; convert it to mode L or I;16"),
    ],
)
def test_values_of_unknown_range_raise(tmp_path: Path, values: np.ndarray, message: str) -> None:
    path = save_tiff(tmp_path / "x.tiff", values)
    with pytest.raises(ValueError, match=rf"^{path} {'must' if message.startswith('must') else '.*'}") as caught:
        to_samples(read_image(path), 1, 1, 2, resize=True)
    assert re.search(message, str(caught.value))


def test_integers_of_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    """In 32 bits, as PIL returns gray PPM files, and as TIFF files hold them."""
    deep = np.linspace(0, 65535, H * W).round().astype(np.int32).reshape(H, W)
    dark = deep // 300
    (tmp_path / "x.pgm").write_bytes(b"P5 %d %d 65535\n" % (W, H) + deep.astype(">u2").tobytes())
    (tmp_path / "dark.pgm").write_bytes(b"P5 %d %d 65535\n" % (W, H) + dark.astype(">u2").tobytes())
    save_tiff(tmp_path / "x.tiff", deep)
    for name, values in (("x.pgm", deep), ("dark.pgm", dark), ("x.tiff", deep)):
        got = to_samples(read_image(tmp_path / name), 1, H, W, resize=True)[0, 0].numpy()
        np.testing.assert_allclose(got, values / 32767.5 - 1, rtol=0, atol=1.01 / 255)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_modes_of_eight_bits(mode: str, channels: int) -> None:
    """A white image is white and a black one black."""
    for color in ("white", "black"):
        rgb = Image.new("RGB", (W, H), color)
        if mode in ("La", "RGBa"):
            image = rgb.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
        elif mode == "PA":
            image = rgb.convert("P").convert("PA")
        elif mode == "RGBX":
            image = Image.merge("RGBX", [*rgb.split(), Image.new("L", rgb.size)])
        else:
            image = rgb.convert(mode)
        assert image.mode == mode
        got = to_samples(image, channels, H, W, resize=True)
        assert float((got - (1 if color == "white" else -1)).abs().max()) < 0.02


def test_other_modes_are_refused_by_name(tmp_path: Path) -> None:
    Image.new("LAB", (W, H)).save(tmp_path / "lab.tiff")
    message = rf"^{tmp_path}/lab\.tiff must be gray or color, got mode LAB; convert it to RGB$"
    with pytest.raises(ValueError, match=message):
        to_samples(read_image(tmp_path / "lab.tiff"), 3, H, W, resize=True)
    with pytest.raises(ValueError, match=r"^images\[0\] must be gray or color, got mode LAB"):
        to_samples(Image.new("LAB", (W, H)), 3, H, W, resize=True)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int) -> None:
    """The stored image is the upright one, turned back: every orientation shows the same."""
    shown = smooth("RGB", 24, 16)
    back = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}.get(orientation, [])
    stored = shown
    for operation in back:
        stored = stored.transpose(Image.Transpose(operation))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    stored.save(tmp_path / f"x.{suffix}", exif=exif, **options)
    got = read_image(tmp_path / f"x.{suffix}")
    assert got.size == shown.size
    assert np.abs(np.asarray(got).astype(int) - np.asarray(shown)).mean() < 3
    # An image that the caller opened is turned as well, and once.
    with Image.open(tmp_path / f"x.{suffix}") as opened:
        for image in (opened, got):
            samples = to_samples(image, 3, 16, 24)[0].permute(1, 2, 0).numpy()
            assert np.abs((samples + 1) * 127.5 - np.asarray(shown)).mean() < 3


def test_damaged_orientation_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    noise().save(tmp_path / "x.png", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff")
    noise().save(tmp_path / "y.png", exif=b"Exif\x00\x00notes")
    for name in ("x.png", "y.png"):
        assert np.array_equal(np.asarray(read_image(tmp_path / name)), np.asarray(noise()))


def test_other_formats_start_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An EPS file would be given to Ghostscript, whatever it is called."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
    noise().save(tmp_path / "x.eps")
    for suffix in ("eps", "png", "jpg"):
        path = tmp_path / f"x.{suffix}"
        path.write_bytes((tmp_path / "x.eps").read_bytes())
        assert read_error(path) == "not an image of a known format"


@pytest.mark.parametrize("mode", ["F", "I", "I;16"])
def test_wide_values_are_converted_by_strips(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips that divide the height and strips that do not give the pixels of the whole image."""
    values = np.random.default_rng(0).random((37, 53))
    stored = values.astype(np.float32) if mode == "F" else (values * 65535).astype("int32" if mode == "I" else "uint16")
    whole = np.asarray(fit_image(Image.fromarray(stored), 37, 53, 1))
    expected = stored * 255 if mode == "F" else stored / 257
    assert np.abs(whole - expected).max() <= 0.51
    for rows in (1, 5, 37):
        monkeypatch.setattr(images_module, "STRIP_BYTES", rows * 53 * 4)
        assert np.array_equal(np.asarray(fit_image(Image.fromarray(stored), 37, 53, 1)), whole)
        color = np.asarray(fit_image(Image.fromarray(stored), 20, 30, 3))
        gray = np.asarray(fit_image(Image.fromarray(stored), 20, 30, 1))
        assert np.array_equal(color, np.repeat(gray[..., None], 3, 2))
