"""Whole runs: content of the folder, resuming, evaluation, invalid input, and the command."""

from __future__ import annotations

import logging
import os
import re
import shutil
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

from cli_batch import Commands
from ddim.data.dataset import CachedImageDataset
from ddim.data.seeding import generator_for
from ddim.io.locks import LOCK_NAME, OutputLock
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.training.checkpoint import TENSOR_FILES, load_checkpoint, load_newest
from ddim.training.config import TrainConfig, load_config, preset_names, validate
from ddim.training.progress import TrainingStopped
from ddim.training.run import complete_config, train
from ddim.training.trainer import Trainer
from ddim.unet import UNet2DModel
from digits import TINY_MODEL, digits, write_digits
from helpers import environment, file_names, read_jsonl, same_tensors
from hub_server import WRITER, Hub

MakeConfig = Callable[..., TrainConfig]
CPU = torch.device("cpu")
DROPOUT = {"dropout": 0.2}


def weights(final: Path) -> dict[str, Tensor]:
    return DDIMPipeline.from_pretrained(final).unet.state_dict()


def lines(out: Path) -> list[dict[str, Any]]:
    return read_jsonl(out / "metrics.jsonl")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the folder of a run


@dataclass
class Run:
    config: TrainConfig
    out: Path
    final: Path


