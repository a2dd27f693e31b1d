"""The temporary folder of a server, which ends with it: a killed server's is removed by the next one."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: nothing is known of other servers there
    fcntl = None

PREFIX = "ddim-app-"
LOCK_NAME = "lock"

SETTLING_SECONDS = 60
"""Age at which a folder without a lock is one of a killed server, not of one that is starting."""


@contextmanager
def server_folder() -> Iterator[Path]:
    """Make a temporary folder of this process alone, and remove those of servers that were killed.

    A server holds a lock in its folder, which the operating system releases when the process ends in any way.

    Yields:
        The folder, which is deleted at the end.
    """
    parent = Path(tempfile.gettempdir())
    for folder in parent.glob(f"{PREFIX}*"):
        if is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name:
        lock = _locked_file(Path(name))
        try:
            yield Path(name)
        finally:
            os.close(lock)


def is_abandoned(folder: Path) -> bool:
    """Return whether a folder belongs to a server that was killed.

    Args:
        folder: a temporary folder of a server.

    Returns:
        `False` for a running server's, another user's, and for what is not such a folder.
    """
    if fcntl is None:
        return False
    try:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return False
        if not (folder / LOCK_NAME).exists():
            return time.time() - status.st_mtime > SETTLING_SECONDS
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR)
    except OSError:
        return False
    try:
        return _lock(descriptor)
    finally:
        os.close(descriptor)


def _locked_file(folder: Path) -> int:
    """Make the lock under another name first: where there is a lock, it has been held."""
    new = folder / f"{LOCK_NAME}.new"
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
    _lock(descriptor)
    if fcntl is not None:
        new.rename(folder / LOCK_NAME)
    return descriptor


def _lock(descriptor: int) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by a process that runs, or a file system without locks
        return False
    return True
