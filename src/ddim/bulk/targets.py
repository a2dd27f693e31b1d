"""Targets of bulk sampling: a folder of PNG files, an npz file, or tar shards.

Every kind takes batches in any order and from several processes at once. Files are written atomically, and two
processes that write the same file write the same bytes.

- A folder gets `00000.png`, ...; a batch is done when all of its files are present.
- `x.npz` (`arr_0`, uint8 (N, H, W, C), as the ADM evaluator reads it) and `x.tar` collect batches as `.npy` files in
  `x.npz.parts/` until all are present.
- `x.tar` stands for shards `x-000000.tar`, ... as WebDataset reads them: for image i, `000000042.png` and
  `000000042.json`, `{"index": 42, "seed": 42}`. Once its batches are present, a shard is written and they are deleted.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from ddim.bulk.manifest import MANIFEST_NAME
from ddim.io.atomic import atomic_write
from ddim.io.image_files import is_folder_path
from ddim.io.images import as_pil

ZIP_TIMESTAMP = (1980, 1, 1, 0, 0, 0)
"""The modification time of files in archives, so that equal images give equal bytes."""


class Target(ABC):
    """An output of bulk sampling, filled batch by batch.

    Args:
        path: the output path as the caller gave it.
        count: number of images.
        batch_size: images per batch.
        seed: seed of the first image.

    Attributes:
        batches_per_shard: batches per file of a sharded output; 0 for outputs without shards.

    Example:
        >>> target = FolderTarget(Path("samples"), count=10, batch_size=4, seed=0)
        >>> target.batches, target.indices(2)
        (range(0, 3), range(8, 10))
    """

    batches_per_shard = 0

    def __init__(self, path: Path, count: int, batch_size: int, seed: int) -> None:
        self.path, self.count, self.batch_size, self.seed = path, count, batch_size, seed

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

    @abstractmethod
    def existing_files(self) -> list[Path]:
        """Return the image files present, whatever their settings."""

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
            pixels: uint8 (n, H, W, C), n is the length of `indices(batch)`.
        """

    @abstractmethod
    def assemble(self) -> None:
        """Write the files whose batches are all present, and delete leftovers of killed processes once all is done."""


class FolderTarget(Target):
    """A folder with one PNG file per image.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     target = FolderTarget(Path(folder), count=3, batch_size=2, seed=0)
        ...     target.write_batch(1, np.zeros((1, 4, 4, 1), np.uint8))
        ...     [file.name for file in target.existing_files()], target.done_batches()
        (['00002.png'], {1})
    """

    @property
    def manifest(self) -> Path:
        """The manifest's path, in the folder."""
        return self.path / MANIFEST_NAME

    def existing_files(self) -> list[Path]:
        """Return the numbered PNG files, sorted."""
        return sorted(file for file in self.path.glob("*.png") if re.fullmatch(r"\d{5,}", file.stem))

    def create_folders(self) -> None:
        """Create the folder."""
        self.path.mkdir(exist_ok=True)

    def done_batches(self) -> set[int]:
        """Return the batches of which every file is present."""
        present = {int(file.stem) for file in self.existing_files()}
        return {batch for batch in self.batches if present.issuperset(self.indices(batch))}

    def write_batch(self, batch: int, pixels: np.ndarray) -> None:
        """Write one PNG file per image of a batch, uint8 (n, H, W, C)."""
        for index, image in zip(self.indices(batch), pixels, strict=True):
            with atomic_write(self.path / f"{index:05d}.png") as temporary:
                as_pil(image).save(temporary)

    def assemble(self) -> None:
        """Delete leftovers of killed processes once all images are present."""
        if len(self.done_batches()) == len(self.batches):
            _remove_unfinished(self.path, r"\d{5,}", ".png")


class PartsTarget(Target):
    """Base of outputs that collect batches as `.npy` parts in a folder beside them."""

    @property
    def manifest(self) -> Path:
        """The manifest's path, beside the output."""
        return self.path.with_name(f"{self.path.name}.{MANIFEST_NAME}")

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

    def read_part(self, batch: int) -> np.ndarray:
        """Return the pixels of a part, uint8 (n, H, W, C)."""
        pixels: np.ndarray = np.load(self.part_path(batch), allow_pickle=False)
        return pixels

    def clear(self) -> None:
        """Delete the images, the parts and the manifest."""
        super().clear()
        shutil.rmtree(self.parts_folder, ignore_errors=True)

    def create_folders(self) -> None:
        """Create the folder of the parts."""
        self.parts_folder.mkdir(exist_ok=True)

    def write_batch(self, batch: int, pixels: np.ndarray) -> None:
        """Write a batch, uint8 (n, H, W, C), as a part."""
        with atomic_write(self.part_path(batch)) as temporary:
            np.save(temporary, pixels, allow_pickle=False)


