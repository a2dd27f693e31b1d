"""Sources that are folders, arrays or digits: content is read exactly, errors name the image, and no code runs."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddim.data.sources import open_source
from digits import digits
from image_data import assert_images, decode_error, encode, read_source

# --- digits


def test_digits() -> None:
    source = open_source("digits")
    assert source.count == 1797
    assert_images(source, digits())
    assert source.identity == open_source("digits").identity


# --- folders


def test_nested_folder_of_mixed_formats(folder: Path) -> None:
    random = np.random.default_rng(0)
    color = random.integers(0, 256, (5, 7, 3), np.uint8)
    # In the order of their paths.
    expected = {
        "a/1.png": Image.fromarray(color),
        "a/b/2.BMP": Image.fromarray(color[:, ::-1].copy()),
        "a/b/c/3.gif": Image.fromarray(digits(1)[0]),
        "a/b/c/4.png": Image.fromarray(random.integers(0, 2**16, (4, 4), np.uint16)),
        "d e/5.png": Image.fromarray(random.integers(0, 256, (30, 8, 4), np.uint8)),
        "d e/ü.tiff": Image.new("CMYK", (16, 16), (0, 255, 0, 0)),
        "w.webp": Image.new("RGB", (9, 9), (1, 2, 3)),
        "x.png": Image.fromarray(digits(1)[0]).convert("P"),
        "y.png": Image.new("1", (3, 5), 1),
        "z.pgm": Image.fromarray(digits(2)[1]),
    }
    for name, image in expected.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name, **({"lossless": True} if name.endswith("webp") else {}))
    (folder / "notes.txt").write_text("not an image")
    (folder / "folder.png").mkdir()
    source = open_source(str(folder))
    assert source.count == len(expected)
    for decode, (name, image) in zip(source.fetch(range(source.count)), expected.items(), strict=True):
        decoded = decode()
        assert decoded.size == image.size, name
        assert np.array_equal(np.asarray(decoded.convert("RGBA")), np.asarray(image.convert("RGBA"))), name
    # The conversions above hide whether 16 bits stay.
    (decode,) = source.fetch([3])
    assert np.array_equal(np.asarray(decode()), np.asarray(expected["a/b/c/4.png"]))


def test_images_are_fetched_in_any_order(image_folder: Path) -> None:
    indices = [7, 3, 3, 39, 0]
    images = [np.asarray(decode()) for decode in open_source(str(image_folder)).fetch(indices)]
    assert np.array_equal(np.stack(images), digits(40)[indices])


def test_folder_identity_changes_with_files(folder: Path) -> None:
    for name, pixels in zip("ab", digits(2), strict=True):
        (folder / f"{name}.png").write_bytes(encode(pixels))
    before = open_source(str(folder)).identity
    assert open_source(str(folder)).identity == before
    assert open_source(os.path.relpath(folder)).identity == before
    seen = [before]

    (folder / "a.png").write_bytes(encode(digits(3)[2]))
    seen.append(open_source(str(folder)).identity)
    (folder / "b.png").rename(folder / "c.png")
    seen.append(open_source(str(folder)).identity)
    status = (folder / "c.png").stat()
    os.utime(folder / "c.png", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    seen.append(open_source(str(folder)).identity)
    (folder / "d.png").write_bytes(encode(digits(1)[0]))
    seen.append(open_source(str(folder)).identity)
    assert len(set(seen)) == 5
    (folder / "d.png").unlink()
    assert open_source(str(folder)).identity == seen[-2]


def test_missing_and_empty_sources_raise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for name in ("missing", "missing.npz", "missing.parquet", "sub/missing.npz", "sub/missing.parquet", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=rf"^{name} does not exist; expected .*, or digits$") as caught:
            open_source(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"^.* contains no images; looked for \.bmp, "):
        open_source(str(folder))
    (folder / "words.txt").write_text("words")
    with pytest.raises(FileNotFoundError, match=r"contains no images; looked for "):
        open_source(str(folder))
    with pytest.raises(ValueError, match=r"words\.txt is neither a folder of images nor .*, \.npz or \.npy file$"):
        open_source(str(folder / "words.txt"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_image_is_named(folder: Path, kind: str) -> None:
    content = encode(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8), kind)
    for length in (0, 1, 10, 20, 30, 60, len(content) // 2):
        (folder / "half.png").write_bytes(content[:length])
        assert str(folder / "half.png") in decode_error(open_source(str(folder)))


def test_non_image_is_named(folder: Path) -> None:
    (folder / "a.png").write_text("words")
    header = struct.pack("<2sIHHI", b"BM", 58, 0, 0, 54)
    header += struct.pack("<IiiHHIIiiII", 40, 10**5, 10**5, 1, 24, *[0] * 6)
    (folder / "b.bmp").write_bytes(header + b"\0" * 4)
    frames = [Image.fromarray(pixels) for pixels in digits(2)]
    frames[0].save(folder / "c.gif", save_all=True, append_images=frames[1:])
    source = open_source(str(folder))
    assert decode_error(source, 0) == f"{folder / 'a.png'} cannot be read: not an image of a known format"
    assert "exceeds limit" in decode_error(source, 1)
    with pytest.raises(ValueError, match=r"c\.gif must be a still image, got an animation of 2 frames"):
        source.fetch([2])[0]()


# --- arrays


def write_npz(path: Path, *arrays: np.ndarray, **named: np.ndarray) -> str:
    np.savez(path, *arrays, **named)
    return str(path)


def test_npz_of_pixels(folder: Path) -> None:
    color = np.random.default_rng(0).integers(0, 256, (6, 5, 7, 3), np.uint8)
    assert np.array_equal(np.stack(read_source(open_source(write_npz(folder / "color.npz", color)))), color)
    assert_images(open_source(write_npz(folder / "gray.npz", digits(40))), digits(40))
    gray = open_source(write_npz(folder / "one-channel.npz", digits(40)[..., None]))
    assert_images(gray, digits(40))
    assert {decode().mode for decode in gray.fetch([0, 5])} == {"L"}
    np.savez_compressed(folder / "compressed.npz", labels=np.arange(40), images=digits(40))
    compressed = open_source(str(folder / "compressed.npz"))
    assert_images(compressed, digits(40))
    assert compressed.identity == open_source(str(folder / "gray.npz")).identity
    assert compressed.read_column("labels") == [str(label) for label in range(40)]
    assert compressed.read_column("images") is None
    assert compressed.read_column("label") is None
    assert open_source(write_npz(folder / "other.npz", digits(41)[1:])).identity != compressed.identity


@pytest.mark.parametrize(
    ("array", "content"),
    [
        (np.zeros((4, 8, 8, 3), np.complex64), r"arr_0: complex64 \(4, 8, 8, 3\)"),
        (np.zeros((4, 8, 8), np.int64), r"arr_0: int64 \(4, 8, 8\)"),
        (np.zeros((4, 3, 28, 28), np.uint8), r"arr_0: uint8 \(4, 3, 28, 28\)"),
        (np.zeros((4, 8, 8, 17), np.uint16), r"arr_0: uint16 \(4, 8, 8, 17\)"),
        (np.zeros((8, 8), np.uint8), r"arr_0: uint8 \(8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"arr_0: uint8 \(0, 8, 8, 3\)"),
        (None, "nothing"),
    ],
)
def test_other_arrays_raise(folder: Path, array: np.ndarray | None, content: str) -> None:
    path = write_npz(folder / "images.npz", *([] if array is None else [array]))
    message = rf"^{path} must hold images as an array \(N, H, W\) or .* with C from 1 to 16, got {content}$"
    with pytest.raises(ValueError, match=message):
        open_source(path)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_do_not_run(folder: Path) -> None:
    executed = folder / "executed"
    array = np.empty(1, object)
    array[0] = Malicious(executed)
    np.savez(folder / "objects.npz", array)
    np.savez(folder / "beside.npz", images=digits(4), extra=array)
    (folder / "pickle.npz").write_bytes(pickle.dumps(Malicious(executed)))
    for name in ("objects.npz", "beside.npz", "pickle.npz"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read as \.npz: ") as caught:
            open_source(str(folder / name))
        assert "\n" not in str(caught.value)
        assert not executed.exists()
    # Unpickling would have run it.
    pickle.loads((folder / "pickle.npz").read_bytes())
    assert executed.exists()


def test_damaged_npz_raises(folder: Path) -> None:
    np.savez(folder / "whole.npz", digits(40))
    np.save(folder / "single.npy", digits(40))
    whole = (folder / "whole.npz").read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    for content in (b"", b"words", whole[: len(whole) // 2], bytes(damaged), (folder / "single.npy").read_bytes()):
        (folder / "images.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"images\.npz cannot be read as \.npz: ") as caught:
            open_source(str(folder / "images.npz"))
        assert "\n" not in str(caught.value)


def test_folder_with_names_in_another_encoding(folder: Path) -> None:
    name = os.fsencode(folder) + b"/na\xefve.png"
    Path(os.fsdecode(name)).write_bytes(encode(digits(1)[0]))
    source = open_source(str(folder))
    assert source.count == 1
    assert_images(source, digits(1))


def test_other_members_of_npz_are_left_out(folder: Path) -> None:
    np.savez(folder / "images.npz", digits(4))
    with zipfile.ZipFile(folder / "images.npz", "a") as archive:
        archive.writestr("README.txt", "notes")
    assert_images(open_source(str(folder / "images.npz")), digits(4))


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_pipes_do_not_hang(folder: Path, suffix: str) -> None:
    os.mkfifo(folder / f"pipe.{suffix}")
    for source in (folder / f"pipe.{suffix}", folder):
        with pytest.raises(FileNotFoundError):
            open_source(str(source))
