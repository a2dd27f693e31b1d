"""Sample a Gaussian by DDIM with its exact score, and compare with the closed form.

For data N(MEAN, STD^2) the optimal prediction of the noise is affine in x_t,

    epsilon(x_t, t) = sqrt(1 - alpha) (x_t - sqrt(alpha) MEAN) / (alpha STD^2 + 1 - alpha)

so that every step of DDIM is an affine map and the standard deviation of its samples is a product of slopes. No network
is involved: what the table shows is the error of the solver alone.

    python examples/gaussian.py
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddim import DDIMScheduler
from ddim.diffusion.equations import Step
from ddim.diffusion.loop import sample

MEAN, STD = 0.3, 0.5
SCHEDULER = DDIMScheduler(clip_sample=False)


def exact_epsilon(x: Tensor, timestep: Tensor) -> Tensor:
    """Predict the noise in x_t, as a network of infinite capacity would."""
    alpha = SCHEDULER.alphas_cumprod[timestep].double()
    return (1 - alpha).sqrt() * (x - alpha.sqrt() * MEAN) / (alpha * STD**2 + 1 - alpha)


def sampled_std(steps: list[Step]) -> float:
    """Measure the standard deviation of samples: the slope of the affine map from x_T to x_0, by two points."""
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    for state in sample(exact_epsilon, x, steps):
        x = state.sample
    return float((x[1] - x[0]).abs())


def closed_form_std(steps: list[Step]) -> float:
    """Multiply the slopes of equation (12) with eta = 0."""
    std = 1.0
    for step in steps:
        slope = math.sqrt(1 - step.alpha) / (step.alpha * STD**2 + 1 - step.alpha)
        x0 = (1 - math.sqrt(1 - step.alpha) * slope) / math.sqrt(step.alpha)
        std *= math.sqrt(step.alpha_prev) * x0 + math.sqrt(1 - step.alpha_prev) * slope
    return std


def main() -> None:
    """Print the standard deviation of samples by number of steps; the data's is `STD`."""
    print(f"data {STD}\n\nsteps  DDIM    closed form  order 2")
    for num_steps in (10, 20, 50, 100):
        first, second = (
            SCHEDULER.make_steps(SCHEDULER.make_timesteps(num_steps, order=order), order=order) for order in (1, 2)
        )
        print(f"{num_steps:<7}{sampled_std(first):<8.4f}{closed_form_std(first):<13.4f}{sampled_std(second):.4f}")


if __name__ == "__main__":
    main()
