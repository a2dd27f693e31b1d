"""Training of the discrete process: its objective against float64, resuming, and the commands."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from ddim.cli import app
from ddim.discrete import DiscreteDDIMPipeline, DiscreteDDIMScheduler
from ddim.discrete.process import marginal, max_sigma, posterior
from ddim.io.runs import CHECKPOINTS
from ddim.training.config import ObjectiveConfig, TrainConfig, validate
from ddim.training.discrete import DiscreteObjective
from ddim.training.run import train
from digits import TINY_MODEL, digits, write_digits
from helpers import rand, randn, read_jsonl, same_tensors, seeded

ONE_LEVEL: dict[str, Any] = {
    "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
}
MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def make_config(tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    images = write_digits(tmp_path_factory.mktemp("images"), 40)
    base: dict[str, Any] = {
        "process": "discrete",
        "data": {"source": str(images), "holdout": 8},
        "model": TINY_MODEL | ONE_LEVEL,
        "batch_size": 8,
        "max_steps": 4,
        "optim": {"lr": 2e-3, "warmup_steps": 2},
        "samples": {"every": 0, "count": 4, "num_inference_steps": 2},
        "evaluate": {"every": 2, "count": 4, "num_inference_steps": 2},
        "checkpoints": {"every": 2},
        "trackers": (),
    }
    return lambda **entries: validate(base | entries)


# --- the objective


@pytest.mark.parametrize("weighting", ["simple", "kl"])
def test_losses_are_those_of_enumeration(weighting: str) -> None:
    K, scheduler = 3, DiscreteDDIMScheduler(num_values=3, num_train_timesteps=10)
    objective = DiscreteObjective(scheduler, weighting=weighting)
    x0, t = 2 * rand(4, 1, 2, 2) - 1, torch.tensor([0, 3, 7, 9])
    noise = objective.draw_noise(x0.shape, seeded(1))
    noisy = objective.noised(x0, noise, t)
    target, logits = objective.target(x0, noise, t, noisy), randn(4, K, 2, 2, seed=2)
    found = objective.losses(logits, target, noisy, t)
    predicted, alphas = logits.double().softmax(1), scheduler.alphas_cumprod_float64
    for n, timestep in enumerate(t.tolist()):
        alpha, alpha_prev = alphas[timestep], alphas[timestep - 1] if timestep else 1.0
        losses = []
        for h, w in itertools.product(range(2), range(2)):
            p, original = predicted[n, :, h, w], torch.eye(K, dtype=torch.float64)[target[n, 0, h, w]]
            sample = (noisy[n, :, h, w].double() + 1) / 2
            if weighting == "simple":
                losses.append(-float((original * p.log()).sum()))
                continue
            posteriors = [posterior(sample, x, alpha, alpha_prev, max_sigma(alpha, alpha_prev)) for x in (original, p)]
            losses.append(sum(float(a * (a / b).log()) for a, b in zip(*posteriors, strict=True) if a > 1e-12))
        assert float(found[n]) == pytest.approx(np.mean(losses), rel=1e-4, abs=1e-6)
    weights = objective.loss_weights(ObjectiveConfig(weighting=weighting))  # type: ignore[arg-type]
    assert weights.tolist() == [1.0 if weighting == "simple" else 10.0] * 10


def test_network_is_given_values_of_the_marginals() -> None:
    scheduler = DiscreteDDIMScheduler(num_values=3)
    objective = DiscreteObjective(scheduler)
    x0, t = torch.full((1, 1, 50, 100), 1.0), torch.tensor([400])
    noisy = objective.noised(x0, objective.draw_noise(x0.shape, seeded()), t)
    assert noisy.unique().tolist() == [-1, 1]
    frequencies = (noisy[0] > 0).float().mean((1, 2))
    expected = marginal(torch.eye(3)[2], scheduler.alphas_cumprod[400])
    torch.testing.assert_close(frequencies, expected, atol=0.03, rtol=0)


# --- runs


@pytest.fixture(scope="module")
def run(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 4 values."""
    out: Path = tmp_path_factory.mktemp("run") / "run"
    train(make_config(scheduler={"num_values": 4}), out, "cpu")
    return out


def test_result_is_a_pipeline_of_the_values(run: Path) -> None:
    pipe = DiscreteDDIMPipeline.from_pretrained(run)
    assert (pipe.scheduler.num_values, pipe.unet.config.in_channels, pipe.sample_shape) == (4, 4, (1, 8, 8))
    card = (run / "final/README.md").read_text()
    assert "from ddim.discrete import DiscreteDDIMPipeline" in card
    assert "| predicts | x_0 of 4 values; squaredcos_cap_v2 betas, T = 1000 |" in card
    grid = np.asarray(Image.open(run / "final/samples.png"))
    assert set(np.unique(grid)) <= {0, 85, 170, 255}
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if "held_out_loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    # Nearly nothing was learned: the cross-entropy of 4 values is about log 4.
    assert lines[0]["held_out_loss"] == pytest.approx(np.log(4), rel=0.3)


