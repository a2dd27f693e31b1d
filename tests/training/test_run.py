"""Whole runs: what is in the folder, going on after every kind of end, what is measured on the way, what is refused,
and the command.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import cli_batch
from ddim.data.dataset import CachedPictures, generator_for
from ddim.pipeline import DDIMPipeline
from ddim.training.checkpoint import load_checkpoint, load_newest
from ddim.training.config import TrainConfig, validate
from ddim.training.run import train
from ddim.training.trainer import Trainer
from ddim.unet import UNet2DModel
from digits import TINY_MODEL, digits, write_digits
from hub_server import WRITER, Hub

MakeConfig = Callable[..., TrainConfig]
CPU = torch.device("cpu")
RESTLESS = {"dropout": 0.2}


def weights(final: Path) -> dict[str, Tensor]:
    return DDIMPipeline.from_pretrained(final).unet.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is there at the end


@dataclass
class Run:
    config: TrainConfig
    out: Path
    final: Path


@pytest.fixture(scope="module")
def finished(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with everything in it; to be read only."""
    config = make_config(
        model=TINY_MODEL,
        scheduler={"prediction_type": "v_prediction"},
        data={"holdout": 12},
        samples={"every": 6, "count": 5, "num_inference_steps": 3},
        evaluate={"every": 6, "count": 10, "num_inference_steps": 2},
        checkpoints={"every": 5},
        log_every=4,
    )
    out = tmp_path_factory.mktemp("runs") / "made" / "one"
    return Run(config, out, train(config, out, "cpu"))


def test_the_folder_of_a_run(finished: Run) -> None:
    out, final = finished.out, finished.final
    assert final == out / "final"
    assert names(out) == sorted(
        ["checkpoints", "config.yaml", "final", "loss.png", "metrics.jsonl", "samples", "tensorboard"]
    )
    assert names(out / "checkpoints") == ["step-00000010", "step-00000012"]
    assert names(out / "samples") == ["step-00000006.png", "step-00000012.png"]
    assert names(final) == ["README.md", "loss.png", "model_index.json", "samples.png", "scheduler", "unet"]
    assert (final / "loss.png").read_bytes() == (out / "loss.png").read_bytes()
    with Image.open(out / "loss.png") as curve:
        assert curve.size == (600, 300)
        assert len(curve.convert("RGB").getcolors(2**24)) > 10


def test_the_record_of_a_run(finished: Run, images: Tensor) -> None:
    record = yaml.safe_load((finished.out / "config.yaml").read_text())
    assert record.keys() == {"config", "data", "device", "versions"}
    assert validate(record["config"]) == finished.config
    assert record["data"] == {"images": 40, "sha256": CachedPictures(images).fingerprint}
    assert re.fullmatch(r"cpu \(.+\)", record["device"])
    packages = {"ddim", "torch", "numpy", "pillow", "datasets", "accelerate", "safetensors", "pydantic"}
    assert record["versions"].keys() == packages | {"python", "cuda"}
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_grids_are_painted_from_the_same_seeds(finished: Run) -> None:
    files = [*sorted((finished.out / "samples").iterdir()), finished.final / "samples.png"]
    grids = [np.asarray(Image.open(file)) for file in files]
    # Five pictures of 8x8 in three columns and two rows.
    assert {grid.shape for grid in grids} == {(22, 32)}
    assert np.array_equal(grids[1], grids[2])
    assert not np.array_equal(grids[0], grids[1])
    expected = DDIMPipeline.from_pretrained(finished.final).paint(5, num_inference_steps=3)
    for index, picture in enumerate(expected):
        left, top = index % 3 * 10 + 2, index // 3 * 10 + 2
        there = grids[2][top : top + 8, left : left + 8].astype(int)
        assert np.abs(there - np.asarray(picture).astype(int)).max() <= 1


