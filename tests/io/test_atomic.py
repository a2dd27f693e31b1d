"""Atomic writes: replacement, failures half-way, permissions."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from ddim.io import atomic
from ddim.io.atomic import atomic_write, is_vacant, write_folder
from ddim.io.locks import try_flock
from ddim.pipeline import DDIMPipeline


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return the bytes of all files by relative path, `None` for folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_atomic_write_replaces_a_file(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    for content in ("one", "two"):
        with atomic_write(target) as path:
            path.write_text(content)
            assert path.parent == tmp_path
            assert path.suffix == ".txt"
            assert not target.exists() or target.read_text() == "one"
        assert contents(tmp_path) == {"file.txt": content.encode()}


def write_and_fail(writer: AbstractContextManager[Path], error: type[BaseException]) -> None:
    with writer as path:
        for target in (path / "a.txt", path / "b.txt") if path.is_dir() else (path,):
            target.write_text("new")
        raise error


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_failed_atomic_write_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "file.txt").write_text("old")
    for name in ("file.txt", "other.txt"):
        with pytest.raises(error):
            write_and_fail(atomic_write(tmp_path / name), error)
    assert contents(tmp_path) == {"file.txt": b"old"}


@pytest.mark.parametrize("taken", ["locked", "deleted", "locked and deleted"])
def test_file_that_another_process_takes_for_a_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    """It looks for leftovers between the creation of a temporary file and its lock."""
    first: list[Path] = []

    def lock(descriptor: int) -> bool | None:
        if first:
            return try_flock(descriptor)
        first.extend(tmp_path.glob(".writing-*"))
        if "deleted" in taken:
            first[0].unlink()
        return False if "locked" in taken else try_flock(descriptor)

    monkeypatch.setattr(atomic, "try_flock", lock)
    with atomic_write(tmp_path / "file.txt") as path:
        path.write_text("content")
        assert path != first[0]
    assert contents(tmp_path) == {"file.txt": b"content"}


def test_atomic_write_requires_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "missing/file.txt"):
        pytest.fail("there is nothing to write to")


def test_write_folder_keeps_other_files(tmp_path: Path) -> None:
    target = tmp_path / "deep/folder"
    with write_folder(target) as path:
        (path / "a.txt").write_text("one")
    with write_folder(target) as path:
        (path / "sub").mkdir()
        for name in ("a.txt", "sub/b.txt"):
            (path / name).write_text("two")
        assert (target / "a.txt").read_text() == "one"
    assert contents(target) == {"a.txt": b"two", "sub": None, "sub/b.txt": b"two"}


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_failed_write_folder_keeps_the_old_files(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(error):
        write_and_fail(write_folder(tmp_path), error)
    assert contents(tmp_path) == {"a.txt": b"old"}


@pytest.mark.skipif(os.name == "nt", reason="no umask on Windows")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask(tiny_pipeline: DDIMPipeline, tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        tiny_pipeline.save_pretrained(tmp_path / "model")
        with atomic_write(tmp_path / "file.txt") as path:
            path.write_text("new")
        with write_folder(tmp_path / "folder") as path:
            (path / "sub").mkdir()
            (path / "sub/file.txt").write_text("new")
    finally:
        os.umask(old)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def write_and_wait(path: Path, started: Any, proceed: Any) -> None:
    with write_folder(path) if path.suffix == "" else atomic_write(path) as temporary:
        (temporary if temporary.is_file() else temporary / "a.txt").write_text("new")
        started.set()
        proceed.wait(60)


@pytest.mark.parametrize("name", ["file.txt", "folder"])
def test_leftovers_of_killed_processes_are_removed(tmp_path: Path, name: str) -> None:
    """Those of running processes stay, and so do files of others."""
    context = multiprocessing.get_context("fork")
    started, proceed = context.Event(), context.Event()
    killed = context.Process(target=write_and_wait, args=(tmp_path / name, started, proceed))
    killed.start()
    assert started.wait(60)
    leftovers = list(tmp_path.rglob(".writing-*"))
    assert len(leftovers) == 1
    if name == "file.txt":
        with atomic_write(tmp_path / name) as path:
            path.write_text("new")
        assert leftovers[0].exists()
    else:
        with pytest.raises(RuntimeError, match=f"in use by process {killed.pid}"), write_folder(tmp_path / name):
            pytest.fail("another process writes the folder")
    killed.kill()
    killed.join()
    (tmp_path / ".writing-mine.txt").touch()
    with write_folder(tmp_path / name) if name == "folder" else atomic_write(tmp_path / name) as path:
        (path / "a.txt" if name == "folder" else path).write_text("newer")
    files = {"file.txt": b"newer"} if name == "file.txt" else {"folder": None, "folder/a.txt": b"newer"}
    assert contents(tmp_path) == {".writing-mine.txt": b"", **files}


def save_and_be_killed(pipe: DDIMPipeline, folder: Path, num_files: int) -> None:
    """Save a pipeline; as soon as so many files have moved into the folder, end as SIGKILL ends a process."""
    publish = atomic._publish
    published = []

    def publish_or_die(temporary: Path, path: Path, mode: int | None = None) -> None:
        if atomic.TEMPORARY_PREFIX not in str(path):
            if len(published) == num_files:
                os.kill(os.getpid(), signal.SIGKILL)
            published.append(path)
        publish(temporary, path, mode)

    atomic._publish = publish_or_die
    pipe.save_pretrained(folder)


@pytest.mark.parametrize("num_files", [0, 1, 3])
def test_folder_of_a_killed_process_is_vacant(tiny_pipeline: DDIMPipeline, tmp_path: Path, num_files: int) -> None:
    folder, context = tmp_path / "model", multiprocessing.get_context("fork")
    killed = context.Process(target=save_and_be_killed, args=(tiny_pipeline, folder, num_files))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    files = [path for path in folder.rglob("*") if path.is_file() and atomic.TEMPORARY_PREFIX not in str(path)]
    assert len([path for path in files if path.name != ".lock"]) == num_files
    assert is_vacant(folder)
    tiny_pipeline.save_pretrained(folder)
    assert not is_vacant(folder)
    tiny_pipeline.save_pretrained(tmp_path / "uninterrupted")
    assert contents(folder) == contents(tmp_path / "uninterrupted")


def test_folders_of_others_are_not_vacant(tmp_path: Path) -> None:
    assert is_vacant(tmp_path / "missing")
    assert is_vacant(tmp_path)
    (tmp_path / ".lock").touch()
    (tmp_path / ".writing-notes-abcdefgh.txt").touch()
    assert is_vacant(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert not is_vacant(tmp_path)
    assert not is_vacant(tmp_path / "notes.txt")


def test_long_names(tmp_path: Path) -> None:
    for target in (tmp_path / ("x" * 251 + ".png"), tmp_path / ("ä" * 120 + ".png")):
        with atomic_write(target) as path:
            path.write_text("new")
        assert target.read_text() == "new"
