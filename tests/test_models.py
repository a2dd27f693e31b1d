"""The models that ship with the package: weights, cards, licenses."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

import ddim.app
from ddim.cli import app
from ddim.info import describe
from ddim.io.hub import builtin_models
from ddim.pipeline import DDIMPipeline

ROOT = Path(__file__).parents[1]
MODELS = builtin_models()
LICENSES = {"faces": "cc-by-4.0", "mnist": "cc-by-sa-3.0", "mnist-labels": "cc-by-sa-3.0"}
SHAPES = {"faces": (3, 64, 64), "mnist": (1, 28, 28), "mnist-labels": (1, 28, 28)}
MAX_BYTES = 10e6
CARD_STEPS = 50
GRID_GAP = 2
"""Pixels between the images of a card's grid."""


def test_models_are_known() -> None:
    assert list(MODELS) == ["faces", "mnist", "mnist-labels"]


@pytest.mark.parametrize("name", MODELS)
def test_pipeline_loads_in_float32(name: str) -> None:
    pipe = DDIMPipeline.from_pretrained(name)
    assert pipe.sample_shape == SHAPES[name]
    assert (pipe.dtype, pipe.unet.training) == (torch.float32, False)
    assert all(torch.isfinite(weight).all() for weight in pipe.unet.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_small_and_half_precision(name: str) -> None:
    path = MODELS[name] / "unet" / "diffusion_pytorch_model.safetensors"
    assert path.stat().st_size < MAX_BYTES
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118


@pytest.mark.parametrize("name", MODELS)
def test_card_describes_the_model(name: str) -> None:
    card = (MODELS[name] / "README.md").read_text()
    header = card.split("---\n")[1]
    assert f"license: {LICENSES[name]}\n" in header
    assert f"{describe(name)['parameters']:,} parameters" in card
    assert set(re.findall(r"!\[[^]]*]\(([^)]+)\)", card)) == {"samples.png", "loss.png"}
    for image in ("samples.png", "loss.png"):
        with Image.open(MODELS[name] / image) as opened:
            opened.load()


def test_cards_samples_are_those_of_the_model() -> None:
    """The first image of the grid of faces, in pixels of the model."""
    pipe = DDIMPipeline.from_pretrained("faces")
    pipe.set_progress_bar_config(disable=True)
    expected = np.asarray(pipe(seeds=[0], num_inference_steps=CARD_STEPS).images[0], int)
    with Image.open(MODELS["faces"] / "samples.png") as grid:
        assert grid.size == (10 * 64 + 11 * GRID_GAP, 10 * 64 + 11 * GRID_GAP)
        shown = np.asarray(grid.crop((GRID_GAP, GRID_GAP, GRID_GAP + 64, GRID_GAP + 64)).convert("RGB"), int)
    assert np.abs(shown - expected).max() <= 2


def test_demo_samples_faces_and_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of `make demo`, in fewer steps."""
    done = subprocess.run(["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    commands = [shlex.split(line)[1:] for line in done.stdout.splitlines() if "/ddim " in line]
    assert [command[command.index("--model") + 1] for command in commands] == ["faces", "mnist"]
    monkeypatch.chdir(tmp_path)
    for command in commands:
        result = CliRunner().invoke(app, [*command, "--steps", "2"])
        assert result.exit_code == 0, result.output
    with Image.open("demo.png") as faces, Image.open("demo-digits.png") as digits:
        assert faces.size == (2 * (4 * 64 + 5 * GRID_GAP),) * 2
        assert (faces.mode, digits.mode) == ("RGB", "L")


def test_page_opens_all_models(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[list[str]] = []
    monkeypatch.setattr(ddim.app, "serve", lambda names, *_: opened.append(names))
    for arguments in ([], ["faces"]):
        assert CliRunner().invoke(app, ["app", *arguments]).exit_code == 0
    assert opened == [["mnist", "faces", "mnist-labels"], ["faces"]]


def test_license_of_the_faces_names_the_design_and_is_packaged() -> None:
    text = (MODELS["faces"] / "LICENSE").read_text()
    for part in ("ToonHead", "Johan Melin", "CC BY 4.0", "https://creativecommons.org/licenses/by/4.0/", "Changes:"):
        assert part in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "src/ddim/models/faces/LICENSE" in project["project"]["license-files"]
    # Everything in the package's folder is in the wheel.
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["src/ddim"]}
