"""Checkpoints: written whole or not at all, whenever the process dies and however full the disk is; read only if they
are what was written, without running code; and never replaced by something worse.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from ddim.io.atomic import replace_folder
from ddim.training.checkpoint import clean, load_checkpoint, load_newest, save_checkpoint
from ddim.training.config import TrainConfig
from ddim.training.run import train

FILES = ("SHA256SUMS", "ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json")


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def tensors(step: int) -> dict[str, dict[str, Tensor]]:
    weights = torch.full((50,), float(step))
    return {
        "model": {"a.weight": weights, "b": torch.tensor(step)},
        "ema": {"a.weight": weights / 2, "b": torch.tensor(step)},
        "optimizer": {"0.exp_avg": weights * 3, "0.step": torch.tensor(float(step))},
    }


def state(step: int) -> dict[str, Any]:
    return {"averaged": step, "records": [[0.5, step, [1.0], [2.0]]], "scaler": {}}


def save(folder: Path, *steps: int, keep: int = 10, keep_every: int = 0) -> list[Path]:
    return [save_checkpoint(folder, step, tensors(step), state(step), keep, keep_every) for step in steps]


def is_of(step: int, loaded: Any) -> bool:
    """Whether a loaded checkpoint is, to the bit, what `save` wrote of a step."""
    expected = tensors(step)
    return (
        (loaded.step, loaded.state) == (step, state(step))
        and loaded.tensors.keys() == expected.keys()
        and all(loaded.tensors[name].keys() == part.keys() for name, part in expected.items())
        and all(
            torch.equal(loaded.tensors[name][key], tensor) and loaded.tensors[name][key].dtype == tensor.dtype
            for name, part in expected.items()
            for key, tensor in part.items()
        )
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- writing and reading


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    assert load_newest(folder) is None
    (path,) = save(folder, 7)
    assert path == folder / "step-00000007"
    assert names(path) == sorted(FILES)
    assert is_of(7, load_checkpoint(path))
    assert is_of(7, load_newest(folder))
    # Not by our own functions alone.
    assert torch.equal(load_file(path / "ema.safetensors")["a.weight"], torch.full((50,), 3.5))
    assert json.loads((path / "state.json").read_text()) == {"step": 7, **state(7)}


def test_tensors_of_every_kind_are_saved(tmp_path: Path) -> None:
    weights = torch.randn(4, 3, 5, 5, requires_grad=True)
    content = {
        "model": {"w": weights, "channels last": weights.to(memory_format=torch.channels_last), "half": weights.half()},
        "ema": {"transposed": weights.transpose(0, 1)},
        "optimizer": {},
    }
    path = save_checkpoint(tmp_path, 1, content, {}, keep=1)
    loaded = load_checkpoint(path)
    for name, part in content.items():
        assert loaded.tensors[name].keys() == part.keys()
        for key, tensor in part.items():
            assert torch.equal(loaded.tensors[name][key], tensor.detach())


def test_sha256sum_accepts_a_checkpoint_and_no_other(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 3)
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    good = subprocess.run(command, cwd=path, capture_output=True, text=True)
    assert good.returncode == 0
    assert good.stdout.splitlines() == [f"{name}: OK" for name in sorted(FILES) if name != "SHA256SUMS"]
    with (path / "ema.safetensors").open("ab") as file:
        file.write(b"\0")
    assert subprocess.run(command, cwd=path, capture_output=True).returncode == 1
    with pytest.raises(ValueError, match="its files are not those that SHA256SUMS tells"):
        load_checkpoint(path)


def test_the_newest_is_that_of_the_largest_step(tmp_path: Path) -> None:
    save(tmp_path, 99_999_999, 100_000_000, 5)
    (tmp_path / "step-200000000").write_text("")
    for name in ("step-7", "step-00000300.pt", "step-1000000000x", "steps"):
        (tmp_path / name).mkdir()
    assert is_of(100_000_000, load_newest(tmp_path))


# --- which are kept


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    (tmp_path / "notes.txt").write_text("stays")
    save(tmp_path, 1, 2, 3, 4, 5, keep=keep)
    assert names(tmp_path) == ["notes.txt", *(f"step-{step:08d}" for step in range(6 - keep, 6))]


def test_multiples_are_kept_besides(tmp_path: Path) -> None:
    save(tmp_path, *range(5, 65, 5), keep=2, keep_every=20)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (20, 40, 55, 60)]
    assert is_of(20, load_checkpoint(tmp_path / "step-00000020"))


def test_an_unreadable_later_one_does_not_push_out_the_good(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, later = save(tmp_path, 10, 20)
    (later / "state.json").write_text("{}")
    save(tmp_path, 15, keep=1)
    assert names(tmp_path) == ["step-00000015", "step-00000020"]
    assert is_of(15, load_newest(tmp_path))
    save(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["step-00000020"]
    caplog.clear()
    assert is_of(20, load_newest(tmp_path))
    assert not caplog.records


# --- damage


def check_refused(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The newest checkpoint cannot be loaded, and the one of step 1 is found in its place, with one line."""
    with pytest.raises(ValueError, match="damaged or not whole") as refusal:
        load_checkpoint(path)
    caplog.clear()
    assert is_of(1, load_newest(path.parent))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"{refusal.value}; it is skipped"
    assert str(path) in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("name", FILES)
