"""Sample with a custom solver: the second-order Adams-Bashforth method, against DDIM at the same cost.

With y = x / sqrt(alpha) and sigma = sqrt(1 - alpha) / sqrt(alpha) deterministic sampling solves dy = epsilon dsigma,
equation (14) of arXiv 2010.02502, and a step of DDIM is Euler's for it: epsilon is taken to be constant. Here epsilon
is the line in sigma through the last two predictions, which costs no further evaluation of the network. The library's
own `order=2` does the same in a better variable than sigma (docs/fewer-steps.md).

A solver is a function of x, the timestep and the step's coefficients, which `run_steps` calls in each step.

    python examples/custom_solver.py
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddim import DDIMPipeline
from ddim.diffusion.equations import Step, ddim_step
from ddim.diffusion.loop import Denoiser, StepFn, run_steps
from ddim.diffusion.noise import noise_from_seeds


def ddim(denoiser: Denoiser) -> StepFn:
    """Return DDIM's step: x at the next timestep, and the predicted x_0."""

    def step_fn(x: Tensor, timestep: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        return ddim_step(denoiser(x, timestep), x, step)

    return step_fn


def adams_bashforth(denoiser: Denoiser) -> StepFn:
    """Return a second-order step, which remembers the previous prediction."""
    previous: tuple[float, Tensor] | None = None

    def step_fn(x: Tensor, timestep: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        nonlocal previous
        epsilon = denoiser(x, timestep)
        x_prev, x0 = ddim_step(epsilon, x, step)
        sigma, sigma_prev = (math.sqrt((1 - alpha) / alpha) for alpha in (step.alpha, step.alpha_prev))
        if previous is not None:
            slope = (epsilon - previous[1]) / (sigma - previous[0])
            x_prev = x_prev + math.sqrt(step.alpha_prev) * (sigma_prev - sigma) ** 2 / 2 * slope
        previous = sigma, epsilon
        return x_prev, x0

    return step_fn


@torch.no_grad()
def main() -> None:
    """Print the mean squared error of both solvers to 100 steps of DDIM from the same latents."""
    pipe = DDIMPipeline.from_pretrained("mnist")
    latents = noise_from_seeds((2, *pipe.sample_shape), range(2), pipe.device)()

    def solve(solver: Callable[[Denoiser], StepFn], num_steps: int) -> Tensor:
        steps = pipe.scheduler.make_steps(pipe.scheduler.make_timesteps(num_steps))
        x = latents
        for state in run_steps(latents, steps, solver(lambda x, t: pipe.unet(x, t).sample)):
            x = state.sample
        return x / 2 + 0.5

    limit = solve(ddim, 100)
    print("steps  DDIM     Adams-Bashforth")
    for num_steps in (10, 20):
        errors = [float((solve(solver, num_steps) - limit).square().mean()) for solver in (ddim, adams_bashforth)]
        print(f"{num_steps:<7}{errors[0]:<9.5f}{errors[1]:.5f}")


if __name__ == "__main__":
    main()
