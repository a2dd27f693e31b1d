"""Distillation where the score is exact: data N(MEAN, STD^2), whose ODE has a solution in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ddim import DDIMScheduler
from ddim.diffusion.distillation import Segments, divide_segments, follow_teacher, student_betas, velocity_target
from ddim.diffusion.equations import Step, ddim_step
from ddim.diffusion.loop import StepSettings, sample
from ddim.distillation.stages import student_scheduler
from helpers import randn

MEAN, STD = 0.3, 0.5
SCHEDULER = DDIMScheduler(clip_sample=False)
ALPHAS = torch.from_numpy(SCHEDULER.alphas_cumprod_float64)


def epsilon(x: Tensor, t: Tensor) -> Tensor:
    """Return the exact epsilon for one timestep per sample."""
    alpha = ALPHAS[t].view(-1, 1, 1, 1)
    return ((1 - alpha).sqrt() * (x - alpha.sqrt() * MEAN) / (alpha * STD**2 + 1 - alpha)).to(x.dtype)


def solution(x: Tensor, alpha: float, alpha_prev: float) -> Tensor:
    """Return x_s of the ODE through x_t: quantiles of the marginals are kept."""
    scale = math.sqrt((alpha_prev * STD**2 + 1 - alpha_prev) / (alpha * STD**2 + 1 - alpha))
    return math.sqrt(alpha_prev) * MEAN + scale * (x - math.sqrt(alpha) * MEAN)


def segments_of(S: int, k: int, order: int = 1) -> tuple[list[Step], Segments]:
    """Return the steps of the student and those of the teacher."""
    steps = SCHEDULER.make_steps(SCHEDULER.make_timesteps(S * k, "trailing"))
    student = SCHEDULER.make_steps(SCHEDULER.make_timesteps(S, "trailing"))
    return student, Segments.of(steps, S, order)


def target_error(S: int, k: int, order: int = 1) -> float:
    """Return the largest error of the targets along one step of the student, in units of x_s."""
    student, segments = segments_of(S, k, order)
    index = torch.arange(S)
    x = randn(S, 1, 4, 4)
    x_prev = follow_teacher(epsilon, x, segments, index)
    exact = torch.stack([solution(x[i], step.alpha, step.alpha_prev) for i, step in enumerate(student)])
    return float((x_prev - exact).abs().max())


@pytest.mark.parametrize("S", [1, 2, 4, 8])
def test_targets_converge_to_the_solution_of_the_ode(S: int) -> None:
    errors = [target_error(S, k) for k in (25, 125)]
    # Order 1: a fifth of the error with five times the steps.
    assert errors[1] < errors[0] / 4
    assert errors[1] < 0.03


def test_order_2_converges_faster() -> None:
    assert target_error(4, 25, order=2) < target_error(4, 25) / 5


def test_exact_student_samples_the_data_in_every_number_of_steps() -> None:
    """A student that meets its targets exactly, fitted by least squares: v is affine in x here."""
    for S in (1, 2, 4):
        student, segments = segments_of(S, 1000 // S)
        lines = []
        for i in range(S):
            x = torch.linspace(-3, 3, 8).view(-1, 1, 1, 1)
            index = torch.full((8,), i)
            v = velocity_target(x, follow_teacher(epsilon, x, segments, index), segments, index)
            lines.append(np.polyfit(x.flatten(), v.flatten(), 1))
        lookup = {step.timestep: line for step, line in zip(student, lines, strict=True)}
        noise = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)

        def denoiser(x: Tensor, t: Tensor, lookup: dict[int, np.ndarray] = lookup) -> Tensor:
            slope, intercept = lookup[int(t)]
            return slope * x + intercept

        *_, last = sample(denoiser, noise, student, StepSettings("v_prediction"))
        std = float(last.sample[1] - last.sample[0])
        mean = float(last.sample[0])
        alpha = student[0].alpha
        # What all 1000 steps of DDIM give; DDIM in S steps is off by more than 0.15.
        assert std == pytest.approx(STD, abs=2e-3), S
        assert mean == pytest.approx(MEAN - math.sqrt(alpha) * MEAN * STD, abs=3e-3)
        *_, ddim = sample(lambda x, t: epsilon(x, t.reshape(1)), noise, student)
        assert abs(float(ddim.sample[1] - ddim.sample[0]) - STD) > 0.1


def test_target_is_inverse_of_a_step() -> None:
    student, segments = segments_of(4, 2)
    x, v = randn(4, 3, 8, 8), randn(4, 3, 8, 8, seed=1)
    x_prev = torch.stack([ddim_step(v[i], x[i], step, "v_prediction")[0] for i, step in enumerate(student)])
    torch.testing.assert_close(velocity_target(x, x_prev, segments, torch.arange(4)), v, atol=2e-5, rtol=1e-4)


def test_target_has_the_x0_of_the_paper() -> None:
    """Equation (8) in appendix G of arXiv 2202.00512."""
    student, segments = segments_of(4, 2)
    x, x_prev = randn(4, 1, 8, 8).double(), randn(4, 1, 8, 8, seed=1).double()
    v = velocity_target(x, x_prev, segments, torch.arange(4))
    for i, step in enumerate(student):
        sigma, sigma_prev = math.sqrt(1 - step.alpha), math.sqrt(1 - step.alpha_prev)
        ratio = sigma_prev / sigma
        x0 = (x_prev[i] - ratio * x[i]) / (math.sqrt(step.alpha_prev) - ratio * math.sqrt(step.alpha))
        torch.testing.assert_close(math.sqrt(step.alpha) * x[i] - sigma * v[i], x0, atol=1e-5, rtol=1e-5)


def test_target_is_finite_without_any_signal() -> None:
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    steps = scheduler.make_steps(scheduler.make_timesteps(8, "trailing"))
    segments = Segments.of(steps, 4)
    x = randn(4, 1, 4, 4)
    x_prev = follow_teacher(
        lambda x, t: torch.zeros_like(x), x, segments, torch.arange(4), StepSettings("v_prediction")
    )
    assert steps[0].alpha == 0
    assert torch.isfinite(velocity_target(x, x_prev, segments, torch.arange(4))).all()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("starts", [[999], [999, 450], [999, 640, 300], [999, 640, 450, 280, 100]])
def test_diffusers_takes_the_steps_of_a_student(starts: list[int], spacing: str) -> None:
    """Whatever its spacing: the process has no other timesteps."""
    import diffusers

    S = len(starts)
    arguments = student_scheduler(SCHEDULER.alphas_cumprod_float64, starts)
    listed = arguments.pop("timesteps_by_steps")[str(S)]
    theirs = diffusers.DDIMScheduler(**{**arguments, "timestep_spacing": spacing})
    theirs.set_timesteps(S)
    assert theirs.timesteps.tolist() == listed == list(range(S))[::-1]
    # They round 1 - beta to float32.
    torch.testing.assert_close(theirs.alphas_cumprod[listed].double(), ALPHAS[starts], rtol=1e-5, atol=1e-7)
    # From the last step on, alpha is 1.
    x, v = randn(1, 1, 4, 4), randn(1, 1, 4, 4, seed=1)
    alpha = float(ALPHAS[starts[-1]])
    x0 = math.sqrt(alpha) * x - math.sqrt(1 - alpha) * v
    torch.testing.assert_close(theirs.step(v, 0, x).prev_sample, x0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("S", [1, 2, 3, 4, 7, 8])
def test_evenly_divided_steps_are_trailing_ones(S: int) -> None:
    starts = SCHEDULER.make_timesteps(S, "trailing")
    assert divide_segments(starts, 5) == pytest.approx(SCHEDULER.make_timesteps(5 * S, "trailing"), abs=1)
    assert divide_segments(starts, 1) == starts


def test_schedule_without_any_signal_stays_one() -> None:
    alphas = DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod_float64
    student = DDIMScheduler(trained_betas=student_betas(alphas, [999, 499]))
    assert student.alphas_cumprod_float64[1] == 0
