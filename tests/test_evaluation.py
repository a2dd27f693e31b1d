"""Metrics against closed forms and scipy, sets of images from every kind of file, the command."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor

from ddim.bulk import sample_many
from ddim.evaluation import metrics
from ddim.evaluation import paper_tables as tables
from ddim.evaluation.features import DigitClassifier, Pixels, load_features
from ddim.evaluation.image_sets import BATCH, ImageSet, is_model, open_files, sample_image_set
from ddim.evaluation.metrics import compute_features, frechet, measure, shortage, within
from ddim.evaluation.report import describe
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from digits import write_digits


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def frechet_by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """The textbook's formula in float64."""
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * np.real(root)))


@pytest.fixture(scope="module")
def pipe() -> DDIMPipeline:
    pipe = DDIMPipeline.from_pretrained("mnist")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "ddim" / "features"


def of(pixels: Tensor, name: str = "given") -> ImageSet:
    return ImageSet(name, tuple(pixels.shape[1:]), len(pixels), pixels.split(BATCH).__getitem__, files=True)  # type: ignore[arg-type]


class TestFrechet:
    @pytest.mark.parametrize(("N", "M", "D", "scale"), [(400, 300, 8, 1.0), (1000, 1000, 64, 3.0), (90, 200, 30, 0.1)])
    def test_equals_scipy(self, N: int, M: int, D: int, scale: float) -> None:
        a, b = drawn(N, D) @ drawn(D, D, seed=2), scale * drawn(M, D, seed=1) + 0.5
        assert frechet(a, b) == pytest.approx(frechet_by_scipy(a.double().numpy(), b.double().numpy()), rel=1e-3)

    def test_real_images_halves_and_noise(self) -> None:
        """Two halves of real digits are near each other, noise is far away; on pixels as scipy has it."""
        digits = open_files("digits")
        pixels = torch.cat(list(digits.batches()))
        features = Pixels(digits.shape)
        first, second = features(pixels[::2]), features(pixels[1::2])
        noise = features(torch.randint(256, pixels[::2].shape, dtype=torch.uint8))
        near, far = frechet(first, second), frechet(first, noise)
        assert near == pytest.approx(frechet_by_scipy(first.numpy(), second.numpy()), rel=1e-3)
        assert far == pytest.approx(frechet_by_scipy(first.numpy(), noise.numpy()), rel=1e-3)
        assert near < far / 100

    def test_too_few_are_told(self) -> None:
        assert shortage(Pixels((1, 4, 4)), 17, 100) is None
        message = shortage(Pixels((1, 4, 4)), 16, 100)
        assert message is not None
        assert "16 images are too few for a Fréchet distance of 16 features" in message


