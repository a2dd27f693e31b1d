"""Locks of outputs: one process or job at a time, dead processes block nobody, with and without `flock`."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from ddim.io import locks
from ddim.io.locks import LOCK_NAME, LockOwner, OutputLock

FORK = multiprocessing.get_context("fork")


@pytest.fixture(params=["flock", "without flock"])
def flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Test the kernel's locks, and a file system that has none."""
    if request.param != "flock":

        def refuse(descriptor: int, operation: int) -> None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(locks.fcntl, "flock", refuse)
    return str(request.param)


def hold(path: Path, job: str, held: Any, release: Any) -> None:
    with OutputLock(path, job):
        held.set()
        release.wait(60)


class Holder:
    """Another process that holds a lock."""

    def __init__(self, path: Path, job: str = "") -> None:
        self.held, self.release = FORK.Event(), FORK.Event()
        self.process = FORK.Process(target=hold, args=(path, job, self.held, self.release))
        self.process.start()
        assert self.held.wait(60)

    def end(self, kill: bool = False) -> None:
        if kill:
            self.process.kill()  # and leave the event alone: it waits for the process that waited
        else:
            self.release.set()
        self.process.join()


@pytest.mark.parametrize("name", ["run/.lock", ".x.npz.lock"])
def test_second_process_is_refused(tmp_path: Path, name: str, flock: str) -> None:
    holder = Holder(tmp_path / name)
    subject = tmp_path / ("run" if name == "run/.lock" else "x.npz")
    with pytest.raises(RuntimeError, match="is in use by process") as caught, OutputLock(tmp_path / name):
        pytest.fail("the lock is held")
    assert str(caught.value).startswith(f"{subject} is in use by process {holder.process.pid}; wait until it has ended")
    holder.end()
    with OutputLock(tmp_path / name):
        pass
    assert not list(tmp_path.iterdir())


def test_killed_process_does_not_block(tmp_path: Path, flock: str) -> None:
    path = tmp_path / "run" / LOCK_NAME
    Holder(path).end(kill=True)
    assert path.exists()
    with OutputLock(path):
        owner = LockOwner.read(path)
        assert owner is not None
        assert owner.pid == os.getpid()
    assert not path.exists()


def test_process_with_the_number_of_a_dead_one_does_not_block(tmp_path: Path, flock: str) -> None:
    path = tmp_path / LOCK_NAME
    mine = LockOwner.this_process("")
    path.write_text(json.dumps({"pid": os.getpid(), "host": mine.host, "started": "1", "job": ""}))
    with OutputLock(path):
        assert LockOwner.read(path) == mine


def test_process_of_another_machine_blocks_without_flock(tmp_path: Path, flock: str) -> None:
    path = tmp_path / LOCK_NAME
    path.write_text(json.dumps({"pid": 7, "host": "elsewhere", "started": "1", "job": ""}))
    if flock == "flock":
        with OutputLock(path):
            pass
        return
    with (
        pytest.raises(RuntimeError, match=rf"process 7 on elsewhere; .*; if it has ended, delete {path}"),
        OutputLock(path),
    ):
        pytest.fail("that process may run")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff\xfe"])
def test_damaged_file_does_not_block(tmp_path: Path, content: bytes, flock: str) -> None:
    path = tmp_path / LOCK_NAME
    path.write_bytes(content)
    with OutputLock(path):
        assert LockOwner.read(path) == LockOwner.this_process("")
    assert not path.exists()


def test_processes_of_one_job_share_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "run" / LOCK_NAME
    holder = Holder(path, "job 1")
    for job in ("", "job 2"):
        with pytest.raises(RuntimeError, match=f"in use by process {holder.process.pid}"), OutputLock(path, job):
            pytest.fail("another job holds the lock")
    with OutputLock(path, "job 1") as lock:
        assert lock.is_shared()
        # The lock outlives the process that its file names, and other jobs are still refused.
        holder.end(kill=True)
        assert not lock.is_shared()
        with pytest.raises(RuntimeError, match="is in use by another process"), OutputLock(path):
            pytest.fail("the job holds the lock")
    assert not path.exists()


def acquire_often(path: Path, log: Path, job: str) -> None:
    for _ in range(100):
        try:
            with OutputLock(path, job):
                with log.open("a") as file:
                    file.write("in\n")
                with log.open("a") as file:
                    file.write("out\n")
        except RuntimeError:
            pass


def test_at_most_one_process_holds_the_lock(tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [FORK.Process(target=acquire_often, args=(tmp_path / "run" / LOCK_NAME, log, "")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    lines = log.read_text().splitlines()
    assert lines == ["in", "out"] * (len(lines) // 2)
    assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_folders_that_hold_files_stay(tmp_path: Path) -> None:
    with OutputLock(tmp_path / "a/b" / LOCK_NAME):
        (tmp_path / "a/notes.txt").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["notes.txt"]
