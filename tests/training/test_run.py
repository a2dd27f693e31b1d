"""Whole runs: what is in the folder, going on after every kind of end, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from ddim.pipeline import DDIMPipeline
from ddim.training import run as run_module
from ddim.training.config import TrainConfig, validate
from ddim.training.data import fingerprint
from ddim.training.run import train
from ddim.training.trainer import Trainer, TrainingStopped
from digits import TINY_MODEL, write_digits

MakeConfig = Callable[..., TrainConfig]
CPU = torch.device("cpu")


def weights(final: Path) -> dict[str, Tensor]:
    return DDIMPipeline.from_pretrained(final).unet.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(out: Path) -> list[dict[str, float]]:
    """The lines of the metrics, without the speed."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of the metrics every 4 steps."""
    monkeypatch.setattr(run_module, "LOG_EVERY", 4)


# --- what is there at the end


def test_the_folder_of_a_run(make_config: MakeConfig, images: Tensor, tmp_path: Path, often: None) -> None:
    samples = {"every": 6, "count": 5, "num_inference_steps": 2}
    config = make_config(samples=samples, checkpoint_every=5)
    out = tmp_path / "runs" / "one"
    assert train(config, out, CPU) == out / "final"
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["checkpoints", "config.yaml", "final", "loss.png", "metrics.jsonl", "samples"]
    )
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000010.pt", "step-00000012.pt"]

    assert [line["step"] for line in metrics(out)] == [4, 8, 12]
    assert all(0 < line["loss"] < 1.5 and line["grad_norm"] > 0 for line in metrics(out))

    curve = np.asarray(Image.open(out / "loss.png").convert("L"))
    assert curve.shape == (300, 600)
    assert curve.min() < 200 < curve.max()

    record = yaml.safe_load((out / "config.yaml").read_text())
    assert validate(record["config"]) == config
    assert record["data"] == {"images": 40, "sha256": fingerprint(images)}
    assert record["versions"].keys() == {"ddim", "torch", "numpy", "python"}

    names = ["final.png", "step-00000006.png", "step-00000012.png"]
    assert sorted(p.name for p in (out / "samples").iterdir()) == names
    grids = [np.asarray(Image.open(out / "samples" / name)) for name in names]
    # Five pictures of 8x8 in three columns and two rows.
    assert {grid.shape for grid in grids} == {(22, 32)}
    assert np.array_equal(grids[0], grids[2])
    assert not np.array_equal(grids[1], grids[2])
    expected = DDIMPipeline.from_pretrained(out / "final").paint(5, num_inference_steps=2)
    for index, picture in enumerate(expected):
        left, top = index % 3 * 10 + 2, index // 3 * 10 + 2
        there = grids[0][top : top + 8, left : left + 8].astype(int)
        assert np.abs(there - np.asarray(picture).astype(int)).max() <= 1

    before = {p: p.stat().st_mtime_ns for p in (out / "checkpoints").iterdir()}
    train(config, out, CPU)
    assert {p: p.stat().st_mtime_ns for p in (out / "checkpoints").iterdir()} == before


def test_the_result_holds_the_average_and_loads_in_diffusers(
    make_config: MakeConfig, images: Tensor, tmp_path: Path
) -> None:
    final = train(make_config(scheduler={"prediction_type": "v_prediction"}), tmp_path, CPU)
    trainer = Trainer(make_config(), images, tmp_path, CPU)
    assert trainer.resume()
    assert same(weights(final), trainer.ema.state_dict())
    assert not same(weights(final), trainer.model.state_dict())

    ours, theirs = DDIMPipeline.from_pretrained(final), diffusers.DDIMPipeline.from_pretrained(final)
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


def test_samples_do_not_disturb_the_training(make_config: MakeConfig, tmp_path: Path) -> None:
    model = TINY_MODEL | {"dropout": 0.2}
    plain = train(make_config(model=model), tmp_path / "plain", CPU)
    samples = {"every": 1, "count": 2, "num_inference_steps": 1}
    painted = train(make_config(model=model, samples=samples), tmp_path / "painted", CPU)
    assert not (tmp_path / "plain" / "samples").exists()
    assert same(weights(plain), weights(painted))


# --- going on


def test_a_resumed_run_is_bit_identical(make_config: MakeConfig, images: Tensor, tmp_path: Path, often: None) -> None:
    entries = {"model": TINY_MODEL | {"dropout": 0.2}, "horizontal_flip": True, "seed": 5}
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    train(make_config(**entries), straight, CPU)
    train(make_config(**entries, max_steps=5), parts, CPU)
    assert [line["step"] for line in metrics(parts)] == [4]
    train(make_config(**entries), parts, CPU)

    assert same(weights(straight / "final"), weights(parts / "final"))
    assert metrics(straight) == metrics(parts)
    first, second = (Trainer(make_config(**entries), images, out, CPU) for out in (straight, parts))
    assert first.resume()
    assert second.resume()
    assert same(first.model.state_dict(), second.model.state_dict())
    for a, b in zip(*(t.optimizer.state_dict()["state"].values() for t in (first, second)), strict=True):
        assert same(a, b)


def test_a_truncated_newest_checkpoint_costs_some_steps_and_nothing_else(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, often: None
) -> None:
    config, out = make_config(checkpoint_every=5), tmp_path / "run"
    expected = weights(train(config, out, CPU))
    lines = metrics(out)
    newest = out / "checkpoints" / "step-00000012.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    assert same(weights(train(config, out, CPU)), expected)
    assert f"the checkpoint {newest} cannot be read and is skipped" in caplog.text
    assert metrics(out) == lines


