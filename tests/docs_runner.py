"""Runs the snippets of a page of the documentation: all in order, in one folder and one Python namespace.

Shell snippets are parsed by `sh`. Commands of `ddim` run in this process, on their real arguments, with less work: few
images, few steps, small networks, those of the built-in models included. `pip`, `make` and launchers of several
processes are checked as far as possible without running them. What a reader brings along, such as images, is there;
what the page makes, it has to make itself.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.core import TyperCommand

import ddim.coefficients
import ddim.distillation
import ddim.training.costs
import ddim.training.run
import ddim.tuning
from ddim.cli import main
from ddim.cli.checks import Command, check_options
from ddim.data import parquet
from ddim.io import hub
from ddim.io.hub import find_model
from ddim.latents import LatentSpace
from ddim.pipeline import DDIMPipeline
from ddim.training.config import read_preset
from ddim.unet import UNet2DModel
from digits import TINY_MODEL, digits, write_digits
from docs_snippets import parse_shell, snippets
from image_data import write_hugging_face

ROOT = Path(__file__).parents[1]
FACES = Path(__file__).with_name("evaluation") / "faces.parquet"
PARSED_ONLY = ("convert",)
"""Commands that need a file which cannot be made here: a checkpoint of another project."""
RESTORING = ("inpaint", "super-resolve", "restore")


def make_small_models(folder: Path) -> dict[str, Path]:
    """Save models of the names, samples, classes and schedules of the built-in ones, with small random networks."""
    torch.manual_seed(0)
    models: dict[str, Path] = {}
    for name, path in hub.builtin_models().items():
        pipe = DDIMPipeline.from_pretrained(path)
        # Two levels without attention: exporting a network takes as long as it has layers, whatever their width.
        levels = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "add_attention": False}
        small = {**levels, "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
        unet = UNet2DModel.from_config(pipe.unet.config, **small)
        # Small predictions, so that images can be inverted.
        unet.conv_out.weight.data.mul_(0.1)
        models[name] = folder / name
        shutil.copytree(path, models[name], ignore=shutil.ignore_patterns("*.safetensors"))
        DDIMPipeline(unet.eval(), pipe.scheduler).save_pretrained(models[name])
    return models


def prepare_kernel(models: Path, folder: Path) -> None:
    """Make the kernel that calls this run lines with `!` in its process, as `run_page` runs shell snippets.

    Args:
        models: where small models are saved, by the first call.
        folder: empty; what readers of notebooks download is written there, and the kernel runs in it from now on.
    """
    from IPython import get_ipython

    def system(line: str) -> None:
        for command in parse_shell(line):
            run_command(command)

    get_ipython().system = system
    monkeypatch = pytest.MonkeyPatch()
    small = {path.name: path for path in models.iterdir()} if models.exists() else make_small_models(models)
    monkeypatch.setattr(hub, "builtin_models", lambda: small)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.chdir(folder)
    write_mnist(folder)
    reduce_work(monkeypatch)


def run_page(page: Path, models: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the snippets of a page in a folder, with other built-in models; the first that fails raises."""
    monkeypatch.setattr(hub, "builtin_models", lambda: models)
    text = page.read_text()
    bring_files(folder, text)
    reduce_work(monkeypatch)
    # Imported here, because it takes seconds and notebooks do not use it.
    monkeypatch.setattr("ddim.app.serve", lambda names, *_: [find_model(name) for name in names])
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(sys, "argv", sys.argv)
    namespace: dict[str, Any] = {}
    for snippet in snippets(text):
        if snippet.language == "python":
            # Tracebacks name the line of the page.
            exec(compile("\n" * (snippet.line - 1) + snippet.code, str(page), "exec"), namespace)
        else:
            for command in parse_shell(snippet.code):
                run_command(command)


def run_command(command: list[str]) -> None:
    """Run a command of a shell snippet, or check it."""
    program, *arguments = command
    if program in ("torchrun", "accelerate"):
        arguments = arguments[arguments.index("-m") + 1 :]
        assert arguments[0] == "ddim"
        arguments = arguments[1:]
        program = "ddim"
    if program == "ddim" and arguments[-1] != "...":
        run_ddim(arguments)
    elif program == "python":
        assert arguments[0] == "-c"
        exec(arguments[1], {})
    elif program == "make":
        subprocess.run(["make", "--dry-run", "-C", ROOT, *arguments], check=True, stdout=subprocess.DEVNULL)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert arguments[:2] == ["install", "-e"]
        assert set(re.findall(r"\w+", arguments[2])) <= extras.keys()


def run_ddim(arguments: list[str]) -> None:
    """Run a command of `ddim` in this process."""
    sys.argv = ["ddim", *arguments]
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, f"ddim {' '.join(arguments)}: {stop.value.code}"


