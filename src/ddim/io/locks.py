"""Locks on outputs that are written over time: one run at a time writes a folder.

A lock is a file, `FOLDER/.lock` or `.NAME.lock` beside a file, that names its process. It is held by `flock`, which the
kernel releases when a process ends in any way, so that the file of a killed process blocks nobody. File systems without
`flock` are locked by what the file says: the process counts until it is known to have ended.

Reading needs no lock: every file of an output is written atomically.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

if sys.platform != "win32":
    import fcntl

LOCK_NAME = ".lock"
"""The name of a folder's lock."""
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
"""Errors of `flock` on file systems that lack it."""
RETRY_SECONDS = 0.05
"""Time between attempts, and between writing and verifying a lock on file systems without `flock`."""
MAX_RETRIES = 20
"""Attempts while another process is about to take or release the lock."""


def try_flock(descriptor: int, shared: bool = False) -> bool | None:
    """Try to lock an open file with `flock`, without waiting; closing the file releases it.

    Args:
        descriptor: the open file.
        shared: whether other processes may hold a shared lock as well.

    Returns:
        Whether the lock is held; `None` where the file system has no such locks.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryFile() as file:
        ...     try_flock(file.fileno()) in (True, None)
        True
    """
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return None
        raise
    return True


@dataclass(frozen=True)
class LockOwner:
    """The process that a lock file names.

    Attributes:
        pid: its number.
        host: its machine.
        started: when it started, as its machine counts; empty where that is unknown.
        job: what processes that share the lock have in common; empty for a process alone.

    Example:
        >>> LockOwner.this_process("").is_alive()
        True
    """

    pid: int
    host: str
    started: str
    job: str

    @classmethod
    def this_process(cls, job: str) -> LockOwner:
        """Return what a lock of this process says."""
        return cls(os.getpid(), socket.gethostname(), _start_time(os.getpid()), job)

    @classmethod
    def read(cls, path: Path) -> LockOwner | None:
        """Read a lock file; `None` where it is missing, empty or damaged."""
        try:
            content = json.loads(path.read_bytes())
            return cls(int(content["pid"]), *(str(content[key]) for key in ("host", "started", "job")))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def is_alive(self) -> bool:
        """Return whether the process may still run; processes of other machines may."""
        if self.host != socket.gethostname() or sys.platform == "win32":
            return True
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except OSError:  # it belongs to another user
            pass
        return self.started == _start_time(self.pid)


class OutputLock:
    """Hold the lock of an output for the duration of a `with` block.

    Missing folders are created, and removed in the end if they are empty.

    Args:
        path: the lock file: `FOLDER/.lock`, or `.NAME.lock` beside the file NAME.
        job: names the job of processes that write the output together and share the lock; empty for a process alone.

    Raises:
        RuntimeError: if another process, or another job, holds the lock.
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with OutputLock(Path(folder) / "run" / LOCK_NAME):
        ...         LockOwner.read(Path(folder) / "run" / LOCK_NAME).pid == os.getpid()
        ...     (Path(folder) / "run").exists()
        True
        False
    """

    def __init__(self, path: Path, job: str = "") -> None:
        self.path, self.job = path, job
        self._descriptor = -1
        self._has_flock = True
        self._created: list[Path] = []

    def __enter__(self) -> OutputLock:
        """Take the lock."""
        folders = (self.path.parent, *self.path.parent.parents)
        self._created = [folder for folder in folders if not folder.exists()]
        try:
            self._acquire()
        except BaseException:
            self._remove_folders()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release the lock; its last holder deletes the file."""
        owner = LockOwner.read(self.path)
        is_last = try_flock(self._descriptor) if self._has_flock else owner == LockOwner.this_process(self.job)
        if is_last and _is_open_file(self._descriptor, self.path):
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._remove_folders()

    def is_shared(self) -> bool:
        """Return whether another process of the job holds the lock now; true where that cannot be known."""
        if not self.job or not self._has_flock:
            return self.job != ""
        # A failed exclusive attempt gives up the shared lock.
        is_alone = try_flock(self._descriptor)
        while not try_flock(self._descriptor, shared=True):
            time.sleep(RETRY_SECONDS)
        return not is_alone

    def _acquire(self) -> None:
        for attempt in range(MAX_RETRIES):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                # Another process has removed the folder that it created; if not, the path is none that can be written.
                if attempt == MAX_RETRIES - 1:
                    raise
                continue
            try:
                if self._try():
                    return
            except BaseException:
                os.close(self._descriptor)
                raise
            owner = LockOwner.read(self.path)
            os.close(self._descriptor)
            is_job = owner is not None and self.job != "" and owner.job == self.job
            if owner is not None and not is_job and owner.is_alive():
                raise self._in_use(owner)
            # The lock is being taken or released, or its first holder has ended before others of its job.
            time.sleep(RETRY_SECONDS)
        raise self._in_use(None)

    def _try(self) -> bool:
        """Try to lock the open file."""
        locked = try_flock(self._descriptor)
        if locked is None:
            return self._try_without_flock()
        if locked:
            if not _is_open_file(self._descriptor, self.path):
                return False
            self._write_owner()
            if not self.job:
                return True
        owner = LockOwner.read(self.path)
        if not self.job or owner is None or owner.job != self.job:
            return False
        # Between two locks the file may have become another job's, or been deleted.
        return bool(
            try_flock(self._descriptor, shared=True)
            and LockOwner.read(self.path) == owner
            and _is_open_file(self._descriptor, self.path)
        )

    def _try_without_flock(self) -> bool:
        """Take the lock by writing it, and verify that no other process has written it at the same time."""
        self._has_flock = False
        owner = LockOwner.read(self.path)
        if owner is not None and owner.is_alive():
            return bool(self.job) and owner.job == self.job
        self._write_owner()
        time.sleep(RETRY_SECONDS)
        return LockOwner.read(self.path) == LockOwner.this_process(self.job)

    def _write_owner(self) -> None:
        content = json.dumps(asdict(LockOwner.this_process(self.job))).encode()
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.write(self._descriptor, content)

    def _in_use(self, owner: LockOwner | None) -> RuntimeError:
        is_folder = self.path.name == LOCK_NAME
        output = self.path.parent if is_folder else self.path.with_name(self.path.name[1:].removesuffix(LOCK_NAME))
        process = f"process {owner.pid}" if owner else "another process"
        if owner and owner.host != socket.gethostname():
            process += f" on {owner.host}"
        advice = "wait until it has ended, or " + ("use another folder" if is_folder else "write elsewhere")
        if not self._has_flock:
            advice += f"; if it has ended, delete {self.path}"
        return RuntimeError(f"{output} is in use by {process}; {advice}")

    def _remove_folders(self) -> None:
        with contextlib.suppress(OSError):
            for folder in self._created:
                folder.rmdir()


def _start_time(pid: int) -> str:
    """Return when a process of this machine started, in ticks since the machine did; empty where that is unknown."""
    try:
        # The second entry, the program's name, may contain spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_open_file(descriptor: int, path: Path) -> bool:
    """Return whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
