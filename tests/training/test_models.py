"""Training runs and their checkpoints as models, everywhere a model is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from cli_batch import Commands
from ddim import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim.app.models import ModelCache
from ddim.info import describe
from ddim.io.hub import is_model
from ddim.io.runs import split_variant
from ddim.training.checkpoint import load_checkpoint
from ddim.training.config import TrainConfig
from ddim.training.run import train
from helpers import same_tensors

STEPS = (3, 6)


@pytest.fixture(scope="module")
def stopped(make_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints that has not come to its end."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    config = make_config(max_steps=6, checkpoints={"every": 3}, scheduler={"prediction_type": "v_prediction"})
    train(config, out, "cpu")
    shutil.rmtree(out / "final")
    return out


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def holds(network: nn.Module, run: Path, step: int, name: str) -> bool:
    """Whether a network has the weights of a checkpoint: `ema` or `model`."""
    return same_tensors(network.state_dict(), load_checkpoint(checkpoint(run, step)).tensors[name])


@pytest.mark.parametrize(
    ("name", "step", "weights"),
    [
        ("run", 6, "ema"),
        ("run@raw", 6, "model"),
        ("run/checkpoints/step-00000003", 3, "ema"),
        ("run/checkpoints/step-00000003@raw", 3, "model"),
    ],
)
def test_is_loaded(stopped: Path, name: str, step: int, weights: str) -> None:
    path = str(stopped.parent / name)
    for model in (path, Path(path)):
        pipe = DDIMPipeline.from_pretrained(model)
        assert holds(pipe.unet, stopped, step, weights)
        assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert holds(UNet2DModel.from_pretrained(path, "unet"), stopped, step, weights)
    assert DDIMScheduler.from_pretrained(path, subfolder="scheduler").config.prediction_type == "v_prediction"
    facts = describe(path)
    assert Path(facts["found"]) == checkpoint(stopped, step)
    assert facts["weights"].endswith(".raw.safetensors") == (weights == "model")
    assert is_model(path)


def test_raw_and_averaged_weights_differ(stopped: Path) -> None:
    images = [
        DDIMPipeline.from_pretrained(f"{stopped}{suffix}")(seeds=[0], num_inference_steps=3, output_type="np").images
        for suffix in ("", "@raw")
    ]
    assert np.abs(images[0] - images[1]).max() > 0


@pytest.mark.parametrize(("variant", "weights"), [(None, "ema"), ("raw", "model")])
def test_checkpoint_is_a_model_of_diffusers(stopped: Path, variant: str | None, weights: str) -> None:
    pipe = diffusers.DDIMPipeline.from_pretrained(checkpoint(stopped, 3), variant=variant)
    assert holds(pipe.unet, stopped, 3, weights)
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_result_stands_for_the_run(stopped: Path, make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    final = shutil.copytree(checkpoint(stopped, 3), tmp_path / "run" / "final")
    (final / "unet" / "diffusion_pytorch_model.raw.safetensors").unlink()
    assert holds(DDIMPipeline.from_pretrained(tmp_path / "run").unet, stopped, 3, "ema")
    # The result has no raw weights; the last checkpoint has.
    assert holds(DDIMPipeline.from_pretrained(f"{tmp_path / 'run'}@raw").unet, stopped, 6, "model")
    assert describe(f"{tmp_path / 'run'}@raw")["weights"].endswith(".raw.safetensors")


def test_models_are_not_written_over_runs(stopped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    pipe = DDIMPipeline.from_pretrained("mnist")
    for folder in (run, checkpoint(run, 6)):
        with pytest.raises(ValueError, match="is a training run or one of its checkpoints; write to another folder"):
            pipe.save_pretrained(folder)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").touch()
    tune = ["tune", "mnist", "--steps", "2", "--out"]
    with Commands(tmp_path, {"run": [*tune, "run"], "images": [*tune, "images"]}) as commands:
        assert (commands["run"].code, commands["images"].code) == (1, 1)
        assert "is a training run" in commands["run"].stderr
        assert "images is not empty; give another --out" in commands["images"].stderr
    assert holds(DDIMPipeline.from_pretrained(run).unet, stopped, 6, "ema")


def test_fewer_steps_than_the_checkpoint_has(
    stopped: Path, make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = make_config(max_steps=4, checkpoints={"every": 3}, scheduler={"prediction_type": "v_prediction"})
    with pytest.raises(ValueError, match="max_steps must be at least the step resumed from, 6, got 4"):
        train(config, tmp_path / "run", "cpu", resume=checkpoint(stopped, 6))


def test_damaged_checkpoints(stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The newest is skipped with a warning where it is not named, and refused where it is."""
    run = shutil.copytree(stopped, tmp_path / "run")
    weights = checkpoint(run, 6) / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"step-00000006 is damaged or incomplete: its files do not match SHA256SUMS"):
        DDIMPipeline.from_pretrained(checkpoint(run, 6))
    assert holds(DDIMPipeline.from_pretrained(run).unet, stopped, 3, "ema")
    assert [record.getMessage()[-13:] for record in caplog.records] == ["it is skipped"]
    shutil.rmtree(checkpoint(run, 3))
    with pytest.raises(FileNotFoundError, match="has no checkpoint that can be loaded as a model yet"):
        DDIMPipeline.from_pretrained(run)


