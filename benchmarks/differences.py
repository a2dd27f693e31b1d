"""Numerical differences between `ddim` and `diffusers`, each against an independent reference.

    python -m benchmarks.differences

1. Timesteps. With the exact score of data N(0.3, 0.5^2) each step is affine, so that equation (12) of the paper along a
   list of timesteps gives the standard deviation of the samples in closed form. `diffusers` steps from t to t - T // S
   whatever the next timestep is.
2. Rounding. Schedules in float32 lose 1 - alphas_cumprod near t = 0; errors are against the same step in float64.
3. Invalid arguments: what `pipe(...)` does with them.
"""

from __future__ import annotations

import argparse
import logging
import math
from typing import Any

import diffusers
import torch

import ddim

MEAN, STD = 0.3, 0.5
ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def slope(alpha: float) -> float:
    """Return the slope of the exact epsilon, which is affine in x."""
    return math.sqrt(1 - alpha) / (alpha * STD**2 + 1 - alpha)


def equation_12(timesteps: list[int]) -> float:
    """Return the standard deviation of the samples along a list of timesteps, in closed form for eta = 0."""
    std = 1.0
    for t, t_prev in zip(timesteps, [*timesteps[1:], None], strict=True):
        a, a_prev = float(ALPHAS[t]), 1.0 if t_prev is None else float(ALPHAS[t_prev])
        x0 = (1 - math.sqrt(1 - a) * slope(a)) / math.sqrt(a)
        std *= math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev) * slope(a)
    return std


def sampled_std(scheduler: Any) -> float:
    """Return the same from a scheduler's steps: the slope of their affine map, by two points."""
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    for t in scheduler.timesteps.tolist():
        a = float(ALPHAS[t])
        epsilon = slope(a) * (x - math.sqrt(a) * MEAN)
        x = scheduler.step(epsilon, t, x).prev_sample
    return float((x[1] - x[0]).abs())


def compare_timesteps() -> None:
    """Print the standard deviation of samples for several spacings."""
    print("standard deviation of the samples\n")
    print("| timesteps | steps | equation (12) | ddim | diffusers |\n|---|---|---|---|---|")
    for spacing in ("leading", "linspace", "trailing"):
        for steps in (7, 10, 30, 50):
            row = []
            for library in (ddim, diffusers):
                scheduler = library.DDIMScheduler(clip_sample=False, timestep_spacing=spacing)
                scheduler.set_timesteps(steps)
                row.append(sampled_std(scheduler))
            expected = equation_12(scheduler.timesteps.tolist())
            print(f"| {spacing} | {steps} | {expected:.5f} | {row[0]:.5f} | {row[1]:.5f} |")


def compare_rounding() -> None:
    """Print the largest float32 errors of a step."""
    print("\nlargest error of x_0 and x_prev over all timesteps, epsilon and x from N(0, 1)\n")
    print("| schedule | steps | eta | ddim | diffusers |\n|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    x, output = (torch.randn(1, 3, 8, 8, generator=generator) for _ in range(2))
    zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    for name, settings in {"linear": {}, "zero terminal SNR, v-prediction, trailing": zero_snr}.items():
        for steps, eta in ((10, 0.0), (10, 1.0), (1000, 0.0), (1000, 1.0)):
            reference, ours, theirs = (library.DDIMScheduler(**settings) for library in (ddim, ddim, diffusers))
            for scheduler in (reference, ours, theirs):
                scheduler.set_timesteps(steps)
            errors = [0.0, 0.0]
            for t in reference.timesteps.tolist():
                expected = reference.step(
                    output.double(), t, x.double(), eta, variance_noise=x.double(), return_dict=False
                )
                for index, scheduler in enumerate((ours, theirs)):
                    result = scheduler.step(output, t, x, eta, variance_noise=x, return_dict=False)
                    difference = torch.stack([(a - b).abs().max() for a, b in zip(result, expected, strict=True)])
                    # PyTorch's max() propagates NaN, Python's may lose it.
                    errors[index] = float(torch.tensor([errors[index], difference.max()]).max())
            print(f"| {name} | {steps} | {eta:g} | {errors[0]:.1e} | {errors[1]:.1e} |")


def compare_invalid_arguments() -> None:
    """Print what both pipelines do with invalid arguments."""
    print("\ninvalid arguments\n\n| call | ddim | diffusers |\n|---|---|---|")
    ours = ddim.DDIMPipeline.from_pretrained("mnist")
    unet = diffusers.UNet2DModel(**ours.unet.config)
    unet.load_state_dict(ours.unet.state_dict())
    theirs = diffusers.DDIMPipeline(unet.eval(), diffusers.DDIMScheduler())
    cases = {
        "num_inference_steps=0": {"num_inference_steps": 0},
        "num_inference_steps=-5": {"num_inference_steps": -5},
        "eta=float('nan')": {"eta": float("nan"), "num_inference_steps": 2},
        'output_type="jpg"': {"output_type": "jpg", "num_inference_steps": 2},
    }
    for name, arguments in cases.items():
        outcomes = []
        for pipe in (ours, theirs):
            pipe.set_progress_bar_config(disable=True)
            try:
                outcomes.append(f"returns {type(pipe(**arguments).images).__name__}")
            except Exception as error:  # Any exception is an outcome.
                outcomes.append(f"{type(error).__name__}: {error}")
        print(f"| `{name}` | {outcomes[0]} | {outcomes[1]} |")


def main() -> None:
    """Print the three tables."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    logging.disable(logging.WARNING)
    compare_timesteps()
    compare_rounding()
    compare_invalid_arguments()


if __name__ == "__main__":
    main()
