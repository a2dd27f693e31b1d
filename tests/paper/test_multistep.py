"""The multistep solvers on processes with a known score, and their equality in all interfaces."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from ddim import DDIMPipeline, DDIMScheduler
from ddim.diffusion.loop import sample
from ddim.diffusion.solvers import BEND, multistep
from helpers import randn, seeded

SCHEDULER = DDIMScheduler(clip_sample=False)
MEAN, VARIANCE = 0.3, 0.25


def gaussian(x: Tensor, t: Tensor) -> Tensor:
    """Return the exact epsilon of data N(MEAN, VARIANCE)."""
    alpha = SCHEDULER.alphas_cumprod_float64[int(t)]
    return math.sqrt(1 - alpha) * (x - math.sqrt(alpha) * MEAN) / (alpha * VARIANCE + 1 - alpha)


def sample_std(number: int, order: int) -> float:
    """Return the standard deviation of samples: the map from noise is affine, and two points give its slope."""
    timesteps = SCHEDULER.make_timesteps(number, order=order)
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    *_, last = sample(gaussian, x, SCHEDULER.make_steps(timesteps, order=order))
    return float(last.sample[1] - last.sample[0])


class TestGaussian:
    @pytest.mark.parametrize(("number", "bound", "ddim"), [(10, 0.02, 0.126), (20, 0.01, 0.066), (50, 0.002, 0.028)])
    def test_std_of_generated_samples(self, number: int, bound: float, ddim: float) -> None:
        assert abs(sample_std(number, 2) - 0.5) < bound
        assert abs(sample_std(number, 1) - 0.5) == pytest.approx(ddim, abs=5e-4)

    def test_orders_of_convergence(self) -> None:
        """On a fine schedule, with equal steps in sqrt(t), to which phi is proportional near t = 0."""
        T = 100_000
        scheduler = DDIMScheduler(T, 1e-6, 2e-4, clip_sample=False)

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            alpha = scheduler.alphas_cumprod_float64[int(t)]
            return math.sqrt(1 - alpha) * (x - math.sqrt(alpha) * MEAN) / (alpha * VARIANCE + 1 - alpha)

        def slope(number: int, order: int) -> float:
            x = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
            timesteps = np.round(np.linspace(math.sqrt(T - 1), 0, number) ** 2).astype(int)
            steps = scheduler.make_steps(timesteps.tolist(), order=order)
            *_, last = sample(denoiser, x, steps)
            return float(last.sample[1] - last.sample[0])

        first = float(scheduler.alphas_cumprod_float64[-1])
        exact = math.sqrt(VARIANCE / (first * VARIANCE + 1 - first))
        numbers = np.array([40, 80, 160])
        for order, low, high in ((1, 0.95, 1.05), (2, 1.9, 2.2), (3, 2.9, 3.3), (4, 3.6, 4.3)):
            errors = [abs(slope(int(number), order) - exact) for number in numbers]
            order_estimate = -np.polyfit(np.log(numbers), np.log(errors), 1)[0]
            assert low < order_estimate < high


class TestMixture:
    CENTERS = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]], dtype=torch.float64)
    WIDTH = 0.15

    def denoiser(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the exact epsilon of three Gaussians in the plane for x (N, 2, 1, 1)."""
        alpha = SCHEDULER.alphas_cumprod_float64[int(t)]
        points, variance = x.flatten(1), alpha * self.WIDTH**2 + 1 - alpha
        offsets = points[:, None] - math.sqrt(alpha) * self.CENTERS
        weights = (-offsets.square().sum(2) / (2 * variance)).softmax(1)
        score = -(weights[:, :, None] * offsets).sum(1) / variance
        return (-math.sqrt(1 - alpha) * score).view_as(x)

    def distance(self, number: int, order: int) -> float:
        """Return the sliced Wasserstein distance to samples of the mixture."""
        generator = seeded(0)
        N = 20_000
        start = torch.randn(N, 2, 1, 1, generator=generator, dtype=torch.float64)
        centers = self.CENTERS[torch.randint(3, (N,), generator=generator)]
        data = centers + self.WIDTH * torch.randn(N, 2, generator=generator, dtype=torch.float64)
        timesteps = SCHEDULER.make_timesteps(number, order=order)
        *_, last = sample(self.denoiser, start, SCHEDULER.make_steps(timesteps, order=order))
        angles = torch.arange(32, dtype=torch.float64) * math.pi / 32
        directions = torch.stack([angles.cos(), angles.sin()])
        samples, data = ((points @ directions).sort(0).values for points in (last.sample.flatten(1), data))
        return float((samples - data).square().mean().sqrt())

    def test_ten_steps_match_forty_steps_of_order_1(self) -> None:
        assert self.distance(10, 2) <= self.distance(40, 1)