@pytest.fixture(scope="module")
def completed(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with every feature enabled; read-only."""
    config = make_config(
        model=TINY_MODEL,
        scheduler={"prediction_type": "v_prediction"},
        data={"holdout": 12},
        samples={"every": 6, "count": 5, "num_inference_steps": 3},
        evaluate={"every": 6, "count": 10, "num_inference_steps": 2},
        checkpoints={"every": 5},
        log_every=4,
    )
    out = tmp_path_factory.mktemp("runs") / "new" / "one"
    return Run(complete_config(config), out, train(config, out, "cpu"))


def test_run_folder_layout(completed: Run) -> None:
    out, final = completed.out, completed.final
    assert final == out / "final"
    assert file_names(out) == sorted(
        [
            *("averages", "checkpoints", "config.yaml", "data.png", "final"),
            *("loss.png", "metrics.jsonl", "samples", "tensorboard"),
        ]
    )
    assert file_names(out / "checkpoints") == ["step-00000010", "step-00000012"]
    assert file_names(out / "samples") == ["step-00000006.png", "step-00000012.png"]
    assert file_names(final) == ["README.md", "loss.png", "model_index.json", "samples.png", "scheduler", "unet"]
    assert (final / "loss.png").read_bytes() == (out / "loss.png").read_bytes()
    with Image.open(out / "loss.png") as curve:
        assert curve.size == (600, 300)
        assert len(curve.convert("RGB").getcolors(2**24)) > 10


def test_run_record(completed: Run, images: Tensor) -> None:
    record = yaml.safe_load((completed.out / "config.yaml").read_text())
    assert record.keys() == {"config", "data", "device", "versions"}
    assert validate(record["config"]) == completed.config
    assert record["data"].pop("identity")
    assert record["data"] == {"images": 40, "sha256": CachedImageDataset(images).fingerprint}
    assert re.fullmatch(r"cpu \(.+\)", record["device"])
    packages = {"ddim", "torch", "numpy", "pillow", "datasets", "accelerate", "safetensors", "pydantic"}
    assert record["versions"].keys() == packages | {"python", "cuda"}
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_grids_use_the_same_seeds(completed: Run) -> None:
    files = [*sorted((completed.out / "samples").iterdir()), completed.final / "samples.png"]
    grids = [np.asarray(Image.open(file)) for file in files]
    # Five images of 8x8 in three columns and two rows.
    assert {grid.shape for grid in grids} == {(22, 32)}
    assert np.array_equal(grids[1], grids[2])
    assert not np.array_equal(grids[0], grids[1])
    expected = DDIMPipeline.from_pretrained(completed.final).sample_images(5, num_inference_steps=3)
    for index, image in enumerate(expected):
        left, top = index % 3 * 10 + 2, index // 3 * 10 + 2
        cell = grids[2][top : top + 8, left : left + 8].astype(int)
        assert np.abs(cell - np.asarray(image).astype(int)).max() <= 1


def test_result_holds_the_average_and_loads_in_diffusers(completed: Run) -> None:
    checkpoint = load_newest(completed.out / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 12
    assert same_tensors(weights(completed.final), checkpoint.tensors["ema"])
    assert not same_tensors(weights(completed.final), checkpoint.tensors["model"])

    ours, theirs = (kind.from_pretrained(completed.final) for kind in (DDIMPipeline, diffusers.DDIMPipeline))
    assert theirs.scheduler.config.prediction_type == "v_prediction"
    assert theirs.scheduler.config.clip_sample is False
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 500, 999])
    with torch.no_grad():
        torch.testing.assert_close(ours.unet(x, t).sample, theirs.unet(x, t).sample, rtol=1e-5, atol=1e-6)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    samples = [
        pipe(3, torch.Generator().manual_seed(1), num_inference_steps=4, output_type="np").images
        for pipe in (ours, theirs)
    ]
    np.testing.assert_allclose(samples[0], samples[1], atol=1e-4)


def test_metrics_lines(completed: Run) -> None:
    written = lines(completed.out)
    assert [line["step"] for line in written] == [4, 6, 8, 12, 12]
    for line in written:
        if "loss" in line:
            assert line.keys() == {"step", "loss", "loss_by_quartile", "grad_norm", "learning_rate"}
            assert 0 < line["loss"] < 1.5
            assert line["grad_norm"] > 0
            assert len(line["loss_by_quartile"]) == 4
            assert line["learning_rate"] == 2e-3
        else:
            assert line.keys() == {"step", "held_out_loss", "frechet_distance"}


def test_tensorboard_matches_metrics(completed: Run) -> None:
    events = EventAccumulator(str(completed.out / "tensorboard"))
    events.Reload()
    losses, measured = [line for line in lines(completed.out) if "loss" in line], ("held_out_loss", "frechet_distance")
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
            (line["step"], pytest.approx(line[name])) for line in lines(completed.out) if name in line
        ]
    assert all(value > 0 for name in ("images_per_second", "memory_mib") for _, value in shown[name])
    for event, name in zip(events.Images("samples"), file_names(completed.out / "samples"), strict=True):
        assert name == f"step-{event.step:08d}.png"
        assert (event.width, event.height) == (32, 22)


def test_model_card_matches_the_run(completed: Run) -> None:
    card = (completed.final / "README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(head) == {
        "library_name": "ddim",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers", "ddim"],
    }
    assert body.strip().startswith("# one\n\nA denoising diffusion model of 8x8 gray images")
    for file in re.findall(r"!\[[^]]*\]\(([^)]*)\)", body):
        assert (completed.final / file).is_file()
    assert "5 samples from seeds 0 to 4 at 3 steps, none picked" in body
    facts = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", body, re.MULTILINE))
    parameters = sum(tensor.numel() for tensor in weights(completed.final).values())
    assert facts["network"] == f"`UNet2DModel`, {parameters:,} parameters"
    assert facts["predicts"] == "v_prediction; linear betas, T = 1000"
    assert facts["weights"] == "exponential moving average, decay 0.9999"
    sha = yaml.safe_load((completed.out / "config.yaml").read_text())["data"]["sha256"]
    # Of 40 images, 12 are not trained on: 12 * 8 / 28 passes.
    assert facts["data"] == f"{completed.config.data.source}: 28 images, 12 more held out, SHA-256 {sha[:16]}"
    assert facts["length"] == "12 steps of 8 images, 3.4 passes over the data"
    assert re.fullmatch(r"\d+\.\d minutes on cpu \(.+\); processes: 1", facts["time"])
    assert facts["objective"] == "simple weighting, fp32"
    losses = [line["loss"] for line in lines(completed.out) if "loss" in line]
    assert facts["final loss"] == f"{np.mean(losses):.4f}, mean over the last 3 lines of the metrics"
    measured = lines(completed.out)[-1]
    assert facts["held out loss"] == f"{measured['held_out_loss']:.4g}, at step 12"
    assert facts["frechet distance"] == f"{measured['frechet_distance']:.4g}, at step 12"
    assert f"torch {torch.__version__}" in facts["versions"]
    settings = re.search(r"```yaml\n(.*)```", body, re.DOTALL)
    assert settings
    assert validate(yaml.safe_load(settings[1])) == completed.config


def test_completed_run_is_not_changed(completed: Run, tmp_path: Path) -> None:
    out = shutil.copytree(completed.out, tmp_path / "one")
    before = {path: path.stat().st_mtime_ns for path in (out / "checkpoints").rglob("*")}
    metrics = (out / "metrics.jsonl").read_bytes()
    assert train(completed.config, out, "cpu") == out / "final"
    assert {path: path.stat().st_mtime_ns for path in (out / "checkpoints").rglob("*")} == before
    assert (out / "metrics.jsonl").read_bytes() == metrics
    assert same_tensors(weights(out / "final"), weights(completed.final))


def test_run_without_metrics_lines_completes(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(max_steps=2, evaluate={"every": 1, "count": 0})
    final = train(config, tmp_path / "run", "cpu")
    assert lines(tmp_path / "run") == []
    assert file_names(final) == ["README.md", "loss.png", "model_index.json", "samples.png", "scheduler", "unet"]
    assert "final loss" not in (final / "README.md").read_text()


# --- evaluation


def trained_on(completed: Run, images: Tensor) -> tuple[Trainer, DDIMPipeline]:
    trainer = Trainer(completed.config, CachedImageDataset(images), Path("nowhere"), CPU)
    trainer.restore(load_checkpoint(completed.out / "checkpoints" / "step-00000012"))
    pipe = DDIMPipeline.from_pretrained(completed.final)
    pipe.set_progress_bar_config(disable=True)
    return trainer, pipe


def test_held_out_loss_matches_float64(completed: Run, images: Tensor) -> None:
    trainer, pipe = trained_on(completed, images)
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
    assert lines(completed.out)[-1]["held_out_loss"] == pytest.approx(np.mean(errors), rel=1e-5)


def gaussian_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The Fréchet distance of the Gaussians of two sets (N, D), with no root of a singular matrix: for A = X'X and
    B = Y'Y, the trace of (AB)^(1/2) is the sum of the singular values of XY'.
    """
    x, y = ((part - part.mean(0)) / np.sqrt(len(part) - 1) for part in (first, second))
    distance = np.square(first.mean(0) - second.mean(0)).sum() + np.square(x).sum() + np.square(y).sum()
    return float(distance - 2 * np.linalg.svd(x @ y.T, compute_uv=False).sum())


def as_vectors(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, np.float64).ravel() / 255 for image in images])


