"""Where the numbers of `diffusers`' DDIM go wrong, and what they are here.

    python -m benchmarks.differences

1. Discretisation. Data N(0.3, 0.5^2) have an exact score, so that a perfect sampler gives a standard deviation of 0.5
and DDIM at S steps a known smaller one.
   `diffusers` steps from t to t - T // S whatever the timesteps are; where those differ from that, its picture is of
   another process.
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


def spread(scheduler, steps: int) -> float:
    """Standard deviation of what a scheduler makes of N(0, 1) with the exact score: the map is affine, two points tell
    it.
    """
    scheduler.set_timesteps(steps)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    for t in scheduler.timesteps.tolist():
        a = alphas[t]
        epsilon = (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)
        x = scheduler.step(epsilon, t, x).prev_sample
    return float((x[1] - x[0]).abs())


def discretisation() -> None:
    print("standard deviation of samples (0.5 is right; DDIM's own error shrinks with the steps)\n")
    print("| timesteps | steps | ddim | diffusers |\n|---|---|---|---|")
    for spacing in ("leading", "linspace", "trailing"):
        for steps in (7, 10, 30, 50):
            ours, peer = (
                library.DDIMScheduler(clip_sample=False, timestep_spacing=spacing) for library in (ddim, diffusers)
            )
            print(f"| {spacing} | {steps} | {spread(ours, steps):.4f} | {spread(peer, steps):.4f} |")


def rounding() -> None:
    print("\nlargest error of x_0 and x_prev over all 1000 timesteps, S = 1000, epsilon and x from N(0, 1)\n")
    print("| schedule | eta | ddim | diffusers |\n|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    x, output = (torch.randn(1, 3, 8, 8, generator=generator) for _ in range(2))
    zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    for name, settings in {"linear": {}, "zero terminal SNR, v-prediction": zero_snr}.items():
        for eta in (0.0, 1.0):
            truth, ours, peer = (library.DDIMScheduler(**settings) for library in (ddim, ddim, diffusers))
            errors = {"ours": 0.0, "peer": 0.0}
            for scheduler in (truth, ours, peer):
                scheduler.set_timesteps(1000)
            for t in range(1000):
                right = truth.step(output.double(), t, x.double(), eta, variance_noise=x.double(), return_dict=False)
                for key, scheduler in (("ours", ours), ("peer", peer)):
                    got = scheduler.step(output, t, x, eta, variance_noise=x, return_dict=False)
                    error = max(float((a - b).abs().max()) for a, b in zip(got, right, strict=True))
                    errors[key] = max(errors[key], math.inf if math.isnan(error) else error)
            peer_error = "NaN" if math.isinf(errors["peer"]) else f"{errors['peer']:.1e}"
            print(f"| {name} | {eta:g} | {errors['ours']:.1e} | {peer_error} |")


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
    discretisation()
    rounding()
    bad_input()
