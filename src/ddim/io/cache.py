"""What is kept between runs and can be computed anew: compiled kernels, features, tables, tuning, decoded images.

A cache never fails a command. Whatever is wrong with it means that its content is computed anew, with one warning per
folder and process: no home folder, a disk that is full or read-only, a damaged entry, an entry that others could have
written.

An entry is a file: the SHA-256 of its name and content, then the content. The name is included so that a file that was
copied to the name of another is not taken for it. As ssh does with keys, entries are read only from a folder and a file
that belong to this user or to root and that nobody else may write, since compiled kernels are run.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from ddim.io.atomic import atomic_write

T = TypeVar("T")

logger = logging.getLogger(__name__)

CHECKSUM_BYTES = 32
CHUNK_BYTES = 1 << 24
STALE_SECONDS = 600
"""Age at which the temporary file of a process that was killed is removed; one that is being written is younger."""
NO_FOLDER = "this user has no home folder, and XDG_CACHE_HOME is not set"
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH

_warned: set[str] = set()
_warned_lock = threading.Lock()


class Cache:
    """A folder of entries that can be computed anew.

    Args:
        kind: what the entries are, for messages and as the name of the folder.
        folder: the folder; defaults to `kind` in the user's cache folder.

    Example:
        >>> import tempfile
        >>> cache = Cache("tables", Path(tempfile.mkdtemp()))
        >>> cache.read("a", bytes) is None
        True
        >>> cache.write("a", [b"con", b"tent"])
        True
        >>> cache.read("a", bytes)
        b'content'
    """

    def __init__(self, kind: str, folder: Path | None = None) -> None:
        self.kind = kind
        self._given = folder

    @property
    def folder(self) -> Path | None:
        """The folder, which may not exist; `None` if the user has no home folder."""
        if self._given is not None:
            return self._given
        root = cache_folder()
        return None if root is None else root / self.kind

    def path(self, name: str) -> Path | None:
        """Return where an entry is kept; `None` without a folder.

        Args:
            name: of the entry, relative to the folder.
        """
        return None if (folder := self.folder) is None else folder / name

    def read(self, name: str, parse: Callable[[np.ndarray], T]) -> T | None:
        """Return an entry; `None` where it has to be computed.

        Args:
            name: of the entry, relative to the folder.
            parse: makes the result from the content, uint8 (n,), which is mapped into memory, copy on write. Whatever
                it raises means that the entry is not what it should be.

        Returns:
            What `parse` returns; `None` without such an entry, or if it is not to be trusted.
        """
        try:
            path = self._checked_path(name)
            with open(path, "rb", opener=_open_file) as file:
                content = self._verify(name, file)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._warn(error)
            return None
        try:
            return parse(content)
        except Exception as error:  # of any kind, none of which may fail a command
            self._warn(ValueError(f"{path} holds something else: {type(error).__name__}: {error}"))
            return None

    def write(self, name: str, chunks: Iterable[bytes]) -> bool:
        """Write an entry atomically. Processes that write the same entry at once each write a complete file.

        Args:
            name: of the entry, relative to the folder.
            chunks: its content, in parts.

        Returns:
            Whether it was written.
        """
        try:
            parent = self._make_folder(name)
            path = self._checked_path(name)
            _remove_leftovers(parent)
            with atomic_write(path, mode=0o600) as temporary, temporary.open("wb") as file:
                checksum = self._start_checksum(name)
                file.write(bytes(CHECKSUM_BYTES))
                for chunk in chunks:
                    checksum.update(chunk)
                    file.write(chunk)
                file.seek(0)
                file.write(checksum.digest())
        except OSError as error:
            self._warn(error)
            return False
        return True

    def free_bytes(self) -> int:
        """Return the free space on the disk of the folder; 0 where that is unknown."""
        if (folder := self.folder) is None:
            return 0
        try:
            existing = next((path for path in (folder, *folder.parents) if path.exists()), None)
            return 0 if existing is None else shutil.disk_usage(existing).free
        except OSError:
            return 0

    def exists(self, name: str) -> bool:
        """Return whether there is an entry, which may be damaged.

        Args:
            name: of the entry, relative to the folder.
        """
        try:
            return (path := self.path(name)) is not None and path.exists()
        except OSError:
            return False

    def is_usable(self, name: str) -> bool:
        """Return whether an entry can be written and will be trusted, without a warning.

        Args:
            name: of the entry, relative to the folder.

        Example:
            >>> import tempfile
            >>> Cache("tables", Path(tempfile.mkdtemp())).is_usable("a")
            True
        """
        try:
            return os.access(self._make_folder(name), os.W_OK) and bool(self._checked_path(name))
        except OSError:
            return False

    def _warn(self, error: Exception) -> None:
        """Log why the cache is of no use, once per folder."""
        with _warned_lock:
            is_first = str(self.folder) not in _warned
            _warned.add(str(self.folder))
        if is_first:
            reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else error
            place = "" if self.folder is None else f" in {self.folder}"
            logger.warning("the cached %s%s are not used: %s", self.kind, place, reason)

    def _verify(self, name: str, file: BinaryIO) -> np.ndarray:
        """Return the content of an open entry after its owner and checksum were verified."""
        if reason := _distrust(os.fstat(file.fileno())):
            raise PermissionError(f"{file.name} {reason}; delete it")
        if os.fstat(file.fileno()).st_size <= CHECKSUM_BYTES:
            raise ValueError(f"{file.name} is damaged")
        expected = file.read(CHECKSUM_BYTES)
        checksum = self._start_checksum(name)
        while chunk := file.read(CHUNK_BYTES):
            checksum.update(chunk)
        if checksum.digest() != expected:
            raise ValueError(f"{file.name} is damaged")
        return np.memmap(file, np.uint8, "c", CHECKSUM_BYTES)

    def _start_checksum(self, name: str) -> Any:
        return hashlib.sha256(f"{self.kind}/{name}\0".encode())

    def _make_folder(self, name: str) -> Path:
        """Return the folder of an entry, which only this user can read if it is new."""
        if (path := self.path(name)) is None:
            raise FileNotFoundError(NO_FOLDER)
        for folder in (*reversed(path.parent.parents), path.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        return path.parent

    def _root(self) -> Path:
        """Return the uppermost folder that is the cache's own."""
        folder = self.folder
        assert folder is not None
        return folder if self._given is not None else folder.parent

    def _checked_path(self, name: str) -> Path:
        """Return where an entry is, after all folders down to it were checked.

        Raises:
            FileNotFoundError: if a folder does not exist.
            PermissionError: if another user could have written one.
        """
        if (path := self.path(name)) is None:
            raise FileNotFoundError(NO_FOLDER)
        root, parent = self._root().resolve(strict=True), path.parent.resolve(strict=True)
        if os.name == "nt":
            return parent / path.name
        for folder in (parent, *parent.parents):
            status = folder.stat()
            if folder.is_relative_to(root):
                if reason := _distrust(status):
                    raise PermissionError(f"{folder} {reason}; delete it")
            # Whoever may write a folder above can replace the cache, though only by one that belongs to another user.
            # A sticky folder such as /tmp does not allow it.
            elif status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
                raise PermissionError(f"{folder} can be written by every user")
        return parent / path.name


def cache_folder() -> Path | None:
    """Return the folder of this user's `ddim` caches: `$XDG_CACHE_HOME/ddim`, or `~/.cache/ddim`.

    Relative paths in the environment are ignored, as the XDG specification demands.

    Returns:
        The folder, which may not exist; `None` for a user without a home folder.

    Example:
        >>> folder = cache_folder()
        >>> folder is None or folder.name
        'ddim'
    """
    if (given := Path(os.environ.get("XDG_CACHE_HOME") or ".")).is_absolute():
        return given / "ddim"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ".cache" / "ddim" if home.is_absolute() else None


def _open_file(path: str, flags: int) -> int:
    """Open a regular file, which a link is not, without waiting for the writer of a pipe."""
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a file")
    return descriptor


def _distrust(status: os.stat_result) -> str | None:
    """Return why a file or folder is not to be trusted; `None` if it is."""
    if os.name == "nt":
        return None
    if status.st_uid not in (os.geteuid(), 0):
        return "belongs to another user"
    return "can be written by other users" if status.st_mode & OTHERS_MAY_WRITE else None


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed."""
    with contextlib.suppress(OSError):
        for file in folder.glob(".*"):
            if time.time() - file.stat().st_mtime > STALE_SECONDS:
                file.unlink()
