"""The mathematics of distilling several steps of DDIM into one.

A student of S steps has a process of its own: its S timesteps S - 1, ..., 0 have the noise of the timesteps
tau_0 > tau_1 > ... > tau_{S-1} of its teacher,

    alpha'(S - 1 - i) = alpha(tau_i)

so that DDIM in S steps, in whatever library and by whatever spacing, visits all of them. It takes plain steps of DDIM
(eta = 0) between them, the last one to alpha = 1. A teacher divides each of them into k of its own,

    x_t -> ... -> x_s            one step of the student from t to s, k steps of the teacher

and the student is to predict whatever takes x_t to the teacher's x_s in one step. With phi = arccos(sqrt(alpha)),
x_t = cos(phi_t) x_0 + sin(phi_t) epsilon and v = cos(phi_t) epsilon - sin(phi_t) x_0, a step of DDIM is a rotation:

    x_s = cos(phi_t - phi_s) x_t - sin(phi_t - phi_s) v
    v   = (cos(phi_t - phi_s) x_t - x_s) / sin(phi_t - phi_s)                                    the target

which is finite at every t, also where alpha = 0. The x_0 that belongs to it is equation (8) of appendix G of
progressive distillation (Salimans and Ho, arXiv 2202.00512),

    x_0 = (x_s - sin(phi_s) / sin(phi_t) x_t) / (cos(phi_s) - sin(phi_s) / sin(phi_t) cos(phi_t))
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddim.diffusion.equations import Coefficients, Step, ddim_step
from ddim.diffusion.loop import Denoiser, StepSettings
from ddim.diffusion.solvers import add_corrections, multistep
from ddim.validation import integer

UNCLIPPED = StepSettings()
"""Of a teacher that predicts epsilon."""


def check_starts(starts: Sequence[int], num_train_timesteps: int) -> list[int]:
    """Check the timesteps of a teacher where the steps of a student start.

    Args:
        starts: tau_0, ..., tau_{S-1}.
        num_train_timesteps: T of the teacher.

    Returns:
        A list of them.

    Raises:
        ValueError: if they are not integers that decrease from T - 1 to at least 0.

    Example:
        >>> check_starts([999, 450], 1000)
        [999, 450]
        >>> check_starts([900, 450], 1000)
        Traceback (most recent call last):
        ValueError: starts must decrease from 999, where the noise is sampled, to at least 0, got 900, 450
    """
    T = num_train_timesteps
    checked = [integer("starts", start, 0, T - 1) for start in starts]
    if checked[:1] != [T - 1] or any(after >= start for start, after in itertools.pairwise(checked)):
        raise ValueError(
            f"starts must decrease from {T - 1}, where the noise is sampled, to at least 0, got "
            f"{', '.join(map(str, checked)) or 'none'}"
        )
    return checked


def divide_segments(starts: Sequence[int], substeps: int) -> list[int]:
    """Return the timesteps of a teacher: k of them, evenly, from each start to the next, and from the last one to -1.

    Args:
        starts: timesteps of the teacher where a step of the student starts, decreasing.
        substeps: k.

    Returns:
        k times as many timesteps, decreasing. Those of `trailing` starts are `trailing` ones.

    Raises:
        ValueError: if there are fewer than k timesteps from a start to the next.

    Example:
        >>> divide_segments([999, 649, 399, 199], 2)
        [999, 824, 649, 524, 399, 299, 199, 99]
    """
    timesteps = []
    for start, end in itertools.pairwise([*starts, -1]):
        if start - end < substeps:
            raise ValueError(
                f"substeps must be at most {start - end}, the timesteps from {start} to {end + 1}, got {substeps}"
            )
        timesteps += [round(start + 1 - (start - end) * k / substeps) - 1 for k in range(substeps)]
    return timesteps


def student_betas(alphas_cumprod: NDArray[np.float64], starts: Sequence[int]) -> list[float]:
    """Return the variances of a student's process.

    Args:
        alphas_cumprod: alpha_t of the teacher, (T,), decreasing.
        starts: S timesteps of the teacher, decreasing.

    Returns:
        S numbers beta, the least noisy timestep first, with alpha'(u) = product over v <= u of (1 - beta_v).

    Example:
        >>> student_betas(np.array([0.9, 0.8, 0.6, 0.2]), [3, 1])
        [0.19999999999999996, 0.75]
    """
    alphas = [1.0, *(float(alphas_cumprod[start]) for start in reversed(starts))]
    return [1 - noisier / alpha for alpha, noisier in itertools.pairwise(alphas)]


@dataclass(frozen=True)
class Segments:
    """The steps of a teacher, k of them for each of the S steps of a student.

    Attributes:
        timesteps: where the teacher is evaluated, int64 (S, k).
        coefficients: of its steps, (S, k, 8), in the order of `ddim.diffusion.equations.Coefficients`.
        rotations: cosine and sine of the angle of each step of the student, (S, 2).
        order: of the teacher's solver, 1 or 2.

    Example:
        >>> from ddim.diffusion.equations import make_steps
        >>> segments = Segments.of(make_steps([3, 2, 1, 0], [0.9, 0.7, 0.4, 0.1]), 2)
        >>> segments.timesteps
        tensor([[3, 2],
                [1, 0]])
    """

    timesteps: Tensor
    coefficients: Tensor
    rotations: Tensor
    order: int = 1

    @classmethod
    def of(cls, steps: Sequence[Step], num_inference_steps: int, order: int = 1) -> Segments:
        """Divide the steps of a teacher among those of a student.

        Args:
            steps: the teacher's, of eta = 0, a multiple of S of them.
            num_inference_steps: S.
            order: of the teacher's solver, 1 or 2. At order 2 the first step in each step of the student is DDIM's.

        Returns:
            The segments, on the CPU, in float32.
        """
        k = len(steps) // num_inference_steps
        parts = [steps[first : first + k] for first in range(0, len(steps), k)]
        if order == 2:
            parts = [multistep(part, 2) for part in parts]
        angles = [_angle(part[0].alpha) - _angle(part[-1].alpha_prev) for part in parts]
        return cls(
            torch.tensor([[step.timestep for step in part] for part in parts]),
            torch.tensor([[step.coefficients() for step in part] for part in parts], dtype=torch.float32),
            torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles], dtype=torch.float32),
            order,
        )

    def to(self, device: torch.device) -> Segments:
        """Return the same on a device.

        Args:
            device: the device.
        """
        return replace(
            self,
            timesteps=self.timesteps.to(device),
            coefficients=self.coefficients.to(device),
            rotations=self.rotations.to(device),
        )


def _angle(alpha: float) -> float:
    """Return phi = arccos(sqrt(alpha)), accurate at both ends."""
    return math.atan2(math.sqrt(1 - alpha), math.sqrt(alpha))


def follow_teacher(
    denoiser: Denoiser,
    x: Tensor,
    segments: Segments,
    index: Tensor,
    settings: StepSettings = UNCLIPPED,
) -> Tensor:
    """Take each sample through the teacher's steps of its own segment.

    Args:
        denoiser: the teacher, called with one timestep per sample, int64 (N,).
        x: samples at the first timestep of their segments, (N, C, H, W) float32.
        segments: the steps, on the device of `x`.
        index: the segment of each sample, int64 (N,).
        settings: what the teacher predicts, and how its x_0 is clipped; without noise.

    Returns:
        The samples where their segments end, (N, C, H, W).

    Example:
        >>> from ddim.diffusion.equations import make_steps
        >>> segments = Segments.of(make_steps([3, 2, 1, 0], [0.9, 0.7, 0.4, 0.1]), 2)
        >>> x = torch.full((1, 1, 1, 1), 0.7**0.5)  # x_0 = 1, without noise
        >>> round(float(follow_teacher(lambda x, t: torch.zeros_like(x), x, segments, torch.tensor([1]))), 6)
        1.0
    """
    timesteps, coefficients = segments.timesteps[index], segments.coefficients[index]
    history: list[Tensor] = []
    for k in range(timesteps.shape[1]):
        c = Coefficients(*coefficients[:, k, :, None, None, None].unbind(1))
        output = denoiser(x, timesteps[:, k])
        x_prev, x0 = ddim_step(output, x, c, settings.prediction_type, settings.clip)
        if segments.order == 2:
            x_prev, epsilon = add_corrections(x_prev, x0, x, c, history)
            history = [epsilon]
        x = x_prev
    return x


def velocity_target(x: Tensor, x_prev: Tensor, segments: Segments, index: Tensor) -> Tensor:
    """Return the v that leads from x_t to x_s in one step of DDIM.

    Args:
        x: x_t, (N, C, H, W).
        x_prev: x_s, of the same shape.
        segments: whose `rotations` are used.
        index: the segment of each sample, int64 (N,).

    Returns:
        (N, C, H, W).

    References:
        Appendices D and G of arXiv 2202.00512.

    Example:
        >>> from ddim.diffusion.equations import make_steps
        >>> steps = make_steps([1], [0.9, 0.4])
        >>> x, v = torch.tensor([[[[0.3]]]]), torch.tensor([[[[0.7]]]])
        >>> x_prev, _ = ddim_step(v, x, steps[0], "v_prediction")
        >>> round(float(velocity_target(x, x_prev, Segments.of(steps, 1), torch.tensor([0]))), 5)
        0.7
    """
    cos, sin = segments.rotations[index][:, :, None, None, None].unbind(1)
    return (cos * x - x_prev) / sin
