"""Sample with a custom solver: the second-order Adams-Bashforth method, against DDIM at the same cost.

With y = x / sqrt(alpha) and sigma = sqrt(1 - alpha) / sqrt(alpha) deterministic sampling solves dy = epsilon dsigma,
equation (14) of arXiv 2010.02502, and a step of DDIM is Euler's for it: epsilon is taken to be constant. Here epsilon
is the line in sigma through the last two predictions, which costs no further evaluation of the network. The library's
own `order=2` does the same in a better variable than sigma (docs/fewer-steps.md).

    python examples/custom_solver.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddim import DDIMPipeline
from ddim.diffusion.equations import Step, ddim_step
from ddim.diffusion.noise import noise_from_seeds

Denoiser = Callable[[Tensor, Tensor], Tensor]


def sigma(alpha: float) -> float:
    """Return the ratio of noise to signal."""
    return math.sqrt((1 - alpha) / alpha)


def ddim(denoiser: Denoiser, x: Tensor, steps: Sequence[Step]) -> Tensor:
    """Take Euler steps from x at the first timestep, (N, C, H, W), to clean images."""
    for step in steps:
        x, _ = ddim_step(denoiser(x, torch.tensor(step.timestep)), x, step)
    return x


def adams_bashforth(denoiser: Denoiser, x: Tensor, steps: Sequence[Step]) -> Tensor:
    """Take second-order steps from x at the first timestep, (N, C, H, W), to clean images."""
    previous: tuple[float, Tensor] | None = None
    for step in steps:
        epsilon = denoiser(x, torch.tensor(step.timestep))
        x, _ = ddim_step(epsilon, x, step)
        start, end = sigma(step.alpha), sigma(step.alpha_prev)
        if previous is not None:
            slope = (epsilon - previous[1]) / (start - previous[0])
            x = x + math.sqrt(step.alpha_prev) * (end - start) ** 2 / 2 * slope
        previous = start, epsilon
    return x


@torch.no_grad()
def main() -> None:
    """Print the mean squared error of both solvers to 100 steps of DDIM from the same latents."""
    pipe = DDIMPipeline.from_pretrained("mnist")
    latents = noise_from_seeds((4, *pipe.sample_shape), range(4), pipe.device)()

    def solve(solver: Callable[[Denoiser, Tensor, Sequence[Step]], Tensor], num_steps: int) -> Tensor:
        steps = pipe.scheduler.make_steps(pipe.scheduler.make_timesteps(num_steps))
        return solver(lambda x, t: pipe.unet(x, t).sample, latents, steps) / 2 + 0.5

    limit = solve(ddim, 100)
    print("steps  DDIM     Adams-Bashforth")
    for num_steps in (10, 20):
        errors = [float((solve(solver, num_steps) - limit).square().mean()) for solver in (ddim, adams_bashforth)]
        print(f"{num_steps:<7}{errors[0]:<9.5f}{errors[1]:.5f}")


if __name__ == "__main__":
    main()