class TestSteps:
    @pytest.mark.parametrize(
        ("order", "lengths"), [(1, [0] * 7), (2, [0] + [1] * 6), (3, [0, 1, 2, 2, 2, 1, 1]), (4, [0, 1, 2, 3, 3, 1, 1])]
    )
    def test_first_and_last_steps_have_a_lower_order(self, order: int, lengths: list[int]) -> None:
        steps = SCHEDULER.make_steps([900, 700, 500, 300, 200, 100, 0], order=order)
        assert [len(step.corrections) for step in steps] == lengths
        assert [step.corrections for step in multistep(SCHEDULER.make_steps([500]), order)] == [()]

    @pytest.mark.parametrize("order", [3, 4])
    def test_high_orders_match_integral(self, order: int) -> None:
        """A step equals the integral over sigma of the polynomial through its predictions, by NumPy and SciPy."""
        steps = SCHEDULER.make_steps([950, 700, 520, 300, 120, 20, 0], order=order)
        predictions = [0.7, -0.2, 0.4, 0.1, -0.5, 0.3, 0.2]
        x = 0.4
        for index, step in enumerate(steps):
            used = len(step.corrections) + 1
            epsilons = predictions[index + 1 - used : index + 1]
            nodes = [math.log(BEND + math.acos(math.sqrt(s.alpha))) for s in steps[index + 1 - used : index + 1]]
            coefficients = np.polyfit(nodes, epsilons, used - 1)

            def polynomial(sigma: float, coefficients: Any = coefficients) -> float:
                return float(np.polyval(coefficients, math.log(BEND + math.atan(sigma))))

            ends = [math.sqrt((1 - alpha) / alpha) for alpha in (step.alpha, step.alpha_prev)]
            integral = quad(polynomial, *ends, epsabs=1e-12, epsrel=1e-12)[0]
            expected = math.sqrt(step.alpha_prev) * (x / math.sqrt(step.alpha) + integral)
            x0 = (x - math.sqrt(1 - step.alpha) * epsilons[-1]) / math.sqrt(step.alpha)
            result = math.sqrt(step.alpha_prev) * x0 + math.sqrt(1 - step.alpha_prev) * epsilons[-1]
            for k, previous in zip(step.corrections, epsilons[-2::-1], strict=True):
                result += k * (epsilons[-1] - previous)
            assert result == pytest.approx(expected, rel=1e-7)
            x = result

    @pytest.mark.parametrize("timesteps", [[900, 600, 300], [999, 998, 997], [500, 2, 0], [999, 1], [40, 20, 3]])
    def test_matches_integral(self, timesteps: list[int]) -> None:
        """A step equals the integral over sigma of the line through two predictions, by SciPy."""
        alphas = [*(float(SCHEDULER.alphas_cumprod_float64[t]) for t in timesteps), 1.0]
        previous_epsilon, epsilon, x = 0.7, -0.2, 0.4
        for step, a, b, c in zip(
            SCHEDULER.make_steps(timesteps, order=2)[1:], alphas, alphas[1:], alphas[2:], strict=False
        ):
            s, s_previous = (math.log(BEND + math.acos(math.sqrt(alpha))) for alpha in (b, a))

            def line(sigma: float, s: float = s, s_previous: float = s_previous) -> float:
                return epsilon + (epsilon - previous_epsilon) * (math.log(BEND + math.atan(sigma)) - s) / (
                    s - s_previous
                )

            ends = [math.sqrt((1 - alpha) / alpha) for alpha in (b, c)]
            expected = math.sqrt(c) * (x / math.sqrt(b) + quad(line, *ends, epsabs=1e-12, epsrel=1e-12)[0])
            x0 = (x - math.sqrt(1 - b) * epsilon) / math.sqrt(b)
            result = math.sqrt(c) * x0 + math.sqrt(1 - c) * epsilon + step.corrections[0] * (epsilon - previous_epsilon)
            assert result == pytest.approx(expected, rel=1e-7)

    def test_zero_terminal_snr_is_finite(self) -> None:
        """At zero terminal SNR sigma is infinite at the first timestep."""
        scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
        for order in (2, 3, 4):
            steps = scheduler.make_steps([999, 700, 400, 200, 100, 50], order=order)
            assert all(math.isfinite(k) for step in steps for k in step.corrections)

    @pytest.mark.parametrize(
        ("order", "eta", "message"), [(5, 0.0, r"order must be 1 .*, got 5"), (2, 0.5, "order=2 requires eta=0")]
    )
    def test_invalid_input_raises(self, order: int, eta: float, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SCHEDULER.make_steps([500, 0], eta, order=order)


class TestInterfaces:
    """The pipeline and the scheduler's interface give equal results."""

    @pytest.fixture
    def pipe(self, make_unet: Callable[..., Any]) -> DDIMPipeline:
        pipe = DDIMPipeline(make_unet(), DDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @pytest.mark.parametrize("order", [2, 3, 4])
    @pytest.mark.parametrize("clip", [True, False])
    def test_scheduler_matches_pipeline(self, pipe: DDIMPipeline, clip: bool, order: int) -> None:
        scheduler = DDIMScheduler(solver_order=order, clip_sample=clip)
        pipe.scheduler = DDIMScheduler(clip_sample=clip)
        expected = pipe(seeds=[1, 2], num_inference_steps=7, order=order, output_type="pt").images
        latents = torch.cat([randn(1, 3, 16, 16, seed=s) for s in (1, 2)])
        for _ in range(2):  # `set_timesteps` resets the state of the first run.
            scheduler.set_timesteps(7)
            x = latents
            with torch.no_grad():
                for t in scheduler.timesteps:
                    x = scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
            torch.testing.assert_close((x / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=1e-4)

    def test_scheduler_spacing_applies(self, pipe: DDIMPipeline) -> None:
        pipe.scheduler = DDIMScheduler(solver_order=2, timestep_spacing="linspace")
        images = pipe(seeds=[1], num_inference_steps=5, output_type="pt").images
        timesteps = pipe.scheduler.make_timesteps(5)
        pipe.scheduler = DDIMScheduler()
        assert torch.equal(images, pipe(seeds=[1], timesteps=timesteps, order=2, output_type="pt").images)
        assert not torch.equal(images, pipe(seeds=[1], timesteps=timesteps, output_type="pt").images)

    def test_one_evaluation_per_step(self, pipe: DDIMPipeline) -> None:
        pipe.engine, calls = "eager", []
        pipe.unet.register_forward_hook(lambda *_: calls.append(1))
        pipe(seeds=[1], num_inference_steps=9, order=2)
        assert len(calls) == 9

    def test_saved_pipeline_runs_in_diffusers(self, pipe: DDIMPipeline, tmp_path: Path) -> None:
        pipe.scheduler = DDIMScheduler(solver_order=2)
        pipe.save_pretrained(tmp_path)
        assert DDIMPipeline.from_pretrained(tmp_path).scheduler.solver_order == 2
        reference = diffusers.DDIMPipeline.from_pretrained(tmp_path)
        reference.set_progress_bar_config(disable=True)
        assert reference(num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)

    def test_invalid_order_raises(self, pipe: DDIMPipeline) -> None:
        with pytest.raises(ValueError, match=r"order must be 1 .*, got 5"):
            pipe(order=5)
        with pytest.raises(ValueError, match="requires eta=0"):
            pipe(order=2, eta=0.5)
        pipe.scheduler = DDIMScheduler(solver_order=2)
        with pytest.raises(ValueError, match=r"the model's solver_order=2 requires eta=0 .*, got eta=1; give order=1"):
            pipe(eta=1)
        with pytest.raises(
            ValueError, match="order=2 cannot encode: a step of order 2 or more depends on those before it"
        ):
            pipe.encode(torch.zeros(1, 3, 16, 16), order=2)