def test_metrics_after_the_checkpoint_or_unfinished_are_dropped(
    make_config: MakeConfig, tmp_path: Path, often: None
) -> None:
    train(make_config(), tmp_path / "straight", CPU)
    out = tmp_path / "run"
    train(make_config(max_steps=8), out, CPU)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "loss": 99.0, "grad_norm": 1.0, "images_per_second": 1.0}\n{"step": 16, "lo')
    train(make_config(), out, CPU)
    assert metrics(out) == metrics(tmp_path / "straight")


def test_a_checkpoint_without_losses_is_taken_up(make_config: MakeConfig, images: Tensor, tmp_path: Path) -> None:
    train(make_config(max_steps=5), tmp_path, CPU)
    path = tmp_path / "checkpoints" / "step-00000005.pt"
    state = torch.load(path, weights_only=True)
    assert state.keys() == {"step", "model", "ema", "optimizer", "losses"}
    del state["losses"]
    torch.save(state, path)
    trainer = Trainer(make_config(), images, tmp_path, CPU)
    assert trainer.resume()
    assert (trainer.step, trainer.losses) == (5, [])


def test_entries_that_change_no_step_may_change(make_config: MakeConfig, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(make_config(max_steps=5), out, CPU)
    elsewhere = write_digits(tmp_path / "elsewhere", 40)
    config = make_config(data=str(elsewhere), max_steps=6, checkpoint_every=2, keep_checkpoints=1)
    train(config, out, CPU)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000006.pt"]
    assert validate(yaml.safe_load((out / "config.yaml").read_text())["config"]) == config


# --- what is refused


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"batch_size": 4, "precision": "bf16"}, "batch_size: 8 there, 4 here; precision: fp32 there, bf16 here"),
        ({"optim": {"lr": 1e-3}}, "optim: {.*'lr': 0.002.*} there, {.*'lr': 0.001.*} here"),
        ({"model": TINY_MODEL | {"dropout": 0.1}}, "model: "),
        ({"scheduler": {"beta_schedule": "squaredcos_cap_v2"}}, "scheduler: {} there"),
    ],
)
def test_other_settings_are_refused(
    make_config: MakeConfig, tmp_path: Path, entries: dict[str, Any], named: str
) -> None:
    train(make_config(max_steps=1), tmp_path, CPU)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"the run in .* was begun with other settings \({named}"):
        train(make_config(**entries), tmp_path, CPU)
    assert contents(tmp_path) == before


def test_other_data_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(make_config(max_steps=1), out, CPU)
    fewer = write_digits(tmp_path / "fewer", 39)
    with pytest.raises(ValueError, match=r"\(data: 40 other images there, 39 here\)"):
        train(make_config(data=str(fewer)), out, CPU)


def test_folders_that_are_no_run_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    train(make_config(max_steps=1), tmp_path / "empty", CPU, resume=False)
    with pytest.raises(FileExistsError, match="is not empty; give another folder, or --resume auto"):
        train(make_config(max_steps=1), tmp_path / "empty", CPU, resume=False)

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("stays")
    with pytest.raises(FileExistsError, match=r"is not empty and holds no run \(no config\.yaml\)"):
        train(make_config(), other, CPU)
    for text in ("batch_size: 8", "", "- 1", "config: [", "config: {}\ndata: {}"):
        (other / "config.yaml").write_text(text)
        with pytest.raises(FileExistsError, match=r"config\.yaml is no record of a run; give another folder"):
            train(make_config(), other, CPU)
    assert sorted(p.name for p in other.iterdir()) == ["config.yaml", "thesis.txt"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"data": "missing"}, "there is no missing"),
        ({"model": TINY_MODEL | {"norm_num_groups": 3}}, "norm_num_groups"),
        ({"model": TINY_MODEL | {"sample_size": 7}}, "multiples of 2"),
        (
            {"samples": {"num_inference_steps": 50}, "scheduler": {"num_train_timesteps": 20}},
            "num_inference_steps is 50; the model was trained with 20 timesteps",
        ),
    ],
)
def test_nothing_is_written_for_what_cannot_run(
    make_config: MakeConfig, tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        train(make_config(**entries), tmp_path / "run", CPU)
    assert not list(tmp_path.iterdir())


# --- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step(
    make_config: MakeConfig, images: Tensor, tmp_path: Path, number: signal.Signals
) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    trainer = Trainer(make_config(), images, tmp_path, CPU)
    message = rf"stopped by {number.name} after step 5; .*step-00000005\.pt is saved, the same command goes on"
    with pytest.raises(TrainingStopped, match=message):
        trainer.train(lambda progress: signal.raise_signal(number) if progress.step == 5 else None)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005.pt"]


def test_sigterm_to_the_command_and_the_same_command_again(
    make_config: MakeConfig, pictures: Path, tmp_path: Path
) -> None:
    config = make_config(max_steps=200)
    file, out = tmp_path / "mine.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude={"data"})))
    command = [str(Path(sys.executable).parent / "ddim"), "train", "--config", str(file), "--data", str(pictures)]
    command += ["--out", str(out), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}

    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (1, "")
    assert "Traceback" not in stderr
    told = [line for line in stderr.replace("\r", "\n").splitlines() if line and not line.startswith("training:")]
    (checkpoint,) = (out / "checkpoints").iterdir()
    step = int(checkpoint.stem.removeprefix("step-"))
    assert 50 <= step < 200
    assert told == [
        f"ddim: stopped by SIGTERM after step {step}; {checkpoint} is saved, the same command goes on from there"
    ]
    assert not (out / "final").exists()

    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{out / 'final'}\n")
    straight = tmp_path / "straight"
    train(config, straight, CPU)
    assert metrics(out) == metrics(straight)
    assert same(weights(out / "final"), weights(straight / "final"))
