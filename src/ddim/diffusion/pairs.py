"""Inversion by pairs of states: one network evaluation per step, and no equation to solve.

In u = x / sqrt(alpha) and s = sqrt((1 - alpha) / alpha) the process of eta = 0 is the ODE du/ds = epsilon (equation 14
of arXiv 2010.02502). DDIM takes one state to the next by epsilon at the first of them; its inverse asks for epsilon at
a state that is not yet known. The leapfrog step leads from two states u_o and u to a third one, with epsilon at the
middle one,

    u_t = rho^2 u_o + (1 - rho^2) u + (s_t - s) (1 + rho) epsilon(u)          rho = (s_t - s) / (s - s_o)

It is of order 2, and linear in the outer states: solved for u_o it is the same formula from u_t and u to u_o. So what
it did is undone exactly, up to rounding, wherever it is run: no step has to converge, and none can fail to.

What it costs is that a latent is two states. The formula has a second solution beside that of the ODE, u alternating
with -rho^2: towards the image, where steps in s become smaller, it decays, and towards the noise it grows. The first
step away from the image has no state before it: it is about the inverse of one of DDIM (`ddim.diffusion.inversion`), by
few evaluations, which keeps the second solution small (docs/inversion.md).

References:
    O-BELM of Wang et al., BELM: Bidirectional Explicit Linear Multi-step Sampler for Exact Inversion in Diffusion
    Models, arXiv 2410.07273.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddim.diffusion.equations import Step, predict_x0_epsilon
from ddim.diffusion.loop import Denoiser


def leapfrog(
    other: Tensor, x: Tensor, epsilon: Tensor, alpha_other: float, alpha: float, alpha_target: float
) -> Tensor:
    """Return the state that follows two others.

    Args:
        other: x at `alpha_other`, (N, C, H, W).
        x: x at `alpha`, between the other two.
        epsilon: as the network predicts it from `x`.
        alpha_other: above 0.
        alpha: above 0.
        alpha_target: above 0, of the result.

    Returns:
        x at `alpha_target`.

    Example:
        >>> a, b, epsilon = torch.randn(3, 1, 1, 2, 2)
        >>> c = leapfrog(a, b, epsilon, 0.9, 0.5, 0.1)
        >>> bool(torch.allclose(leapfrog(c, b, epsilon, 0.1, 0.5, 0.9), a, atol=1e-5))
        True
    """
    s_other, s, s_target = (math.sqrt((1 - a) / a) for a in (alpha_other, alpha, alpha_target))
    rho = (s_target - s) / (s - s_other)
    signal = math.sqrt(alpha_target)
    return (
        signal / math.sqrt(alpha_other) * rho**2 * other
        + signal / math.sqrt(alpha) * (1 - rho**2) * x
        + signal * (s_target - s) * (1 + rho) * epsilon
    )


class Leapfrog:
    """The step function of `run_steps` that takes leapfrog steps, towards the image or towards the noise.

    It serves one run. A step leads from `step.timestep` to `step.prev_timestep`, whichever is larger. States are
    float64: in u, rounding at the noisiest timestep is 1 / sqrt(alpha) times as large, and reaches the image.

    Args:
        denoiser: the network.
        prediction_type: what it predicts: `epsilon`, `sample` or `v_prediction`.
        other: the state before the first one, (N, C, H, W).
        alpha_other: alphas_cumprod of that state, above 0.
        dtype: in which the network is evaluated.

    Attributes:
        other: the state before the last one, float64.

    Example:
        >>> from ddim.diffusion.loop import run_steps
        >>> steps = [Step(timestep=5, prev_timestep=0, alpha=0.5, alpha_prev=0.9)]
        >>> step_fn = Leapfrog(lambda x, t: 0.1 * x, "epsilon", torch.ones(1, 1, 2, 2), 0.1, torch.float32)
        >>> (state,) = run_steps(torch.ones(1, 1, 2, 2), steps, step_fn)
        >>> state.sample.shape
        torch.Size([1, 1, 2, 2])
    """

    def __init__(
        self, denoiser: Denoiser, prediction_type: str, other: Tensor, alpha_other: float, dtype: torch.dtype
    ) -> None:
        self.denoiser, self.prediction_type = denoiser, prediction_type
        self.other, self._alpha_other, self._dtype = other.double(), alpha_other, dtype

    def __call__(self, x: Tensor, timestep: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Return x at `step.prev_timestep` and the x_0 predicted at `step.timestep`, both float64.

        Args:
            x: x at `step.timestep`, (N, C, H, W).
            timestep: `step.timestep` as an int64 tensor () on the same device.
            step: the coefficients.
        """
        x = x.double()
        output = self.denoiser(x.to(self._dtype), timestep).double()
        x0, epsilon = predict_x0_epsilon(output, x, step.alpha, self.prediction_type)
        result = leapfrog(self.other, x, epsilon, self._alpha_other, step.alpha, step.alpha_prev)
        self.other, self._alpha_other = x, step.alpha
        return result, x0


def reversed_step(step: Step) -> Step:
    """Return the step that leads back.

    Args:
        step: without noise and corrections.

    Example:
        >>> reversed_step(Step(timestep=9, prev_timestep=0, alpha=0.1, alpha_prev=0.9)).alpha_prev
        0.1
    """
    return Step(step.prev_timestep, step.timestep, step.alpha_prev, step.alpha)
