"""Targets of bulk sampling: a folder of image files, an npz file, or tar shards.

Every kind takes batches in any order and from several processes of one job at once. Files are written atomically, and
two processes that write the same file write the same bytes. Files of earlier runs are verified before they count: PNG
files, the TIFF files written here, zip archives and parts have checksums.

Images that PNG does not keep (`ddim.io.array_files`) are TIFF files.

- A folder gets `00000.png`, ...; a batch is done when all of its files are present.
- `x.npz` (`arr_0`, (N, H, W, C), for 8-bit images as the ADM evaluator reads it) and `x.tar` collect batches as `.npy`
  files in `x.npz.parts/` until all are present. A part ends in the SHA-256 of what stands before it.
- `x.tar` stands for shards `x-000000.tar`, ... as WebDataset reads them: for image i, `000000042.png` and
  `000000042.json`, `{"index": 42, "seed": 42}`. Once its batches are present, a shard is written and they are deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np

from ddim.io.array_files import encode_image, image_suffix, keeps_png, verify_tiff
from ddim.io.atomic import MAX_STEM_LENGTH, atomic_write, remove_leftovers
from ddim.io.image_files import MANIFEST_NAME, is_folder_path
from ddim.io.locks import LOCK_NAME
from ddim.io.npz import open_npz
from ddim.validation import pluralize, shorten

SHA256_BYTES = 32
MAX_HEADER_BYTES = 1024
"""Bytes of a file beside its pixels, with room to spare."""
PNG_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""Gray, gray with alpha, RGB and RGBA, by the number of channels."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PAGE_BYTES = {"uint8": 1, "uint16": 2, "int16": 4, "float32": 4}
"""Bytes per value in image files, by the type of values."""
ZIP_TIMESTAMP = (1980, 1, 1, 0, 0, 0)
"""The modification time of files in archives, so that equal images give equal bytes."""


ImageShape = tuple[int, int, int]
"""(H, W, C)."""


class Target(ABC):
    """An output of bulk sampling, filled batch by batch.

    Args:
        path: the output path as the caller gave it.
        count: number of images.
        batch_size: images per batch.
        seed: seed of the first image.
        image_shape: (H, W, C) of every image.
        dtype: of their values.

    Attributes:
        batches_per_shard: batches per file of a sharded output; 0 for outputs without shards.
        labels: class label of each image, for formats that hold them; empty without classes.

    Example:
        >>> target = FolderTarget(Path("samples"), count=10, batch_size=4, seed=0, image_shape=(8, 8, 3))
        >>> target.batches, target.indices(2)
        (range(0, 3), range(8, 10))
    """

    batches_per_shard = 0

    def __init__(
        self, path: Path, count: int, batch_size: int, seed: int, image_shape: ImageShape, dtype: str = "uint8"
    ) -> None:
        self.path, self.count, self.batch_size, self.seed = path, count, batch_size, seed
        self.image_shape, self.dtype = image_shape, dtype
        self.labels: Sequence[int] = ()

    @property
    def image_suffix(self) -> str:
        """The suffix of single images."""
        return image_suffix(self.dtype, self.image_shape[2])

    @property
    def batches(self) -> range:
        """The numbers of all batches."""
        return range(-(-self.count // self.batch_size))

    def indices(self, batch: int) -> range:
        """Return the indices of a batch's images."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.count))

    @property
    @abstractmethod
    def manifest(self) -> Path:
        """The manifest's path."""

    @property
    @abstractmethod
    def lock_path(self) -> Path:
        """The lock that processes writing this output hold."""

    @abstractmethod
    def existing_files(self) -> list[Path]:
        """Return the image files present, whatever their settings."""

    def discard_damaged(self, batches: Iterable[int]) -> list[str]:
        """Delete files that are not what was written: empty, truncated, changed, or of another shape.

        Args:
            batches: the batches whose files are verified.

        Returns:
            One phrase per deleted file, which names it.
        """
        reasons = []
        for file in self.files_to_verify(set(batches)):
            try:
                self.verify(file)
            except Exception as error:  # damaged files raise errors of many types
                reasons.append(f"{file} ({' '.join(str(error).split()) or type(error).__name__})")
                file.unlink(missing_ok=True)
        return reasons

    @abstractmethod
    def files_to_verify(self, batches: set[int]) -> Iterator[Path]:
        """Yield the files present that hold images of some batches."""

    @abstractmethod
    def verify(self, file: Path) -> None:
        """Raise an error if a file is damaged, or holds other images than its name says."""

    @abstractmethod
    def remove_leftovers(self) -> None:
        """Delete what killed processes left; files of running processes stay."""

    def clear(self) -> None:
        """Delete the images and the manifest."""
        for file in self.existing_files():
            file.unlink()
        self.manifest.unlink(missing_ok=True)

    @abstractmethod
    def create_folders(self) -> None:
        """Create the folders that batches are written to."""

    @abstractmethod
    def done_batches(self) -> set[int]:
        """Return the batches whose images are present."""

    @abstractmethod
    def write_batch(self, batch: int, pixels: np.ndarray) -> None:
        """Write a batch.

        Args:
            batch: its number.
            pixels: (n, H, W, C) of the target's type, n is the length of `indices(batch)`.
        """

    @abstractmethod
    def assemble(self) -> None:
        """Write the files whose batches are all present, and delete what was collected for them."""


