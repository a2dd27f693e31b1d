"""Bulk sampling: the exact number of images, equal bytes for any processes and interrupts, nothing mixed or lost."""

from __future__ import annotations

import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddim.bulk import sample_many
from ddim.bulk.targets import FolderTarget
from ddim.pipeline import DDIMPipeline
from helpers import environment

FORMATS = ("images", "images.npz", "images.tar")
STEPS = 2


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
    """Set the environment of a launcher's process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("WORLD_SIZE", str(world_size))
        yield


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
        target = FolderTarget(tmp_path, 100_001, 1, 0)
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
            done = []
            for rank, world_size in processes:
                with launched_as(rank, world_size):
                    done.append(sample_many(pipe, tmp_path / folder / name, 30, **settings))
            assert sum(result.sampled for result in done) == done[-1].done == 30
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


COMMAND = ["-m", "ddim", "sample", "-n", "400", "--steps", "6", "--batch-size", "8", "--shard-size", "120", "--out"]


class TestProcesses:
    """The command itself, killed at random moments, and run by launchers."""

    @pytest.fixture(scope="class")
    def uninterrupted(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Return a folder with the outputs of uninterrupted runs."""
        folder = tmp_path_factory.mktemp("uninterrupted")
        for name in FORMATS:
            subprocess.run([sys.executable, *COMMAND, name], cwd=folder, env=environment(folder), check=True)
        return folder

    @pytest.mark.parametrize("name", FORMATS)
    def test_resumes_after_kill(self, uninterrupted: Path, tmp_path: Path, name: str) -> None:
        chance = random.Random(name)
        killed = 0
        while killed < 3:
            process = subprocess.Popen(
                [sys.executable, *COMMAND, name], cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.DEVNULL
            )
            manifest = tmp_path / name / "manifest.json" if name == "images" else tmp_path / f"{name}.manifest.json"
            while not manifest.exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(chance.uniform(0.1, 1.5))
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        assert killed
        subprocess.run([sys.executable, *COMMAND, name], cwd=tmp_path, env=environment(tmp_path), check=True)
        expected = {
            key: value for key, value in hashes(uninterrupted).items() if key.startswith(name.replace(".tar", "-"))
        }
        expected = {k: v for k, v in expected.items() if k.endswith(Path(name).suffix or ".png")}
        assert expected
        assert hashes(tmp_path) == expected

    def test_two_processes_and_two_machines(self, uninterrupted: Path, tmp_path: Path) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        together = [*torchrun, "--standalone", "--nproc-per-node", "2", *COMMAND]
        subprocess.run([*together, "images"], cwd=tmp_path, env=environment(tmp_path), check=True)
        rendezvous = ["--master-addr", "127.0.0.1", "--master-port", str(unused_port())]
        machine = [*torchrun, "--nnodes", "2", "--nproc-per-node", "1", *rendezvous, "--node-rank"]
        for name in FORMATS[1:]:
            nodes = [
                subprocess.Popen([*machine, node, *COMMAND, name], cwd=tmp_path, env=environment(tmp_path))
                for node in ("0", "1")
            ]
            assert [node.wait(300) for node in nodes] == [0, 0]
        assert hashes(tmp_path) == hashes(uninterrupted)


def unused_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
