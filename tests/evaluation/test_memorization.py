"""Nearest training images: distances by brute force, copies, the test's statistic against SciPy, the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

from cli_batch import Commands
from ddim.distributed import ProcessGroup
from ddim.evaluation import memorization
from ddim.evaluation.features import load_features
from ddim.evaluation.image_sets import ImageSet
from ddim.evaluation.memorization import draw_pairs, mann_whitney_z, measure_memorization
from digits import digits, write_digits
from helpers import randn, seeded

AsFiles = Callable[..., ImageSet]


def random_images(count: int, seed: int) -> Tensor:
    return torch.randint(256, (count, 3, 5, 4), dtype=torch.uint8, generator=seeded(seed))


def brute_force(queries: Tensor, training: Tensor, skip_self: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Root mean square differences in [0, 1], one pair at a time."""
    distances = np.array(
        [[np.sqrt(np.mean(((a.double() - b.double()) / 255).numpy() ** 2)) for b in training] for a in queries]
    )
    if skip_self:
        np.fill_diagonal(distances, np.inf)
    return distances.min(1), distances.argmin(1)


@pytest.mark.parametrize("block_bytes", [1, memorization.BLOCK_BYTES])
def test_distances_to_nearest_training_images(
    as_files: AsFiles, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(memorization, "BLOCK_BYTES", block_bytes)
    samples, training, held_out = random_images(70, 0), random_images(150, 1), random_images(20, 2)
    training[140] = samples[3]
    result, report = measure_memorization(as_files(samples), as_files(training), as_files(held_out))
    for neighbors, images in ((result.samples, samples), (result.held_out, held_out)):
        distances, indices = brute_force(images, training)
        np.testing.assert_allclose(neighbors.distances, distances, rtol=1e-12)
        assert neighbors.indices.tolist() == indices.tolist()
    assert result.samples.distances[3] == 0
    metrics = report["metrics"]
    assert (metrics["copies"], metrics["samples_min"]) == (1, 0)
    held_out_distances = brute_force(held_out, training)[0]
    assert metrics["held_out_p5"] == pytest.approx(np.quantile(held_out_distances, 0.05))
    nearer = int((brute_force(samples, training)[0] < held_out_distances.min()).sum())
    assert metrics["nearer_than_held_out"] == nearer
    assert report["settings"]["held_out_count"] == 20


def test_held_out_training_images_are_reported(as_files: AsFiles, caplog: pytest.LogCaptureFixture) -> None:
    samples, training, held_out = (random_images(100, seed) for seed in range(3))
    measure_memorization(as_files(samples), as_files(training), as_files(held_out))
    assert not caplog.messages
    held_out[3] = training[5]
    measure_memorization(as_files(samples), as_files(training), as_files(held_out))
    assert caplog.messages == ["1 of the 100 held-out images have distance 0: they are in the reference"]


def test_few_distances_are_reported(as_files: AsFiles, caplog: pytest.LogCaptureFixture) -> None:
    samples, training = random_images(100, 0), random_images(99, 1)
    measure_memorization(as_files(samples), as_files(training))
    assert caplog.messages == ["the 1st percentile of 99 distances is little more than their minimum"]


def test_training_images_are_held_out_one_by_one(as_files: AsFiles) -> None:
    samples, training = random_images(200, 0), random_images(90, 1)
    result, report = measure_memorization(as_files(samples), as_files(training))
    expected, _ = brute_force(training, training, skip_self=True)
    np.testing.assert_allclose(result.held_out.distances.sort().values, np.sort(expected), rtol=1e-12)
    assert report["settings"]["held_out_count"] == 90
    with pytest.raises(ValueError, match="reference must hold at least 2 images"):
        measure_memorization(as_files(samples), as_files(training[:1]))


def test_processes_share_the_training_images(as_files: AsFiles) -> None:
    """Two processes, here threads, find the neighbors that one finds; of equal images the first one."""
    pixels = random_images(200, 1)
    pixels[130] = pixels[20]
    samples, training = as_files(torch.cat([pixels[130:131], random_images(69, 0)])), as_files(pixels)
    barrier, pieces = Barrier(2), {}

    class Threads(ProcessGroup):
        def all_gather(self, mine: list[Any]) -> list[Any]:
            pieces[self.rank] = mine
            barrier.wait()
            gathered = dict(pieces)
            barrier.wait()
            return [
                piece
                for pair in zip_longest(*(gathered[rank] for rank in (0, 1)))
                for piece in pair
                if piece is not None
            ]

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda rank: measure_memorization(samples, training, group=Threads(rank, 2)), (0, 1)))
    expected, report = measure_memorization(samples, training)
    assert expected.samples.indices[0] == 20
    for result, same_report in results:
        assert torch.equal(result.samples.indices, expected.samples.indices)
        assert same_report == report


