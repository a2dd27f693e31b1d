"""The formats of values: their map to samples and back, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ddim import UNet2DModel
from ddim.io.images import to_output, to_samples
from ddim.io.pixel_format import EIGHT_BIT, PixelFormat, cast_exactly, format_of, measured_format
from digits import TINY_MODEL

FORMATS = [
    PixelFormat("uint16", (0.0, 7.0, 100.0), (65535.0, 4095.0, 101.0)),
    PixelFormat("int16", (-1024.0,), (3071.0,)),
    PixelFormat("float32", (-1.5, 0.0, 1e-3), (2.5, 1e6, 2e-3)),
]


def values_of(pixel_format: PixelFormat, channels: int = 3) -> np.ndarray:
    """Random values that fill the range of each channel, (2, 6, 5, C), its ends among them."""
    rng = np.random.default_rng(0)
    low, high = (np.broadcast_to(bound, channels) for bound in (pixel_format.low, pixel_format.high))
    unit = rng.random((2, 6, 5, channels))
    unit[0, 0, 0], unit[0, 0, 1] = 0, 1
    values = low + unit * (high - low)
    return (values if pixel_format.dtype == "float32" else values.round()).astype(pixel_format.dtype)


@pytest.mark.parametrize("pixel_format", FORMATS, ids=lambda pixel_format: pixel_format.dtype)
def test_values_come_back(pixel_format: PixelFormat) -> None:
    values = values_of(pixel_format)
    samples = to_samples(values, 3, 6, 5, pixel_format=pixel_format)
    low, high = (np.array(bound) for bound in (pixel_format.low, pixel_format.high))
    expected = (2 * (values.astype(np.float64) - low) / (high - low) - 1).transpose(0, 3, 1, 2)
    assert samples.shape == (2, 3, 6, 5)
    assert np.abs(samples.numpy() - expected).max() < 1e-6
    assert (samples.min(), samples.max()) == (-1, 1)
    again: Any = to_output(samples, "np", pixel_format)
    assert (again.dtype, again.shape) == (values.dtype, values.shape)
    if pixel_format.dtype == "float32":
        assert (np.abs(again - values) / (high - low)).max() < 1e-6
    else:
        assert np.array_equal(again, values)
    floating: Any = to_output(samples, "pt", pixel_format)
    assert (np.abs(floating.numpy() - values.transpose(0, 3, 1, 2)) / (high - low)[:, None, None]).max() < 1e-6


def test_single_channels_are_pil_images() -> None:
    for pixel_format, mode in (
        (PixelFormat("uint16", (0,), (4095,)), "I;16"),
        (PixelFormat("float32", (0,), (9,)), "F"),
    ):
        values = values_of(pixel_format, 1)
        samples = to_samples(values, 1, 6, 5, pixel_format=pixel_format)
        images: Any = to_output(samples, "pil", pixel_format)
        assert [image.mode for image in images] == [mode] * 2
        assert torch.allclose(to_samples(images, 1, 6, 5, pixel_format=pixel_format), samples, rtol=0, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"^output_type must be 'np' or 'pt' for images of 3 channels of int16, got 'pil'$"
    ):
        to_output(torch.zeros(1, 3, 2, 2), "pil", FORMATS[1])


def test_values_beyond_the_range_are_clipped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    values = np.array([50, 100, 900], np.uint16).reshape(3, 1, 1, 1)
    samples = to_samples(values, 1, 1, 1, pixel_format=PixelFormat("uint16", (100,), (300,)))
    assert samples.ravel().tolist() == [-1, -1, 1]
    assert caplog.messages == ["images: 2 of 3 images hold values beyond the model's range, which are clipped"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((1, 6, 5, 3), np.uint8), "images must hold uint16 values, got uint8"),
        (np.zeros((1, 6, 5, 3), np.float32), "images must hold uint16 values, got float32"),
        ([np.zeros((6, 5, 3), np.int16)], r"images\[0\] must hold uint16 values, got int16"),
        (
            [np.zeros((7, 5, 3), np.uint16)],
            r"images\[0\] must be 5x6, got 5x7; resize=True crops the center and scales",
        ),
        ([np.zeros((6, 5), np.uint16)], r"images\[0\] must be an array \(H, W, 3\), got one of shape \(6, 5, 1\)"),
        ([np.zeros((6, 5, 3, 1), np.uint16)], r"images\[0\] must be an image \(H, W, C\), got an array of shape"),
        (np.zeros((1, 6, 5, 2), np.uint16), r"images: expected shape \(N, 6, 5, 3\) .*, got \(1, 6, 5, 2\)"),
    ],
)
def test_other_values_raise(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        to_samples(values, 3, 6, 5, pixel_format=FORMATS[0])


def test_integers_of_files_are_cast_where_they_fit() -> None:
    values = np.array([-5, 7], np.int32)
    assert cast_exactly(values, "int16", "x.tif").dtype == np.int16
    with pytest.raises(ValueError, match=r"^x\.tif must hold uint16 values, got int32$"):
        cast_exactly(values, "uint16", "x.tif")
    assert cast_exactly(np.array([3], ">u2"), "uint16", "x").tolist() == [3]
    with pytest.raises(ValueError, match=r"^x must hold finite values, got NaN or infinity$"):
        cast_exactly(np.array([np.nan]), "float32", "x")


def test_measured_ranges_are_never_empty() -> None:
    assert measured_format("uint16", [65535, 3], [65535, 3]) == PixelFormat("uint16", (65534, 3), (65535, 4))
    assert measured_format("float32", [1e30], [1e30]).high[0] > 1e30
    assert measured_format("float32", [1e-40], [2e-40]).high == (1.0,)
    with pytest.raises(ValueError, match=r"^pixel_format must span 1e-30 to 1e\+38 in each channel, got 4e\+38$"):
        measured_format("float32", [-2e38], [2e38])
    assert measured_format("uint8", [3], [9]) is EIGHT_BIT


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"dtype": "uint32", "low": [0], "high": [1]}, r"pixel_format\.dtype must be one of uint8, uint16, int16"),
        ({"dtype": "uint16", "low": [0]}, "pixel_format must have the entries dtype, low, high, got"),
        ("uint16", "pixel_format must have the entries"),
        ({"dtype": "uint16", "low": 0, "high": 1}, r"pixel_format\.low and \.high must be lists of numbers"),
        ({"dtype": "uint16", "low": [0], "high": [1, 2]}, "pixel_format.low and .high must have one bound per channel"),
        ({"dtype": "uint16", "low": [0, 0], "high": [1, 1]}, "pixel_format must have bounds of 1 channels, got 2"),
        ({"dtype": "uint16", "low": [5], "high": [5]}, r"pixel_format\.high must be above low in each channel, got 5"),
        ({"dtype": "uint16", "low": [-1], "high": [5]}, "pixel_format of uint16 must be within 0 and 65535, got"),
        ({"dtype": "float32", "low": [float("nan")], "high": [5]}, r"pixel_format\.low must be a finite number"),
        ({"dtype": "uint8", "low": [0], "high": [5]}, "pixel_format of uint8 must be from 0 to 255 in all channels"),
    ],
)  # fmt: skip
def test_invalid_records_raise(record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        UNet2DModel(**TINY_MODEL, pixel_format=record)


def test_format_is_kept_beside_the_arguments_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    record = {"dtype": "uint16", "low": [3], "high": [900]}
    unet = UNet2DModel(**TINY_MODEL, pixel_format=record)
    assert "pixel_format" not in unet.config
    theirs = diffusers.UNet2DModel.from_config(unet.config)
    for config in (unet.config, theirs.config, UNet2DModel.from_config(theirs.config).config):
        assert format_of(config) == PixelFormat("uint16", (3.0,), (900.0,))
    assert format_of(UNet2DModel(**TINY_MODEL).config) is EIGHT_BIT
    assert "_ddim" not in UNet2DModel(**TINY_MODEL, pixel_format=EIGHT_BIT.record()).config
