"""The sampling loop: one generator that takes steps in either direction and yields a state after each.

    for state in sample(denoiser, noise, steps): ...                       from noise to images
    for state in run_steps(images, steps[::-1], Inversion(...)): ...       and back (`ddim.diffusion.inversion`)

Progress bars, previews, callbacks and animations consume these states, so that the loop knows none of them. A denoiser
is anything that is called as `denoiser(sample, timestep)` and returns its prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.diffusion.equations import Step, ddim_step
from ddim.diffusion.noise import NoiseSource
from ddim.diffusion.solvers import add_corrections, history_length

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""Takes x_t (N, C, H, W) and t, an int64 tensor () on the same device; returns the prediction (N, C, H, W)."""

StepFn = Callable[[Tensor, Tensor, Step], tuple[Tensor, Tensor]]
"""Takes x (N, C, H, W), the step's timestep t as an int64 tensor () on the same device, and the step; returns x after
the step and the x_0 predicted on the way, both (N, C, H, W)."""


@dataclass(frozen=True)
class StepSettings:
    """What a step of the generative process does beside its coefficients.

    Attributes:
        prediction_type: what the network predicts: `epsilon`, `sample` or `v_prediction`.
        clip: applied to each predicted x_0; `None` leaves it.
        use_clipped_model_output: recompute epsilon from the clipped x_0.
        noise: draws standard Gaussian noise (N, C, H, W) once per step; `None` where no step adds noise.
    """

    prediction_type: str = "epsilon"
    clip: Callable[[Tensor], Tensor] | None = None
    use_clipped_model_output: bool = False
    noise: NoiseSource | None = None


@dataclass
class State:
    """The state of the loop after a step.

    Attributes:
        index: the index of the step, from 0.
        step: the step's coefficients.
        previous: x before the step, (N, C, H, W).
        sample: x after the step, (N, C, H, W). A consumer may replace it; the loop continues from its value.
        pred_original_sample: the x_0 predicted in this step, after clipping, (N, C, H, W).
    """

    index: int
    step: Step
    previous: Tensor
    sample: Tensor
    pred_original_sample: Tensor


def run_steps(x: Tensor, steps: Sequence[Step], step_fn: StepFn) -> Iterator[State]:
    """Take steps one after the other and yield the state after each.

    Args:
        x: the initial sample, (N, C, H, W).
        steps: the transitions, in the order in which they are taken.
        step_fn: takes one step.

    Yields:
        A `State` after each step.

    Example:
        >>> from ddim.diffusion.equations import Step
        >>> halve = lambda x, timestep, step: (x / 2, x)
        >>> steps = [Step(2, 1, 0.5, 0.8), Step(1, 0, 0.8, 0.9)]
        >>> [float(state.sample) for state in run_steps(torch.ones(1, 1, 1, 1), steps, halve)]
        [0.5, 0.25]
    """
    # Copied to the device once, before the loop: copying a number in every step would wait for the device.
    timesteps = torch.tensor([step.timestep for step in steps], device=x.device)
    for index, step in enumerate(steps):
        state = State(index, step, x, *step_fn(x, timesteps[index], step))
        yield state
        x = state.sample


def sample(
    denoiser: Denoiser, latents: Tensor, steps: Sequence[Step], settings: StepSettings = StepSettings()
) -> Iterator[State]:
    """Run the generative process, one network evaluation per step, and yield the state after each.

    Args:
        denoiser: the network.
        latents: x at the first timestep, (N, C, H, W).
        steps: the transitions, in the order in which they are taken.
        settings: the prediction type, clipping and noise.

    Yields:
        A `State` after each step.

    References:
        Equation (12) of arXiv 2010.02502; steps with `corrections`: `ddim.diffusion.solvers.multistep`.

    Example:
        >>> from ddim.diffusion.equations import Step
        >>> x = torch.full((1, 1, 1, 1), 0.6)
        >>> (state,) = sample(lambda x, t: torch.ones_like(x), x, [Step(9, -1, 0.64, 1.0)])
        >>> round(float(state.sample), 6)
        0.0
    """
    return run_steps(latents, steps, generative_step(denoiser, steps, settings))


def generative_step(denoiser: Denoiser, steps: Sequence[Step], settings: StepSettings) -> StepFn:
    """Return the step function of the generative process.

    Args:
        denoiser: the network.
        steps: all steps that will be taken, in order: those of higher order remember the epsilons of the steps before.
        settings: the prediction type, clipping and noise.

    Returns:
        A step function that serves one run along `steps`.

    Example:
        >>> step = Step(9, -1, 0.64, 1.0)
        >>> step_fn = generative_step(lambda x, t: torch.zeros_like(x), [step], StepSettings())
        >>> x_prev, x0 = step_fn(torch.full((1, 1, 1, 1), 0.8), torch.tensor(9), step)
        >>> round(float(x0), 6)
        1.0
    """
    length = history_length(steps)
    history: list[Tensor] = []

    def step_fn(x: Tensor, timestep: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        nonlocal history
        noise = None if settings.noise is None else settings.noise()
        coefficients = step.coefficients()
        x_prev, x0 = ddim_step(
            denoiser(x, timestep),
            x,
            coefficients,
            settings.prediction_type,
            settings.clip,
            settings.use_clipped_model_output,
            noise,
        )
        if length:
            x_prev, epsilon = add_corrections(x_prev, x0, x, coefficients, history)
            history = [epsilon, *history][:length]
        return x_prev, x0

    return step_fn


def in_batches(denoiser: Denoiser, batch_size: int, fill: bool = True) -> Denoiser:
    """Return a denoiser that evaluates the network on `batch_size` samples at a time.

    Args:
        denoiser: the network.
        batch_size: samples per evaluation.
        fill: fill up the last batch, as `divide_batches` does.

    Example:
        >>> sizes = []
        >>> denoiser = in_batches(lambda x, t: sizes.append(len(x)) or x, 4)
        >>> denoiser(torch.zeros(6, 1, 2, 2), torch.tensor(0)).shape, sizes
        (torch.Size([6, 1, 2, 2]), [4, 4])
    """

    def batched(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.cat([denoiser(x[rows], timestep) for rows in divide_batches(x, batch_size, fill)])[: len(x)]

    return batched


def divide_batches(x: Tensor, batch_size: int, fill: bool = True) -> list[Tensor]:
    """Divide samples into batches.

    Most networks round a little differently for batches of different sizes. In batches of one size a sample's
    prediction does not depend, to the bit, on the number of other samples: the last batch is filled up with the last
    sample. That is not needed where the engine is batch-invariant (`ddim.engine.base.Engine`).

    Args:
        x: (N, C, H, W), N at least 1.
        batch_size: samples per batch.
        fill: fill up the last batch.

    Returns:
        The indices of the samples in each batch, int64 (batch_size,), on the device of `x`; fewer in the last one where
        it is not filled up.

    Example:
        >>> [rows.tolist() for rows in divide_batches(torch.zeros(3, 1, 2, 2), 2)]
        [[0, 1], [2, 2]]
        >>> [rows.tolist() for rows in divide_batches(torch.zeros(3, 1, 2, 2), 2, fill=False)]
        [[0, 1], [2]]
    """
    count = len(x) + (-len(x) % batch_size if fill else 0)
    indices = torch.arange(count, device=x.device).clamp_max(len(x) - 1)
    return list(torch.split(indices, batch_size))