class TestOthers:
    def test_kernel_distance(self) -> None:
        """Against the unbiased estimate written out, on one subset of everything."""
        x, y = drawn(60, 5), drawn(60, 5, seed=1) + 0.5
        found = measure(x, y, ["kid"])

        def kernel(a: Tensor, b: Tensor) -> Tensor:
            return (a.double() @ b.double().T / 5 + 1) ** 3

        xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
        n = 60
        expected = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1)) - 2 * xy.mean()
        assert found["kid"] == pytest.approx(float(expected), rel=1e-3)
        assert found["kid_std"] < 1e-6

    def test_inception_score(self) -> None:
        """Of ten sure classes, about equally frequent in each tenth of the images: nearly ten; of one class: one."""
        sure = torch.eye(10).repeat(200, 1) * 50
        assert measure(drawn(2000, 3), None, ["is"], sure)["is"] == pytest.approx(10, rel=0.05)
        assert measure(drawn(2000, 3), None, ["is"], sure[:1].repeat(2000, 1))["is"] == pytest.approx(1)

    def test_precision_and_recall(self) -> None:
        """Samples of one of two clusters: all of them are real, half of the real is covered."""
        real = torch.cat([drawn(300, 4), drawn(300, 4, seed=1) + 100])
        values = measure(drawn(300, 4, seed=2), real, ["precision", "recall"])
        assert values["precision"] > 0.9
        assert values["recall"] == pytest.approx(0.5, abs=0.06)
        assert within(drawn(50, 4) + 1e4, real) == 0
        assert within(real, real) == 1

    def test_precision_by_hand(self) -> None:
        manifold = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        # Third nearest others: 3, 2, 2 and 3 away.
        assert within(torch.tensor([[-3.0], [-3.1], [6.0], [6.1], [1.5]]), manifold) == pytest.approx(3 / 5)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((drawn(9, 3), None, ["fid"]), "reference"),
            ((drawn(9, 3), drawn(9, 3), ["fd"]), "no metric 'fd'; there are fid, kid"),
            ((drawn(3, 3), drawn(9, 3), ["fid"]), "3 images; 4 are needed"),
            ((drawn(9, 3), None, ["is"]), "tell classes"),
        ],
    )
    def test_bad_input(self, arguments: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            measure(*arguments)


class TestSets:
    def test_the_same_pictures_from_every_file(self, pipe: DDIMPipeline, tmp_path: Path) -> None:
        hashes = set()
        settings: dict[str, Any] = {"num_inference_steps": 2}
        for name in ("pictures", "x.npz", "x.tar"):
            sample_many(pipe, tmp_path / name, 9, batch_size=64, shard_size=4, **settings)
            images = open_files(str(tmp_path / name))
            assert (images.count, images.shape) == (9, (1, 28, 28))
            hashes.add(compute_features(images, Pixels(images.shape)).sha256)
        hashes.add(compute_features(sample_image_set(pipe, 9, **settings), Pixels((1, 28, 28))).sha256)
        assert len(hashes) == 1
        assert open_files(str(tmp_path / "x-000000.tar")).count == 9

    def test_first_so_many_in_another_shape(self, tmp_path: Path) -> None:
        write_digits(tmp_path, 12)
        images = open_files(str(tmp_path), 5, (3, 6, 10))
        (batch,) = images.batches()
        assert batch.shape == (5, 3, 6, 10)
        assert batch.dtype == torch.uint8

    def test_bad_sets(self, tmp_path: Path) -> None:
        write_digits(tmp_path, 3)
        with pytest.raises(ValueError, match="has 3 images; 4 are asked for"):
            open_files(str(tmp_path), 4)
        with pytest.raises(FileNotFoundError, match=r"nor x-000000\.tar"):
            open_files(str(tmp_path / "x.tar"))
        (tmp_path / "bad.tar").write_bytes(b"no archive" * 100)
        with pytest.raises(ValueError, match="cannot be read as tar"):
            open_files(str(tmp_path / "bad.tar"))

    def test_models_are_told_from_pictures(self, tmp_path: Path, pipe: DDIMPipeline) -> None:
        assert is_model("mnist")
        assert not is_model(str(tmp_path))
        pipe.save_pretrained(tmp_path)
        assert is_model(str(tmp_path))


class TestFeatures:
    def test_the_cache(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pixels = torch.randint(256, (20, 1, 4, 4), dtype=torch.uint8)
        first = compute_features(of(pixels), Pixels((1, 4, 4)))
        (kept,) = cache.iterdir()
        asked: list[int] = []

        class Watched(Pixels):
            def forward(self, images: Tensor) -> Tensor:
                asked.append(len(images))
                return super().forward(images)

        monkeypatch.setattr(metrics, "identity", lambda extractor: kept.name.rsplit("-", 1)[0])
        again = compute_features(of(pixels), Watched((1, 4, 4)))
        assert (asked, again.sha256) == ([], first.sha256)
        assert torch.equal(again.values, first.values)
        kept.write_bytes(b"\x93NUMPY damaged")
        assert torch.equal(compute_features(of(pixels), Watched((1, 4, 4))).values, first.values)
        assert sum(asked) == 20
        pixels[3, 0, 2, 2] += 1
        assert compute_features(of(pixels), Watched((1, 4, 4))).sha256 != first.sha256
        assert sum(asked) == 40

    def test_the_classifier_knows_painted_digits(self, pipe: DDIMPipeline) -> None:
        """Of what the built-in model paints it is sure, of noise it is not, and it finds all ten digits."""
        classifier: Any = load_features("mnist", (1, 28, 28))
        assert isinstance(classifier, DigitClassifier)
        painted = torch.cat(list(sample_image_set(pipe, 64, num_inference_steps=20).batches()))
        with torch.no_grad():
            chances = classifier.logits(classifier(painted)).softmax(1)
        assert float(chances.amax(1).mean()) > 0.9
        assert len(set(chances.argmax(1).tolist())) == 10

    def test_a_torchscript_file(self, tmp_path: Path) -> None:
        class Mean(torch.nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return images.float().mean(dim=(2, 3))

        torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
        features: Any = load_features(str(tmp_path / "mean.pt"), (3, 4, 4))
        assert features.num_features == 3
        assert torch.equal(features(torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)), torch.full((2, 3), 7.0))

    def test_bad_features(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="give pixels, mnist, inception or a TorchScript file"):
            load_features("resnet", (3, 8, 8))
        with pytest.raises(ValueError, match="grey images of 28x28"):
            load_features("mnist", (3, 32, 32))
        (tmp_path / "x.pt").write_bytes(b"none")
        with pytest.raises(ValueError, match="no TorchScript file"):
            load_features(str(tmp_path / "x.pt"), (3, 8, 8))

    def test_inception_without_its_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch_fidelity", None)
        with pytest.raises(ImportError, match="need torch-fidelity and torchvision"):
            load_features("inception", (3, 32, 32))

    def test_inception_weights_cannot_be_had_or_run_code(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        url = "http://127.0.0.1:9/weights-6726825d.pth"
        library, network = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
        network.URL_INCEPTION_V3 = url  # type: ignore[attr-defined]
        for module in (library, network):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        with pytest.raises(RuntimeError, match="cannot be downloaded"):
            load_features("inception", (3, 32, 32))

        class Trap:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "sprung",)

        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        torch.save({"fc.weight": Trap()}, tmp_path / "checkpoints" / Path(url).name)
        with pytest.raises(RuntimeError, match="are damaged"):
            load_features("inception", (3, 32, 32))
        assert not (tmp_path / "sprung").exists()


def test_what_changes_the_numbers_is_said(caplog: pytest.LogCaptureFixture) -> None:
    pixels = torch.randint(256, (30, 1, 6, 6), dtype=torch.uint8)
    result = describe(of(pixels, "a"), of(pixels[:25], "b"), "pixels", ["fid", "precision"])
    assert "25 images are too few for a Fréchet distance of 36 features" in caplog.text
    assert list(result["metrics"]) == ["fid", "precision"]
    settings = result["settings"]
    assert (settings["samples"], settings["samples_count"]) == ("a", 30)
    assert (settings["reference"], settings["reference_count"]) == ("b", 25)
    assert settings["features"].startswith("Pixels-36-")
    assert {"ddim", "torch", "torchmetrics"} <= settings["versions"].keys()


class TestCommand:
    @staticmethod
    def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
        command = [sys.executable, "-m", "ddim", "evaluate", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    def test_a_model_against_files(self, tmp_path: Path) -> None:
        write_digits(tmp_path / "real", 70)
        outputs = [argument for suffix in ("json", "csv", "md") for argument in ("--out", f"score.{suffix}")]
        chosen = ["--reference", "real", "--features", "mnist", "--metrics", "fid,kid,is,precision,recall"]
        done = self.run(tmp_path, "mnist", *chosen, "-n", "70", "--steps", "3", *outputs)
        assert done.returncode == 0, done.stderr
        assert "Fréchet distance" in done.stdout
        assert "num_inference_steps  3" in done.stdout
        result = json.loads((tmp_path / "score.json").read_text())
        assert {"fid", "kid", "kid_std", "is", "is_std", "precision", "recall"} == result["metrics"].keys()
        assert 0 < result["metrics"]["fid"] < 1e6
        assert result["settings"]["seed"] == 0
        with (tmp_path / "score.csv").open() as file:
            (row,) = csv.DictReader(file)
        assert float(row["fid"]) == result["metrics"]["fid"]
        assert "| Fréchet distance |" in (tmp_path / "score.md").read_text()

    def test_two_processes_measure_what_one_does(self, tmp_path: Path) -> None:
        """Samples and reference of several batches each, the last ones short; the first process alone speaks."""
        write_digits(tmp_path / "real", 150)
        shared = ["mnist", "--reference", "real", "--features", "mnist", "-n", "150", "--steps", "1"]
        shared += ["--metrics", "fid,kid,is,precision,recall"]
        results = []
        for number, launcher in enumerate(
            ([], ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"])
        ):
            folder = tmp_path / str(number)
            folder.mkdir()
            environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder)}
            command = [sys.executable, "-m", *launcher, "ddim", "evaluate", *shared, "--out", f"{number}.json"]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("Fréchet distance") == 1
            assert len(list((folder / "ddim" / "features").iterdir())) == 1
            results.append(json.loads((tmp_path / f"{number}.json").read_text()))
        assert results[0] == results[1]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["missing", "--reference", "mnist"], "missing does not exist"),
            (["real", "--features", "pixels"], "give a --reference"),
            (["real", "--reference", "real", "--metrics", "fid,fad", "--features", "pixels"], "no metric 'fad'"),
            (["real", "--metrics", "is", "--features", "pixels"], "tell classes"),
            (["real", "--reference", "real", "--features", "pixels", "-n", "9"], "has 5 images; 9 are asked for"),
            (["real", "--reference", "real", "--features", "pixels", "--out", "x.txt"], r"x\.txt"),
        ],
    )
    def test_failures_in_one_line(self, tmp_path: Path, arguments: list[str], message: str) -> None:
        write_digits(tmp_path / "real", 5)
        done = self.run(tmp_path, *arguments)
        assert done.returncode == 1
        assert message.replace("\\", "") in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