def test_distance_to_held_out_images(completed: Run, images: Tensor) -> None:
    trainer, pipe = trained_on(completed, images)
    real = images[trainer.held_out].double().flatten(1).numpy() / 255
    expected = gaussian_distance(real, as_vectors(pipe.sample_images(10, num_inference_steps=2)))
    assert lines(completed.out)[-1]["frechet_distance"] == pytest.approx(expected, rel=1e-3)


def test_distance_to_trained_images_with_few_held_out(make_config: MakeConfig, images: Tensor, tmp_path: Path) -> None:
    """All trained images are the reference here, so that their order does not matter."""
    config = make_config(max_steps=2, data={"holdout": 4}, evaluate={"every": 2, "count": 36, "num_inference_steps": 2})
    final = train(config, tmp_path, "cpu")
    trainer = Trainer(config, CachedImageDataset(images), tmp_path, CPU)
    real = np.delete(images.double().flatten(1).numpy() / 255, trainer.held_out.numpy(), 0)
    assert real.shape == (36, 64)
    pipe = DDIMPipeline.from_pretrained(final)
    pipe.set_progress_bar_config(disable=True)
    expected = gaussian_distance(real, as_vectors(pipe.sample_images(36, num_inference_steps=2)))
    assert lines(tmp_path)[-1]["frechet_distance"] == pytest.approx(expected, rel=1e-3)


def test_sampling_and_evaluation_do_not_change_training(make_config: MakeConfig, tmp_path: Path) -> None:
    common = {"model": DROPOUT, "data": {"holdout": 8}, "max_steps": 3}
    plain = train(make_config(**common), tmp_path / "plain", "cpu")
    busy = make_config(samples={"every": 1}, evaluate={"every": 1, "count": 4, "num_inference_steps": 1}, **common)
    busy_final = train(busy, tmp_path / "busy", "cpu")
    assert not (tmp_path / "plain" / "samples").exists()
    assert len(file_names(tmp_path / "busy" / "samples")) == 3
    assert same_tensors(weights(plain), weights(busy_final))


# --- resuming


