"""Pairs of states: the order of the leapfrog step where the score is exact, and that it undoes itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ddim import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim.diffusion.loop import run_steps
from ddim.diffusion.pairs import Leapfrog, leapfrog, reversed_step
from ddim.inversion import PAIR_ITERATIONS, drop_identity_steps, invertible_steps
from digits import TINY_MODEL
from helpers import rand, randn

MEAN, STD = 0.3, 0.5
SCHEDULER = DDIMScheduler(clip_sample=False)
ALPHAS = torch.from_numpy(SCHEDULER.alphas_cumprod_float64)


def epsilon(x: Tensor, t: Tensor) -> Tensor:
    """Return the exact epsilon of data N(MEAN, STD^2)."""
    alpha = ALPHAS[t]
    return (1 - alpha).sqrt() * (x - alpha.sqrt() * MEAN) / (alpha * STD**2 + 1 - alpha)


def solution(x: Tensor, alpha: float, alpha_prev: float) -> Tensor:
    """Return x at another alpha of the ODE: quantiles of the marginals are kept."""
    scale = math.sqrt((alpha_prev * STD**2 + 1 - alpha_prev) / (alpha * STD**2 + 1 - alpha))
    return math.sqrt(alpha_prev) * MEAN + scale * (x - math.sqrt(alpha) * MEAN)


def error(S: int) -> float:
    """Return the error of decoding by leapfrog steps, from a pair on the solution."""
    steps = SCHEDULER.make_steps(SCHEDULER.make_timesteps(S, "trailing"))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    second = solution(x, steps[0].alpha, steps[1].alpha)
    step_fn = Leapfrog(epsilon, "epsilon", x, steps[0].alpha, torch.float64)
    # Up to the last timestep: alpha = 1 is next.
    *_, last = run_steps(second, steps[1:-1], step_fn)
    return float((last.sample - solution(x, steps[0].alpha, steps[-1].alpha)).abs().max())


def test_order_is_2() -> None:
    errors = [error(S) for S in (50, 100, 200)]
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert min(orders) > 1.8, orders


def test_middle_state_of_even_steps_has_no_weight() -> None:
    """Then it is the leapfrog of textbooks, u_{n+1} = u_{n-1} + 2 h f(u_n)."""
    alphas = [1 / (1 + s**2) for s in (1.0, 2.0, 3.0)]
    a, b, f = randn(1, 1, 2, 2).double(), randn(1, 1, 2, 2, seed=1).double(), randn(1, 1, 2, 2, seed=2).double()
    u = [x / math.sqrt(alpha) for x, alpha in zip((a, b), alphas, strict=False)]
    c = leapfrog(a, b, f, *alphas)
    torch.testing.assert_close(c / math.sqrt(alphas[2]), u[0] + 2 * f)
    assert torch.equal(leapfrog(a, b + 1, f, *alphas), c)


def test_steps_undo_themselves_in_any_network() -> None:
    """Nothing is solved: a network that is far from a denoiser is inverted as well."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(3 * x) + t / 1000

    steps = drop_identity_steps(invertible_steps(SCHEDULER, 20))
    x0, x1 = (randn(2, 1, 4, 4, seed=seed).double() for seed in (0, 1))
    away = Leapfrog(denoiser, "epsilon", x0, steps[-1].alpha_prev, torch.float64)
    *_, last = run_steps(x1, [reversed_step(step) for step in steps[:-1][::-1]], away)
    back = Leapfrog(denoiser, "epsilon", last.sample, steps[0].alpha, torch.float64)
    *_, first = run_steps(away.other, steps[1:], back)
    torch.testing.assert_close(first.sample, x0, atol=1e-9, rtol=0)


class TestPipeline:
    @pytest.fixture(scope="class")
    def pipe(self) -> DDIMPipeline:
        torch.manual_seed(0)
        pipe = DDIMPipeline(UNet2DModel(**TINY_MODEL).eval(), DDIMScheduler(prediction_type="v_prediction"))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @pytest.mark.parametrize("steps", [3, 10, 50])
    def test_decode_inverts_encode(self, pipe: DDIMPipeline, steps: int) -> None:
        x = rand(3, 1, 8, 8)
        encoded = pipe.encode(x, steps, method="pair", batch_size=2)
        assert float(encoded.mse.max()) < 1e-14
        decoded = pipe.decode(encoded, steps, "pt", batch_size=2).images
        torch.testing.assert_close(decoded, x / 2 + 0.5, atol=1e-6, rtol=0, check_dtype=False)
        # One evaluation per step, apart from the one next to the image and the one that does not move.
        assert (encoded.evaluations[:, :-2] == 1).all()
        assert (encoded.evaluations[:, -2] <= PAIR_ITERATIONS + 1).all()
        assert (encoded.evaluations[:, -1] == 0).all()
        assert encoded.converged.all()

    def test_second_latents_are_required(self, pipe: DDIMPipeline) -> None:
        """A single state of the pair decodes by DDIM, to about the same image."""
        x = rand(1, 1, 8, 8)
        encoded = pipe.encode(x, 20, method="pair")
        assert encoded.second_latents is not None
        assert encoded.second_latents.shape == encoded.latents.shape
        plain = pipe.decode(encoded.latents, 20, "pt").images
        assert float((plain - pipe.decode(encoded, 20, "pt").images).square().mean()) > 1e-6
        assert pipe.encode(x, 20).second_latents is None

    def test_reconstruct_along_other_timesteps(self, pipe: DDIMPipeline) -> None:
        x = rand(2, 1, 8, 8)
        result = pipe.reconstruct(x, timesteps=[800, 400, 100], method="pair", output_type="pt")
        torch.testing.assert_close(result.images, x / 2 + 0.5, atol=1e-6, rtol=0, check_dtype=False)
        assert float(result.mse.max()) < 1e-14

    def test_unfit_settings_are_refused(self, pipe: DDIMPipeline) -> None:
        x = rand(1, 1, 8, 8)
        with pytest.raises(ValueError, match="method must be one of solve or pair, got 'belm'"):
            pipe.encode(x, method="belm")
        with pytest.raises(ValueError, match="method='pair' requires exact=True, got exact=False"):
            pipe.encode(x, exact=False, method="pair")
        with pytest.raises(ValueError, match="method='pair' requires at least two timesteps above 0, got one"):
            pipe.encode(x, 2, method="pair")
        scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
        silent = DDIMPipeline(pipe.unet, scheduler)
        with pytest.raises(ValueError, match="requires a schedule that leaves some signal at every timestep"):
            silent.encode(x, timesteps=[999, 500, 0], method="pair")
