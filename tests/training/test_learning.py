"""Training learns: on scikit-learn's digits, evaluated on held-out digits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ddim.data.loader import split_holdout
from ddim.pipeline import DDIMPipeline
from ddim.training.config import load_config
from ddim.training.run import train
from digits import TINY_MODEL, digits
from helpers import ALPHAS

HELD_OUT, STEPS = 297, 340
NETWORK = {
    "block_out_channels": [16, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the preset `digits` with a smaller network, some ten seconds long."""
    settings = [
        *("batch_size=32", f"max_steps={STEPS}", f"data.holdout={HELD_OUT}", "ema.decay=0.98", "samples.every=0"),
        *(f"evaluate.every={STEPS}", f"evaluate.count={HELD_OUT}", "evaluate.num_inference_steps=20"),
        *("optim.lr=1e-2", "optim.warmup_steps=20", "optim.decay=linear", f"checkpoints.every={STEPS}"),
    ]
    overrides = {f"model.{key}": value for key, value in (TINY_MODEL | NETWORK).items()}
    out = tmp_path_factory.mktemp("learned") / "run"
    train(load_config("digits", settings=settings, overrides=overrides), out, "cpu")
    return out


@pytest.fixture(scope="module")
def measured(learned: Path) -> dict[str, float]:
    """The last line of its metrics."""
    line = json.loads((learned / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == STEPS
    return line


def halves() -> tuple[np.ndarray, np.ndarray]:
    """The trained and the held-out digits, as float64 (n, 64) in [0, 1]."""
    pixels = digits().reshape(-1, 64) / 255
    training, held_out = split_holdout(len(pixels), HELD_OUT, seed=0)
    return pixels[training.numpy()], pixels[held_out.numpy()]


def linear_denoiser_loss(training: np.ndarray, held_out: np.ndarray) -> float:
    """Mean squared error of E[epsilon | x_t] for Gaussian data with the mean and covariance of `training`: the best
    that any denoiser can do that is linear in x_t. In closed form, for timesteps spread evenly.
    """
    variances, axes = np.linalg.eigh(np.cov(2 * training.T))
    error = np.square((held_out - training.mean(0)) * 2 @ axes).mean(0)
    total = 0.0
    for alpha in ALPHAS:
        # epsilon - predicted = (alpha v epsilon - sqrt(alpha (1 - alpha)) centered x_0) / (alpha v + 1 - alpha)
        scale = np.square(alpha * variances + 1 - alpha)
        total += float(((alpha * variances) ** 2 / scale + alpha * (1 - alpha) * error / scale).mean())
    return total / len(ALPHAS)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The trace of (Sigma_1 Sigma_2)^(1/2) is the sum of the singular values of the product of the centered data."""
    x, y = ((data - data.mean(0)) / np.sqrt(len(data) - 1) for data in (a, b))
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.square(x).sum() + np.square(y).sum() - 2 * root)


def test_held_out_loss_beats_any_linear_denoiser(measured: dict[str, float]) -> None:
    linear = linear_denoiser_loss(*halves())
    assert 0.1 < linear < 0.14
    assert measured["held_out_loss"] < 0.11 < linear


def test_samples_are_close_to_held_out_digits(learned: Path, measured: dict[str, float]) -> None:
    training, held_out = halves()
    noise = torch.randn(HELD_OUT, 64, generator=torch.Generator().manual_seed(0)).double().numpy()
    far = frechet(((noise + 1) / 2).clip(0, 1), held_out)
    assert measured["frechet_distance"] < 0.1 * far
    # And of those, most is the sets' being small: digits against other digits.
    assert measured["frechet_distance"] < 5 * frechet(training[:HELD_OUT], held_out)

    samples = DDIMPipeline.from_pretrained(learned / "final").sample_images(
        HELD_OUT, batch_size=256, num_inference_steps=20
    )
    pixels = np.stack([np.asarray(image) for image in samples]).reshape(-1, 64) / 255
    assert measured["frechet_distance"] == pytest.approx(frechet(pixels, held_out), rel=1e-3)