def test_resumed_run_equals_uninterrupted_run(make_config: MakeConfig, tmp_path: Path) -> None:
    entries = {
        "model": DROPOUT,
        "data": {"holdout": 8, "horizontal_flip": True, "crop": "random"},
        "evaluate": {"every": 4, "count": 0},
        "checkpoints": {"every": 5, "keep": 3},
        "log_every": 3,
        "seed": 5,
    }
    uninterrupted, parts = tmp_path / "uninterrupted", tmp_path / "parts"
    config = make_config(**entries)
    final = train(config, uninterrupted, "cpu")
    train(make_config(**entries | {"max_steps": 7}), parts, "cpu")
    assert [line["step"] for line in lines(parts)] == [3, 4, 6]
    # A damaged newest checkpoint costs some steps, and lines after the one before it are dropped.
    with (parts / "checkpoints" / "step-00000007" / "optimizer.safetensors").open("ab") as file:
        file.write(b"x")
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 99.0}\n{"step": 12, "lo')
    train(config, parts, "cpu")
    assert same_tensors(weights(final), weights(parts / "final"))
    assert (parts / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    for name in TENSOR_FILES.values():
        files = [out / "checkpoints" / "step-00000012" / name for out in (uninterrupted, parts)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_resumes_from_a_named_checkpoint(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(max_steps=6, checkpoints={"every": 2, "keep": 3}, log_every=1)
    out, other = tmp_path / "run", tmp_path / "other"
    final = train(config, out, "cpu")
    metrics = (out / "metrics.jsonl").read_bytes()
    expected = weights(final)
    # In another folder, from a checkpoint of this run ...
    elsewhere = train(config, other, "cpu", resume=checkpoint(out, 4))
    assert [line["step"] for line in lines(other)] == [5, 6]
    assert same_tensors(weights(elsewhere), expected)
    # ... and in the same folder, from one that is not the newest.
    before = (checkpoint(out, 6) / "state.json").stat().st_ino
    train(config, out, "cpu", resume=checkpoint(out, 2))
    assert (checkpoint(out, 6) / "state.json").stat().st_ino != before
    assert (out / "metrics.jsonl").read_bytes() == metrics
    assert same_tensors(weights(final), expected)
    with pytest.raises(FileNotFoundError, match=r"the checkpoint .*step-00000005 does not exist"):
        train(config, out, "cpu", resume=checkpoint(out, 5))
    (checkpoint(out, 2) / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"step-00000002 is damaged or incomplete"):
        train(config, out, "cpu", resume=checkpoint(out, 2))


def test_checkpoint_of_another_model_raises_before_writing(
    make_config: MakeConfig, completed: Run, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="the checkpoint is of another model"):
        train(make_config(), tmp_path / "run", "cpu", resume=completed.out / "checkpoints" / "step-00000012")
    assert file_names(tmp_path) == []


def test_resumes_after_time_limit(make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "run"
    train(make_config(max_steps=4, log_every=2), out, "cpu", max_minutes=1e-9)
    assert "time limit reached after step 1 of 4; run again to resume" in caplog.text
    assert file_names(out / "checkpoints") == ["step-00000001"]
    assert "| length | 1 steps of 8 images" in (out / "final" / "README.md").read_text()
    caplog.clear()
    train(make_config(max_steps=4, log_every=2), out, "cpu", max_minutes=100)
    assert "time limit reached" not in caplog.text
    assert [line["step"] for line in lines(out)] == [2, 4]


def test_resumes_with_entries_that_may_change(
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
    assert file_names(out / "checkpoints") == ["step-00000006"]
    assert validate(yaml.safe_load((out / "config.yaml").read_text())["config"]) == complete_config(config)
    # max_steps below the current step does not count as a time limit.
    before = weights(out / "final")
    train(make_config(max_steps=3), out, "cpu")
    assert same_tensors(weights(out / "final"), before)
    assert "time limit reached" not in caplog.text


def test_partial_config_file_is_not_a_run(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / ".writing-config-a1b2c3d4.yaml").write_text("config:\n  da")
    (tmp_path / LOCK_NAME).write_text("{")
    train(make_config(max_steps=1), tmp_path, "cpu", resume="never")
    assert (tmp_path / "config.yaml").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_diverged_run_resumes_with_a_lower_learning_rate(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the message advises works in the same folder: from the last checkpoint, or from the one before."""
    caplog.set_level("INFO", "ddim.training")

    def run(lr: float, every: int, **arguments: Any) -> None:
        optim = {"lr": lr, "warmup_steps": 0}
        config = make_config(max_steps=4, checkpoints={"every": every, "keep": 2}, log_every=1, optim=optim)
        train(config, tmp_path / f"every-{every}", "cpu", **arguments)

    # Without a checkpoint the run starts again.
    with pytest.raises(TrainingStopped, match=r"last checkpoint: none; start the run again with a lower optim\.lr$"):
        run(1e30, every=3)
    run(1e-3, every=3)
    # Where the last checkpoint diverged, the one before is named.
    run(1e-3, every=1, max_minutes=0)
    with pytest.raises(TrainingStopped, match=r"; use resume=(\S+step-00000001) and a lower optim\.lr$") as caught:
        run(1e30, every=1)
    run(1e-3, every=1, resume=Path(str(caught.value).partition("resume=")[2].split()[0]))
    assert "optim.lr is 0.001 from step 1 on; it was 1e+30" in caplog.text
    for out in (tmp_path / "every-3", tmp_path / "every-1"):
        assert yaml.safe_load((out / "config.yaml").read_text())["config"]["optim"]["lr"] == 1e-3
        assert [line["step"] for line in read_jsonl(out / "metrics.jsonl")] == [1, 2, 3, 4]


def test_run_without_a_checkpoint_starts_again_with_any_configuration(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match="start the run again"):
        train(make_config(max_steps=4, optim={"lr": 1e30, "warmup_steps": 0}), tmp_path, "cpu")
    train(make_config(max_steps=1, seed=1), tmp_path, "cpu")
    assert validate(read_record(tmp_path)["config"]).seed == 1
    assert "history" not in read_record(tmp_path)


def read_record(out: Path) -> dict[str, Any]:
    return yaml.safe_load((out / "config.yaml").read_text())


LONGER: dict[str, Any] = {"log_every": 1, "checkpoints": {"every": 2, "keep": 9}}


def test_longer_run_with_a_constant_rate(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ddim.training")
    for max_steps in (4, 8):
        train(make_config(max_steps=max_steps, optim={"lr": 2e-3, "warmup_steps": 2}, **LONGER), tmp_path, "cpu")
    assert "max_steps is 8 from step 4 on; it was 4" in caplog.messages
    assert "the learning rate is that of a run" not in caplog.text
    assert [line["learning_rate"] for line in lines(tmp_path)][4:] == pytest.approx([2e-3] * 4)
    assert read_record(tmp_path)["history"] == [{"step": 4, "changes": {"max_steps": [4, 8]}}]


def test_longer_run(make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From the change on, the learning rate is that of a run which had the new length from its start."""
    caplog.set_level("INFO", "ddim.training")
    optim, entries, out = {"lr": 2e-3, "warmup_steps": 2, "decay": "linear"}, LONGER, tmp_path / "run"
    train(make_config(max_steps=4, optim=optim, **entries), out, "cpu")
    caplog.clear()
    train(make_config(max_steps=4, optim=optim, **entries), out, "cpu")
    assert "the run is complete at step 4 of 4; a larger max_steps trains on" in caplog.messages
    assert "history" not in read_record(out)
    longer = make_config(max_steps=8, optim=optim, **entries)
    train(longer, out, "cpu")
    assert "max_steps is 8 from step 4 on; it was 4" in caplog.messages
    rate = "the learning rate is that of a run of 8 steps from its start: 0.00133 in the next step (before: 0), 0 at "
    assert f"{rate}the end" in caplog.messages
    rates = [line["learning_rate"] for line in lines(out)]
    assert rates[4:] == pytest.approx([2e-3 * k / 6 for k in (4, 3, 2, 1)])
    history = [{"step": 4, "changes": {"max_steps": [4, 8]}}]
    assert read_record(out)["history"] == history
    assert "| history | from step 4 on: max_steps 8 instead of 4 |" in (out / "final" / "README.md").read_text()
    # The same command resumes, with the same record and to the byte; a later change is added, ...
    expected = {path: content for path, content in contents(out / "checkpoints").items() if path.name != "state.json"}
    shutil.rmtree(out / "checkpoints" / "step-00000008")
    train(longer, out, "cpu")
    assert read_record(out)["history"] == history
    assert all(path.read_bytes() == content for path, content in expected.items() if path.name != "SHA256SUMS")
    train(make_config(max_steps=8, optim=optim | {"lr": 1e-3}, **entries), out, "cpu", resume=checkpoint(out, 6))
    assert read_record(out)["history"] == [*history, {"step": 6, "changes": {"optim.lr": [2e-3, 1e-3]}}]
    # ... and what was changed in steps that are taken anew is not part of the run.
    train(make_config(max_steps=8, optim=optim | {"lr": 5e-4}, **entries), out, "cpu", resume=checkpoint(out, 2))
    changes = {"max_steps": [4, 8], "optim.lr": [2e-3, 5e-4]}
    assert read_record(out)["history"] == [{"step": 2, "changes": changes}]


def checkpoint(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def test_second_process_is_refused(make_config: MakeConfig, started: Path) -> None:
    before = contents(started)
    with OutputLock(started / LOCK_NAME):
        message = f"^{started} is in use by process {os.getpid()}; wait until it has ended, or use another folder$"
        with pytest.raises(RuntimeError, match=message):
            train(make_config(max_steps=9), started, "cpu")
    assert contents(started) == before


# --- init


def test_model_is_taken_from_init(make_config: MakeConfig, completed: Run, tmp_path: Path) -> None:
    tree = make_config(max_steps=1, init=str(completed.final)).model_dump()
    final = train(validate(tree | {"model": {}}), tmp_path / "run", "cpu")
    record = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["config"]
    assert {key: record["model"][key] for key in TINY_MODEL} == TINY_MODEL
    assert record["scheduler"] == {"clip_sample": False, "prediction_type": "v_prediction"}
    trainer = Trainer(validate(record), CachedImageDataset(torch.from_numpy(digits(40))[:, None]), tmp_path, CPU)
    first, second = weights(completed.final), weights(final)
    assert same_tensors(trainer.model.state_dict(), first)
    # A step at a quarter of the learning rate, 5e-4, is no larger than that.
    assert 4e-4 < max(float((second[name] - tensor).abs().max()) for name, tensor in first.items()) < 6e-4
    # The run resumes without the model that it started from.
    config = validate(record | {"init": None, "max_steps": 2})
    train(config, tmp_path / "run", "cpu")


@pytest.mark.parametrize("preset", preset_names())
def test_presets_do_not_clip(preset: str) -> None:
    def completed_scheduler(*settings: str) -> dict[str, Any]:
        return complete_config(load_config(preset, settings=["data.source=digits", *settings])).scheduler

    own = load_config(preset, settings=["data.source=digits"]).scheduler
    assert completed_scheduler() == {"clip_sample": False, **own}
    assert completed_scheduler("scheduler.clip_sample=true") == {"clip_sample": True, **own}
    assert completed_scheduler("scheduler.beta_end=0.01") == {"clip_sample": False, "beta_end": 0.01, **own}


@pytest.mark.parametrize("clip_sample", [True, False])
def test_scheduler_is_taken_from_init(clip_sample: bool, make_config: MakeConfig, tmp_path: Path) -> None:
    """Fine-tuning keeps the schedule and the settings of sampling, but not timesteps learned for other weights."""
    saved = {"beta_schedule": "scaled_linear", "clip_sample": clip_sample, "timestep_spacing": "trailing"}
    learned = {"solver_order": 2, "timesteps_by_steps": {"2": [900, 100]}}
    unet = UNet2DModel(**make_config().model)
    DDIMPipeline(unet, DDIMScheduler(**saved, **learned)).save_pretrained(tmp_path / "saved")
    init = str(tmp_path / "saved")
    assert complete_config(make_config(init=init)).scheduler == saved
    changed = {"clip_sample": not clip_sample, "beta_schedule": "linear"}
    assert complete_config(make_config(init=init, scheduler=changed)).scheduler == saved | changed


def test_scheduler_entries_are_checked_beside_those_of_init(make_config: MakeConfig, tmp_path: Path) -> None:
    """A schedule that ends in noise requires another prediction than epsilon, which `init` may have."""
    unet = UNet2DModel(**make_config().model)
    for prediction_type in ("v_prediction", "epsilon"):
        DDIMPipeline(unet, DDIMScheduler(prediction_type=prediction_type)).save_pretrained(tmp_path / prediction_type)
    zero_snr = {"rescale_betas_zero_snr": True}
    config = make_config(init=str(tmp_path / "v_prediction"), scheduler=zero_snr)
    assert complete_config(config).scheduler == {"clip_sample": True, "prediction_type": "v_prediction"} | zero_snr
    with pytest.raises(ValueError, match=r"scheduler\.prediction_type: must be v_prediction or sample"):
        complete_config(make_config(init=str(tmp_path / "epsilon"), scheduler=zero_snr))


def test_unusable_schedule_of_init_raises(make_config: MakeConfig, tmp_path: Path) -> None:
    unet = UNet2DModel(**make_config().model)
    DDIMPipeline(unet, DDIMScheduler(rescale_betas_zero_snr=True)).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"scheduler\.prediction_type: must be v_prediction or sample"):
        complete_config(make_config(init=str(tmp_path / "saved")))


def test_run_recorded_without_clipping_resumes(make_config: MakeConfig, tmp_path: Path) -> None:
    """Records of version 0.1 have no `scheduler.clip_sample`; it changes no weights."""
    train(make_config(max_steps=1), tmp_path, "cpu")
    record = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del record["config"]["scheduler"]["clip_sample"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(record))
    final = train(make_config(max_steps=2), tmp_path, "cpu")
    assert DDIMPipeline.from_pretrained(final).scheduler.config.clip_sample is False


# --- invalid input


@pytest.fixture(scope="module")
def started(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step; read-only."""
    out = tmp_path_factory.mktemp("started")
    train(make_config(max_steps=1), out, "cpu")
    return out


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"seed": 1}, "seed: expected 0, got 1"),
        ({"batch_size": 4, "precision": "bf16"}, "batch_size: expected 8, got 4; precision: expected fp32, got bf16"),
        ({"optim": {"warmup_steps": 7}}, "optim.warmup_steps: expected 4, got 7"),
        ({"model": {"dropout": 0.1}}, "model.dropout: expected None, got 0.1"),
        ({"scheduler": {"beta_end": 0.01}}, "scheduler.beta_end: expected None, got 0.01"),
        ({"data": {"holdout": 3}}, "data.holdout: expected 0, got 3"),
        ({"objective": {"weighting": "min_snr"}}, "objective.weighting: expected simple, got min_snr"),
        ({"ema": {"decay": 0.5}}, "ema.decay: expected 0.9999, got 0.5"),
        ({"log_every": 5}, "log_every: expected 50, got 5"),
    ],
)
def test_incompatible_configuration_raises(
    make_config: MakeConfig, started: Path, entries: dict[str, Any], named: str
) -> None:
    before = contents(started)
    with pytest.raises(ValueError, match="has another configuration") as caught:
        train(make_config(**entries), started, "cpu")
    assert str(caught.value) == (
        f"the run in {started} has another configuration ({named}); resume it with its own, or use another folder"
    )
    assert contents(started) == before


def test_other_data_raises(make_config: MakeConfig, started: Path, tmp_path: Path) -> None:
    fewer, others = write_digits(tmp_path / "fewer", 39), write_digits(tmp_path / "others", 41)
    (others / "0000.png").unlink()
    before = contents(started)
    for folder, count in ((fewer, 39), (others, 40)):
        with pytest.raises(
            ValueError, match=rf"\(data: expected 40 images \(SHA-256 \w{{16}}\), got {count} images \(SHA"
        ):
            train(make_config(data={"source": str(folder)}), started, "cpu")
    assert contents(started) == before


def test_resumes_where_images_can_no_longer_be_cached(
    make_config: MakeConfig,
    started: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    runs = [shutil.copytree(started, tmp_path / name) for name in ("cached", "uncached")]
    train(make_config(max_steps=2), runs[0], "cpu")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("ddim.data.dataset.MEMORY_CACHE_BYTES", 1)
    caplog.clear()
    train(make_config(max_steps=2, data={"cache": "disk"}), runs[1], "cpu")
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "the cached images" in warnings[0]
    assert same_tensors(*(weights(run / "final") for run in runs))


def test_folder_without_a_run_raises(make_config: MakeConfig, started: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileExistsError, match="is not empty; use resume='auto' to resume the run in it, or another folder"
    ):
        train(make_config(max_steps=1), started, "cpu", resume="never")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("stays")
    with pytest.raises(FileExistsError, match=r"is not empty and does not hold a run \(no config\.yaml\)"):
        train(make_config(), other, "cpu")
    for text in ("batch_size: 8", "", "- 1", "config: [", "config: {}\ndata: {}", "config:\n  lr: 1"):
        (other / "config.yaml").write_text(text)
        with pytest.raises(FileExistsError, match=r"config\.yaml is not the record of a run; use another folder"):
            train(make_config(), other, "cpu")
    assert file_names(other) == ["config.yaml", "thesis.txt"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"data": {"source": "missing"}}, "missing does not exist"),
        ({"model": {"norm_num_groups": 3}}, "norm_num_groups"),
        ({"model": TINY_MODEL | {"sample_size": 7}}, "multiples of 2"),
        ({"batch_size": 41}, r"batch_size must be at most .* 40 \(.* has 40, data.holdout is 0\), got 41"),
        ({"data": {"holdout": 33}}, r"batch_size must be at most .* 7 \(.* has 40, data.holdout is 33\), got 8"),
        ({"init": "missing"}, "the model 'missing' does not exist"),
        ({"init": "mnist"}, "init: the weights of mnist do not fit the model: "),
        (
            {"samples": {"num_inference_steps": 50}, "scheduler": {"num_train_timesteps": 20}},
            r"^training configuration, samples\.num_inference_steps: .* must be at most 20, .*, got 50$",
        ),
        (
            {"evaluate": {"every": 6, "count": 10}, "scheduler": {"num_train_timesteps": 20}},
            r"^training configuration, evaluate\.num_inference_steps: .* must be at most 20, .*, got 50$",
        ),
    ],
)
def test_invalid_runs_write_nothing(
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
    def messages(self) -> list[str]:
        """The lines on stderr that are not progress bars."""
        lines = self.stderr.replace("\r", "\n").splitlines()
        return [line for line in lines if line and not line.startswith(("training:", "reading images"))]


SMALL = ["--config", "mine.yaml", "--data", "images", "--device", "cpu"]
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
    "no such entry": ["train", *SMALL, "--out", "none", "--set", "optim.momentum=1"],
}


@pytest.fixture(scope="module")
def folder(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run."""
    folder = tmp_path_factory.mktemp("commands")
    write_digits(folder / "images", 40)
    config = make_config(max_steps=4, log_every=2).model_dump(mode="json", exclude={"data"})
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def hub() -> Any:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def results(folder: Path, hub: Hub) -> dict[str, Result]:
    """The results of all commands above, run in one process."""
    variables = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": WRITER,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "COLUMNS": "200",
    }
    inherited = {name: value for name, value in environment(folder).items() if not name.startswith("HF_")}
    with Commands(folder, COMMANDS, variables=inherited | {"HF_HOME": str(folder / "hf")} | variables) as commands:
        return {name: Result(*commands[name][:3]) for name in COMMANDS}


def test_list_presets(results: dict[str, Result]) -> None:
    assert (results["presets"].code, results["presets"].stderr) == (0, "")
    rows = results["presets"].stdout.splitlines()
    assert [row.split()[0] for row in rows] == sorted(row.split()[0] for row in rows)
    assert {"digits", "mnist", "cifar10"} < {row.split()[0] for row in rows}
    (mnist,) = [row for row in rows if row.startswith("mnist ")]
    assert re.match(r"mnist +1,805,121 parameters +28x28 +[\d,]+ steps of \d+ +\S", mnist)


def test_dry_run_reports_costs_and_writes_nothing(results: dict[str, Result], folder: Path) -> None:
    assert results["dry run"].code == 0, results["dry run"].stderr
    rows = dict(re.split(r" {2,}", row, maxsplit=1) for row in results["dry run"].stdout.splitlines())
    config = validate(yaml.safe_load((folder / "mine.yaml").read_text()) | {"data": {"source": "digits"}})
    parameters = UNet2DModel(**config.model).num_parameters()
    assert rows["images"] == "40"
    assert rows["parameters"] == f"{parameters:,}"
    assert rows["weights, averages, gradients, moments"] == f"{28 * parameters / 2**20:,.0f} MiB"
    assert float(rows["time per step"].removesuffix(" s")) > 0
    assert float(rows["memory in use"].removesuffix(" MiB").replace(",", "")) > 50
    assert not (folder / "dry").exists()
    assert not (folder / "cache" / "ddim").exists()


def test_push_to_hub_uploads_the_result(results: dict[str, Result], folder: Path, hub: Hub) -> None:
    result = results["published"]
    assert (result.code, result.stdout) == (0, "run/final\n"), result.stderr
    repository = hub.repositories["owner/digits"]
    sha = repository.branches["main"]
    assert result.messages[-1] == f"published: {hub.url}/owner/digits/commit/{sha}"
    final = folder / "run" / "final"
    expected = {path.relative_to(final).as_posix(): path.read_bytes() for path in final.rglob("*") if path.is_file()}
    assert len(expected) == 7
    assert repository.commits[sha] == expected | {".gitattributes": b""}


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("no folder", 2, "give a folder for the run, such as --out runs/mine"),
        ("no time", 2, "must be positive, got 0"),
        ("no such checkpoint", 1, "ddim: the checkpoint nowhere does not exist"),
        (
            "not empty",
            1,
            r"ddim: run is not empty; use --resume auto to resume the run in it, or another folder",
        ),
        ("no hub id", 1, "ddim: --push-to-hub must be a hub id such as owner/name, got 'digits'"),
        (
            "another seed",
            1,
            r"ddim: the run in run has another configuration \(seed: expected 0, got 7\); resume it with its own, or "
            "use another folder",
        ),
        (
            "too few",
            1,
            r"ddim: --batch-size must be at most the number of images to train on, 40 \(images has 40, "
            r"data\.holdout is 0\), got 100",
        ),
        ("no such entry", 1, r"ddim: training configuration, optim\.momentum: is not an entry; optim has lr, .*"),
    ],
)
def test_errors_are_reported_in_one_line(
    results: dict[str, Result], folder: Path, name: str, code: int, message: str
) -> None:
    result = results[name]
    assert (result.code, result.stdout) == (code, "")
    assert "Traceback" not in result.stderr
    if code == 1:
        (line,) = result.messages
        assert re.fullmatch(message, line)
    else:
        assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())
    assert not (folder / "none").exists()