class FolderTarget(Target):
    """A folder with one file per image.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     target = FolderTarget(Path(folder), count=3, batch_size=2, seed=0, image_shape=(4, 4, 1))
        ...     target.write_batch(1, np.zeros((1, 4, 4, 1), np.uint8))
        ...     [file.name for file in target.existing_files()], target.done_batches()
        (['00002.png'], {1})
    """

    @property
    def manifest(self) -> Path:
        """The manifest's path, in the folder."""
        return self.path / MANIFEST_NAME

    @property
    def lock_path(self) -> Path:
        """The lock, in the folder."""
        return self.path / LOCK_NAME

    def existing_files(self) -> list[Path]:
        """Return the numbered image files, sorted."""
        return sorted(file for file in self.path.glob(f"*{self.image_suffix}") if re.fullmatch(r"\d{5,}", file.stem))

    def files_to_verify(self, batches: set[int]) -> Iterator[Path]:
        """Yield the image files of some batches."""
        for file in self.existing_files():
            if int(file.stem) // self.batch_size in batches and int(file.stem) < self.count:
                yield file

    def verify(self, file: Path) -> None:
        """Raise an error if an image file is damaged, or of another shape."""
        if not file.is_file():
            raise ValueError("it is not a file")
        with file.open("rb") as stream:
            _verify_image(stream, self.image_shape, self.dtype)

    def remove_leftovers(self) -> None:
        """Delete temporary image files that killed processes left."""
        remove_leftovers(self.path, r"\d{5,}", self.image_suffix)

    def create_folders(self) -> None:
        """Create the folder."""
        self.path.mkdir(exist_ok=True)

    def done_batches(self) -> set[int]:
        """Return the batches of which every file is present."""
        present = {int(file.stem) for file in self.existing_files()}
        return {batch for batch in self.batches if present.issuperset(self.indices(batch))}

    def write_batch(self, batch: int, pixels: np.ndarray) -> None:
        """Write one file per image of a batch, (n, H, W, C)."""
        for index, image in zip(self.indices(batch), pixels, strict=True):
            with atomic_write(self.path / f"{index:05d}{self.image_suffix}", keep_leftovers=True) as temporary:
                temporary.write_bytes(encode_image(image))

    def assemble(self) -> None:
        """Do nothing: the images are the result."""


