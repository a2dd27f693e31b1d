"""Temporary folders of servers: those of killed ones are removed, those of running ones stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ddim.app import folders
from ddim.app.folders import SETTLING_SECONDS, is_abandoned, server_folder

# The module alone: the package imports PyTorch.
HOLD = f"""
import runpy, time
with runpy.run_path({folders.__file__!r})["server_folder"]() as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_only_folders_of_killed_servers_are_removed(temporary: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(temporary)}
        )
        for _ in range(2)
    ]
    try:
        held = []
        for process in processes:
            assert process.stdout is not None
            held.append(Path(process.stdout.readline().strip()))
            (held[-1] / "upload.png").write_text("an upload")
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        with server_folder() as own:
            assert not held[0].exists()
            assert (held[1] / "upload.png").exists()
            assert not is_abandoned(own)
        assert not own.exists()
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_folder_without_a_lock_is_removed_once_it_is_old(temporary: Path) -> None:
    folder = temporary / "ddim-app-starting"
    folder.mkdir()
    assert not is_abandoned(folder)
    old = folder.stat().st_mtime - SETTLING_SECONDS - 1
    os.utime(folder, (old, old))
    assert is_abandoned(folder)


def test_links_and_files_are_left_alone(temporary: Path) -> None:
    target = temporary / "mine"
    target.mkdir()
    os.utime(target, (0, 0))
    (temporary / "ddim-app-link").symlink_to(target)
    (temporary / "ddim-app-file").write_text("mine")
    with server_folder():
        assert target.exists()
        assert (temporary / "ddim-app-link").exists()
        assert (temporary / "ddim-app-file").exists()
