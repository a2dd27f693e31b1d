"""The loop: one generator that walks a sequence of steps, in either direction, and yields a state a step.

    for state in sample(denoiser, noise, steps): ...              from noise to pictures
    for state in walk(pictures, steps[::-1], Inversion(...)): ... and back, see `ddim.diffusion.inversion`

Progress bars, previews, callbacks and animations are consumers of this loop, so that it knows none of them. A denoiser
is anything that is called as `denoiser(sample, timestep)` and returns its prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.diffusion.equations import Step, ddim_step
from ddim.diffusion.noise import NoiseSource
from ddim.diffusion.solvers import add_correction

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""Takes x_t (N, C, H, W) and t, an int64 tensor () on the same device; returns (N, C, H, W)."""

StepFn = Callable[[Tensor, Tensor, Step], tuple[Tensor, Tensor]]
"""Takes x, the step's timestep t as an int64 tensor () on the same device, and the step; returns where x is after it
and the x_0 predicted on the way, both (N, C, H, W)."""


@dataclass(frozen=True)
class StepSettings:
    """What all steps of a run have in common.

    Attributes:
        prediction_type: what the network predicts: `epsilon`, `sample` or `v_prediction`.
        clip: applied to each predicted x_0; `None` leaves it.
        use_clipped_model_output: recompute epsilon from the clipped x_0.
        noise: drawn from once per step; needed where a step adds noise.
    """

    prediction_type: str = "epsilon"
    clip: Callable[[Tensor], Tensor] | None = None
    use_clipped_model_output: bool = False
    noise: NoiseSource | None = None


@dataclass
class State:
    """Where the loop stands after a step.

    Attributes:
        index: of the step, from 0.
        step: its coefficients.
        sample: x at `step.prev_timestep`, or at `step.timestep` on the way to noise, (N, C, H, W). A consumer may
            replace it; the loop goes on from what it finds here.
        pred_original_sample: the x_0 predicted in this step, after clipping, (N, C, H, W).
    """

    index: int
    step: Step
    sample: Tensor
    pred_original_sample: Tensor


def walk(x: Tensor, steps: Sequence[Step], move: StepFn) -> Iterator[State]:
    """Take the steps one after the other.

    Args:
        x: where to start, (N, C, H, W).
        steps: the coefficients of all transitions, in the order they are taken.
        move: how a step is taken.

    Yields:
        A `State` after each step.
    """
    # On the device once, before the loop: a Python number would be copied there, and waited for, in every step.
    timesteps = torch.tensor([step.timestep for step in steps], device=x.device)
    for index, step in enumerate(steps):
        state = State(index, step, *move(x, timesteps[index], step))
        yield state
        x = state.sample


def sample(
    denoiser: Denoiser, latents: Tensor, steps: Sequence[Step], settings: StepSettings | None = None
) -> Iterator[State]:
    """Run the generative process, equation (12) of the paper, with one network evaluation per step.

    Args:
        denoiser: the network.
        latents: x at the first timestep, (N, C, H, W).
        steps: the coefficients of all transitions, in order.
        settings: of the run; those of a network that predicts epsilon, without clipping and noise, if `None`.

    Yields:
        A `State` after each step.
    """
    settings = settings or StepSettings()
    noise = settings.noise
    previous_epsilon: Tensor | None = None
    is_second_order = any(step.correction for step in steps)

    def step_fn(x: Tensor, timestep: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        nonlocal previous_epsilon
        drawn = None if noise is None else noise()
        coefficients = step.coefficients()
        x_prev, x0 = ddim_step(
            denoiser(x, timestep),
            x,
            coefficients,
            settings.prediction_type,
            settings.clip,
            settings.use_clipped_model_output,
            drawn,
        )
        if is_second_order:
            x_prev, previous_epsilon = add_correction(x_prev, x0, x, coefficients, previous_epsilon)
        return x_prev, x0

    return walk(latents, steps, step_fn)


def in_batches(denoiser: Denoiser, batch_size: int) -> Denoiser:
    """The same denoiser, asked about exactly `batch_size` samples at a time; the last ones are repeated to fill up.

    Networks round a little differently for batches of different sizes. In batches of one size a sample's prediction
    does not depend, to the bit, on how many others are asked about.
    """

    def ask(x: Tensor, timestep: Tensor) -> Tensor:
        missing = -len(x) % batch_size
        filled = torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x
        starts = range(0, len(filled), batch_size)
        return torch.cat([denoiser(filled[i : i + batch_size], timestep) for i in starts])[: len(x)]

    return ask
