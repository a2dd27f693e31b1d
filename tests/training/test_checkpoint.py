"""Checkpoints: written atomically, whenever the process is killed and however full the disk is; read only if they match
their checksums, without running code; never replaced by a damaged one.
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
from ddim.training.checkpoint import TENSOR_FILES, load_checkpoint, load_newest, remove_partial, save_checkpoint
from ddim.training.config import TrainConfig
from ddim.training.run import train
from helpers import BIN, environment, file_names, messages

FILES = (
    *("SHA256SUMS", "averages.safetensors", "optimizer.safetensors", "state.json"),
    *(TENSOR_FILES[name] for name in ("model", "ema")),
)


class Malicious:
    """Creates a folder when it is unpickled."""

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
        "averages": {"0.1/a.weight": weights / 3},
    }


def state(step: int) -> dict[str, Any]:
    return {"averaged": step, "records": [[0.5, step, [1.0], [2.0]]], "scaler": {}}


def save(folder: Path, *steps: int, keep: int = 10, keep_every: int = 0) -> list[Path]:
    return [save_checkpoint(folder, step, tensors(step), state(step), keep, keep_every) for step in steps]


def holds_step(step: int, loaded: Any) -> bool:
    """Whether a loaded checkpoint equals, to the bit, what `save` writes for a step."""
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


# --- writing and reading


def test_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "checkpoints"
    assert load_newest(folder) is None
    (path,) = save(folder, 7)
    assert path == folder / "step-00000007"
    assert sorted(str(file.relative_to(path)) for file in path.rglob("*.*")) == sorted(FILES[1:])
    assert holds_step(7, load_checkpoint(path))
    assert holds_step(7, load_newest(folder))
    # And by other readers.
    assert torch.equal(load_file(path / TENSOR_FILES["ema"])["a.weight"], torch.full((50,), 3.5))
    assert json.loads((path / "state.json").read_text()) == {"step": 7, **state(7)}


def test_round_trip_of_layouts_and_dtypes(tmp_path: Path) -> None:
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


def test_layout_of_version_0_1(tmp_path: Path) -> None:
    """The tensors beside each other, under their names: runs begun by that version resume."""
    (path,) = save(tmp_path, 3)
    for name, file in TENSOR_FILES.items():
        (path / file).rename(path / f"{name}.safetensors")
    (path / "unet").rmdir()
    names = sorted(set(file_names(path)) - {"SHA256SUMS"})
    sums = subprocess.run(["sha256sum", *names], cwd=path, capture_output=True, check=True).stdout
    (path / "SHA256SUMS").write_bytes(sums)
    assert holds_step(3, load_checkpoint(path))


def test_sha256sum_detects_changed_files(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 3)
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    good = subprocess.run(command, cwd=path, capture_output=True, text=True)
    assert good.returncode == 0
    assert good.stdout.splitlines() == [f"{name}: OK" for name in FILES[1:]]
    with (path / TENSOR_FILES["ema"]).open("ab") as file:
        file.write(b"\0")
    assert subprocess.run(command, cwd=path, capture_output=True).returncode == 1
    with pytest.raises(ValueError, match="its files do not match SHA256SUMS"):
        load_checkpoint(path)


def test_newest_has_the_largest_step(tmp_path: Path) -> None:
    save(tmp_path, 99_999_999, 100_000_000, 5)
    (tmp_path / "step-200000000").write_text("")
    for name in ("step-7", "step-00000300.pt", "step-1000000000x", "steps"):
        (tmp_path / name).mkdir()
    assert holds_step(100_000_000, load_newest(tmp_path))


# --- retention


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keeps_the_newest(tmp_path: Path, keep: int) -> None:
    (tmp_path / "notes.txt").write_text("stays")
    save(tmp_path, 1, 2, 3, 4, 5, keep=keep)
    assert file_names(tmp_path) == ["notes.txt", *(f"step-{step:08d}" for step in range(6 - keep, 6))]


def test_keeps_multiples_of_keep_every(tmp_path: Path) -> None:
    save(tmp_path, *range(5, 65, 5), keep=2, keep_every=20)
    assert file_names(tmp_path) == [f"step-{step:08d}" for step in (20, 40, 55, 60)]
    assert holds_step(20, load_checkpoint(tmp_path / "step-00000020"))


def test_damaged_later_checkpoint_does_not_evict_a_good_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, later = save(tmp_path, 10, 20)
    (later / "state.json").write_text("{}")
    save(tmp_path, 15, keep=1)
    assert file_names(tmp_path) == ["step-00000015", "step-00000020"]
    assert holds_step(15, load_newest(tmp_path))
    save(tmp_path, 20, keep=1)
    assert file_names(tmp_path) == ["step-00000020"]
    caplog.clear()
    assert holds_step(20, load_newest(tmp_path))
    assert not caplog.records


# --- damage


def check_refused(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check that the newest checkpoint cannot be loaded, and that step 1 is loaded instead, with one warning."""
    with pytest.raises(ValueError, match="damaged or incomplete") as caught:
        load_checkpoint(path)
    caplog.clear()
    assert holds_step(1, load_newest(path.parent))
    (record,) = [record for record in caplog.records if record.name.startswith("ddim.")]
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"{caught.value}; it is skipped"
    assert str(path) in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("name", FILES)
