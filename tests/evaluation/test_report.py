"""Reports, and the command `ddim evaluate`."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ddim.evaluation.image_sets import ImageSet
from ddim.evaluation.report import evaluate
from digits import write_digits
from programs import run_cli, start_cli, start_torchrun


def test_report_describes_everything_that_changes_the_numbers(
    as_files: Callable[..., ImageSet], caplog: pytest.LogCaptureFixture
) -> None:
    pixels = torch.randint(256, (30, 1, 6, 6), dtype=torch.uint8)
    result = evaluate(as_files(pixels, "a"), as_files(pixels[:25], "b"), "pixels", ["fid", "precision"])
    assert "25 images are too few for a Fréchet distance of 36 features" in caplog.text
    assert list(result["metrics"]) == ["fid", "precision"]
    settings = result["settings"]
    assert (settings["samples"], settings["samples_count"]) == ("a", 30)
    assert (settings["reference"], settings["reference_count"]) == ("b", 25)
    assert settings["features"].startswith("Pixels-36-")
    assert {"ddim", "torch", "torchmetrics"} <= settings["versions"].keys()


def run_evaluate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_cli("evaluate", *arguments, env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}, cwd=folder)


def test_model_against_files(tmp_path: Path) -> None:
    write_digits(tmp_path / "real", 70)
    outputs = [argument for suffix in ("json", "csv", "md") for argument in ("--out", f"score.{suffix}")]
    options = ["--reference", "real", "--features", "mnist", "--metrics", "fid,kid,is,precision,recall"]
    completed = run_evaluate(tmp_path, "mnist", *options, "-n", "70", "--steps", "3", *outputs)
    assert completed.returncode == 0, completed.stderr
    assert "Fréchet distance" in completed.stdout
    assert "num_inference_steps  3" in completed.stdout
    result = json.loads((tmp_path / "score.json").read_text())
    assert {"fid", "kid", "kid_std", "is", "is_std", "precision", "recall"} == result["metrics"].keys()
    assert 0 < result["metrics"]["fid"] < 1e6
    assert result["settings"]["seed"] == 0
    with (tmp_path / "score.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["fid"]) == result["metrics"]["fid"]
    assert "| Fréchet distance |" in (tmp_path / "score.md").read_text()


def test_two_processes_report_equal_numbers(tmp_path: Path) -> None:
    """Both sets have several batches, the last ones shorter; process 0 alone prints."""
    write_digits(tmp_path / "real", 150)
    shared = ["mnist", "--reference", "real", "--features", "mnist", "-n", "150", "--steps", "1"]
    shared += ["--metrics", "fid,kid,is,precision,recall"]
    results = []
    torchrun = ["--standalone", "--nproc-per-node", "2", "-m", "ddim"]
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder)}
        command = ["evaluate", *shared, "--out", f"{number}.json"]
        start, arguments = (start_torchrun, [*torchrun, *command]) if number else (start_cli, command)
        with start(*arguments, env=environment, cwd=tmp_path) as program:
            stdout, stderr = program.communicate()
        assert program.returncode == 0, stderr
        assert stdout.count("Fréchet distance") == 1
        assert len(list((folder / "ddim" / "features").iterdir())) == 1
        results.append(json.loads((tmp_path / f"{number}.json").read_text()))
    assert results[0] == results[1]


def test_equal_sets_are_reported(as_files: Callable[..., ImageSet], caplog: pytest.LogCaptureFixture) -> None:
    images = torch.arange(432).remainder(251).to(torch.uint8).view(12, 1, 6, 6)
    for reference, number in ((images.flip(0), 0), (images, 1)):
        evaluate(as_files(images), as_files(reference), "pixels", ["precision"])
        assert caplog.text.count("are the same images") == number


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "--reference", "mnist"], "missing does not exist"),
        (["real", "--features", "pixels"], "reference must be given"),
        (["real", "--reference", "real", "--metrics", "fid,fad", "--features", "pixels"], "recall, got 'fad'"),
        (["real", "--metrics", "is", "--features", "pixels"], "must be mnist or inception for the inception score"),
        (
            ["real", "--reference", "real", "--features", "pixels", "-n", "9"],
            "at most 5, the number of images in real, got 9",
        ),
        (["real", "--reference", "real", "--features", "pixels", "--out", "x.txt"], r"x\.txt"),
    ],
)
def test_failures_are_reported_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    write_digits(tmp_path / "real", 5)
    completed = run_evaluate(tmp_path, *arguments)
    assert completed.returncode == 1
    assert message.replace("\\", "") in completed.stderr
    assert len(completed.stderr.strip().splitlines()) == 1
