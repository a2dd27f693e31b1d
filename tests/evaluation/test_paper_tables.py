"""The paper's tables and figure: cells against their definition, resumption from the cache, the command."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ddim.evaluation import paper_tables
from ddim.evaluation.features import Pixels
from ddim.evaluation.image_sets import ImageSet, open_files, sample_image_set
from ddim.evaluation.metrics import frechet
from ddim.io.cache import Cache
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from digits import write_digits
from programs import run_cli, run_pair


def run_evaluate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_cli("evaluate", *arguments, env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}, cwd=folder)


@pytest.fixture
def small(make_unet: Any) -> DDIMPipeline:
    pipe = DDIMPipeline(make_unet(sample_size=8, in_channels=1, out_channels=1), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_table_1_cell_by_cell(small: DDIMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = open_files("digits", 60)
    features = Pixels(digits.shape)
    table = paper_tables.table_1(small, digits, features, 12, seed=3, steps=(2, 3))
    assert table.columns == ["", "2", "3"]
    assert [name for name, _ in table.rows] == ["eta = 0", "eta = 0.2", "eta = 0.5", "eta = 1", "sigma-hat"]
    real = torch.cat([features(batch) for batch in digits.batches()])
    # The authors' code clips x_0 and epsilon with sigma-hat, and nothing otherwise.
    sigma_hat = {"eta": 1.0, "use_sigma_hat": True, "use_clipped_model_output": True}
    for row, settings in ((2, {"eta": 0.5}), (4, sigma_hat)):
        pipe = DDIMPipeline(small.unet, DDIMScheduler(clip_sample=row == 4))
        samples = sample_image_set(pipe, 12, 3, num_inference_steps=3, **settings)
        expected = frechet(torch.cat([features(batch) for batch in samples.batches()]), real)
        assert table.rows[row][1][1] == pytest.approx(expected, rel=1e-4)
    # An interrupted table resumes: cached cells are not sampled again.
    sampled_again: list[Any] = []
    monkeypatch.setattr(
        paper_tables,
        "sample_image_set",
        lambda *args, **settings: sampled_again.append(settings) or sample_image_set(*args, **settings),
    )
    assert paper_tables.table_1(small, digits, features, 12, seed=3, steps=(2, 3)).rows == table.rows
    assert not sampled_again
    paper_tables.table_1(small, digits, features, 12, seed=3, steps=(2, 4))
    assert {settings["num_inference_steps"] for settings in sampled_again} == {4}
    paper_tables.table_1(small, digits, features, 12, seed=4, steps=(2,))
    assert len(sampled_again) == 10


@pytest.mark.parametrize("content", [b"", b"[]", b'{"key": {}, "result": {"fid": 0}}', b"{"])
def test_damaged_cell_is_measured_again(
    small: DDIMPipeline, features_cache: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    digits = open_files("digits", 20)
    expected = paper_tables.figure_4(small, digits, Pixels(digits.shape), 12, steps=(2,)).rows[1]
    (cell,) = (features_cache.parent / "tables").iterdir()
    assert Cache("tables").write(cell.name, [content])
    assert paper_tables.figure_4(small, digits, Pixels(digits.shape), 12, steps=(2,)).rows[1] == expected
    assert len(caplog.messages) == 1


def test_times_are_of_one_engine(small: DDIMPipeline, features_cache: Path) -> None:
    digits = open_files("digits", 20)
    for engine in ("auto", "eager", "eager"):
        pipe = DDIMPipeline(small.unet, small.scheduler, engine=engine)
        table = paper_tables.figure_4(pipe, digits, Pixels(digits.shape), 12, steps=(2,))
        assert table.settings["engine"] == engine
    assert len(list((features_cache.parent / "tables").iterdir())) == 2


class Means(torch.nn.Module):
    """Means of the channels as features."""

    num_features = 3

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))


def test_published_rows_are_included(make_unet: Any, as_files: Callable[..., ImageSet]) -> None:
    pipe = DDIMPipeline(make_unet(sample_size=32), DDIMScheduler())
    pixels = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    table = paper_tables.table_1(pipe, as_files(pixels), Means(), 4, steps=(10, 7))
    rows = dict(table.rows)
    assert rows["eta = 0, paper, CIFAR-10"] == [13.36, None]
    assert rows["sigma-hat, paper, CIFAR-10"] == [367.43, None]


def test_table_3_has_the_rows_of_both_data_sets(
    make_unet: Any, as_files: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert paper_tables.LSUN_SHAPE == (3, 256, 256)
    monkeypatch.setattr(paper_tables, "LSUN_SHAPE", (3, 32, 32))
    pipe = DDIMPipeline(make_unet(sample_size=32), DDIMScheduler())
    pixels = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    table = paper_tables.table_3(pipe, as_files(pixels), Means(), 2, steps=(1, 10))
    rows = dict(table.rows)
    assert list(rows) == [
        *("eta = 0", "eta = 0, paper, Bedroom", "eta = 0, paper, Church"),
        *("eta = 1", "eta = 1, paper, Bedroom", "eta = 1, paper, Church"),
    ]
    assert rows["eta = 0, paper, Bedroom"] == [None, 16.95]
    assert rows["eta = 1, paper, Church"] == [None, 51.56]


def test_table_3_takes_its_cells_from_table_1(small: DDIMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = open_files("digits", 60)
    features = Pixels(digits.shape)
    first = dict(paper_tables.table_1(small, digits, features, 12, steps=(2, 3)).rows)
    monkeypatch.setattr(paper_tables, "sample_image_set", pytest.fail)
    third = dict(paper_tables.table_3(small, digits, features, 12, steps=(2, 3)).rows)
    assert third == {name: first[name] for name in ("eta = 0", "eta = 1")}


def test_table_2(pipe: DDIMPipeline, as_files: Callable[..., ImageSet]) -> None:
    samples = torch.cat(list(sample_image_set(pipe, 2, num_inference_steps=10).batches()))
    table = paper_tables.table_2(pipe, as_files(samples), (10, 20))
    rows = dict(table.rows)
    assert rows["paper, CIFAR-10"] == [0.014, 0.0065]
    expected = pipe.reconstruct(samples.float() / 127.5 - 1, 20, exact=False, output_type="pt").mse.mean()
    assert rows["Euler, equation (13)"][1] == pytest.approx(float(expected), rel=1e-2)
    exact, euler = rows["exact"], rows["Euler, equation (13)"]
    assert all(a is not None and b is not None and a < b / 100 for a, b in zip(exact, euler, strict=True))


def test_figure_4_and_plot(small: DDIMPipeline, tmp_path: Path) -> None:
    digits = open_files("digits", 60)
    table = paper_tables.figure_4(small, digits, Pixels(digits.shape), 8, steps=(1, 2))
    assert [name for name, _ in table.rows] == ["seconds for 8 images", "Fréchet distance"]
    assert all(value is not None and value > 0 for _, values in table.rows for value in values)
    paper_tables.plot(table, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size[0] > 300
    assert table.markdown().startswith("Seconds, and Fréchet distance")
    assert table.json()["rows"][0]["1"] == table.rows[0][1][0]


def test_command(tmp_path: Path) -> None:
    write_digits(tmp_path / "real", 30)
    shared = ["mnist", "--reference", "real", "-n", "6", "--table-steps", "2,3"]
    tables = {"1": ["--features", "mnist", "--table", "1"], "2": ["--table", "2"]}
    completed = run_evaluate(tmp_path, *shared, *tables["1"], "--out", "t.md", "--out", "t.json", "--out", "t.png")
    assert completed.returncode == 0, completed.stderr
    assert "| sigma-hat |" in completed.stdout
    assert (tmp_path / "t.md").read_text() == completed.stdout
    assert len(json.loads((tmp_path / "t.json").read_text())["rows"]) == 5
    assert (tmp_path / "t.png").stat().st_size > 1000
    for number in ("1", "2"):
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache of two processes")}
        first, second = run_pair("evaluate", *shared, *tables[number], env=environment, cwd=tmp_path)
        assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
        alone = completed if number == "1" else run_evaluate(tmp_path, *shared, *tables[number])
        assert (first.stdout, second.stdout) == (alone.stdout, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mnist", "--table", "4"], "--table 1, --table 2, --table 3 and --figure 4"),
        (["mnist", "--table", "1", "--figure", "4"], "--table 1, --table 2, --table 3 and --figure 4"),
        (["mnist", "--table", "1"], "--reference"),
        (["real", "--table", "1", "--reference", "real"], "the paper's tables require a model, got real"),
        (["mnist", "--table", "1", "--reference", "real", "--out", "x.csv"], "x.csv"),
        (["mnist", "--reference", "real", "--table-steps", "1,2"], "--table-steps requires --table or --figure"),
    ],
)
def test_invalid_options_raise(tmp_path: Path, arguments: list[str], message: str) -> None:
    write_digits(tmp_path / "real", 5)
    completed = run_evaluate(tmp_path, *arguments)
    assert (completed.returncode, completed.stdout) == (1, "")
    assert message in completed.stderr