def test_missing_variant_is_named(stopped: Path) -> None:
    with pytest.raises(FileNotFoundError, match="fp16"):
        DDIMPipeline.from_pretrained(f"{stopped}@fp16")
    with pytest.raises(ValueError, match="give the variant in the model's name or as an argument, not both"):
        DDIMPipeline.from_pretrained(f"{stopped}@raw", variant="raw")


@pytest.mark.parametrize("name", ["x" * 10_000, "x" * 10_000 + "@raw", "a\0b", "a\0b@raw"], ids=range(4))
def test_names_that_no_file_can_have(name: str) -> None:
    assert not is_model(name)
    with pytest.raises(FileNotFoundError, match="does not exist: it is not built in"):
        DDIMPipeline.from_pretrained(name)


def test_folder_whose_name_has_an_at_sign(stopped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint(stopped, 3), tmp_path / "mine@raw")
    assert holds(DDIMPipeline.from_pretrained(folder).unet, stopped, 3, "ema")
    assert split_variant(f"{folder}@raw") == (str(folder), "raw")


def test_init(stopped: Path, make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """A run that starts from another's raw weights, before its first step has changed anything."""
    config = make_config(max_steps=1, model={}, optim={"lr": 1e-12, "warmup_steps": 0}, checkpoints={"every": 1})
    config = config.model_copy(update={"init": f"{stopped}@raw", "model": {}})
    train(config, tmp_path / "run", "cpu")
    ours = load_checkpoint(checkpoint(tmp_path / "run", 1)).tensors["model"]
    theirs = load_checkpoint(checkpoint(stopped, 6)).tensors["model"]
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)


