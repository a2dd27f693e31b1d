"""Sampling of Gaussian data with the exact score, against the paper's equations written out.

For data N(mu, s^2) the exact network is affine in x_t and each step is affine in x_t plus noise, so that the result of
any number of steps is Gaussian, with a recursion for its mean and variance. The library's step is evaluated at x = 0
and 1 and with noise 0 and 1; nothing is sampled.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddim.diffusion.equations import Step, add_noise, ddim_step
from ddim.diffusion.schedule import SPACINGS
from ddim.scheduler import DDIMScheduler
from helpers import ALPHAS

T = 1000
BETAS = np.linspace(1e-4, 0.02, T)
MU, STD = 0.3, 0.5


def exact_epsilon(x: Tensor, a: float) -> Tensor:
    """Return E[epsilon | x_t] for x_0 ~ N(MU, STD^2)."""
    return math.sqrt(1 - a) * (x - math.sqrt(a) * MU) / (a * STD**2 + 1 - a)


def expected_moments(timesteps: list[int], eta: float) -> tuple[float, float]:
    """Return the final mean and standard deviation, from x ~ N(0, 1), by equations (12) and (16)."""
    mean, variance = 0.0, 1.0
    alphas = [*(float(ALPHAS[t]) for t in timesteps), 1.0]
    for a, p in pairwise(alphas):
        # epsilon(x) = E x + F
        E = math.sqrt(1 - a) / (a * STD**2 + 1 - a)
        F = -E * math.sqrt(a) * MU
        sigma2 = eta**2 * (1 - p) / (1 - a) * (1 - a / p)
        # x_prev = sqrt(p / a) x + C epsilon(x) + sigma noise
        C = math.sqrt(1 - p - sigma2) - math.sqrt(p / a) * math.sqrt(1 - a)
        A, B = math.sqrt(p / a) + C * E, C * F
        mean, variance = A * mean + B, A**2 * variance + sigma2
    return mean, math.sqrt(variance)


def library_moments(scheduler: DDIMScheduler, timesteps: list[int], eta: float) -> tuple[float, float]:
    """Return them by the library's steps, each evaluated for its slope, its constant and the scale of its noise."""
    mean, variance = 0.0, 1.0
    # Three samples: x = 0 and x = 1 without noise, x = 0 with noise 1.
    x = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).view(3, 1, 1, 1)
    noise = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).view(3, 1, 1, 1)
    for step in scheduler.make_steps(timesteps, eta):
        x_prev, _ = ddim_step(exact_epsilon(x, float(ALPHAS[step.timestep])), x, step, clip=None, noise=noise)
        constant, at_one, with_noise = x_prev.flatten().tolist()
        slope, scale = at_one - constant, with_noise - constant
        mean, variance = slope * mean + constant, slope**2 * variance + scale**2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("S", [5, 10, 20, 50, 100])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_final_distribution_matches_paper(spacing: str, S: int, eta: float) -> None:
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    timesteps = scheduler.make_timesteps(S)
    assert library_moments(scheduler, timesteps, eta) == pytest.approx(expected_moments(timesteps, eta), abs=1e-10)


@pytest.mark.parametrize(("S", "std"), [(10, 0.374), (20, 0.434), (50, 0.472), (100, 0.486)])
def test_std_approaches_data_with_more_steps(S: int, std: float) -> None:
    scheduler = DDIMScheduler()
    assert library_moments(scheduler, scheduler.make_timesteps(S), 0.0)[1] == pytest.approx(std, abs=1e-3)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_all_timesteps_recover_data_distribution(eta: float) -> None:
    mean, std = library_moments(DDIMScheduler(), list(range(T))[::-1], eta)
    assert mean == pytest.approx(MU, abs=5e-3)
    assert std == pytest.approx(STD, abs=5e-3)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "logsnr"])
def test_eta_1_with_all_timesteps_is_ddpm_ancestral_sampling(spacing: str) -> None:
    mean, variance = 0.0, 1.0
    for t in range(T - 1, -1, -1):
        beta, a, p = BETAS[t], ALPHAS[t], ALPHAS[t - 1] if t else 1.0
        # Algorithm 2 of arXiv 2006.11239 with the variance of its equation (7).
        E = math.sqrt(1 - a) / (a * STD**2 + 1 - a)
        A = (1 - beta / math.sqrt(1 - a) * E) / math.sqrt(1 - beta)
        B = beta / math.sqrt(1 - a) * E * math.sqrt(a) * MU / math.sqrt(1 - beta)
        mean, variance = A * mean + B, A**2 * variance + (1 - p) / (1 - a) * beta
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    ours = library_moments(scheduler, scheduler.make_timesteps(T), 1.0)
    assert ours == pytest.approx((mean, math.sqrt(variance)), abs=1e-10)


@settings(deadline=None, max_examples=200)
@given(
    alpha=st.floats(1e-4, 0.999),
    alpha_fraction=st.floats(0, 1),
    sigma_fraction=st.floats(0, 1),
    x0=st.floats(-3, 3),
)
def test_every_sigma_keeps_marginals(alpha: float, alpha_fraction: float, sigma_fraction: float, x0: float) -> None:
    alpha_prev = alpha + alpha_fraction * (1 - alpha)
    sigma = sigma_fraction * math.sqrt(1 - alpha_prev)
    step = Step(1, 0, alpha, alpha_prev, sigma, sigma)
    # (epsilon, noise) = (0, 0), (1, 0), (0, 1): x_prev is affine in the two independent standard Gaussians.
    epsilon, noise = torch.tensor([[0, 1, 0], [0, 0, 1]], dtype=torch.float64).view(2, 3, 1, 1, 1)
    clean = torch.full_like(epsilon, x0)
    x = add_noise(clean, epsilon, torch.tensor(alpha, dtype=torch.float64))
    mean, *ends = ddim_step(clean, x, step, "sample", noise=noise)[0].flatten().tolist()
    assert mean == pytest.approx(math.sqrt(alpha_prev) * x0, abs=1e-10)
    assert sum((end - mean) ** 2 for end in ends) == pytest.approx(1 - alpha_prev, abs=1e-10)