def reduce_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make commands do little, after their options were checked as they are."""

    def invoke(self: Command, context: Any) -> Any:
        check_options(self, context)
        context.params.update(reduced(str(self.name), context.params))
        return None if self.name in PARSED_ONLY else TyperCommand.invoke(self, context)

    monkeypatch.setattr(Command, "invoke", invoke)
    for function in (ddim.tuning.tune, ddim.tuning.enough_steps):
        monkeypatch.setitem(function.__kwdefaults__, "num_latents", 2)  # type: ignore[arg-type]
    for method in (LatentSpace.encode, LatentSpace.reconstruct, LatentSpace.direction):
        monkeypatch.setitem(method.__kwdefaults__, "max_iterations", 3)  # type: ignore[arg-type]
    monkeypatch.setattr(ddim.tuning, "MOVE_LENGTHS", (1 / 4,))
    for module in (ddim.tuning, ddim.coefficients):
        monkeypatch.setattr(module, "REFERENCE_STEPS", 10)
    monkeypatch.setattr(ddim.coefficients, "MAX_EVALUATIONS_PER_LATENT", 20)
    monkeypatch.setitem(ddim.coefficients.learn.__kwdefaults__, "num_latents", 2)  # type: ignore[arg-type]
    for module in (ddim.distillation, ddim.distillation.samples):
        monkeypatch.setattr(module, "SAMPLE_COUNT", 8)
    monkeypatch.setattr(ddim.training.costs, "TIMED_STEPS", 1)
    monkeypatch.setattr(ddim.training.run, "plot_loss", lambda _, path: Image.new("L", (1, 1)).save(path))
    for length in ("FIRST_LENGTH", "LATER_LENGTH"):
        monkeypatch.setattr(ddim.distillation, length, 2)
    # A model and a data set on the hub: those that the reader's machine has in the cache.
    monkeypatch.setattr(hub, "_download", lambda *_: find_model("mnist"))
    monkeypatch.setattr(
        parquet, "read_hub_dataset", lambda *_: parquet.read_parquet(["mnist/train.parquet"], "hub", None, "")
    )


def fewer(steps: Any) -> Any:
    """Return a smaller value of `--steps`; a file of latents, or the search for the number, keeps its own."""
    return steps if steps in (None, "auto") else type(steps)(min(int(steps), 3))


def reduced(command: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return options with less work, of those that a command has."""
    smaller: dict[str, Callable[[Any], Any]] = {
        "count": lambda count: count if count is None and command in ("edit", "distill") else min(count or 8, 8),
        "reference_count": lambda count: 8,
        "frames": lambda frames: min(frames, 3),
        "grid": lambda grid: grid and "2x2",
        "codes": lambda codes: 2 if codes is None or isinstance(codes, int) else codes,
        "features": lambda features: "pixels" if features == "inception" else features,
        "max_iterations": lambda count: 3,
        "steps": lambda steps: {"consistency": "2,3", "tune": "2", "distill": steps}.get(command) or fewer(steps),
    }
    if given.get("label") is not None:
        smaller["count"] = lambda count: count and min(count, 20)  # as many images of each class
        if command == "evaluate":
            smaller["count"], smaller["reference_count"] = (lambda count: 20), (lambda count: 40)
    options = {name: change(given[name]) for name, change in smaller.items() if name in given}
    if command == "evaluate" and (given["table"] or given["figure"]):
        options["table_steps"] = "3"
    if command in RESTORING and given["steps"] is None:
        options["steps"] = 3
    if command == "interpolate" and all(point.isdecimal() for point in given["points"]):
        options["steps"] = 3
    if command == "distill":
        options["settings"] = [*(given["settings"] or ()), "samples.count=2"]
    if command == "train":
        channels = read_preset(given["preset"])["model"]["block_out_channels"] if given["preset"] else [8, 16]
        small = [f"model.block_out_channels={[min(width, 32) for width in channels]}", "model.attention_head_dim=8"]
        samples = ["samples.count=2", "samples.num_inference_steps=2", "checkpoints.every=2"]
        samples += ["compile=false", "data.on_device=false", "precision=fp32"]
        settings = given["settings"] or ()
        starts = given["init"] or any(setting.startswith("init=") for setting in settings)
        if starts and not given["preset"]:
            small = []  # the network is that of the model it starts from
        options |= {"max_steps": 2, "epochs": None, "batch_size": 8, "settings": [*settings, *small, *samples]}
    return options


def bring_files(folder: Path, text: str) -> None:
    """Write what readers have: images, a data set, a configuration; and results of other pages' runs."""
    for name in ("docs/images", "src/ddim/models", "runs"):
        (folder / name).mkdir(parents=True)
    large = large_digits()
    for name, count in {"digits": 3, "images": 40, "photos": 3, "pics": 40}.items():
        write_digits(folder / name, count)
    for index, pixels in enumerate(large[:2]):
        save(pixels, folder / "digits" / f"{index:04d}.png")
        save(pixels, folder / ("one.png" if index else "digit.png"))
    (folder / "digits/0002.png").unlink()
    (folder / "small").mkdir()
    Image.fromarray(np.ascontiguousarray(large[0])).resize((7, 7)).save(folder / "small/0.png")
    write_mnist(folder)
    for name in ("train", "test"):
        (folder / "faces").mkdir(exist_ok=True)
        shutil.copy(FACES, folder / f"faces/{name}.parquet")
    write_hugging_face(folder / "train.parquet", large)
    if "--out images" not in text:
        np.savez(folder / "images.npz", large[..., None])
        with tarfile.open(folder / "images.tar", "w") as archive:
            for index in range(8):
                archive.add(folder / "digit.png", f"{index:09d}.png")
    for name in set(re.findall(r"runs/\w+/final|(?<=--model )runs/\w+", text)):
        if f"--out {name.removesuffix('/final')}" not in text:
            DDIMPipeline.from_pretrained("mnist").save_pretrained(folder / name)
    (folder / "mine.yaml").write_text(yaml.safe_dump({"model": TINY_MODEL, "samples": {"every": 1000}}))


def large_digits() -> np.ndarray:
    """Return 40 digits in the size of MNIST's, uint8 (40, 28, 28)."""
    return np.kron(digits(40), np.ones((4, 4), np.uint8))[:, 2:30, 2:30]


def write_mnist(folder: Path) -> None:
    """Write digits as the two files of MNIST."""
    for name in ("train", "test"):
        write_hugging_face(folder / f"mnist/{name}.parquet", large_digits(), num_classes=10)


def save(pixels: np.ndarray, path: Path) -> None:
    """Write a gray image."""
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)
