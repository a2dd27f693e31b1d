"""Saved images: output types against `diffusers`' image processor, grids, resampling against PIL, files read back."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from ddim.io.image_files import MANIFEST_NAME, check_output_path, enlarge, make_grid, save_images
from ddim.io.images import fit_image, to_output

# Every byte, every point halfway between two bytes, and values beyond the range.
EDGES = torch.arange(-20, 2 * 255 + 21, dtype=torch.float64) / 510


def random_samples(channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(6, channels, 8, 10) with values inside and outside [-1, 1], some of them halfway between two bytes."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(6, channels, 8, 10, generator=generator) * 0.8
    chosen = torch.randint(len(EDGES), samples.shape, generator=generator)
    half = torch.rand(samples.shape, generator=generator) < 0.5
    return torch.where(half, (EDGES[chosen] * 2 - 1).float(), samples).to(dtype)


def noise_image(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# --- tensors to images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_output_matches_diffusers(channels: int, dtype: torch.dtype) -> None:
    samples = random_samples(channels, dtype)
    theirs = VaeImageProcessor(vae_scale_factor=1)
    for output_type in ("pt", "np"):
        expected = theirs.postprocess(samples, output_type)
        got = to_output(samples, output_type)
        assert got.shape == expected.shape
        # This class makes float32 of float64; the pipelines of diffusers do not.
        assert got.dtype == (np.float64 if dtype == torch.float64 and output_type == "np" else expected.dtype)
        assert bool((got.astype(expected.dtype) == expected).all() if output_type == "np" else (got == expected).all())
    for ours, expected in zip(to_output(samples, "pil"), theirs.postprocess(samples, "pil"), strict=True):
        assert ours.mode == expected.mode == ("L" if channels == 1 else "RGB")
        assert ours.size == (10, 8)
        assert np.array_equal(pixels(ours), pixels(expected))


def test_output_shapes_dtypes_and_range() -> None:
    samples = random_samples(3)
    tensor, array = to_output(samples, "pt"), to_output(samples, "np")
    assert isinstance(tensor, Tensor)
    assert tensor.shape == (6, 3, 8, 10)
    assert isinstance(array, np.ndarray)
    assert array.shape == (6, 8, 10, 3)
    assert array.dtype == np.float32
    assert array.min() == 0
    assert array.max() == 1
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert len(to_output(samples, "pil")) == 6


def test_bytes_are_rounded_to_nearest() -> None:
    every_byte = torch.arange(256, dtype=torch.float64)
    for shift in (-0.49, 0, 0.49):
        samples = ((every_byte + shift) / 255 * 2 - 1).reshape(1, 1, 16, 16)
        (image,) = to_output(samples, "pil")
        assert np.array_equal(pixels(image).ravel(), every_byte.numpy())


@pytest.mark.parametrize("output_type", ["numppy", "PIL", "", None, "latent"])
def test_unknown_output_type_raises(output_type: str | None) -> None:
    with pytest.raises(ValueError, match=f"output_type must be one of pil, np, numpy, or pt, got {output_type!r}"):
        to_output(torch.zeros(1, 1, 2, 2), output_type)


# --- grids


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    ("count", "columns", "shape"),
    [(1, None, (1, 1)), (2, None, (1, 2)), (5, None, (2, 3)), (9, None, (3, 3)), (16, None, (4, 4)), (5, 2, (3, 2)),
     (3, 5, (1, 5))],
)  # fmt: skip
def test_grid_positions(mode: str, count: int, columns: int | None, shape: tuple[int, int]) -> None:
    images = [noise_image(mode, 5, 3, seed=index) for index in range(count)]
    grid = make_grid(images, columns)
    rows, columns = shape
    assert grid.mode == mode
    assert grid.size == (columns * 7 + 2, rows * 5 + 2)
    remainder = pixels(grid).copy()
    for index, image in enumerate(images):
        left, top = index % columns * 7 + 2, index // columns * 5 + 2
        assert np.array_equal(remainder[top : top + 3, left : left + 5], pixels(image))
        remainder[top : top + 3, left : left + 5] = 0
    assert not remainder.any()


def test_empty_grid_raises() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        make_grid([])


# --- fitting


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_image_of_the_right_size_is_unchanged(mode: str) -> None:
    image = noise_image(mode, 12, 10)
    fitted = fit_image(image, 10, 12, 1 if mode == "L" else 3)
    assert fitted.mode == mode
    assert np.array_equal(pixels(fitted), pixels(image))


@pytest.mark.parametrize(
    ("size", "box"), [((40, 16), (12, 0, 28, 16)), ((16, 40), (0, 12, 16, 28)), ((18, 16), (1, 0, 17, 16))]
)
def test_center_is_cropped(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    image = noise_image("RGB", *size)
    assert np.array_equal(pixels(fit_image(image, 16, 16, 3)), pixels(image.crop(box)))


@pytest.mark.parametrize(
    ("size", "box"), [((64, 32), (16, 0, 48, 32)), ((32, 64), (0, 16, 32, 48)), ((32, 32), (0, 0, 32, 32)),
                      ((4, 8), (0, 2, 4, 6))]
)  # fmt: skip
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_resizing_is_lanczos_of_the_crop(mode: str, size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    image = noise_image(mode, *size)
    expected = image.crop(box).resize((8, 8), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels(fit_image(image, 8, 8, len(image.getbands()))), pixels(expected))


@settings(max_examples=300, deadline=None, derandomize=True)
@example(49, 49, 32, 32)  # 49 / (32 / 49) * 32 is above 49 in floating point
@given(*[st.integers(1, 300)] * 2, *[st.integers(1, 64)] * 2)
def test_any_size_fits_any_target(width: int, height: int, new_width: int, new_height: int) -> None:
    fitted = fit_image(Image.new("L", (width, height), 77), new_height, new_width, 1)
    assert fitted.size == (new_width, new_height)
    assert set(pixels(fitted).ravel()) == {77}


def test_conversion_between_gray_and_color() -> None:
    color, gray = noise_image("RGB", 6, 4), noise_image("L", 6, 4)
    assert np.array_equal(pixels(fit_image(color, 4, 6, 1)), pixels(color.convert("L")))
    assert np.array_equal(pixels(fit_image(gray, 4, 6, 3)), np.repeat(pixels(gray)[..., None], 3, 2))


def test_transparency_is_blended_with_white() -> None:
    rgba = Image.new("RGBA", (2, 1), (200, 0, 40, 0))
    rgba.putpixel((1, 0), (200, 0, 40, 51))
    # 51 / 255 is a fifth of the color over four fifths of white.
    assert np.array_equal(pixels(fit_image(rgba, 1, 2, 3))[0], [[255, 255, 255], [244, 204, 212]])

    gray = Image.new("LA", (2, 1), (0, 0))
    gray.putpixel((1, 0), (0, 255))
    assert np.array_equal(pixels(fit_image(gray, 1, 2, 1))[0], [255, 0])


def test_palettes() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert np.array_equal(pixels(fit_image(palette, 1, 2, 3))[0], [[255, 0, 0], [0, 0, 255]])
    palette.info["transparency"] = 0
    assert np.array_equal(pixels(fit_image(palette, 1, 2, 3))[0], [[255, 255, 255], [0, 0, 255]])


def test_black_and_white_and_cmyk() -> None:
    assert set(pixels(fit_image(Image.new("1", (4, 4), 1), 2, 2, 1)).ravel()) == {255}
    cmyk = Image.new("CMYK", (2, 2), (255, 0, 0, 0))
    assert np.array_equal(pixels(fit_image(cmyk, 2, 2, 3))[0, 0], [0, 255, 255])


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_become_eight(tmp_path: Path, channels: int, suffix: str) -> None:
    deep = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(deep).save(tmp_path / f"deep.{suffix}")
    with Image.open(tmp_path / f"deep.{suffix}") as image:
        fitted = pixels(fit_image(image, 64, 64, channels)).reshape(64, 64, -1)
    assert np.abs(fitted - deep[..., None] / 257).max() <= 1


# --- files


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_holds_bytes_in_nhwc(tmp_path: Path, channels: int) -> None:
    images = [noise_image("L" if channels == 1 else "RGB", 6, 4, seed) for seed in range(3)]
    assert save_images(images, tmp_path / "x.npz") == tmp_path / "x.npz"
    with np.load(tmp_path / "x.npz") as file:
        assert file.files == ["arr_0"]
        array = file["arr_0"]
    assert array.shape == (3, 4, 6, channels)
    assert array.dtype == np.uint8
    assert np.array_equal(array, np.stack([pixels(image).reshape(4, 6, channels) for image in images]))


@pytest.mark.parametrize(
    ("size", "count", "factor"),
    [((28, 28), 4, 3), ((8, 8), 64, 8), ((32, 48), 2, 2), ((64, 64), 9, 1), ((28, 28), 5000, 1)],
)
def test_small_images_are_enlarged_exactly(size: tuple[int, int], count: int, factor: int) -> None:
    tile = noise_image("RGB", *size)
    grid = make_grid([tile] * count)
    assert np.array_equal(pixels(enlarge(grid, tile)), pixels(grid).repeat(factor, 0).repeat(factor, 1))
    assert enlarge(tile, tile, 2).size == (2 * size[0], 2 * size[1])


def test_single_image_keeps_its_pixels(tmp_path: Path) -> None:
    image = noise_image("L", 6, 4)
    for scale in (1, None):
        save_images([image], tmp_path / "x.png", scale=scale)
        with Image.open(tmp_path / "x.png") as saved:
            assert np.array_equal(pixels(saved), pixels(image))


def test_png_is_a_grid(tmp_path: Path) -> None:
    images = [noise_image("RGB", 6, 4, seed) for seed in range(5)]
    save_images(images, str(tmp_path / "x.PNG"))
    with Image.open(tmp_path / "x.PNG") as image:
        assert image.format == "PNG"
        assert np.array_equal(pixels(image), pixels(make_grid(images)))


@pytest.mark.parametrize("name", ["new", "new/", "existing", "with.dot"])
def test_folder_gets_one_png_per_image(tmp_path: Path, name: str) -> None:
    for folder in ("existing", "with.dot"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "other.txt").write_text("stays")
    images = [noise_image("L", 6, 4, seed) for seed in range(3)]
    folder = save_images(images, f"{tmp_path}/{name}")
    assert folder == tmp_path / name
    assert sorted(p.name for p in folder.glob("*.png")) == ["00000.png", "00001.png", "00002.png"]
    assert {p.name for p in folder.iterdir()} - {"other.txt"} == {"00000.png", "00001.png", "00002.png"}
    for index, image in enumerate(images):
        with Image.open(folder / f"{index:05d}.png") as saved:
            assert np.array_equal(pixels(saved), pixels(image))
    if name in ("existing", "with.dot"):
        assert (folder / "other.txt").read_text() == "stays"


def test_unwritable_paths_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("a file")
    for path in (tmp_path / "missing" / "x.png", tmp_path / "missing" / "x.npz", tmp_path / "missing" / "folder"):
        with pytest.raises(FileNotFoundError, match=r"folder .*missing does not exist"):
            check_output_path(path)
    for name in ("x.jpg", "x.npy", "x.png.gz"):
        with pytest.raises(ValueError, match=r"out must end in \.png .*, \.tiff .*, \.npz, or be a folder, got '"):
            check_output_path(tmp_path / name)
    for path in (f"{file}/", file, file / "x.png", file / "folder"):
        with pytest.raises(NotADirectoryError, match="file is a file, not a folder"):
            check_output_path(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(PermissionError, match=r"the folder .* cannot be written: Permission denied"):
        check_output_path(tmp_path / "x.png")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="Linux only")
def test_shorter_output_does_not_mix_with_a_longer_one(tmp_path: Path) -> None:
    """Nothing is deleted either: the images may be the user's."""
    images = [noise_image("L", 6, 4, seed) for seed in range(5)]
    save_images(images, tmp_path)
    others = {"notes.txt", "3.png", "000003.png", "00003.jpg", "x00003.png"}
    for name in others:
        (tmp_path / name).touch()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"numbered beyond the 3 to be written \(2, such as 00003\.png\)"):
        save_images(images[1:4], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save_images(images, tmp_path)


def test_folder_of_bulk_samples_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).touch()
    (tmp_path / "00007.png").touch()
    with pytest.raises(FileExistsError, match="holds samples, which its"):
        save_images([noise_image("L", 6, 4)], tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {MANIFEST_NAME, "00007.png"}


def test_read_only_folder_raises() -> None:
    # The kernel refuses to create files in /proc, even for root.
    with pytest.raises(PermissionError, match="the folder /proc/self cannot be written"):
        check_output_path("/proc/self/x.png")


def test_checked_paths_are_not_created(tmp_path: Path) -> None:
    for name in ("x.png", "x.npz", "x.NPZ", "folder"):
        assert check_output_path(tmp_path / name) == tmp_path / name
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("name", ["x.png", "x.npz", "folder"])
def test_full_disk_keeps_old_files_and_leaves_no_temporary(small_disk: Path, name: str) -> None:
    old = [noise_image("RGB", 8, 8, seed) for seed in range(2)]
    save_images(old, small_disk / name)
    original = {p: p.read_bytes() for p in small_disk.rglob("*") if p.is_file()}
    with pytest.raises(OSError, match="No space left") as caught:
        save_images([noise_image("RGB", 128, 128, seed) for seed in range(4)], small_disk / name)
    assert caught.value.errno == errno.ENOSPC
    assert {p: p.read_bytes() for p in small_disk.rglob("*") if p.is_file()} == original
    assert {p.name for p in small_disk.iterdir()} == {name}


@pytest.mark.parametrize("name", ["x.png", "x.npz", "folder"])
def test_failed_write_keeps_old_files_and_leaves_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    images = [noise_image("RGB", 8, 8, seed) for seed in range(3)]
    save_images(images, tmp_path / name)
    original = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        save_images(images[::-1], tmp_path / name)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == original
    assert {p.name for p in tmp_path.iterdir()} == {name}