def test_damage_is_detected(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
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
    assert holds_step(2, load_newest(tmp_path))


@pytest.mark.parametrize("name", FILES)
def test_missing_replaced_and_extra_files_are_detected(
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
    for added in ("optimizer.safetensors.bak", ".hidden", "unet/config.json"):
        (path / added).write_bytes(b"")
        check_refused(path, caplog)
        (path / added).unlink()
    assert holds_step(2, load_newest(tmp_path))


def test_empty_and_missing_checkpoints_raise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000002").mkdir()
    check_refused(tmp_path / "step-00000002", caplog)
    with pytest.raises(FileNotFoundError, match=r"the checkpoint .*step-00000003 does not exist"):
        load_checkpoint(tmp_path / "step-00000003")


def test_all_damaged_gives_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in save(tmp_path, 1, 2):
        (path / "SHA256SUMS").write_text("")
    assert load_newest(tmp_path) is None
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


@pytest.mark.parametrize("written", [pickle.dump, torch.save], ids=["pickle", "torch"])
@pytest.mark.parametrize("signed", [False, True])
def test_pickled_code_does_not_run(
    tmp_path: Path, written: Any, signed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even with correct checksums."""
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
    assert file_names(tmp_path) == ["checkpoints"]


# --- killed processes


CALLS = ("fsync", "rename", "unlink", "rmdir")


def die_before_call(number: int, action: Callable[[], Any]) -> bool:
    """Call a function in a process that is killed before its `number`-th call that changes the disk; whether it was."""
    child = os.fork()
    if child == 0:
        remaining = number

        def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **named: Any) -> Any:
                nonlocal remaining
                remaining -= 1
                if remaining == 0:
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
def test_save_is_atomic_under_sigkill(tmp_path: Path, caplog: pytest.LogCaptureFixture, step: int, keep: int) -> None:
    call, died, steps = 0, True, []
    while died:
        call += 1
        folder = tmp_path / str(call)
        save(folder, 1, 2)
        died = die_before_call(call, lambda folder=folder: save(folder, step, keep=keep))
        newest = load_newest(folder)
        assert newest is not None
        assert holds_step(newest.step, newest)
        steps.append(newest.step)
        remove_partial(folder)
        assert all(name.startswith("step-") for name in file_names(folder))
        save(folder, step, keep=keep)
        assert file_names(folder) == [f"step-{n:08d}" for n in range(step - keep + 1, step + 1)]
    assert call > 8
    # While a folder is being replaced it is missing for a moment, and the one before is the newest.
    assert set(steps) == ({2, 3} if step == 3 else {1, 2})
    assert steps[0] == 2
    assert steps[-1] == step
    assert not caplog.records


def test_remove_partial(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "notes.txt").write_text("stays")
    for name in (".step-00000002-a1b2", ".step-00000002-a1b2-old", ".deleted-step-00000000"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    remove_partial(tmp_path)
    assert file_names(tmp_path) == ["notes.txt", "step-00000001"]
    remove_partial(tmp_path / "missing")


# --- replace_folder


def test_replace_folder_replaces_all_files(tmp_path: Path) -> None:
    path = tmp_path / "a" / "folder"
    for content in ("old", "new"):
        with replace_folder(path) as temporary:
            assert temporary.parent == path.parent
            (temporary / "sub").mkdir()
            (temporary / "sub" / content).write_text(content)
    assert file_names(path) == ["sub"]
    assert file_names(path / "sub") == ["new"]
    assert file_names(path.parent) == ["folder"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_replace_folder_keeps_the_old_on_failure(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")

    def fail() -> None:
        with replace_folder(tmp_path / "folder") as temporary:
            (temporary / "new").write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert file_names(tmp_path) == ["folder"]
    assert file_names(tmp_path / "folder") == ["old"]


def test_replace_folder_keeps_the_old_when_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert file_names(tmp_path) == ["folder"]
    assert file_names(tmp_path / "folder") == ["old"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        (path,) = save(tmp_path / "checkpoints", 1)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {(path / name).stat().st_mode & 0o777 for name in FILES} == {0o666 & ~umask}


# --- a full disk


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limit the size of files, in bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1, 200, 500, 10_000, 40_000, 80_000])
@pytest.mark.parametrize("step", [2, 3])
def test_failed_write_keeps_earlier_checkpoints(tmp_path: Path, size: int, step: int) -> None:
    save(tmp_path, 1, 2)
    # Of growing size, so that each limit stops another file. The small ones are the checksums and the state.
    content = {
        name: {"w": torch.zeros(length)} for name, length in {"model": 100, "ema": 5000, "optimizer": 15_000}.items()
    }
    large = {"records": list(range(10_000))}
    with file_size_limit(size), pytest.raises(OSError, match=r"File too large|os error 27"):
        save_checkpoint(tmp_path, step, content, large, keep=1)
    assert file_names(tmp_path) == ["step-00000001", "step-00000002"]
    assert holds_step(2, load_newest(tmp_path))


def disk_size(folder: Path) -> int:
    """Size of a folder on disk, in bytes, rounded up to pages."""
    return sum(path.stat().st_size // 4096 * 4096 + 4096 for path in folder.rglob("*"))


def small_disk(folder: Path) -> list[str] | None:
    """A command prefix for a private mount namespace; `None` where the system does not allow one."""
    for prefix in (["unshare", "--mount", "--map-root-user"], ["unshare", "--mount"]):
        if shutil.which("unshare"):
            command = [*prefix, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
            if subprocess.run(command, capture_output=True).returncode == 0:
                return prefix
    return None


ON_A_SMALL_DISK = """
size=$1 disk=$2 run=$3
shift 3
mount -t tmpfs -o size="$size" tmpfs "$disk" && cp -R "$run/." "$disk" || exit 99
"$@"
status=$?
rm -rf "$run" && cp -R "$disk" "$run" || exit 98
exit $status
"""

WITH_SMALL_FILES = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_full_disk_fails_in_one_line_and_resumes_later(
    make_config: Callable[..., TrainConfig], image_folder: Path, tmp_path: Path
) -> None:
    config = make_config(checkpoints={"every": 3}, log_every=2)
    uninterrupted, out = tmp_path / "uninterrupted", tmp_path / "run"
    train(config, uninterrupted, "cpu")
    train(config.model_copy(update={"max_steps": 6}), out, "cpu")
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [str(BIN / "ddim"), "train", "--config", str(file), "--device", "cpu", "--out"]
    checkpoint = out / "checkpoints" / "step-00000006"
    before = {path: path.read_bytes() for path in (out / "checkpoints").rglob("*.*")}

    disk = tmp_path / "disk"
    disk.mkdir()
    prefix = small_disk(disk)
    if prefix is not None:
        # Space for the run and half a checkpoint.
        size = disk_size(out) + disk_size(checkpoint) // 2
        arguments = ["sh", "-c", ON_A_SMALL_DISK, "sh", str(size), str(disk), str(out), *command, str(disk)]
        reason = "No space left on device"
    else:
        prefix = [sys.executable]
        size = (checkpoint / TENSOR_FILES["model"]).stat().st_size * 3 // 2
        arguments = ["-c", WITH_SMALL_FILES, str(size), *command, str(out)]
        reason = "File too large"
    done = subprocess.run(
        [*prefix, *arguments],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    lines = messages(done.stderr)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert reason in lines[-1]
    assert "step-00000009" in lines[-1]
    assert file_names(out / "checkpoints") == ["step-00000003", "step-00000006"]
    assert {path: path.read_bytes() for path in (out / "checkpoints").rglob("*.*")} == before

    train(config, out, "cpu")
    for name in TENSOR_FILES.values():
        ours, theirs = (folder / "checkpoints" / "step-00000012" / name for folder in (out, uninterrupted))
        assert ours.read_bytes() == theirs.read_bytes()
    assert (out / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
