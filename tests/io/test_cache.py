"""The cache: what it keeps, and that nothing about it fails a command or is believed."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddim.io import cache as cache_module
from ddim.io.cache import STALE_SECONDS, Cache, cache_folder
from helpers import file_names
from programs import Program, run_python

CONTENT = b"content" * 100


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "ddim"


@pytest.fixture
def cache(root: Path) -> Cache:
    """A cache with one entry, a/b."""
    cache = Cache("kernels")
    assert cache.write("a/b", [CONTENT[:50], CONTENT[50:]])
    return cache


def read(cache: Cache) -> bytes | None:
    return cache.read("a/b", bytes)


class TestEntries:
    def test_round_trip(self, cache: Cache, root: Path) -> None:
        assert read(cache) == CONTENT
        assert file_names(root / "kernels" / "a") == ["b"]
        assert cache.write("a/b", [b"other"])
        assert read(cache) == b"other"

    def test_content_is_mapped_copy_on_write(self, cache: Cache) -> None:
        content = cache.read("a/b", lambda content: content)
        assert content is not None
        content[:] = 0
        assert read(cache) == CONTENT

    def test_missing_entry_is_silent(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert Cache("kernels").read("a", bytes) is None
        assert not Cache("kernels").exists("a")
        assert caplog.messages == []
        assert not root.exists()

    @pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
    def test_entries_are_private(self, root: Path, umask: int) -> None:
        previous = os.umask(umask)
        try:
            assert Cache("kernels").write("a/b", [CONTENT])
        finally:
            os.umask(previous)
        assert read(Cache("kernels")) == CONTENT
        folders = (root, root / "kernels", root / "kernels" / "a")
        assert [path.stat().st_mode & 0o777 for path in folders] == [0o700] * 3
        assert (root / "kernels" / "a" / "b").stat().st_mode & 0o777 == 0o600

    def test_interrupted_write_leaves_nothing(self, cache: Cache, root: Path) -> None:
        def chunks() -> Any:
            yield b"part"
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cache.write("a/b", chunks())
        assert read(cache) == CONTENT
        assert file_names(root / "kernels" / "a") == ["b"]

    def test_leftovers_of_killed_processes_are_removed(self, cache: Cache, root: Path) -> None:
        old, young = (root / "kernels" / "a" / name for name in (".b-killed", ".b-written"))
        for path in (old, young):
            path.touch()
        os.utime(old, (0, time.time() - STALE_SECONDS - 1))
        assert cache.write("a/c", [CONTENT])
        assert file_names(root / "kernels" / "a") == [".b-written", "b", "c"]

    def test_processes_write_at_once(self, root: Path) -> None:
        program = (
            "from ddim.io.cache import Cache\n"
            f"for _ in range(50): assert Cache('kernels').write('a/b', [{CONTENT!r}])\n"
            f"assert Cache('kernels').read('a/b', bytes) == {CONTENT!r}"
        )
        with Program(program, env=os.environ) as first, Program(program, env=os.environ) as second:
            assert [process.communicate()[1] for process in (first, second)] == ["", ""]
        assert file_names(root / "kernels" / "a") == ["b"]


def _as_other_entry(path: Path) -> None:
    path.write_bytes(path.with_name("c").read_bytes())


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "checksum alone": lambda path: path.write_bytes(path.read_bytes()[:32]),
    "extended": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "garbage": lambda path: path.write_bytes(bytes(range(256))),
    "flipped bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"u"),
    "another entry": _as_other_entry,
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "link": lambda path: (path.rename(path.with_name("d")), path.symlink_to("d")),
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
    def test_is_reported_once_and_replaced(
        self, cache: Cache, root: Path, damage: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        path = root / "kernels" / "a" / "b"
        cache.write("a/c", [b"other"])
        damage(path)
        assert read(cache) is None
        assert read(cache) is None
        assert len(caplog.records) == 1
        assert caplog.records[0].levelno == logging.WARNING
        assert caplog.messages[0].startswith(f"the cached kernels in {root / 'kernels'} are not used: ")
        if not path.is_dir():
            assert cache.write("a/b", [CONTENT])
            assert read(cache) == CONTENT

    @pytest.mark.parametrize("error", [ValueError, KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError])
    def test_unexpected_content(
        self, cache: Cache, root: Path, error: type[Exception], caplog: pytest.LogCaptureFixture
    ) -> None:
        def parse(content: np.ndarray) -> None:
            raise error("shape")

        assert cache.read("a/b", parse) is None
        path = root / "kernels" / "a" / "b"
        assert caplog.messages[0].endswith(f"{path} holds something else: {error.__name__}: {error('shape')}")


class TestOwner:
    """As ssh: entries that another user could have written are not read."""

    @pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
    @pytest.mark.parametrize("folder", [".", "kernels", "kernels/a"])
    def test_folder_that_others_may_write(
        self, cache: Cache, root: Path, folder: str, mode: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        (root / folder).chmod(mode)
        assert read(cache) is None
        assert not cache.write("a/b", [CONTENT])
        assert not cache.is_usable("a/b")
        assert len(caplog.messages) == 1
        assert f"{(root / folder).resolve()} can be written by other users; delete it" in caplog.messages[0]

    @pytest.mark.parametrize("mode", [0o622, 0o606])
    def test_file_that_others_may_write(self, cache: Cache, root: Path, mode: int) -> None:
        (root / "kernels" / "a" / "b").chmod(mode)
        assert read(cache) is None
        assert cache.write("a/b", [CONTENT])
        assert read(cache) == CONTENT

    def test_folder_above_that_everyone_may_write(self, cache: Cache, root: Path) -> None:
        root.parent.chmod(0o777)
        assert read(cache) is None
        root.parent.chmod(0o1777)
        assert read(cache) == CONTENT
        root.parent.chmod(0o775)
        assert read(cache) == CONTENT

    @pytest.mark.parametrize("owned", [".", "kernels", "kernels/a", "kernels/a/b"])
    def test_other_owner(self, cache: Cache, root: Path, owned: str, monkeypatch: pytest.MonkeyPatch) -> None:
        path = root / owned
        if os.geteuid() == 0:
            os.chown(path, 12345, -1)
        else:
            # Whoever this is, the cache belongs to someone else.
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
        assert read(cache) is None

    def test_link_out_of_the_cache(self, cache: Cache, root: Path, tmp_path: Path) -> None:
        """A folder that is a link is judged by the folder that it leads to."""
        (root / "kernels" / "a").rename(tmp_path / "elsewhere")
        (root / "kernels" / "a").symlink_to(tmp_path / "elsewhere")
        assert read(cache) == CONTENT
        tmp_path.chmod(0o777)
        assert read(cache) is None


class TestUnwritable:
    def test_file_where_the_folder_should_be(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        cache = Cache("features")
        assert read(cache) is None
        assert not cache.write("a", [CONTENT])
        assert not cache.is_usable("a/b")
        assert cache.free_bytes() > 0
        assert caplog.messages == [f"the cached features in {cache.folder} are not used: not a directory"]

    @pytest.mark.parametrize("given", ["", "relative/path", None])
    def test_no_home_folder(
        self, given: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        if given is None:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", given)
        monkeypatch.setattr(Path, "home", no_home)
        monkeypatch.setattr(cache_module, "_warned", set())
        cache = Cache("features")
        assert cache_folder() is None
        assert read(cache) is None
        assert not cache.exists("a")
        assert cache.free_bytes() == 0
        for _ in range(2):
            assert not cache.write("a", [CONTENT])
        assert caplog.messages == [
            "the cached features are not used: this user has no home folder, and XDG_CACHE_HOME is not set"
        ]

    def test_full_disk(self, root: Path) -> None:
        """A limit on the size of files stands for a disk that is full."""
        program = (
            "import json, resource\n"
            "from ddim.io.cache import Cache\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "cache = Cache('features')\n"
            "print(json.dumps([cache.write('a', [bytes(10)]), cache.write('b', [bytes(10000)])]))"
        )
        done = run_python(program)
        assert json.loads(done.stdout) == [True, False]
        assert done.stderr == f"the cached features in {root / 'features'} are not used: file too large\n"
        assert file_names(root / "features") == ["a"]

    @pytest.mark.skipif(os.geteuid() != 0, reason="requires another user to become")
    def test_unreadable_cache(self, cache: Cache, root: Path) -> None:
        program = (
            "import os\n"
            "from ddim.io.cache import Cache\n"
            "os.setuid(12345)\n"
            "cache = Cache('kernels')\n"
            "assert cache.read('a/b', bytes) is None\n"
            "assert not cache.exists('a/b') and not cache.is_usable('a/b') and not cache.write('a/b', [b'x'])"
        )
        done = run_python(program)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("\n") == 1
        assert "are not used: permission denied" in done.stderr
