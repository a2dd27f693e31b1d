"""Where the numbers of `diffusers`' DDIM go wrong, and what they are here.

    python -m benchmarks.differences

1. Timesteps. With the exact score of data N(0.3, 0.5^2) each step is affine, so that equation (12) of the paper along a
list of timesteps gives the
   standard deviation of the samples in closed form. `diffusers` steps from t to t - T // S whatever the next timestep
   is.
2. Rounding. Schedules in float32 lose 1 - alphas_cumprod near t = 0; errors are against the same step in float64.
3. Bad input: what `pipe(...)` does with it.
"""

from __future__ import annotations

import logging
import math

import diffusers
import torch

import ddim

MEAN, STD = 0.3, 0.5


ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def slope(alpha: float) -> float:
    """The exact score's epsilon is affine in x; this is its slope."""
    return math.sqrt(1 - alpha) / (alpha * STD**2 + 1 - alpha)


def equation_12(timesteps: list[int]) -> float:
    """Standard deviation of the samples along a list of timesteps, written out for eta = 0."""
    spread = 1.0
    for t, t_prev in zip(timesteps, [*timesteps[1:], None], strict=True):
        a, a_prev = float(ALPHAS[t]), 1.0 if t_prev is None else float(ALPHAS[t_prev])
        x0 = (1 - math.sqrt(1 - a) * slope(a)) / math.sqrt(a)
        spread *= math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev) * slope(a)
    return spread


def run(scheduler) -> float:
    """The same from a scheduler's steps: two points tell the slope of their affine map."""
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    for t in scheduler.timesteps.tolist():
        a = float(ALPHAS[t])
        epsilon = slope(a) * (x - math.sqrt(a) * MEAN)
        x = scheduler.step(epsilon, t, x).prev_sample
    return float((x[1] - x[0]).abs())


def timesteps() -> None:
    print("standard deviation of the samples\n")
    print("| timesteps | steps | equation (12) | ddim | diffusers |\n|---|---|---|---|---|")
    for spacing in ("leading", "linspace", "trailing"):
        for steps in (7, 10, 30, 50):
            row = []
            for library in (ddim, diffusers):
                scheduler = library.DDIMScheduler(clip_sample=False, timestep_spacing=spacing)
                scheduler.set_timesteps(steps)
                row.append(run(scheduler))
            right = equation_12(scheduler.timesteps.tolist())
            print(f"| {spacing} | {steps} | {right:.5f} | {row[0]:.5f} | {row[1]:.5f} |")


def rounding() -> None:
    print("\nlargest error of x_0 and x_prev over all timesteps, epsilon and x from N(0, 1)\n")
    print("| schedule | steps | eta | ddim | diffusers |\n|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    x, output = (torch.randn(1, 3, 8, 8, generator=generator) for _ in range(2))
    zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    for name, settings in {"linear": {}, "zero terminal SNR, v-prediction, trailing": zero_snr}.items():
        for steps, eta in ((10, 0.0), (10, 1.0), (1000, 0.0), (1000, 1.0)):
            truth, ours, peer = (library.DDIMScheduler(**settings) for library in (ddim, ddim, diffusers))
            for scheduler in (truth, ours, peer):
                scheduler.set_timesteps(steps)
            errors = [0.0, 0.0]
            for t in truth.timesteps.tolist():
                right = truth.step(output.double(), t, x.double(), eta, variance_noise=x.double(), return_dict=False)
                for which, scheduler in enumerate((ours, peer)):
                    got = scheduler.step(output, t, x, eta, variance_noise=x, return_dict=False)
                    difference = torch.stack([(a - b).abs().max() for a, b in zip(got, right, strict=True)])
                    # max() of PyTorch keeps NaN, that of Python may lose it.
                    errors[which] = float(torch.tensor([errors[which], difference.max()]).max())
            print(f"| {name} | {steps} | {eta:g} | {errors[0]:.1e} | {errors[1]:.1e} |")


def bad_input() -> None:
    print("\nbad input\n\n| call | ddim | diffusers |\n|---|---|---|")
    ours = ddim.DDIMPipeline.from_pretrained("mnist")
    unet = diffusers.UNet2DModel(**ours.unet.config)
    unet.load_state_dict(ours.unet.state_dict())
    peer = diffusers.DDIMPipeline(unet.eval(), diffusers.DDIMScheduler())
    cases = {
        "num_inference_steps=0": {"num_inference_steps": 0},
        "num_inference_steps=-5": {"num_inference_steps": -5},
        "eta=float('nan')": {"eta": float("nan"), "num_inference_steps": 2},
        'output_type="jpg"': {"output_type": "jpg", "num_inference_steps": 2},
    }
    for name, arguments in cases.items():
        answers = []
        for pipe in (ours, peer):
            pipe.set_progress_bar_config(disable=True)
            try:
                answers.append(f"returns {type(pipe(**arguments).images).__name__}")
            except Exception as error:  # Whatever it is, it is the answer.
                answers.append(f"{type(error).__name__}: {error}")
        print(f"| `{name}` | {answers[0]} | {answers[1]} |")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    timesteps()
    rounding()
    bad_input()
