"""Atomic writes: files and folders are written under a temporary name beside the target, flushed, then renamed, so that
what was there stays until its replacement is complete.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; on success it becomes `path`, on failure it is deleted and `path` stays as it
    was.

    Args:
        path: where the file shall be; its folder must exist.

    Raises:
        OSError: if the folder does not exist, cannot be written, or the disk is full.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _finish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on success its files move into `path`, each replacing one of its name.

    If filling it fails, nothing in `path` has changed.

    Other files in `path` stay. `path` and its parents are made where they are missing.

    Raises:
        OSError: as above; `NotADirectoryError` if `path` is a file.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, not a folder")
    path.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path, prefix=".writing-"))
    try:
        yield temporary
        for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
            target = path / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            _finish(file, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _flush(path)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it becomes `path`, in place of a folder that is there.

    Args:
        path: where the folder shall be; its parents are made where they are missing.

    Raises:
        OSError: if it cannot be written; what is there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    old = temporary.with_name(f"{temporary.name}-old")
    try:
        yield temporary
        umask = _umask()
        for file in (*sorted(temporary.rglob("*")), temporary):
            # Some writers keep their files from everybody else.
            file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)
            _flush(file)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    _flush(path.parent)


def _finish(temporary: Path, path: Path) -> None:
    """Give a complete file the permissions that the user's umask gives every other, push it to the disk, rename it."""
    temporary.chmod(0o666 & ~_umask())
    _flush(temporary)
    temporary.replace(path)


def _umask() -> int:
    """The permissions that the user takes from every new file."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _flush(path: Path) -> None:
    """Push a file's content, or a folder's names, to the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
