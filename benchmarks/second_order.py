"""How order 2 came to its form: ways to extrapolate, and spacings of timesteps, at ten and twenty steps.

    python -m benchmarks.second_order

Each way takes a step of DDIM and adds what the change of a prediction since the step before says of its course within
the step: of epsilon, as a line in lambda = log(1 / sigma), in sigma, in the angle phi = arctan(sigma), or in
log(c + phi), which `ddim.diffusion.solvers.second_order` has; or of x_0, as a line in lambda (arXiv 2211.01095).

- `Gaussian`: error of the standard deviation of samples, data N(0.3, 0.5^2), exact score, 10 and 50 steps.
- `mixture`: sliced Wasserstein distance to three Gaussians of width 0.15 in the plane, exact score, 10 steps.
- `model`: mean squared error in [0, 1] of the built-in model's pictures to those of 500 steps of DDIM, 128 codes, 10
  and 20 steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ddim import DDIMPipeline, DDIMScheduler
from ddim.diffusion.noise import noise_from_seeds
from ddim.diffusion.schedule import make_timesteps
from ddim.diffusion.solvers import BEND

Denoiser = Callable[[Tensor, int], Tensor]
Variable = Callable[[np.ndarray], np.ndarray]

PIPE = DDIMPipeline.from_pretrained("mnist", scheduler=DDIMScheduler(clip_sample=False))
ALPHAS = PIPE.scheduler.alphas_cumprod_float64
CODES = 128
SPACINGS = ("leading", "trailing", "logsnr", "blend")
EPSILON: dict[str, Variable] = {
    "epsilon in lambda": lambda sigma: -np.log(np.maximum(sigma, 1e-9)),
    "epsilon in sigma": lambda sigma: sigma,
    "epsilon in phi": np.arctan,
    f"epsilon in log({BEND:g} + phi)": lambda sigma: np.log(BEND + np.arctan(sigma)),
}


def sigma(alpha: float) -> float:
    return math.sqrt((1 - alpha) / alpha)


def walk(denoiser: Denoiser, x: Tensor, timesteps: list[int], way: str) -> Tensor:
    """From x at the first timestep to a picture."""
    before: tuple[float, Tensor] | None = None
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
        alpha, alpha_prev = float(ALPHAS[t]), float(ALPHAS[t_prev]) if t_prev >= 0 else 1.0
        epsilon = denoiser(x, t)
        x0 = (x - math.sqrt(1 - alpha) * epsilon) / math.sqrt(alpha)
        x = math.sqrt(alpha_prev) * x0 + math.sqrt(1 - alpha_prev) * epsilon
        here, there = sigma(alpha), sigma(alpha_prev)
        if way in EPSILON:
            if before is not None:
                # Fine enough for a table; the library has its own rule.
                sigmas = np.sinh(np.linspace(math.asinh(here), math.asinh(there), 401))
                places = EPSILON[way](np.array([before[0], here, *sigmas]))
                line = (places[2:] - places[1]) / (places[1] - places[0])
                x = x + math.sqrt(alpha_prev) * float(np.trapezoid(line, sigmas)) * (epsilon - before[1])
            before = here, epsilon
        elif way == "x_0 in lambda":
            if before is not None and there:
                h, h_before = math.log(here / there), math.log(before[0] / here)
                x = x + math.sqrt(alpha_prev) * (1 - there / here) * h / (2 * h_before) * (x0 - before[1])
            before = here, x0
    return x


def gaussian(timesteps: list[int], way: str) -> float:
    def denoiser(x: Tensor, t: int) -> Tensor:
        alpha = float(ALPHAS[t])
        return math.sqrt(1 - alpha) * (x - math.sqrt(alpha) * 0.3) / (alpha * 0.25 + 1 - alpha)

    x = walk(denoiser, torch.tensor([0.0, 1.0], dtype=torch.float64), timesteps, way)
    return float(x[1] - x[0]) - 0.5


def mixture(timesteps: list[int], way: str) -> float:
    centres = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]], dtype=torch.float64)
    width, N = 0.15, 20_000

    def denoiser(x: Tensor, t: int) -> Tensor:
        alpha = float(ALPHAS[t])
        variance = alpha * width**2 + 1 - alpha
        away = x[:, None] - math.sqrt(alpha) * centres
        shares = (-away.square().sum(2) / (2 * variance)).softmax(1)
        return math.sqrt(1 - alpha) * (shares[:, :, None] * away).sum(1) / variance

    generator = torch.Generator().manual_seed(0)
    start, noise = torch.randn(2, N, 2, generator=generator, dtype=torch.float64)
    data = centres[torch.randint(3, (N,), generator=generator)] + width * noise
    angles = torch.arange(32, dtype=torch.float64) * math.pi / 32
    directions = torch.stack([angles.cos(), angles.sin()])
    found, real = ((points @ directions).sort(0).values for points in (walk(denoiser, start, timesteps, way), data))
    return float((found - real).square().mean().sqrt())


@torch.no_grad()
def main() -> None:
    PIPE.set_progress_bar_config(disable=True)
    latents = noise_from_seeds((CODES, *PIPE.sample_shape), range(CODES), PIPE.device)()
    limit = PIPE(latents=latents, num_inference_steps=500, output_type="pt").images
    engine = PIPE._network()

    def denoiser(x: Tensor, t: int) -> Tensor:
        return engine.predict(x, torch.tensor(t))

    def model(timesteps: list[int], way: str) -> float:
        found = (walk(denoiser, latents, timesteps, way) / 2 + 0.5).clamp(0, 1)
        return float((found - limit).double().square().mean())

    print("| | timesteps | Gaussian, 10 | 50 | mixture, 10 | model, 10 | 20 |\n|---|---|---|---|---|---|---|")
    for way in ("DDIM", "x_0 in lambda", *EPSILON):
        for spacing in SPACINGS:
            ten, twenty, fifty = (make_timesteps(spacing, S, ALPHAS) for S in (10, 20, 50))
            exact = f"{gaussian(ten, way):+.4f} | {gaussian(fifty, way):+.4f} | {mixture(ten, way):.3f}"
            print(f"| {way} | {spacing} | {exact} | {model(ten, way):.2e} | {model(twenty, way):.2e} |", flush=True)


if __name__ == "__main__":
    main()
