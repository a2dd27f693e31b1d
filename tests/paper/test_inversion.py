"""Encoding and decoding with the exact score of Gaussian data, in float64, against closed forms.

For data N(mu, s^2), with a mean and a variance per pixel, the exact network predicts x_0 and epsilon that are linear in
the centered x_t:

    x_0 - mu = K (x_t - sqrt(alpha) mu),    epsilon = E (x_t - sqrt(alpha) mu)
    K = sqrt(alpha) s^2 / v,    E = sqrt(1 - alpha) / v,    v = alpha s^2 + 1 - alpha

so that decoding, exact encoding and Euler encoding each multiply it by one factor per step, and the ODE that they
follow by sqrt(v_t / v_0) in total.
"""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddim.diffusion.schedule import SPACINGS
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from helpers import rand

SHAPE = (1, 6, 6)
MEAN = np.linspace(-0.3, 0.3, 36)[::-1].reshape(SHAPE)
# One variance for all pixels, and one per pixel, from nearly constant pixels to far wider than images.
STDS = {"one": np.full(SHAPE, 0.5), "many": np.linspace(0.05, 1.5, 36).reshape(SHAPE)}
NETWORKS = [
    {"prediction_type": "epsilon"},
    {"prediction_type": "sample"},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample", "rescale_betas_zero_snr": True},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
]
NETWORK_IDS = ["-".join(str(value) for value in network.values()) for network in NETWORKS]


def make_alphas(T: int = 1000, rescale_betas_zero_snr: bool = False) -> np.ndarray:
    """Compute the linear schedule, scaled so that a larger T is a finer grid on the same process."""
    alphas = np.cumprod(1 - np.linspace(0.1 / T, 20 / T, T))
    if rescale_betas_zero_snr:
        # Algorithm 1 of arXiv 2305.08891.
        root = np.sqrt(alphas)
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alphas