def test_the_result_holds_the_average_and_loads_in_diffusers(finished: Run) -> None:
    checkpoint = load_newest(finished.out / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 12
    assert same(weights(finished.final), checkpoint.tensors["ema"])
    assert not same(weights(finished.final), checkpoint.tensors["model"])

    ours, theirs = (kind.from_pretrained(finished.final) for kind in (DDIMPipeline, diffusers.DDIMPipeline))
    assert theirs.scheduler.config.prediction_type == "v_prediction"
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 500, 999])
    with torch.no_grad():
        torch.testing.assert_close(ours.unet(x, t).sample, theirs.unet(x, t).sample, rtol=1e-5, atol=1e-6)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    pictures = [
        pipe(3, torch.Generator().manual_seed(1), num_inference_steps=4, output_type="np").images
        for pipe in (ours, theirs)
    ]
    np.testing.assert_allclose(pictures[0], pictures[1], atol=1e-4)


def test_the_lines_of_the_metrics(finished: Run) -> None:
    found = lines(finished.out)
    assert [line["step"] for line in found] == [4, 6, 8, 12, 12]
    for line in found:
        if "loss" in line:
            assert line.keys() == {"step", "loss", "loss_by_quartile", "grad_norm", "learning_rate"}
            assert 0 < line["loss"] < 1.5
            assert line["grad_norm"] > 0
            assert len(line["loss_by_quartile"]) == 4
            assert line["learning_rate"] == 2e-3
        else:
            assert line.keys() == {"step", "held_out_loss", "frechet_distance"}


def test_tensorboard_reads_what_a_run_wrote(finished: Run) -> None:
    events = EventAccumulator(str(finished.out / "tensorboard"))
    events.Reload()
    losses, measured = [line for line in lines(finished.out) if "loss" in line], ("held_out_loss", "frechet_distance")
    shown = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    quarters = {f"loss_by_quartile/{quarter}" for quarter in (1, 2, 3, 4)}
    assert shown.keys() == quarters.union(
        ("loss", "grad_norm", "learning_rate", "images_per_second", "memory_mib"), measured
    )
    for name in ("loss", "grad_norm", "learning_rate"):
        assert shown[name] == [(line["step"], pytest.approx(line[name])) for line in losses]
    for quarter in (1, 2, 3, 4):
        expected = [(line["step"], line["loss_by_quartile"][quarter - 1]) for line in losses]
        assert shown[f"loss_by_quartile/{quarter}"] == [(s, pytest.approx(v)) for s, v in expected if v is not None]
    for name in measured:
        assert shown[name] == [
            (line["step"], pytest.approx(line[name])) for line in lines(finished.out) if name in line
        ]
    assert all(value > 0 for name in ("images_per_second", "memory_mib") for _, value in shown[name])
    for event, name in zip(events.Images("samples"), names(finished.out / "samples"), strict=True):
        assert name == f"step-{event.step:08d}.png"
        assert (event.width, event.height) == (32, 22)


def test_the_card_is_true(finished: Run) -> None:
    card = (finished.final / "README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(head) == {
        "library_name": "ddim",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers", "ddim"],
    }
    assert body.strip().startswith("# one\n\nA denoising diffusion model of 8x8 grey images")
    for file in re.findall(r"!\[[^]]*\]\(([^)]*)\)", body):
        assert (finished.final / file).is_file()
    assert "5 samples from seeds 0 to 4 at 3 steps, none picked" in body
    facts = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", body, re.MULTILINE))
    parameters = sum(tensor.numel() for tensor in weights(finished.final).values())
    assert facts["network"] == f"`UNet2DModel`, {parameters:,} parameters"
    assert facts["predicts"] == "v_prediction; linear betas, T = 1000"
    assert facts["weights"] == "exponential moving average, decay 0.9999"
    sha = yaml.safe_load((finished.out / "config.yaml").read_text())["data"]["sha256"]
    # Of 40 images, 12 are not trained on: 12 * 8 / 28 passes.
    assert facts["data"] == f"{finished.config.data.source}: 28 images, 12 more held out, SHA-256 {sha[:16]}"
    assert facts["length"] == "12 steps of 8 images, 3.4 passes over the data"
    assert re.fullmatch(r"\d+\.\d minutes on cpu \(.+\); processes: 1", facts["time"])
    assert facts["objective"] == "simple weighting, fp32"
    losses = [line["loss"] for line in lines(finished.out) if "loss" in line]
    assert facts["final loss"] == f"{np.mean(losses):.4f}, mean over the last 3 lines of the metrics"
    measured = lines(finished.out)[-1]
    assert facts["held out loss"] == f"{measured['held_out_loss']:.4g}, at step 12"
    assert facts["frechet distance"] == f"{measured['frechet_distance']:.4g}, at step 12"
    assert f"torch {torch.__version__}" in facts["versions"]
    settings = re.search(r"```yaml\n(.*)```", body, re.DOTALL)
    assert settings
    assert validate(yaml.safe_load(settings[1])) == finished.config