@pytest.fixture(scope="module")
def commands(stopped: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Commands that take a run or a checkpoint as their model."""
    folder = tmp_path_factory.mktemp("weights")
    model, few = str(checkpoint(stopped, 3)), ["--steps", "2"]
    images = sorted(map(str, image_folder.iterdir()))[:2]
    evaluated = ["--reference", str(image_folder), "-n", "8", "--metrics", "fid"]
    kinds = {
        "sample": ([model, "-n", "2"], ".npz"),
        "encode": ([*images, "--model", model], ".safetensors"),
        "edit": ([*images, "--model", model], ".png"),
        "interpolate": (["0", "1", "--model", model, "--frames", "3"], ".png"),
        "trajectory": ([model, "--frames", "2"], ".png"),
        "consistency": ([model], ".png"),
        "evaluate": ([model, *evaluated], ".json"),
    }
    table = {
        f"{name} {weights}": [name, *arguments, *few, "--weights", weights, "--out", f"{name}-{weights}{suffix}"]
        for name, (arguments, suffix) in kinds.items()
        for weights in ("ema", "raw")
    }
    shutil.copytree(stopped, folder / "run")
    raw = ["--weights", "raw"]
    curve = ["evaluate", "run", "--every-checkpoint", *evaluated, *few]
    table |= {
        "sample plain": ["sample", model, "-n", "2", *few, "--out", "plain.npz"],
        "sample @raw": ["sample", f"{model}@raw", "-n", "2", *few, "--out", "at.npz"],
        "info": ["info", model, *raw],
        "both": ["sample", f"{model}@raw", *raw],
        "neither": ["encode", *images, *raw],
        "wrong": ["sample", model, "--weights", "mean"],
        "images": ["evaluate", str(image_folder), *evaluated, *raw],
        "export": ["export", "run", "--step", "3", "--dtype", "float16", *raw, "--out", "exported"],
        "newest": ["export", "run", "--out", "newest"],
        "again": ["export", "run", "--out", "newest"],
        "no step": ["export", "run", "--step", "4", "--out", "new"],
        "no run": ["export", "mnist", "--out", "new"],
        "into": ["export", "run", "--out", "run"],
        "curve": [*curve, "--out", "c.png", "--out", "c.json"],
        "raw curve": [*curve, *raw, "--out", "raw.json"],
        "no checkpoints": ["evaluate", "mnist", "--every-checkpoint", *evaluated],
        "attributes": [*curve, "--attributes"],
    }
    with Commands(folder, table, {"again": ["newest"]}) as results:
        yield results


@pytest.mark.parametrize("name", ["sample", "encode", "edit", "interpolate", "trajectory", "consistency", "evaluate"])
def test_commands_take_the_weights_of_a_checkpoint(commands: Commands, name: str) -> None:
    averaged, raw = (content(commands.output(f"{name} {weights}")) for weights in ("ema", "raw"))
    assert averaged.shape == raw.shape
    assert not np.array_equal(averaged, raw)


def test_weights_are_those_of_the_name(commands: Commands) -> None:
    for first, second in (("ema", "plain"), ("raw", "@raw")):
        same = [content(commands.output(f"sample {weights}")) for weights in (first, second)]
        assert np.array_equal(*same)


def content(path: Path) -> np.ndarray:
    """What a command has computed."""
    if path.suffix == ".json":
        return np.array(json.loads(path.read_text())["metrics"]["fid"])
    if path.suffix == ".npz":
        return np.load(path)["arr_0"]
    if path.suffix == ".safetensors":
        return load_file(path)["latents"].numpy()
    return np.asarray(Image.open(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("both", "give the weights in the model's name or by --weights, not both, got @raw and raw"),
        ("neither", "--weights requires a model, such as --model runs/mine"),
        ("wrong", "--weights must be one of raw or ema, got 'mean'"),
        ("images", "--weights requires a model as what is evaluated"),
        ("again", "newest is not empty; pass --overwrite to replace a model in it, or write elsewhere"),
        ("no step", "--step must be one of 3 or 6, got 4"),
        (
            "no run",
            "mnist is not a training run with checkpoints; others are exported to x.onnx or x.xml",
        ),
        ("into", "run is a training run or one of its checkpoints; write to another folder"),
        ("no checkpoints", "--every-checkpoint requires a training run with checkpoints, got 'mnist'"),
        ("attributes", "--attributes has no effect beside --every-checkpoint; leave it out"),
    ],
)
def test_refusals_are_one_line(commands: Commands, name: str, message: str) -> None:
    result = commands[name]
    assert (result.code, result.stderr) == (1, f"ddim: {message}\n")


def test_info_names_the_weights(commands: Commands) -> None:
    assert "diffusion_pytorch_model.raw.safetensors" in commands["info"].stdout


def test_export_writes_a_plain_pipeline(commands: Commands, stopped: Path) -> None:
    raw, newest = commands.output("export"), commands.output("newest")
    expected = load_checkpoint(checkpoint(stopped, 3)).tensors["model"]
    files = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]
    for folder in (raw, newest):
        written = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
        assert written == [*files, "unet/diffusion_pytorch_model.safetensors"]
    theirs = diffusers.DDIMPipeline.from_pretrained(raw).unet.state_dict()
    halves = load_file(raw / "unet" / "diffusion_pytorch_model.safetensors")
    assert same_tensors(halves, {name: tensor.half() for name, tensor in expected.items()})
    assert theirs.keys() == expected.keys()
    assert holds(DDIMPipeline.from_pretrained(newest).unet, stopped, 6, "ema")
    assert commands["export"].stdout == "exported\n"
    assert "step-00000003, " in commands["export"].stderr


def test_curve_over_all_checkpoints(commands: Commands) -> None:
    """Its points are those of single evaluations."""
    assert commands["curve"].code == 0, commands["curve"].stderr
    points = json.loads((commands.folder / "c.json").read_text())["points"]
    assert [point["step"] for point in points] == list(STEPS)
    assert points[0]["fid"] == content(commands.output("evaluate ema"))
    with Image.open(commands.folder / "c.png") as plot:
        assert len(plot.convert("RGB").getcolors(2**24) or ()) > 10
    assert commands["curve"].stdout.splitlines()[0] == "step  Fréchet distance"
    assert "2 checkpoints; a run keeps its newest ones, and with checkpoints.keep_every others as well" in (
        commands["curve"].stderr
    )
    assert commands["raw curve"].code == 0
    raw = json.loads((commands.folder / "raw.json").read_text())["points"]
    assert raw[0]["fid"] == content(commands.output("evaluate raw"))


def test_page_shows_both_weights(stopped: Path) -> None:
    names = [f"{checkpoint(stopped, 3)}{suffix}" for suffix in ("", "@raw")]
    cache = ModelCache(names, device="cpu")
    assert [cache.facts(name)["weights"] for name in names] == [
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.raw.safetensors",
    ]
    images = [np.asarray(cache.open(name).sample_images(1, num_inference_steps=2)[0]) for name in names]
    assert not np.array_equal(*images)
