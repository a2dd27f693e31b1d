"""Where many pictures go: a folder of PNG files, an npz file, or tar shards.

Every kind takes batches in any order and from several processes at once. A file has its name only when it is whole, and
two processes that write the same one write the same bytes.

- A folder gets `00000.png`, ...; a batch is done when all of its files are there.
- `x.npz` (`arr_0`, uint8 (N, H, W, C), what the ADM evaluator reads) and `x.tar` collect batches as `.npy` files in
  `x.npz.parts/`, until all are there.
- `x.tar` stands for shards `x-000000.tar`, ... as WebDataset reads them: for picture i, `000000042.png` and
  `000000042.json`, `{"index": 42, "seed": 42}`. A shard is written when its batches are there, which are then deleted.
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

from ddim.bulk.manifest import NAME
from ddim.io.atomic import atomic_write
from ddim.io.images import as_pil, is_folder_path

EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of files in archives: the same pictures are the same bytes."""


class Target(ABC):
    """An output.

    Args:
        path: as given.
        count: how many pictures.
        batch_size: pictures a batch.
        seed: of the first picture.
    """

    def __init__(self, path: Path, count: int, batch_size: int, seed: int) -> None:
        self.path, self.count, self.batch_size, self.seed = path, count, batch_size, seed

    @property
    def batches(self) -> range:
        return range(-(-self.count // self.batch_size))

    def pictures(self, batch: int) -> range:
        """The indices of a batch's pictures."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.count))

    @property
    @abstractmethod
    def manifest(self) -> Path:
        """Where the manifest is."""

    @abstractmethod
    def existing(self) -> list[Path]:
        """Files of pictures that are there, of whatever settings."""

    def clear(self) -> None:
        """Delete the pictures and the manifest."""
        for file in self.existing():
            file.unlink()
        self.manifest.unlink(missing_ok=True)

    @abstractmethod
    def prepare(self) -> None:
        """Make folders."""

    @abstractmethod
    def done(self) -> set[int]:
        """The batches that are there."""

    @abstractmethod
    def put(self, batch: int, pixels: np.ndarray) -> None:
        """Write a batch, uint8 (n, H, W, C)."""

    @abstractmethod
    def finish(self) -> None:
        """Put together what can be, of the batches that are there."""


class FolderTarget(Target):
    @property
    def manifest(self) -> Path:
        return self.path / NAME

    def existing(self) -> list[Path]:
        return sorted(file for file in self.path.glob("*.png") if re.fullmatch(r"\d{5,}", file.stem))

    def prepare(self) -> None:
        self.path.mkdir(exist_ok=True)

    def done(self) -> set[int]:
        there = {int(file.stem) for file in self.existing()}
        return {batch for batch in self.batches if there.issuperset(self.pictures(batch))}

    def put(self, batch: int, pixels: np.ndarray) -> None:
        for index, picture in zip(self.pictures(batch), pixels, strict=True):
            with atomic_write(self.path / f"{index:05d}.png") as temporary:
                as_pil(picture).save(temporary)

    def finish(self) -> None:
        if len(self.done()) == len(self.batches):
            _remove_unfinished(self.path, r"\d{5,}", ".png")


class _Parts(Target):
    """An output that collects batches beside itself."""

    @property
    def manifest(self) -> Path:
        return self.path.with_name(f"{self.path.name}.{NAME}")

    @property
    def parts(self) -> Path:
        return self.path.with_name(f"{self.path.name}.parts")

    def part(self, batch: int) -> Path:
        return self.parts / f"{batch:08d}.npy"

    def there(self) -> set[int]:
        """The batches that are there as parts."""
        return {int(file.stem) for file in self.parts.glob("*.npy") if file.stem.isdecimal()} & set(self.batches)

    def clear(self) -> None:
        super().clear()
        shutil.rmtree(self.parts, ignore_errors=True)

    def prepare(self) -> None:
        self.parts.mkdir(exist_ok=True)

    def put(self, batch: int, pixels: np.ndarray) -> None:
        with atomic_write(self.part(batch)) as temporary:
            np.save(temporary, pixels, allow_pickle=False)

    def load(self, batch: int) -> np.ndarray:
        pixels: np.ndarray = np.load(self.part(batch), allow_pickle=False)
        return pixels


class NpzTarget(_Parts):
    def existing(self) -> list[Path]:
        return [self.path] if self.path.exists() else []

    def done(self) -> set[int]:
        return set(self.batches) if self.path.exists() else self.there()

    def finish(self) -> None:
        if self.path.exists() or len(self.there()) < len(self.batches):
            return
        with _unless_another_finished(self.path), atomic_write(self.path) as temporary:
            shape = (self.count, *self.load(0).shape[1:])
            entry = zipfile.ZipInfo("arr_0.npy", EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            with zipfile.ZipFile(temporary, "w") as archive, archive.open(entry, "w", force_zip64=True) as stream:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                for batch in self.batches:
                    stream.write(self.load(batch).tobytes())
        shutil.rmtree(self.parts, ignore_errors=True)
        _remove_unfinished(self.path.parent, re.escape(self.path.stem), self.path.suffix)


class TarTarget(_Parts):
    """Tar shards of `shard_size` pictures, rounded down to whole batches, but for at least one."""

    def __init__(self, path: Path, count: int, batch_size: int, seed: int, shard_size: int) -> None:
        super().__init__(path, count, batch_size, seed)
        self.batches_a_shard = max(1, shard_size // batch_size)

    def shard(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.stem}-{number:06d}{self.path.suffix}")

    @cached_property
    def shards(self) -> list[range]:
        """The batches of each shard."""
        starts = range(0, len(self.batches), self.batches_a_shard)
        return [self.batches[start : start + self.batches_a_shard] for start in starts]

    def existing(self) -> list[Path]:
        pattern = re.compile(rf"{re.escape(self.path.stem)}-\d{{6,}}{re.escape(self.path.suffix)}")
        return sorted(file for file in self.path.parent.iterdir() if pattern.fullmatch(file.name))

    def done(self) -> set[int]:
        finished = {file.name for file in self.existing()}
        within = [batches for number, batches in enumerate(self.shards) if self.shard(number).name in finished]
        return self.there() | {batch for batches in within for batch in batches}

    def put(self, batch: int, pixels: np.ndarray) -> None:
        super().put(batch, pixels)
        number = batch // self.batches_a_shard
        if all(self.part(other).exists() for other in self.shards[number]):
            self._write(number)

    def finish(self) -> None:
        there = self.there()
        for number, batches in enumerate(self.shards):
            if there.issuperset(batches):
                self._write(number)
        if all(self.shard(number).exists() for number in range(len(self.shards))):
            shutil.rmtree(self.parts, ignore_errors=True)
            _remove_unfinished(self.path.parent, rf"{re.escape(self.path.stem)}-\d{{6,}}", self.path.suffix)

    def _write(self, number: int) -> None:
        path = self.shard(number)
        with (
            _unless_another_finished(path),
            atomic_write(path) as temporary,
            tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            for batch in self.shards[number]:
                for index, picture in zip(self.pictures(batch), self.load(batch), strict=True):
                    for suffix, content in self._entries(index, picture):
                        entry = tarfile.TarInfo(f"{index:09d}.{suffix}")
                        entry.size = len(content)
                        archive.addfile(entry, io.BytesIO(content))
        for batch in self.shards[number]:
            self.part(batch).unlink(missing_ok=True)

    def _entries(self, index: int, picture: np.ndarray) -> Iterator[tuple[str, bytes]]:
        png = io.BytesIO()
        as_pil(picture).save(png, "PNG")
        yield "png", png.getvalue()
        yield "json", json.dumps({"index": index, "seed": self.seed + index}).encode()


@contextlib.contextmanager
def _unless_another_finished(path: Path) -> Iterator[None]:
    """Another process may finish the same file first and delete its parts: then there is nothing left to do."""
    try:
        yield
    except FileNotFoundError:
        if not path.exists():
            raise


def _remove_unfinished(folder: Path, stem: str, suffix: str) -> None:
    """Delete the temporary files of `atomic_write` that killed processes left behind, once all is complete."""
    pattern = re.compile(rf"\.{stem}-\w{{8}}{re.escape(suffix)}")
    for file in folder.glob(f".*{suffix}"):
        if pattern.fullmatch(file.name):
            file.unlink(missing_ok=True)


def make_target(out: str | Path, count: int, batch_size: int, seed: int, shard_size: int) -> Target:
    """The kind of output that a path means; ValueError for another suffix than .npz and .tar."""
    path = Path(out)
    if is_folder_path(out):
        return FolderTarget(path, count, batch_size, seed)
    if path.suffix.lower() == ".npz":
        return NpzTarget(path, count, batch_size, seed)
    if path.suffix.lower() == ".tar":
        return TarTarget(path, count, batch_size, seed, shard_size)
    raise ValueError(f"many pictures go to a folder, x.npz or x.tar, not to {path.name}")