def test_a_run_that_is_finished_does_nothing_more(finished: Run, tmp_path: Path) -> None:
    out = shutil.copytree(finished.out, tmp_path / "one")
    before = {path: path.stat().st_mtime_ns for path in (out / "checkpoints").rglob("*")}
    metrics = (out / "metrics.jsonl").read_bytes()
    assert train(finished.config, out, "cpu") == out / "final"
    assert {path: path.stat().st_mtime_ns for path in (out / "checkpoints").rglob("*")} == before
    assert (out / "metrics.jsonl").read_bytes() == metrics
    assert same(weights(out / "final"), weights(finished.final))


def test_a_run_without_a_line_ends_well(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(max_steps=2, evaluate={"every": 1, "count": 0})
    final = train(config, tmp_path / "run", "cpu")
    assert lines(tmp_path / "run") == []
    assert names(final) == ["README.md", "loss.png", "model_index.json", "samples.png", "scheduler", "unet"]
    assert "final loss" not in (final / "README.md").read_text()


# --- what is measured


def trained_on(finished: Run, images: Tensor) -> tuple[Trainer, DDIMPipeline]:
    trainer = Trainer(finished.config, CachedPictures(images), Path("nowhere"), CPU)
    trainer.restore(load_checkpoint(finished.out / "checkpoints" / "step-00000012"))
    pipe = DDIMPipeline.from_pretrained(finished.final)
    pipe.set_progress_bar_config(disable=True)
    return trainer, pipe


def test_the_loss_on_held_out_images(finished: Run, images: Tensor) -> None:
    trainer, pipe = trained_on(finished, images)
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    held_out = trainer.held_out
    assert len(held_out) == 12
    x0 = images[held_out].double().numpy() / 127.5 - 1
    noise = torch.randn(x0.shape, generator=generator_for(0, "held-out noise", 0)).double().numpy()
    errors = []
    network = pipe.unet.double()
    for index in range(12):
        t = 1000 * index // 12
        signal, spread = np.sqrt(alphas[t]), np.sqrt(1 - alphas[t])
        noisy = torch.from_numpy(signal * x0[index] + spread * noise[index])[None]
        with torch.no_grad():
            predicted = network(noisy, torch.tensor([t])).sample[0].numpy()
        errors.append(np.square(predicted - (signal * noise[index] - spread * x0[index])).mean())
    assert lines(finished.out)[-1]["held_out_loss"] == pytest.approx(np.mean(errors), rel=1e-5)


def gaussian_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The Fréchet distance of the Gaussians of two sets (N, D), with no root of a singular matrix: for A = X'X and
    B = Y'Y, the trace of (AB)^(1/2) is the sum of the singular values of XY'.
    """
    x, y = ((part - part.mean(0)) / np.sqrt(len(part) - 1) for part in (first, second))
    distance = np.square(first.mean(0) - second.mean(0)).sum() + np.square(x).sum() + np.square(y).sum()
    return float(distance - 2 * np.linalg.svd(x @ y.T, compute_uv=False).sum())


def as_vectors(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture, np.float64).ravel() / 255 for picture in pictures])


def test_the_distance_to_held_out_images(finished: Run, images: Tensor) -> None:
    trainer, pipe = trained_on(finished, images)
    real = images[trainer.held_out].double().flatten(1).numpy() / 255
    expected = gaussian_distance(real, as_vectors(pipe.paint(10, num_inference_steps=2)))
    assert lines(finished.out)[-1]["frechet_distance"] == pytest.approx(expected, rel=1e-3)


def test_the_distance_to_images_that_are_trained_on(make_config: MakeConfig, images: Tensor, tmp_path: Path) -> None:
    """Where fewer are held out than samples wanted; all of them are the reference, whatever their order."""
    config = make_config(max_steps=2, data={"holdout": 4}, evaluate={"every": 2, "count": 36, "num_inference_steps": 2})
    final = train(config, tmp_path, "cpu")
    trainer = Trainer(config, CachedPictures(images), tmp_path, CPU)
    real = np.delete(images.double().flatten(1).numpy() / 255, trainer.held_out.numpy(), 0)
    assert real.shape == (36, 64)
    pipe = DDIMPipeline.from_pretrained(final)
    pipe.set_progress_bar_config(disable=True)
    expected = gaussian_distance(real, as_vectors(pipe.paint(36, num_inference_steps=2)))
    assert lines(tmp_path)[-1]["frechet_distance"] == pytest.approx(expected, rel=1e-3)


def test_samples_and_measures_do_not_disturb_the_training(make_config: MakeConfig, tmp_path: Path) -> None:
    common = {"model": RESTLESS, "data": {"holdout": 8}, "max_steps": 5}
    plain = train(make_config(**common), tmp_path / "plain", "cpu")
    busy = make_config(samples={"every": 1}, evaluate={"every": 1, "count": 4, "num_inference_steps": 1}, **common)
    painted = train(busy, tmp_path / "painted", "cpu")
    assert not (tmp_path / "plain" / "samples").exists()
    assert len(names(tmp_path / "painted" / "samples")) == 5
    assert same(weights(plain), weights(painted))


# --- going on


def test_a_run_in_parts_is_the_run_in_one(make_config: MakeConfig, tmp_path: Path) -> None:
    entries = {
        "model": RESTLESS,
        "data": {"holdout": 8, "horizontal_flip": True, "crop": "random"},
        "evaluate": {"every": 4, "count": 0},
        "checkpoints": {"every": 5, "keep": 3},
        "log_every": 3,
        "seed": 5,
    }
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    config = make_config(**entries)
    final = train(config, straight, "cpu")
    train(make_config(**entries | {"max_steps": 7}), parts, "cpu")
    assert [line["step"] for line in lines(parts)] == [3, 4, 6]
    # A newest checkpoint that is damaged costs some steps, and lines that belong to none are dropped.
    with (parts / "checkpoints" / "step-00000007" / "optimizer.safetensors").open("ab") as file:
        file.write(b"x")
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 99.0}\n{"step": 12, "lo')
    train(config, parts, "cpu")
    assert same(weights(final), weights(parts / "final"))
    assert (parts / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    for name in ("model", "ema", "optimizer"):
        files = [out / "checkpoints" / "step-00000012" / f"{name}.safetensors" for out in (straight, parts)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_goes_on_from_the_checkpoint_that_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(checkpoints={"every": 4, "keep": 3}, log_every=2)
    out, other = tmp_path / "run", tmp_path / "other"
    final = train(config, out, "cpu")
    metrics = (out / "metrics.jsonl").read_bytes()
    expected = weights(final)
    # Elsewhere, from a checkpoint of this run ...
    elsewhere = train(config, other, "cpu", resume=out / "checkpoints" / "step-00000008")
    assert [line["step"] for line in lines(other)] == [10, 12]
    assert same(weights(elsewhere), expected)
    # ... and here, from one that is not the newest.
    before = (out / "checkpoints" / "step-00000012" / "state.json").stat().st_ino
    train(config, out, "cpu", resume=out / "checkpoints" / "step-00000004")
    assert (out / "checkpoints" / "step-00000012" / "state.json").stat().st_ino != before
    assert (out / "metrics.jsonl").read_bytes() == metrics
    assert same(weights(final), expected)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*step-00000005"):
        train(config, out, "cpu", resume=out / "checkpoints" / "step-00000005")
    (out / "checkpoints" / "step-00000004" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"step-00000004 is damaged or not whole"):
        train(config, out, "cpu", resume=out / "checkpoints" / "step-00000004")


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_written(
    make_config: MakeConfig, finished: Run, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="the checkpoint is of another model"):
        train(make_config(), tmp_path / "run", "cpu", resume=finished.out / "checkpoints" / "step-00000012")
    assert names(tmp_path) == []


def test_a_run_ends_when_its_time_is_up_and_goes_on(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    train(make_config(max_steps=4, log_every=2), out, "cpu", max_minutes=1e-9)
    assert "the time is up after step 1 of 4; the same command goes on from there" in caplog.text
    assert names(out / "checkpoints") == ["step-00000001"]
    assert "| length | 1 steps of 8 images" in (out / "final" / "README.md").read_text()
    caplog.clear()
    train(make_config(max_steps=4, log_every=2), out, "cpu", max_minutes=100)
    assert "the time is up" not in caplog.text
    assert [line["step"] for line in lines(out)] == [2, 4]


def test_entries_that_change_no_step_may_change(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    train(make_config(max_steps=5), out, "cpu")
    elsewhere = write_digits(tmp_path / "elsewhere", 40)
    config = make_config(
        data={"source": str(elsewhere), "cache": "memory", "on_device": True, "max_unreadable": 0},
        samples={"every": 3, "count": 2},
        evaluate={"every": 3, "count": 4, "num_inference_steps": 1},
        checkpoints={"every": 2, "keep": 1},
        max_steps=6,
        gradient_checkpointing=True,
    )
    train(config, out, "cpu")
    assert names(out / "checkpoints") == ["step-00000006"]
    assert validate(yaml.safe_load((out / "config.yaml").read_text())["config"]) == config
    # An end that has been passed is none that time has cut off.
    before = weights(out / "final")
    train(make_config(max_steps=3), out, "cpu")
    assert same(weights(out / "final"), before)
    assert "the time is up" not in caplog.text


def test_what_a_process_left_that_died_at_once_is_no_run(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / ".config-a1b2c3.yaml").write_text("config:\n  da")
    train(make_config(max_steps=1), tmp_path, "cpu", resume="never")
    assert (tmp_path / "config.yaml").is_file()


# --- where a run starts from


def test_the_network_of_init_is_taken(make_config: MakeConfig, finished: Run, tmp_path: Path) -> None:
    tree = make_config(max_steps=1, init=str(finished.final), scheduler=finished.config.scheduler).model_dump()
    final = train(validate(tree | {"model": {}}), tmp_path / "run", "cpu")
    record = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["config"]
    assert {key: record["model"][key] for key in TINY_MODEL} == TINY_MODEL
    trainer = Trainer(validate(record), CachedPictures(torch.from_numpy(digits(40))[:, None]), tmp_path, CPU)
    first, second = weights(finished.final), weights(final)
    assert same(trainer.model.state_dict(), first)
    # A step at a quarter of the learning rate, 5e-4, is no larger than that.
    assert 4e-4 < max(float((second[name] - tensor).abs().max()) for name, tensor in first.items()) < 6e-4
    # The run goes on though the model it began with is away.
    config = validate(record | {"init": None, "max_steps": 2})
    train(config, tmp_path / "run", "cpu")


# --- what is refused


@pytest.fixture(scope="module")
def begun(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step; to be read only."""
    out = tmp_path_factory.mktemp("begun")
    train(make_config(max_steps=1), out, "cpu")
    return out


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"batch_size": 4, "precision": "bf16"}, "batch_size: 8 there, 4 here; precision: fp32 there, bf16 here"),
        ({"optim": {"lr": 1e-3}}, "optim.lr: 0.002 there, 0.001 here"),
        ({"model": {"dropout": 0.1}}, "model.dropout: None there, 0.1 here"),
        ({"scheduler": {"beta_end": 0.01}}, "scheduler.beta_end: None there, 0.01 here"),
        ({"data": {"holdout": 3}}, "data.holdout: 0 there, 3 here"),
        ({"objective": {"weighting": "min_snr"}}, "objective.weighting: simple there, min_snr here"),
        ({"ema": {"decay": 0.5}}, "ema.decay: 0.9999 there, 0.5 here"),
        ({"log_every": 5}, "log_every: 50 there, 5 here"),
    ],
)
def test_other_settings_are_refused(make_config: MakeConfig, begun: Path, entries: dict[str, Any], named: str) -> None:
    before = contents(begun)
    with pytest.raises(ValueError, match="was begun with other settings") as refusal:
        train(make_config(**entries), begun, "cpu")
    assert str(refusal.value) == (
        f"the run in {begun} was begun with other settings ({named}); go on with those, or give another folder"
    )
    assert contents(begun) == before


