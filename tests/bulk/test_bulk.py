"""Bulk sampling: the exact number of images, equal bytes for any processes and interrupts, nothing mixed or lost."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from ddim.bulk import sample_many
from ddim.bulk.targets import FolderTarget, NpzTarget
from ddim.pipeline import DDIMPipeline
from helpers import environment, messages
from programs import Program, free_port, launcher_environment, run_cli, start_cli, start_torchrun

FORMATS = ("images", "images.npz", "images.tar")
STEPS = 2
PORT = 29511
"""Of a job; its processes do not connect to each other."""


@pytest.fixture(scope="module")
def pipe(make_unet: Callable[..., Any]) -> DDIMPipeline:
    from ddim.scheduler import DDIMScheduler

    return DDIMPipeline(make_unet(sample_size=8), DDIMScheduler())


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of all files but manifests, whose versions and counts are tested separately."""
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.endswith("manifest.json"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def read(out: Path, count: int) -> np.ndarray:
    """Return the images (N, H, W, C) of an output in any format."""
    if out.suffix == ".npz":
        pixels: np.ndarray = np.load(out)["arr_0"]
        return pixels
    images = []
    if out.suffix == ".tar":
        for shard in sorted(out.parent.glob(f"{out.stem}-*.tar")):
            with tarfile.open(shard) as archive:
                for entry in archive.getmembers():
                    content = archive.extractfile(entry)
                    assert content is not None
                    if entry.name.endswith(".png"):
                        images.append(np.asarray(Image.open(io.BytesIO(content.read()))))
                    else:
                        assert json.loads(content.read()) == {"index": len(images) - 1, "seed": 5 + len(images) - 1}
    else:
        images = [np.asarray(Image.open(out / f"{index:05d}.png")) for index in range(count)]
    return np.stack(images)


@contextmanager
def launched_as(rank: int, world_size: int) -> Iterator[None]:
    """Set the environment of a launcher's process, and allow it to leave images to processes that start later."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in launcher_environment(rank, world_size, PORT).items():
            patch.setenv(name, value)
        patch.setattr("ddim.bulk.run.START_SECONDS", 0)
        with suppress_missing_images():
            yield


@contextmanager
def suppress_missing_images() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        assert "are present, and no other process of this job is running" in str(error)  # noqa: PT017


class TestOutput:
    @pytest.mark.parametrize("count", [1, 7, 33])
    @pytest.mark.parametrize("batch_size", [1, 4, 64])
    def test_exact_count_in_every_format(self, pipe: DDIMPipeline, tmp_path: Path, count: int, batch_size: int) -> None:
        expected = pipe(seeds=range(5, 5 + count), num_inference_steps=STEPS, output_type="np").images
        for name in FORMATS:
            result = sample_many(pipe, tmp_path / name, count, 5, batch_size, shard_size=10, num_inference_steps=STEPS)
            assert (result.sampled, result.done, result.count) == (count, count, count)
            written = read(tmp_path / name, count)
            assert written.shape == (count, 8, 8, 3)
            assert abs(written / 255 - expected).max() < 1.5 / 255
        shards = -(-count // (max(1, 10 // min(batch_size, count)) * min(batch_size, count)))
        assert names(tmp_path) == {
            *(f"images/{index:05d}.png" for index in range(count)),
            *(f"images-{number:06d}.tar" for number in range(shards)),
            *("images/manifest.json", "images.npz", "images.npz.manifest.json", "images.tar.manifest.json"),
        }

    def test_names_above_five_digits(self, tmp_path: Path) -> None:
        target = FolderTarget(tmp_path, 100_001, 1, 0, (2, 2, 1))
        target.write_batch(100_000, np.zeros((1, 2, 2, 1), np.uint8))
        assert target.done_batches() == {100_000}

    @pytest.mark.parametrize("name", FORMATS)
    def test_processes_write_equal_bytes(self, pipe: DDIMPipeline, tmp_path: Path, name: str) -> None:
        """One process, three in any order, and a number of processes that changes give equal bytes."""
        settings = {"batch_size": 4, "shard_size": 8, "num_inference_steps": STEPS}
        runs: dict[str, list[tuple[int, int]]] = {
            "one": [(0, 1)],
            "three": [(2, 3), (0, 3), (1, 3)],
            "changed": [(1, 2), (1, 3), (0, 1)],
        }
        for folder, processes in runs.items():
            (tmp_path / folder).mkdir()
            for rank, world_size in processes:
                with launched_as(rank, world_size):
                    result = sample_many(pipe, tmp_path / folder / name, 30, **settings)
            assert result.done == 30
            assert result.sampled == (30 if folder == "one" else 10 if folder == "three" else 12)
        assert hashes(tmp_path / "one") == hashes(tmp_path / "three") == hashes(tmp_path / "changed")

    def test_manifest(self, pipe: DDIMPipeline, tmp_path: Path) -> None:
        with launched_as(0, 2):
            sample_many(pipe, tmp_path / "x", 6, 3, 2, num_inference_steps=STEPS, eta=0.5)
        manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
        assert (manifest["done"], manifest["complete"]) == (4, False)
        expected = {"count": 6, "seed": 3, "batch_size": 2, "eta": 0.5, "timesteps": [500, 0], "format": "png"}
        assert expected.items() <= manifest["settings"].items()
        assert len(manifest["settings"]["model_sha256"]) == 64
        assert {"ddim", "torch", "numpy", "pillow", "python"} == set(manifest["versions"])
        with launched_as(1, 2):
            sample_many(pipe, tmp_path / "x", 6, 3, 2, num_inference_steps=STEPS, eta=0.5)
        manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
        assert (manifest["done"], manifest["complete"]) == (6, True)


class TestResume:
    @pytest.mark.parametrize("name", FORMATS)
    def test_done_batches_are_not_sampled_again(self, pipe: DDIMPipeline, tmp_path: Path, name: str) -> None:
        out = tmp_path / name
        settings: dict[str, Any] = {"batch_size": 2, "num_inference_steps": STEPS}
        sample_many(pipe, out, 8, **settings)
        original = hashes(tmp_path)
        assert sample_many(pipe, out, 8, **settings).sampled == 0
        assert hashes(tmp_path) == original

    @pytest.mark.parametrize("name", FORMATS)
    @pytest.mark.parametrize(
        ("changes", "differing"),
        [
            ({"seed": 1}, "seed=1 instead of 0"),
            ({"count": 9}, "count=9 instead of 8"),
            ({"batch_size": 4}, "batch_size=4 instead of 2"),
            ({"eta": 1.0}, r"eta=1\.0 instead of 0\.0"),
            ({"num_inference_steps": 3}, r"timesteps=\[666, 333, 0\] instead of \[500, 0\]"),
        ],
    )
    def test_other_settings_raise(
        self, pipe: DDIMPipeline, tmp_path: Path, name: str, changes: dict[str, Any], differing: str
    ) -> None:
        settings: dict[str, Any] = {"count": 8, "batch_size": 2, "num_inference_steps": STEPS}
        with launched_as(0, 2):
            sample_many(pipe, tmp_path / name, **settings)
        original = hashes(tmp_path)
        with pytest.raises(ValueError, match=differing):
            sample_many(pipe, tmp_path / name, **settings | changes)
        assert hashes(tmp_path) == original
        result = sample_many(pipe, tmp_path / name, **settings | changes, overwrite=True)
        assert result.sampled == result.done == result.count
        (tmp_path / "fresh").mkdir()
        sample_many(pipe, tmp_path / "fresh" / name, **settings | changes)
        fresh = hashes(tmp_path / "fresh")
        assert {key: value for key, value in hashes(tmp_path).items() if not key.startswith("fresh")} == fresh

    def test_another_model_raises(self, make_unet: Callable[..., Any], pipe: DDIMPipeline, tmp_path: Path) -> None:
        sample_many(pipe, tmp_path / "x", 2, num_inference_steps=STEPS)
        other = DDIMPipeline(make_unet(sample_size=8, layers_per_block=2), pipe.scheduler)
        with pytest.raises(ValueError, match=r"model_sha256=.* instead of"):
            sample_many(other, tmp_path / "x", 2, num_inference_steps=STEPS)

    @pytest.mark.parametrize("name", ["images/00001.png", "images.npz", "images-000000.tar"])
    def test_images_without_a_manifest_are_kept(self, pipe: DDIMPipeline, tmp_path: Path, name: str) -> None:
        (tmp_path / "images").mkdir()
        (tmp_path / name).write_bytes(b"mine")
        out = tmp_path / ("images" + Path(name).suffix.replace(".png", ""))
        with pytest.raises(FileExistsError, match="overwrite=True"):
            sample_many(pipe, out, 3, num_inference_steps=STEPS)
        assert (tmp_path / name).read_bytes() == b"mine"
        assert sample_many(pipe, out, 3, num_inference_steps=STEPS, overwrite=True).done == 3

    def test_unrelated_files_are_kept(self, pipe: DDIMPipeline, tmp_path: Path) -> None:
        for name in ("notes.txt", "me.png", "12.png", ".hidden.png"):
            (tmp_path / name).write_bytes(b"mine")
        sample_many(pipe, tmp_path, 3, num_inference_steps=STEPS)
        sample_many(pipe, tmp_path, 4, num_inference_steps=STEPS, overwrite=True)
        for name in ("notes.txt", "me.png", "12.png", ".hidden.png"):
            assert (tmp_path / name).read_bytes() == b"mine"

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"settings": 3}'])
    def test_invalid_manifest_raises(self, pipe: DDIMPipeline, tmp_path: Path, content: str) -> None:
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            sample_many(pipe, tmp_path, 3, num_inference_steps=STEPS)

    def test_changed_versions_are_logged(
        self, pipe: DDIMPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        sample_many(pipe, tmp_path / "x", 2, num_inference_steps=STEPS)
        path = tmp_path / "x" / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["versions"]["torch"] = "1.0"
        path.write_text(json.dumps(manifest))
        sample_many(pipe, tmp_path / "x", 2, num_inference_steps=STEPS)
        assert "torch 1.0 to " in caplog.text


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"mine" * 1000),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "end missing": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "bit": lambda path: flip_bit(path, path.stat().st_size * 2 // 3),
    "header": lambda path: flip_bit(path, 19),
    "fifo": lambda path: (path.unlink(), os.mkfifo(path)),
}


class TestDamagedFiles:
    """What an earlier run left is verified before it counts; what is damaged is made again, and named."""

    SETTINGS: ClassVar[dict[str, Any]] = {"count": 8, "batch_size": 2, "shard_size": 4, "num_inference_steps": STEPS}

    @pytest.mark.parametrize("damage", DAMAGES)
    @pytest.mark.parametrize("name", ["images/00003.png", "images.npz", "images-000001.tar"])
    def test_results(
        self, pipe: DDIMPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
    ) -> None:
        out = tmp_path / ("images" + Path(name).suffix.replace(".png", ""))
        if damage == "fifo" and not name.startswith("images/"):
            pytest.skip("like any other content of a file")
        sample_many(pipe, out, **self.SETTINGS)
        original, pixels = hashes(tmp_path), read(out, 8) if out.suffix != ".tar" else None
        DAMAGES[damage](tmp_path / name)
        result = sample_many(pipe, out, **self.SETTINGS)
        if name == "images.npz" and damage in ("header", "longer"):
            # A zip archive may have more bytes at its end, and has fields that say nothing of its content.
            assert np.array_equal(read(out, 8), pixels)
            return
        assert hashes(tmp_path) == original
        assert result.sampled == {"images": 2, "images.npz": 8, "images.tar": 4}[out.name]
        (message,) = caplog.messages
        assert message.startswith(f"sampling again what 1 damaged file held: {tmp_path / name} (")

    @pytest.mark.parametrize("damage", DAMAGES)
    @pytest.mark.parametrize("name", FORMATS[1:])
    def test_parts(
        self, pipe: DDIMPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
    ) -> None:
        (tmp_path / "whole").mkdir()
        sample_many(pipe, tmp_path / "whole" / name, **self.SETTINGS)
        out = tmp_path / "interrupted" / name
        out.parent.mkdir()
        with launched_as(0, 2):
            sample_many(pipe, out, **self.SETTINGS)
        parts = out.with_name(f"{name}.parts")
        assert [file.name for file in sorted(parts.iterdir())] == ["00000000.npy", "00000002.npy"]
        part = parts / "00000002.npy"
        assert np.load(part).shape == (2, 8, 8, 3)
        DAMAGES[damage](part)
        assert sample_many(pipe, out, **self.SETTINGS).sampled == 6
        assert hashes(out.parent) == hashes(tmp_path / "whole")
        (message,) = caplog.messages
        assert message.startswith(f"sampling again what 1 damaged file held: {part} (")

    @pytest.mark.parametrize("shape", [(2, 8, 8, 1), (2, 4, 4, 12), (1, 8, 8, 3), (2, 3, 8, 8), (384,)])
    def test_part_of_another_shape(self, pipe: DDIMPipeline, tmp_path: Path, shape: tuple[int, ...]) -> None:
        """A part with a checksum of its own, as one of another run has."""
        out = tmp_path / "images.npz"
        with launched_as(0, 2):
            sample_many(pipe, out, **self.SETTINGS)
        stream = io.BytesIO()
        np.save(stream, np.zeros(shape, np.uint8))
        data = stream.getvalue() + hashlib.sha256(stream.getvalue()).digest()
        (tmp_path / "images.npz.parts" / "00000000.npy").write_bytes(data)
        assert sample_many(pipe, out, **self.SETTINGS).sampled == 6
        assert np.load(out)["arr_0"].shape == (8, 8, 8, 3)

    def test_part_damaged_during_a_run_is_named(self, tmp_path: Path) -> None:
        target = NpzTarget(tmp_path / "x.npz", 2, 1, 0, (2, 2, 1))
        target.create_folders()
        for batch in target.batches:
            target.write_batch(batch, np.zeros((1, 2, 2, 1), np.uint8))
        flip_bit(target.part_path(1), 129)
        with pytest.raises(ValueError, match=r"x\.npz\.parts/00000001\.npy is damaged: .* delete it and run again"):
            target.assemble()
        assert names(tmp_path) == {"x.npz.parts/00000000.npy", "x.npz.parts/00000001.npy"}

    @pytest.mark.parametrize("image", [Image.new("RGB", (8, 9)), Image.new("L", (8, 8)), Image.new("RGBA", (8, 8))])
    def test_image_of_another_shape(self, pipe: DDIMPipeline, tmp_path: Path, image: Image.Image) -> None:
        sample_many(pipe, tmp_path / "images", **self.SETTINGS)
        original = hashes(tmp_path)
        image.save(tmp_path / "images/00000.png")
        assert sample_many(pipe, tmp_path / "images", **self.SETTINGS).sampled == 2
        assert hashes(tmp_path) == original

    @pytest.mark.parametrize("name", FORMATS)
    def test_leftovers_are_removed(self, pipe: DDIMPipeline, tmp_path: Path, name: str) -> None:
        """Also of a process that was killed after the last image, before it had cleaned up."""
        out = tmp_path / name
        sample_many(pipe, out, **self.SETTINGS)
        original = hashes(tmp_path)
        leftovers = {
            "images": ["images/.writing-00003-abcdefgh.png", "images/.writing-manifest-abcdefgh.json"],
            "images.npz": ["images.npz.parts/00000001.npy", ".writing-images-abcdefgh.npz"],
            "images.tar": ["images.tar.parts/.writing-00000001-abcdefgh.npy", ".writing-images-000001-abcdefgh.tar"],
        }[name]
        for leftover in leftovers:
            (tmp_path / leftover).parent.mkdir(exist_ok=True)
            (tmp_path / leftover).touch()
        assert sample_many(pipe, out, **self.SETTINGS).sampled == 0
        assert hashes(tmp_path) == original
        assert not (tmp_path / f"{name}.parts").exists()


class TestEnvironment:
    @pytest.mark.parametrize("variables", [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}])
    def test_incomplete_environment_raises(
        self, pipe: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=r"^the environment has (RANK|WORLD_SIZE)=. .*but not"):
            sample_many(pipe, tmp_path / "x", 3, num_inference_steps=STEPS)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", FORMATS)
    def test_missing_processes_are_reported(
        self, pipe: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setattr("ddim.bulk.run.START_SECONDS", 0)
        for variable, value in launcher_environment(1, 2, PORT).items():
            monkeypatch.setenv(variable, value)
        settings: dict[str, Any] = {"batch_size": 2, "num_inference_steps": STEPS}
        with pytest.raises(RuntimeError, match=r"^4 of 8 images are present, and no other process of "):
            sample_many(pipe, tmp_path / name, 8, **settings)


class TestInvalidInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"count": 0}, "count"),
            ({"batch_size": 0}, "batch_size"),
            ({"seed": -1}, "seed"),
            ({"shard_size": 0}, "shard_size"),
            ({"eta": -1.0}, "eta"),
            ({"num_inference_steps": 0}, "num_inference_steps"),
            ({"out": "x.jpg"}, r"out must end in \.npz, \.tar, or be a folder, got .*x\.jpg"),
        ],
    )
    def test_raises_before_anything_is_written(
        self, pipe: DDIMPipeline, tmp_path: Path, arguments: dict[str, Any], message: str
    ) -> None:
        out = tmp_path / arguments.pop("out", "x.npz")
        with pytest.raises(ValueError, match=message):
            sample_many(pipe, out, **{"count": 3, "num_inference_steps": STEPS} | arguments)
        assert not list(tmp_path.iterdir())

    def test_overwrite_with_several_processes_raises(self, pipe: DDIMPipeline, tmp_path: Path) -> None:
        with launched_as(0, 2), pytest.raises(ValueError, match="overwrite=True must run in a single process, got 2"):
            sample_many(pipe, tmp_path / "x.npz", 3, num_inference_steps=STEPS, overwrite=True)
        assert not list(tmp_path.iterdir())


OPTIONS = ["-n", "48", "--steps", "3", "--batch-size", "8"]


def options(name: str) -> list[str]:
    """Return the options of a run into a file or folder."""
    return [*OPTIONS, *(["--shard-size", "24"] if name.endswith(".tar") else []), "--out", name]


def start(folder: Path, name: str, **variables: str) -> Program:
    """Start `ddim sample` in a folder."""
    return start_cli("sample", *options(name), env=os.environ | variables, cwd=folder)


def finish(folder: Path, name: str) -> None:
    """Run `ddim sample` in a folder to its end."""
    done = run_cli("sample", *options(name), env=os.environ, cwd=folder)
    assert done.returncode == 0, done.stderr


def wait_for(path: Path, program: Program) -> None:
    """Wait until a file exists or the program ends."""
    deadline = time.monotonic() + 120
    while not path.exists() and program.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def manifest_path(folder: Path, name: str) -> Path:
    return folder / name / "manifest.json" if name == "images" else folder / f"{name}.manifest.json"


class TestProcesses:
    """The command itself, killed at random moments, run twice at once, and run by launchers."""

    @pytest.fixture(scope="class")
    def uninterrupted(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
        """Return the hashes of the outputs of uninterrupted runs."""
        folders = {name: tmp_path_factory.mktemp("uninterrupted") for name in FORMATS}
        for name, folder in folders.items():
            finish(folder, name)
        return {name: hashes(folder) for name, folder in folders.items()}

    @pytest.mark.parametrize("name", FORMATS)
    def test_resumes_after_kill(self, uninterrupted: dict[str, dict[str, str]], tmp_path: Path, name: str) -> None:
        chance = random.Random(name)
        for _ in range(3):
            with start(tmp_path, name) as program:
                wait_for(manifest_path(tmp_path, name), program)
                time.sleep(chance.uniform(0, 0.4))
                program.send_signal(signal.SIGKILL)
        finish(tmp_path, name)
        assert hashes(tmp_path) == uninterrupted[name]

    @pytest.mark.parametrize("name", FORMATS)
    def test_second_process_is_refused(
        self, uninterrupted: dict[str, dict[str, str]], tmp_path: Path, name: str
    ) -> None:
        with start(tmp_path, name) as first:
            wait_for(manifest_path(tmp_path, name), first)
            first.send_signal(signal.SIGSTOP)
            second = run_cli("sample", *options(name), env=os.environ, cwd=tmp_path)
            advice = "wait until it has ended, or " + ("use another folder" if name == "images" else "write elsewhere")
            assert second.returncode == 1
            assert messages(second.stderr) == [f"ddim: {name} is in use by process {first.pid}; {advice}"]
            first.send_signal(signal.SIGCONT)
            assert first.wait(120) == 0
        assert hashes(tmp_path) == uninterrupted[name]

    def test_two_processes_at_once(self, uninterrupted: dict[str, dict[str, str]], tmp_path: Path) -> None:
        """Both assemble the same file in the end; neither removes what the other writes."""
        for name in FORMATS:
            folder = tmp_path / f"of-{name}"
            folder.mkdir()
            programs = [start(folder, name, **launcher_environment(rank, 2, PORT)) for rank in range(2)]
            assert [program.wait(120) for program in programs] == [0, 0]
            assert hashes(folder) == uninterrupted[name]

    def test_launchers(self, uninterrupted: dict[str, dict[str, str]], tmp_path: Path) -> None:
        command = ["-m", "ddim", "sample"]
        together = ["--standalone", "--nproc-per-node", "2", *command]
        rendezvous = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        machine = ["--nnodes", "2", "--nproc-per-node", "1", *rendezvous, "--node-rank"]
        commands = {"a/images": [together], "b/images.tar": [[*machine, node, *command] for node in ("0", "1")]}
        for out, parts in commands.items():
            folder, name = out.split("/")
            (tmp_path / folder).mkdir()
            programs = [
                start_torchrun(*part, *options(name), env=environment(tmp_path), cwd=tmp_path / folder)
                for part in parts
            ]
            assert [program.wait(120) for program in programs] == [0] * len(parts)
            assert hashes(tmp_path / folder) == uninterrupted[name]