class PartsTarget(Target):
    """Base of outputs that collect batches as `.npy` parts in a folder beside them."""

    @property
    def manifest(self) -> Path:
        """The manifest's path, beside the output."""
        return self.path.with_name(f"{self.path.name}.{MANIFEST_NAME}")

    @property
    def lock_path(self) -> Path:
        """The lock, beside the output."""
        return self.path.with_name(f".{self.path.name}{LOCK_NAME}")

    @property
    def parts_folder(self) -> Path:
        """The folder of the parts."""
        return self.path.with_name(f"{self.path.name}.parts")

    def part_path(self, batch: int) -> Path:
        """Return the path of a batch's part."""
        return self.parts_folder / f"{batch:08d}.npy"

    def stored_parts(self) -> set[int]:
        """Return the batches that are present as parts."""
        numbers = {int(file.stem) for file in self.parts_folder.glob("*.npy") if file.stem.isdecimal()}
        return numbers & set(self.batches)

    def part_shape(self, batch: int) -> tuple[int, ...]:
        """Return the shape (n, H, W, C) of a batch's part."""
        return (len(self.indices(batch)), *self.image_shape)

    def read_part(self, batch: int) -> np.ndarray:
        """Return the pixels of a part, (n, H, W, C).

        Raises:
            ValueError: if it is damaged, or of another shape.
        """
        path = self.part_path(batch)
        content = path.read_bytes()
        data, digest = content[:-SHA256_BYTES], content[-SHA256_BYTES:]
        if hashlib.sha256(data).digest() != digest:
            raise ValueError(f"{path} is damaged: its SHA-256 does not match; delete it and run again")
        pixels: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
        if pixels.dtype != self.dtype or pixels.shape != self.part_shape(batch):
            raise ValueError(
                f"{path} must hold {self.dtype} {self.part_shape(batch)}, got {pixels.dtype} {pixels.shape}; delete it "
                "and run again"
            )
        return pixels

    def files_to_verify(self, batches: set[int]) -> Iterator[Path]:
        """Yield the parts of some batches."""
        for batch in sorted(self.stored_parts() & batches):
            yield self.part_path(batch)

    def verify(self, file: Path) -> None:
        """Raise an error if a part is damaged, or of another shape."""
        batch = int(file.stem)
        # Compared first, because a file of any size would be read.
        expected = int(np.prod(self.part_shape(batch))) * np.dtype(self.dtype).itemsize
        if not file.is_file() or not expected <= file.stat().st_size <= expected + MAX_HEADER_BYTES:
            raise ValueError(f"it does not have the size of {self.dtype} {self.part_shape(batch)}")
        try:
            self.read_part(batch)
        except ValueError:
            raise ValueError(f"it does not hold what was written, {self.dtype} {self.part_shape(batch)}") from None

    def remove_leftovers(self) -> None:
        """Delete temporary files that killed processes left."""
        remove_leftovers(self.parts_folder, r"\d{8,}", ".npy")
        remove_leftovers(self.path.parent, rf"{re.escape(self.path.stem[:MAX_STEM_LENGTH])}(-\d*)?", self.path.suffix)

    def clear(self) -> None:
        """Delete the images, the parts and the manifest."""
        super().clear()
        shutil.rmtree(self.parts_folder, ignore_errors=True)

    def create_folders(self) -> None:
        """Create the folder of the parts."""
        self.parts_folder.mkdir(exist_ok=True)

    def write_batch(self, batch: int, pixels: np.ndarray) -> None:
        """Write a batch, (n, H, W, C), as a part."""
        stream = io.BytesIO()
        np.save(stream, pixels, allow_pickle=False)
        data = stream.getvalue()
        with atomic_write(self.part_path(batch), keep_leftovers=True) as temporary:
            temporary.write_bytes(data + hashlib.sha256(data).digest())


class NpzTarget(PartsTarget):
    """An npz file with all images as one array.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     target = NpzTarget(Path(folder) / "x.npz", 1, batch_size=1, seed=0, image_shape=(4, 4, 1))
        ...     target.create_folders()
        ...     target.write_batch(0, np.zeros((1, 4, 4, 1), np.uint8))
        ...     target.assemble()
        ...     np.load(target.path)["arr_0"].shape
        (1, 4, 4, 1)
    """

    def existing_files(self) -> list[Path]:
        """Return the file if it is present."""
        return [self.path] if self.path.exists() else []

    def done_batches(self) -> set[int]:
        """Return all batches if the file is present, else those present as parts."""
        return set(self.batches) if self.path.exists() else self.stored_parts()

    def files_to_verify(self, batches: set[int]) -> Iterator[Path]:
        """Yield the parts of some batches, and the file."""
        yield from super().files_to_verify(batches)
        yield from self.existing_files()

    def verify(self, file: Path) -> None:
        """Raise an error if a part or the file is damaged, or of another shape."""
        if file != self.path:
            super().verify(file)
            return
        with open_npz(file) as archive:
            archive.verify("arr_0")
            header = archive.headers["arr_0"]
        expected = (self.count, *self.image_shape)
        if header.dtype != self.dtype or header.shape != expected:
            raise ValueError(f"it must hold {self.dtype} {expected}, got {header.dtype} {header.shape}")

    def assemble(self) -> None:
        """Write the file from its parts once all are present, and delete them."""
        if not self.path.exists():
            if len(self.stored_parts()) < len(self.batches):
                return
            with _unless_assembled_elsewhere(self.path), atomic_write(self.path) as temporary:
                self._write(temporary)
        shutil.rmtree(self.parts_folder, ignore_errors=True)

    def _write(self, path: Path) -> None:
        """Write the images, part by part, so that they need not fit into memory, and their labels."""
        images, labels = (zipfile.ZipInfo(f"{name}.npy", ZIP_TIMESTAMP) for name in ("arr_0", "arr_1"))
        images.compress_type = labels.compress_type = zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open(images, "w", force_zip64=True) as stream:
                header = {
                    "descr": np.dtype(self.dtype).str,
                    "fortran_order": False,
                    "shape": (self.count, *self.image_shape),
                }
                np.lib.format.write_array_header_1_0(stream, header)
                for batch in self.batches:
                    stream.write(self.read_part(batch).tobytes())
            if self.labels:
                with archive.open(labels, "w") as stream:
                    np.lib.format.write_array(stream, np.array(self.labels, np.int64), allow_pickle=False)


