"""The sampling loop: one generator that yields a state a step.

    for state in sample(denoiser, noise, steps): ...

Progress bars, previews, callbacks and animations are consumers of this loop, so that it knows none of them. A denoiser
is anything that is called as `denoiser(sample, timestep)` and returns its prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.noise import NoiseSource
from ddim.process import Step, ddim_step

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""Takes x_t (N, C, H, W) and t, an int64 tensor () on the same device; returns (N, C, H, W)."""


@dataclass
class State:
    """Where the loop stands after a step.

    Attributes:
        index: of the step, from 0.
        step: its coefficients.
        sample: x at `step.prev_timestep`, (N, C, H, W). A consumer may replace it; the loop goes on from what it finds
            here.
        pred_original_sample: the x_0 predicted in this step, after clipping, (N, C, H, W).
    """

    index: int
    step: Step
    sample: Tensor
    pred_original_sample: Tensor


def sample(
    denoiser: Denoiser,
    latents: Tensor,
    steps: Sequence[Step],
    prediction_type: str = "epsilon",
    clip: Callable[[Tensor], Tensor] | None = None,
    use_clipped_model_output: bool = False,
    noise: NoiseSource | None = None,
) -> Iterator[State]:
    """Walk the generative process, equation (12) of the paper, one network evaluation a step.

    Args:
        denoiser: the network.
        latents: x at the first timestep, (N, C, H, W).
        steps: the coefficients of all transitions, in order.
        prediction_type: what the network predicts: `epsilon`, `sample` or `v_prediction`.
        clip: applied to each predicted x_0; `None` leaves it.
        use_clipped_model_output: recompute epsilon from the clipped x_0.
        noise: drawn from once a step; needed where a step adds noise.

    Yields:
        A `State` after each step.
    """
    # On the device once, before the loop: a Python number would be copied there, and waited for, in every step.
    timesteps = torch.tensor([step.timestep for step in steps], device=latents.device)
    x = latents
    for index, step in enumerate(steps):
        model_output = denoiser(x, timesteps[index])
        prev, x0 = ddim_step(
            model_output, x, step, prediction_type, clip, use_clipped_model_output, None if noise is None else noise()
        )
        state = State(index, step, prev, x0)
        yield state
        x = state.sample
