"""The paper's equations against each other, the formulas of the DDPM paper, and thresholding of `diffusers`."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler as DiffusersScheduler
from torch import Tensor

from ddim.diffusion.equations import (
    PREDICTION_TYPES,
    Step,
    add_noise,
    ddim_inverse,
    ddim_step,
    dynamic_threshold,
    make_steps,
    predict_x0_epsilon,
    sigma_ddim,
    sigma_hat,
    training_target,
    velocity,
)
from ddim.diffusion.schedule import make_betas
from helpers import ALPHAS, randn, relative_error

BETAS = make_betas("linear", 1000)
TIMESTEPS = [1, 2, 10, 500, 998, 999]
SHAPE = (3, 2, 4, 4)


def gaussian(seed: int) -> Tensor:
    return randn(*SHAPE, seed=seed, dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return relative_error(a, b) <= tolerance


@pytest.mark.parametrize("alpha", [1e-4, 0.1, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_training_target_is_inverted_by_prediction(prediction_type: str, alpha: float) -> None:
    x0, noise = gaussian(0), gaussian(1)
    alphas = torch.tensor(alpha, dtype=torch.float64)
    target = training_target(x0, noise, alphas, prediction_type)
    predicted_x0, predicted_noise = predict_x0_epsilon(target, add_noise(x0, noise, alphas), alpha, prediction_type)
    assert close(predicted_x0, x0)
    assert close(predicted_noise, noise)


def test_predictions_without_division_allow_alpha_0_and_1() -> None:
    x, output = gaussian(0), gaussian(1)
    assert torch.equal(predict_x0_epsilon(output, x, 0.0, "sample")[1], x)
    x0, epsilon = predict_x0_epsilon(output, x, 0.0, "v_prediction")
    assert torch.equal(x0, -output)
    assert torch.equal(epsilon, x)
    assert torch.equal(predict_x0_epsilon(output, x, 1.0, "epsilon")[0], x)
    assert torch.equal(predict_x0_epsilon(output, x, 1.0, "v_prediction")[0], x)


def test_unknown_prediction_type_raises() -> None:
    with pytest.raises(ValueError, match="must be one of epsilon, sample, or v_prediction, got 'score'"):
        predict_x0_epsilon(gaussian(0), gaussian(1), 0.5, "score")


def test_training_targets() -> None:
    x0, noise, alpha = gaussian(0), gaussian(1), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64).view(3, 1, 1, 1)
    assert training_target(x0, noise, alpha, "epsilon") is noise
    assert training_target(x0, noise, alpha, "sample") is x0
    v = training_target(x0, noise, alpha, "v_prediction")
    assert torch.equal(v, velocity(x0, noise, alpha))
    for i, a in enumerate((0.1, 0.5, 0.9)):
        assert close(v[i], math.sqrt(a) * noise[i] - math.sqrt(1 - a) * x0[i])


@pytest.mark.parametrize(("t", "t_prev"), [(999, 980), (500, 3), (1, 0), (0, -1), (999, -1)])
def test_inverse_undoes_step(t: int, t_prev: int) -> None:
    step = Step(t, t_prev, float(ALPHAS[t]), float(ALPHAS[t_prev]) if t_prev >= 0 else 1.0)
    x, epsilon = gaussian(0), gaussian(1)
    x_prev, _ = ddim_step(epsilon, x, step)
    assert close(ddim_inverse(epsilon, x_prev, step)[0], x)


@pytest.mark.parametrize("t", TIMESTEPS)
def test_eta_1_is_ddpm_posterior(t: int) -> None:
    beta, alpha_bar, alpha_bar_prev = float(BETAS[t]), float(ALPHAS[t]), float(ALPHAS[t - 1])
    (step,) = make_steps([t], ALPHAS, alpha_bar_prev, eta=1.0)
    # Equations (6) and (7) of arXiv 2006.11239.
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
    assert step.sigma**2 == pytest.approx(variance, rel=1e-10)
    x, x0 = gaussian(0), gaussian(1)
    mean = (math.sqrt(alpha_bar_prev) * beta * x0 + math.sqrt(1 - beta) * (1 - alpha_bar_prev) * x) / (1 - alpha_bar)
    assert close(ddim_step(x0, x, step, "sample")[0], mean, 1e-10)
    # Its equation (11), the same mean from epsilon.
    epsilon = gaussian(2)
    mean = (x - beta / math.sqrt(1 - alpha_bar) * epsilon) / math.sqrt(1 - beta)
    noise = gaussian(3)
    x_prev, _ = ddim_step(epsilon, x, step, noise=noise)
    assert close(x_prev, mean + math.sqrt(variance) * noise, 1e-10)


@pytest.mark.parametrize("t", TIMESTEPS)
def test_sigma_hat_squared_is_beta_for_adjacent_timesteps(t: int) -> None:
    assert sigma_hat(ALPHAS[t], ALPHAS[t - 1]) ** 2 == pytest.approx(BETAS[t], rel=1e-10)


@pytest.mark.parametrize("t", TIMESTEPS)
def test_sigma_is_linear_in_eta_and_at_most_sigma_hat(t: int) -> None:
    for t_prev in range(0, t, 37):
        sigma = sigma_ddim(ALPHAS[t], ALPHAS[t_prev], 1.0)
        assert 0 < sigma <= sigma_hat(ALPHAS[t], ALPHAS[t_prev])
        assert sigma_ddim(ALPHAS[t], ALPHAS[t_prev], 0.25) == pytest.approx(sigma / 4, rel=1e-14)
    assert sigma_ddim(ALPHAS[t], ALPHAS[0], 0.0) == 0


@pytest.mark.parametrize("final_alpha", [1.0, float(ALPHAS[0])])
def test_steps_follow_timesteps_and_end_at_final_alpha(final_alpha: float) -> None:
    steps = make_steps([999, 500, 3], ALPHAS, final_alpha, eta=1.0)
    assert [(s.timestep, s.prev_timestep) for s in steps] == [(999, 500), (500, 3), (3, -1)]
    assert [s.alpha for s in steps] == [ALPHAS[999], ALPHAS[500], ALPHAS[3]]
    assert [s.alpha_prev for s in steps] == [ALPHAS[500], ALPHAS[3], final_alpha]
    assert all(s.noise_std == s.sigma == sigma_ddim(s.alpha, s.alpha_prev, 1.0) for s in steps)


@pytest.mark.parametrize("use_sigma_hat", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_last_step_returns_predicted_x0(eta: float, use_sigma_hat: bool) -> None:
    last = make_steps([500, 0], ALPHAS, 1.0, eta, use_sigma_hat)[-1]
    assert (last.alpha_prev, last.sigma, last.noise_std) == (1.0, 0.0, 0.0)
    x_prev, x0 = ddim_step(gaussian(0), gaussian(1), last, noise=gaussian(2))
    assert torch.equal(x_prev, x0)


def test_sigma_hat_scales_only_noise() -> None:
    plain = make_steps([500, 300, 0], ALPHAS, 1.0, 1.0)
    hat = make_steps([500, 300, 0], ALPHAS, 1.0, 1.0, use_sigma_hat=True)
    assert [s.sigma for s in hat] == [s.sigma for s in plain]
    assert [s.noise_std for s in hat[:2]] == [sigma_hat(s.alpha, s.alpha_prev) for s in hat[:2]]
    x, epsilon, noise = gaussian(0), gaussian(1), gaussian(2)
    mean, _ = ddim_step(epsilon, x, plain[0])
    assert torch.equal(ddim_step(epsilon, x, hat[0], noise=noise)[0], mean + hat[0].noise_std * noise)


def test_large_eta_stays_finite() -> None:
    step = make_steps([500, 300], ALPHAS, eta=50.0)[0]
    assert step.sigma**2 > 1 - step.alpha_prev
    x_prev, x0 = ddim_step(gaussian(0), gaussian(1), step)
    assert torch.equal(x_prev, math.sqrt(step.alpha_prev) * x0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
@pytest.mark.parametrize(("ratio", "max_value"), [(0.995, 1.0), (0.9, 2.0), (0.5, 100.0), (1.0, 3.0)])
def test_dynamic_threshold_matches_diffusers(ratio: float, max_value: float, scale: float, dtype: torch.dtype) -> None:
    reference = DiffusersScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=max_value)
    # The first image stays within [-1, 1], so that thresholds differ within the batch.
    x0 = (gaussian(0) * scale * torch.tensor([0.1, 1.0, 3.0]).view(3, 1, 1, 1)).to(dtype)
    ours = dynamic_threshold(x0, ratio, max_value)
    assert ours.dtype == dtype
    assert torch.equal(ours, reference._threshold_sample(x0))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip", [partial(torch.clamp, min=-0.5, max=0.5), dynamic_threshold])
def test_recomputed_epsilon_agrees_with_clipped_x0(clip: partial, prediction_type: str) -> None:
    x, output = gaussian(0), gaussian(1)
    # A step from a timestep to itself returns equation (4) of the x_0 and epsilon that it used.
    identity = Step(500, 500, float(ALPHAS[500]), float(ALPHAS[500]))
    x_prev, x0 = ddim_step(output, x, identity, prediction_type, clip, use_clipped_model_output=True)
    assert torch.equal(x0, clip(predict_x0_epsilon(output, x, identity.alpha, prediction_type)[0]))
    assert close(x_prev, x)
    assert not close(ddim_step(output, x, identity, prediction_type, clip)[0], x, 1e-3)
    assert close(ddim_step(output, x, identity, prediction_type, None)[0], x)