class TarTarget(PartsTarget):
    """Tar shards.

    Args:
        path: `x.tar`, which stands for `x-000000.tar`, ...
        count: number of images.
        batch_size: images per batch.
        seed: seed of the first image.
        image_shape: (H, W, C) of every image.
        shard_size: images per shard, rounded down to whole batches, at least one.
        dtype: of the images' values.

    Example:
        >>> target = TarTarget(Path("x.tar"), 10, batch_size=2, seed=0, image_shape=(8, 8, 3), shard_size=5)
        >>> target.batches_by_shard, target.shard_path(1).name
        ([range(0, 2), range(2, 4), range(4, 5)], 'x-000001.tar')
    """

    def __init__(
        self,
        path: Path,
        count: int,
        batch_size: int,
        seed: int,
        image_shape: ImageShape,
        shard_size: int,
        dtype: str = "uint8",
    ) -> None:
        super().__init__(path, count, batch_size, seed, image_shape, dtype)
        self.batches_per_shard = max(1, shard_size // batch_size)

    def shard_path(self, number: int) -> Path:
        """Return the path of a shard."""
        return self.path.with_name(f"{self.path.stem}-{number:06d}{self.path.suffix}")

    @cached_property
    def batches_by_shard(self) -> list[range]:
        """The batches of each shard."""
        starts = range(0, len(self.batches), self.batches_per_shard)
        return [self.batches[start : start + self.batches_per_shard] for start in starts]

    def existing_files(self) -> list[Path]:
        """Return the shards present, sorted."""
        pattern = re.compile(rf"{re.escape(self.path.stem)}-\d{{6,}}{re.escape(self.path.suffix)}")
        return sorted(file for file in self.path.parent.iterdir() if pattern.fullmatch(file.name))

    def done_batches(self) -> set[int]:
        """Return the batches that are present as parts or within shards."""
        shards = {file.name for file in self.existing_files()}
        done = self.stored_parts()
        for number, batches in enumerate(self.batches_by_shard):
            if self.shard_path(number).name in shards:
                done.update(batches)
        return done

    def files_to_verify(self, batches: set[int]) -> Iterator[Path]:
        """Yield the parts of some batches, and the shards that hold them."""
        yield from super().files_to_verify(batches)
        for number, within in enumerate(self.batches_by_shard):
            if not batches.isdisjoint(within) and self.shard_path(number).exists():
                yield self.shard_path(number)

    def verify(self, file: Path) -> None:
        """Raise an error if a part or a shard is damaged, or holds other images."""
        if file.parent == self.parts_folder:
            super().verify(file)
            return
        number = int(file.stem.rpartition("-")[2])
        if file.stat().st_size % tarfile.RECORDSIZE:
            raise ValueError("it is truncated")
        with tarfile.open(file, "r:") as archive:
            for batch in self.batches_by_shard[number]:
                for index in self.indices(batch):
                    for suffix in (self.image_suffix, ".json"):
                        entry = archive.next()
                        if entry is None or entry.name != f"{index:09d}{suffix}" or not entry.isreg():
                            raise ValueError(f"image {index} is missing")
                        content = archive.extractfile(entry)
                        assert content is not None  # a regular file has content
                        if suffix != ".json":
                            _verify_image(content, self.image_shape, self.dtype)
                        elif content.read(MAX_HEADER_BYTES) != self._description(index):
                            raise ValueError(f"the description of image {index} is another")
            if archive.next() is not None:
                raise ValueError("it holds more than its images")

    def write_batch(self, batch: int, pixels: np.ndarray) -> None:
        """Write a batch, (n, H, W, C), as a part, and its shard if that is complete."""
        super().write_batch(batch, pixels)
        number = batch // self.batches_per_shard
        if all(self.part_path(other).exists() for other in self.batches_by_shard[number]):
            self._write_shard(number)

    def assemble(self) -> None:
        """Write the shards whose parts are all present; delete the folder of the parts once all shards are."""
        stored = self.stored_parts()
        for number, batches in enumerate(self.batches_by_shard):
            if stored.issuperset(batches):
                self._write_shard(number)
        if all(self.shard_path(number).exists() for number in range(len(self.batches_by_shard))):
            shutil.rmtree(self.parts_folder, ignore_errors=True)

    def _write_shard(self, number: int) -> None:
        """Write a shard from its parts, and delete them."""
        path = self.shard_path(number)
        with (
            _unless_assembled_elsewhere(path),
            atomic_write(path) as temporary,
            tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            for batch in self.batches_by_shard[number]:
                for index, image in zip(self.indices(batch), self.read_part(batch), strict=True):
                    for suffix, content in self._entries(index, image):
                        entry = tarfile.TarInfo(f"{index:09d}{suffix}")
                        entry.size = len(content)
                        archive.addfile(entry, io.BytesIO(content))
        for batch in self.batches_by_shard[number]:
            self.part_path(batch).unlink(missing_ok=True)

    def _entries(self, index: int, image: np.ndarray) -> Iterator[tuple[str, bytes]]:
        """Yield the suffix and content of each file of an image."""
        yield self.image_suffix, encode_image(image)
        yield ".json", self._description(index)

    def _description(self, index: int) -> bytes:
        """Return the content of an image's JSON file."""
        return json.dumps({"index": index, "seed": self.seed + index}).encode()


@contextlib.contextmanager
def _unless_assembled_elsewhere(path: Path) -> Iterator[None]:
    """Ignore missing parts if another process has assembled the same file, and deleted them, in the meantime."""
    try:
        yield
    except FileNotFoundError:
        if not path.exists():
            raise


def _verify_image(stream: IO[bytes], image_shape: ImageShape, dtype: str) -> None:
    """Raise an error if an image file is of another shape, or is damaged by its checksums."""
    H, W, C = image_shape
    # Files of noise are hardly larger than their pixels; a larger file need not be read.
    content = stream.read(2 * H * W * C * PAGE_BYTES[dtype] + C * MAX_HEADER_BYTES)
    if keeps_png(dtype, C):
        _verify_png(content, image_shape, 8 * PAGE_BYTES[dtype])
        return
    verify_tiff(content, image_shape, dtype)


def _verify_png(content: bytes, image_shape: ImageShape, bits: int) -> None:
    """Raise an error if a PNG file is of another shape or depth, or is damaged by the checksums of its chunks."""
    H, W, C = image_shape
    header = struct.pack(">IIBB", W, H, bits, PNG_COLOR_TYPES.get(C, 0))
    if content[:8] != PNG_SIGNATURE or content[16:26] != header:
        raise ValueError(f"it is not a PNG file of {W}x{H} pixels and {pluralize(C, 'channel')}")
    position, kind = 8, b""
    while position < len(content):
        end = position + 8 + int.from_bytes(content[position : position + 4], "big")
        if zlib.crc32(content[position + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            raise ValueError("its checksum does not match")
        position, kind = end + 4, content[position + 4 : position + 8]
    if kind != b"IEND":
        raise ValueError("it is truncated")


def make_target(
    out: str | Path,
    count: int,
    batch_size: int,
    seed: int,
    image_shape: ImageShape,
    shard_size: int,
    dtype: str = "uint8",
) -> Target:
    """Create the target that an output path means.

    Args:
        out: a folder, `x.npz` or `x.tar`.
        count: number of images.
        batch_size: images per batch.
        seed: seed of the first image.
        image_shape: (H, W, C) of every image.
        shard_size: images per tar shard.
        dtype: of the images' values.

    Returns:
        The target; nothing is written.

    Raises:
        ValueError: for another suffix.

    Example:
        >>> type(make_target("x.tar", 10, 4, 0, (8, 8, 3), 1000)).__name__
        'TarTarget'
    """
    path = Path(out)
    if is_folder_path(out):
        return FolderTarget(path, count, batch_size, seed, image_shape, dtype)
    if path.suffix.lower() == ".npz":
        return NpzTarget(path, count, batch_size, seed, image_shape, dtype)
    if path.suffix.lower() == ".tar":
        return TarTarget(path, count, batch_size, seed, image_shape, shard_size, dtype)
    raise ValueError(f"out must end in .npz, .tar, or be a folder, got {shorten(repr(str(out)))}")