def linear(a: float, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return K and E of the module's docstring."""
    variance = a * std**2 + 1 - a
    return math.sqrt(a) * std**2 / variance, math.sqrt(1 - a) / variance


class ExactNetwork:
    """The exact network: E[x_0 | x_t], E[epsilon | x_t] or E[v | x_t] for x_0 ~ N(mean, std^2)."""

    dtype = torch.float64

    def __init__(self, std: np.ndarray, alphas: np.ndarray, prediction_type: str) -> None:
        self.config = SimpleNamespace(sample_size=SHAPE[1:], in_channels=SHAPE[0])
        self.std, self.alphas, self.prediction_type = std, alphas, prediction_type

    def __call__(self, x: Tensor, t: Tensor) -> SimpleNamespace:
        a = float(self.alphas[int(t)])
        K, E = (torch.from_numpy(value) for value in linear(a, self.std))
        mean = torch.from_numpy(MEAN.copy())
        centered = x - math.sqrt(a) * mean
        x0, epsilon = mean + K * centered, E * centered
        v = math.sqrt(a) * epsilon - math.sqrt(1 - a) * x0
        return SimpleNamespace(sample={"epsilon": epsilon, "sample": x0, "v_prediction": v}[self.prediction_type])


def make_pipeline(std: np.ndarray, T: int = 1000, **config: Any) -> tuple[DDIMPipeline, np.ndarray]:
    """Return a pipeline with the exact network, and its schedule."""
    alphas = make_alphas(T, config.get("rescale_betas_zero_snr", False))
    scheduler = DDIMScheduler(T, 0.1 / T, 20 / T, **config)
    pipe = DDIMPipeline(ExactNetwork(std, alphas, scheduler.config.prediction_type), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe, alphas


def make_images(count: int = 3) -> Tensor:
    return 0.9 * rand(count, *SHAPE, dtype=torch.float64)


def decode(pipe: DDIMPipeline, latents: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Decode into samples in [-1, 1]."""
    return pipe.decode(latents, *args, output_type="pt", **kwargs).images * 2 - 1


def max_difference(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def factors(timesteps: list[int], alphas: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of x - sqrt(alpha) mu over all steps between the largest timestep and alphas[0]: by decoding,
    and by Euler encoding.
    """
    down, up = np.ones_like(std), np.ones_like(std)
    for a, p in pairwise([*alphas[timesteps], alphas[0]]):
        K, E = linear(a, std)
        down *= math.sqrt(p) * K + math.sqrt(1 - p) * E
        # Equation (13): the network is evaluated at x_prev.
        K, E = linear(p, std)
        up *= math.sqrt(a) * K + math.sqrt(1 - a) * E
    return down, up


def ode_latents(x: Tensor, a: float, first: float, std: np.ndarray) -> np.ndarray:
    """Solve the probability flow ODE, equation (14), from x at alpha = first to alpha = a."""
    scale = np.sqrt((a * std**2 + 1 - a) / (first * std**2 + 1 - first))
    return math.sqrt(a) * MEAN + scale * (x.numpy() - math.sqrt(first) * MEAN)


@pytest.mark.parametrize(("std", "S"), [("one", 10), ("one", 50), ("many", 20)])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("network", NETWORKS, ids=NETWORK_IDS)
def test_decode_inverts_encode(network: dict[str, Any], spacing: str, S: int, std: str) -> None:
    pipe, alphas = make_pipeline(STDS[std], timestep_spacing=spacing, **network)
    x = make_images()
    encoding = pipe.encode(x, S, tolerance=1e-12, max_iterations=400)
    assert encoding.latents.dtype == torch.float64
    assert encoding.converged.all()
    assert max_difference(decode(pipe, encoding, S), x) <= 1e-9
    # The latents equal the closed form, besides decoding to the image.
    a, first = alphas[encoding.timesteps[0]], alphas[0]
    down, _ = factors(encoding.timesteps, alphas, STDS[std])
    expected = math.sqrt(a) * MEAN + (x.numpy() - math.sqrt(first) * MEAN) / down
    assert max_difference(encoding.latents, expected) <= 1e-9 / down.min()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("network", NETWORKS, ids=NETWORK_IDS)
def test_decode_matches_closed_form(network: dict[str, Any], spacing: str) -> None:
    pipe, alphas = make_pipeline(STDS["many"] / 3, timestep_spacing=spacing, **network)
    timesteps = [t for t in pipe.scheduler.make_timesteps(20) if t > 0]
    # Latents close enough to their center that the images need no clipping.
    z = math.sqrt(alphas[timesteps[0]]) * MEAN + make_images().numpy()
    down, _ = factors(timesteps, alphas, STDS["many"] / 3)
    expected = math.sqrt(alphas[0]) * MEAN + down * (z - math.sqrt(alphas[timesteps[0]]) * MEAN)
    assert np.abs(expected).max() < 1
    assert max_difference(decode(pipe, torch.from_numpy(z), 20), expected) <= 1e-12


@pytest.mark.parametrize("network", NETWORKS, ids=NETWORK_IDS)
def test_custom_timesteps(network: dict[str, Any]) -> None:
    pipe, alphas = make_pipeline(STDS["one"], **network)
    timesteps = [990, 600, 599, 150, 7, 1]
    x = make_images()
    encoding = pipe.encode(x, timesteps=timesteps, tolerance=1e-12)
    assert encoding.timesteps == timesteps
    assert max_difference(decode(pipe, encoding, timesteps=timesteps), x) <= 1e-9
    down, _ = factors(timesteps, alphas, STDS["one"])
    assert (
        max_difference((encoding.latents - math.sqrt(alphas[990]) * MEAN) * down, x - math.sqrt(alphas[0]) * MEAN)
        <= 1e-9
    )


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("network", NETWORKS, ids=NETWORK_IDS)
def test_euler_encoding_matches_equation_13(network: dict[str, Any], spacing: str) -> None:
    pipe, alphas = make_pipeline(STDS["many"], timestep_spacing=spacing, **network)
    x = make_images()
    encoding = pipe.encode(x, 20, exact=False)
    _, up = factors(encoding.timesteps, alphas, STDS["many"])
    a, first = alphas[encoding.timesteps[0]], alphas[0]
    assert max_difference(encoding.latents, math.sqrt(a) * MEAN + up * (x.numpy() - math.sqrt(first) * MEAN)) <= 1e-10


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_euler_encoding_converges_to_ode_at_first_order(prediction_type: str) -> None:
    """With 10 000 integer timesteps, their rounding is negligible at a few hundred steps."""
    std = STDS["many"].clip(0.3, 0.8)
    pipe, alphas = make_pipeline(std, 10_000, timestep_spacing="logsnr", prediction_type=prediction_type)
    x, counts = make_images(), [40, 80, 160, 320]
    euler, exact, decoded = [], [], []
    for S in counts:
        encoding = pipe.encode(x, S, exact=False)
        assert encoding.timesteps[0] == 9_999
        truth = ode_latents(x, alphas[-1], alphas[0], std)
        euler.append(max_difference(encoding.latents, truth))
        decoded.append(max_difference(decode(pipe, encoding, S), x))
        exact.append(max_difference(pipe.encode(x, S, tolerance=1e-9).latents, truth))

    def slope(errors: list[float]) -> float:
        return float(np.polyfit(np.log(counts), np.log(errors), 1)[0])

    # Between -0.98 and -1.02: first order.
    assert slope(euler) == pytest.approx(-1, abs=0.02)
    assert slope(decoded) == pytest.approx(-1, abs=0.02)
    # The exact inverse of DDIM's steps is another first-order method for the same ODE: it errs by as much.
    assert slope(exact) == pytest.approx(-1, abs=0.05)
    assert exact[-1] == pytest.approx(euler[-1], rel=0.1)


def test_single_variance_takes_few_evaluations() -> None:
    """All directions are scaled alike, so that two iterates determine the third (secant method)."""
    for spacing in SPACINGS:
        pipe, _ = make_pipeline(STDS["one"], timestep_spacing=spacing)
        encoding = pipe.encode(make_images(), 10, tolerance=1e-12)
        # The maximum includes the step next to the image, which has no previous epsilon for its first guess.
        assert encoding.evaluations.max() <= 8


def test_residuals_match_closed_form() -> None:
    """The difference between an image and its Euler step decoded is known in closed form."""
    std = STDS["many"]
    pipe, alphas = make_pipeline(std)
    x = make_images()
    encoding = pipe.encode(x, timesteps=[400], exact=False)
    a, p = alphas[400], alphas[0]
    centered = x.numpy() - math.sqrt(p) * MEAN
    down, up = factors([400], alphas, std)
    difference = np.abs((1 - down * up) * centered).reshape(3, -1)
    assert max_difference(encoding.residuals[:, 0], difference.max(1)) <= 1e-12
    assert max_difference(encoding.latents, math.sqrt(a) * MEAN + up * centered) <= 1e-12