class NpzTarget(PartsTarget):
    """An npz file with all images as one array.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     target = NpzTarget(Path(folder) / "x.npz", count=1, batch_size=1, seed=0)
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

    def assemble(self) -> None:
        """Write the file from its parts once all are present, and delete them."""
        if self.path.exists() or len(self.stored_parts()) < len(self.batches):
            return
        with _unless_assembled_elsewhere(self.path), atomic_write(self.path) as temporary:
            shape = (self.count, *self.read_part(0).shape[1:])
            entry = zipfile.ZipInfo("arr_0.npy", ZIP_TIMESTAMP)
            entry.compress_type = zipfile.ZIP_DEFLATED
            # Streamed part by part, so that the array need not fit into memory.
            with zipfile.ZipFile(temporary, "w") as archive, archive.open(entry, "w", force_zip64=True) as stream:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                for batch in self.batches:
                    stream.write(self.read_part(batch).tobytes())
        shutil.rmtree(self.parts_folder, ignore_errors=True)
        _remove_unfinished(self.path.parent, re.escape(self.path.stem), self.path.suffix)


class TarTarget(PartsTarget):
    """Tar shards.

    Args:
        path: `x.tar`, which stands for `x-000000.tar`, ...
        count: number of images.
        batch_size: images per batch.
        seed: seed of the first image.
        shard_size: images per shard, rounded down to whole batches, at least one.

    Example:
        >>> target = TarTarget(Path("x.tar"), count=10, batch_size=2, seed=0, shard_size=5)
        >>> target.batches_by_shard, target.shard_path(1).name
        ([range(0, 2), range(2, 4), range(4, 5)], 'x-000001.tar')
    """

    def __init__(self, path: Path, count: int, batch_size: int, seed: int, shard_size: int) -> None:
        super().__init__(path, count, batch_size, seed)
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

    def write_batch(self, batch: int, pixels: np.ndarray) -> None:
        """Write a batch, uint8 (n, H, W, C), as a part, and its shard if that is complete."""
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
            _remove_unfinished(self.path.parent, rf"{re.escape(self.path.stem)}-\d{{6,}}", self.path.suffix)

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
                        entry = tarfile.TarInfo(f"{index:09d}.{suffix}")
                        entry.size = len(content)
                        archive.addfile(entry, io.BytesIO(content))
        for batch in self.batches_by_shard[number]:
            self.part_path(batch).unlink(missing_ok=True)

    def _entries(self, index: int, image: np.ndarray) -> Iterator[tuple[str, bytes]]:
        """Yield the suffix and content of each file of an image."""
        png = io.BytesIO()
        as_pil(image).save(png, "PNG")
        yield "png", png.getvalue()
        yield "json", json.dumps({"index": index, "seed": self.seed + index}).encode()


@contextlib.contextmanager
def _unless_assembled_elsewhere(path: Path) -> Iterator[None]:
    """Ignore missing parts if another process has assembled the same file, and deleted them, in the meantime."""
    try:
        yield
    except FileNotFoundError:
        if not path.exists():
            raise


def _remove_unfinished(folder: Path, stem: str, suffix: str) -> None:
    """Delete temporary files of `atomic_write` that killed processes left."""
    pattern = re.compile(rf"\.{stem}-\w{{8}}{re.escape(suffix)}")
    for file in folder.glob(f".*{suffix}"):
        if pattern.fullmatch(file.name):
            file.unlink(missing_ok=True)


def make_target(out: str | Path, count: int, batch_size: int, seed: int, shard_size: int) -> Target:
    """Create the target that an output path means.

    Args:
        out: a folder, `x.npz` or `x.tar`.
        count: number of images.
        batch_size: images per batch.
        seed: seed of the first image.
        shard_size: images per tar shard.

    Returns:
        The target; nothing is written.

    Raises:
        ValueError: for another suffix.

    Example:
        >>> type(make_target("x.tar", 10, 4, 0, 1000)).__name__
        'TarTarget'
    """
    path = Path(out)
    if is_folder_path(out):
        return FolderTarget(path, count, batch_size, seed)
    if path.suffix.lower() == ".npz":
        return NpzTarget(path, count, batch_size, seed)
    if path.suffix.lower() == ".tar":
        return TarTarget(path, count, batch_size, seed, shard_size)
    raise ValueError(f"out must end in .npz, .tar, or be a folder, got {str(out)!r}")