def test_copies_and_strangers_are_told_apart(as_files: AsFiles) -> None:
    """Training images with little noise are too near, other images are as near as held-out ones, noise is far."""
    images = torch.from_numpy(digits()).unsqueeze(1)
    training, others, held_out = images[:900], images[900:1300], images[1300:]
    noise = torch.randint(-3, 4, training[:400].shape, generator=seeded())
    copies = (training[:400].int() + noise).clamp(0, 255).byte()
    strangers = torch.randint(256, copies.shape, dtype=torch.uint8, generator=seeded())

    def z(samples: Tensor) -> float:
        report = measure_memorization(as_files(samples), as_files(training), as_files(held_out))[1]
        return float(report["metrics"]["mann_whitney_z"])

    assert z(copies) < -20
    assert abs(z(others)) < 4
    assert z(strangers) > 20


def test_distances_of_features(as_files: AsFiles) -> None:
    samples, training = (torch.randint(256, (n, 1, 28, 28), dtype=torch.uint8, generator=seeded(n)) for n in (9, 30))
    result, report = measure_memorization(as_files(samples), as_files(training), features="mnist")
    extractor = load_features("mnist", (1, 28, 28))
    with torch.no_grad():
        differences = extractor(samples).double()[:, None] - extractor(training).double()
    expected = differences.square().mean(2).sqrt().amin(1)
    # Features are float32, and round a little differently in other batches.
    torch.testing.assert_close(result.samples.distances, expected, rtol=1e-5, atol=1e-6)
    assert report["settings"]["features"].startswith("DigitClassifier-64-")


@pytest.mark.parametrize("decimals", [None, 1])
def test_statistic_is_that_of_scipy(decimals: int | None) -> None:
    """Also with many ties."""
    x, y = randn(300), randn(200, seed=1) + 0.2
    if decimals is not None:
        x, y = x.round(decimals=decimals), y.round(decimals=decimals)
    u = stats.mannwhitneyu(x.numpy(), y.numpy()).statistic
    expected = (u - 300 * 200 / 2) / np.sqrt(300 * 200 * 501 / 12)
    assert mann_whitney_z(x, y) == pytest.approx(expected)
    assert mann_whitney_z(x, y) == pytest.approx(-mann_whitney_z(y, x))


def test_pairs_show_samples_above_their_training_images(as_files: AsFiles) -> None:
    samples, training = random_images(6, 0), as_files(random_images(40, 1))
    result, _ = measure_memorization(as_files(samples), training)
    image = np.asarray(draw_pairs(result, training, count=2))
    nearest = int(result.samples.distances.argmin())
    assert np.array_equal(image[2:7, 2:6], samples[nearest].permute(1, 2, 0))
    neighbor = random_images(40, 1)[result.samples.indices[nearest]]
    assert np.array_equal(image[9:14, 2:6], neighbor.permute(1, 2, 0))


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    folder = tmp_path_factory.mktemp("memorization")
    write_digits(folder / "train", 80)
    write_digits(folder / "samples", 3)
    table = {
        "report": "--memorization --reference train --out report.json --out plot.png --pairs pairs.png",
        "no reference": "--memorization",
        "held-out alone": "--reference train --held-out train",
        "metrics": "--reference train --memorization --metrics fid",
        "plot of metrics": "--reference train --out x.png",
        "pairs": "--reference train --memorization --pairs x.jpg",
    }
    with Commands(folder, {name: ["evaluate", "samples", *line.split()] for name, line in table.items()}) as commands:
        yield commands


def test_command(commands: Commands) -> None:
    report = commands.output("report")
    lines = dict(line.split("  ", 1) for line in commands["report"].stdout.splitlines())
    assert (lines["samples that are copies"].strip(), lines["samples, minimum"].strip()) == ("3", "0")
    assert json.loads(report.read_text())["metrics"]["copies"] == 3
    for name in ("plot.png", "pairs.png"):
        with Image.open(report.with_name(name)) as image:
            assert image.size[1] >= 22


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no reference", "reference must be given: the images that the model was trained on, got None"),
        ("held-out alone", "--held-out has no effect without --memorization"),
        ("metrics", "--metrics has no effect beside --memorization"),
        ("plot of metrics", "--out must end in .json, .csv, or .md"),
        ("pairs", "--pairs must end in .png, got 'x.jpg'"),
    ],
)
def test_invalid_options_raise(commands: Commands, name: str, message: str) -> None:
    assert commands[name].code == 1
    assert message in commands[name].stderr
