"""The students of a distillation: how many steps each takes, from where, and what it learns from.

`ddim.diffusion.distillation` has the mathematics of their processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddim.diffusion.distillation import check_starts, divide_segments, student_betas
from ddim.scheduler import DDIMScheduler
from ddim.validation import integer

TEACHER_STEPS = 32
"""Steps of the model that the first student takes at once, about."""


@dataclass(frozen=True)
class Stage:
    """One student.

    Attributes:
        timesteps: of the model that is distilled, with the noise of the student's own timesteps: as many as it has
            steps.
        starts: those of its teacher with this noise: the same, where the model itself is the teacher.
        substeps: steps of its teacher for each of its own.

    Example:
        >>> Stage(timesteps=(999, 499), starts=(3, 1), substeps=2).name
        '2'
    """

    timesteps: tuple[int, ...]
    starts: tuple[int, ...]
    substeps: int

    @property
    def num_inference_steps(self) -> int:
        """S, the number of its steps."""
        return len(self.timesteps)

    @property
    def name(self) -> str:
        """The name of its folders."""
        return str(self.num_inference_steps)


def plan_stages(
    steps: Sequence[int],
    scheduler: DDIMScheduler,
    teacher_steps: int | None = None,
    direct: bool = False,
    starts: Sequence[int] | None = None,
) -> list[Stage]:
    """Return the students that lead to some numbers of steps.

    Args:
        steps: decreasing numbers of steps; each divides the one before.
        scheduler: of the model.
        teacher_steps: steps of the model that the first student learns from, a multiple of its own; defaults to the
            number of steps of a model that is a student itself, else to the last multiple up to 32.
        direct: the model is the teacher of every student.
        starts: timesteps of the model where steps of the first student start; defaults to `trailing` ones. Those of
            further students are among them.

    Returns:
        One stage per number.

    Raises:
        ValueError: naming what does not divide what, if the model has too few timesteps, or for wrong timesteps.

    Example:
        >>> plan_stages([4, 2], DDIMScheduler())
        [Stage(timesteps=(999, 749, 499, 249), starts=(999, 749, 499, 249), substeps=8), \
Stage(timesteps=(999, 499), starts=(3, 1), substeps=2)]
    """
    T = len(scheduler)
    if not steps:
        raise ValueError("num_inference_steps must be at least one number, got none")
    counts = [integer("num_inference_steps", count, 1, T) for count in steps]
    for larger, smaller in itertools.pairwise(counts):
        if smaller >= larger or larger % smaller:
            raise ValueError(
                f"num_inference_steps must decrease, each number dividing the one before, got {smaller} after {larger}"
            )
    first = counts[0]
    own_steps = scheduler.distilled_steps
    if teacher_steps is None:
        teacher_steps = own_steps or first * max(2, min(TEACHER_STEPS // first, T // first))
    teacher_steps = integer("teacher_steps", teacher_steps, 1, T)
    if own_steps is not None and teacher_steps != own_steps:
        raise ValueError(f"teacher_steps must be {own_steps}, the steps of this distilled model, got {teacher_steps}")
    if teacher_steps % first or teacher_steps == first:
        raise ValueError(
            f"teacher_steps must be a multiple of the first number of steps, {first}, and larger, got {teacher_steps}"
        )
    if starts is None:
        starts = scheduler.make_timesteps(first, "trailing", order=1)
    if len(starts) != first:
        raise ValueError(f"starts must be {first}, one for each step of the first student, got {len(starts)}")
    starts = check_starts(starts, T)
    divide_segments(starts, teacher_steps // first)
    stages: list[Stage] = []
    for count in counts:
        timesteps = tuple(starts[:: first // count])
        if stages and not direct:
            taught = stages[-1].num_inference_steps
            own = tuple(range(taught - 1, -1, -(taught // count)))
            stages.append(Stage(timesteps, own, taught // count))
        else:
            stages.append(Stage(timesteps, timesteps, teacher_steps // count))
    return stages


def student_scheduler(alphas_cumprod: NDArray[np.float64], timesteps: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of a student's scheduler.

    Args:
        alphas_cumprod: alpha_t of the model, (T,).
        timesteps: S of the model's, decreasing, with the noise of the student's.

    Returns:
        Arguments of `DDIMScheduler`, by which `diffusers` takes the same steps.

    Example:
        >>> student_scheduler(DDIMScheduler().alphas_cumprod_float64, [999, 499])["timesteps_by_steps"]
        {'2': [1, 0]}
    """
    S = len(timesteps)
    return {
        "num_train_timesteps": S,
        "trained_betas": student_betas(alphas_cumprod, timesteps),
        "rescale_betas_zero_snr": False,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "thresholding": False,
        "timesteps_by_steps": {str(S): list(range(S - 1, -1, -1))},
    }
