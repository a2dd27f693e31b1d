"""Images that PIL has no mode for, written and read: arrays, TIFF pages, grids, folders."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddim.io.array_files import encode_image, encode_tiff, read_pages, read_pixels
from ddim.io.false_color import false_colors, preview
from ddim.io.pixel_format import EIGHT_BIT, PixelFormat
from ddim.io.sample_files import make_array_grid, save_samples

DTYPES = ["uint8", "uint16", "int16", "float32"]
FORMATS = {
    "uint8": EIGHT_BIT,
    "uint16": PixelFormat("uint16", (0,), (65535,)),
    "int16": PixelFormat("int16", (-32768,), (32767,)),
    "float32": PixelFormat("float32", (-9,), (9,)),
}


def noise(dtype: str, *shape: int) -> np.ndarray:
    """Random values of a type."""
    rng = np.random.default_rng(len(shape))
    if dtype == "float32":
        return rng.normal(size=shape).astype(np.float32)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 2, 5, 16])
def test_tiff_pages_hold_the_values(tmp_path: Path, dtype: str, channels: int) -> None:
    pixels = noise(dtype, 6, 9, channels)
    (tmp_path / "x.tiff").write_bytes(encode_tiff(pixels))
    read = read_pixels(tmp_path / "x.tiff")
    assert np.array_equal(np.atleast_3d(np.asarray(read)), pixels)


def test_npy_files_are_images(tmp_path: Path) -> None:
    for shape in ((4, 5), (4, 5, 3)):
        np.save(tmp_path / "x.npy", noise("uint16", *shape))
        pixels = read_pixels(tmp_path / "x.npy")
        assert isinstance(pixels, np.ndarray)
        assert pixels.shape == (4, 5, shape[2] if len(shape) == 3 else 1)


def _npy(descr: str, shape: tuple[int, ...], data: bytes = b"") -> bytes:
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text", "cannot be read as .npy"),
        (_npy("<u2", (2**40, 4)), "cannot be read as .npy"),
        (_npy("|O", (4, 4), b"\x80\x04."), "cannot be read as .npy"),
        (_npy("<u2", (0, 4)), "cannot be read as .npy"),
        (_npy("<u2", (4,), bytes(8)), r"must hold an image \(H, W\) or \(H, W, C\), got an array of shape \(4,\)"),
    ],
    ids=["text", "claims a terabyte", "a pickle", "empty", "a vector"],
)
def test_other_npy_files_raise(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.npy {message}") as caught:
        read_pixels(path)
    assert "\n" not in str(caught.value)


def test_other_tiff_files_raise(tmp_path: Path) -> None:
    path = tmp_path / "x.tiff"
    path.write_bytes(encode_tiff(noise("uint16", 4, 4, 17)))
    with pytest.raises(ValueError, match=r"x\.tiff must have at most 16 pages, one per channel, got 17$"):
        read_pixels(path)
    content = encode_tiff(noise("uint16", 40, 40, 3))
    path.write_bytes(content[:1000] + bytes([content[1000] ^ 255]) + content[1001:])
    with pytest.raises(ValueError, match=r"x\.tiff cannot be read: "):
        read_pixels(path)
    pages = [Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4))]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=r"x\.tiff must be a still image, got an animation of 2 frames$"):
        read_pixels(path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_samples_are_written_without_loss(tmp_path: Path, dtype: str, channels: int) -> None:
    values, pixel_format = noise(dtype, 3, 6, 9, channels), FORMATS[dtype]
    keeps_png = (dtype == "uint8" and channels <= 4) or (dtype == "uint16" and channels == 1)
    for name in ("x.npz", "x.tiff", "folder"):
        assert save_samples(values, pixel_format, tmp_path / name)
    assert np.array_equal(np.load(tmp_path / "x.npz")["arr_0"], values)
    files = sorted((tmp_path / "folder").iterdir())
    assert [file.name for file in files] == [f"{i:05d}.{'png' if keeps_png else 'tiff'}" for i in range(3)]
    for file, image in zip(files, values, strict=True):
        assert np.array_equal(np.atleast_3d(np.asarray(read_pixels(file))), image)
    grid = np.atleast_3d(np.asarray(read_pixels(tmp_path / "x.tiff")))
    assert np.array_equal(grid, make_array_grid(values))
    assert save_samples(values, pixel_format, tmp_path / "x.png") == keeps_png
    assert save_samples(values[:1], pixel_format, tmp_path / "one.png", scale=None) == keeps_png
    if keeps_png:
        assert np.array_equal(np.atleast_3d(np.asarray(read_pixels(tmp_path / "one.png"))), values[0])


def test_folders_with_later_images_are_refused(tmp_path: Path) -> None:
    values = noise("uint16", 3, 4, 4, 5)
    save_samples(values, FORMATS["uint16"], tmp_path / "folder")
    with pytest.raises(FileExistsError, match="holds images numbered beyond the 2 to be written"):
        save_samples(values[:2], FORMATS["uint16"], tmp_path / "folder")


@pytest.mark.parametrize("channels", range(1, 17))
def test_equal_channels_are_shown_gray(channels: int) -> None:
    pixel_format = PixelFormat("uint16", (0,), (1000,))
    values = np.broadcast_to(np.array([0, 250, 1000], np.uint16)[None, None, :, None], (1, 2, 3, channels))
    (shown,) = preview(values, pixel_format)
    gray = np.asarray(shown if channels == 1 else shown.convert("RGB"))
    assert np.abs(gray.reshape(2, 3, -1).astype(int) - np.array([0, 64, 255])[:, None]).max() <= 1
    assert np.allclose(false_colors(channels).sum(0), 1)


def test_png_and_tiff_are_told_apart() -> None:
    for dtype, channels, kind in (
        ("uint16", 1, "PNG"),
        ("uint16", 2, "TIFF"),
        ("float32", 1, "TIFF"),
        ("uint8", 4, "PNG"),
    ):
        stream = io.BytesIO(encode_image(noise(dtype, 3, 3, channels)))
        assert Image.open(stream).format == kind
        assert (read_pages(stream) is not None) == (kind == "TIFF" and channels > 1)