class TestTables:
    @pytest.fixture
    def small(self, make_unet: Any) -> DDIMPipeline:
        pipe = DDIMPipeline(make_unet(sample_size=8, in_channels=1, out_channels=1), DDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def test_table_1_cell_by_cell(self, small: DDIMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        digits = open_files("digits", 60)
        features = Pixels(digits.shape)
        table = tables.table_1(small, digits, features, 12, seed=3, steps=(2, 3))
        assert table.columns == ["", "2", "3"]
        assert [name for name, _ in table.rows] == ["eta = 0", "eta = 0.2", "eta = 0.5", "eta = 1", "sigma-hat"]
        real = torch.cat([features(batch) for batch in digits.batches()])
        # As the authors' code clips: x_0 and epsilon with sigma-hat, else nothing.
        sigma_hat = {"eta": 1.0, "use_sigma_hat": True, "use_clipped_model_output": True}
        for row, settings in ((2, {"eta": 0.5}), (4, sigma_hat)):
            painter = DDIMPipeline(small.unet, DDIMScheduler(clip_sample=row == 4))
            painted = sample_image_set(painter, 12, 3, num_inference_steps=3, **settings)
            expected = frechet(torch.cat([features(batch) for batch in painted.batches()]), real)
            assert table.rows[row][1][1] == pytest.approx(expected, rel=1e-4)
        # Interrupted, it goes on: what is there is not painted again.
        painted_again: list[Any] = []
        monkeypatch.setattr(
            tables, "sample_image_set", lambda *a, **k: painted_again.append(k) or sample_image_set(*a, **k)
        )
        assert tables.table_1(small, digits, features, 12, seed=3, steps=(2, 3)).rows == table.rows
        assert not painted_again
        tables.table_1(small, digits, features, 12, seed=3, steps=(2, 4))
        assert {settings["num_inference_steps"] for settings in painted_again} == {4}
        tables.table_1(small, digits, features, 12, seed=4, steps=(2,))
        assert len(painted_again) == 10

    def test_the_papers_rows_are_beside(self, make_unet: Any) -> None:
        pipe = DDIMPipeline(make_unet(sample_size=32), DDIMScheduler())
        pixels = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
        mean = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

        class Means(torch.nn.Module):
            num_features = 3

            def forward(self, images: Tensor) -> Tensor:
                result: Tensor = mean(images.float())
                return result

        table = tables.table_1(pipe, of(pixels), Means(), 4, steps=(10, 7))
        rows = dict(table.rows)
        assert rows["eta = 0, paper, CIFAR-10"] == [13.36, None]
        assert rows["sigma-hat, paper, CIFAR-10"] == [367.43, None]

    def test_table_2(self, pipe: DDIMPipeline) -> None:
        painted = torch.cat(list(sample_image_set(pipe, 2, num_inference_steps=10).batches()))
        table = tables.table_2(pipe, of(painted), (10, 20))
        rows = dict(table.rows)
        assert rows["paper, CIFAR-10"] == [0.014, 0.0065]
        expected = pipe.reconstruct(painted.float() / 127.5 - 1, 20, exact=False, output_type="pt").mse.mean()
        assert rows["Euler, equation (13)"][1] == pytest.approx(float(expected), rel=1e-2)
        exact, euler = rows["exact"], rows["Euler, equation (13)"]
        assert all(a is not None and b is not None and a < b / 100 for a, b in zip(exact, euler, strict=True))

    def test_figure_4_and_its_plot(self, small: DDIMPipeline, tmp_path: Path) -> None:
        digits = open_files("digits", 60)
        table = tables.figure_4(small, digits, Pixels(digits.shape), 8, steps=(1, 2))
        assert [name for name, _ in table.rows] == ["seconds for 8 pictures", "Fréchet distance"]
        assert all(value is not None and value > 0 for _, values in table.rows for value in values)
        tables.plot(table, tmp_path / "figure.png")
        with Image.open(tmp_path / "figure.png") as picture:
            assert picture.size[0] > 300
        assert table.markdown().startswith("Seconds, and Fréchet distance")
        assert table.json()["rows"][0]["1"] == table.rows[0][1][0]

    def test_the_command(self, tmp_path: Path) -> None:
        write_digits(tmp_path / "real", 30)
        shared = ["mnist", "--reference", "real", "--features", "mnist", "-n", "6", "--table-steps", "2,3"]
        done = TestCommand.run(tmp_path, *shared, "--table", "1", "--out", "t.md", "--out", "t.json", "--out", "t.png")
        assert done.returncode == 0, done.stderr
        assert "| sigma-hat |" in done.stdout
        assert (tmp_path / "t.md").read_text() == done.stdout
        assert len(json.loads((tmp_path / "t.json").read_text())["rows"]) == 5
        assert (tmp_path / "t.png").stat().st_size > 1000
        (tmp_path / "cache").rename(tmp_path / "kept")
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ddim", "evaluate"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
        for number in ("1", "2"):
            command = [sys.executable, "-m", *launcher, *shared, "--table", number]
            pair = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert pair.returncode == 0, pair.stderr
            alone = done if number == "1" else TestCommand.run(tmp_path, *shared, "--table", number)
            assert pair.stdout == alone.stdout

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["mnist", "--table", "3"], "--table 1, --table 2 and --figure 4"),
            (["mnist", "--table", "1", "--figure", "4"], "--table 1, --table 2 and --figure 4"),
            (["mnist", "--table", "1"], "--reference"),
            (["real", "--table", "1", "--reference", "real"], "real is no model"),
            (["mnist", "--table", "1", "--reference", "real", "--out", "x.csv"], "x.csv"),
            (["mnist", "--reference", "real", "--table-steps", "1,2"], "goes with --table"),
        ],
    )
    def test_bad_tables(self, tmp_path: Path, arguments: list[str], message: str) -> None:
        write_digits(tmp_path / "real", 5)
        done = TestCommand.run(tmp_path, *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert message in done.stderr
