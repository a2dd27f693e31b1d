"""Reading `.npz` files that anybody may have made: headers are compared before an array is allocated, pickles refused.

The name, type and shape of every array, and the size it takes, stand in headers. An array is read only if the archive
can hold it, and its checksum is verified.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ddim.io.reading import reader_reason

MAX_COMPRESSION_RATIO = 250
"""By how much an array may be larger than its compressed bytes; images and latents stay far below, zip bombs do not."""
SMALL_ARRAY_BYTES = 2**27
"""Arrays up to this size may be compressed by any ratio: images of one color are."""
READ_CHUNK_BYTES = 2**24

_HEADER_READERS: dict[tuple[int, int], Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True)
class ArrayHeader:
    """What an archive says about an array.

    Attributes:
        shape: its shape.
        dtype: its type.
        is_fortran: whether the first axis varies fastest.
        member: its entry in the archive.
        offset: bytes of the member before the data.

    Example:
        >>> header = ArrayHeader((2, 3), np.dtype("f4"), False, zipfile.ZipInfo("x.npy"), 128)
        >>> header.num_bytes
        24
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    member: zipfile.ZipInfo
    offset: int

    @property
    def num_bytes(self) -> int:
        """The size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


class NpzReader:
    """The arrays of an open `.npz` file; see `open_npz`.

    Attributes:
        headers: what the archive says about each array, by name; other members are left out.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self.headers: dict[str, ArrayHeader] = {}
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                with archive.open(member) as stream:
                    header = _read_header(stream, member)
                if header is not None:
                    self.headers[member.filename.removesuffix(".npy")] = header

    def read(self, name: str) -> np.ndarray:
        """Read an array and verify its checksum.

        Args:
            name: its name.

        Returns:
            The array, read-only.

        Raises:
            ValueError: if the archive has no such array, or it is damaged or too large for the archive.
        """
        header = self._check(name)
        with self._archive.open(header.member) as stream:
            stream.read(header.offset)
            data = stream.read()
        flat = np.frombuffer(data, header.dtype)
        return flat.reshape(header.shape, order="F" if header.is_fortran else "C")

    def verify(self, name: str) -> None:
        """Verify the checksum of an array without keeping it in memory.

        Args:
            name: its name.

        Raises:
            ValueError: if the archive has no such array, or it is damaged or too large for the archive.
        """
        with self._archive.open(self._check(name).member) as stream:
            while stream.read(READ_CHUNK_BYTES):
                pass

    def _check(self, name: str) -> ArrayHeader:
        if name not in self.headers:
            raise ValueError(f"it has no array {name!r}")
        header = self.headers[name]
        if header.dtype.hasobject:
            raise ValueError(f"its array {name!r} is a pickle, which can run code")
        size, compressed = header.member.file_size, header.member.compress_size
        if size != header.offset + header.num_bytes or min(header.shape, default=0) < 0:
            raise ValueError(f"its array {name!r} of shape {header.shape} does not have the size of that shape")
        if size > max(SMALL_ARRAY_BYTES, MAX_COMPRESSION_RATIO * compressed):
            raise ValueError(f"its array {name!r} claims {size:,} bytes in {compressed:,} compressed ones")
        return header


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[NpzReader]:
    """Open an `.npz` file for a `with` block.

    Args:
        path: the file.

    Yields:
        Its arrays.

    Raises:
        FileNotFoundError: if it does not exist, or is not a regular file.
        ValueError: if it is damaged, on opening or reading.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/x.npz", images=np.zeros((2, 3), np.uint8))
        ...     with open_npz(Path(folder) / "x.npz") as file:
        ...         file.headers["images"].shape, int(file.read("images").sum())
        ((2, 3), 0)
    """
    if not path.is_file():
        raise FileNotFoundError(f"the file {path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            yield NpzReader(archive)
    except Exception as error:  # a damaged archive raises errors of many types
        raise ValueError(reader_reason(error)) from None


def _read_header(stream: IO[bytes], member: zipfile.ZipInfo) -> ArrayHeader | None:
    """Read the header of a member; `None` if it is not an array."""
    try:
        read = _HEADER_READERS[np.lib.format.read_magic(stream)]
    except (ValueError, KeyError):
        return None
    shape, is_fortran, dtype = read(stream)
    return ArrayHeader(shape, dtype, is_fortran, member, stream.tell())