def test_no_damage_gets_through(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    path = save(tmp_path, 1, 2)[1]
    file, chance = path / name, random.Random(name)
    content = file.read_bytes()
    for case in range(40):
        if case % 2:
            damaged = bytearray(content)
            for _ in range(chance.choice([1, 1, 10])):
                damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        else:
            damaged = bytearray(content[: 0 if case == 0 else chance.randrange(len(content))])
        file.write_bytes(damaged)
        check_refused(path, caplog)
    file.write_bytes(content)
    assert is_of(2, load_newest(tmp_path))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_or_another_one_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    older, path = save(tmp_path, 1, 2)
    file = path / name
    content = file.read_bytes()
    file.unlink()
    check_refused(path, caplog)
    file.mkdir()
    check_refused(path, caplog)
    file.rmdir()
    file.write_bytes((older / name).read_bytes())
    check_refused(path, caplog)
    file.write_bytes(content)
    for added in ("model.safetensors.bak", ".hidden", "folder"):
        (path / added).mkdir() if added == "folder" else (path / added).write_bytes(b"")
        check_refused(path, caplog)
        (path / added).rmdir() if added == "folder" else (path / added).unlink()
    assert is_of(2, load_newest(tmp_path))


def test_an_empty_folder_and_none_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000002").mkdir()
    check_refused(tmp_path / "step-00000002", caplog)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*step-00000003"):
        load_checkpoint(tmp_path / "step-00000003")


def test_where_none_is_whole_there_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in save(tmp_path, 1, 2):
        (path / "SHA256SUMS").write_text("")
    assert load_newest(tmp_path) is None
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


@pytest.mark.parametrize("written", [pickle.dump, torch.save], ids=["pickle", "torch"])
@pytest.mark.parametrize("signed", [False, True])
def test_code_in_a_checkpoint_does_not_run(
    tmp_path: Path, written: Any, signed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even where the checksums are right."""
    folder = tmp_path / "checkpoints"
    path = save(folder, 1, 2)[1]
    for name in FILES[1:]:
        content = (path / name).read_bytes()
        with (path / name).open("wb") as file:
            written({"step": 2, "w": Malicious(tmp_path / "has-run")}, file)
        if signed:
            sums = subprocess.run(["sha256sum", *FILES[1:]], cwd=path, capture_output=True, check=True).stdout
            (path / "SHA256SUMS").write_bytes(sums)
        check_refused(path, caplog)
        (path / name).write_bytes(content)
    assert names(tmp_path) == ["checkpoints"]


# --- processes that die


CALLS = ("fsync", "rename", "unlink", "rmdir")


def die_before_call(number: int, action: Callable[[], Any]) -> bool:
    """Call a function in a process that is killed just before its `number`-th call that touches the disk; whether it
    came to that.
    """
    child = os.fork()
    if child == 0:
        left = number

        def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **named: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **named)

            return counted

        for name in CALLS:
            setattr(os, name, deadly(getattr(os, name)))
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("step", "keep"), [(3, 1), (2, 2)])
def test_death_at_any_moment_leaves_whole_checkpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, step: int, keep: int
) -> None:
    moment, died, found = 0, True, []
    while died:
        moment += 1
        folder = tmp_path / str(moment)
        save(folder, 1, 2)
        died = die_before_call(moment, lambda folder=folder: save(folder, step, keep=keep))
        newest = load_newest(folder)
        assert newest is not None
        assert is_of(newest.step, newest)
        found.append(newest.step)
        clean(folder)
        assert all(name.startswith("step-") for name in names(folder))
        save(folder, step, keep=keep)
        assert names(folder) == [f"step-{n:08d}" for n in range(step - keep + 1, step + 1)]
    assert moment > 8
    # A folder that is replaced is away for a moment, in which the one before counts.
    assert set(found) == ({2, 3} if step == 3 else {1, 2})
    assert found[0] == 2
    assert found[-1] == step
    assert not caplog.records


def test_what_dead_processes_left_is_cleaned(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "notes.txt").write_text("stays")
    for name in (".step-00000002-a1b2", ".step-00000002-a1b2-old", ".deleted-step-00000000"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    clean(tmp_path)
    assert names(tmp_path) == ["notes.txt", "step-00000001"]
    clean(tmp_path / "missing")


# --- folders that are replaced


def test_a_folder_is_replaced_with_all_its_files(tmp_path: Path) -> None:
    path = tmp_path / "a" / "folder"
    for content in ("old", "new"):
        with replace_folder(path) as temporary:
            assert temporary.parent == path.parent
            (temporary / "sub").mkdir()
            (temporary / "sub" / content).write_text(content)
    assert names(path) == ["sub"]
    assert names(path / "sub") == ["new"]
    assert names(path.parent) == ["folder"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_folder_stays_where_its_replacement_fails(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")

    def fail() -> None:
        with replace_folder(tmp_path / "folder") as temporary:
            (temporary / "new").write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["old"]


def test_a_folder_stays_where_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    rename = os.rename

    def fail(source: Any, target: Any, **named: Any) -> None:
        if (Path(source) / "new").exists():
            raise OSError("the disk is gone")
        rename(source, target, **named)

    monkeypatch.setattr("os.rename", fail)
    with pytest.raises(OSError, match="the disk is gone"), replace_folder(tmp_path / "folder") as temporary:
        (temporary / "new").write_text("new")
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["old"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        (path,) = save(tmp_path / "checkpoints", 1)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~umask}


# --- a full disk


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file can grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1, 200, 500, 10_000, 40_000, 80_000])
@pytest.mark.parametrize("step", [2, 3])
def test_a_write_that_fails_leaves_those_that_are_there(tmp_path: Path, size: int, step: int) -> None:
    save(tmp_path, 1, 2)
    # Of growing size: each limit stops another file. The small ones are those of the sums and of the state.
    content = {
        name: {"w": torch.zeros(length)} for name, length in {"model": 100, "ema": 5000, "optimizer": 15_000}.items()
    }
    large = {"records": list(range(10_000))}
    with files_up_to(size), pytest.raises(OSError, match=r"File too large|os error 27"):
        save_checkpoint(tmp_path, step, content, large, keep=1)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert is_of(2, load_newest(tmp_path))


def disk_size(folder: Path) -> int:
    """Bytes that a folder takes, in pages."""
    return sum(path.stat().st_size // 4096 * 4096 + 4096 for path in folder.rglob("*"))


def small_disk(folder: Path) -> list[str] | None:
    """What runs a command where file systems can be mounted that nobody else sees; `None` where that is not allowed."""
    for prefix in (["unshare", "--mount", "--map-root-user"], ["unshare", "--mount"]):
        if shutil.which("unshare"):
            command = [*prefix, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
            if subprocess.run(command, capture_output=True).returncode == 0:
                return prefix
    return None


ON_A_SMALL_DISK = """
size=$1 disk=$2 kept=$3
shift 3
mount -t tmpfs -o size="$size" tmpfs "$disk" && cp -R "$kept/." "$disk" || exit 99
"$@"
status=$?
rm -rf "$kept" && cp -R "$disk" "$kept" || exit 98
exit $status
"""

WITH_SMALL_FILES = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_a_run_on_a_full_disk_ends_in_one_line_and_goes_on_when_there_is_room(
    make_config: Callable[..., TrainConfig], pictures: Path, tmp_path: Path
) -> None:
    config = make_config(checkpoints={"every": 3}, log_every=2)
    straight, out = tmp_path / "straight", tmp_path / "run"
    train(config, straight, "cpu")
    train(config.model_copy(update={"max_steps": 6}), out, "cpu")
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [str(Path(sys.executable).parent / "ddim"), "train", "--config", str(file), "--device", "cpu", "--out"]
    checkpoint = out / "checkpoints" / "step-00000006"
    before = {path: path.read_bytes() for path in (out / "checkpoints").rglob("*.*")}

    disk = tmp_path / "disk"
    disk.mkdir()
    prefix = small_disk(disk)
    if prefix is not None:
        # Room for what is there and for half a checkpoint.
        size = disk_size(out) + disk_size(checkpoint) // 2
        arguments = ["sh", "-c", ON_A_SMALL_DISK, "sh", str(size), str(disk), str(out), *command, str(disk)]
        told = "No space left on device"
    else:
        prefix = [sys.executable]
        size = (checkpoint / "model.safetensors").stat().st_size * 3 // 2
        arguments = ["-c", WITH_SMALL_FILES, str(size), *command, str(out)]
        told = "File too large"
    done = subprocess.run(
        [*prefix, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("ddim: ")]
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert told in lines[-1]
    assert "step-00000009" in lines[-1]
    assert names(out / "checkpoints") == ["step-00000003", "step-00000006"]
    assert {path: path.read_bytes() for path in (out / "checkpoints").rglob("*.*")} == before

    train(config, out, "cpu")
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        ours, theirs = (folder / "checkpoints" / "step-00000012" / name for folder in (out, straight))
        assert ours.read_bytes() == theirs.read_bytes()
    assert (out / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
