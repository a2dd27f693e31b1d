"""Reading `.npz` files: equal to NumPy, and bounded by what the file can hold."""

from __future__ import annotations

import os
import re
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ddim.io.npz import open_npz

ARRAYS = {
    "bytes": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "floats": np.linspace(0, 1, 6, dtype=">f4").reshape(3, 2),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "text": np.array("settings"),
    "empty": np.zeros((0, 3)),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_equal_those_of_numpy(tmp_path: Path, save: type) -> None:
    save(tmp_path / "x.npz", **ARRAYS)
    with open_npz(tmp_path / "x.npz") as file:
        assert file.headers.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert (file.headers[name].shape, file.headers[name].dtype) == (array.shape, array.dtype)
            np.testing.assert_array_equal(file.read(name), array, strict=True)
            file.verify(name)


def test_members_that_are_not_arrays_are_left_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=ARRAYS["bytes"])
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        archive.writestr("README.txt", "notes")
        archive.writestr("broken.npy", "notes")
    with open_npz(tmp_path / "x.npz") as file:
        assert list(file.headers) == ["images"]
    with pytest.raises(ValueError, match=r"^it has no array 'broken'$"), open_npz(tmp_path / "x.npz") as file:
        file.read("broken")


def header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def write_member(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header((10**9, 10**9)) + bytes(100), "does not have the size of that shape"),
        (header((-1, -100)) + bytes(100), "does not have the size of that shape"),
        (header((50,)) + bytes(100), "does not have the size of that shape"),
        (header((100,), "|O") + bytes(800), "is a pickle, which can run code"),
    ],
)
def test_wrong_headers_raise(tmp_path: Path, content: bytes, message: str) -> None:
    write_member(tmp_path / "x.npz", content)
    with pytest.raises(ValueError, match=message), open_npz(tmp_path / "x.npz") as file:
        file.read("x")


def test_bomb_raises_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddim.io.npz.SMALL_ARRAY_BYTES", 2**20)
    size = 2**26
    with (
        zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as member,
    ):
        member.write(header((size,)))
        for _ in range(size // 2**20):
            member.write(bytes(2**20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in ("read", "verify"):
        with pytest.raises(ValueError, match=r"claims 67,108,\d+ bytes in"), open_npz(tmp_path / "x.npz") as file:
            getattr(file, read)("x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**15


def test_flipped_bits_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=ARRAYS["bytes"])
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            with open_npz(path) as file:
                np.testing.assert_array_equal(file.read("images"), ARRAYS["bytes"])
        except ValueError as error:
            assert re.fullmatch(r".+", str(error))  # noqa: PT017 - not each flip is refused


def test_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError), open_npz(tmp_path / "x.npz"):
        pass
