"""Commands refuse, before work, to write over what they read, by whatever name it is reached."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ddim import DDIMPipeline
from ddim.cli import app
from ddim.cli.overwriting import check_inputs_stay
from ddim.io.latent_files import LatentSettings, save_latents

OVERWRITING = {
    "image": (["edit", "x.png", "-n", "2", "-o", "x.png"], "--out must not overwrite the input 'x.png', got 'x.png'"),
    "folder": (["reconstruct", "d", "-o", "d/00001.png"], "--out must not overwrite the input 'd/00001.png'"),
    "numbered": (["edit", "d/00001.png", "-o", "d/"], "--out must not overwrite the input 'd/00001.png', got 'd/'"),
    "frames": (["interpolate", "d/00001.png", "1", "-o", "./d"], "--out must not overwrite the input 'd/00001.png'"),
    "data set": (["direction", "n.npz", "o.npz", "--out", "./n.npz"], "--out must not overwrite the input 'n.npz'"),
    "latents": (["decode", "n.npz", "-o", "n.npz"], "--out must not overwrite the input 'n.npz'"),
    "pairs": (
        ["evaluate", "d", "--reference", "n.npz", "--memorization", "--pairs", "d/00001.png"],
        "--pairs must not overwrite the input 'd/00001.png'",
    ),
    "symbolic link": (["edit", "x.png", "-o", "soft.png"], "--out must not overwrite the input 'x.png'"),
    "hard link": (["edit", "hard.png", "-o", "x.png"], "--out must not overwrite the input 'hard.png'"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    for name in ("x.png", "d/00001.png", "n.npz", "o.npz"):
        Path(name).write_text(name)
    Path("soft.png").symlink_to("x.png")
    os.link("x.png", "hard.png")
    return tmp_path


@pytest.mark.parametrize("name", OVERWRITING)
def test_inputs_are_not_overwritten(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, expected = OVERWRITING[name]
    monkeypatch.setattr(sys, "argv", ["ddim", *arguments])
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SystemExit)
    assert expected in str(result.exception.code)
    assert Path("x.png").read_text() == "x.png"
    assert Path("d/00001.png").read_text() == "d/00001.png"


@pytest.mark.parametrize(
    "values",
    [
        {"images": ["d"], "out": "x.png"},
        {"images": ["x.png"], "out": "d/"},
        {"images": ["x.png", "missing.png"], "out": "missing.png"},
        {"samples": "d", "out": None},
        {"codes": 64, "out": "d"},
    ],
)
def test_other_outputs_are_allowed(values: dict[str, object], folder: Path) -> None:
    check_inputs_stay(values, {})


def test_results_in_the_folder_of_a_model_are_replaced(folder: Path) -> None:
    Path("d/model_index.json").write_text("{}")
    check_inputs_stay({"images": ["x.png", "d"], "out": "d/00001.png"}, {})


@pytest.mark.parametrize(
    "arguments",
    [["interpolate", "1", "2", "--frames", "3"], ["edit", "gray.png", "-n", "3"], ["decode", "latents.npz"]],
    ids=lambda arguments: arguments[0],
)
def test_more_numbered_images_are_refused_before_work(
    arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (28, 28)).save("gray.png")
    save_latents(
        "latents.npz", torch.zeros(3, 1, 28, 28), LatentSettings("mnist", "0" * 64, [500], True, 1e-5, [1e-6] * 3)
    )
    Path("d/00003.png").touch()

    def fail(*args: object, **kwargs: object) -> None:
        pytest.fail("worked before the refusal")

    monkeypatch.setattr(DDIMPipeline, arguments[0], fail)
    monkeypatch.setattr(sys, "argv", ["ddim", *arguments, "-o", "d"])
    result = CliRunner().invoke(app, [*arguments, "-o", "d"])
    assert "d holds images numbered beyond the 3 to be written" in str(result.exception)
