"""Atomic writes: a temporary name beside the target, flushed to the disk, then renamed.

What was at the target stays until its replacement is complete. Temporary files are locked while they are written, so
that those of killed processes differ from those of running ones, and are deleted.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddim.io.locks import LOCK_NAME, OutputLock, try_flock

TEMPORARY_PREFIX = ".writing-"
"""The names of temporary files and folders start with this."""
TEMPORARY_FOLDERS = f"{TEMPORARY_PREFIX}{'?' * 8}/"
"""Pattern of the temporary folders of `write_folder`."""
MAX_STEM_LENGTH = 40
"""Characters of a file's name that its temporary name repeats, which must not become too long for the file system."""
ABANDONED_SECONDS = 3600
"""Where files cannot be locked, a temporary file that was not written to for this time is a leftover."""


@contextmanager
def atomic_write(path: Path, mode: int | None = None, keep_leftovers: bool = False) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, which replaces `path` when the `with` block succeeds.

    If the block raises, the temporary file is deleted and `path` is as it was.

    Args:
        path: the file to write; its folder must exist.
        mode: the file's permissions; defaults to those that the umask leaves.
        keep_leftovers: do not look for temporary files of killed processes that were writing `path`, which takes a time
            proportional to the number of files in the folder.

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
    if not keep_leftovers:
        remove_leftovers(path.parent, re.escape(path.stem[:MAX_STEM_LENGTH]), path.suffix)
    temporary, descriptor = _make_temporary(path)
    try:
        yield temporary
        _publish(temporary, path, mode)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)
    _flush(path.parent)


def _make_temporary(path: Path) -> tuple[Path, int | None]:
    """Create a temporary file beside `path`, and return it with the descriptor that locks it, if there are locks."""
    prefix = f"{TEMPORARY_PREFIX}{path.stem[:MAX_STEM_LENGTH]}-"
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=path.suffix)
        is_locked = try_flock(descriptor)
        # Before it was locked, another process may have taken it for a leftover.
        if is_locked and os.fstat(descriptor).st_nlink:
            return Path(name), descriptor
        # Windows renames no open file.
        os.close(descriptor)
        if is_locked is None:
            return Path(name), None
        Path(name).unlink(missing_ok=True)


def remove_leftovers(folder: Path, stem: str, suffix: str) -> None:
    """Delete temporary files of `atomic_write` that killed processes left; those of running processes stay.

    Args:
        folder: the folder that was written to.
        stem: regular expression of the written files' stems.
        suffix: their suffix.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (Path(folder) / ".writing-notes-abcdefgh.txt").touch()
        ...     with atomic_write(Path(folder) / "other.txt") as temporary:
        ...         remove_leftovers(Path(folder), ".*", ".txt")
        ...         [path == temporary for path in Path(folder).iterdir()]
        [True]
    """
    pattern = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}{stem}-\w{{8}}{re.escape(suffix)}", re.DOTALL)
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in [entry for entry in entries if pattern.fullmatch(entry.name)]:
            # It may be renamed, or belong to another user.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                if entry.is_file(follow_symlinks=False):
                    _remove_if_abandoned(Path(entry.path))


def _remove_if_abandoned(temporary: Path) -> None:
    """Delete a temporary file that no process writes."""
    descriptor = os.open(temporary, os.O_RDWR)
    try:
        is_free = try_flock(descriptor)
        age = time.time() - os.fstat(descriptor).st_mtime
        if is_free:
            # While it is locked, so that a writer that locks it next finds it deleted.
            temporary.unlink()
    finally:
        os.close(descriptor)
    if is_free is None and age > ABANDONED_SECONDS:
        temporary.unlink()


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Add files to a folder: yield a temporary folder, whose files move into `path` when the `with` block succeeds.

    Each file replaces the one of its name; other files in `path` stay. If the block raises, `path` is as it was. The
    folder is locked: a second process does not mix its files in.

    Args:
        path: the folder; it and its parents are created if missing.

    Yields:
        An empty folder to fill.

    Raises:
        NotADirectoryError: if `path` is a file.
        RuntimeError: if another process writes the folder.
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
    with OutputLock(path / LOCK_NAME):
        for leftover in path.glob(TEMPORARY_FOLDERS):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(dir=path, prefix=TEMPORARY_PREFIX))
        try:
            yield temporary
            for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
                target = path / file.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                _publish(file, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _flush(path)


def is_vacant(path: Path) -> bool:
    """Return whether a folder holds no output: nothing, or what a killed process left of `write_folder`.

    While files move into a folder, the temporary folder that they come from is beside them.

    Args:
        path: the folder; may be missing.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "model_index.json").touch()
        ...     is_complete = not is_vacant(Path(folder))
        ...     Path(folder, ".writing-abcdefgh").mkdir()
        ...     is_complete, is_vacant(Path(folder))
        (True, True)
    """
    if not path.is_dir():
        return not path.exists()
    outputs = [p for p in path.iterdir() if p.name != LOCK_NAME and not p.name.startswith(TEMPORARY_PREFIX)]
    return not outputs or any(path.glob(TEMPORARY_FOLDERS))


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