def test_other_data_is_refused(make_config: MakeConfig, begun: Path, tmp_path: Path) -> None:
    fewer, others = write_digits(tmp_path / "fewer", 39), write_digits(tmp_path / "others", 41)
    (others / "0000.png").unlink()
    before = contents(begun)
    for folder, count in ((fewer, 39), (others, 40)):
        with pytest.raises(ValueError, match=rf"\(data: 40 other images there, {count} here\)"):
            train(make_config(data={"source": str(folder)}), begun, "cpu")
    assert contents(begun) == before


def test_folders_that_are_no_run_are_refused(make_config: MakeConfig, begun: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="is not empty; give another folder, or --resume auto"):
        train(make_config(max_steps=1), begun, "cpu", resume="never")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("stays")
    with pytest.raises(FileExistsError, match=r"is not empty and holds no run \(no config\.yaml\)"):
        train(make_config(), other, "cpu")
    for text in ("batch_size: 8", "", "- 1", "config: [", "config: {}\ndata: {}", "config:\n  lr: 1"):
        (other / "config.yaml").write_text(text)
        with pytest.raises(FileExistsError, match=r"config\.yaml is no record of a run; give another folder"):
            train(make_config(), other, "cpu")
    assert names(other) == ["config.yaml", "thesis.txt"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"data": {"source": "missing"}}, "there is no missing"),
        ({"model": {"norm_num_groups": 3}}, "norm_num_groups"),
        ({"model": TINY_MODEL | {"sample_size": 7}}, "multiples of 2"),
        ({"batch_size": 41}, "has 40 images, of which 0 are held out; that is too few for a batch_size of 41"),
        ({"data": {"holdout": 33}}, "has 40 images, of which 33 are held out; that is too few for a batch_size of 8"),
        ({"init": "missing"}, "there is no model 'missing'"),
        ({"init": "mnist"}, "init: mnist is another model"),
        (
            {"samples": {"num_inference_steps": 50}, "scheduler": {"num_train_timesteps": 20}},
            "num_inference_steps is 50; the model was trained with 20 timesteps",
        ),
        (
            {"evaluate": {"every": 6, "count": 10}, "scheduler": {"num_train_timesteps": 20}},
            "num_inference_steps is 50; the model was trained with 20 timesteps",
        ),
    ],
)
def test_nothing_is_written_for_what_cannot_run(
    make_config: MakeConfig, tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        train(make_config(**entries), tmp_path / "run", "cpu")
    assert not list(tmp_path.iterdir())


# --- the command


@dataclass
class Result:
    code: int
    stdout: str
    stderr: str

    @property
    def told(self) -> list[str]:
        """The lines on stderr that are no progress bar."""
        found = self.stderr.replace("\r", "\n").splitlines()
        return [line for line in found if line and not line.startswith(("training:", "reading images"))]


SMALL = ["--config", "mine.yaml", "--data", "pictures", "--device", "cpu"]
COMMANDS = {
    "presets": ["train", "--list-presets"],
    "dry run": ["train", *SMALL, "--out", "dry", "--dry-run"],
    "published": ["train", *SMALL, "--out", "run", "--push-to-hub", "owner/digits"],
    "no folder": ["train", *SMALL],
    "no time": ["train", *SMALL, "--out", "none", "--max-minutes", "0"],
    "no such checkpoint": ["train", *SMALL, "--out", "none", "--resume", "nowhere"],
    "not empty": ["train", *SMALL, "--out", "run", "--resume", "never"],
    "no hub id": ["train", *SMALL, "--out", "none", "--push-to-hub", "digits"],
    "another seed": ["train", *SMALL, "--out", "run", "--seed", "7"],
    "too few": ["train", *SMALL, "--out", "none", "--batch-size", "100"],
    "no such entry": ["train", *SMALL, "--out", "none", "--set", "optim.rate=1"],
}


@pytest.fixture(scope="module")
def folder(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run."""
    folder = tmp_path_factory.mktemp("commands")
    write_digits(folder / "pictures", 40)
    config = make_config(max_steps=4, log_every=2).model_dump(mode="json", exclude={"data"})
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def hub() -> Any:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def results(folder: Path, hub: Hub) -> dict[str, Result]:
    """Of all commands above, in one process."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, cli_batch.__file__],
        input=json.dumps(list(COMMANDS.values())),
        capture_output=True,
        text=True,
        cwd=folder,
        env=own
        | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": WRITER,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        },
        check=True,
    )
    found = json.loads(done.stdout)
    return {
        name: Result(result["code"], result["stdout"], result["stderr"])
        for name, result in zip(COMMANDS, found, strict=True)
    }


def test_presets_are_listed(results: dict[str, Result]) -> None:
    assert (results["presets"].code, results["presets"].stderr) == (0, "")
    rows = results["presets"].stdout.splitlines()
    assert [row.split()[0] for row in rows] == sorted(row.split()[0] for row in rows)
    assert {"digits", "mnist", "cifar10"} < {row.split()[0] for row in rows}
    (mnist,) = [row for row in rows if row.startswith("mnist ")]
    assert re.match(r"mnist +1,805,121 parameters +28x28 +[\d,]+ steps of \d+ +\S", mnist)


def test_a_dry_run_tells_costs_and_writes_nothing(results: dict[str, Result], folder: Path) -> None:
    assert results["dry run"].code == 0, results["dry run"].stderr
    rows = dict(re.split(r" {2,}", row, maxsplit=1) for row in results["dry run"].stdout.splitlines())
    config = validate(yaml.safe_load((folder / "mine.yaml").read_text()) | {"data": {"source": "digits"}})
    parameters = UNet2DModel(**config.model).num_parameters()
    assert rows["images"] == "40"
    assert rows["parameters"] == f"{parameters:,}"
    assert rows["weights, average, gradients, moments"] == f"{20 * parameters / 2**20:,.0f} MiB"
    assert float(rows["a step"].removesuffix(" s")) > 0
    assert float(rows["memory in use"].removesuffix(" MiB").replace(",", "")) > 50
    assert not (folder / "dry").exists()
    assert not (folder / "cache" / "ddim").exists()


def test_the_result_is_published(results: dict[str, Result], folder: Path, hub: Hub) -> None:
    result = results["published"]
    assert (result.code, result.stdout) == (0, "run/final\n"), result.stderr
    repository = hub.repositories["owner/digits"]
    sha = repository.branches["main"]
    assert result.told[-1] == f"published: {hub.url}/owner/digits/commit/{sha}"
    final = folder / "run" / "final"
    expected = {path.relative_to(final).as_posix(): path.read_bytes() for path in final.rglob("*") if path.is_file()}
    assert len(expected) == 7
    assert repository.commits[sha] == expected | {".gitattributes": b""}


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("no folder", 2, "give a folder for the run, such as --out runs/mine"),
        ("no time", 2, "must be positive, got 0"),
        ("no such checkpoint", 1, "ddim: there is no checkpoint nowhere"),
        ("not empty", 1, "ddim: run is not empty; give another folder, or --resume auto to go on with the run in it"),
        ("no hub id", 1, "ddim: repo_id must be a hub id such as owner/name, got 'digits'"),
        (
            "another seed",
            1,
            "ddim: the run in run was begun with other settings (seed: 0 there, 7 here); go on with those, or give "
            "another folder",
        ),
        (
            "too few",
            1,
            "ddim: pictures has 40 images, of which 0 are held out; that is too few for a batch_size of 100",
        ),
        ("no such entry", 1, "ddim: training configuration, optim.rate: Extra inputs are not permitted"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    results: dict[str, Result], folder: Path, name: str, code: int, message: str
) -> None:
    result = results[name]
    assert (result.code, result.stdout) == (code, "")
    assert "Traceback" not in result.stderr
    if code == 1:
        assert result.told == [message]
    else:
        assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())
    assert not (folder / "none").exists()