def test_resumed_run_is_equal_to_the_byte(run: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(make_config(scheduler={"num_values": 4}, max_steps=2), out, "cpu")
    train(make_config(scheduler={"num_values": 4}), out, "cpu")
    name = f"{CHECKPOINTS}/step-00000004"
    for file in ("unet/diffusion_pytorch_model.safetensors", "optimizer.safetensors", "averages.safetensors"):
        assert (out / name / file).read_bytes() == (run / name / file).read_bytes()
    with pytest.raises(ValueError, match=r"another configuration.*scheduler\.num_values: expected 4, got 3"):
        train(make_config(scheduler={"num_values": 3}), out, "cpu")


def test_divergence_is_trained_with_labels(make_config: MakeConfig, tmp_path: Path) -> None:
    labels = np.arange(40) % 2
    np.savez(tmp_path / "digits.npz", arr_0=digits(40)[..., None], label=labels)
    data = {"source": str(tmp_path / "digits.npz"), "labels": "label"}
    config = make_config(data=data, objective={"weighting": "kl"}, evaluate={}, max_steps=1, log_every=1)
    pipe = DiscreteDDIMPipeline.from_pretrained(train(config, tmp_path / "run", "cpu"))
    assert pipe.classes is not None
    assert pipe.classes.count == 2
    # The bound of an image of two values, of which the network knows nothing, is about T times a KL of log 2 / T.
    assert 0.2 < read_jsonl(tmp_path / "run/metrics.jsonl")[0]["loss"] < 20


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"objective": {"weighting": "min_snr"}},
            "must be one of simple or kl for process=discrete",
        ),
        (
            {"process": "gaussian", "objective": {"weighting": "kl"}},
            "must be one of simple, min_snr",
        ),
        ({"scheduler": {"prediction_type": "epsilon"}}, "scheduler.prediction_type: is not an entry"),
        ({"scheduler": {"num_values": 1}}, "scheduler: num_values must be an integer from 2 to 256, got 1"),
        ({"init": "mnist"}, "init: requires process=gaussian, got discrete"),
        ({"distill": {"teacher": "mnist"}}, "distill.teacher: requires process=gaussian, got discrete"),
        ({"process": "poisson"}, "process: must be 'gaussian' or 'discrete', got 'poisson'"),
    ],
)
def test_invalid_configurations_are_refused(make_config: MakeConfig, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**entries)


def test_images_of_16_bits_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=digits(40)[..., None].astype(np.uint16) * 200)
    config = make_config(data={"source": str(tmp_path / "x.npz")}, evaluate={})
    with pytest.raises(ValueError, match="process=discrete requires images of 8 bits, got uint16"):
        train(config, tmp_path / "run", "cpu")
    assert not (tmp_path / "run").exists()


# --- commands


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> Result:
    words = [str(argument) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["ddim", *words])
    return CliRunner().invoke(app, words)


def test_commands(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, config = tmp_path / "run", make_config()
    settings = [f"model={json.dumps(config.model)}", f"data.source={config.data.source}", "samples.count=2"]
    settings += ["samples.num_inference_steps=2", "trackers=[]", "optim.warmup_steps=1", "ema.sigma_rels=[0.1]"]
    options = [word for setting in settings for word in ("--set", setting)]
    result = command(
        monkeypatch,
        *("train", "--process", "discrete", "--out", out, "--max-steps", "1", "--batch-size", "8", *options),
    )
    assert (result.exit_code, result.stdout) == (0, f"{out}/final\n"), result.output

    result = command(monkeypatch, "sample", out, "-n", "2", "--steps", "3", "--eta", "0.5", "-o", tmp_path / "x.npz")
    assert result.exit_code == 0, result.output
    pipe = DiscreteDDIMPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    expected = np.stack(pipe.sample_images(2, output_type="np", num_inference_steps=3, eta=0.5))
    assert np.array_equal(np.load(tmp_path / "x.npz")["arr_0"], expected.astype(np.uint8) * 255)
    result = command(monkeypatch, "sample", out, "-n", "2", "--steps", "3", "-o", tmp_path / "x.png")
    assert result.exit_code == 0, result.output
    assert np.unique(np.asarray(Image.open(tmp_path / "x.png"))).tolist() == [0, 255]

    result = command(monkeypatch, "info", out, "--json")
    assert json.loads(result.stdout)["images"]["num_values"] == 2
    result = command(monkeypatch, "ema", out, "--sigma-rel", "0.1", "--out", tmp_path / "ema")
    assert result.exit_code == 0, result.output
    assert command(monkeypatch, "export", out, "--weights", "raw", "--out", tmp_path / "raw").exit_code == 0
    average = DiscreteDDIMPipeline.from_pretrained(tmp_path / "ema").unet.state_dict()
    assert same_tensors(average, DiscreteDDIMPipeline.from_pretrained(tmp_path / "raw").unet.state_dict())

    for words, message in (
        (("sample", out, "--order", "2"), "order must be 1 for a discrete process, got 2"),
        (("sample", out, "--steps", "auto"), "--steps auto requires a model of Gaussian noise"),
        (("encode", tmp_path / "x.png", "--model", out), "is a discrete model"),
    ):
        result = command(monkeypatch, *words, "-o", tmp_path / "y.npz")
        assert result.exit_code == 1
        assert message in result.output + str(result.exception)


def test_printed_configuration_has_the_entries_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("train", "--process", "discrete", "--set", "scheduler.num_values=8", "--print-config")
    text = command(monkeypatch, *words).stdout
    assert "\nprocess: discrete\n" in text
    assert "\n  num_values: 8\n" in text
    assert "prediction_type" not in text
