"""Atomic writes: a temporary name beside the target, flushed to the disk, then renamed.

What was at the target stays until its replacement is complete.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path, mode: int | None = None) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, which replaces `path` when the `with` block succeeds.

    If the block raises, the temporary file is deleted and `path` is as it was.

    Args:
        path: the file to write; its folder must exist.
        mode: the file's permissions; defaults to those that the umask leaves.

    Yields:
        A path with the same suffix in the same folder, to write to.

    Raises:
        OSError: if the folder does not exist, cannot be written, or the disk is full.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "notes.txt"
        ...     with atomic_write(path) as temporary:
        ...         _ = temporary.write_text("complete")
        ...     path.read_text()
        'complete'
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _publish(temporary, path, mode)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Add files to a folder: yield a temporary folder, whose files move into `path` when the `with` block succeeds.

    Each file replaces the one of its name; other files in `path` stay. If the block raises, `path` is as it was.

    Args:
        path: the folder; it and its parents are created if missing.

    Yields:
        An empty folder to fill.

    Raises:
        NotADirectoryError: if `path` is a file.
        OSError: if the folder cannot be written, or the disk is full.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with write_folder(Path(folder) / "model") as temporary:
        ...         _ = (temporary / "config.json").write_text("{}")
        ...     [path.name for path in (Path(folder) / "model").iterdir()]
        ['config.json']
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
            _publish(file, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _flush(path)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Write a whole folder: yield a temporary folder, which replaces `path` when the `with` block succeeds.

    Args:
        path: the folder to replace or create; its parents are created if missing.

    Yields:
        An empty folder to fill.

    Raises:
        OSError: if it cannot be written; `path` is as it was.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint = Path(folder) / "checkpoint"
        ...     for name in ("old", "new"):
        ...         with replace_folder(checkpoint) as temporary:
        ...             (temporary / name).touch()
        ...     [path.name for path in checkpoint.iterdir()]
        ['new']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    old = temporary.with_name(f"{temporary.name}-old")
    try:
        yield temporary
        umask = _umask()
        for file in (*sorted(temporary.rglob("*")), temporary):
            # Some writers create files that only the user can read.
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


def _publish(temporary: Path, path: Path, mode: int | None = None) -> None:
    """Give a complete file its permissions, flush it to the disk and rename it."""
    temporary.chmod(0o666 & ~_umask() if mode is None else mode)
    _flush(temporary)
    temporary.replace(path)


def _umask() -> int:
    """Return the permissions that the umask withholds from new files."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _flush(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
